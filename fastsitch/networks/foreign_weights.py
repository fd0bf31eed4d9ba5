"""Weights from files that fastsitch did not write, read without running anything in them."""

import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from torch import Tensor, nn

from fastsitch.errors import NetworkError, argument

_STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict")
"""Where checkpoints of common training scripts keep the weights."""

_LISTED = 6


def read_weights(path: Path) -> dict[str, Tensor]:
    """Named tensors from a safetensors file, or from a state dict that ``torch.save`` wrote.

    The latter is unpickled with ``weights_only=True``, which knows tensors and plain containers alone; the weights may
    lie one level down, under ``state_dict``, ``model`` or ``model_state_dict``. Raises NetworkError.
    """
    if path.exists() and not path.is_file():
        raise NetworkError(f"{argument('weights', path)} is no regular file: expected safetensors, or a state dict")
    try:
        if path.suffix == ".safetensors":
            return parse_safetensors(path.read_bytes())
        with warnings.catch_warnings():
            # what it warns of it also refuses
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise NetworkError(f"cannot read {argument('weights', path)} ({error.strerror or error})") from None
    except _UNREADABLE as error:
        # torch's message advises to unpickle everything
        raise NetworkError(
            f"{argument('weights', path)} holds no weights that can be read safely ({type(error).__name__}): expected "
            "safetensors, or a state dict saved by torch.save; nothing else in a file is ever unpickled"
        ) from None
    for key in _STATE_DICT_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise NetworkError(
            f"{argument('weights', path)} holds a {type(content).__name__}: expected a state dict of nothing but named "
            f"tensors, at the top or under {', '.join(_STATE_DICT_KEYS)}"
        )
    return dict(content)


_UNREADABLE = (
    SafetensorError,
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    MemoryError,
    OverflowError,
    RecursionError,
)
"""What the readers raise for other files: torch takes the letters of a text for the steps of a pickle."""


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], origin: Path) -> None:
    """Put weights into a module; raises NetworkError that lists missing, unexpected and misshapen keys,
    and those of another kind of numbers.

    The counters of BatchNorm, which older checkpoints lack, may be missing.
    """
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in weights and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in weights if key not in wanted]
    misshapen = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in wanted.items()
        if key in weights and weights[key].shape != tensor.shape
    ]
    other = [
        f"{key} {_kind(weights[key])} instead of {_kind(tensor)}"
        for key, tensor in wanted.items()
        if key in weights and _kind(weights[key]) != _kind(tensor)
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen), ("of another kind", other))
    wrong = [f"{kind}: {_listed(keys)}" for kind, keys in kinds if keys]
    if wrong:
        raise NetworkError(f"{argument('weights', origin)} does not fit the network: {'; '.join(wrong)}")
    module.load_state_dict({**wanted, **weights})


def _kind(tensor: Tensor) -> str:
    """Numbers of one kind are converted to the dtype of the network, those of another are not."""
    if tensor.is_meta:
        return "without values"
    if tensor.layout != torch.strided or tensor.is_quantized:
        return "sparse or quantised"
    return "complex" if tensor.is_complex() else "floating-point" if tensor.is_floating_point() else "whole numbers"


def _listed(keys: Sequence[str]) -> str:
    more = len(keys) - _LISTED
    return ", ".join(keys[:_LISTED]) + (f" and {more} more" if more > 0 else "")
