"""fastsitch: model stitching as one batched computation.

Freeze a sender A and a receiver B, learn a small linear stitch from A's representation at position i to B's at
position j, and take the accuracy of the stitched network as their functional similarity.

Shape suffixes, everywhere: K stitches in a group, B images of a mini-batch, N images in all, S sender positions of
one shape; H W C sender height, width, channels; P Q D receiver height, width, channels; F features and M rows of a
stitch's GEMM. Tensors are channels-last in memory.
"""

from fastsitch.analysis.compare import compare_run
from fastsitch.analysis.error_files import read_errors
from fastsitch.analysis.errors import StitchErrors
from fastsitch.api import (
    add,
    bench,
    configure_sweep,
    estimate,
    images,
    load_dataset,
    measure_errors,
    open_run,
    precompute,
    sweep,
    train,
)
from fastsitch.cluster.cluster import Cluster
from fastsitch.errors import FastsitchError
from fastsitch.networks.chain import Chain, Position
from fastsitch.networks.layout import Layout
from fastsitch.paper.run import estimate_paper, paper
from fastsitch.report.choose import plot_figures
from fastsitch.report.heatmap import plot_run
from fastsitch.sweep.by_hand import StitchedPair, stitch
from fastsitch.sweep.export import export_run
from fastsitch.sweep.results import Run

__version__ = "0.1.0"

__all__ = [
    "Chain",
    "Cluster",
    "FastsitchError",
    "Layout",
    "Position",
    "Run",
    "StitchErrors",
    "StitchedPair",
    "add",
    "bench",
    "compare_run",
    "configure_sweep",
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
    "read_errors",
    "stitch",
    "sweep",
    "train",
]
