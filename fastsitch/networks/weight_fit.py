"""Which parts of a checkpoint fit a network: found by the names of tensors behind a prefix, never by guessing."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastsitch.networks.weight_nests import Nest

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What torch.compile and others put into names, wherever a module is wrapped."""

_PROFILER_COUNTERS = ("total_ops", "total_params")
"""Left in state dicts by thop, at every module."""

_BATCH_COUNTER = "num_batches_tracked"
"""Older checkpoints lack it, others have it in half precision; in eval mode it counts for nothing."""


@dataclass(frozen=True)
class Wanted:
    """What a network needs from a file: its state dict, but for the layers that are its ``head``."""

    tensors: Mapping[str, Tensor]
    head: Sequence[str] = ()

    def in_head(self, name: str) -> bool:
        """Whether a weight is one of the head's, or of what a file has in the head's place."""
        return name.startswith(tuple(f"{layer}." for layer in self.head))

    @cached_property
    def needed(self) -> list[str]:
        """Names without which nothing fits."""
        return [name for name in self.tensors if not self.in_head(name) and not name.endswith(_BATCH_COUNTER)]

    @cached_property
    def tied(self) -> dict[str, list[str]]:
        """All names of each tensor that has several, by each of them."""
        by_storage: dict[tuple[int, torch.Size], list[str]] = defaultdict(list)
        for name, tensor in self.tensors.items():
            if tensor.numel():
                by_storage[tensor.data_ptr(), tensor.shape].append(name)
        return {name: names for names in by_storage.values() if len(names) > 1 for name in names}


@dataclass(frozen=True)
class Part:
    """The tensors of a nest whose names begin with a prefix, held against a network.

    ``weights`` are by the network's names, in which the prefix is not; the lists are of what is wrong.
    """

    path: str
    prefix: str
    weights: dict[str, Tensor]
    missing: list[str]
    misshapen: list[str]
    other: list[str]
    unexpected: list[str]
    names: Sequence[str]
    """Of everything in the nest, sorted."""

    @property
    def key(self) -> str:
        """By which a user chooses it."""
        return ".".join(filter(None, (self.path, self.prefix.removesuffix(".")))) or "."

    @property
    def fits(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.missing or self.misshapen or self.other or self.unexpected)

    @property
    def left_out(self) -> list[str]:
        """Names in the nest that do not begin with the prefix."""
        return [name for name in self.names if not name.startswith(self.prefix) and not _is_counter(name)]

    def is_at(self, key: str) -> bool:
        """Whether a key is that of this part."""
        return self.key == (key.rstrip(".") or ".")

    def is_meant_by(self, key: str) -> bool:
        """Whether a key is among the words of this part's."""
        wanted, own = (_without(_WRAPPERS, text) for text in (key.rstrip("."), self.key))
        return self.is_at(key) or (bool(wanted) and f".{wanted}." in f".{own}.")

    def equals(self, other: "Part") -> bool:
        """Whether both give the same network."""
        return self.weights.keys() == other.weights.keys() and all(
            tensor.dtype == other.weights[name].dtype and torch.equal(tensor, other.weights[name])
            for name, tensor in self.weights.items()
        )


def parts(nest: Nest, wanted: Wanted) -> list[Part]:
    """The parts of a nest that have at least half of a network's names, or else the most of them; the best first."""
    members = _by_prefix(nest, wanted)
    most = max(map(len, members.values()), default=0)
    held = {
        prefix: {name: nest.tensors[given] for name, given in found.items()}
        for prefix, found in members.items()
        if len(found) == most or 2 * len(found) >= len(wanted.needed)
    }
    faults = {prefix: _faults(found, wanted) for prefix, found in held.items()}
    complete = {prefix for prefix, wrong in faults.items() if not any(wrong)}
    names = sorted(nest.tensors)
    found_parts = []
    for prefix, (missing, misshapen, other) in faults.items():
        taken = set(members[prefix].values())
        unexpected = [
            name
            for name in _beginning(names, prefix)
            if name not in taken
            and not _is_counter(name)
            and not wanted.in_head(name[len(prefix) :])
            # of another copy of the network, such as an average of it
            and not any(longer in complete for longer in _prefixes(name, len(prefix)))
        ]
        weights = {
            name: tensor
            for name, tensor in held[prefix].items()
            if not wanted.in_head(name) and not (name.endswith(_BATCH_COUNTER) and tensor.is_floating_point())
        }
        found_parts.append(Part(nest.path, prefix, weights, missing, misshapen, other, unexpected, names))
    return sorted(found_parts, key=lambda part: (not part.fits, -len(part.weights)))


def _by_prefix(nest: Nest, wanted: Wanted) -> dict[str, dict[str, str]]:
    """By what stands before it, every name that ends with one of the network's, by that."""
    own_words = {word for name in wanted.tensors for word in name.split(".")}
    wrappers = _WRAPPERS - own_words
    # every word may be wrapped
    at_most = 2 * max((name.count(".") + 1 for name in wanted.tensors), default=1)
    members: dict[str, dict[str, str]] = defaultdict(dict)
    for name in nest.tensors:
        end, start = "", len(name) + 1
        for word in reversed(name.rsplit(".", at_most)[-at_most:]):
            start -= len(word) + 1
            if word in wrappers:
                continue
            if word not in own_words:
                break
            end = f"{word}.{end}" if end else word
            if end in wanted.tensors:
                # a second one is unexpected
                members[name[:start]].setdefault(end, name)
    return members


def _faults(found: Mapping[str, Tensor], wanted: Wanted) -> tuple[list[str], list[str], list[str]]:
    """What is missing, misshapen, and of another kind of numbers, outside the head."""
    missing = [name for name in wanted.needed if not any(tied in found for tied in wanted.tied.get(name, [name]))]
    checked = [
        (name, given, tensor)
        for name, tensor in wanted.tensors.items()
        if (given := found.get(name)) is not None and not wanted.in_head(name)
    ]
    misshapen = [
        f"{name} {tuple(given.shape)} instead of {tuple(tensor.shape)}"
        for name, given, tensor in checked
        if given.shape != tensor.shape
    ]
    other = [
        f"{name} {_kind(given)} instead of {_kind(tensor)}"
        for name, given, tensor in checked
        if _kind(given) != _kind(tensor) and not (name.endswith(_BATCH_COUNTER) and given.is_floating_point())
    ]
    return missing, misshapen, other


def _kind(tensor: Tensor) -> str:
    """Numbers of one kind are converted to the dtype of the network, those of another are not."""
    if tensor.is_meta:
        return "without values"
    if tensor.layout != torch.strided or tensor.is_quantized:
        return "sparse or quantised"
    if tensor.is_complex():
        return "complex"
    if tensor.is_floating_point():
        # with 8 bits they are meant to be multiplied by scales that lie elsewhere
        return "floating-point" if tensor.element_size() > 1 else "quantised to 8 bits"
    return "whole numbers"


def _without(words: Set[str], key: str) -> str:
    return ".".join(word for word in key.split(".") if word not in words)


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] in _PROFILER_COUNTERS


def _prefixes(name: str, longer_than: int) -> Iterator[str]:
    return (name[: place + 1] for place in range(longer_than, len(name)) if name[place] == ".")


def _beginning(ordered: Sequence[str], prefix: str) -> Sequence[str]:
    """Those of a sorted list that begin with a prefix, which ends with a dot."""
    if not prefix:
        return ordered
    return ordered[bisect_left(ordered, prefix) : bisect_left(ordered, f"{prefix[:-1]}/")]
