"""A sweep from its configuration to the finished run, here or on the machines of a cluster."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastsitch.cluster.cluster import Cluster
from fastsitch.execution.distribute_sweep import sweep_on
from fastsitch.execution.prepare_sweep import Preparation, require_networks
from fastsitch.execution.train_units import missing_units, train_units
from fastsitch.files import exclusive
from fastsitch.progress import Report, ignore
from fastsitch.root import Root
from fastsitch.runs.run import Run
from fastsitch.runs.sweep_config import SweepConfig, checked_run_name

log = logging.getLogger(__name__)


@torch.no_grad()
def run_sweep(
    root: Root,
    config: SweepConfig,
    *,
    run: str | None = None,
    device: str = "auto",
    memory: str = "auto",
    report: Report = ignore,
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
    preparation = Preparation(root, config, device=device, memory=memory)
    finished = preparation.existing(path)
    if finished is not None and all(finished.intact(unit) for unit in finished.units):
        log.info("run %s is done already", name)
        return finished
    with exclusive(path / "lock", f"run {name!r}"), _no_trace_of_refusal(path):
        workbench = preparation.begin(path)
        train_units(workbench, missing_units(workbench.run), report)
    return workbench.run


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
