"""What a traced network computes at every node when it runs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastsitch.chains.trace import CannotCut, Trace, first_line
from fastsitch.errors import NetworkError


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def run_model(model: nn.Module, x: Tensor) -> Any:
    """What a network returns for some images; raises NetworkError where it does not run on them."""
    try:
        return model(x)
    # a network's own code: it may raise anything
    except Exception as error:
        late = "; import it where the network is built: forward cannot import files beside it"
        raise NetworkError(
            f"cannot cut a {type(model).__name__}: it does not run on images {tuple(x.shape[1:])} "
            f"({type(error).__name__}: {first_line(error)}){late if isinstance(error, ModuleNotFoundError) else ''}"
        ) from error


def run_segment(segment: nn.Module, x: Tensor, name: str) -> Tensor:
    """What a segment makes of the output of the one before.

    Raises NetworkError where it does not run, CannotCut where it gives no tensor that can be a representation.
    """
    expected = "expected each to take the output of the one before, a tensor (B, ...)"
    try:
        y = segment(x)
    except NetworkError:
        raise
    # a network's own code: it may raise anything
    except Exception as error:
        raise NetworkError(
            f"the segments do not fit together ({name}: {type(error).__name__}: {first_line(error)}): {expected}"
        ) from error
    if not isinstance(y, Tensor) or y.is_nested or y.layout != torch.strided:
        kind = "a tensor that is not dense" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise CannotCut(f"the segments do not fit together ({name} returns {kind}): {expected}")
    return y


def node_values(trace: Trace, x: Tensor) -> dict[fx.Node, Any]:
    """What every node of a graph gives for some images: tensors by shape and dtype, everything else as it is."""
    recorder = _Recorder(trace)
    recorder.run(x)
    return recorder.found


class _Recorder(fx.Interpreter):
    def __init__(self, trace: Trace) -> None:
        super().__init__(fx.GraphModule(trace.root, trace.graph))
        self.found: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.found[n] = _described(value)
        return value


def _described(value: Any) -> Any:
    """The same inside tuples and lists, which become tuples."""
    if isinstance(value, Tensor):
        return TensorSpec(tuple(value.shape), value.dtype)
    return tuple(_described(item) for item in value) if isinstance(value, list | tuple) else value
