"""What a sweep is asked to do."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from functools import cached_property
from itertools import product
from operator import index
from typing import Any, Literal, TypedDict, Unpack

from fastsitch.activations.image_order import ImageOrder
from fastsitch.data import canonical_dataset
from fastsitch.errors import ConfigError, argument
from fastsitch.identity import stable_hash
from fastsitch.network_names import NetworkName
from fastsitch.stitching.cells import Unit
from fastsitch.stitching.geometry import DEFAULT_RULES, Rules
from fastsitch.stitching.recipe import PEAK_RATES, STITCH_RECIPES, TrainingRecipe, stitch_recipe
from fastsitch.vocabulary import (
    DEFAULT_DATASET,
    ClassToken,
    Compile,
    Init,
    Kernel,
    Loss,
    Optimizer,
    Precision,
    ReceiverBN,
    Resample,
    Setting,
    Solver,
    SourceName,
    StitchRecipe,
    require_choice,
    require_choices,
    require_whole,
    separated,
)

MATCH_EPOCHS = 30
"""Of matching by training, where none are asked for. Source: Hernandez et al. 2022."""

SweepPrecision = Precision | Literal["fp64"]
"""fp64 is for exactness tests and has no option on the command line."""


class SweepOptions(TypedDict, total=False):
    """What a sweep may be asked for beside its networks and data set; each has a default.

    Lists may be texts with commas. See :class:`SweepConfig` for what the options mean.
    """

    settings: Sequence[Setting] | str
    seeds: Sequence[int] | int | str
    positions: Sequence[str] | str | None
    """Names or patterns such as ``layer*.0``; None takes all positions."""
    recipe: StitchRecipe | None
    """None: ``small`` for the embedded images, else ``paper``."""
    epochs: float | None
    lr: float | None
    optimizer: Optimizer | None
    batch_size: int | None
    loss: Loss
    solver: Solver
    init: Init
    receiver_bn: ReceiverBN
    resample: Resample
    class_token: ClassToken
    group_size: int | str
    precision: SweepPrecision
    kernel: Kernel
    compile: Compile
    source: SourceName
    block: int
    """This and ``window`` have no option on the command line."""
    window: int


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Everything that a sweep's results depend on, beside networks, data and machine; checked on construction."""

    dataset: str
    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    settings: tuple[Setting, ...] = ("T2T",)
    loss: Loss = "task"
    solver: Solver = "exact"
    """How matched stitches are found."""
    init: Init = "default"
    """Where vanilla stitches start."""
    receiver_bn: ReceiverBN = "frozen"
    """``batch``: BatchNorm uses batch statistics per stitch in training, each stitch's running statistics after it."""
    seeds: tuple[int, ...] = (0,)
    recipe: TrainingRecipe = field(default_factory=lambda: STITCH_RECIPES["paper"])
    group_size: str = "auto"
    """``auto``, or the largest number of cells to train in one batch."""
    precision: SweepPrecision = "auto"
    kernel: Kernel = "auto"
    compile: Compile = "auto"
    """``on`` lets torch.compile generate the receiver's blocks."""
    source: SourceName = "auto"
    """Where the sender's representations come from while stitches are trained."""
    block: int = ImageOrder.block
    """Consecutive images that stay together in the first level of shuffling."""
    window: int = ImageOrder.window
    """Images that are shuffled among each other in the second level."""
    resample: Resample = DEFAULT_RULES.resample
    """How grids whose sizes are no multiples of each other are joined."""
    class_token: ClassToken = DEFAULT_RULES.class_token
    """What becomes the class token of a receiver that has one."""
    positions: tuple[str, ...] = ()
    """Patterns: only cells whose sender and receiver positions both match one of them are trained; () is all."""

    def __post_init__(self) -> None:
        self._check_networks()
        require_choices("settings", self.settings, Setting)
        require_choice("loss", self.loss, Loss)
        require_choice("solver", self.solver, Solver)
        require_choice("init", self.init, Init)
        require_choice("receiver_bn", self.receiver_bn, ReceiverBN)
        if self.precision != "fp64":
            require_choice("precision", self.precision, Precision)
        require_choice("compile", self.compile, Compile)
        require_choice("kernel", self.kernel, Kernel)
        require_choice("source", self.source, SourceName)
        # checks the two words
        _ = self.rules
        if not self.seeds:
            raise ConfigError(f"{argument('seeds', self.seeds)}: expected at least one")
        for seed in self.seeds:
            require_whole("seeds", seed, 0)
        require_whole("block", self.block)
        require_whole("window", self.window)
        if self.group_size != "auto" and (not self.group_size.isdecimal() or int(self.group_size) < 1):
            raise ConfigError(f"{argument('group_size', self.group_size)}: expected auto or a number from 1")
        self._check_combinations()

    def _check_networks(self) -> None:
        for role, names in (("senders", self.senders), ("receivers", self.receivers)):
            if not names:
                raise ConfigError(f"no {role}: name at least one network with {argument(role)}")
            for name in names:
                if NetworkName.parse(name).random:
                    raise ConfigError(
                        f"{argument(role, name)}: controls come from {argument('settings', 'R2T')}, T2R or R2R; name "
                        "the trained network"
                    )

    def _check_combinations(self) -> None:
        matching = argument("loss", "match")
        if self.solver == "sgd" and self.loss != "match":
            raise ConfigError(f"{argument('solver', 'sgd')} trains matched stitches: add {matching}, or leave it out")
        if self.loss == "match" and self.init == "matched":
            raise ConfigError(
                f"{argument('init', 'matched')} is where vanilla stitches start: leave it out with {matching}"
            )
        if self.loss == "match" and self.receiver_bn == "batch":
            raise ConfigError(
                f"{argument('receiver_bn', 'batch')}: matched stitches are not trained through the receiver; leave it "
                f"out with {matching}"
            )
        if self.recipe.optimizer == "preconditioned" and not (self.loss == "task" and self.init == "matched"):
            raise ConfigError(
                f"{argument('optimizer', 'preconditioned')} needs the statistics of a matched start: add "
                f"{argument('init', 'matched')}"
            )
        if self.augments and self.source not in ("auto", "live"):
            raise ConfigError(
                f"{argument('source', self.source)}: recipe {self.recipe.name} shows new views of the images in every "
                f"epoch, which only {argument('source', 'live')} can do"
            )

    def to_dict(self) -> dict[str, Any]:
        """As it is hashed and kept with a run; rules and positions are left out where they are the default.

        So they were in runs that were made before there were any.
        """
        plain = {**asdict(DEFAULT_RULES), "positions": ()}
        return {key: value for key, value in asdict(self).items() if key not in plain or value != plain[key]}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "SweepConfig":
        """The inverse of :meth:`to_dict`; raises KeyError, TypeError or ConfigError."""
        recipe = TrainingRecipe(**content["recipe"])
        lists = {key: tuple(content[key]) for key in ("senders", "receivers", "settings", "seeds")}
        lists["positions"] = tuple(content.get("positions", ()))
        return cls(**{**content, **lists, "recipe": recipe})

    def require_one_batch(self, images: int) -> None:
        """Raise ConfigError where stitches are to be trained on fewer images than one batch."""
        size = self.recipe.batch_size
        if self.trains and images < size:
            raise ConfigError(
                f"{images} training images are fewer than one batch of {size} images: use "
                f"{argument('batch_size', images)} or less"
            )

    @property
    def hash(self) -> str:
        return stable_hash(self.to_dict())

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """All units of the sweep, the sender outermost, so that its representations are loaded once."""
        units = [
            Unit(sender=sender, receiver=receiver, setting=setting, loss=self.loss, seed=seed)
            for sender, setting, receiver, seed in product(self.senders, self.settings, self.receivers, self.seeds)
        ]
        order = list(dict.fromkeys(unit.sender_network for unit in units))
        return tuple(sorted(units, key=lambda unit: order.index(unit.sender_network)))

    @property
    def networks(self) -> tuple[NetworkName, ...]:
        """All networks that are run, controls among them, each once."""
        return tuple(
            dict.fromkeys(name for unit in self.units for name in (unit.sender_network, unit.receiver_network))
        )

    def stored_networks(self, units: Sequence[Unit]) -> list[NetworkName]:
        """The networks whose representations some units read, each once."""
        senders = [unit.sender_network for unit in units]
        receivers = [unit.receiver_network for unit in units] if self.matches else []
        return list(dict.fromkeys([*senders, *receivers]))

    @property
    def rules(self) -> Rules:
        """What stitches do where representations of two kinds leave a choice."""
        return Rules(resample=self.resample, class_token=self.class_token)

    @property
    def order(self) -> ImageOrder:
        """The order of images of the first seed."""
        return self.order_of(self.seeds[0])

    def order_of(self, seed: int) -> ImageOrder:
        """The order in which stitches of this seed see the images."""
        return ImageOrder(seed=seed, block=self.block, window=self.window)

    @property
    def augments(self) -> bool:
        """Whether stitches are trained on new random views of the images in every epoch."""
        return self.recipe.augment and self.trains

    @property
    def trains(self) -> bool:
        """Whether stitches are trained, on whichever loss."""
        return self.loss == "task" or self.regresses

    @property
    def matches(self) -> bool:
        """Whether matched stitches are computed, as results or as a start: receivers' representations are needed."""
        return self.loss == "match" or self.init == "matched"

    @property
    def solves(self) -> bool:
        """Whether matched stitches are computed exactly, from sufficient statistics."""
        return self.matches and self.solver == "exact"

    @property
    def regresses(self) -> bool:
        """Whether matched stitches are trained: on the squared error to the expected representation."""
        return self.loss == "match" and self.solver == "sgd"

    @property
    def preconditions(self) -> bool:
        """Whether vanilla stitches are trained in whitened inputs."""
        return self.recipe.optimizer == "preconditioned"

    @property
    def default_run_name(self) -> str:
        """What the run is called when it is not given a name."""
        return f"sweep-{self.hash[:10]}"


