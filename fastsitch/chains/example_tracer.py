"""Tracing along examples: what the example images fix is a constant, what depends on their number stays symbolic.

Every operation is run, while it is recorded, on two batches of different size. A property of a tensor that is the same
in both (a height, a number of dimensions) is given to the network's code as the plain value that it is; one that
differs is the number of images, or follows from it. The values in tensors are never taken as constants.
"""

import builtins
import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

_MAKERS = ("arange", "empty", "eye", "finfo", "full", "iinfo", "linspace", "ones", "tensor", "zeros")
"""What makes tensors out of sizes, types and devices, and so is not recorded by itself."""

_METHODS = ("expand", "new_full", "new_ones", "new_zeros", "repeat", "reshape", "to", "view")
"""Methods of tensors that are constants, which sizes, types and devices may be given to."""

_OF_VALUES = ("allclose", "data_ptr", "equal", "is_nonzero", "item", "numpy", "tolist")
"""What makes something else than a tensor out of the values in one."""


class NotFixed(TypeError):
    """The way of the code depends on what the example images do not fix."""


class ExampleProxy(fx.Proxy):
    """A node that stands for a tensor, or something that the examples do not fix, and what it is in each example."""

    def __init__(self, node: fx.Node, tracer: Any, examples: Sequence[Any], of_values: bool) -> None:
        super().__init__(node, tracer)
        self._examples = tuple(examples)
        self._of_values = of_values

    def __getattr__(self, k: str) -> Any:
        if k.startswith("__") or k in ("_examples", "_of_values"):
            raise AttributeError(k)
        if callable(getattr(self._examples[0], k)):
            return fx.proxy.Attribute(self, k)
        return self.tracer.create_proxy("call_function", builtins.getattr, (self, k), {})

    def __bool__(self) -> bool:
        found = {bool(example) for example in self._examples if not isinstance(example, Tensor)}
        if self._of_values or len(found) != 1:
            of_values = self._of_values or not found
            raise NotFixed(f"its way depends on {'values in a tensor' if of_values else 'the number of images'}")
        return found.pop()

    def __len__(self) -> int:
        lengths = {len(example) for example in self._examples}
        if len(lengths) != 1:
            raise NotFixed("its way depends on the number of images")
        return lengths.pop()

    def __iter__(self) -> Iterator[Any]:
        return iter([operator.getitem(self, index) for index in range(len(self))])

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", set_item, (self, key, value), {})


class Size(tuple[Any, ...]):
    """A tensor's size, of which some numbers are symbolic."""

    def numel(self) -> Any:
        return math.prod(self)

    def __fx_create_arg__(self, tracer: fx.Tracer) -> Any:
        return tracer.create_arg(tuple(self))


def set_item(x: Tensor, key: Any, value: Any) -> Tensor:
    """``x[key] = value``, as a function of x."""
    x[key] = value
    return x


