"""Whether tensors are equal, up to rounding or bit by bit."""

import torch
from torch import Tensor


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal up to rounding; NaN equals NaN."""
    if one.shape != other.shape:
        return False
    one, other = one.double(), other.double()
    largest = one.nan_to_num(0, 0, 0).abs().max().item() if one.numel() else 0.0
    # of values that are all tiny the differences are too
    return torch.allclose(one, other, rtol=1e-3, atol=1e-5 * min(1.0, largest), equal_nan=True)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal; NaN equals NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())
