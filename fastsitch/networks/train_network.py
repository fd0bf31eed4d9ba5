"""Training the networks that will be stitched."""

import logging
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsitch.data import Dataset, ImageFiles, Normalisation, Split, Transform, Views, load_dataset
from fastsitch.errors import ConfigError, FailedError, NetworkError, argument
from fastsitch.files import exclusive, require_regular
from fastsitch.identity import tensors_hash, torch_generator
from fastsitch.learning_rate import Schedule
from fastsitch.machine import configure, native_bf16, resolve_device, versions
from fastsitch.network_names import NetworkName
from fastsitch.networks.checkpoint import NetworkRecord, load_network, read_record, require_fit, save_network
from fastsitch.networks.find_network import definitions_folder
from fastsitch.networks.network_definition import require_can_receive, require_definition
from fastsitch.networks.strided_gradients import steady_gradients
from fastsitch.progress import Progress, Report, ignore
from fastsitch.root import Root
from fastsitch.vocabulary import Descent, NetworkRecipe, require_choice, require_whole

log = logging.getLogger(__name__)

_EVALUATION_BATCH = 500

_STRIDES = 8
"""Three stages halve the map: stitches want sides that stay whole."""


@dataclass(frozen=True, kw_only=True)
class NetworkTraining:
    """How a network is trained: SGD with linear warm-up to the peak rate, then a descent to 0."""

    name: str
    epochs: int
    batch_size: int
    lr: float
    warmup: float
    """Share of all steps."""
    descent: Descent
    momentum: float
    weight_decay: float
    augment: bool
    mixed_precision: bool
    """bf16 where the device has it natively."""


NETWORK_RECIPES = {
    "published": NetworkTraining(
        name="published",
        epochs=40,
        batch_size=256,
        lr=0.01,
        warmup=0.25,
        descent="cosine",
        momentum=0.9,
        weight_decay=0.01,
        augment=True,
        mixed_precision=False,
    ),
    "fast": NetworkTraining(
        name="fast",
        epochs=10,
        batch_size=128,
        lr=0.2,
        warmup=0.25,
        descent="linear",
        momentum=0.9,
        weight_decay=5e-4,
        augment=True,
        mixed_precision=True,
    ),
}
"""``published`` is the study's recipe (40 epochs, 10 of warm-up); ``fast`` a one-cycle schedule."""


def network_recipe(name: NetworkRecipe, epochs: int | None = None) -> NetworkTraining:
    """A recipe by name, with another number of epochs if given; raises ConfigError."""
    require_choice("recipe", name, NetworkRecipe)
    recipe = NETWORK_RECIPES[name]
    return recipe if epochs is None else replace(recipe, epochs=require_whole("epochs", epochs))


class NetworkTrainer:
    """Trains networks of one data set, with the options of :func:`train_network`, on the device of this machine."""

    def __init__(self, root: Root, dataset: str, *, device: str, **options: Any) -> None:
        self._root = root
        self._device = resolve_device(device)
        configure(self._device)
        self._dataset = load_dataset(dataset, root.data_dir)
        self._options = options

    def __call__(self, name: NetworkName, report: Report = ignore) -> NetworkRecord:
        """Train a network, unless it is already trained with these options."""
        return train_network(self._root, self._dataset, name, device=self._device, report=report, **self._options)


