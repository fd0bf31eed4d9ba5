"""What the benchmark is asked to measure."""

import shlex
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypedDict

from fastsitch.errors import ConfigError, argument
from fastsitch.network_names import BLOCKS, NetworkName
from fastsitch.vocabulary import DEFAULT_ROOT, Compile, Kernel, Precision, require_choice, require_whole


class BenchOptions(TypedDict, total=False):
    """What :func:`fastsitch.bench` may be asked for; see :class:`BenchConfig`."""

    sender: str
    receiver: str
    width: int
    batch_size: int
    precision: Precision
    kernel: Kernel
    compile: Compile
    group_sizes: tuple[int, ...]
    repeats: int
    tune: bool
    peers: bool


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """The shapes to measure, and how often; checked on construction."""

    sender: str = "R1111"
    receiver: str = "R1111"
    width: int = 16
    batch_size: int = 64
    precision: Precision = "auto"
    kernel: Kernel = "auto"
    compile: Compile = "auto"
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
                raise ConfigError(
                    f"{argument(role, name)}: expected R1111 ... R2222; speed does not depend on training"
                )
        for option, value, least, most in (
            ("width", self.width, 4, 4096),
            ("batch_size", self.batch_size, 1, 4096),
            ("repeats", self.repeats, 1, 1000),
        ):
            require_whole(option, value, least, most)
        self._check_group_sizes()
        require_choice("precision", self.precision, Precision)
        require_choice("kernel", self.kernel, Kernel)
        require_choice("compile", self.compile, Compile)

    def _check_group_sizes(self) -> None:
        for size in self.group_sizes:
            require_whole("group_sizes", size)
        unit = self.unit
        for size in self.group_sizes:
            if size > unit and size % unit:
                raise ConfigError(
                    f"{argument('group_sizes', size)}: {self.sender} -> {self.receiver} has {unit} cells; expected "
                    f"up to {unit}, or a multiple of it, such as {2 * unit}"
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
        words = ["fastsitch", "bench"]
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            option = "--" + field.name.replace("_", "-")
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [option] if value is True else [option, text]
        if str(root) != DEFAULT_ROOT:
            words += ["--root", str(root)]
        return shlex.join(words if device == "auto" else [*words, "--device", device])
