"""Choose the kernel: Triton or torch."""

import logging
from functools import lru_cache
from importlib.util import find_spec

import torch

from fastsitch.kernels.launch import interpreted

KERNELS = ("auto", "triton", "torch")
# the first with bf16 matrix instructions and asynchronous copies
SMALLEST_CAPABILITY = (8, 0)

logger = logging.getLogger(__name__)


@lru_cache(maxsize=64)
def resolve_kernel(requested: str, device: torch.device) -> str:
    """``"triton"`` or ``"torch"`` for tensors on ``device``; what ``auto`` picked is logged once per device.

    A kernel that is named is used or refused, never replaced. Raises ValueError.
    """
    if requested not in KERNELS:
        raise ValueError(f"expected one of {', '.join(KERNELS)}, got {requested!r}")
    obstacle = _triton_obstacle(device)
    if requested == "auto":
        # not in the interpreter, which is for tests, nor for meta tensors, which hold no data
        chosen = "triton" if device.type == "cuda" and obstacle is None else "torch"
        logger.info("stitch kernel: auto picks %s on %s%s", chosen, device, f" ({obstacle})" if obstacle else "")
        return chosen
    if requested == "triton" and obstacle is not None:
        raise ValueError(f"expected a device that can run triton, got {device}: {obstacle}")
    return requested


def _triton_obstacle(device: torch.device) -> str | None:
    """Why triton cannot run on the device; None if it can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < SMALLEST_CAPABILITY:
            return f"compute capability {capability} is below {SMALLEST_CAPABILITY}"
        return None
    if device.type == "meta" or (device.type == "cpu" and interpreted()):
        return None
    return "it runs on CUDA only, or with TRITON_INTERPRET=1 set before Python starts, for tests on the CPU"
