"""Which networks, data, recipes and runs a study consists of."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from fastsitch.errors import ConfigError
from fastsitch.identity import stable_hash
from fastsitch.networks.names import NetworkName
from fastsitch.sweep.config import SETTINGS, SweepConfig, listed, sweep_config

STAGES = ("train", "precompute", "sweep", "matched", "tables", "figures", "images", "compare")

STUDIES = {
    "small-resnets": tuple("R" + "".join(blocks) for blocks in product("12", repeat=4)),
    "r18-r34": ("ResNet18", "ResNet34"),
}
"""Networks of each study: all pairs of the first, both directions between the two of the second."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Data, width and recipes."""

    dataset: str
    width: int
    training: str
    """Recipe of the networks."""
    recipe: str
    """Recipe of the stitches."""
    epochs: float | None = None
    """Of the stitches; None: the recipe's."""
    networks: tuple[str, ...] = ()
    """Of small-resnets; empty: all."""


SCALES = {
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
"""``full`` is what was published; the others fit a laptop."""

_SECOND_SEED = 1
"""Of the networks that the classical baseline joins to those of seed 0."""


@dataclass(frozen=True, kw_only=True)
class PaperConfig:
    """What ``fastsitch paper`` is asked to do; checked on construction."""

    study: str = "small-resnets"
    scale: str = "full"
    networks: tuple[str, ...] = ()
    """A subset of the study's networks; empty: those of the scale."""
    seeds: tuple[int, ...] = (0,)
    settings: tuple[str, ...] = SETTINGS
    stages: tuple[str, ...] = STAGES
    options: dict[str, Any] = field(default_factory=dict)
    """What else differs from the scale's sweep: recipe, epochs, solver, receiver_bn."""

    def __post_init__(self) -> None:
        for option, value, known in (("study", self.study, STUDIES), ("scale", self.scale, SCALES)):
            if value not in known:
                raise ConfigError(f"--{option} {value}: expected one of {', '.join(known)}")
        unknown = [stage for stage in self.stages if stage not in STAGES]
        if unknown or not self.stages:
            raise ConfigError(f"--stages {','.join(unknown) or '(none)'}: expected some of {', '.join(STAGES)}")
        names = STUDIES[self.study]
        wrong = [name for name in self.networks if name not in names]
        if wrong:
            raise ConfigError(
                f"--networks {','.join(wrong)}: expected some of {', '.join(names)}, the networks of {self.study}"
            )
        if self.study == "r18-r34" and self.networks and set(self.networks) != set(names):
            raise ConfigError(f"--networks {','.join(self.networks)}: {self.study} needs both of {', '.join(names)}")
        # whatever else is wrong is said before the first network is trained
        _ = self.asked

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
        seeds = [seed for place, seed in ((0, 0), (-1, 1)) if any(setting[place] == "R" for setting in self.settings)]
        return tuple(str(NetworkName.parse(name).control(seed)) for seed in seeds for name in self.chosen)

    def sweeps(self) -> list[SweepConfig]:
        """The vanilla sweeps of the study, one per run."""
        names = self.chosen
        pairs = [(names, names)] if self.study == "small-resnets" else [(names[:1], names[1:]), (names[1:], names[:1])]
        return [self._sweep(senders, receivers, self.settings) for senders, receivers in pairs]

    def baselines(self) -> list[SweepConfig]:
        """Each network into its twin: the classical baseline, beside the pair of a network with itself."""
        if "T2T" not in self.settings or not self.twins:
            return []
        return [self._sweep((name,), (twin,), ("T2T",)) for name, twin in zip(self.chosen, self.twins, strict=True)]

    def matched(self, vanilla: SweepConfig) -> SweepConfig:
        """The sweep of matched stitches for the same pairs."""
        return self._sweep(vanilla.senders, vanilla.receivers, vanilla.settings, loss="match")

    @property
    def asked(self) -> list[tuple[SweepConfig, SweepConfig]]:
        """The vanilla sweeps, each with that of its matched stitches."""
        return [(vanilla, self.matched(vanilla)) for vanilla in self.sweeps()]

    def run_name(self, config: SweepConfig) -> str:
        """``paper-STUDY-SCALE``, with what differs from the whole study of that scale."""
        parts = [f"paper-{self.study}-{self.scale}"]
        whole = PaperConfig(study=self.study, scale=self.scale)
        own, standard = ([c.chosen, c.seeds, c.settings, c.options] for c in (self, whole))
        if own != standard:
            parts.append(stable_hash(own)[:6])
        if len(self.sweeps()) > 1 or config.receivers != self.chosen:
            parts.append(f"{config.senders[0]}-to-{config.receivers[0].replace('@', '-seed')}")
        return ".".join([*parts, *(["matched"] if config.loss == "match" else [])])

    def _sweep(
        self, senders: Sequence[str], receivers: Sequence[str], settings: Sequence[str], loss: str = "task"
    ) -> SweepConfig:
        scale, options = self.dimensions, dict(self.options)
        if "recipe" not in options:
            options = {"recipe": scale.recipe, "epochs": scale.epochs, **options}
        solver = options.pop("solver", "exact")
        if loss == "match":
            options = {"solver": solver, "recipe": options["recipe"]}
        return sweep_config(
            dataset=self.dimensions.dataset,
            senders=senders,
            receivers=receivers,
            settings=settings,
            seeds=self.seeds,
            loss=loss,
            **options,
        )


def paper_config(
    *,
    networks: Sequence[str] | str = (),
    seeds: Sequence[int] | int | str = (0,),
    settings: Sequence[str] | str = SETTINGS,
    stages: Sequence[str] | str = STAGES,
    study: str = "small-resnets",
    scale: str = "full",
    **options: Any,
) -> PaperConfig:
    """A checked configuration; texts are lists separated by commas, ``options`` that are None are left out."""
    if isinstance(networks, str) and networks and not listed(networks):
        raise ConfigError(f"--networks {networks}: expected names separated by commas")
    names = tuple(dict.fromkeys(str(NetworkName.parse(name)) for name in listed(networks)))
    probe = sweep_config(dataset="fashion-mini", senders="R1111", receivers="R1111", seeds=seeds, settings=settings)
    config = PaperConfig(
        study=study,
        scale=scale,
        networks=names,
        seeds=probe.seeds,
        settings=probe.settings,
        stages=tuple(dict.fromkeys(listed(stages))),
        options={name: value for name, value in options.items() if value is not None},
    )
    if "epochs" in config.options:
        # 2.0 is 2, as in the sweeps
        config = replace(config, options={**config.options, "epochs": config.sweeps()[0].recipe.epochs})
    for name in config.options:
        # runs are named after what differs: naming the default does not
        without = replace(config, options={own: config.options[own] for own in config.options if own != name})
        if without.asked == config.asked:
            config = without
    return config
