"""Tracing a network by torch.export, where its code decides more than torch.fx can follow."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg

from fastsitch.chains.trace import MODEL, CannotCut, OneInput, Trace, first_line, name_in_network, operation

_WITHOUT_EFFECT = ("_assert", "sym_constrain")
"""How operations begin that only check."""


def export_module(model: nn.Module, example: Tensor) -> Trace:
    """The graph that torch.export makes of a network in eval mode, for any number of images.

    Weights stay those of the network, under their names. Types and devices in it become those of its input. Raises
    CannotCut, with the reason in one line.
    """
    root = OneInput(model)
    images = {0: torch.export.Dim.DYNAMIC}
    with _quiet():
        try:
            exported = torch.export.export(root, (example.clone(),), dynamic_shapes=(images,))
            return _Rebuilt(root, exported, example).trace()
        # the network's code runs here, on symbols: it may raise anything
        except Exception as error:
            raise CannotCut(f"torch.export: {type(error).__name__}: {first_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter has to say on the way: its error is the answer."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        # it prints what it has of a graph
        with warnings.catch_warnings(), redirect_stderr(StringIO()), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


class _Rebuilt:
    """The exported graph, with the network's own parameters and buffers in the place of inputs."""

    def __init__(self, root: OneInput, exported: torch.export.ExportedProgram, example: Tensor) -> None:
        self.root = root
        self.exported = exported
        self.example = example
        self.graph = fx.Graph()
        self.made: dict[fx.Node, fx.Node] = {}
        self.calls: dict[fx.Node, list[str]] = {}
        """The calls of modules that a node lies in, outermost first, as PATH@NUMBER."""

    def trace(self) -> Trace:
        specs = {spec.arg.name: spec for spec in self.exported.graph_signature.input_specs}
        (output,) = self.exported.graph_signature.user_outputs
        placeholder = self.graph.placeholder("x")
        last = None
        for node in self.exported.graph.nodes:
            if node.op == "placeholder":
                self.made[node] = self._input(specs[node.name], placeholder)
            elif node.op == "get_attr":
                setattr(self.root, str(node.target), getattr(self.exported.graph_module, str(node.target)))
                self.made[node] = self.graph.get_attr(str(node.target))
            elif node.op == "call_function" and not operation(node).startswith(_WITHOUT_EFFECT):
                self._copy(node, placeholder)
            if node.name == output:
                last = self.made[node]
        self.graph.output(last)
        owners = {node: _path(calls[-1]) if calls else "" for node, calls in self.calls.items()}
        for node in self.graph.nodes:
            owners.setdefault(node, "")
        callers: dict[str, set[str]] = {}
        for calls in self.calls.values():
            for index, call in enumerate(calls):
                callers.setdefault(_path(call), set()).update(map(_path, calls[:index]))
        return Trace(self.root, self.graph, self._outputs(), set(), owners, callers, exported=True)

    def _input(self, spec: Any, placeholder: fx.Node) -> fx.Node:
        kind = torch.export.graph_signature.InputKind
        if spec.kind == kind.USER_INPUT:
            return placeholder
        if spec.kind in (kind.PARAMETER, kind.BUFFER):
            return self.graph.get_attr(spec.target)
        name = f"_exported_{spec.arg.name}"
        setattr(self.root, name, self.exported.constants[spec.target])
        return self.graph.get_attr(name)

    def _copy(self, node: fx.Node, placeholder: fx.Node) -> None:
        def own(value: Any) -> Any:
            if isinstance(value, torch.device) and value == self.example.device:
                return self.graph.call_function(getattr, (placeholder, "device"))
            if isinstance(value, torch.dtype) and value == self.example.dtype:
                return self.graph.call_function(getattr, (placeholder, "dtype"))
            return value

        arguments, named = map_arg((node.args, node.kwargs), lambda argument: self.made[argument])
        arguments, named = map_aggregate(arguments, own), map_aggregate(named, own)
        self.made[node] = made = self.graph.create_node("call_function", node.target, arguments, named, operation(node))
        # key: one call of a module; value: its path, and its class
        stack = node.meta.get("nn_module_stack") or {}
        self.calls[made] = [
            f"{name_in_network(path)}@{key}" for key, (path, _) in stack.items() if path.startswith(MODEL)
        ]

    def _outputs(self) -> dict[fx.Node, list[str]]:
        """The modules of which a node is all that is used outside, innermost first."""
        used: dict[str, list[fx.Node]] = {}
        for node, calls in self.calls.items():
            for call in calls:
                if any(call not in self.calls.get(user, ()) for user in node.users):
                    used.setdefault(call, []).append(node)
        outputs: dict[fx.Node, list[str]] = {}
        for call, nodes in used.items():
            if len(nodes) == 1:
                outputs.setdefault(nodes[0], []).append(_path(call))
        return {node: sorted(paths, key=lambda path: -path.count(".")) for node, paths in outputs.items()}


def _path(call: str) -> str:
    return call.partition("@")[0]
