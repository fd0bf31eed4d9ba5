"""Cheap checks of a chain on a few images, before anything is made of it."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastsitch.chains.trace import CannotCut
from fastsitch.errors import NetworkError

if TYPE_CHECKING:
    from fastsitch.chains.chain import Chain

log = logging.getLogger(__name__)

_FEW, _MANY = 4, 20
"""Images: code may go another way for many."""

_ROUNDING = 1e-3
"""Of the largest value: a deep network in fp32 stays well below it."""

_SMALL = 3 * 64 * 64
"""Values of an image, of which many are run in no time."""

OTHER_OUTPUTS = (
    "gives other outputs for the same images; expected no randomness in eval mode, such as F.dropout without "
    "training=self.training, and nothing that one pass changes for the next"
)
"""What errors say of a network whose two passes differ."""


def vet_chain(chain: "Chain", what: str, *, logits: bool = True) -> None:
    """Check that a chain gives one answer for an image, whatever else is in its batch, and, if so, ends in ``logits``.

    Runs the chain in eval mode on four images, then on three of them in another order; small ones also in a batch of
    twenty. Raises NetworkError, in which the network is called ``what``.
    """
    names = [*(f"at position {position.name}" for position in chain.positions), "in its logits"]
    with torch.no_grad(), _eval_mode(chain):
        images = _different_images(chain, _MANY if math.prod(chain.input_shape) <= _SMALL else _FEW)
        before = torch.random.get_rng_state()
        first = _outputs(chain, images[:_FEW])
        _require_no_chance(before, what)
        # other neighbours, other places, another number of images
        batches = [[0, 3, 2, 1], [3, 0, 1]] + ([list(reversed(range(_MANY)))] if len(images) == _MANY else [])
        for batch in batches:
            other = _outputs(chain, images[batch])
            for index, (name, one, two) in enumerate(zip(names, first, other, strict=True)):
                if len(one) != _FEW or len(two) != len(batch):
                    raise NetworkError(
                        f"{name} {what} gives tensors of {len(one)} for {_FEW} images: expected one row per image"
                    )
                if all(_same_image(one, k, two, batch.index(k)) for k in range(_FEW) if k in batch):
                    continue
                if not same_values(one, _outputs(chain, images[:_FEW])[index]):
                    raise NetworkError(f"{name} {what} {OTHER_OUTPUTS}")
                raise NetworkError(
                    f"{name} {what} gives an image other values beside other images of its batch; expected every image "
                    "by itself in eval mode, such as BatchNorm with track_running_stats=True"
                )
    if logits:
        _require_logits(first[-1], what)


def _require_no_chance(before: Tensor, what: str) -> None:
    """Raise NetworkError where random numbers were drawn since the generator had this state, which it gets again."""
    if not torch.equal(before, torch.random.get_rng_state()):
        torch.random.set_rng_state(before)
        raise NetworkError(f"{what} draws random numbers: it {OTHER_OUTPUTS}")


def _same_image(one: Tensor, place: int, other: Tensor, other_place: int) -> bool:
    """Whether an image has the same values in two batches; sums are rounded otherwise in another place or number."""
    if place == other_place and len(one) == len(other):
        return same_values(one[place], other[place])
    given, found = one[place].double(), other[other_place].double()
    if given.shape != found.shape or not torch.equal(given.isfinite(), found.isfinite()):
        return False
    given, found = given.nan_to_num(0, 0, 0), found.nan_to_num(0, 0, 0)
    return bool((given - found).abs().max() <= _ROUNDING * given.abs().max()) if given.numel() else True


def require_same_values(
    model: nn.Module,
    segments: Sequence[nn.Module],
    head: nn.Module,
    names: Sequence[str],
    x: Tensor,
    after: nn.Module | None = None,
) -> None:
    """Raise NetworkError unless segments and head, which share weights with ``model``, compute what it does.

    The outputs of its modules are compared too, on random images of the shape of ``x``. Weights that are all zero are
    other ones meanwhile: zero times a wrong value would be right. ``after`` is what the model does to the logits.
    """
    x = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def remember(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple | list) and output else output
            if isinstance(tensor, Tensor):
                found.setdefault(name, tensor.clone())

        return remember

    modules = dict(model.named_modules())
    hooks = [modules[name].register_forward_hook(hook(name)) for name in names if name in modules]
    try:
        with torch.no_grad(), _no_zero_weights(model):
            rest = [head] if after is None else [head, after]
            # before the model, whose code may change the modes of modules that both have
            given, outputs = x.clone(), []
            for segment in segments:
                given = segment(given)
                outputs.append(given.clone())
            end = _in_turn(rest, given)
            found.clear()
            before = torch.random.get_rng_state()
            expected = model(x.clone())
            for handle in hooks:
                handle.remove()
            _require_no_chance(before, f"the {type(model).__name__}")
            wrong = next(
                (
                    f"the output of {name}"
                    for name, output in zip(names, outputs, strict=True)
                    if name in found and not _same_up_to_axes(output, found[name])
                ),
                "",
            )
            if not wrong and not same_values(end, expected):
                wrong = "its output"
            elif not wrong and not _same_for_one_image(model, [*segments, *rest], x[:1]):
                wrong = "its output for one image alone"
            if wrong and not same_values(expected, model(x.clone())):
                raise NetworkError(f"the {type(model).__name__} {OTHER_OUTPUTS}")
            if wrong:
                raise CannotCut(f"cannot cut a {type(model).__name__}: its segments do not reproduce {wrong}")
    finally:
        for handle in hooks:
            handle.remove()


def _in_turn(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x.clone())
    return x


def _same_for_one_image(model: nn.Module, modules: Sequence[nn.Module], x: Tensor) -> bool:
    """Code may go another way for one image than for several, which it was traced with."""
    try:
        expected = model(x.clone())
    # a network's own code, which may need several images
    except Exception:
        return True
    try:
        return same_values(_in_turn(modules, x), expected)
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError):
        return False


def _same_up_to_axes(given: Tensor, found: Tensor) -> bool:
    """A segment ends with the images first, also where the network has the tokens first."""
    if given.shape != found.shape and given.dim() > 1 and given.transpose(0, 1).shape == found.shape:
        given = given.transpose(0, 1)
    return same_values(given, found)


@contextmanager
def _no_zero_weights(model: nn.Module) -> Iterator[None]:
    """Parameters that are all zero have random values meanwhile."""
    generator = torch.Generator().manual_seed(0)
    zero = [parameter for parameter in model.parameters() if parameter.is_floating_point() and not parameter.any()]
    try:
        for parameter in zero:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        _drop_caches(model)
        yield
    finally:
        for parameter in zero:
            parameter.zero_()
        _drop_caches(model)


def _drop_caches(model: nn.Module) -> None:
    """Let modules forget what they derive from weights once for all of evaluation: they do when training begins."""
    for module in model.modules():
        if type(module).train is not nn.Module.train:
            training = [each.training for each in module.modules()]
            module.train(True)
            module.train(False)
            for each, before in zip(module.modules(), training, strict=True):
                each.training = before


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal up to rounding; NaN equals NaN."""
    if one.shape != other.shape:
        return False
    one, other = one.double(), other.double()
    largest = one.nan_to_num(0, 0, 0).abs().max().item() if one.numel() else 0.0
    # of values that are all tiny the differences are too
    return torch.allclose(one, other, rtol=1e-3, atol=1e-5 * min(1.0, largest), equal_nan=True)


