"""The result of a trained or matched cell."""

from dataclasses import dataclass, field

from torch import Tensor

from fastsitch.receivers.contract import Statistics
from fastsitch.vocabulary import Status


@dataclass(frozen=True)
class CellResult:
    """Accuracy and loss are over the whole test set, NaN where the cell diverged."""

    accuracy: float
    loss: float
    train_loss: float
    status: Status
    weight_FD: Tensor
    bias_D: Tensor
    matched_error: float = float("nan")
    """Mean squared error of the cell's matched stitch over the training images, where that was computed."""
    statistics: Statistics = field(default_factory=dict)
    """Running statistics of the receiver's BatchNorm layers, where each stitch has its own."""
