"""Any picture that Pillow opens as three channels of 8 bits, by rules that the guide states."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps

from fastsitch.data.background import rgb
from fastsitch.data.table_rows import ImageFile, Row
from fastsitch.errors import DataError

_EIGHT_BITS = ("1", "L", "LA", "RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr")
_GREY_OF_16_BITS = ("I;16", "I;16L", "I;16B", "I;16N")

_ORIENTATION = 0x0112
"""The EXIF tag."""

_PHOTOMETRIC = 262
"""The TIFF tag; 0 where black is the largest number."""


@contextmanager
def opened(file: ImageFile) -> Iterator[Image.Image]:
    """An image file; whatever is wrong with it, also while it is decoded later, is a DataError that names it."""
    with decoding(file), Image.open(file.open() if isinstance(file, Row) else file) as picture:
        yield picture


@contextmanager
def decoding(said: object) -> Iterator[None]:
    """Whatever is wrong with an image while it is decoded is a DataError that says which it is."""
    try:
        yield
    except DataError:
        raise
    # what Pillow's decoders raise for broken files
    except (OSError, SyntaxError, ValueError, EOFError, OverflowError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read {said} as an image ({error})") from None


def require_known_pixels(picture: Image.Image, file: object) -> None:
    """Raise DataError, naming the file, for pixels whose black and white nothing tells, from the head of the file."""
    if picture.mode in _EIGHT_BITS or _has_16_bits(picture):
        return
    kind = "I;12" if _is_packed(picture) else picture.mode
    raise DataError(f"{file} has pixels of type {kind}: expected 8 bits per channel, or 16; convert it first")


def _has_16_bits(picture: Image.Image) -> bool:
    """Whether a picture is grey from 0 to 65535."""
    if picture.mode in _GREY_OF_16_BITS:
        return not _is_packed(picture)
    # of these Pillow makes 32 bits from 16; elsewhere numbers of 32 bits may be anything
    return picture.mode == "I" and picture.format in ("PNG", "PPM")


def _is_packed(picture: Image.Image) -> bool:
    """Whether 12 bits are packed into what Pillow opens as 16."""
    return any(str(tile[3]) == "I;12" or tile[3][:1] == ("I;12",) for tile in getattr(picture, "tile", ()))


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """Width and height as the image is to be seen: cameras note how they were held."""
    width, height = picture.size
    if picture.format == "TIFF":
        # Pillow has taken care of it
        return width, height
    # of a PNG whose header has no tags Pillow would decode the pixels to look for some behind them
    tags = picture.getexif() if picture.format != "PNG" or "exif" in picture.info else {}
    turned = tags.get(_ORIENTATION, 1) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def has_alpha(picture: Image.Image) -> bool:
    """Whether pixels may be transparent."""
    return picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info


def as_rgb(picture: Image.Image, background: str) -> Image.Image:
    """The first frame upright, in three channels of 8 bits; what is transparent shows the background.

    Grey is repeated; 16 bits of grey are divided by 257 and rounded; CMYK is converted as Pillow does.
    """
    shown = ImageOps.exif_transpose(picture)
    if _has_16_bits(picture):
        tags = getattr(picture, "tag_v2", {})
        shown = _of_8_bits(shown, black_is_largest=tags.get(_PHOTOMETRIC) == 0)
    if not has_alpha(shown):
        return shown.convert("RGB")
    behind = Image.new("RGBA", shown.size, (*rgb(background), 255))
    return Image.alpha_composite(behind, shown.convert("RGBA")).convert("RGB")


def _of_8_bits(picture: Image.Image, *, black_is_largest: bool) -> Image.Image:
    values = np.asarray(picture).astype(np.int64)
    clear = picture.info.get("transparency")
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if black_is_largest:
        grey = ImageOps.invert(grey)
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey
