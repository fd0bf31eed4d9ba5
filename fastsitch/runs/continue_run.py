"""Whether a run that exists is the one asked for: everything that its finished units depend on has to be as it was."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from fastsitch.activations.representations import Origin
from fastsitch.errors import RunError, argument
from fastsitch.identity import stable_hash
from fastsitch.network_names import NetworkName
from fastsitch.runs.run import Run
from fastsitch.runs.run_record import NetworkInput
from fastsitch.runs.sweep_config import SweepConfig
from fastsitch.stitching.cells import Unit


def require_same_run(
    run: Run, config: SweepConfig, networks: Mapping[NetworkName, NetworkInput], data_hash: str
) -> None:
    """Raise RunError naming what differs when this run is not the one described."""
    other = f"use another {argument('run')} name"
    differing = _differences(asdict(run.config), asdict(config))
    if differing:
        raise RunError(f"run {run.name!r} has another configuration: {'; '.join(differing)}; {other}")
    require_same_data(run, data_hash)
    changed = [str(name) for name, network in networks.items() if run.networks.get(name) != network]
    if changed:
        raise RunError(f"{', '.join(changed)} was trained again since run {run.name!r} began; {other}")


def require_same_data(run: Run, data_hash: str) -> None:
    """Raise RunError unless the data set is the one that the run began with."""
    if data_hash != run.data_hash:
        raise RunError(
            f"the data set has changed since run {run.name!r} began: restore it, or sweep again under another "
            f"{argument('run')} name"
        )


def require_same_device(run: Run, device: torch.device) -> None:
    """Raise RunError unless the run began on a device of this kind."""
    began = run.resolved.device
    if device.type != began:
        raise RunError(
            f"run {run.name!r} began on {began}: continue it with {argument('device', began)}, or sweep again under "
            f"another {argument('run')} name"
        )


def require_same_origin(run: Run, units: Sequence[Unit], key: str, origin: Origin) -> None:
    """Raise RunError when one of these finished units records other representations under ``key``."""
    identity = origin.identity
    computed = f"({identity.dtype}, computed in {identity.compute})"
    for unit in units:
        if str(run.read(unit)[key]) == identity.hash:
            continue
        found, remedy = (
            (f"another store than {origin.store} {computed}", "make the store as it was")
            if origin.store
            else (
                f"other representations than {identity.network} gives here {computed}",
                "continue it on a machine like the one it began on",
            )
        )
        raise RunError(
            f"unit {unit.name} of run {run.name!r} was trained on {found}: {remedy}, or use another "
            f"{argument('run')} name"
        )


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``key is X there, Y was asked for`` for every key of nested mappings that differs."""
    differing = []
    for key in sorted({*found, *wanted}):
        there, asked = found.get(key), wanted.get(key)
        if isinstance(there, Mapping) and isinstance(asked, Mapping):
            differing += _differences(there, asked, f"{prefix}{key}.")
        elif stable_hash(there) != stable_hash(asked):
            differing.append(f"{prefix}{key} is {_plain(there)} there, {_plain(asked)} was asked for")
    return differing


def _plain(value: Any) -> str:
    # only positions may be empty
    return ",".join(map(str, value)) or "all" if isinstance(value, list | tuple) else str(value)
