"""Residual blocks through torch.compile: one graph per block shape serves every receiver and every group.

Weights are arguments, and images come in micro-batches of a fixed number, so that neither the network nor the number
of stitches makes another graph.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch

from fastsitch.chains.trace import first_line
from fastsitch.receivers.frozen_network import FrozenNetwork
from fastsitch.receivers.graph_segment import GraphSegment
from fastsitch.receivers.residual_block import FrozenBlock, MaskedBlock

log = logging.getLogger(__name__)

BACKEND = "inductor"

_MOST_GRAPHS = 64
"""Graphs per function: block shapes times dtypes of everything that one process ever compiles."""


def compile_blocks(network: FrozenNetwork) -> FrozenNetwork:
    """Let torch.compile generate the passes of residual blocks and of graphs; other segments stay as they are."""
    network.micro_batch = micro_batch(network.device)
    for segment in network.segments:
        if isinstance(segment, GraphSegment):
            segment.compile(_compiled_where_possible)
    network.segments = [
        MaskedBlock(segment.weights, network.micro_batch, _compiled)
        if isinstance(segment, FrozenBlock | MaskedBlock)
        else segment
        for segment in network.segments
    ]
    return network


def micro_batch(device: torch.device) -> int:
    """Images per micro-batch: enough to fill a GPU, small enough for a CPU's cache.

    The last one of a batch is computed whole, however few samples are left in it.
    """
    return 1024 if device.type == "cuda" else 256


def _compiled_where_possible(program: Callable[..., Any]) -> Callable[..., Any]:
    """A program of any network, compiled when it first runs; as it is, with a line in the log, where that fails."""
    chosen = _compiled(program)

    def run(*arguments: Any) -> Any:
        nonlocal chosen
        try:
            return chosen(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = first_line(getattr(error, "inner_exception", error))
            log.warning("a graph of the receiver runs without torch.compile: %s", reason)
            chosen = program
            return chosen(*arguments)

    return run


_cache: dict[Callable[..., Any], Callable[..., Any]] = {}


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    if function not in _cache:
        import torch._dynamo

        # beyond its limit dynamo would run the function uncompiled, without a word
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_GRAPHS)
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        _cache[function] = torch.compile(function, fullgraph=True, dynamic=False, backend=BACKEND)
    return _cache[function]
