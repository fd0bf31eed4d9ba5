"""Grey images for networks that take one channel."""

from torch import Tensor, int32, uint8

LUMA = (19595, 38470, 7471)
"""Of red, green and blue, in 65536ths: ITU-R BT.601, as Pillow converts to its mode L. Grey pixels keep their value."""


def grey(images_NHWC: Tensor) -> Tensor:
    """The brightness of images in colour, uint8 (N, H, W, 3) -> (N, H, W, 1); images of one channel as they are."""
    if images_NHWC.shape[-1] == 1:
        return images_NHWC
    red, green, blue = (images_NHWC[..., channel : channel + 1].to(int32) for channel in range(3))
    return ((LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue + (1 << 15)) >> 16).to(uint8)
