"""Image classifiers and towers of transformers: built from their configuration, without code of their repositories."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from fastsitch.chains.trace import first_line
from fastsitch.data import Normalisation, Preprocessing
from fastsitch.data.preprocessing import Interpolation, pixels
from fastsitch.errors import NetworkError, argument
from fastsitch.files import expanded
from fastsitch.networks.naming_weights import naming_weights
from fastsitch.networks.published_files import HubFile
from fastsitch.networks.weight_files import shards

_BILINEAR = 2
_RESAMPLING: dict[int, Interpolation] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
    4: "box",
    5: "hamming",
}
"""Pillow's numbers, which the configurations of image processors hold."""

_SIZES = ((300, 421), (231, 177), (520, 640), (48, 61))
"""Height and width of the images on which a preprocessing has to agree with the library's."""

_TOLERANCE = 1e-5
"""Of normalised pixels, which transformers computes in an order of its own."""

_VOLATILE = (
    *("model_type", "transformers_version", "_name_or_path"),
    *("id2label", "label2id", "num_labels", "dtype", "torch_dtype"),
)
"""What a configuration says beside how the network is built."""

_FILES = (
    ("config.json",),
    ("preprocessor_config.json", "processor_config.json"),
    ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""What is read of a repository; of several the first that it has."""

_BESIDE = ("README.md", "processor_config.json")
"""What is read too where it is there: the second, of whole processors, comes before that of the images alone."""

_TOWERS = ("clip_vision_model", "siglip_vision_model", "dinov3_vit", "dinov3_convnext")
"""Types that give features, of which transformers has no classifier."""

_FRONT_MATTER = 10_000
"""Characters of a README that are looked at."""


def require_transformers(name: str) -> Any:
    """The module transformers; raises NetworkError where it is not installed."""
    try:
        import transformers
    except ImportError:
        raise NetworkError(f"hf:{name}: transformers is not installed; pip install 'fastsitch[hf]'") from None
    return transformers


def build_classifier(
    kind: str, classes: int, configuration: Mapping[str, Any], input_shape: tuple[int, int, int] | None = None
) -> nn.Module:
    """A classifier of some type, or a tower of features, with the weights that its code draws.

    Without a ``configuration`` it is built for images of ``input_shape``. Raises NetworkError for an unknown type.
    """
    transformers = require_transformers(kind)
    _require_images(transformers, kind, f"hf:{kind}")
    config = transformers.AutoConfig.for_model(kind, **configuration, num_labels=classes)
    # what chooses among the classifiers of a type expects a list
    config.architectures = config.architectures or []
    if input_shape is not None and not configuration:
        _for_images(getattr(config, "vision_config", config), input_shape)
    model: nn.Module = _builder(transformers, kind).from_config(config, trust_remote_code=False)
    return model


def _for_images(config: Any, input_shape: tuple[int, int, int]) -> None:
    """Have a configuration built for images of some size, where it states one."""
    channels, height, width = input_shape
    if hasattr(config, "num_channels"):
        config.num_channels = channels
    size = getattr(config, "image_size", None)
    if size is not None:
        config.image_size = height if height == width and isinstance(size, int) else (height, width)


def _builder(transformers: Any, kind: str) -> Any:
    return transformers.AutoModel if kind in _TOWERS else transformers.AutoModelForImageClassification


@dataclass(frozen=True, kw_only=True)
class ClassifierFiles:
    """A folder as transformers saves it, or the snapshot of a repository in the cache of the hub."""

    folder: Path
    weights: list[Path]
    """One file, or all shards."""
    published: HubFile | None
    """The file with the weights, or the index of the shards; None: the folder is the user's."""

    @property
    def licence(self) -> str | None:
        """Of the front matter of its README, if that is at hand."""
        with suppress(OSError, ValueError):
            lines = (self.folder / "README.md").read_text(encoding="utf-8")[:_FRONT_MATTER].splitlines()
            for line in lines[1:] if lines[:1] == ["---"] else ():
                key, _, value = line.partition(":")
                if key == "license" and value.strip():
                    return value.strip()
                if key == "---":
                    break
        return None


def classifier_files(name: str) -> ClassifierFiles:
    """The files of ``ORG/MODEL[@REVISION]``, downloaded where they are not in the cache, or of a folder.

    Raises NetworkError where some are missing.
    """
    require_transformers(name)
    folder = expanded(name).resolve()
    if folder.is_dir() or name.startswith(("/", ".", "~", "$")):
        *_, weights = [_first(folder, wanted) for wanted in _FILES]
        return ClassifierFiles(folder=folder, weights=_shards(weights), published=None)
    described = HubFile.parse(name, ())
    *_, published = [replace(described, names=wanted) for wanted in _FILES]
    for wanted in _FILES:
        file = replace(described, names=wanted)
        file.require()
        file.fetched()
    weights = published.path
    for shard in _shards(weights):
        part = replace(described, names=(shard.name,))
        part.require()
        part.fetched()
    for beside in _BESIDE:
        with suppress(NetworkError):
            file = replace(described, names=(beside,))
            file.require()
            file.fetched()
    return ClassifierFiles(folder=weights.parent, weights=_shards(weights), published=published)


def _first(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise NetworkError(
        f"{folder} has no {' or '.join(names)}: expected a folder that transformers saved, or hf:ORG/MODEL"
    )


def _shards(weights: Path) -> list[Path]:
    return shards(weights) if weights.name.endswith(".index.json") else [weights]


@dataclass(frozen=True, kw_only=True)
class LoadedClassifier:
    """A classifier with its weights."""

    module: nn.Module
    kind: str
    configuration: dict[str, Any]
    """Builds it again, with ``kind``."""
    classes: int
    names: tuple[str, ...] | None
    """Of its outputs; None: they have none."""
    fixed_size: bool
    """Whether it takes images of one size alone."""


def load_classifier(files: ClassifierFiles, name: str) -> LoadedClassifier:
    """Load what files hold; of weights nothing but tensors is read.

    What was saved without a classifier gives features (``classes`` 0). Raises NetworkError for another type, and where
    weights are missing.
    """
    transformers = require_transformers(name)
    kind = _kind(files.folder)
    _require_images(transformers, kind, f"hf:{name}")
    config = transformers.AutoConfig.from_pretrained(files.folder, trust_remote_code=False)
    if kind in _TOWERS:
        config.num_labels = 0
    names = tuple(str(config.id2label[k]) for k in range(config.num_labels))
    model, without = _loaded(transformers, files, config)
    if without:
        config.num_labels = 0
        model, without_features = _loaded(transformers, files, config)
        if without_features or any(
            isinstance(layer, nn.Linear) and not layer.out_features for layer in model.modules()
        ):
            raise NetworkError(
                f"hf:{name} has no weights for {', '.join(without[:3])}{', ...' if len(without) > 3 else ''}: expected "
                "a network that was saved as an image classifier, or without its classifier alone"
            )
    return LoadedClassifier(
        module=model,
        kind=config.model_type,
        configuration={key: value for key, value in config.to_diff_dict().items() if key not in _VOLATILE},
        classes=config.num_labels,
        names=None if all(label == f"LABEL_{k}" for k, label in enumerate(names)) else names[: config.num_labels],
        fixed_size="image_size" in config.to_dict(),
    )


def _loaded(transformers: Any, files: ClassifierFiles, config: Any) -> tuple[nn.Module, list[str]]:
    """A classifier, and the names of weights that its files lack."""
    kind, published = config.model_type, files.published is not None
    builder = _builder(transformers, kind)
    with (
        _quiet(transformers),
        naming_weights(lambda: files.weights, kind, lambda: builder.from_config(deepcopy(config)), published=published),
    ):
        model, report = builder.from_pretrained(
            files.folder, config=config, trust_remote_code=False, output_loading_info=True
        )
    return model, sorted({*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])})


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """The library shows no bars, and says nothing of weights that are missing: an error will."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _kind(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise NetworkError(
            f"{folder / 'config.json'} is no configuration of transformers ({type(error).__name__}: {error}): expected "
            "one with a model_type"
        ) from None


def _require_images(transformers: Any, kind: str, what: str) -> None:
    known = transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    if kind not in known and kind not in _TOWERS:
        raise NetworkError(
            f"{what} is of the type {kind}: expected one with an image classifier in transformers, such as "
            f"vit, swin, convnext, resnet or dinov2, or one of {', '.join(_TOWERS)}"
        )


def processor_preprocessing(
    folder: Path, name: str, resolution: tuple[int, int] | None
) -> tuple[Preprocessing, Normalisation]:
    """What the image processor in a folder does to images, shown by running it: that of Pillow, ``backend="pil"``.

    ``resolution`` scales it to another height and width. Raises NetworkError where it does more than resizing,
    cropping and normalising, or gives images of several sizes.
    """
    transformers = require_transformers(name)
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    # what a library makes of any JSON
    except Exception as error:
        raise NetworkError(
            f"{folder} has no image processor that can be read ({type(error).__name__}: {first_line(error)}): expected "
            f"{_FILES[1][0]}, or {_FILES[1][1]} with an image_processor in it, as transformers saves them"
        ) from error
    kind = type(processor).__name__
    examples = [_example(height, width) for height, width in _SIZES]
    outputs = [_processed(processor, example) for example in examples]
    if len({output.shape for output in outputs}) > 1:
        raise NetworkError(f"hf:{name}: its image processor {kind} gives images of several sizes: expected one size")
    _, height, width = outputs[0].shape
    normalisation = _normalisation(processor)
    for preprocessing in _candidates(processor, (height, width)):
        shown = (normalisation.apply(pixels(preprocessing.shown(example))[None])[0] for example in examples)
        if all((a - b).abs().max() < _TOLERANCE for a, b in zip(shown, outputs, strict=True)):
            return (preprocessing if resolution is None else _scaled(preprocessing, resolution)), normalisation
    raise NetworkError(
        f"hf:{name}: its image processor {kind} does more than resizing, cropping and normalising colours: write a "
        f"factory that builds the network, with its own steps in it ({argument('source', option='--from')} "
        "FILE.py:FACTORY)"
    )


def _example(height: int, width: int) -> Image.Image:
    """Colours that change from pixel to pixel, so that a shift by one shows."""
    values = np.arange(height * width * 3, dtype=np.int64).reshape(height, width, 3)
    return Image.fromarray((values * 2654435761 >> 9).astype(np.uint8))


def _processed(processor: Any, image: Image.Image) -> torch.Tensor:
    shown: torch.Tensor = processor(image, return_tensors="pt")["pixel_values"][0]
    return shown.float()


def _normalisation(processor: Any) -> Normalisation:
    """The stated one if that is what becomes of black and of white, else the one that is."""
    flat = (_processed(processor, Image.new("RGB", (256, 256), colour)).double() for colour in ("black", "white"))
    black, white = (shown[:, shown.shape[1] // 2, shown.shape[2] // 2] for shown in flat)
    std = 1 / (white - black)
    seen = (-black * std).tolist(), std.tolist()
    mean, deviation = (getattr(processor, name, None) or [] for name in ("image_mean", "image_std"))
    if len(mean) == len(deviation) == len(std):
        pairs = zip((*seen[0], *seen[1]), (*mean, *deviation), strict=True)
        if all(abs(a - b) < _TOLERANCE for a, b in pairs):
            return Normalisation(tuple(mean), tuple(deviation))
    return Normalisation(*(tuple(round(value, 6) for value in values) for values in seen))


def _candidates(processor: Any, crop: tuple[int, int]) -> Iterator[Preprocessing]:
    """Ways of resizing that image processors have, the plain ones first."""
    size = dict(getattr(processor, "size", None) or {})
    edge, crop_share = size.get("shortest_edge"), getattr(processor, "crop_pct", None)
    resizes: list[tuple[tuple[int, int] | None, Any]] = [(None, "shorter")]
    if size.get("height") and size.get("width"):
        resizes.insert(0, ((size["height"], size["width"]), "exact"))
    if edge:
        # of ConvNeXt and PoolFormer; of LeViT
        scaled = [edge, *([int(edge / crop_share)] if crop_share else []), int(256 / 224 * edge)]
        resizes[:0] = [*(((side, side), "shorter") for side in dict.fromkeys(scaled)), ((edge, edge), "exact")]
    resample = getattr(processor, "resample", None)
    interpolation = _RESAMPLING[_BILINEAR if resample is None else int(resample)]
    for resize, fit in resizes:
        for centre in ("below", "nearest"):
            yield Preprocessing(crop=crop, resize=resize, fit=fit, interpolation=interpolation, centre=centre)


def _scaled(preprocessing: Preprocessing, resolution: tuple[int, int]) -> Preprocessing:
    resize = preprocessing.resize
    if resize is not None:
        sides = zip(resize, resolution, preprocessing.crop, strict=True)
        height, width = (side * wanted // shown for side, wanted, shown in sides)
        resize = (height, width)
    return replace(preprocessing, crop=resolution, resize=resize)
