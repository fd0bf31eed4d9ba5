"""Whether a network's code draws its weights anew for every seed, or brings them along."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastsitch.chains.chain import Chain
from fastsitch.chains.module_copies import tensors_in
from fastsitch.chains.same_values import same_values
from fastsitch.chains.vet_chain import different_images, recording
from fastsitch.errors import NetworkError, plain

log = logging.getLogger(__name__)


def draws_weights(name: str, module: nn.Module, other: nn.Module, chain: Chain, cut_other: Callable[[], Chain]) -> bool:
    """Whether most weights of two modules that the same code made with two seeds differ, and what they compute does.

    ``chain`` is that of the first module; ``cut_other`` makes that of the other one. Weights that are all the same,
    such as those of a normalisation, do not count: they are so in every new network. What is kept elsewhere than in
    parameters shows in the outputs at the positions.
    """
    shapes = [[tuple(parameter.shape) for parameter in each.parameters()] for each in (module, other)]
    if shapes[0] != shapes[1]:
        raise NetworkError(f"{name} has other weights whenever it is built: expected always the same modules")
    same, different, equal = _compared(module.named_parameters(), other.parameters())
    kept, drawn, _ = _compared(_tensors(module), (tensor for _, tensor in _tensors(other)))
    fixed, everywhere, same_end = _equal_outputs(module, other, chain, cut_other)
    if same > different or (everywhere and (same_end or kept > drawn)):
        log.warning("%s brings its weights along: it counts as trained, and has no untrained control", name)
        return False
    listed = ", ".join([*equal, *([f"the outputs at {', '.join(fixed)}"] if fixed else [])])
    if listed:
        log.warning("%s: %s do not depend on the seed, nor will they in an untrained control", name, listed)
    return True


@contextmanager
def _quiet_chains() -> Iterator[None]:
    """What there is to say of how a network is cut was said before."""
    logger = logging.getLogger("fastsitch.chains")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _compared(named: Iterable[tuple[str, Tensor]], others: Iterable[Tensor]) -> tuple[int, int, list[str]]:
    """How many values of tensors are equal, how many are in tensors that differ, and the names of those that do not."""
    same, different, names = 0, 0, []
    with torch.no_grad():
        for (path, one), two in zip(named, others, strict=False):
            if one.numel() < 2 or not one.is_floating_point() or (one == one.flatten()[0]).all():
                continue
            if torch.equal(one, two):
                same += one.numel()
                names.append(path)
            else:
                different += one.numel()
    return same, different, names


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers and other tensors that modules keep, in the same order in every network of one code."""
    for path, module in network.named_modules():
        for tensor in tensors_in(list(module.__dict__.values()), set()):
            yield path, tensor


def _equal_outputs(
    one: nn.Module, other: nn.Module, chain: Chain, cut_other: Callable[[], Chain]
) -> tuple[list[str], bool, bool]:
    """The positions at which outputs are equal, whether these are all, and whether the logits are equal too.

    Positions before which there are no weights of any kind do not count.
    """
    x, names = different_images(chain, 1), [position.name for position in chain.positions]
    with torch.no_grad():
        if not isinstance(one, Chain) and set(names) <= dict(one.named_modules()).keys():
            outputs = [_recorded(module, names, x) for module in (one, other)]
        else:
            with _quiet_chains():
                chains = chain, cut_other()
            outputs = [{**dict(zip(names, each.representations(x), strict=True)), "": each(x)} for each in chains]
    equal, counted, weights = [], 0, False
    for name, segment in zip(names, chain.segments, strict=True):
        weights = weights or any(True for _ in _tensors(segment))
        counted += weights
        if weights and name in outputs[0] and same_values(outputs[0][name], outputs[1][name]):
            equal.append(plain(name))
    return equal, len(equal) == counted, same_values(outputs[0][""], outputs[1][""])


def _recorded(module: nn.Module, names: Sequence[str], x: Tensor) -> dict[str, Tensor]:
    """The outputs of modules by their names; that of the network by none."""
    module.eval()
    with recording(module, names) as found:
        (first, *_) = tensors_in([module(x)], set())
    return {**found, "": first}
