"""Networks on disk: weights as safetensors, everything else as JSON."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as format_safetensors

from fastsitch.data import Normalisation
from fastsitch.errors import NetworkError
from fastsitch.files import write_atomically, write_json
from fastsitch.identity import tensors_hash, torch_generator
from fastsitch.networks.names import BLOCKS, NetworkName
from fastsitch.networks.resnet import SmallResNet, initialise

_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class NetworkRecord:
    """Everything about a network but its weights; ``to_dict`` is the JSON file beside them."""

    name: str
    dataset: str
    data_hash: str
    width: int
    classes: int
    input_shape: tuple[int, int, int]
    normalisation: Normalisation
    recipe: dict[str, Any]
    """How it was trained; empty for an untrained control."""
    accuracy: float | None
    """On the whole test set; None when it was not measured."""
    loss: float | None
    weights_hash: str
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "NetworkRecord":
        normalisation = Normalisation(*(tuple(content["normalisation"][key]) for key in ("mean", "std")))
        channels, height, width = content["input_shape"]
        return cls(**{**content, "normalisation": normalisation, "input_shape": (channels, height, width)})

    def build(self) -> SmallResNet:
        """The architecture with arbitrary weights, in eval mode."""
        blocks = BLOCKS[NetworkName.parse(self.name).architecture]
        return SmallResNet(blocks, width=self.width, classes=self.classes, input_shape=self.input_shape).eval()


@dataclass(frozen=True)
class Network:
    """A network in memory: its record, and its chain in eval mode on the CPU in fp32."""

    record: NetworkRecord
    chain: SmallResNet

    @property
    def name(self) -> NetworkName:
        return NetworkName.parse(self.record.name)


def save_network(folder: Path, chain: SmallResNet, record: NetworkRecord) -> None:
    """Write weights, then the record that names them; a crash leaves the previous network or the new one."""
    name = record.name
    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in chain.state_dict().items()}
    file_name = f"{name}.{record.weights_hash[:12]}.safetensors"
    content = format_safetensors(weights)
    write_atomically(folder / file_name, lambda file: file.write(content))
    write_json(folder / f"{name}.json", {"format": _FORMAT, "weights_file": file_name, **record.to_dict()})
    for old in folder.glob(f"{name}.*.safetensors"):
        if old.name != file_name:
            old.unlink()


def read_record(folder: Path, name: NetworkName) -> NetworkRecord | None:
    """The record of a trained network, or None when there is none; raises NetworkError when it is malformed."""
    content = _read_json(folder / f"{name}.json")
    return None if content is None else content[0]


def _read_json(path: Path) -> tuple[NetworkRecord, str] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        if content.pop("format") != _FORMAT:
            raise NetworkError(f"{path} has another format: expected {_FORMAT}; train the network again with --force")
        weights_file = content.pop("weights_file")
        return NetworkRecord.from_dict(content), weights_file
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, NetworkError):
            raise
        raise NetworkError(f"{path} is no network record ({error}): train the network again with --force") from None


def load_network(folder: Path, name: NetworkName) -> Network:
    """Load a trained network, or derive an untrained control from its namesake.

    Raises NetworkError when the network (or the control's namesake) was never trained, or its files do not fit.
    """
    if name.random:
        return _control(folder, name)
    found = _read_json(folder / f"{name}.json")
    if found is None:
        raise NetworkError(f"no network {name} in {folder}")
    record, file_name = found
    path = folder / file_name
    chain = record.build()
    try:
        weights = parse_safetensors(path.read_bytes())
        chain.load_state_dict(weights)
    except FileNotFoundError:
        raise NetworkError(f"{path} is missing: train the network again with --force") from None
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise NetworkError(
            f"{path} does not hold the weights of {name} ({reason}): train the network again with --force"
        ) from None
    if tensors_hash(weights) != record.weights_hash:
        raise NetworkError(f"{path} was altered since it was trained: train the network again with --force")
    return Network(record, chain)


def trained_networks(folder: Path) -> Iterator[NetworkRecord]:
    """The records of all networks in a data set's folder, by name."""
    for path in sorted(folder.glob("*.json")):
        found = _read_json(path)
        if found is not None:
            yield found[0]


def namesake(folder: Path, name: NetworkName) -> NetworkRecord | None:
    """The trained network that a control borrows width, data set and classes from: the one of lowest seed."""
    seeds = [
        NetworkName.parse(record.name).seed
        for record in trained_networks(folder)
        if NetworkName.parse(record.name).architecture == name.architecture
    ]
    return read_record(folder, NetworkName(name.architecture, seed=min(seeds))) if seeds else None


def _control(folder: Path, name: NetworkName) -> Network:
    model = namesake(folder, name)
    if model is None:
        raise NetworkError(f"no network {name.architecture} in {folder}, whose untrained control {name} would be")
    draft = NetworkRecord.from_dict(
        {**model.to_dict(), "name": str(name), "recipe": {}, "accuracy": None, "loss": None}
    )
    chain = draft.build()
    initialise(chain, torch_generator("network", str(name), model.width, model.classes))
    weights_hash = tensors_hash(chain.state_dict())
    return Network(NetworkRecord.from_dict({**draft.to_dict(), "weights_hash": weights_hash}), chain)


@torch.no_grad()
def parameters(chain: SmallResNet) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in chain.parameters())