def sweep_config(
    *, dataset: str, senders: Sequence[str] | str, receivers: Sequence[str] | str, **options: Unpack[SweepOptions]
) -> SweepConfig:
    """A checked configuration from a recipe's name and what differs from it; raises ConfigError.

    The default recipe is ``small`` for the embedded data set and ``paper`` for all others; matching by training takes
    30 epochs of it. Names are brought into their shortest form (``R1111@0`` is ``R1111``), repeated ones count once.
    """
    for name in options.keys() - SweepOptions.__annotations__.keys():
        similar = get_close_matches(name, SweepOptions.__annotations__, n=1)
        hint = f"; did you mean {similar[0]!r}?" if similar else ""
        raise TypeError(f"a sweep has no option {name!r}{hint}")
    return SweepConfig(
        dataset=canonical_dataset(dataset),
        senders=_shortest(senders),
        receivers=_shortest(receivers),
        recipe=_recipe(dataset, options),
        settings=tuple(dict.fromkeys(separated(options.get("settings", "T2T")))),  # type: ignore[arg-type]
        seeds=tuple(dict.fromkeys(_seeds(options.get("seeds", 0)))),
        positions=position_patterns(options.get("positions")),
        group_size=str(options.get("group_size", "auto")),
        **{key: value for key, value in options.items() if key not in _CONVERTED},  # type: ignore[arg-type]
    )


