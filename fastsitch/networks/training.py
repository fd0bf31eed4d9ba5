"""Training the networks that are then stitched."""

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsitch.data import Dataset, Normalisation, Split, augment, load_dataset
from fastsitch.errors import ConfigError, FailedError, NetworkError
from fastsitch.files import exclusive
from fastsitch.identity import tensors_hash, torch_generator
from fastsitch.machine import configure, native_bf16, resolve_device, versions
from fastsitch.networks.checkpoint import NetworkRecord, load_network, read_record, save_network
from fastsitch.networks.names import BLOCKS, NetworkName
from fastsitch.networks.resnet import SmallResNet, initialise
from fastsitch.root import Root

log = logging.getLogger(__name__)

_EVALUATION_BATCH = 500


@dataclass(frozen=True, kw_only=True)
class NetworkRecipe:
    """How a network is trained: SGD with linear warm-up to the peak rate, then a descent to 0."""

    name: str
    epochs: int
    batch_size: int
    lr: float
    warmup: float
    """Share of all steps."""
    descent: str
    """``cosine`` or ``linear``."""
    momentum: float
    weight_decay: float
    augment: bool
    mixed_precision: bool
    """bf16 where the device has it natively."""

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ConfigError(f"--epochs {self.epochs}: expected at least 1")


