"""Which networks, data, recipes and runs a study consists of."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TypedDict, Unpack

from fastsitch.errors import ConfigError, argument
from fastsitch.identity import stable_hash
from fastsitch.network_names import NetworkName
from fastsitch.runs.sweep_config import SweepConfig, SweepOptions, sweep_config
from fastsitch.vocabulary import (
    DEFAULT_DATASET,
    SETTINGS,
    STAGES,
    Loss,
    NetworkRecipe,
    ReceiverBN,
    ScaleName,
    Setting,
    Solver,
    Stage,
    StitchRecipe,
    StudyName,
    require_choice,
    require_choices,
    separated,
)

STUDIES: dict[StudyName, tuple[str, ...]] = {
    "small-resnets": tuple("R" + "".join(blocks) for blocks in product("12", repeat=4)),
    "r18-r34": ("ResNet18", "ResNet34"),
}
"""Networks of each study: all ordered pairs of small-resnets, both directions of r18-r34."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Size of a study: data set, width, recipes and networks."""

    dataset: str
    width: int
    training: NetworkRecipe
    """Recipe of the networks."""
    recipe: StitchRecipe
    """Recipe of the stitches."""
    epochs: float | None = None
    """Epochs of the stitches; None: the recipe's."""
    networks: tuple[str, ...] = ()
    """Networks of small-resnets; empty: all of them."""


SCALES: dict[ScaleName, Scale] = {
    "full": Scale(dataset="cifar10", width=64, training="published", recipe="paper"),
    "medium": Scale(
        dataset="fashion-mini",
        width=16,
        training="fast",
        recipe="small",
        epochs=1,
        networks=("R1111", "R1122", "R2222"),
    ),
    "small": Scale(
        dataset="fashion-mini:5000", width=8, training="fast", recipe="small", networks=("R1111", "R1112", "R1122")
    ),
}
"""``full`` is that of the paper; the others fit a laptop."""

_SECOND_SEED = 1
"""Seed of the twins, which the classical baseline stitches to the networks of seed 0."""


class SweepChanges(TypedDict, total=False):
    """What may differ from the sweeps of a scale."""

    recipe: StitchRecipe
    epochs: float
    solver: Solver
    receiver_bn: ReceiverBN