class ExampleTracer(fx.Tracer):
    """A tracer that runs what it records on some examples of the root's one input."""

    def __init__(self, examples: Sequence[Tensor]) -> None:
        super().__init__()
        self._inputs = [example.clone() for example in examples]
        self._running = False

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        with _recording_makers(self):
            return super().trace(root, concrete_args)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return forward(*args, **kwargs) if self._running else self.record_module(m, forward, args, kwargs)

    def record_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Trace the call of a module."""
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        return attr_val if self._running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any | None = None,
        proxy_factory_fn: Any = None,
    ) -> Any:
        given = [proxy for proxy in _proxies((args, kwargs)) if isinstance(proxy, ExampleProxy)]
        tensors = [proxy for proxy in given if isinstance(proxy._examples[0], Tensor)]
        versions = [proxy._examples[0]._version for proxy in tensors]
        examples = [self._run(kind, target, args, kwargs, index) for index in range(len(self._inputs))]
        node = super().create_proxy(kind, target, args, kwargs, name, type_expr).node
        for proxy, version in zip(tensors, versions, strict=True):
            # from here on a tensor that was changed in place is what the change returned
            if proxy._examples[0] is examples[0] and proxy._examples[0]._version != version:
                proxy.node = node
        inherited = any(proxy._of_values for proxy in given)
        source = _Source(
            tensor_of_values=inherited,
            other_of_values=inherited or (bool(tensors) and _reads_values(kind, target)),
            of_symbols=bool(given) and not tensors,
        )
        return self._known(node, examples, source)

    def _run(self, kind: str, target: Any, args: Any, kwargs: Any, index: int) -> Any:
        """The value of a node in one of the examples."""
        if kind == "placeholder":
            return self._inputs[index]

        def example(value: Any) -> Any:
            return value._examples[index] if isinstance(value, ExampleProxy) else value

        args, kwargs = map_aggregate(args, example), map_aggregate(kwargs, example)
        self._running = True
        try:
            if kind == "get_attr":
                return operator.attrgetter(target)(self.root)
            if kind == "call_module":
                return self.root.get_submodule(target)(*args, **kwargs)
            return getattr(args[0], target)(*args[1:], **kwargs) if kind == "call_method" else target(*args, **kwargs)
        finally:
            self._running = False

    def _known(self, node: fx.Node, examples: Sequence[Any], source: "_Source") -> Any:
        """The value of a node where the examples fix it, or what stands for it."""
        first = examples[0]
        if isinstance(first, tuple | list) and all(len(example) == len(first) for example in examples):
            items: list[Any] = []
            for index, values in enumerate(zip(*examples, strict=True)):
                if source.fixes(values):
                    items.append(values[0])
                else:
                    item = self.create_node("call_function", operator.getitem, (node, index), {})
                    items.append(self._known(item, values, source))
            if isinstance(first, torch.Size):
                return Size(items)
            return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
        if source.fixes(examples):
            return first
        of_values = source.tensor_of_values if isinstance(first, Tensor) else source.other_of_values
        return ExampleProxy(node, self, examples, of_values)


@dataclass(frozen=True)
class _Source:
    """What a value was computed from."""

    tensor_of_values: bool
    """Whether, if it is a tensor, its size may follow from the values in others."""
    other_of_values: bool
    """Whether, if it is none, it may follow from the values in tensors."""
    of_symbols: bool
    """Whether it follows from what is symbolic already, and from no tensor."""

    def fixes(self, values: Sequence[Any]) -> bool:
        """Whether the examples fix a value. Types and devices may change with the network's own."""
        first = values[0]
        if first is None:
            return all(value is None for value in values)
        # what is computed from the number of images may be the same by chance, not so the answer to a question
        kinds = (bool, str) if self.of_symbols else (bool, str, int, float)
        return not self.other_of_values and isinstance(first, kinds) and all(value == first for value in values)


def _reads_values(kind: str, target: Any) -> bool:
    """Whether what is computed from a tensor, and is none itself, may depend on the values in it."""
    if kind != "call_function":
        return kind == "call_module" or target in _OF_VALUES
    module = (getattr(target, "__module__", None) or "torch").split(".")[0]
    return target.__name__ in _OF_VALUES or module not in ("torch", "builtins", "operator", "_operator")


def _proxies(value: Any) -> Iterator[fx.Proxy]:
    """All in arguments of a call."""
    if isinstance(value, fx.Proxy):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _proxies(item)
    elif isinstance(value, dict):
        yield from _proxies([*value.values()])
    elif isinstance(value, slice):
        yield from _proxies([value.start, value.stop, value.step])


@contextmanager
def _recording_makers(tracer: fx.Tracer) -> Iterator[None]:
    """Record also what makes tensors out of symbols."""

    def recording(make: Callable[..., Any], kind: str, target: Any) -> Callable[..., Any]:
        @functools.wraps(make, updated=())
        def made(*args: Any, **kwargs: Any) -> Any:
            symbolic = any(True for _ in _proxies((args, kwargs)))
            return tracer.create_proxy(kind, target, args, kwargs) if symbolic else make(*args, **kwargs)

        return made

    # it remembers which methods there are when it is asked first
    torch.overrides.is_tensor_method_or_property(torch.Tensor.add)
    before = {name: getattr(torch, name) for name in _MAKERS}
    own = {name: torch.Tensor.__dict__.get(name) for name in _METHODS}
    for name, make in before.items():
        setattr(torch, name, recording(make, "call_function", make))
    for name in _METHODS:
        setattr(torch.Tensor, name, recording(getattr(torch.Tensor, name), "call_method", name))
    try:
        yield
    finally:
        for name, make in before.items():
            setattr(torch, name, make)
        for name, method in own.items():
            if method is None:
                delattr(torch.Tensor, name)
            else:
                setattr(torch.Tensor, name, method)
