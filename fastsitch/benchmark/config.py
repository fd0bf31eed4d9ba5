"""What the benchmark is asked to measure."""

import shlex
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fastsitch.advice import DEFAULT_ROOT
from fastsitch.errors import ConfigError
from fastsitch.kernels import KERNELS
from fastsitch.machine import COMPILE, PRECISIONS
from fastsitch.networks.names import BLOCKS, NetworkName


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """The shapes to measure, and how often; checked on construction."""

    sender: str = "R1111"
    receiver: str = "R1111"
    width: int = 16
    batch_size: int = 64
    precision: str = "auto"
    kernel: str = "auto"
    compile: str = "auto"
    group_sizes: tuple[int, ...] = ()
    """Cells per batch; empty: 1, 5, one unit, and that two and four times over."""
    repeats: int = 5
    """Rounds, each of which measures everything once."""
    tune: bool = False
    peers: bool = False

    def __post_init__(self) -> None:
        for role, name in (("sender", self.sender), ("receiver", self.receiver)):
            parsed = NetworkName.parse(name)
            if parsed.random or not parsed.built_in:
                raise ConfigError(f"--{role} {name}: expected R1111 ... R2222; speed does not depend on training")
        for option, value, least, most in (
            ("width", self.width, 4, 4096),
            ("batch-size", self.batch_size, 1, 4096),
            ("repeats", self.repeats, 1, 1000),
        ):
            if not least <= value <= most:
                raise ConfigError(f"--{option} {value}: expected {least} to {most}")
        self._check_group_sizes()
        for option, choice, allowed in (
            ("precision", self.precision, PRECISIONS),
            ("kernel", self.kernel, KERNELS),
            ("compile", self.compile, COMPILE),
        ):
            if choice not in allowed:
                raise ConfigError(f"--{option} {choice}: expected one of {', '.join(allowed)}")

    def _check_group_sizes(self) -> None:
        if any(size < 1 for size in self.group_sizes):
            raise ConfigError(f"--group-sizes {','.join(map(str, self.group_sizes))}: expected numbers from 1")
        unit = self.unit
        for size in self.group_sizes:
            if size > unit and size % unit:
                raise ConfigError(
                    f"--group-sizes {size}: {self.sender} -> {self.receiver} has {unit} cells; expected up to {unit}, "
                    f"or a multiple of it, such as {2 * unit}"
                )

    @property
    def unit(self) -> int:
        """Cells of one unit."""
        sender, receiver = (NetworkName.parse(name).architecture for name in (self.sender, self.receiver))
        return (1 + sum(BLOCKS[sender])) * (1 + sum(BLOCKS[receiver]))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "group_sizes": list(self.group_sizes)}

    def command(self, root: Path, device: str) -> str:
        """The command line that measures the same; defaults are left out."""
        parts = ["fastsitch", "bench"]
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            option = "--" + field.name.replace("_", "-")
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            parts += [option] if value is True else [option, text]
        if str(root) != DEFAULT_ROOT:
            parts += ["--root", str(root)]
        return shlex.join(parts if device == "auto" else [*parts, "--device", device])
