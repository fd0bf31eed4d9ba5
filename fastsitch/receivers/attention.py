"""How graphs compute attention: by torch's fused operator, or by two batched products and a softmax."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastsitch.vocabulary import Attention

FUSED_ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)


@contextmanager
def traced_attention(kind: Attention) -> Iterator[None]:
    """What is traced meanwhile computes attention in this way, the products in the dtype of their inputs."""
    if kind == "fused":
        yield
        return
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # type: ignore[no-untyped-call]
    # it is for CPUs as well
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(allowed)


def has_fused_attention(graph: torch.fx.Graph) -> bool:
    """Whether a graph has the fused operator in it."""
    return any(node.target in FUSED_ATTENTION for node in graph.nodes)