class StudyOptions(TypedDict, total=False):
    """What :func:`fastsitch.paper` may be asked for; lists may be texts with commas, None is the default."""

    study: StudyName
    scale: ScaleName
    networks: Sequence[str] | str
    stages: Sequence[Stage] | str
    settings: Sequence[Setting] | str
    seeds: Sequence[int] | int | str
    recipe: StitchRecipe | None
    epochs: float | None
    solver: Solver | None
    receiver_bn: ReceiverBN | None


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Configuration of ``fastsitch paper``; checked on construction."""

    study: StudyName = "small-resnets"
    scale: ScaleName = "full"
    networks: tuple[str, ...] = ()
    """A subset of the study's networks; empty: those of the scale."""
    seeds: tuple[int, ...] = (0,)
    settings: tuple[Setting, ...] = SETTINGS
    stages: tuple[Stage, ...] = STAGES
    options: SweepChanges = field(default_factory=SweepChanges)
    """Options that replace those of the scale: recipe, epochs, solver, receiver_bn."""

    def __post_init__(self) -> None:
        require_choice("study", self.study, StudyName)
        require_choice("scale", self.scale, ScaleName)
        require_choices("stages", self.stages, Stage)
        names = STUDIES[self.study]
        wrong = [name for name in self.networks if name not in names]
        if wrong:
            raise ConfigError(
                f"{argument('networks', wrong)}: expected some of {', '.join(names)}, the networks of {self.study}"
            )
        if self.study == "r18-r34" and self.networks and set(self.networks) != set(names):
            raise ConfigError(f"{argument('networks', self.networks)}: {self.study} needs both of {', '.join(names)}")
        # builds the sweeps, whose checks must fail before the first network is trained
        _ = self.sweep_pairs

    @property
    def dimensions(self) -> Scale:
        return SCALES[self.scale]

    @property
    def chosen(self) -> tuple[str, ...]:
        """The networks, in the order of the study."""
        names = STUDIES[self.study]
        subset = self.networks or (self.dimensions.networks if self.study == "small-resnets" else ()) or names
        return tuple(name for name in names if name in subset)

    @property
    def twins(self) -> tuple[str, ...]:
        """The same architectures from another seed; only small-resnets has them."""
        return tuple(f"{name}@{_SECOND_SEED}" for name in self.chosen) if self.study == "small-resnets" else ()

    def controls(self) -> tuple[str, ...]:
        """The untrained networks that the settings need as senders and receivers."""
        seeds = [seed for letter, seed in ((0, 0), (-1, 1)) if any(setting[letter] == "R" for setting in self.settings)]
        return tuple(str(NetworkName.parse(name).control(seed)) for seed in seeds for name in self.chosen)

    def sweeps(self) -> list[SweepConfig]:
        """The vanilla sweeps of the study, one per run."""
        names = self.chosen
        pairs = [(names, names)] if self.study == "small-resnets" else [(names[:1], names[1:]), (names[1:], names[:1])]
        return [self._sweep(senders, receivers, self.settings) for senders, receivers in pairs]

    def baselines(self) -> list[SweepConfig]:
        """Each network stitched into its twin: the classical baseline for the pair of a network with itself."""
        if "T2T" not in self.settings or not self.twins:
            return []
        return [self._sweep((name,), (twin,), ("T2T",)) for name, twin in zip(self.chosen, self.twins, strict=True)]

    def matched(self, vanilla: SweepConfig) -> SweepConfig:
        """The sweep of matched stitches for the same pairs."""
        return self._sweep(vanilla.senders, vanilla.receivers, vanilla.settings, loss="match")

    @property
    def sweep_pairs(self) -> list[tuple[SweepConfig, SweepConfig]]:
        """The vanilla sweeps, each with that of its matched stitches."""
        return [(vanilla, self.matched(vanilla)) for vanilla in self.sweeps()]

    def run_name(self, config: SweepConfig) -> str:
        """``paper-STUDY-SCALE``, and a hash of the options where they differ from the defaults of that scale."""
        name = [f"paper-{self.study}-{self.scale}"]
        default = StudyConfig(study=self.study, scale=self.scale)
        content, standard = ([c.chosen, c.seeds, c.settings, c.options] for c in (self, default))
        if content != standard:
            name.append(stable_hash(content)[:6])
        if len(self.sweeps()) > 1 or config.receivers != self.chosen:
            name.append(f"{config.senders[0]}-to-{config.receivers[0].replace('@', '-seed')}")
        return ".".join([*name, *(["matched"] if config.loss == "match" else [])])

    def _sweep(
        self, senders: Sequence[str], receivers: Sequence[str], settings: Sequence[Setting], loss: Loss = "task"
    ) -> SweepConfig:
        scale = self.dimensions
        options: SweepOptions = {"settings": settings, "seeds": self.seeds, "loss": loss}
        options["recipe"] = self.options.get("recipe", scale.recipe)
        if loss == "match":
            options["solver"] = self.options.get("solver", "exact")
        else:
            by_default = scale.epochs if "recipe" not in self.options else None
            options["epochs"] = self.options.get("epochs", by_default)
            options["receiver_bn"] = self.options.get("receiver_bn", "frozen")
        return sweep_config(dataset=scale.dataset, senders=senders, receivers=receivers, **options)


def make_study_config(**options: Unpack[StudyOptions]) -> StudyConfig:
    """A checked configuration."""
    networks, stages = options.get("networks", ()), options.get("stages", STAGES)
    if isinstance(networks, str) and networks and not separated(networks):
        raise ConfigError(f"{argument('networks', networks)}: expected names separated by commas")
    probe = sweep_config(
        dataset=DEFAULT_DATASET,
        senders="R1111",
        receivers="R1111",
        seeds=options.get("seeds", 0),
        settings=options.get("settings", SETTINGS),
    )
    changes = {key: options.get(key) for key in SweepChanges.__annotations__}
    config = StudyConfig(
        study=options.get("study", "small-resnets"),
        scale=options.get("scale", "full"),
        networks=tuple(dict.fromkeys(str(NetworkName.parse(name)) for name in separated(networks))),
        seeds=probe.seeds,
        settings=probe.settings,
        stages=tuple(dict.fromkeys(separated(stages))),  # type: ignore[arg-type]
        options={key: value for key, value in changes.items() if value is not None},  # type: ignore[arg-type]
    )
    return _without_defaults(config)


def _without_defaults(config: StudyConfig) -> StudyConfig:
    """The same study without options that change nothing: they must not change the names of its runs."""
    if "epochs" in config.options:
        # 2.0 becomes 2, as in the sweeps
        epochs = config.sweeps()[0].recipe.epochs
        config = replace(config, options={**config.options, "epochs": epochs})
    for name in config.options:
        kept = {key: value for key, value in config.options.items() if key != name}
        without = replace(config, options=kept)  # type: ignore[arg-type]
        if without.sweep_pairs == config.sweep_pairs:
            config = without
    return config
