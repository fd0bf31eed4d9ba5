"""What ``fastsitch bench --tune`` measured on this machine, and how a sweep uses it."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from fastsitch.files import write_json
from fastsitch.machine import processor, versions
from fastsitch.typed_fields import typed
from fastsitch.vocabulary import Attention, Compile

log = logging.getLogger(__name__)

_VERSIONS = ("fastsitch", "torch", "triton")
"""Other versions of these may be faster or slower."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The best choices for one width, batch size and precision, and the figures behind them.

    ``receiver`` is the name of a network that is no small ResNet.
    """

    width: int
    batch_size: int
    precision: str
    group_size: int
    compile: Compile
    rates: dict[str, float]
    """Images x cells per second, by ``GROUP SIZE`` with the chosen ``compile``, the other one as ``compile on|off``."""
    receiver: str | None = None
    attention: Attention = "fused"

    def __post_init__(self) -> None:
        if type(self.group_size) is not int or self.group_size < 1:
            raise ValueError(f"group_size {self.group_size!r}: expected a number from 1")
        if self.compile not in ("on", "off"):
            raise ValueError(f"compile {self.compile!r}: expected on or off")
        if self.attention not in get_args(Attention):
            raise ValueError(f"attention {self.attention!r}: expected one of {', '.join(get_args(Attention))}")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """``ROOT/profile.json``: the machine that was measured, and what was found."""

    machine: str
    device: str
    threads: int
    versions: dict[str, str]
    tunings: tuple[Tuning, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.versions, dict):
            raise ValueError(f"versions {self.versions!r}: expected names with versions")

    @classmethod
    def here(cls, device: torch.device) -> "Profile":
        """An empty profile of this machine."""
        found = versions()
        return cls(
            machine=machine_name(device),
            device=device.type,
            threads=torch.get_num_threads(),
            versions={name: found[name] for name in _VERSIONS},
        )

    @classmethod
    def read(cls, root: Path) -> "Profile | None":
        """The profile of a root, None where there is none; raises ValueError when the file is something else."""
        path = profile_path(root)
        if not path.is_file():
            return None
        try:
            content: dict[str, Any] = json.loads(path.read_text())
            return typed(cls(**{**content, "tunings": tuple(Tuning(**tuning) for tuning in content["tunings"])}))
        except (TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no profile ({error})") from None

    def difference(self, other: "Profile") -> str | None:
        """Why a profile was not measured on such a machine as ``other``, or None."""
        for what in ("machine", "device", "threads"):
            mine, its = getattr(self, what), getattr(other, what)
            if mine != its:
                return f"{what} {mine}, here {its}"
        for name in _VERSIONS:
            if self.versions.get(name) != other.versions.get(name):
                return f"{name} {self.versions.get(name)}, here {other.versions.get(name)}"
        return None


def save_tuning(root: Path, device: torch.device, tuning: Tuning) -> Path:
    """Put ``tuning`` into the root's profile; what was measured elsewhere or in the same shapes gives way."""
    here = Profile.here(device)
    try:
        before = Profile.read(root)
    except ValueError as error:
        log.info("%s: written anew", error)
        before = None
    kept = before.tunings if before is not None and before.difference(here) is None else ()
    others = tuple(other for other in kept if _shape(other) != _shape(tuning))
    write_json(profile_path(root), asdict(replace(here, tunings=(*others, tuning))))
    return profile_path(root)


def find_tuning(
    root: Path, device: torch.device, *, width: int, batch_size: int, precision: str, receivers: Sequence[str] = ()
) -> Tuning | None:
    """What was measured for these shapes on this machine; why a profile does not serve is logged.

    ``receivers`` are those that are no small ResNets: of what was found for them, the smallest groups.
    """
    path = profile_path(root)
    try:
        profile = Profile.read(root)
    except ValueError as error:
        log.info("ignored: %s", error)
        return None
    if profile is None:
        return None
    reason = profile.difference(Profile.here(device))
    if reason is not None:
        log.info("ignored: %s was measured elsewhere (%s); measure with fastsitch bench --tune", path, reason)
        return None
    wanted = receivers or (None,)
    found = [
        tuning
        for tuning in profile.tunings
        if (tuning.batch_size, tuning.precision) == (batch_size, precision)
        and tuning.receiver in wanted
        and (tuning.receiver is not None or tuning.width == width)
    ]
    if found:
        return min(found, key=lambda tuning: tuning.group_size)
    shapes = f"--receiver {receivers[0]}" if receivers else f"--width {width}"
    log.info(
        "%s has nothing for %s, batch %d, %s; measure with fastsitch bench --tune %s --batch-size %d",
        path,
        ", ".join(receivers) or f"width {width}",
        batch_size,
        precision,
        shapes,
        batch_size,
    )
    return None


def tuned_group_size(tuning: Tuning | None, fits: int) -> int:
    """The smaller of what fits into memory and what was fastest."""
    if tuning is None:
        return fits
    chosen = min(fits, tuning.group_size)
    log.info("groups of up to %d cells: memory allows %d, the profile's best is %d", chosen, fits, tuning.group_size)
    return chosen


def tuned_compile(tuning: Tuning | None, requested: Compile) -> Compile:
    """Where ``auto`` was asked for, what was faster."""
    if tuning is None or requested != "auto":
        return requested
    log.info("compile %s: as in the profile", tuning.compile)
    return tuning.compile


def tuned_attention(tuning: Tuning | None) -> Attention:
    """What was faster, or else the fused form."""
    if tuning is None or tuning.attention == "fused":
        return "fused"
    log.info("attention by %s: as in the profile", tuning.attention)
    return tuning.attention


def profile_path(root: Path) -> Path:
    return root / "profile.json"


def machine_name(device: torch.device) -> str:
    """The GPU, or the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def _shape(tuning: Tuning) -> tuple[str | int, int, str]:
    return tuning.receiver or tuning.width, tuning.batch_size, tuning.precision
