"""Networks on disk: weights as safetensors, everything else as JSON."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as format_safetensors
from torch import nn

from fastsitch.chains.chain import Chain
from fastsitch.checked_files import DamagedFile, read_json, with_hash
from fastsitch.data import Dataset, Normalisation, Transform, dataset_folder
from fastsitch.errors import NetworkError, argument, plain
from fastsitch.files import PARTIAL, remove_leftovers, write_atomically, write_json
from fastsitch.identity import tensors_hash, torch_generator
from fastsitch.network_names import BLOCKS, NetworkName
from fastsitch.networks.network_definition import Definition
from fastsitch.networks.put_weights import put_weights
from fastsitch.networks.resnet import SmallResNet, initialise
from fastsitch.typed_fields import typed

_FORMAT = 1

_TRAIN_AGAIN = f"train the network again with {argument('force', True)}"


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
        return typed(cls(**{**content, **changes}))

    @property
    def transform(self) -> Transform:
        """How a data set's images are prepared for the network."""
        preprocessing = None if self.definition is None else self.definition.preprocessing
        return Transform(self.normalisation, self.input_shape[1:], preprocessing, self._grey)

    @property
    def _grey(self) -> bool:
        """Whether it is an added network of one channel, to which all images are grey."""
        return self.definition is not None and self.input_shape[0] == 1

    def build(self) -> nn.Module:
        """The untrained network in eval mode: its name is the seed of its weights."""
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
    # what was killed while it wrote may have had other weights, and so another name
    remove_leftovers(folder, f"{name}.*.safetensors.", PARTIAL)
    write_atomically(folder / file_name, lambda file: file.write(content))
    description = {"format": _FORMAT, "weights_file": file_name, **record.to_dict()}
    write_json(folder / f"{name}.json", with_hash(description, "record_hash"))
    for old in folder.glob(f"{name}.*.safetensors"):
        if old.name != file_name:
            old.unlink()


def read_record(folder: Path, name: NetworkName) -> NetworkRecord | None:
    """The record of a trained network, or None when there is none; raises NetworkError when it is malformed."""
    content = _read_record_file(folder / f"{name}.json")
    return None if content is None else content[0]


def _read_record_file(path: Path) -> tuple[NetworkRecord, str] | None:
    if path.exists() and not path.is_file():
        raise NetworkError(f"{path} is no regular file: expected the record of a network; remove it")
    try:
        content = read_json(path, "record_hash")
        if (found_format := content.pop("format")) != _FORMAT:
            raise NetworkError(f"{path} has format {found_format}: expected {_FORMAT}; {_TRAIN_AGAIN}")
        weights_file = content.pop("weights_file")
        if not isinstance(weights_file, str) or Path(weights_file).name != weights_file:
            raise DamagedFile(f"weights_file is {plain(repr(weights_file))}")
        record = NetworkRecord.from_dict(content)
    except FileNotFoundError:
        return None
    except (DamagedFile, KeyError, TypeError, ValueError, AttributeError) as error:
        raise NetworkError(f"cannot read {path} as a network record ({error}): {_TRAIN_AGAIN}") from None
    if record.name != path.stem or dataset_folder(record.dataset) != path.parent.name:
        raise NetworkError(
            f"{path} describes {record.name} on {record.dataset}: expected {path.stem} in the folder of its data set; "
            "remove the file or train the network again"
        )
    return record, weights_file


def load_network(folder: Path, name: NetworkName) -> Network:
    """Load a trained network, or derive an untrained control from its namesake.

    Raises NetworkError when the network (or the control's namesake) was never trained, or its files are damaged.
    """
    if name.random:
        return _control(folder, name)
    found = _read_record_file(folder / f"{name}.json")
    if found is None:
        raise NetworkError(f"no network {name} in {folder}")
    record, file_name = found
    path = folder / file_name
    module = record.build()
    try:
        weights = parse_safetensors(path.read_bytes())
        put_weights(module, weights)
    except FileNotFoundError:
        raise NetworkError(f"{path} is missing: {_TRAIN_AGAIN}") from None
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise NetworkError(f"{path} does not hold the weights of {name} ({reason}): {_TRAIN_AGAIN}") from None
    if tensors_hash(weights) != record.weights_hash:
        raise NetworkError(f"{path} was altered since it was trained: {_TRAIN_AGAIN}")
    return Network(record, record.cut(module))


def record_files(folder: Path) -> list[Path]:
    """The record files of a data set's folder, by name; :func:`read_record` reads them."""
    return sorted(folder.glob("*.json"))


def namesake(folder: Path, name: NetworkName) -> NetworkRecord | None:
    """The trained network that a control borrows width, data set and classes from: the one of lowest seed.

    Raises NetworkError when networks of that architecture differ in width or transform: the control would be ambiguous.
    """
    files = [path for path in folder.glob(f"{name.architecture}*.json") if _is_seed_of(path.stem, name.architecture)]
    records = [found[0] for path in files if (found := _read_record_file(path)) is not None]
    if name.random and any(record.definition and not record.definition.draws_weights for record in records):
        raise NetworkError(
            f"{name.architecture} brings its weights along, whatever the seed, and has no untrained control: leave out "
            f"{argument('settings')} with R, or have its code draw its weights"
        )
    widths = {record.name: record.width for record in records}
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{seed} has width {width}" for seed, width in sorted(widths.items()))
        raise NetworkError(f"{name} is ambiguous: {listed}; keep the seeds of an architecture at one width")
    if any(record.definition != records[0].definition for record in records):
        listed = ", ".join(sorted(record.name for record in records))
        raise NetworkError(f"{name} is ambiguous: {listed} have different definitions; {_TRAIN_AGAIN}")
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
        raise NetworkError(
            f"no network {name.architecture} in {folder}, from which the untrained control {name} is derived"
        )
    draft = replace(model, name=str(name), recipe={}, accuracy=None, loss=None)
    module = draft.build()
    weights_hash = tensors_hash(module.state_dict())
    return Network(replace(draft, weights_hash=weights_hash), draft.cut(module))


def require_fit(record: NetworkRecord, dataset: Dataset) -> None:
    """Raise NetworkError unless the data set is exactly the one that the network was trained on, or a subset of it.

    Whether a whole image folder is as it was is not known where only a subset is read.
    """
    # an added network may know more classes than the data set has
    fits = record.classes == dataset.classes or (record.definition is not None and record.classes > dataset.classes)
    if (record.input_shape[0] != dataset.channels and not record.transform.grey) or not fits:
        raise NetworkError(
            f"{record.name} was built for images of {record.input_shape[0]} channels and {record.classes} classes, but "
            f"{dataset.name} has {dataset.channels} and {dataset.classes}: {_TRAIN_AGAIN}"
        )
    known = dataset.hash
    if dataset.whole is not None and record.dataset == dataset.whole.name:
        if dataset.whole.hash is None:
            # what was not taken of a folder is not decoded either
            return
        known = dataset.whole.hash
    if record.data_hash != known:
        given = argument("pretrained", True) if "pretrained" in record.recipe else f"the same {argument('weights')}"
        remedy = f"add it again with {given}" if "weights" in record.recipe else _TRAIN_AGAIN
        name = dataset.name if known == dataset.hash else record.dataset
        raise NetworkError(f"{name} has changed since {record.name} was trained on it: {remedy}")
