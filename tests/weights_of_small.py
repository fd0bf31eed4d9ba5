"""Weights of the network ``small`` in files, and what the network has once they are loaded."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastsitch.networks.foreign_weights import WeightsFile, load_weights
from fastsitch.networks.head_layers import head_layers
from tests.network_factories import small

SHAPE = (3, 32, 32)

State = dict[str, Tensor]


def state(seed: int, classes: int = 10) -> State:
    """Weights of the network ``small``."""
    torch.manual_seed(seed)
    return small(classes, SHAPE).state_dict()


def prefixed(prefix: str, weights: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


def write(content: Any, path: Path, form: str) -> None:
    """As safetensors, or by ``torch.save``."""
    if form == "safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)


def loaded(path: Path, key: str | None = None, module: nn.Module | None = None, **options: Any) -> tuple[State, Any]:
    """The weights of a network that a file was loaded into, and what a record would keep."""
    module = (small(10, SHAPE) if module is None else module).eval()
    file = WeightsFile(path=path, key=key, **options)
    provenance = load_weights(module, file, lambda: head_layers(module, 10, SHAPE))
    return module.state_dict(), provenance


def assert_equal(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
