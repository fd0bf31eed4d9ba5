"""Where in a checkpoint weights lie: mappings of named tensors, at the top or inside others."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastsitch.errors import NetworkError, argument, plain

_DEEPEST = 3

_MOST = 10_000
"""Mappings that are looked into: one that is shared may stand in a file more often than it has bytes."""

_OTHER_STATES = ("optim", "scheduler", "lr_scheduler", "scaler", "grad_scaler")
"""How the names of what is no network begin; some optimisers keep tensors by the names of weights."""


@dataclass(frozen=True)
class Nest:
    """Named tensors, and the keys that lead to them, joined by dots; an empty path is the top."""

    path: str
    tensors: dict[str, Tensor]


def find_nests(content: Any, origin: object) -> list[Nest]:
    """The mappings in a checkpoint most of whose values are named tensors, down to three keys below its top.

    What else is in it, such as numbers and the states of optimisers, is passed over. Raises NetworkError, which names
    the file ``origin``, when there are none.
    """
    shown = argument("weights", origin)
    if not isinstance(content, Mapping):
        raise NetworkError(
            f"{shown} holds a {type(content).__name__}: expected a state dict of nothing but named tensors, or a dict "
            "with some in it"
        )
    nests = []
    level: list[tuple[str, Mapping[Any, Any]]] = [("", content)]
    for _ in range(_DEEPEST + 1):
        below: list[tuple[str, Mapping[Any, Any]]] = []
        for path, mapping in level:
            named = [(key, value) for key, value in mapping.items() if isinstance(key, str)]
            tensors = {key: value for key, value in named if isinstance(value, Tensor)}
            if 2 * len(tensors) > len(mapping):
                nests.append(Nest(path, tensors))
            below += [
                (f"{path}.{key}" if path else key, value)
                for key, value in named
                if isinstance(value, Mapping) and not key.lower().startswith(_OTHER_STATES)
            ]
            if len(below) > _MOST:
                raise NetworkError(f"{shown} has more than {_MOST} dicts inside each other: expected a checkpoint")
        level = below
    if not nests:
        keys = ", ".join(plain(str(key)) for key in list(content)[:6])
        raise NetworkError(
            f"{shown} holds no named tensors, neither at its top nor down to {_DEEPEST} keys below it "
            f"({f'it has {keys}' if keys else 'it is empty'}): expected a state dict, or a dict with some in it"
        )
    return nests
