"""Receivers end in one output per class."""

from collections.abc import Iterable

from fastsitch.network_names import NetworkName
from fastsitch.networks.checkpoint import read_record
from fastsitch.networks.find_network import models_folder
from fastsitch.networks.network_definition import require_can_receive
from fastsitch.root import Root


def require_receivers(root: Root, dataset: str, receivers: Iterable[str]) -> None:
    """Raise NetworkError where one of these networks has no classifier; one that is not there is another matter."""
    for name in map(NetworkName.parse, receivers):
        record = read_record(models_folder(root, dataset, name), name)
        require_can_receive(None if record is None else record.definition, name, "cannot be a receiver")