NETWORK_RECIPES = {
    "published": NetworkRecipe(
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
    "fast": NetworkRecipe(
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


def network_recipe(name: str, epochs: int | None = None) -> NetworkRecipe:
    """A recipe by name, with another number of epochs if given; raises ConfigError."""
    if name not in NETWORK_RECIPES:
        raise ConfigError(f"recipe {name!r}: expected one of {', '.join(NETWORK_RECIPES)}")
    recipe = NETWORK_RECIPES[name]
    return recipe if epochs is None else replace(recipe, epochs=epochs)


@dataclass(frozen=True)
class TrainReport:
    """Progress of a training: steps done, steps in all, current mean loss over an epoch, accuracy if just measured."""

    step: int
    steps: int
    loss: float | None = None


class NetworkTrainer:
    """Trains networks of one data set, as :func:`train_network` does, on the device of this machine."""

    def __init__(
        self, root: Root, dataset: str, *, device: str, width: int, recipe: NetworkRecipe, force: bool = False
    ) -> None:
        self._root = root
        self._device = resolve_device(device)
        configure(self._device)
        self._dataset = load_dataset(dataset, root.data_dir)
        self._options: dict[str, Any] = {"width": width, "recipe": recipe, "force": force}

    def __call__(self, name: NetworkName, report: Callable[[TrainReport], None] | None = None) -> NetworkRecord:
        """Train a network, or find that it is trained just so already."""
        return train_network(self._root, self._dataset, name, device=self._device, report=report, **self._options)


def train_network(
    root: Root,
    dataset: Dataset,
    name: NetworkName,
    *,
    width: int,
    recipe: NetworkRecipe,
    device: torch.device,
    force: bool = False,
    report: Callable[[TrainReport], None] | None = None,
) -> NetworkRecord:
    """Train one network and save it; a network that was already trained just so is left alone.

    Raises NetworkError when one was trained otherwise and ``force`` is not set, ConfigError for settings that cannot
    work.
    """
    if name.random:
        raise ConfigError(f"{name} is an untrained control: it is derived on demand and never trained")
    if not 1 <= width <= 4096:
        raise ConfigError(f"--width {width}: expected 1 to 4096")
    if len(dataset.train) < recipe.batch_size:
        raise ConfigError(
            f"{len(dataset.train)} training images are fewer than one batch of {recipe.batch_size} images: "
            "use a larger data set"
        )
    folder = root.models(dataset.name)
    with exclusive(folder / f"{name}.lock", f"network {name}"):
        existing = read_record(folder, name) if not force else None
        if existing is not None:
            _require_same(existing, dataset, width, recipe)
            load_network(folder, name)
            log.info("%s is trained already (accuracy %.4f)", name, existing.accuracy)
            return existing
        chain = SmallResNet(
            BLOCKS[name.architecture], width=width, classes=dataset.classes, input_shape=dataset.input_shape
        )
        initialise(chain, torch_generator("network", str(name), width, dataset.classes))
        on_device = dataset.to(device)
        chain = chain.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        fit_network(chain, on_device, name, recipe, device, report)
        accuracy, loss = evaluate_network(chain, on_device.test, dataset.normalisation)
        if loss != loss or loss == float("inf"):
            raise FailedError(f"{name} diverged: its test loss is {loss}; try --recipe published or another --width")
        chain = chain.cpu().eval()
        record = NetworkRecord(
            name=str(name),
            dataset=dataset.name,
            data_hash=dataset.hash,
            width=width,
            classes=dataset.classes,
            input_shape=dataset.input_shape,
            normalisation=dataset.normalisation,
            recipe=asdict(recipe),
            accuracy=accuracy,
            loss=loss,
            weights_hash=tensors_hash(chain.state_dict()),
            versions=versions(),
        )
        save_network(folder, chain, record)
    return record


def _require_same(existing: NetworkRecord, dataset: Dataset, width: int, recipe: NetworkRecipe) -> None:
    wanted: dict[str, Any] = {"width": width, "data": dataset.hash, **asdict(recipe)}
    found: dict[str, Any] = {"width": existing.width, "data": existing.data_hash, **existing.recipe}
    differing = [key for key in wanted if found.get(key) != wanted[key]]
    if differing:
        detail = ", ".join(f"{key} {_brief(found.get(key))} instead of {_brief(wanted[key])}" for key in differing)
        raise NetworkError(
            f"{existing.name} was trained otherwise on {existing.dataset}: {detail}; "
            "use --force to train it again, or another seed (--seed)"
        )


def _brief(value: Any) -> str:
    return value[:8] if isinstance(value, str) else str(value)


def fit_network(
    chain: SmallResNet,
    dataset: Dataset,
    name: NetworkName,
    recipe: NetworkRecipe,
    device: torch.device,
    report: Callable[[TrainReport], None] | None = None,
) -> None:
    """Train ``chain`` in place, data and chain being on ``device``; ends in eval mode."""
    train = dataset.train
    steps_per_epoch = len(train) // recipe.batch_size
    steps = recipe.epochs * steps_per_epoch
    warmup = max(1, round(recipe.warmup * steps))
    optimizer = torch.optim.SGD(
        chain.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.descent == "linear",
    )
    order = torch_generator("network order", str(name))
    views = torch.Generator(device).manual_seed(name.seed)
    mixed = recipe.mixed_precision and native_bf16(device)
    chain.train()
    loss_sum = torch.zeros((), device=device)
    step = 0
    for _ in range(recipe.epochs):
        permutation = torch.randperm(len(train), generator=order).to(device)
        loss_sum.zero_()
        for start in range(0, steps_per_epoch * recipe.batch_size, recipe.batch_size):
            index = permutation[start : start + recipe.batch_size]
            x = dataset.normalisation.apply(train.images[index])
            if recipe.augment:
                x = augment(x, views)
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                logits = chain(x)
            loss = F.cross_entropy(logits.float(), train.labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.param_groups[0]["lr"] = _rate(step, steps, warmup, recipe)
            optimizer.step()
            loss_sum += loss.detach()
            step += 1
            if report is not None:
                report(TrainReport(step, steps))
        if report is not None:
            report(TrainReport(step, steps, loss_sum.item() / steps_per_epoch))
    chain.eval()


def _rate(step: int, steps: int, warmup: int, recipe: NetworkRecipe) -> float:
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    left = 1 - (step - warmup) / max(1, steps - warmup)
    if recipe.descent == "linear":
        return recipe.lr * left
    return recipe.lr * 0.5 * (1 - math.cos(math.pi * left))


@torch.no_grad()
def evaluate_network(network: nn.Module, split: Split, normalisation: Normalisation) -> tuple[float, float]:
    """Accuracy and mean cross-entropy over a whole split, in fp32; network and split share a device."""
    network.eval()
    correct, loss = 0, 0.0
    for start in range(0, len(split), _EVALUATION_BATCH):
        labels: Tensor = split.labels[start : start + _EVALUATION_BATCH]
        logits = network(normalisation.apply(split.images[start : start + _EVALUATION_BATCH]))
        correct += int((logits.argmax(-1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    return correct / len(split), loss / len(split)
