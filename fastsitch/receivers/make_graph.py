"""Graphs in the place of segments that run through autograd, once they give the same values and gradients."""

import logging

import torch
from torch import Tensor, fx, nn

from fastsitch.chains.trace import first_line
from fastsitch.receivers.affine_folding import fold_affine
from fastsitch.receivers.attention import traced_attention
from fastsitch.receivers.convolution import accumulation_dtype
from fastsitch.receivers.frozen_graph import FrozenGraph, trace_frozen
from fastsitch.receivers.frozen_segments import AutogradSegment, frozen_copy
from fastsitch.receivers.graph_halves import GraphHalves, halve
from fastsitch.receivers.graph_segment import GraphSegment
from fastsitch.vocabulary import Attention

log = logging.getLogger(__name__)

_VALUES, _GRADIENTS = 1e-3, 1e-2
"""Largest errors, relative and beyond twice those of the module: an element that is close to 0 may pass a ReLU in one
of the two alone."""

_halves: dict[str, GraphHalves] = {}
"""Of all graphs that this process has made."""


def as_graph(
    segment: AutogradSegment, module: nn.Module, x: Tensor, out: Tensor, what: str, attention: Attention
) -> GraphSegment | None:
    """A segment, the frozen form of ``module``, as a graph; None, with a line in the log, where that cannot be.

    ``x`` and ``out`` are some images and their outputs; in the log the segment is called ``what``.
    """
    exact = frozen_copy(module, accumulation_dtype(x.dtype), x.device)
    try:
        with traced_attention(attention):
            graph = trace_frozen(segment.module, exact, x)
        fold_affine(graph)
        # equal blocks, of one network and of several, are one program with other weights
        shape = f"{x.device}\n{_described(graph)}"
        if shape not in _halves:
            _halves[shape] = halve(graph, x.device)
        made = GraphSegment(_halves[shape], graph.values(), x.device)
        _compare(made, segment, exact, x, out)
    # a network's own code: it may raise anything
    except Exception as error:
        log.info("%s runs through autograd, not as a graph: %s", what, first_line(error))
        segment.note_cost(x, out)
        return None
    return made


def _described(frozen: FrozenGraph) -> str:
    """Equal for graphs that differ in the values of their constants alone."""
    numbers = {node: index for index, node in enumerate(frozen.graph.nodes)}
    lines = []
    for node in frozen.graph.nodes:
        arguments = fx.node.map_arg((node.args, dict(node.kwargs)), lambda argument: f"%{numbers[argument]}")
        spec = frozen.specs.get(node)
        layout = (tuple(spec.shape), spec.stride(), spec.dtype) if isinstance(spec, Tensor) else ""
        lines.append(f"{node.op if node.op != 'call_function' else node.target} {arguments} {layout}")
    return "\n".join(lines)


def _compare(made: GraphSegment, segment: AutogradSegment, exact: nn.Module, x: Tensor, out: Tensor) -> None:
    """Raise ValueError where a graph gives other values or gradients than its module does."""
    with torch.enable_grad():
        leaf = x.to(accumulation_dtype(x.dtype)).requires_grad_()
        expected = exact(leaf)
        g = torch.empty_like(out)
        g.copy_((torch.arange(out.numel(), device=x.device) * 0.618034).frac().sub(0.5).view(out.shape))
        (expected_g,) = torch.autograd.grad(expected, leaf, g.to(expected.dtype))
    found = []
    for each in (segment, made):
        y, given, saved = torch.empty_like(out), x.clone(), each.memory(out)
        each.forward(x, y, saved, len(x))
        arriving = torch.where(y > 0, g, 0) if each.rectifies else g
        each.backward(arriving, given, saved, len(x), 0)
        found.append((y, given))
    for what, bound, wanted, own, given in (
        ("values", _VALUES, expected.detach(), found[0][0], found[1][0]),
        ("gradients", _GRADIENTS, expected_g, found[0][1], found[1][1]),
    ):
        error, rounding, size = (float(each.double().norm()) for each in (given - wanted, own - wanted, wanted))
        if not error <= 2 * rounding + bound * size:
            raise ValueError(f"as a graph it gives other {what}: {error / max(size, 1e-300):.1g} of them")
