"""What a network ends in: logits, or what was made of them."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from fastsitch.chains.same_values import same_values
from fastsitch.chains.trace import operation
from fastsitch.errors import NetworkError

if TYPE_CHECKING:
    from fastsitch.chains.chain import Chain

log = logging.getLogger(__name__)

_BOUNDED = ("tanh", "hardtanh", "softsign", "sigmoid", "hardsigmoid", "relu6", "clamp", "clip", "sin", "cos")

_PASSED = (
    *("add", "sub", "rsub", "mul", "div", "truediv", "neg", "to", "float", "type_as", "clone", "contiguous", "squeeze"),
    *("view", "reshape", "flatten", "identity", "dropout", "unsqueeze", "_to_copy", "alias"),
)
"""Arithmetic with constants, and what changes no values: behind them bounds are bounds still."""


def check_logits(chain: "Chain", outputs: Tensor, what: str) -> None:
    """Raise NetworkError where the outputs (B, classes) of a chain are a form of probabilities, or of length 1.

    Other outputs that have bounds may be meant as logits, as softly capped ones: they are taken for them, with a line.
    """
    if outputs.dim() != 2 or outputs.shape[1] < 2 or not outputs.isfinite().all():
        return
    for form, values in (("-log_softmax", (-outputs).exp()), ("log10 of a softmax", 10**outputs)):
        # a log_softmax itself has the cross-entropy of its logits
        if outputs.shape[1] > 2 and _sums_to_one(values):
            raise NetworkError(f"{what} ends in {form}: expected logits; leave out what is behind them")
    sums = outputs.sum(1)
    varied = (outputs >= 0).all() and not same_values(outputs[:1], outputs[1:2])
    if varied and not _sums_to_one(outputs) and same_values(sums, sums[:1].expand_as(sums)):
        raise NetworkError(
            f"{what} ends in outputs that sum to {sums[0]:.4g} for every image, as a scaled softmax: expected logits; "
            "leave out what is behind them"
        )
    lengths = outputs.norm(dim=1)
    if not same_values(outputs[:1], outputs[1:2]) and same_values(lengths, torch.ones_like(lengths)):
        raise NetworkError(
            f"{what} ends in outputs of length 1 for every image, as behind F.normalize: expected logits; leave out "
            "what is behind them"
        )
    end = _bounded_end([*chain.segments, chain.head])
    if end:
        log.warning("%s ends in %s: its outputs have bounds, and are taken for logits as they are", what, end)
        return
    if outputs.min() < 0 or outputs.max() > 1 or (outputs == outputs[:1, :1]).all():
        return
    if same_values(outputs.sum(1), torch.ones_like(outputs[:, 0])):
        raise NetworkError(
            f"{what} ends in probabilities, which sum to 1: expected logits; leave out the softmax at its end"
        )
    log.warning("%s: all outputs lie between 0 and 1, as behind a sigmoid; they are taken for logits", what)


def _sums_to_one(outputs: Tensor) -> bool:
    sums = outputs.sum(1)
    return same_values(sums, torch.ones_like(sums))


def _bounded_end(modules: Sequence[nn.Module]) -> str:
    """The last operations of a network, such as ``tanh, mul``, if the first of them has bounds; else empty."""
    passed: list[str] = []
    for module in reversed(modules):
        try:
            graph = module.graph if isinstance(module, fx.GraphModule) else fx.Tracer().trace(module)
        # its code runs here, on symbols: it may raise anything
        except Exception:
            return ""
        (end,) = graph.find_nodes(op="output")
        node = end.args[0]
        while isinstance(node, fx.Node) and node.op != "placeholder":
            called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
            passed.insert(0, operation(node) if called is None else type(called).__name__.lower())
            if passed[0] in _BOUNDED:
                return ", ".join(passed)
            inputs = [each for each in node.all_input_nodes if each.op != "get_attr"]
            if passed[0] not in _PASSED or len(inputs) != 1:
                return ""
            node = inputs[0]
    return ""
