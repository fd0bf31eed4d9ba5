"""Which part of what a network returns are its logits."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from torch import Tensor, fx, nn
from torch.jit import ScriptModule

from fastsitch.errors import NetworkError, argument

NAMES = ("logits", "out")
"""Where logits are looked for first in an output of several parts."""


def logits_key(outputs: Any, what: str, output: str | int | None = None, classes: int | None = None) -> str | None:
    """The name, or the index, of the logits in what a network returns: the one that is asked for, if any.

    None where it returns one tensor. By itself the rule is: ``logits``, then ``out``, then the first tensor (B,
    classes), and where the number of classes is not known or nothing has it, the first tensor of two dimensions.
    Raises NetworkError, which begins with ``what`` and lists what there is.
    """
    parts = _parts(outputs)
    if output is not None:
        if str(output) not in parts:
            raise NetworkError(
                f"{what}: {argument('output', output)}: expected a part of what the network returns, {_listed(outputs)}"
            )
        return str(output)
    if isinstance(outputs, Tensor) and outputs.dim() == 2:
        return None
    flat = {name: part for name, part in parts.items() if isinstance(part, Tensor) and part.dim() == 2}
    first = sorted(flat, key=lambda name: flat[name].shape[1] != classes)
    found = [name for name in NAMES if isinstance(parts.get(name), Tensor)] + first
    if not found:
        raise NetworkError(f"{what}: expected logits (B, classes), found {_listed(outputs)}")
    return found[0]


def output_part(outputs: Any, key: str | None) -> Any:
    """What :func:`logits_key` found in what a network returns."""
    return outputs if key is None else _parts(outputs)[key]


def returning_logits(model: nn.Module, key: str | None) -> nn.Module:
    """The same module, which from now on returns this part of its outputs; names of its weights stay as they are."""
    if key is not None:
        if isinstance(model, ScriptModule):
            raise NetworkError(
                f"a TorchScript network returns more than its logits ({key}): wrap it in a module that does not"
            )
        model.register_forward_hook(partial(_pick, key))
    return model


def _pick(key: str, module: nn.Module, inputs: Any, outputs: Any) -> Any:
    # what a network returns in training may have no such part
    return outputs if isinstance(outputs, Tensor | fx.Proxy) else _parts(outputs).get(key, outputs)


def _parts(outputs: Any) -> dict[str, Any]:
    if isinstance(outputs, Mapping):
        return {str(name): part for name, part in outputs.items()}
    if is_dataclass(outputs) and not isinstance(outputs, type):
        return {field.name: getattr(outputs, field.name) for field in fields(outputs)}
    if isinstance(outputs, tuple | list):
        names = getattr(outputs, "_fields", range(len(outputs)))
        return {str(name): part for name, part in zip(names, outputs, strict=True)}
    return {}


def _listed(outputs: Any) -> str:
    parts = _parts(outputs)
    if not parts:
        return _kind(outputs)
    return f"a {type(outputs).__name__} of " + ", ".join(f"{name} {_kind(part)}" for name, part in parts.items())


def _kind(part: Any) -> str:
    return str(tuple(part.shape)) if isinstance(part, Tensor) else type(part).__name__
