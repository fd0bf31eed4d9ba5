"""Which pairs of a run, and which test images, stitches are to generate."""

from collections.abc import Sequence

import torch

from fastsitch.errors import ConfigError, RunError, argument
from fastsitch.identity import torch_generator
from fastsitch.network_names import NetworkName
from fastsitch.runs.run import Run
from fastsitch.stitching.cells import Unit
from fastsitch.vocabulary import require_whole, separated

Chosen = Sequence[str] | str | None
"""Names, also as a text with commas; None takes all that the run has."""

_DRAWN = 4


def chosen_units(run: Run, senders: Chosen, receivers: Chosen, settings: Chosen) -> list[Unit]:
    """The pairs and settings asked for, each as its unit of the run's first seed; raises RunError for unknown ones."""
    config = run.config
    wanted_senders = _chosen(run, "sender", senders, config.senders)
    wanted_receivers = _chosen(run, "receiver", receivers, config.receivers)
    wanted_settings = _chosen(run, "setting", settings, config.settings)
    return [
        unit
        for unit in run.units
        if unit.seed == config.seeds[0]
        and unit.sender in wanted_senders
        and unit.receiver in wanted_receivers
        and unit.setting in wanted_settings
    ]


def _chosen(run: Run, role: str, asked: Chosen, known: Sequence[str]) -> list[str]:
    names = list(known) if asked is None else separated(asked)
    if role != "setting":
        names = [str(NetworkName.parse(name)) for name in names]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise RunError(
            f"run {run.name!r} has no {role} {', '.join(unknown) or '(none given)'}: expected some of "
            f"{', '.join(known)}"
        )
    return names


def chosen_images(
    available: int, images: Sequence[int] | None = None, count: int | None = None, seed: int | None = None
) -> list[int]:
    """Indices of test images: those named, or ``count`` that are drawn with ``seed``; raises ConfigError."""
    if images is not None:
        if count is not None or seed is not None:
            raise ConfigError(
                f"{argument('images')} names the test images: leave out {argument('count')} and {argument('seed')}, "
                "which would draw them"
            )
        wrong = [index for index in images if not 0 <= index < available]
        if wrong or not images:
            raise ConfigError(
                f"{argument('images', wrong)}: expected indices of test images, from 0 to {available - 1}"
            )
        return list(dict.fromkeys(images))
    count, seed = _DRAWN if count is None else count, seed or 0
    require_whole("count", count, 1, available)
    require_whole("seed", seed, 0)
    # the images of a smaller count are the first ones of a larger count
    return torch.randperm(available, generator=torch_generator("test images", seed))[:count].tolist()