def train_network(
    root: Root,
    dataset: Dataset,
    name: NetworkName,
    *,
    width: int,
    recipe: NetworkTraining,
    device: torch.device,
    resolution: int | None = None,
    normalisation: Normalisation | None = None,
    force: bool = False,
    report: Report = ignore,
) -> NetworkRecord:
    """Train one network and save it; one that is already trained with the same settings is left alone.

    A small ResNet has ``width`` channels in its first stage and sees images of their own size, or resized to squares of
    side ``resolution``, normalised by the data set's mean and standard deviation or by its own. An added network is as
    it was defined. Raises NetworkError when it was trained with other settings and ``force`` is not set,
    ConfigError for settings that cannot work.
    """
    if name.random:
        raise ConfigError(f"{name} is an untrained control: it is derived on demand and never trained")
    width = require_whole("width", width, 1, 4096)
    if not name.built_in and (resolution is not None or normalisation is not None):
        raise ConfigError(
            f"{name}: resolution and normalisation of an added network belong to its definition; give them to add"
        )
    if resolution is not None and not (isinstance(resolution, int) and resolution > 0 and resolution % _STRIDES == 0):
        raise ConfigError(
            f"{argument('resolution', resolution)}: expected a multiple of {_STRIDES}, by which the strides of a small "
            "ResNet divide"
        )
    channels, *size = dataset.input_shape
    if len(dataset.train) < recipe.batch_size:
        raise ConfigError(
            f"{len(dataset.train)} training images are fewer than one batch of {recipe.batch_size} images: "
            "use a larger data set"
        )
    height, breadth = size if resolution is None else (resolution, resolution)
    folder = root.models(dataset.name)
    definition = None
    if not name.built_in:
        known = definitions_folder(root, dataset.name, name.architecture)
        definition = require_definition(known, name.architecture)
        require_can_receive(definition, name, "cannot be trained")
    input_shape = (channels, height, breadth) if definition is None else definition.input_shape
    draft = NetworkRecord(
        name=str(name),
        dataset=dataset.name,
        data_hash=dataset.hash,
        width=width if definition is None else definition.width,
        classes=dataset.classes if definition is None else definition.classes,
        input_shape=input_shape,
        normalisation=normalisation
        or (definition and definition.normalisation)
        or dataset.normalisation_for(input_shape[0]),
        recipe=asdict(recipe),
        accuracy=None,
        loss=None,
        weights_hash="",
        versions=versions(),
        definition=definition,
    )
    require_fit(draft, dataset)

    def trained_before() -> NetworkRecord | None:
        existing = read_record(folder, name) if not force else None
        if existing is not None:
            _require_same(existing, draft)
            load_network(folder, name)
            log.info("%s is already trained (accuracy %.4f)", name, existing.accuracy)
        return existing

    # without a lock, which cannot be written to a folder that is only to be read
    existing = trained_before()
    if existing is not None:
        return existing
    # before hours of training, not after
    require_regular(folder / f"{name}.json")
    with exclusive(folder / f"{name}.lock", f"network {name}"):
        existing = trained_before()
        if existing is not None:
            return existing
        on_device = dataset.to(device)
        module = draft.build()
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise NetworkError(f"{name} has nothing to train: expected parameters that require gradients")
        # a module may override these, and return nothing
        network = nn.Module.to(module, device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        fit_network(network, on_device, draft.transform, name, recipe, device, report)
        accuracy, loss = evaluate_network(network, on_device.test, draft.transform)
        if loss != loss or loss == float("inf"):
            raise FailedError(
                f"{name} diverged: its test loss is {loss}; try "
                f"{argument('recipe', 'published')} or another {argument('width')}"
            )
        network = nn.Module.cpu(network)
        network.eval()
        weights_hash = tensors_hash(network.state_dict())
        record = replace(draft, accuracy=accuracy, loss=loss, weights_hash=weights_hash)
        save_network(folder, network, record)
    return record


def _require_same(existing: NetworkRecord, wanted_record: NetworkRecord) -> None:
    if existing.definition != wanted_record.definition or "weights" in existing.recipe:
        how = "has weights from a file" if "weights" in existing.recipe else "was trained as another network"
        raise NetworkError(
            f"{existing.name} {how} on {existing.dataset}: use {argument('force', True)} to train it again, or another "
            f"{argument('seed')}"
        )
    wanted, found = (
        {"width": record.width, "data": record.data_hash, **_inputs(record.transform), **record.recipe}
        for record in (wanted_record, existing)
    )
    differing = [key for key in wanted if found.get(key) != wanted[key]]
    if differing:
        detail = ", ".join(f"{key} {_brief(found.get(key))} instead of {_brief(wanted[key])}" for key in differing)
        raise NetworkError(
            f"{existing.name} was trained with other settings on {existing.dataset}: {detail}; "
            f"use {argument('force', True)} to train it again, or another {argument('seed')}"
        )


def _inputs(transform: Transform) -> dict[str, Any]:
    return {"resolution": transform.resolution, **asdict(transform.normalisation)}


def _brief(value: Any) -> str:
    return value[:8] if isinstance(value, str) else str(value)


def fit_network(
    chain: nn.Module,
    dataset: Dataset,
    transform: Transform,
    name: NetworkName,
    recipe: NetworkTraining,
    device: torch.device,
    report: Report = ignore,
) -> None:
    """Train ``chain`` in place, with data and chain on ``device``; it ends in eval mode."""
    train = dataset.train
    _, image_height, image_width = dataset.input_shape
    steps_per_epoch = len(train) // recipe.batch_size
    steps = recipe.epochs * steps_per_epoch
    warmup = max(1, round(recipe.warmup * steps))
    schedule = Schedule(peak=recipe.lr, steps=steps, warmup=warmup, decay_end=steps, descent=recipe.descent)
    optimizer = torch.optim.SGD(
        [parameter for parameter in chain.parameters() if parameter.requires_grad],
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.descent == "linear",
    )
    order = torch_generator("network order", str(name))
    generator = torch.Generator(device).manual_seed(name.seed)
    mixed = recipe.mixed_precision and native_bf16(device)
    chain.train()
    loss_sum = torch.zeros((), device=device)
    step, task, note = 0, f"train {name}", ""
    for _ in range(recipe.epochs):
        permutation = torch.randperm(len(train), generator=order).to(device)
        loss_sum.zero_()
        if isinstance(train.images, ImageFiles):
            train.images[permutation].announce()
        for start in range(0, steps_per_epoch * recipe.batch_size, recipe.batch_size):
            index = permutation[start : start + recipe.batch_size]
            views = Views.draw(len(index), image_height, image_width, generator) if recipe.augment else None
            x = transform.apply(train.images[index], views)
            with steady_gradients(chain, device), torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                logits = chain(x)
            if not isinstance(logits, Tensor):
                raise NetworkError(
                    f"{name} returns a {type(logits).__name__} in training mode: expected logits (B, classes); write a "
                    "factory that builds it without auxiliary outputs"
                )
            loss = F.cross_entropy(logits.float(), train.labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.param_groups[0]["lr"] = schedule.rate(step)
            optimizer.step()
            loss_sum += loss.detach()
            step += 1
            report(Progress(step, steps, "steps", task, note))
        note = f"loss {loss_sum.item() / steps_per_epoch:.3f}"
        report(Progress(step, steps, "steps", task, note))
    chain.eval()


@torch.no_grad()
def evaluate_network(network: nn.Module, split: Split, transform: Transform) -> tuple[float, float]:
    """Accuracy and mean cross-entropy over a whole split, in fp32; network and split share a device."""
    network.eval()
    correct, loss = 0, 0.0
    for start in range(0, len(split), _EVALUATION_BATCH):
        labels: Tensor = split.labels[start : start + _EVALUATION_BATCH]
        logits = network(transform.apply(split.images[start : start + _EVALUATION_BATCH]))
        correct += int((logits.argmax(-1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    return correct / len(split), loss / len(split)
