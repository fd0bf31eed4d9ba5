"""How many floating-point operations a network takes, as torch counts them."""

import torch

from fastsitch.chains.chain import Chain


def chain_flops(chain: Chain) -> tuple[float, ...]:
    """Forward FLOPs per image of every segment and, last, of the head.

    A multiplication and an addition count as two, in convolutions and matrix products alone. One image passes the
    chain on the device that it is on; on the meta device nothing is computed. Gradients stay enabled, because the fused
    forms of attention that run without them are not counted.
    """
    # it imports Triton, which nothing does before it is needed
    from torch.utils.flop_counter import FlopCounterMode

    x = next(chain.parameters(), torch.empty(0)).new_zeros(1, *chain.input_shape)
    counts = []
    for module in (*chain.segments, chain.head):
        with FlopCounterMode(display=False) as counter:
            x = module(x)
        counts.append(float(counter.get_total_flops()))
    return tuple(counts)
