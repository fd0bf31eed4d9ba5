"""The words that options, files and results share, each said once.

The command line shows and checks them before anything heavier is loaded: nothing but the standard library is imported.
"""

from collections.abc import Iterable, Sequence
from enum import IntEnum
from numbers import Integral, Real
from typing import Any, Literal, get_args

from fastsitch.errors import ConfigError, argument

Setting = Literal["T2T", "T2R", "R2T", "R2R"]
"""Trained (T) or randomly initialised (R) sender, then receiver."""

Loss = Literal["task", "match"]
"""The task's cross-entropy (vanilla stitches), or the squared error to the expected representation (matched ones)."""

Solver = Literal["exact", "sgd"]
"""How matched stitches are found: from sufficient statistics without training, or by training, the published way."""

Init = Literal["default", "matched"]
"""Where vanilla stitches start: at a PyTorch convolution's own initialisation, or at the matched stitch."""

Optimizer = Literal["sgd", "preconditioned"]
"""How vanilla stitches are trained: plain SGD, or SGD in whitened inputs, which needs a matched start."""

ReceiverBN = Literal["frozen", "batch"]
"""How the receiver's BatchNorm normalises while stitches are trained: by the network's own running statistics, or by
those of each stitch's batch, as the authors' code did."""

StitchRecipe = Literal["paper", "small", "published-schedule"]
"""How stitches are trained: as the text of the study states it, for small data, or with the learning rates and random
views of the images that the authors' code really used."""

NetworkRecipe = Literal["fast", "published"]
"""How networks are trained: on a one-cycle schedule, or by the study's recipe (40 epochs, 10 of warm-up)."""

HeadChoice = Literal["new", "probe", "none"]
"""What an added network has in the place of its last layer: the same layer with the weights its code draws, a linear
probe that is fitted to its features, or nothing, so that it gives features and can only be a sender."""

Descent = Literal["cosine", "linear"]
"""How a learning rate falls to 0 after its warm-up."""

Resample = Literal["none", "area", "bilinear"]
"""How grids whose sizes are no multiples of each other are joined: not at all, by the mean over the part of the
sender's grid that a cell covers, or linearly between the nearest cells (over a wider window where the grid shrinks)."""

ClassToken = Literal["sender", "mean", "zero"]
"""What the stitch is applied to for a receiver's class token: the sender's own, the mean over the sender's grid, or
zeros, so that the token is the stitch's bias. ``sender`` is the mean where the sender has none."""

SourceName = Literal["auto", "resident", "streamed", "live"]
"""Where a sender's representations come from while stitches are trained: held in memory, read from the store while in
use, or computed anew for every batch; ``auto`` chooses one of these."""

Precision = Literal["auto", "bf16", "fp32"]
"""In which numbers networks and stitches compute; ``auto`` is bf16 where the device has it natively."""

Kernel = Literal["auto", "triton", "torch"]
"""The implementation of the stitch operator; ``auto`` is Triton on CUDA and torch elsewhere."""

Compile = Literal["auto", "on", "off"]
"""Whether torch.compile generates the receiver's blocks; ``auto`` is on with CUDA."""

Attention = Literal["fused", "products"]
"""How a receiver computes attention: by torch's fused operator, or by two batched products and a softmax."""

StoredDtype = Literal["bf16", "fp16", "fp32"]
"""The numbers in which an activation store keeps representations."""

Compression = Literal["none", "zstd"]
"""How an activation store is compressed."""

SplitName = Literal["train", "test"]
"""The training or the test images."""

Metric = Literal["accuracy", "accuracy_ratio", "accuracy_drop", "loss", "train_loss", "matched_error", "status"]
"""What a run knows of every cell; ``matched_error`` only where matched stitches are computed."""

FigureKind = Literal["pairs", "controls", "directions", "overview"]
"""A heat map for each pair, a pair's settings side by side, both ways of two networks, or all pairs on one page."""

StudyName = Literal["small-resnets", "r18-r34"]
"""The two parts of the published study."""

ScaleName = Literal["full", "medium", "small"]
"""The study as it was published (CIFAR-10, width 64), or small enough for a laptop."""

Stage = Literal["train", "precompute", "sweep", "matched", "tables", "figures", "images", "compare"]
"""The stages of the study, in order."""

SETTINGS: tuple[Setting, ...] = get_args(Setting)
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
STAGES: tuple[Stage, ...] = get_args(Stage)

DEFAULT_DATASET = "fashion-mini"
"""The embedded images."""

DEFAULT_ROOT = "fastsitch-data"
"""The folder of networks, stores and runs where none is named."""

LOCAL_CLUSTER = "local"
"""The address of a Ray cluster that starts and stops by itself."""


class Status(IntEnum):
    """What became of a cell, as runs and exports keep it."""

    NOT_RUN = 0
    DONE = 1
    DIVERGED = 2


def require_choice(name: str, value: object, vocabulary: Any) -> None:
    """Raise ConfigError, which names the argument, unless ``value`` is one of a Literal type's values."""
    allowed = get_args(vocabulary)
    if value not in allowed:
        raise ConfigError(f"{argument(name, value)}: expected one of {', '.join(allowed)}")


def require_choices(name: str, values: Sequence[object], vocabulary: Any) -> None:
    """Raise ConfigError unless there is at least one value, and all are values of a Literal type."""
    allowed = get_args(vocabulary)
    wrong = [value for value in values if value not in allowed]
    if wrong or not values:
        raise ConfigError(f"{argument(name, wrong)}: expected some of {', '.join(allowed)}")


def require_whole(name: str, value: object, least: int = 1, most: int | None = None) -> int:
    """A whole number, numpy's too, as an int; raises ConfigError, which names the argument, outside this range."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or int(value) < least or (most is not None and int(value) > most):  # type: ignore[call-overload]
        upwards = f"from {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(f"{argument(name, value)}: expected a whole number {upwards}")
    return int(value)  # type: ignore[call-overload, no-any-return]


def is_positive(value: object) -> bool:
    """Whether a value is a finite number above 0."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < float("inf")


def separated(values: Sequence[str] | str) -> list[str]:
    """A text as the parts between its commas, a list as it is: ``"a, b"`` and ``["a", "b"]`` are the same."""
    if isinstance(values, str):
        return [part.strip() for part in values.split(",") if part.strip()]
    if not isinstance(values, Iterable):
        raise ConfigError(f"{values!r}: expected a text with commas, or a list")
    return list(values)
