"""Frozen affine maps along channels become part of the convolutions and linear maps in front of them."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, fx

from fastsitch.receivers.frozen_graph import FrozenGraph

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_COPIES = (aten.clone.default, aten.detach.default, aten.alias.default)
_NORMS = (aten.native_batch_norm.default, aten._native_batch_norm_legit_no_training.default)


def fold_affine(frozen: FrozenGraph) -> None:
    """Rewrite a graph in place: the same values up to rounding, with fewer operations.

    BatchNorm becomes a multiplication and an addition. A factor or summand that is a constant vector along one axis is
    folded into the convolution or product that computes that axis, where nothing else reads what lies between.
    """
    for node in list(frozen.graph.nodes):
        if node.target in _NORMS:
            _split_norm(frozen, node)
        elif node.target is aten.bmm.default:
            _as_one_product(frozen, node)
    frozen.drop_unused()
    for node in list(frozen.graph.nodes):
        if node.target is aten.mul.Tensor and (found := _vector(frozen, node)) is not None:
            x, vector, axis = found
            if _fold(frozen, x, node, vector, axis, _scaled):
                frozen.replace(node, x)
        elif node.target is aten.add.Tensor and not node.kwargs and (found := _vector(frozen, node)) is not None:
            x, vector, axis = found
            if _fold(frozen, x, node, vector, axis, _shifted):
                frozen.replace(node, x)
    frozen.drop_unused()
    frozen.graph.lint()


def _split_norm(frozen: FrozenGraph, node: fx.Node) -> None:
    """BatchNorm in eval mode as x * scale + shift."""
    x, weight, bias, mean, variance = cast(list[fx.Node], node.args[:5])
    training = node.target is aten.native_batch_norm.default and node.args[5]
    (used,) = node.users if len(node.users) == 1 else (None,)
    constants = [each for each in (weight, bias, mean, variance) if each is not None]
    if training or used is None or used.args[1] != 0 or any(each not in frozen.exact for each in constants):
        return
    scale = torch.rsqrt(frozen.exact[variance] + cast(float, node.args[-1]))
    if weight is not None:
        scale = frozen.exact[weight] * scale
    shift = -frozen.exact[mean] * scale
    if bias is not None:
        shift = frozen.exact[bias] + shift
    spec = frozen.specs[x]
    shape = (-1, *[1] * (spec.dim() - 2))
    factor = frozen.constant(scale.view(shape), spec.dtype)
    summand = frozen.constant(shift.view(shape), spec.dtype)
    product = frozen.call(node, aten.mul.Tensor, x, factor)
    frozen.replace(used, frozen.call(node, aten.add.Tensor, product, summand))


def _as_one_product(frozen: FrozenGraph, node: fx.Node) -> None:
    """A batched product by a constant that is one matrix again and again, as torch computes some linear layers."""
    x, weight = cast(tuple[fx.Node, fx.Node], node.args)
    shape, result = frozen.specs[weight].shape, frozen.fixed_shape(node)
    source = weight
    while source.target in (aten.expand.default, *_VIEWS):
        source = cast(fx.Node, source.args[0])
    if source not in frozen.exact or result.count(-1) > 1:
        return
    value = frozen.exact[source]
    if value.numel() == shape[1:].numel():
        value = value.reshape(1, *shape[1:])
    elif source is not weight or not torch.equal(value, value[:1].expand_as(value)):
        return
    matrix = frozen.constant(value[0].clone(), frozen.specs[weight].dtype)
    flat = frozen.call(node, aten.reshape.default, x, [-1, value.shape[1]])
    product = frozen.call(node, aten.mm.default, flat, matrix)
    frozen.replace(node, frozen.call(node, aten.view.default, product, result))


def _vector(frozen: FrozenGraph, node: fx.Node) -> tuple[fx.Node, Tensor, int] | None:
    """x, a constant vector and its axis in x, of an operation on the two."""
    first, second = node.args
    for x, constant in ((first, second), (second, first)):
        if not isinstance(x, fx.Node) or x in frozen.exact or not isinstance(constant, fx.Node | float | int):
            continue
        shape = frozen.specs[x].shape
        if isinstance(constant, fx.Node):
            if constant not in frozen.exact or tuple(frozen.specs[node].shape) != tuple(shape):
                return None
            value = frozen.exact[constant]
            if not value.is_floating_point():
                return None
            padded = (1,) * (len(shape) - value.dim()) + tuple(value.shape)
            axes = [axis for axis, size in enumerate(padded) if size > 1]
            if len(axes) == 1 and axes[0] > 0:
                return x, value.flatten(), axes[0]
        return None
    return None


def _fold(
    frozen: FrozenGraph,
    node: fx.Node,
    user: fx.Node,
    vector: Tensor,
    axis: int,
    change: Callable[[FrozenGraph, fx.Node, Tensor], bool],
) -> bool:
    """Fold a vector along an axis of a node's value into what computes that axis; False where that cannot be."""
    while True:
        if set(node.users) != {user}:
            return False
        spec = frozen.specs[node]
        user = node
        if node.target in _COPIES:
            pass
        elif node.target is aten.permute.default:
            axis = cast(list[int], node.args[1])[axis] % spec.dim()
        elif node.target is aten.transpose.int:
            one, other = (cast(int, each) % spec.dim() for each in node.args[1:3])
            axis = {one: other, other: one}.get(axis, axis)
        elif node.target in _VIEWS:
            before = frozen.specs[cast(fx.Node, node.args[0])]
            # leading axes are merged or split, the last one stays
            if axis != spec.dim() - 1 or before.shape[-1] != spec.shape[-1]:
                return False
            axis = before.dim() - 1
        elif (node.target is aten.convolution.default and axis == 1 and not node.args[6]) or (
            node.target in (aten.mm.default, aten.addmm.default) and axis == 1
        ):
            return change(frozen, node, vector)
        elif node.target is aten.add.Tensor and change is _scaled and (found := _vector(frozen, node)) is not None:
            x, summand, along = found
            if along != axis or node.kwargs:
                return False
            # the summand is scaled where the factor can go on
            if not _fold(frozen, x, node, vector, axis, change):
                return False
            shape = [1] * spec.dim()
            shape[axis] = -1
            constant = frozen.constant((summand * vector).view(shape), spec.dtype)
            node.args = (x, constant)
            return True
        else:
            return False
        node = cast(fx.Node, node.args[0])


