"""The layers that give a network's class outputs."""

from typing import Any

import torch
from torch import Tensor, nn

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def head_layers(module: nn.Module, classes: int, input_shape: tuple[int, int, int]) -> list[str]:
    """Names of the last linear layer or convolution that runs, if it has one output per class.

    More than one where several of the same shape run last, as in distilled transformers, whose outputs are averaged;
    several names where one layer has them. The module is run once, in eval mode as it comes.
    """
    ran: list[nn.Module] = []

    def note(layer: nn.Module, _: Any, __: Tensor) -> None:
        ran.append(layer)

    hooks = [layer.register_forward_hook(note) for layer in module.modules() if isinstance(layer, _LAYERS)]
    try:
        with torch.no_grad():
            module(torch.zeros(2, *input_shape))
    finally:
        for hook in hooks:
            hook.remove()
    head: list[nn.Module] = []
    for layer in reversed(ran):
        if head and (_shape(layer) != _shape(head[0]) or _shape(layer)[1] == classes):
            break
        head.append(layer)
    if not head or _shape(head[0])[0] != classes:
        return []
    return [name for name, layer in module.named_modules(remove_duplicate=False) if layer in head]


def _shape(layer: nn.Module) -> tuple[int, int]:
    """Outputs, then inputs."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return layer.out_channels, layer.in_channels
