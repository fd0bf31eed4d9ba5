"""Checks of the arguments of the public ops; errors say what was expected and what was got."""

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_stitches(
    x_SNHWC: Tensor,
    w_KFD: Tensor,
    b_KD: Tensor,
    source: Sequence[int],
    index_B: Tensor | None,
    down: int,
    up: int,
) -> None:
    """The arguments of a forward call; raises ValueError or TypeError."""
    check_sender(x_SNHWC, source, index_B, down, up)
    _check_same(x_SNHWC, w_KFD=w_KFD, b_KD=b_KD)
    if b_KD.ndim != 2:
        raise ValueError(f"b_KD: expected 2 dimensions (K, D), got shape {tuple(b_KD.shape)}")
    features = down * down * x_SNHWC.shape[-1]
    _check_shape("w_KFD", w_KFD, (len(source), features, b_KD.shape[1]))
    _check_shape("b_KD", b_KD, (len(source), b_KD.shape[1]))


def check_sender(x_SNHWC: Tensor, source: Sequence[int], index_B: Tensor | None, down: int, up: int) -> None:
    """The sender's tensors, the stitches' sources, the images and the geometry."""
    if x_SNHWC.ndim != 5:
        raise ValueError(f"x_SNHWC: expected 5 dimensions (S, N, H, W, C), got shape {tuple(x_SNHWC.shape)}")
    if x_SNHWC.dtype not in DTYPES:
        raise TypeError(f"x_SNHWC: expected one of {[str(d) for d in DTYPES]}, got {x_SNHWC.dtype}")
    if down < 1 or up < 1 or (down > 1 and up > 1):
        raise ValueError(f"expected down and up of at least 1, one of them 1, got down={down}, up={up}")
    senders, _, height, width, _ = x_SNHWC.shape
    if height % down or width % down:
        raise ValueError(f"x_SNHWC: expected a height and width that down={down} divides, got {height} x {width}")
    if not all(0 <= sender < senders for sender in source):
        raise ValueError(f"source: expected indices of the {senders} senders in x_SNHWC, got {list(source)}")
    if index_B is not None:
        if index_B.dtype != torch.int64 or index_B.ndim != 1:
            raise TypeError(f"index_B: expected 1-d int64, got {index_B.ndim}-d {index_B.dtype}")
        if index_B.device != x_SNHWC.device:
            raise ValueError(f"index_B: expected it on {x_SNHWC.device} with x_SNHWC, got {index_B.device}")


def check_received(name: str, tensor: Tensor, x_SNHWC: Tensor, shape: tuple[int, ...]) -> None:
    """The receiver's batch or its gradient."""
    _check_same(x_SNHWC, **{name: tensor})
    _check_shape(name, tensor, shape)


def check_written(out_KBPQD: Tensor) -> None:
    """Each stitch's output must be contiguous, as it is in a slice of the receiver's batch."""
    expected = 1
    for size, stride in zip(reversed(out_KBPQD.shape[1:]), reversed(out_KBPQD.stride()[1:]), strict=True):
        if size > 1 and stride != expected:
            raise ValueError(
                f"out_KBPQD: expected each stitch's (B, P, Q, D) contiguous, got strides {out_KBPQD.stride()} "
                f"for shape {tuple(out_KBPQD.shape)}"
            )
        expected *= size
    if out_KBPQD.shape[0] > 1 and out_KBPQD.stride(0) < expected:
        raise ValueError(f"out_KBPQD: expected stitches {expected} elements apart, got {out_KBPQD.stride(0)}")


def check_gradients(dw_KFD: Tensor, db_KD: Tensor, x_SNHWC: Tensor, shape: tuple[int, int, int]) -> None:
    """The outputs of gradients: any floating dtype, the same for both, on the sender's device."""
    if not dw_KFD.is_floating_point() or dw_KFD.dtype != db_KD.dtype:
        raise TypeError(f"dw_KFD, db_KD: expected one floating dtype, got {dw_KFD.dtype} and {db_KD.dtype}")
    for name, tensor in (("dw_KFD", dw_KFD), ("db_KD", db_KD)):
        if tensor.device != x_SNHWC.device:
            raise ValueError(f"{name}: expected it on {x_SNHWC.device} with x_SNHWC, got {tensor.device}")
    _check_shape("dw_KFD", dw_KFD, shape)
    _check_shape("db_KD", db_KD, (shape[0], shape[2]))


def check_index_values(index_B: Tensor | None, images: int) -> None:
    """The values of the indices, on the CPU only: elsewhere reading them would make the host wait."""
    if index_B is None or index_B.device.type != "cpu" or index_B.numel() == 0:
        return
    low, high = (int(value) for value in index_B.aminmax())
    if low < 0 or high >= images:
        raise ValueError(f"index_B: expected indices in [0, {images}), got values from {low} to {high}")


def received_shape(
    x_SNHWC: Tensor, receiver_channels: int, source: Sequence[int], index_B: Tensor | None, down: int, up: int
) -> tuple[int, int, int, int, int]:
    """(K, B, P, Q, D) of the receiver's batch."""
    _, images, height, width, _ = x_SNHWC.shape
    if index_B is not None:
        images = index_B.shape[0]
    return len(source), images, height // down * up, width // down * up, receiver_channels


def _check_same(x_SNHWC: Tensor, **others: Tensor) -> None:
    for name, tensor in others.items():
        if tensor.dtype != x_SNHWC.dtype:
            raise TypeError(f"{name}: expected {x_SNHWC.dtype} as x_SNHWC has, got {tensor.dtype}")
        if tensor.device != x_SNHWC.device:
            raise ValueError(f"{name}: expected it on {x_SNHWC.device} with x_SNHWC, got {tensor.device}")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
