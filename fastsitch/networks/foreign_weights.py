"""Weights from files that fastsitch did not write, read without running anything in them, and put into a network."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fastsitch.errors import NetworkError, argument, plain
from fastsitch.networks.put_weights import put_weights
from fastsitch.networks.weight_files import read_checkpoint
from fastsitch.networks.weight_fit import Part, Wanted, parts
from fastsitch.networks.weight_nests import Nest, find_nests
from fastsitch.vocabulary import HeadChoice

log = logging.getLogger(__name__)

_LISTED = 6


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """Where the weights of a network lie, and which of them are meant."""

    path: Path
    """A file, an index of shards, or a folder with one of them."""
    key: str | None = None
    """Which of several weights: the keys that lead to them, and a prefix of names, joined by dots; "." is the top."""
    head: HeadChoice | None = None
    """What stands in the place of the layer of the class outputs; None: that of the file."""


def read_weights(path: Path) -> list[Nest]:
    """All named tensors in a file, a folder or the shards of an index, by where in it they lie.

    Files are safetensors, or what ``torch.save`` wrote, which is unpickled with ``weights_only=True``: that knows
    tensors and plain containers alone. Raises NetworkError.
    """
    return find_nests(read_checkpoint(path), path)


def load_weights(module: nn.Module, file: WeightsFile, find_head: Callable[[], list[str]]) -> dict[str, str]:
    """Put weights from a file into a module; ``find_head`` names its layers that give the class outputs.

    Returns what a record keeps of where they come from, beyond the name of the file: where they lie in it
    (``weights_key``, ``weights_prefix``) unless that is its top, and a ``head`` that does not come from it.

    Raises NetworkError when no part of the file fits, which lists missing, unexpected and misshapen keys and those of
    another kind of numbers, and when several do, which lists them.
    """
    nests = read_weights(file.path)
    head = find_head() if file.head is not None else []
    wanted = Wanted(module.state_dict(), head)
    if file.head == "new" and not (head and wanted.needed):
        raise NetworkError(
            f"{argument('head', 'new')}: the network has no linear layer or convolution, one output per class, that "
            f"runs last, behind others with weights: leave it out, and give {argument('weights')} that fit"
        )
    if file.head is not None and (other := _head_in_file(nests, wanted, file)):
        log.info("the head in the file (%s) is left out", other)
        wanted = Wanted(wanted.tensors, [*head, other])
    meant = _meant(nests, wanted, file)
    fitting = [part for part in meant if part.fits]
    if not fitting:
        if file.head is None:
            _require_no_other_head(nests, Wanted(wanted.tensors, find_head()), file)
        raise NetworkError(f"{_shown(meant[0], file)} does not fit the network: {_faults(meant[0])}")
    part = _only(fitting, file)
    for names in wanted.tied.values():
        given = [part.weights[name].to(wanted.tensors[name].dtype) for name in names if name in part.weights]
        if not all(torch.equal(given[0], other) for other in given[1:]):
            raise NetworkError(
                f"{_shown(part, file)} has different values for {', '.join(names)}, which are one tensor in the network"
            )
    put_weights(module, {**wanted.tensors, **part.weights})
    _report(part, file, head)
    provenance = {"weights_key": part.path, "weights_prefix": part.prefix, "head": file.head}
    return {name: text for name, text in provenance.items() if text}


def _head_in_file(nests: Sequence[Nest], wanted: Wanted, file: WeightsFile) -> str:
    """The one module of all weights that do not fit, of which the network has none; empty where there is no such.

    Nor is there where some weights fit, or where the file has a head of the network's own name too.
    """
    meant = _meant(nests, wanted, file)
    if any(part.fits for part in meant):
        return ""
    for part in meant:
        words = {name[len(part.prefix) :].partition(".")[0] for name in part.unexpected}
        own = any(wanted.in_head(name[len(part.prefix) :]) for name in part.names if name.startswith(part.prefix))
        if len(words) == 1 and not (own or part.missing or part.misshapen or part.other):
            (word,) = words
            if not any(name.startswith(f"{word}.") for name in wanted.tensors):
                return word
    return ""


def _meant(nests: Sequence[Nest], wanted: Wanted, file: WeightsFile) -> list[Part]:
    """The parts that may be meant, the best first; raises NetworkError that lists the others if the key names none."""
    found = [part for nest in nests for part in parts(nest, wanted)]
    found.sort(key=lambda part: (not part.fits, -len(part.weights)))
    shown = argument("weights", file.path)
    if not found:
        keys = [key for nest in nests for key in nest.tensors]
        raise NetworkError(
            f"{shown} does not fit the network: none of its keys ({_listed(keys)}) ends with one of the network's "
            f"({_listed(list(wanted.tensors))})"
        )
    if file.key is None:
        return found
    meant = [part for part in found if part.is_meant_by(file.key)]
    if not meant:
        raise NetworkError(
            f"{argument('weights_key', file.key)}: there are no such weights in {shown}; expected one of "
            f"{_listed([part.key for part in found])}"
        )
    exact = [part for part in meant if part.fits and part.is_at(file.key)]
    return exact or meant


def _only(fitting: Sequence[Part], file: WeightsFile) -> Part:
    """The one part that fits, or the first of equal ones; raises NetworkError that lists them."""
    first = fitting[0]
    if not all(first.equals(other) for other in fitting[1:]):
        raise NetworkError(
            f"{argument('weights', file.path)} holds several weights that fit the network: "
            f"{_listed([part.key for part in fitting])}; choose with {argument('weights_key', first.key)}, or another"
        )
    return first


def _require_no_other_head(nests: Sequence[Nest], wanted: Wanted, file: WeightsFile) -> None:
    """Raise NetworkError that says how to go on if all fits but the head: of another size or name, or not there.

    A head of another kind of numbers is no matter of size.
    """
    if not wanted.needed:
        return
    other, none_own = _head_in_file(nests, wanted, file), not wanted.head
    wanted = Wanted(wanted.tensors, [*wanted.head, *([other] if other else [])])
    if not wanted.head:
        return
    fitting = [part for part in _meant(nests, wanted, file) if part.fits]
    if not fitting:
        return
    place = _only(fitting, file).key
    with_head = Wanted(wanted.tensors)
    whole = next((part for nest in nests for part in parts(nest, with_head) if part.key == place), None)
    if whole is None or whole.other:
        return
    if none_own:
        raise NetworkError(
            f"{_shown(whole, file)} does not fit the network: {_faults(whole)}; give {argument('head', 'probe')} to "
            f"leave out the head in the file ({plain(other)}) and fit one, {argument('head', 'none')} for the features "
            "alone"
        )
    given, own = (weights.get(f"{wanted.head[0]}.weight") for weights in (whole.weights, wanted.tensors))
    keep = ""
    if given is not None and own is not None and given.shape[1:] == own.shape[1:] and len(given) > len(own):
        keep = f", or {argument('classes', len(given))} to have that of the file"
    raise NetworkError(
        f"{_shown(whole, file)} fits the network but for its head: {_faults(whole)}; give {argument('head', 'new')} to "
        f"leave the head untrained, {argument('head', 'probe')} to fit one{keep}"
    )


def _report(part: Part, file: WeightsFile, head: Sequence[str]) -> None:
    name = plain(file.path.name)
    if part.key != ".":
        log.info("the weights are those under %s in %s", plain(part.key), name)
    if part.left_out:
        others = sorted({_beside(key, part.prefix) for key in part.left_out})
        log.info("%d tensors of %s outside of them are left out: %s", len(part.left_out), name, _listed(others))
    if head and file.head == "new":
        log.warning("the head (%s) is new: its weights are as they were drawn, and not trained", ", ".join(head))


def _beside(name: str, prefix: str) -> str:
    """The words of a name up to the first that a prefix has not."""
    words = name.split(".")
    common = 0
    for word, other in zip(words, prefix.split("."), strict=False):
        if word != other:
            break
        common += 1
    return ".".join(words[: common + 1])


def _shown(part: Part, file: WeightsFile) -> str:
    return argument("weights", file.path) + ("" if part.key == "." else f" (under {plain(part.key)})")


def _faults(part: Part) -> str:
    kinds = {
        "missing": part.missing,
        "unexpected": part.unexpected,
        "misshapen": part.misshapen,
        "of another kind": part.other,
    }
    return "; ".join(f"{kind}: {_listed(keys)}" for kind, keys in kinds.items() if keys)


def _listed(keys: Sequence[str]) -> str:
    more = len(keys) - _LISTED
    return ", ".join(map(plain, keys[:_LISTED])) + (f" and {more} more" if more > 0 else "")
