"""Which elements passed a ReLU, one bit each."""

import torch
from torch import Tensor


def mask_bytes(elements: int) -> int:
    """Bytes for the mask of one sample of so many elements."""
    return -(-elements // 8)


def pack_mask(y: Tensor) -> Tensor:
    """One bit per element of y (B, C, H, W), set where the gradient passes the ReLU: uint8 (B, bytes).

    Elements count in channels-last order, the lowest bit first. NaN passes, as in PyTorch's ReLU.
    """
    passed = torch.logical_not(y <= 0).permute(0, 2, 3, 1).flatten(1)
    missing = -passed.shape[1] % 8
    if missing:
        passed = torch.nn.functional.pad(passed, (0, missing))
    bits = torch.unflatten(passed, 1, (-1, 8)).to(torch.uint8)
    return torch.sum(bits << _shifts(y.device), -1, dtype=torch.uint8)


def apply_mask(g: Tensor, mask: Tensor) -> Tensor:
    """g (B, C, H, W) where the bit is set, 0 elsewhere."""
    images, channels, height, width = g.shape
    bits = (mask.unsqueeze(-1) >> _shifts(g.device)) & 1
    passed = bits.flatten(1)[:, : channels * height * width].view(images, height, width, channels)
    return torch.where(passed.permute(0, 3, 1, 2) != 0, g, torch.zeros((), dtype=g.dtype, device=g.device))


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
