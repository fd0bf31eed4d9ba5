"""Carry out a sweep, here or on the machines of a cluster."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastsitch.cluster.cluster import Cluster
from fastsitch.files import exclusive
from fastsitch.root import Root
from fastsitch.sweep.config import SweepConfig, checked_run_name
from fastsitch.sweep.distribute import sweep_on
from fastsitch.sweep.execute import Execution, Report, missing_units, require_networks
from fastsitch.sweep.prepare import Preparation
from fastsitch.sweep.results import Run

log = logging.getLogger(__name__)


@torch.no_grad()
def run_sweep(
    root: Root,
    config: SweepConfig,
    *,
    run: str | None = None,
    device: str = "auto",
    memory: str = "auto",
    report: Report | None = None,
    cluster: Cluster | None = None,
) -> Run:
    """Train all cells of ``config`` that the run does not have yet; return the run.

    ``memory`` bounds what a run that begins now may take on the device: ``auto``, or a size such as ``8GB``.
    On a ``cluster`` units are trained by its workers, and ``memory`` is that of each; the results are the same.
    Networks have to be trained (NetworkError otherwise); stores that are missing are made. Raises RunError when the
    run of that name has another configuration, or began on another kind of device.
    """
    name = checked_run_name(config.default_run_name if run is None else run)
    require_networks(root, config)
    path = root.run(config.dataset, name)
    if cluster is not None:
        with exclusive(path / "lock", f"run {name!r}"), _no_trace_of_refusal(path):
            return sweep_on(cluster, root, config, path, device=device, memory=memory, report=report)
    prepared = Preparation(root, config, device=device, memory=memory)
    finished = prepared.existing(path)
    if finished is not None and all(finished.intact(planned.unit) for planned in finished.units):
        log.info("all %d units of run %s are done already", len(finished.units), name)
        return finished
    with exclusive(path / "lock", f"run {name!r}"), _no_trace_of_refusal(path):
        current = prepared.begin(path)
        place = (prepared.dataset, prepared.networks, prepared.device)
        Execution(root, current, *place, missing_units(current), report).carry_out()
    return current


@contextmanager
def _no_trace_of_refusal(path: Path) -> Iterator[None]:
    """Remove the folder of a run that was refused before it began: it holds nothing but the lock."""
    try:
        yield
    except BaseException:
        if [entry.name for entry in path.iterdir()] == ["lock"]:
            (path / "lock").unlink()
            path.rmdir()
        raise