def require_gradients(chain: "Chain", positions: Sequence[int], what: str) -> None:
    """Raise NetworkError unless the logits have a gradient at each of these positions; warn where it is zero.

    ``what`` names the network in messages.
    """
    without, zero = gradient_faults(chain, positions)
    if without:
        others = [p.name for p in chain.positions if p.index in set(positions) and p.name not in without]
        remedy = f"use only other positions of it ({', '.join(others)})" if others else "use it as a sender only"
        raise NetworkError(
            f"{what} cannot be a receiver at {', '.join(without)}: no gradient of its logits gets there, as behind "
            f".detach() or torch.no_grad(); {remedy}"
        )
    if zero:
        log.warning("%s: the gradient at %s is zero, so that stitches into it cannot learn", what, ", ".join(zero))


def gradient_faults(chain: "Chain", positions: Sequence[int]) -> tuple[list[str], list[str]]:
    """The names of positions at which the logits have no gradient, and of those at which it is zero.

    One backward pass for each, on two images.
    """
    without, zero = [], []
    with _eval_mode(chain):
        with torch.no_grad():
            representations = chain.representations(_different_images(chain, 2))
        for j in positions:
            gradient = _gradient(chain, representations[j], j)
            if gradient is None:
                without.append(chain.positions[j].name)
            elif not gradient.any():
                zero.append(chain.positions[j].name)
    return without, zero


def _gradient(chain: "Chain", representation: Tensor, j: int) -> Tensor | None:
    """Of the logits for position ``j``; None where there is none."""
    with torch.enable_grad():
        leaf = representation.detach().clone().requires_grad_()
        try:
            logits = chain.tail(leaf, j)
            if not logits.requires_grad:
                return None
            # weighted, since the sum of the logits may be constant
            weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype, device=logits.device)
            (gradient,) = torch.autograd.grad((logits * weights.view_as(logits)).sum(), leaf, allow_unused=True)
        except RuntimeError:
            return None
    return gradient


def _require_logits(outputs: Tensor, what: str) -> None:
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


def _outputs(chain: "Chain", x: Tensor) -> list[Tensor]:
    representations = [representation.clone() for representation in chain.representations(x)]
    return [*representations, chain.tail(representations[-1].clone(), len(representations) - 1)]


def _different_images(chain: "Chain", count: int) -> Tensor:
    """So many images (count, C, H, W), always the same, on the chain's device and in its dtype."""
    like = next((parameter for parameter in chain.parameters() if parameter.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    return torch.cat([torch.randn((1, *chain.input_shape), generator=generator) for _ in range(count)]).to(like)


@contextmanager
def _eval_mode(chain: nn.Module) -> Iterator[None]:
    """As all who run it have it: a module may not follow."""
    modes = [(module, module.training) for module in chain.modules()]
    chain.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
