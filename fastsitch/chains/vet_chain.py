"""Cheap checks of a chain on a few images, before anything is made of it."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastsitch.chains.end_of_network import check_logits
from fastsitch.chains.kept_state import require_weights
from fastsitch.chains.same_values import same_values
from fastsitch.chains.trace import CannotCut, first_line
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
    require_weights([chain], what)
    with torch.no_grad(), eval_mode(chain), redirect_stderr(StringIO()):
        images = different_images(chain, _MANY if math.prod(chain.input_shape) <= _SMALL else _FEW)
        before = torch.random.get_rng_state()
        first = _outputs(chain, images[:_FEW], what)
        _require_no_chance(before, what)
        # other neighbours, other places, another number of images
        batches = [[0, 3, 2, 1], [3, 0, 1]] + ([list(reversed(range(_MANY)))] if len(images) == _MANY else [])
        for batch in batches:
            other = _outputs(chain, images[batch], what)
            for index, (name, one, two) in enumerate(zip(names, first, other, strict=True)):
                if len(one) != _FEW or len(two) != len(batch):
                    raise NetworkError(
                        f"{name} {what} gives tensors of {len(one)} for {_FEW} images: expected one row per image"
                    )
                if all(_same_image(one, k, two, batch.index(k)) for k in range(_FEW) if k in batch):
                    continue
                if not same_values(one, _outputs(chain, images[:_FEW], what)[index]):
                    raise NetworkError(f"{name} {what} {OTHER_OUTPUTS}")
                raise NetworkError(
                    f"{name} {what} gives an image other values beside other images of its batch; expected every image "
                    "by itself in eval mode, such as BatchNorm with track_running_stats=True"
                )
    if logits:
        check_logits(chain, first[-1], what)


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
    with torch.no_grad(), _no_zero_weights(model):
        rest = [head] if after is None else [head, after]
        # before the model, whose code may change the modes of modules that both have
        given, outputs = x.clone(), []
        for segment in segments:
            given = segment(given)
            outputs.append(given.clone())
        end = _in_turn(rest, given)
        before = torch.random.get_rng_state()
        with recording(model, names) as found:
            expected = model(x.clone())
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


@contextmanager
def recording(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The first output, of several the first tensor, of each of these modules that runs inside the block."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def remember(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple | list) and output else output
            if isinstance(tensor, Tensor):
                found.setdefault(name, tensor.clone())

        return remember

    # those of TorchScript take no hooks
    modules = {name: each for name, each in model.named_modules() if not isinstance(each, torch.jit.ScriptModule)}
    hooks = [modules[name].register_forward_hook(hook(name)) for name in names if name in modules]
    try:
        yield found
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
        # a graph that fails prints what it was
        with redirect_stderr(StringIO()):
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

    One pass on two images and back, segment by segment: all that is before a position goes through it.
    """
    passed: list[tuple[Tensor, Tensor]] = []
    with eval_mode(chain):
        with torch.no_grad():
            x = chain.segments[0](different_images(chain, 2))
        for module in (*list(chain.segments)[1:], chain.head):
            # a position, as if all before it were the sender
            x = x.detach().clone().requires_grad_()
            with torch.enable_grad():
                y = module(x)
            passed.append((x, y))
            x = y
    gradients: dict[int, Tensor | None] = {}
    # weighted, since the sum of the logits may be constant
    gradient: Tensor | None = torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).view_as(x)
    for j, (given, output) in reversed(list(enumerate(passed))):
        gradient = None if gradient is None else _gradient(given, output, gradient)
        gradients[j] = gradient
    names = [position.name for position in chain.positions]
    without = [names[j] for j in positions if gradients[j] is None]
    return without, [names[j] for j in positions if (found := gradients[j]) is not None and not found.any()]


def _gradient(x: Tensor, output: Tensor, of_output: Tensor) -> Tensor | None:
    """At ``x``, given that at what was made of it; None where there is none."""
    try:
        return torch.autograd.grad(output, x, of_output, allow_unused=True)[0] if output.requires_grad else None
    # an operation without a way back
    except RuntimeError:
        return None


def _outputs(chain: "Chain", x: Tensor, what: str) -> list[Tensor]:
    try:
        representations = [representation.clone() for representation in chain.representations(x)]
        return [*representations, chain.tail(representations[-1].clone(), len(representations) - 1).clone()]
    # its own code: it may raise anything
    except Exception as error:
        raise NetworkError(
            f"{what} does not run on {len(x)} images ({type(error).__name__}: {first_line(error)}): expected any number"
        ) from error


def different_images(chain: "Chain", count: int) -> Tensor:
    """So many images (count, C, H, W), always the same, on the chain's device and in its dtype."""
    like = next((parameter for parameter in chain.parameters() if parameter.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    return torch.cat([torch.randn((1, *chain.input_shape), generator=generator) for _ in range(count)]).to(like)


@contextmanager
def eval_mode(chain: nn.Module) -> Iterator[None]:
    """As all who run it have it: a module may not follow."""
    modes = [(module, module.training) for module in chain.modules()]
    chain.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
