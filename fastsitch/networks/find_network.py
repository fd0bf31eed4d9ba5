"""In which folder a network lies: a subset of a data set has networks of its own, and those of the whole."""

import os
from collections.abc import Sequence
from pathlib import Path

from fastsitch.data import whole_dataset
from fastsitch.network_names import NetworkName
from fastsitch.root import Root
from fastsitch.suggested_command import command


def models_folder(root: Root, dataset: str, name: NetworkName) -> Path:
    """The folder of a network's record and weights; that of the data set itself where there is no such network.

    Of a subset, a network that was trained on it, or added for it, comes first, then one of the whole data set.
    A control lies where its namesake does.
    """
    own, whole = root.models(dataset), root.models(whole_dataset(dataset))
    return whole if not _has(own, name) and _has(whole, name) else own


def definitions_folder(root: Root, dataset: str, architecture: str) -> Path:
    """The folder of the definition of an added network, as :func:`models_folder`."""
    own, whole = root.networks(dataset), root.networks(whole_dataset(dataset))
    file = f"{architecture}.json"
    return whole if not os.path.lexists(own / file) and os.path.lexists(whole / file) else own


def not_trained(root: Root, dataset: str, names: Sequence[NetworkName]) -> str:
    """The message for networks that are nowhere, with the command that trains them."""
    whole = whole_dataset(dataset)
    where = dataset if whole == dataset else f"{dataset}, nor on {whole}"
    line = command("train", *names, dataset=dataset, root=root.path)
    return f"not trained yet on {where}: {', '.join(map(str, names))}; train first with\n  {line}"


def _has(folder: Path, name: NetworkName) -> bool:
    if not name.random:
        return os.path.lexists(folder / f"{name}.json")
    seeds = folder.glob(f"{name.architecture}@*.json")
    return os.path.lexists(folder / f"{name.architecture}.json") or any(seeds)
