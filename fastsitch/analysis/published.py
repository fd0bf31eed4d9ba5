"""The matrices of Hernandez et al. 2022, from the text, the figures and the authors' logs."""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsitch.vocabulary import Setting

DATASET, WIDTH = "cifar10", 64
"""The data set of the published networks, and the channels of their first stage."""

_SOURCES = {"figure_2": "Figure 2", "figure_5": "Figure 5", "logs": "the authors' logs"}


@dataclass(frozen=True, kw_only=True)
class PublishedMatrix:
    """One published matrix of accuracies (sender positions, receiver positions), rows = sender."""

    source: str
    """``Figure 2``, ``Figure 5`` or ``the authors' logs``."""
    sender: str
    receiver: str
    setting: Setting
    matched: bool
    """Of matched (similarity-trained) stitches rather than vanilla ones."""
    accuracy: NDArray[np.float64]


def published_matrices() -> list[PublishedMatrix]:
    """All published matrices, in the order of the file."""
    found = []
    for key, source in _SOURCES.items():
        for name, values in _content()[key].items():
            pair, setting, *kind = name.split(".")
            sender, _, receiver = pair.partition("--")
            found.append(
                PublishedMatrix(
                    source=source,
                    sender=sender,
                    receiver=receiver,
                    setting=setting,
                    matched=kind == ["matched"],
                    accuracy=np.array(values, np.float64),
                )
            )
    return found


def published_accuracies() -> dict[str, float]:
    """Test accuracies of the published networks, by architecture (``R1111``)."""
    return {f"R{blocks}": float(value) for blocks, value in _content()["network_accuracy"].items()}


@cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(files("fastsitch.analysis").joinpath("published.json").read_text("utf-8"))
    return content
