"""Networks on disk: weights as safetensors, everything else as JSON."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as format_safetensors
from torch import nn

from fastsitch.data import Dataset, Normalisation, Transform, dataset_folder
from fastsitch.errors import NetworkError
from fastsitch.files import write_atomically, write_json
from fastsitch.identity import stable_hash, tensors_hash, torch_generator
from fastsitch.networks.chain import Chain
from fastsitch.networks.definition import Definition
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
    """Channels, height, width: images of another size are resized."""
    normalisation: Normalisation
    recipe: dict[str, Any]
    """How it was trained; empty for an untrained control."""
    accuracy: float | None
    """On the whole test set; None when it was not measured."""
    loss: float | None
    weights_hash: str
    versions: dict[str, str]
    definition: Definition | None = None
    """Of an added network; None for the small ResNets."""

    def to_dict(self) -> dict[str, Any]:
        content = asdict(self)
        del content["definition"]
        return content if self.definition is None else {**content, "definition": self.definition.to_dict()}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "NetworkRecord":
        normalisation = Normalisation(*(tuple(content["normalisation"][key]) for key in ("mean", "std")))
        channels, height, width = content["input_shape"]
        changes: dict[str, Any] = {"normalisation": normalisation, "input_shape": (channels, height, width)}
        if "definition" in content:
            changes["definition"] = Definition.from_dict(content["definition"])
        return cls(**{**content, **changes})

    @property
    def transform(self) -> Transform:
        """What the network makes of a data set's images."""
        return Transform(self.normalisation, self.input_shape[1:])

    def build(self) -> nn.Module:
        """The network as it begins, in eval mode: its weights are drawn from its name."""
        if self.definition is not None:
            return self.definition.build(["network", self.name, self.classes])
        blocks = BLOCKS[NetworkName.parse(self.name).architecture]
        chain = SmallResNet(blocks, width=self.width, classes=self.classes, input_shape=self.input_shape)
        initialise(chain, torch_generator("network", self.name, self.width, self.classes))
        return chain.eval()

    def cut(self, module: nn.Module) -> Chain:
        """The chain of a module that :meth:`build` made."""
        if self.definition is not None:
            return self.definition.cut(module)
        assert isinstance(module, Chain)
        return module


@dataclass(frozen=True)
class Network:
    """A network in memory: its record, and its chain in eval mode on the CPU in fp32."""

    record: NetworkRecord
    chain: Chain

    @property
    def name(self) -> NetworkName:
        return NetworkName.parse(self.record.name)


def save_network(folder: Path, module: nn.Module, record: NetworkRecord) -> None:
    """Write weights, then the record that names them; a crash leaves the previous network or the new one."""
    name = record.name
    # copies, because modules may share tensors, which the format does not know
    weights = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in module.state_dict().items()}
    file_name = f"{name}.{record.weights_hash[:12]}.safetensors"
    content = format_safetensors(weights)
    write_atomically(folder / file_name, lambda file: file.write(content))
    description = {"format": _FORMAT, "weights_file": file_name, **record.to_dict()}
    write_json(folder / f"{name}.json", {**description, "record_hash": stable_hash(description)})
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
        found_hash = content.pop("record_hash")
        intact = stable_hash(content) == found_hash
        if content.pop("format") != _FORMAT:
            raise NetworkError(f"{path} has another format: expected {_FORMAT}; train the network again with --force")
        weights_file = content.pop("weights_file")
        record = NetworkRecord.from_dict(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NetworkError(f"{path} is no network record ({error}): train the network again with --force") from None
    if not intact:
        raise NetworkError(f"{path} was altered (its own hash does not fit): train the network again with --force")
    if record.name != path.stem or dataset_folder(record.dataset) != path.parent.name:
        raise NetworkError(
            f"{path} describes {record.name} on {record.dataset}: it belongs elsewhere; remove it or train again"
        )
    return record, weights_file


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
    module = record.build()
    try:
        weights = parse_safetensors(path.read_bytes())
        module.load_state_dict(weights)
    except FileNotFoundError:
        raise NetworkError(f"{path} is missing: train the network again with --force") from None
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise NetworkError(
            f"{path} does not hold the weights of {name} ({reason}): train the network again with --force"
        ) from None
    if tensors_hash(weights) != record.weights_hash:
        raise NetworkError(f"{path} was altered since it was trained: train the network again with --force")
    return Network(record, record.cut(module))


def record_files(folder: Path) -> list[Path]:
    """The record files of a data set's folder, by name; :func:`read_record` reads them."""
    return sorted(folder.glob("*.json"))


def namesake(folder: Path, name: NetworkName) -> NetworkRecord | None:
    """The trained network that a control borrows width, data set and classes from: the one of lowest seed.

    Raises NetworkError when networks of that architecture differ in width or transform: the control would be ambiguous.
    """
    files = [path for path in folder.glob(f"{name.architecture}*.json") if _is_seed_of(path.stem, name.architecture)]
    records = [found[0] for path in files if (found := _read_json(path)) is not None]
    widths = {record.name: record.width for record in records}
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{own} has width {width}" for own, width in sorted(widths.items()))
        raise NetworkError(f"{name} is ambiguous: {listed}; keep the seeds of an architecture at one width")
    if any(record.definition != records[0].definition for record in records):
        listed = ", ".join(sorted(record.name for record in records))
        raise NetworkError(f"{name} is ambiguous: {listed} are not of one definition; train them again with --force")
    if len({record.transform for record in records}) > 1:
        listed = ", ".join(sorted(record.name for record in records))
        raise NetworkError(
            f"{name} is ambiguous: {listed} differ in resolution or normalisation; keep the seeds of an architecture "
            "at one of them"
        )
    return min(records, key=lambda record: NetworkName.parse(record.name).seed) if records else None


def _is_seed_of(stem: str, architecture: str) -> bool:
    return stem == architecture or stem.startswith(f"{architecture}@")


def _control(folder: Path, name: NetworkName) -> Network:
    model = namesake(folder, name)
    if model is None:
        raise NetworkError(f"no network {name.architecture} in {folder}, whose untrained control {name} would be")
    draft = replace(model, name=str(name), recipe={}, accuracy=None, loss=None)
    module = draft.build()
    weights_hash = tensors_hash(module.state_dict())
    return Network(replace(draft, weights_hash=weights_hash), draft.cut(module))


def require_fit(record: NetworkRecord, dataset: Dataset) -> None:
    """Raise NetworkError when the data set is not the one that the network was trained on, as it was then."""
    # an added network may know more classes than the data set has
    fits = record.classes == dataset.classes or (record.definition is not None and record.classes > dataset.classes)
    if record.input_shape[0] != dataset.input_shape[0] or not fits:
        raise NetworkError(
            f"{record.name} was made for images of {record.input_shape[0]} channels and {record.classes} classes, but "
            f"{dataset.name} has {dataset.input_shape[0]} and {dataset.classes}: train it again with --force"
        )
    if record.data_hash != dataset.hash:
        remedy = "add it again with the same --weights" if "weights" in record.recipe else "train it again with --force"
        raise NetworkError(f"{dataset.name} has changed since {record.name} was trained on it: {remedy}")
