"""fastsitch: model stitching as one batched computation.

Freeze a sender A and a receiver B, learn a small linear stitch from A's representation at position i to B's at
position j, and take the accuracy of the stitched network as their functional similarity.

Shape suffixes, everywhere: K stitches in a group, B images of a mini-batch, N images in all, S sender positions of
one shape; H W C sender height, width, channels; P Q D receiver height, width, channels; F features and M rows of a
stitch's GEMM. Tensors are channels-last in memory.
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"

# torch's threads spin while they wait for each other. Beside another busy program they would spin while the thread that
# they wait for is not even running: after so many turns they sleep. It is read when torch is loaded.
if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

if TYPE_CHECKING:
    from fastsitch.analysis.compare_published import compare_run
    from fastsitch.analysis.probe_positions import NetworkProbes, PositionProbe
    from fastsitch.analysis.stitch_error_files import read_errors
    from fastsitch.analysis.stitch_errors import StitchErrors
    from fastsitch.api_networks import add, load_dataset, precompute, probe, train
    from fastsitch.api_runs import bench, configure_sweep, estimate, images, measure_errors, open_run, sweep
    from fastsitch.chains.chain import Chain
    from fastsitch.chains.layout import Layout
    from fastsitch.chains.position import Position
    from fastsitch.cluster.cluster import Cluster
    from fastsitch.data import Dataset, Normalisation, Split, Transform
    from fastsitch.data.python_dataset import dataset_from
    from fastsitch.errors import FastsitchError
    from fastsitch.execution.stitch_pair import StitchedPair, stitch
    from fastsitch.kernels.reference import conv_weight
    from fastsitch.progress import Progress
    from fastsitch.report.heatmap import plot_run
    from fastsitch.report.plot_figures import plot_figures
    from fastsitch.runs.export import export_run
    from fastsitch.runs.run import Run
    from fastsitch.stitching.cells import Cell, Unit
    from fastsitch.study.run_study import estimate_paper, paper

_HOMES = {
    "analysis.compare_published": ("compare_run",),
    "analysis.probe_positions": ("NetworkProbes", "PositionProbe"),
    "analysis.stitch_error_files": ("read_errors",),
    "analysis.stitch_errors": ("StitchErrors",),
    "api_networks": ("add", "load_dataset", "precompute", "probe", "train"),
    "api_runs": ("bench", "configure_sweep", "estimate", "images", "measure_errors", "open_run", "sweep"),
    "chains.chain": ("Chain",),
    "chains.layout": ("Layout",),
    "chains.position": ("Position",),
    "cluster.cluster": ("Cluster",),
    "data": ("Dataset", "Normalisation", "Split", "Transform"),
    "data.python_dataset": ("dataset_from",),
    "errors": ("FastsitchError",),
    "execution.stitch_pair": ("StitchedPair", "stitch"),
    "kernels.reference": ("conv_weight",),
    "progress": ("Progress",),
    "report.heatmap": ("plot_run",),
    "report.plot_figures": ("plot_figures",),
    "runs.export": ("export_run",),
    "runs.run": ("Run",),
    "stitching.cells": ("Cell", "Unit"),
    "study.run_study": ("estimate_paper", "paper"),
}
"""Where each public name is defined. A module is imported when something of it is used, and torch with it."""

_HOME_OF = {name: f"fastsitch.{module}" for module, names in _HOMES.items() for name in names}

__all__ = [
    "Cell",
    "Chain",
    "Cluster",
    "Dataset",
    "FastsitchError",
    "Layout",
    "NetworkProbes",
    "Normalisation",
    "Position",
    "PositionProbe",
    "Progress",
    "Run",
    "Split",
    "StitchErrors",
    "StitchedPair",
    "Transform",
    "Unit",
    "add",
    "bench",
    "compare_run",
    "configure_sweep",
    "conv_weight",
    "dataset_from",
    "estimate",
    "estimate_paper",
    "export_run",
    "images",
    "load_dataset",
    "measure_errors",
    "open_run",
    "paper",
    "plot_figures",
    "plot_run",
    "precompute",
    "probe",
    "read_errors",
    "stitch",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'fastsitch' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
