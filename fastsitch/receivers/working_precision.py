"""Whether a network runs in the precision that the work is done in: it was checked in that of its weights."""

from contextlib import redirect_stderr
from io import StringIO

import torch
from torch import Tensor

from fastsitch.chains.chain import Chain
from fastsitch.chains.trace import first_line
from fastsitch.chains.vet_chain import different_images, eval_mode
from fastsitch.errors import NetworkError
from fastsitch.machine import DTYPES
from fastsitch.networks.resnet import SmallResNet
from fastsitch.receivers.contract import Saved
from fastsitch.receivers.frozen_network import FrozenNetwork

_IMAGES = 2


def working_network(
    chain: Chain,
    what: str,
    remedy: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    gradients_to: int | None = None,
) -> FrozenNetwork:
    """The frozen form of a chain, once it has run there on a few images, and back to a position if one is given.

    Raises NetworkError, which calls the network ``what`` and ends with ``remedy``, where an operation of it does not
    work in this precision, or gives values that are not finite and that are in its own.
    """
    where = "when it is copied"
    try:
        frozen = FrozenNetwork(chain, dtype=dtype, device=device)
        if isinstance(chain, SmallResNet) or dtype == torch.float32:
            return frozen
        x = different_images(chain, _IMAGES)
        # a graph that fails prints what it was
        with torch.no_grad(), eval_mode(chain), redirect_stderr(StringIO()):
            expected = chain.representations(x)
            given = x.to(device, dtype).contiguous(memory_format=torch.channels_last)
            passed: list[tuple[Tensor, Tensor, Saved]] = []
            for segment, position, exact in zip(frozen.segments, frozen.positions, expected, strict=True):
                where = f"at position {position.name}"
                out = position.empty(_IMAGES, dtype, device)
                saved = segment.memory(out)
                segment.forward(given, out, saved, _IMAGES)
                _require_finite(out, exact)
                passed.append((given, out, saved))
                given = out
            where = "in its logits"
            logits = frozen.head.forward(given)
            _require_finite(logits, chain(x))
            if gradients_to is not None:
                where = "on the way back from its logits"
                frozen.head.backward(torch.ones_like(logits), given, 0)
                for j in reversed(range(gradients_to + 1, len(passed))):
                    where = f"on the way back from position {frozen.positions[j].name}"
                    x, g, saved = passed[j]
                    frozen.segments[j].backward(g, x, saved, _IMAGES, 0)
    except NetworkError:
        raise
    # a network's own code: it may raise anything
    except Exception as error:
        name = next(name for name, each in DTYPES.items() if each == dtype)
        raise NetworkError(
            f"{what} does not work in {name} {where} ({type(error).__name__}: {first_line(error)}): {remedy}"
        ) from error
    return frozen


def _require_finite(found: Tensor, exact: Tensor) -> None:
    """Raise ValueError where values are not finite that are in the chain's own precision."""
    if (~found.isfinite() & exact.to(found.device).isfinite()).any():
        raise ValueError("values that are not finite")
