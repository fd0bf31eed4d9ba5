"""A small vision transformer for 32x32 images: a factory, as ``fastsitch add --from FILE.py:FUNCTION`` calls it."""

from torch import nn
from torchvision.models import VisionTransformer


def small(classes: int) -> nn.Module:
    """64 patches of 4x4 pixels, 4 layers of 4 heads, 64 channels."""
    return VisionTransformer(
        image_size=32, patch_size=4, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=classes
    )