_CONVERTED = ("settings", "seeds", "positions", "group_size", "recipe", "epochs", "lr", "optimizer", "batch_size")
"""Options that are more convenient than the configuration's own fields."""


def _recipe(dataset: str, options: SweepOptions) -> TrainingRecipe:
    by_default: StitchRecipe = "small" if re.split("[:@]", dataset)[0] == DEFAULT_DATASET else "paper"
    epochs, lr, optimizer = options.get("epochs"), options.get("lr"), options.get("optimizer")
    if epochs is None and options.get("solver") == "sgd":
        epochs = MATCH_EPOCHS
    if isinstance(epochs, float) and epochs.is_integer():
        # 2.0 is the same sweep as 2
        epochs = int(epochs)
    if lr is None and optimizer is not None:
        lr = PEAK_RATES.get(optimizer)
    return stitch_recipe(
        options.get("recipe") or by_default,
        epochs=epochs,
        lr=lr,
        optimizer=optimizer,
        batch_size=options.get("batch_size"),
    )


def checked_run_name(name: str, what: str | None = None) -> str:
    """A name that can be a folder; raises ConfigError, which calls it ``what``, or by the argument."""
    if (
        not isinstance(name, str)
        or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name)
        or name.endswith(".partial")
    ):
        raise ConfigError(
            f"{what or argument('run', name)}: expected letters, digits, '.', '_' and '-', starting with a letter or "
            "digit"
        )
    return name


def _seeds(seeds: Sequence[int] | int | str) -> Sequence[int]:
    """One number, several, or a text of them."""
    if not isinstance(seeds, Iterable):
        seeds = [seeds]
    try:
        return [int(seed) for seed in separated(seeds)] if isinstance(seeds, str) else [index(seed) for seed in seeds]
    except (TypeError, ValueError):
        raise ConfigError(f"{argument('seeds', seeds)}: expected whole numbers") from None


def position_patterns(positions: Sequence[str] | str | None) -> tuple[str, ...]:
    if positions is None:
        return ()
    patterns = tuple(dict.fromkeys(map(str, separated(positions))))
    if not patterns:
        raise ConfigError(
            f"{argument('positions', ())}: expected names or patterns such as layer*.0; leave it out for all"
        )
    return patterns


def _shortest(names: Sequence[str] | str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(NetworkName.parse(name)) for name in separated(names)))
