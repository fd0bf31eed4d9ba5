"""What shows where an image is transparent: a colour by name, or as #RRGGBB."""

import re

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
