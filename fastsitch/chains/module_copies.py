"""Copies of networks to work with, so that a user's own stay as they are."""

import copy
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastsitch.chains.same_values import same_bits
from fastsitch.chains.trace import first_line
from fastsitch.chains.wrappers import unwrap_inside
from fastsitch.errors import NetworkError, plain


def copy_modules(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Copies that share with each other what the modules share, with in-place activations turned off.

    Tensors that a pass computed and a module kept are copied without their history, which cannot be. Raises
    NetworkError where a module cannot be copied, or its copy has other weights.
    """
    computed: dict[int, Any] = {}
    for module in (child for each in modules for child in each.modules()):
        for tensor in tensors_in(list(module.__dict__.values()), set()):
            if not tensor.is_leaf:
                computed[id(tensor)] = tensor.detach().clone()
    try:
        copied = copy.deepcopy(list(modules), dict(computed))
    # what a network keeps may be of any kind, and have code of its own for this
    except Exception as error:
        raise NetworkError(
            f"cannot copy {_culprit(modules, computed)} ({type(error).__name__}: {first_line(error)}): expected what "
            "copy.deepcopy copies; keep locks, open files and the like outside of the network"
        ) from error
    _require_equal(modules, copied)
    for module in (child for each in copied for child in each.modules()):
        if hasattr(module, "inplace"):
            module.__dict__["inplace"] = False
        unwrap_inside(module)
    return copied


def tensors_in(values: Sequence[Any], seen: set[int]) -> Iterator[Tensor]:
    """Tensors among some values, and inside lists, tuples and dictionaries of them, which may contain themselves."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple | set | dict) and id(value) not in seen:
            seen.add(id(value))
            yield from tensors_in(list(value.values() if isinstance(value, dict) else value), seen)


def _culprit(modules: Sequence[nn.Module], computed: dict[int, Any]) -> str:
    """The attribute that cannot be copied, or the module."""
    for module in modules:
        for path, child in module.named_modules():
            for name, value in child.__dict__.items():
                if name in ("_modules", "_parameters", "_buffers"):
                    continue
                try:
                    copy.deepcopy(value, dict(computed))
                except Exception:
                    where = plain(f"{path}.{name}".removeprefix("."))
                    return f"{where} of a {plain(type(child).__name__)}"
    return f"a {plain(type(modules[0]).__name__)}"


def _require_equal(modules: Sequence[nn.Module], copied: Sequence[Any]) -> None:
    """A class may have a __deepcopy__ of its own."""
    for module, other in zip(modules, copied, strict=True):
        one, two = _kept(module), _kept(other)
        differing = [name for name in one if name not in two or not _alike(one[name], two[name])]
        if differing or one.keys() != two.keys():
            raise NetworkError(
                f"a copy of a {plain(type(module).__name__)} is not equal to it"
                + (f" ({plain(differing[0]) or 'the whole'} differs)" if differing else "")
                + ": expected that copy.deepcopy keeps modules and weights; see its __deepcopy__"
            )


def _kept(module: Any) -> dict[str, nn.Module | Tensor]:
    if not isinstance(module, nn.Module):
        return {}
    return dict(
        chain(
            nn.Module.named_modules(module),
            nn.Module.named_parameters(module),
            nn.Module.named_buffers(module),
        )
    )


def _alike(one: nn.Module | Tensor, other: nn.Module | Tensor) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and same_bits(one, other)
    # every graph has a class of its own, and what TorchScript traced becomes another
    of_a_kind = type(one) is type(other) or isinstance(one, fx.GraphModule | torch.jit.ScriptModule)
    return of_a_kind and one is not other
