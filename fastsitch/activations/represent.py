"""From images to representations as a store would keep them: transform, forward pass, rounding, cast."""

import torch
from torch import Tensor

from fastsitch.data import ImageFiles, Transform, Views
from fastsitch.receivers.frozen_network import FrozenNetwork

PASS_IMAGES = 256
"""Images per forward pass in the order of the data set. All who go through it take as many, so that bits are equal."""


def represent(
    network: FrozenNetwork,
    transform: Transform,
    images: Tensor | ImageFiles,
    *,
    stored: torch.dtype,
    dtype: torch.dtype,
    views: Views | None = None,
) -> list[Tensor]:
    """The raw representations of uint8 images (N, H, W, 3), or files, at every position.

    Those of maps are (N, C, H, W), channels-last. The images and ``views`` of them are on the network's device. It
    computes in its own dtype; what it gives is rounded to ``stored``, the dtype of a store, then cast to ``dtype``.
    """
    x = transform.apply(images, views)
    return [y.to(stored).to(dtype) for y in network.representations(x)]
