"""What the outputs of a published network are called."""

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastsitch.errors import NetworkError

log = logging.getLogger(__name__)

DATA_SET_KEYS = ("dataset", "datasets", "dataset_name", "train_dataset")
"""Under these some say in timm's ``config.json`` what a network was trained on."""
_IMAGENET = re.compile(r"imagenet|ilsvrc|\b(in|inet)[-_]?(1|12|21|22)k\b", re.IGNORECASE)


@dataclass(frozen=True)
class OutputNames:
    """The names of every output: a synset id, words; none where an output has no name."""

    names: tuple[tuple[str, ...], ...]
    guessed: bool = False
    """Whether they are known by the number of outputs alone."""


def timm_names(module: nn.Module, config: Mapping[str, Any], network: str, *, listed: bool) -> OutputNames | None:
    """Those that the network's configuration states, else those of ImageNet, which timm knows by their number.

    The number is a guess for a network that is not ``listed`` in timm itself; where its ``config`` names another data
    set than ImageNet, the outputs are unknown.
    """
    stated: Mapping[str, Any] = module.pretrained_cfg  # type: ignore[assignment]
    outputs: int = module.num_classes  # type: ignore[assignment]
    if stated.get("label_names"):
        return _stated(stated["label_names"], stated.get("label_descriptions"), outputs, network)
    from timm.data.imagenet_info import infer_imagenet_subset

    subset = infer_imagenet_subset(module) if outputs else None
    if subset is None or listed:
        return None if subset is None else OutputNames(_synsets(subset))
    trained_on = " ".join(str(config[key]) for key in DATA_SET_KEYS if config.get(key))
    if trained_on and not _IMAGENET.search(trained_on):
        return None
    log.info("%s does not name its %d outputs: they are taken for those of %s", network, outputs, subset)
    return OutputNames(_synsets(subset), guessed=True)


def _stated(label_names: Any, descriptions: Any, outputs: int, network: str) -> OutputNames | None:
    """As ``timm.data.CustomDatasetInfo`` reads them: a list, or a dict by index that may have gaps."""
    try:
        by_index = label_names if isinstance(label_names, Mapping) else dict(enumerate(list(label_names)))
        if isinstance(label_names, str) or not isinstance(descriptions or {}, Mapping):
            raise TypeError("a text in the place of a list")
        known = {int(index): "" if name is None else str(name) for index, name in by_index.items()}
        if len(known) < len(by_index) or min(known) < 0:
            raise ValueError("an index twice, or below 0")
    except (TypeError, ValueError) as error:
        raise NetworkError(
            f"label_names of {network} cannot be read ({error}): expected a list of names, or names by index"
        ) from None
    described = {str(name): str(text) for name, text in (descriptions or {}).items()}
    words = [_words(known[k], described.get(known[k], "")) if k in known else () for k in range(outputs)]
    return OutputNames(with_synsets(words)) if any(words) else None


def _words(*texts: str) -> tuple[str, ...]:
    """``tench, Tinca tinca`` is a name, and so are its parts."""
    return tuple(dict.fromkeys(word for text in texts if text for word in (text, *text.split(", "))))


def _synsets(subset: str) -> tuple[tuple[str, ...], ...]:
    """Synset id and words of every class of a part of ImageNet, in the order of its networks' outputs."""
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo(subset)
    return tuple(
        (name, *(word.strip() for word in info.label_name_to_description(name).split(",")))
        for name in info.label_names()  # type: ignore[no-untyped-call]
    )


def with_synsets(words: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """Other libraries know words alone; timm, where it is installed, the ids beside them."""
    with suppress(ImportError):
        synsets = _synsets("imagenet-1k")
        if len(synsets) == len(words) and all(set(words[k]) & set(synsets[k]) for k in (0, -1)):
            return tuple((*one, *other) for one, other in zip(words, synsets, strict=True))
    return tuple(words)
