"""What the benchmark is asked to measure."""

import shlex
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypedDict

from fastsitch.errors import ConfigError, argument
from fastsitch.network_names import NetworkName
from fastsitch.stitching.geometry import DEFAULT_RULES, Rules
from fastsitch.vocabulary import (
    DEFAULT_DATASET,
    DEFAULT_ROOT,
    ClassToken,
    Compile,
    Kernel,
    Precision,
    Resample,
    require_choice,
    require_whole,
)


class BenchOptions(TypedDict, total=False):
    """What :func:`fastsitch.bench` may be asked for; see :class:`BenchConfig`."""

    width: int
    batch_size: int
    precision: Precision
    kernel: Kernel
    compile: Compile
    group_sizes: tuple[int, ...]
    repeats: int
    resample: Resample
    class_token: ClassToken
    tune: bool
    peers: bool


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """The shapes to measure, and how often; checked on construction."""

    sender: str = "R1111"
    receiver: str = "R1111"
    dataset: str = DEFAULT_DATASET
    """That the networks were added to; small ResNets are built for its images."""
    width: int = 16
    """Of small ResNets."""
    batch_size: int = 64
    precision: Precision = "auto"
    kernel: Kernel = "auto"
    compile: Compile = "auto"
    group_sizes: tuple[int, ...] = ()
    """Cells per batch; empty: 1, 5, one unit, and that two and four times over."""
    repeats: int = 5
    """Rounds, each of which measures everything once."""
    resample: Resample = DEFAULT_RULES.resample
    class_token: ClassToken = DEFAULT_RULES.class_token
    tune: bool = False
    peers: bool = False

    def __post_init__(self) -> None:
        for role, name in (("sender", self.sender), ("receiver", self.receiver)):
            if NetworkName.parse(name).random:
                raise ConfigError(
                    f"{argument(role, name)}: expected R1111 ... R2222, or the name of a network that was added; speed "
                    "does not depend on training"
                )
        for option, value, least, most in (
            ("width", self.width, 4, 4096),
            ("batch_size", self.batch_size, 1, 4096),
            ("repeats", self.repeats, 1, 1000),
        ):
            require_whole(option, value, least, most)
        for size in self.group_sizes:
            require_whole("group_sizes", size)
        require_choice("precision", self.precision, Precision)
        require_choice("kernel", self.kernel, Kernel)
        require_choice("compile", self.compile, Compile)
        _ = self.rules

    @property
    def rules(self) -> Rules:
        """What stitches do where shapes leave a choice; raises ConfigError for other words."""
        return Rules(resample=self.resample, class_token=self.class_token)

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
