"""Networks without what others put around them to run them: several devices, or a compiler."""

import logging
import sys

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

log = logging.getLogger(__name__)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel or torch.compile; one log line says so."""
    names = []
    while (inner := _inner(model)) is not None:
        names.append(type(model).__name__)
        model = inner
    if names:
        log.info("%s is taken out of %s", type(model).__name__, ", ".join(names))
    return model


def unwrap_inside(model: nn.Module) -> None:
    """Do the same with all modules inside a network, in place: names lose the part of the wrapper."""
    for name, child in list(model.named_children()):
        inner = unwrapped(child)
        if inner is not child:
            setattr(model, name, inner)
        unwrap_inside(inner)


def _inner(model: nn.Module) -> nn.Module | None:
    if isinstance(model, DataParallel | DistributedDataParallel):
        return model.module  # type: ignore[no-any-return]
    # without it nothing has been compiled, and importing it takes seconds
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        return model._orig_mod  # type: ignore[no-any-return]
    return None
