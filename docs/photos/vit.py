"""A small vision transformer for 224x224 images: factories, as ``fastsitch add --from FILE.py:FUNCTION`` calls them."""

from torch import nn
from torchvision.models import VisionTransformer


def small(classes: int) -> nn.Module:
    """49 patches of 32x32 pixels, 6 layers of 3 heads, 192 channels."""
    return VisionTransformer(
        image_size=224, patch_size=32, num_layers=6, num_heads=3, hidden_dim=192, mlp_dim=384, num_classes=classes
    )


def tower() -> nn.Module:
    """The same without a classifier: it gives 192 features of every image."""
    model = small(1)
    model.heads = nn.Identity()
    return model
