"""What shows where an image is transparent: a colour by name, or as #RRGGBB."""

import re
from typing import TypeVar

from fastsitch.errors import ConfigError, argument

Name = TypeVar("Name", str, str | None)

BLACK = "black"

_NAMED = {BLACK: "#000000", "white": "#ffffff", "grey": "#808080", "gray": "#808080"}


def is_colour(text: str) -> bool:
    """Whether this is black, white, grey (or gray), or #RRGGBB."""
    return text.lower() in _NAMED or re.fullmatch("#[0-9a-fA-F]{6}", text) is not None


def canonical_colour(text: str) -> str:
    """One text for every colour: its name where it has one."""
    code = _NAMED.get(text.lower(), text.lower())
    return next((name for name, named in _NAMED.items() if named == code), code)


def rgb(colour: str) -> tuple[int, int, int]:
    """Red, green and blue of a colour, 0 to 255."""
    code = int(_NAMED.get(colour, colour)[1:], 16)
    return code >> 16, code >> 8 & 255, code & 255


def shown_over(dataset: Name, background: str | None) -> Name:
    """The name of a data set of images that are shown over a colour; raises ConfigError unless it is an image folder.

    Without a background the name as it is.
    """
    if background is None:
        return dataset
    if not is_colour(background):
        raise ConfigError(f"{argument('background', background)}: expected black, white, grey or #RRGGBB")
    if dataset is None or not dataset.startswith("imagefolder:"):
        raise ConfigError(
            f"{argument('background', background)}: only images of a folder can be transparent; name it with "
            f"{argument('dataset', 'imagefolder:DIR')}"
        )
    return f"{dataset}@{canonical_colour(background)}"
