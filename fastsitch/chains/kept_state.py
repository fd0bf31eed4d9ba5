"""What a network keeps between passes: tensors that are there and whole, and that no pass changes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastsitch.chains.module_copies import copy_modules, tensors_in
from fastsitch.chains.same_values import same_bits, same_values
from fastsitch.chains.trace import first_line
from fastsitch.errors import NetworkError, plain

_SMALL = 3 * 64 * 64
"""Values of an image."""

_RUN_FIRST = "run the network once on a few images beforehand, in its factory or before it is cut"


def require_weights(modules: Sequence[nn.Module], what: str) -> None:
    """Raise NetworkError unless all parameters and buffers of a network are dense tensors that have values."""
    try:
        given = [parameter for module in modules for parameter in module.parameters()]
    # a network's own code: it may raise anything
    except Exception as error:
        raise NetworkError(f"{what}: parameters() raises {type(error).__name__}: {first_line(error)}") from error
    kept = list(_kept(modules))
    for name, tensor in kept:
        fault = _fault(tensor)
        if fault:
            raise NetworkError(f"{what} has {fault.format(name)}")
    # TorchScript makes new objects of the same memory, which may be no parameters
    places = {(tensor.data_ptr(), tensor.shape) if isinstance(tensor, Tensor) else None for tensor in given}
    every, needed = (
        {(tensor.data_ptr(), tensor.shape) for _, tensor in kept if isinstance(tensor, kind)}
        for kind in (Tensor, nn.Parameter)
    )
    if not needed <= places <= every:
        raise NetworkError(f"{what} has parameters that parameters() does not give: expected all, and no others")


def _fault(tensor: Any) -> str:
    if not isinstance(tensor, Tensor):
        return f"a {type(tensor).__name__} in the place of {{}}: expected a tensor"
    if is_lazy(tensor):
        return f"lazy modules without weights yet: {_RUN_FIRST} ({{}})"
    if tensor.is_meta:
        return "weights on the meta device, without values ({}): expected some on the CPU"
    if tensor.layout != torch.strided or tensor.is_quantized:
        return "sparse or quantised weights ({}): expected dense floating-point ones, as by to_dense() or dequantize()"
    if any(size > 1 and not stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        return "weights that share memory among their elements ({}): expected such as expand(...).clone()"
    return ""


def require_saved(module: nn.Module, what: str) -> None:
    """Raise NetworkError unless the state dict of a network holds tensors alone, and can be loaded again."""
    try:
        state = module.state_dict()
        other = next((name for name, value in state.items() if not isinstance(value, Tensor)), None)
        if other is None:
            module.load_state_dict(state)
    # a network's own code: it may raise anything
    except Exception as error:
        raise NetworkError(
            f"{what} cannot be saved and loaded ({type(error).__name__}: {first_line(error)}): expected that "
            "state_dict() gives tensors, and that load_state_dict takes them"
        ) from error
    if other is not None:
        raise NetworkError(
            f"{what} cannot be saved: {plain(other)} of its state_dict() is a {type(state[other]).__name__}; expected "
            "tensors alone, without get_extra_state"
        )


def not_finite(module: nn.Module) -> str:
    """The first of a network's parameters and running statistics that is not finite; empty where there is none."""
    for name, tensor in _kept([module]):
        counts = isinstance(tensor, nn.Parameter) or "running_" in name
        if counts and tensor.is_floating_point() and not tensor.isfinite().all():
            return name
    return ""


@contextmanager
def state_kept(modules: Sequence[nn.Module], what: str, remedy: str = _RUN_FIRST) -> Iterator[None]:
    """Raise NetworkError at the end of the block unless all parameters and buffers are then as before, bit by bit."""
    before = [(name, tensor.detach().clone()) for name, tensor in _steady(modules)]
    yield
    after = [tensor for _, tensor in _steady(modules)]
    changed = next((name for (name, one), two in zip(before, after, strict=False) if not same_bits(one, two)), None)
    if changed is not None or len(after) != len(before):
        raise NetworkError(
            f"{what} changes {changed or 'which weights it has'} when it runs in eval mode, such as one that takes its "
            f"scale from the first images: expected weights and buffers that stay; {remedy}"
        )


def require_no_first_pass(modules: Sequence[nn.Module], example: Tensor, what: str) -> None:
    """Raise NetworkError where what modules, run in turn, make of images depends on whether others came before.

    Runs copies of them, in eval mode, on a few images of the example's shape. Those that do not run are left to others.
    """
    generator = torch.Generator().manual_seed(0)
    # of large images one has to do
    count = 2 if example[0].numel() <= _SMALL else 1
    one, two = (torch.randn((count, *example.shape[1:]), generator=generator).to(example) for _ in range(2))
    used, fresh = copy_modules(modules), copy_modules(modules)
    for module in (*used, *fresh):
        module.eval()
    chance = torch.random.get_rng_state()
    with torch.no_grad():
        try:
            with state_kept(used, what):
                _run(used, one)
            later, first = _run(used, two), _run(fresh, two)
            # where random numbers are drawn, that is said by others
            drawn = not torch.equal(chance, torch.random.get_rng_state())
            if not drawn and not _same(first, later) and _same(later, _run(used, two)):
                raise NetworkError(
                    f"{what} gives images that come first other outputs than later ones, as what a first pass sets is "
                    f"kept for the next: {_RUN_FIRST}"
                )
        except NetworkError:
            raise
        # it does not run on such images: whoever runs it next says so
        except Exception:
            return
        finally:
            torch.random.set_rng_state(chance)


def _steady(modules: Sequence[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """What no pass may change. Statistics of a BatchNorm that trains are another fault: it depends on the batch."""
    kept = _kept(modules, without=nn.modules.batchnorm._BatchNorm)
    # a network without values, of which only shapes are wanted
    return ((name, tensor) for name, tensor in kept if not tensor.is_meta and tensor.layout == torch.strided)


def _kept(modules: Sequence[nn.Module], without: type[nn.Module] | tuple[()] = ()) -> Iterator[tuple[str, Any]]:
    """Parameters and buffers by what messages call them, whatever the modules' own methods say."""
    for module in modules:
        for path, child in nn.Module.named_modules(module):
            if isinstance(child, without):
                continue
            for kept in (child._parameters, child._buffers):
                for name, tensor in kept.items():
                    if tensor is not None:
                        yield plain(f"{path}.{name}".removeprefix(".")) + f" of {type(child).__name__}", tensor


def _run(modules: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    given: Any = x.clone()
    for module in modules:
        given = module(given)
    return [tensor.clone() for tensor in tensors_in([given], set())]


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(same_values(*pair) for pair in zip(one, other, strict=True))
