"""What a sweep is asked to do."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import index
from typing import Any

from fastsitch.activations.order import ImageOrder
from fastsitch.activations.source import SOURCES
from fastsitch.data import DEFAULT_DATASET, canonical_dataset
from fastsitch.errors import ConfigError
from fastsitch.identity import stable_hash
from fastsitch.kernels import KERNELS
from fastsitch.machine import COMPILE, DTYPES
from fastsitch.networks.names import NetworkName
from fastsitch.stitching.engine import TrainingRecipe
from fastsitch.stitching.geometry import DEFAULT_RULES, Rules

SETTINGS = ("T2T", "T2R", "R2T", "R2R")
"""Trained (T) or randomly initialised (R) sender, then receiver."""

LOSSES = ("task", "match")
"""The task's cross-entropy (vanilla stitches), or the squared error to the expected representation (matched ones)."""

SOLVERS = ("exact", "sgd")
"""How matched stitches are found: from sufficient statistics without training, or by training, the published way."""

MATCH_EPOCHS = 30
"""Of matching by training, where none are asked for. Source: Hernandez et al. 2022."""

MOST_EPOCHS = 1_000_000

INITS = ("default", "matched")
"""A PyTorch convolution's own initialisation, or the matched stitch."""

RECEIVER_BN = ("frozen", "batch")
"""How the receiver's BatchNorm normalises while stitches are trained: by the network's own running statistics, or by
those of each stitch's batch, as the authors' code did."""

OPTIMIZERS = {"sgd": 0.01, "preconditioned": 0.08}
"""How vanilla stitches are trained, each with its peak learning rate."""

STITCH_RECIPES = {
    "paper": TrainingRecipe(name="paper", epochs=4, batch_size=256, lr=0.01, momentum=0.9, weight_decay=0.01),
    "small": TrainingRecipe(name="small", epochs=2, batch_size=64, lr=0.01, momentum=0.9, weight_decay=0.01),
    "published-schedule": TrainingRecipe(
        name="published-schedule",
        epochs=4,
        batch_size=256,
        lr=0.01,
        momentum=0.9,
        weight_decay=0.01,
        augment=True,
    ),
}
"""``paper`` as the text of the study states it, ``small`` for small data, ``published-schedule`` with the learning
rates and the random views of the images that the authors' code really used."""


def stitch_recipe(
    name: str,
    *,
    epochs: float | None = None,
    lr: float | None = None,
    optimizer: str | None = None,
    batch_size: int | None = None,
) -> TrainingRecipe:
    """A checked recipe by name, and what differs from it; raises ConfigError."""
    if name not in STITCH_RECIPES:
        raise ConfigError(f"--recipe {name}: expected one of {', '.join(STITCH_RECIPES)}")
    changes: dict[str, Any] = {"epochs": epochs, "lr": lr, "optimizer": optimizer, "batch_size": batch_size}
    recipe = replace(STITCH_RECIPES[name], **{key: value for key, value in changes.items() if value is not None})
    _check_recipe(recipe)
    return recipe