def _scaled(frozen: FrozenGraph, node: fx.Node, factor: Tensor) -> bool:
    """Multiply the output channels of a convolution or product."""
    if node.target is aten.convolution.default:
        x, weight, bias, *rest = node.args
        columns = (-1, *[1] * (frozen.specs[cast(fx.Node, weight)].dim() - 1))
    elif node.target is aten.addmm.default:
        if node.kwargs:
            return False
        bias, x, weight = node.args
        rest, columns = [], (1, -1)
    else:
        (x, weight), bias, rest, columns = node.args, None, [], (1, -1)
    if weight not in frozen.exact or (bias is not None and bias not in frozen.exact):
        return False
    weight, bias = cast(fx.Node, weight), cast(fx.Node | None, bias)
    new = frozen.constant(frozen.exact[weight] * factor.view(columns), frozen.specs[weight].dtype)
    if bias is not None:
        bias = frozen.constant(frozen.exact[bias] * factor, frozen.specs[bias].dtype)
    if node.target is aten.convolution.default:
        node.args = (x, new, bias, *rest)
    else:
        node.args = (x, new) if bias is None else (bias, x, new)
    return True


def _shifted(frozen: FrozenGraph, node: fx.Node, summand: Tensor) -> bool:
    """Add to the bias of a convolution or product."""
    if node.target is aten.convolution.default:
        x, weight, bias, *rest = node.args
        if bias is not None and bias not in frozen.exact:
            return False
        value = summand if bias is None else frozen.exact[cast(fx.Node, bias)] + summand
        node.args = (x, weight, frozen.constant(value, frozen.specs[node].dtype), *rest)
    elif node.target is aten.addmm.default:
        bias, x, weight = node.args
        if node.kwargs or bias not in frozen.exact:
            return False
        value = frozen.exact[cast(fx.Node, bias)] + summand
        node.args = (frozen.constant(value, frozen.specs[node].dtype), x, weight)
    else:
        node.target = aten.addmm.default
        node.args = (frozen.constant(summand, frozen.specs[node].dtype), *node.args)
    return True
