"""What a run records: what was asked for, of which networks and images, what auto chose, and by which versions."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fastsitch.chains.layout import Shape
from fastsitch.checked_files import with_hash
from fastsitch.errors import RunError
from fastsitch.machine import versions
from fastsitch.network_names import NetworkName
from fastsitch.runs.sweep_config import SweepConfig
from fastsitch.typed_fields import typed
from fastsitch.vocabulary import Attention, Compile, Kernel, SourceName

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class NetworkInput:
    """What a run records of a network it uses."""

    weights_hash: str
    width: int
    accuracy: float
    """On the test images; NaN, and not in files, where it has no classifier."""
    positions: tuple[tuple[str, Shape], ...]
    """Name and shape of every position: (C, H, W) for maps."""
    transform: dict[str, Any] | None = None
    """Mean, std, resolution and preprocessing of its inputs, where they are not those of the data set."""
    weights: dict[str, str] | None = None
    """Of a pretrained network: name, file, revision, sha256 and licence of its weights."""

    def __eq__(self, other: object) -> bool:
        # an accuracy that there is not equals another one
        return isinstance(other, NetworkInput) and self.to_dict() == other.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """For JSON; without what only some networks have as it was before there were such."""
        content = {**asdict(self), "accuracy": known_accuracy(self.accuracy)}
        left_out = [key for key in ("weights", "accuracy") if content[key] is None]
        return {key: content[key] for key in content if key not in left_out}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "NetworkInput":
        positions = tuple((name, tuple(shape)) for name, shape in content["positions"])
        return cls(**{"accuracy": math.nan, **content, "positions": positions})

    def position(self, network: str, which: int | str) -> int:
        """The index of a position, given by its index or its name; raises RunError."""
        names = [name for name, _ in self.positions]
        if which in names:
            return names.index(str(which))
        if isinstance(which, int) and 0 <= which < len(names):
            return which
        listed = ", ".join(f"{index} {name}" for index, name in enumerate(names))
        raise RunError(f"{network} has no position {which}: it has {listed}")


def known_accuracy(accuracy: float) -> float | None:
    """For JSON, which has no NaN."""
    return None if math.isnan(accuracy) else accuracy


def accuracy_note(accuracy: float) -> str:
    """A network's own accuracy behind its name in a title: `` (0.912)``, or nothing where there is none."""
    return "" if math.isnan(accuracy) else f" ({accuracy:.3f})"


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """What ``auto`` chose when the run began; frozen into it."""

    device: str
    precision: str
    kernel: Kernel
    compile: Compile
    group_size: int
    source: SourceName
    sources: dict[str, SourceName] = field(default_factory=dict)
    """By network, where another one was better."""
    attention: Attention = "fused"
    """Of receivers that run as graphs."""

    def source_of(self, network: NetworkName) -> SourceName:
        """Where the representations of a network come from."""
        return self.sources.get(str(network), self.source)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; as it was when all networks had one source, and attention one form."""
        content = asdict(self)
        usual = {"sources": {}, "attention": "fused"}
        return {key: value for key, value in content.items() if usual.get(key) != value}


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What ``run.json`` holds."""

    config: SweepConfig
    resolved: Resolved
    networks: Mapping[NetworkName, NetworkInput]
    data_hash: str
    versions: dict[str, str] = field(default_factory=versions)
    """Of fastsitch and the libraries that results depend on, when the run began."""
    hashed: bool = True
    """Whether the file had its own hash; those of version 0.1 have none."""
    continued: tuple[dict[str, str], ...] = ()
    """The versions that it went on with, where they were others."""

    def to_dict(self) -> dict[str, Any]:
        """The content of the file, with its own hash."""
        content = {
            "format": FORMAT,
            "config": self.config.to_dict(),
            "resolved": self.resolved.to_dict(),
            "networks": {str(name): network.to_dict() for name, network in self.networks.items()},
            "data_hash": self.data_hash,
            "versions": self.versions,
        }
        return with_hash({**content, "continued": list(self.continued)} if self.continued else content, "run_hash")

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "RunRecord":
        """The inverse of :meth:`to_dict`; raises KeyError, ValueError or TypeError."""
        unknown = set(content) - {
            "format",
            "config",
            "resolved",
            "networks",
            "data_hash",
            "versions",
            "continued",
            "hashed",
        }
        if unknown:
            # a hash under a name that was altered is none
            raise ValueError(f"it has {', '.join(sorted(unknown))}")
        return typed(
            cls(
                config=SweepConfig.from_dict(content["config"]),
                resolved=Resolved(**content["resolved"]),
                networks={
                    NetworkName.parse(name): NetworkInput.from_dict(network)
                    for name, network in content["networks"].items()
                },
                data_hash=content["data_hash"],
                versions=content["versions"],
                continued=tuple(content.get("continued", ())),
                hashed=content["hashed"],
            )
        )

    def continued_with(self, found: dict[str, str]) -> "RunRecord":
        """The same record, with the versions that are here unless they are those of last time."""
        if found == (self.versions, *self.continued)[-1]:
            return self
        return replace(self, continued=(*self.continued, found))

    def described_change(self) -> str:
        """``was made with torch 2.13.0 and goes on with torch 2.14.1``, of the latest change."""
        before, now = (self.versions, *self.continued)[-2:]
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        was, goes_on = (", ".join(f"{name} {each.get(name, 'unknown')}" for name in names) for each in (before, now))
        return f"was made with {was} and goes on with {goes_on}"