def _check_recipe(recipe: TrainingRecipe) -> None:
    if recipe.name not in STITCH_RECIPES:
        raise ConfigError(f"--recipe {recipe.name}: expected one of {', '.join(STITCH_RECIPES)}")
    if recipe.optimizer not in OPTIMIZERS:
        raise ConfigError(f"--optimizer {recipe.optimizer}: expected one of {', '.join(OPTIMIZERS)}")
    if not 0 < recipe.epochs <= MOST_EPOCHS:
        raise ConfigError(
            f"--epochs {recipe.epochs}: expected a number above 0, such as 2 or 0.5, and at most {MOST_EPOCHS}"
        )
    if recipe.batch_size < 1:
        raise ConfigError(f"--batch-size {recipe.batch_size}: expected at least 1")
    if not 0 < recipe.lr < float("inf"):
        raise ConfigError(f"--lr {recipe.lr}: expected a number above 0")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Everything that a sweep's results depend on, beside networks, data and machine; checked on construction."""

    dataset: str
    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    settings: tuple[str, ...] = ("T2T",)
    loss: str = "task"
    solver: str = "exact"
    """How matched stitches are found."""
    init: str = "default"
    """Where vanilla stitches start."""
    receiver_bn: str = "frozen"
    """``batch``: BatchNorm uses batch statistics per stitch in training, each stitch's running statistics after it."""
    seeds: tuple[int, ...] = (0,)
    recipe: TrainingRecipe = field(default_factory=lambda: STITCH_RECIPES["paper"])
    group_size: str = "auto"
    """``auto``, or the largest number of cells to train in one batch."""
    precision: str = "auto"
    kernel: str = "auto"
    compile: str = "auto"
    """``on`` lets torch.compile generate the receiver's blocks."""
    source: str = "auto"
    """Where the sender's representations come from while stitches are trained."""
    block: int = ImageOrder.block
    """Consecutive images that stay together in the first level of shuffling."""
    window: int = ImageOrder.window
    """Images that are shuffled among each other in the second level."""
    resample: str = DEFAULT_RULES.resample
    """How grids whose sizes are no multiples of each other are joined."""
    class_token: str = DEFAULT_RULES.class_token
    """What becomes the class token of a receiver that has one."""
    positions: tuple[str, ...] = ()
    """Patterns: only cells whose sender and receiver positions both match one of them are trained; () is all."""

    def __post_init__(self) -> None:
        for role, names in (("senders", self.senders), ("receivers", self.receivers)):
            if not names:
                raise ConfigError(f"no {role}: name at least one network with --{role}")
            for name in names:
                if NetworkName.parse(name).random:
                    raise ConfigError(
                        f"--{role} {name}: controls come from --settings R2T, T2R or R2R; name the trained network"
                    )
        _expect("--settings", self.settings, SETTINGS)
        if self.loss not in LOSSES:
            raise ConfigError(f"--loss {self.loss}: expected one of {', '.join(LOSSES)}")
        if self.solver not in SOLVERS:
            raise ConfigError(f"--solver {self.solver}: expected one of {', '.join(SOLVERS)}")
        if self.solver == "sgd" and self.loss != "match":
            raise ConfigError("--solver sgd: trains matched stitches; add --loss match, or leave it out")
        if self.init not in INITS:
            raise ConfigError(f"--init {self.init}: expected one of {', '.join(INITS)}")
        if self.loss == "match" and self.init == "matched":
            raise ConfigError("--init matched: only vanilla stitches start from it; leave it out with --loss match")
        if self.receiver_bn not in RECEIVER_BN:
            raise ConfigError(f"--receiver-bn {self.receiver_bn}: expected one of {', '.join(RECEIVER_BN)}")
        if self.loss == "match" and self.receiver_bn == "batch":
            raise ConfigError(
                "--receiver-bn batch: matched stitches are not trained through the receiver; leave it out with "
                "--loss match"
            )
        if not self.seeds or any(seed < 0 for seed in self.seeds):
            raise ConfigError(f"--seeds {','.join(map(str, self.seeds)) or '(none)'}: expected numbers from 0")
        recipe = self.recipe
        _check_recipe(recipe)
        if recipe.optimizer == "preconditioned" and not (self.loss == "task" and self.init == "matched"):
            raise ConfigError(
                "--optimizer preconditioned: works on the statistics of a matched start; add --init matched"
            )
        if self.group_size != "auto" and (not self.group_size.isdecimal() or int(self.group_size) < 1):
            raise ConfigError(f"--group-size {self.group_size}: expected auto or a number from 1")
        if self.precision != "auto" and self.precision not in DTYPES:
            raise ConfigError(f"--precision {self.precision}: expected auto, bf16 or fp32")
        if self.compile not in COMPILE:
            raise ConfigError(f"--compile {self.compile}: expected one of {', '.join(COMPILE)}")
        if self.kernel not in KERNELS:
            raise ConfigError(f"--kernel {self.kernel}: expected one of {', '.join(KERNELS)}")
        if self.source not in SOURCES:
            raise ConfigError(f"--source {self.source}: expected one of {', '.join(SOURCES)}")
        Rules(resample=self.resample, class_token=self.class_token)
        if self.augments and self.source not in ("auto", "live"):
            raise ConfigError(
                f"--source {self.source}: recipe {recipe.name} shows new views of the images in every epoch, "
                "which only --source live can do"
            )

    def to_dict(self) -> dict[str, Any]:
        """As it is hashed and kept with a run; rules and positions are left out where they are the default.

        So they were in runs that were made before there were any.
        """
        plain = {**asdict(DEFAULT_RULES), "positions": ()}
        return {key: value for key, value in asdict(self).items() if key not in plain or value != plain[key]}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "SweepConfig":
        recipe = TrainingRecipe(**content["recipe"])
        lists = {key: tuple(content[key]) for key in ("senders", "receivers", "settings", "seeds")}
        lists["positions"] = tuple(content.get("positions", ()))
        return cls(**{**content, **lists, "recipe": recipe})

    @property
    def hash(self) -> str:
        return stable_hash(self.to_dict())

    @property
    def rules(self) -> Rules:
        """What stitches do where representations of two kinds leave a choice."""
        return Rules(resample=self.resample, class_token=self.class_token)

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
    *,
    dataset: str,
    senders: Sequence[str] | str,
    receivers: Sequence[str] | str,
    recipe: str | None = None,
    epochs: float | None = None,
    lr: float | None = None,
    optimizer: str | None = None,
    batch_size: int | None = None,
    group_size: int | str = "auto",
    settings: Sequence[str] | str = ("T2T",),
    seeds: Sequence[int] | int | str = (0,),
    positions: Sequence[str] | str | None = None,
    **others: Any,
) -> SweepConfig:
    """A checked configuration from a recipe's name and what differs from it; raises ConfigError.

    The default recipe is ``small`` for the embedded data set and ``paper`` for all others; matching by training takes
    30 epochs of it. Names are brought into their shortest form (``R1111@0`` is ``R1111``), repeated ones count once; a
    text is a list separated by commas. ``positions`` are names or patterns such as ``layer*.0``; None takes all.
    """
    name = recipe or ("small" if dataset.partition(":")[0] == DEFAULT_DATASET else "paper")
    if epochs is None and others.get("solver") == "sgd":
        epochs = MATCH_EPOCHS
    if epochs is not None and epochs % 1 == 0:
        # 2.0 is the same sweep as 2
        epochs = int(epochs)
    if lr is None and optimizer is not None:
        lr = OPTIMIZERS.get(optimizer)
    return SweepConfig(
        dataset=canonical_dataset(dataset),
        senders=_canonical(senders),
        receivers=_canonical(receivers),
        recipe=stitch_recipe(name, epochs=epochs, lr=lr, optimizer=optimizer, batch_size=batch_size),
        group_size=str(group_size),
        settings=tuple(dict.fromkeys(listed(settings))),
        seeds=tuple(dict.fromkeys(_seeds(seeds))),
        positions=() if positions is None else _patterns(positions),
        **others,
    )


