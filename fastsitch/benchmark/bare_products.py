"""What remains if all else takes no time: the receiver's frozen products alone, forward and gradient of activations.

They run on whole batches. That is no strict bound: in micro-batches, which stay in the cache, some are faster.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fastsitch.benchmark.timing_rounds import recorded
from fastsitch.chains.chain import Chain
from fastsitch.errors import FailedError, plain
from fastsitch.receivers.frozen_segments import frozen_copy

_ATEN = torch.ops.aten
_META = torch.device("meta")


@dataclass(frozen=True)
class Product:
    """A convolution, a matrix product, or the gradient of a convolution's input: an operator and what it takes.

    Tensors are on the meta device: their shapes and strides alone count.
    """

    operator: Any
    arguments: tuple[Any, ...]
    weights: frozenset[int]
    """Which of the arguments are weights, and have memory of their own."""
    flops: int

    @property
    def tensors(self) -> list[tuple[int, Tensor]]:
        """The arguments that are tensors, and which they are."""
        return [(k, argument) for k, argument in enumerate(self.arguments) if isinstance(argument, Tensor)]

    def bind(self, pool: Callable[[int, Tensor], Tensor]) -> Callable[[], object]:
        """The product on random data: that of argument k is ``pool(k, like)``, of a weight a copy of it."""
        arguments = list(self.arguments)
        for k, argument in self.tensors:
            x = pool(k, argument)
            arguments[k] = x.clone(memory_format=torch.preserve_format) if k in self.weights else x
        return lambda: self.operator(*arguments)


class BareProducts:
    """The products of every segment of a cascade with ``counts[j]`` stitches into position j, on its shapes.

    Those of the plain network: convolutions, linear maps, and the two products of attention, without bias, on random
    data, maps channels-last; nothing is normalised, added, activated or kept. The last part is the head.
    """

    def __init__(
        self,
        chain: Chain,
        counts: Sequence[int],
        images: int,
        dtype: torch.dtype,
        device: torch.device,
        pools: dict[int, Tensor] | None = None,
    ) -> None:
        """``pools`` holds random data, which objects that are given the same dictionary share."""
        self.names = [*(position.name for position in chain.positions[1:]), "head"]
        self.samples = [count * images for count in itertools.accumulate(counts)]
        products = products_of(chain, dtype)
        parts = [products(k, samples) if samples else ([], []) for k, samples in enumerate(self.samples)]
        self.flops = [sum(product.flops for product in forward) for forward, _ in parts]
        """Of every part, forward."""
        self.gradient_flops = [sum(product.flops for product in backward) for _, backward in parts]
        pools = {} if pools is None else pools
        largest: dict[int, int] = {}
        for forward, backward in parts:
            for product in (*forward, *backward):
                for k, argument in product.tensors:
                    largest[k] = max(largest.get(k, 0), _extent(argument))
        for k, size in largest.items():
            if k not in pools or len(pools[k]) < size:
                pools[k] = torch.randn(size, device=device).to(dtype)

        def pool(k: int, like: Tensor) -> Tensor:
            return pools[k].as_strided(like.size(), like.stride())

        self._forward = [[product.bind(pool) for product in forward] for forward, _ in parts]
        self._backward = [[product.bind(pool) for product in backward] for _, backward in parts]

    @property
    def total_flops(self) -> int:
        """Of one run."""
        return sum(self.flops) + sum(self.gradient_flops)

    def run(self) -> None:
        """All parts forward, then all backward."""
        for k in range(len(self.samples)):
            self.forward(k)
        for k in reversed(range(len(self.samples))):
            self.backward(k)

    def forward(self, k: int) -> None:
        """The products of the k-th part."""
        for product in self._forward[k]:
            product()

    def backward(self, k: int) -> None:
        """Those of the gradient of its input."""
        for product in self._backward[k]:
            product()


class BareGroups:
    """The bare products of several groups, one group after the other; groups of the same shapes share data."""

    def __init__(
        self,
        chain: Chain,
        counts: Sequence[list[int]],
        images: int,
        dtype: torch.dtype,
        device: torch.device,
        pools: dict[int, Tensor],
    ) -> None:
        # the largest first: the others then share its data
        distinct = sorted({tuple(group) for group in counts}, key=sum, reverse=True)
        bare = {group: BareProducts(chain, group, images, dtype, device, pools) for group in distinct}
        with torch.no_grad():
            runs = {group: recorded(products.run, device) for group, products in bare.items()}
        self._groups = [runs[tuple(group)] for group in counts]
        self.flops = sum(bare[tuple(group)].total_flops for group in counts)
        """Of one step of all groups."""

    @torch.no_grad()
    def run(self, steps: int) -> None:
        """So many steps of the first group, then of the next."""
        for run_group in self._groups:
            for _ in range(steps):
                run_group()


Products = tuple[list[Product], list[Product]]
"""Forward, and of the gradient of the input."""


def products_of(chain: Chain, dtype: torch.dtype) -> Callable[[int, int], Products]:
    """The products of the k-th part behind position 0 of a chain, the head last, for so many samples.

    They are those that autograd runs on the meta device, with weights that need no gradients.
    """
    frozen = frozen_copy(chain, dtype, _META)
    nn.Module.to(frozen, memory_format=torch.channels_last)
    assert isinstance(frozen, Chain)
    parts = [*frozen.segments[1:], frozen.head]

    def products(k: int, samples: int) -> Products:
        leaf = frozen.positions[k].empty(samples, dtype, _META).requires_grad_()
        forward, backward = _Recorder(), _Recorder()
        try:
            # its two products; the other forms of attention are one operator each
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                with forward:
                    y = parts[k](leaf)
                with backward:
                    torch.autograd.grad(y, leaf, torch.empty_like(y))
        except Exception as error:  # whatever a network raises
            name = [*(position.name for position in frozen.positions[1:]), "the head"][k]
            raise FailedError(
                f"what leads to {name} cannot run on torch's meta device ({plain(str(error))}), which counts the "
                "receiver's products: expected a network that asks for shapes alone, not for values; bench cannot "
                "measure this one"
            ) from error
        return forward.products, backward.products

    return products


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the products among the operators that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: list[Product] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        found = _as_product(func, args, out)
        if found is not None:
            self.products.append(found)
        return out


def _as_product(func: Any, args: tuple[Any, ...], out: Any) -> Product | None:
    """The product that an operator is, without its bias; None for any other operator."""
    # imports Triton
    from torch.utils.flop_counter import flop_registry

    if func is _ATEN.convolution.default:
        chosen, arguments, weights = func, (*args[:2], None, *args[3:]), {1}
    elif func is _ATEN.convolution_backward.default:
        chosen, arguments, weights = func, (*args[:3], None, *args[4:10], [True, False, False]), {2}
    elif func in (_ATEN.addmm.default, _ATEN.baddbmm.default):
        chosen = _ATEN.mm.default if func is _ATEN.addmm.default else _ATEN.bmm.default
        arguments, weights = tuple(args[1:3]), {1} if chosen is _ATEN.mm.default else set()
    elif func in (_ATEN.mm.default, _ATEN.bmm.default):
        chosen, arguments, weights = func, args, {1} if func is _ATEN.mm.default else set()
    else:
        return None
    arguments = tree_map_only(Tensor, lambda tensor: tensor.detach(), arguments)
    flops = int(flop_registry[chosen.overloadpacket](*arguments, out_val=out))
    return Product(chosen, arguments, frozenset(weights), flops)


def _extent(x: Tensor) -> int:
    """How many values in a row hold a tensor of such a size and strides."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.size(), x.stride(), strict=True))
