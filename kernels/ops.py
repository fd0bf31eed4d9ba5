"""The registered ops, and the public functions that check their arguments and call them.

``fastsitch::stitch_out`` and ``fastsitch::stitch_grad`` write into their arguments and have no autograd formula
(torch refuses one for such ops): the engine calls them in its backward pass. ``fastsitch::grouped_stitch`` is
functional, with autograd.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastsitch.kernels import checks, torch_path
from fastsitch.kernels.dispatch import resolve_kernel


@torch.library.custom_op("fastsitch::stitch_out", mutates_args=("out_KBPQD",))
def _stitch_out(
    x_SNHWC: Tensor,
    w_KFD: Tensor,
    b_KD: Tensor,
    out_KBPQD: Tensor,
    source: Sequence[int],
    index_B: Tensor | None,
    down: int,
    up: int,
    kernel: str,
) -> None:
    checks.check_index_values(index_B, x_SNHWC.shape[1])
    if _resolve(kernel, x_SNHWC) == "triton":
        from fastsitch.kernels.triton_forward import stitch_out_triton as run
    else:
        run = torch_path.stitch_out
    run(x_SNHWC, w_KFD, b_KD, out_KBPQD, source, index_B, down=down, up=up)


@_stitch_out.register_fake
def _(*arguments: Any) -> None:
    return None


@torch.library.custom_op("fastsitch::stitch_grad", mutates_args=("dw_KFD", "db_KD"))
def _stitch_grad(
    x_SNHWC: Tensor,
    g_KBPQD: Tensor,
    dw_KFD: Tensor,
    db_KD: Tensor,
    source: Sequence[int],
    index_B: Tensor | None,
    down: int,
    up: int,
    kernel: str,
) -> None:
    checks.check_index_values(index_B, x_SNHWC.shape[1])
    if _resolve(kernel, x_SNHWC) == "triton":
        from fastsitch.kernels.triton_grad import stitch_grad_triton as run
    else:
        run = torch_path.stitch_grad
    run(x_SNHWC, g_KBPQD, dw_KFD, db_KD, source, index_B, down=down, up=up)


@_stitch_grad.register_fake
def _(*arguments: Any) -> None:
    return None


@torch.library.custom_op("fastsitch::grouped_stitch", mutates_args=())
def _grouped_stitch(
    x_SNHWC: Tensor,
    w_KFD: Tensor,
    b_KD: Tensor,
    source: Sequence[int],
    index_B: Tensor | None,
    down: int,
    up: int,
    kernel: str,
) -> Tensor:
    out_KBPQD = x_SNHWC.new_empty(checks.received_shape(x_SNHWC, b_KD.shape[1], source, index_B, down, up))
    _stitch_out(x_SNHWC, w_KFD, b_KD, out_KBPQD, source, index_B, down, up, kernel)
    return out_KBPQD


@_grouped_stitch.register_fake
def _(
    x_SNHWC: Tensor,
    w_KFD: Tensor,
    b_KD: Tensor,
    source: Sequence[int],
    index_B: Tensor | None,
    down: int,
    up: int,
    kernel: str,
) -> Tensor:
    return x_SNHWC.new_empty(checks.received_shape(x_SNHWC, b_KD.shape[1], source, index_B, down, up))


@torch.library.custom_op("fastsitch::grouped_stitch_grad", mutates_args=())
def _grouped_stitch_grad(
    x_SNHWC: Tensor,
    g_KBPQD: Tensor,
    source: Sequence[int],
    index_B: Tensor | None,
    down: int,
    up: int,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    dw_KFD, db_KD = _empty_gradients(x_SNHWC, g_KBPQD, down)
    _stitch_grad(x_SNHWC, g_KBPQD, dw_KFD, db_KD, source, index_B, down, up, kernel)
    return dw_KFD, db_KD


@_grouped_stitch_grad.register_fake
def _(
    x_SNHWC: Tensor, g_KBPQD: Tensor, source: Sequence[int], index_B: Any, down: int, *_: Any
) -> tuple[Tensor, Tensor]:
    return _empty_gradients(x_SNHWC, g_KBPQD, down)


def _empty_gradients(x_SNHWC: Tensor, g_KBPQD: Tensor, down: int) -> tuple[Tensor, Tensor]:
    stitches, *_, receiver_channels = g_KBPQD.shape
    features = down * down * x_SNHWC.shape[-1]
    dw_KFD = x_SNHWC.new_empty((stitches, features, receiver_channels))
    return dw_KFD, x_SNHWC.new_empty((stitches, receiver_channels))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_SNHWC, _, _, ctx.source, index_B, ctx.down, ctx.up, ctx.kernel = inputs
    ctx.save_for_backward(x_SNHWC, index_B)


def _backward(ctx: Any, g_KBPQD: Tensor) -> tuple[Tensor | None, ...]:
    x_SNHWC, index_B = ctx.saved_tensors
    dw_KFD, db_KD = _grouped_stitch_grad(x_SNHWC, g_KBPQD, ctx.source, index_B, ctx.down, ctx.up, ctx.kernel)
    return None, dw_KFD, db_KD, None, None, None, None, None


_grouped_stitch.register_autograd(_backward, setup_context=_save)


def stitch_out(
    x_SNHWC: Tensor,
    w_KFD: Tensor,
    b_KD: Tensor,
    out_KBPQD: Tensor,
    source: Sequence[int],
    index_B: Tensor | None = None,
    *,
    down: int = 1,
    up: int = 1,
    kernel: str = "auto",
) -> None:
    """Apply K stitches and write them into ``out_KBPQD``, a slice of the receiver's batch. No autograd.

    Stitch k reads ``x_SNHWC[source[k]]``; ``index_B`` (int64) picks the batch's images, None takes all N. All
    tensors share one dtype and device; each stitch's output is contiguous, the inputs may have any strides.
    Stitches that share a sender run as one wider GEMM where they are neighbours in ``source``. Indices are checked on
    the CPU only: on a GPU reading them would make the host wait, and an index out of range is undefined behaviour.
    Raises ValueError or TypeError.
    """
    checks.check_stitches(x_SNHWC, w_KFD, b_KD, source, index_B, down, up)
    shape = checks.received_shape(x_SNHWC, b_KD.shape[1], source, index_B, down, up)
    checks.check_received("out_KBPQD", out_KBPQD, x_SNHWC, shape)
    checks.check_written(out_KBPQD)
    _stitch_out(x_SNHWC, w_KFD, b_KD, out_KBPQD, source, index_B, down, up, kernel)


def stitch_grad(
    x_SNHWC: Tensor,
    g_KBPQD: Tensor,
    dw_KFD: Tensor,
    db_KD: Tensor,
    source: Sequence[int],
    index_B: Tensor | None = None,
    *,
    down: int = 1,
    up: int = 1,
    kernel: str = "auto",
) -> None:
    """Write the gradients of weights and biases of K stitches into ``dw_KFD`` and ``db_KD``. No autograd.

    ``g_KBPQD`` is the gradient of the receiver's batch, in x's dtype; the gradients may have any floating dtype,
    usually that of the master weights. There is none for x: the sender is frozen. Deterministic.
    Raises ValueError or TypeError.
    """
    checks.check_sender(x_SNHWC, source, index_B, down, up)
    receiver_channels = db_KD.shape[-1]
    shape = checks.received_shape(x_SNHWC, receiver_channels, source, index_B, down, up)
    checks.check_received("g_KBPQD", g_KBPQD, x_SNHWC, shape)
    features = down * down * x_SNHWC.shape[-1]
    checks.check_gradients(dw_KFD, db_KD, x_SNHWC, (len(source), features, receiver_channels))
    _stitch_grad(x_SNHWC, g_KBPQD, dw_KFD, db_KD, source, index_B, down, up, kernel)


def stitch_functions(kernel: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """:func:`stitch_out` and :func:`stitch_grad` for callers that call them many times a second.

    For ``torch`` these are the bare functions, without checks and registered ops, which on a CPU cost more than small
    stitches do.
    """
    if kernel == "torch":
        return torch_path.stitch_out, torch_path.stitch_grad
    return partial(stitch_out, kernel=kernel), partial(stitch_grad, kernel=kernel)


def grouped_stitch(
    x_SNHWC: Tensor,
    w_KFD: Tensor,
    b_KD: Tensor,
    source: Sequence[int],
    index_B: Tensor | None = None,
    *,
    down: int = 1,
    up: int = 1,
    kernel: str = "auto",
) -> Tensor:
    """Apply K stitches and return (K, B, P, Q, D); differentiable in ``w_KFD`` and ``b_KD``.

    The arguments are those of :func:`stitch_out`. Raises ValueError or TypeError.
    """
    checks.check_stitches(x_SNHWC, w_KFD, b_KD, source, index_B, down, up)
    if x_SNHWC.requires_grad:
        raise ValueError("x_SNHWC: expected a frozen sender, got a tensor that requires a gradient")
    result: Tensor = _grouped_stitch(x_SNHWC, w_KFD, b_KD, source, index_B, down, up, kernel)
    return result


def _resolve(kernel: str, x_SNHWC: Tensor) -> str:
    """The kernel for these tensors; chosen inside the ops, which are not traced."""
    path = resolve_kernel(kernel, x_SNHWC.device)
    if path == "triton" and x_SNHWC.dtype == torch.float64:
        raise TypeError("kernel triton: expected bfloat16, float16 or float32, got torch.float64; use kernel='torch'")
    return path