def checked_run_name(name: str) -> str:
    """A name that can be a folder; raises ConfigError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) or name.endswith(".partial"):
        raise ConfigError(
            f"--run {name!r}: expected letters, digits, '.', '_' and '-', starting with a letter or digit"
        )
    return name


def _seeds(seeds: Sequence[int] | int | str) -> Sequence[int]:
    """One number, several, or a text of them."""
    if isinstance(seeds, int):
        return [seeds]
    try:
        return [int(seed) for seed in listed(seeds)] if isinstance(seeds, str) else [index(seed) for seed in seeds]
    except (TypeError, ValueError):
        raise ConfigError(f"--seeds {seeds}: expected whole numbers") from None


def _patterns(positions: Sequence[str] | str) -> tuple[str, ...]:
    patterns = tuple(dict.fromkeys(map(str, listed(positions))))
    if not patterns:
        raise ConfigError("--positions (none): expected names or patterns such as layer*.0; leave it out for all")
    return patterns


def _canonical(names: Sequence[str] | str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(NetworkName.parse(name)) for name in listed(names)))


def listed(values: Sequence[str] | str) -> Sequence[str]:
    """A text separated by commas as a list; a list as it is."""
    if isinstance(values, str):
        return [part.strip() for part in values.split(",") if part.strip()]
    return values


def _expect(option: str, values: Sequence[str], allowed: Sequence[str]) -> None:
    wrong = [value for value in values if value not in allowed]
    if wrong or not values:
        raise ConfigError(f"{option} {','.join(wrong) or '(none)'}: expected some of {', '.join(allowed)}")
