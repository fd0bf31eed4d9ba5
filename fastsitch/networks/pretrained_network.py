"""Networks with the weights and the preprocessing that a library publishes under a name."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastsitch.data import Normalisation, Preprocessing
from fastsitch.errors import NetworkError, argument
from fastsitch.files import expanded
from fastsitch.networks.model_source import ModelSource, Size, foreign_code, require_known, require_timm
from fastsitch.networks.naming_weights import naming_weights
from fastsitch.networks.output_names import DATA_SET_KEYS, OutputNames, timm_names, with_synsets
from fastsitch.networks.published_files import HubFile, PublishedFile, UrlFile
from fastsitch.networks.transformers_network import classifier_files, load_classifier, processor_preprocessing

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PretrainedNetwork:
    """What a library publishes of a network."""

    source: ModelSource
    """Builds it again, without the weights."""
    module: nn.Module
    """With its weights: fp32, CPU, eval."""
    classes: int
    """0 where it has no classifier."""
    input_shape: Size
    normalisation: Normalisation
    preprocessing: Preprocessing
    provenance: dict[str, str]
    """Name, file, revision, sha256 and licence of the weights, as far as they are stated."""
    labels: OutputNames | None = None
    """What each output stands for, where that is known."""


def load_pretrained(source: ModelSource, resolution: tuple[int, int] | None = None) -> PretrainedNetwork:
    """Load a network by name, from the library's cache or after a download that is announced.

    ``resolution`` replaces the published height and width. Of files nothing but tensors is read. Raises NetworkError
    where there are no such weights, or they are neither in the cache nor to be had.
    """
    kind, _, name = source.text.partition(":")
    library = _LIBRARIES.get(kind)
    if library is None:
        raise NetworkError(
            f"{argument('pretrained', True)}: {source.text} has no published weights; expected timm:NAME, "
            f"torchvision:NAME or hf:NAME, or {argument('weights')} with a file"
        )
    with foreign_code(source.text):
        loaded = library(name, resolution)
    loaded.module.float().cpu().eval()
    log.info(
        "%s: %s", source.text, ", ".join(f"{key} {value}" for key, value in loaded.provenance.items() if key != "file")
    )
    return loaded


def _timm(name: str, resolution: tuple[int, int] | None) -> PretrainedNetwork:
    timm = require_timm(name)
    place, _, where = name.partition(":")
    folder = expanded(where).resolve()
    file: HubFile | UrlFile | None = None
    if place == "local-dir":
        name = f"local-dir:{folder}"
        config, architecture, arguments = _configuration(folder / "config.json")
    elif place == "hf-hub":
        # before timm, so that what lacks is said in a line
        described = HubFile.parse(where, ("config.json",))
        described.require()
        config, architecture, arguments = _configuration(described.fetched())
        file = HubFile.parse(where, _hub_names(config))
    elif where:
        raise NetworkError(f"timm:{name}: expected timm:NAME, timm:hf-hub:ORG/MODEL or timm:local-dir:PATH")
    else:
        require_known("timm", name.partition(".")[0], timm.list_models())
        (config, file), architecture, arguments = _registered(timm, name), name, {}
    if config.get("fixed_input_size") and resolution is not None:
        arguments["img_size"] = list(resolution)
    if file is not None:
        file.require()
    with naming_weights(
        lambda: [_local_weights(folder) if file is None else file.path] if file is None or file.cached() else [],
        architecture,
        lambda: timm.create_model(name, pretrained=False, **arguments),
        published=file is not None,
    ):
        module = timm.create_model(name, pretrained=True, **arguments)
    data = _data_configuration(module.pretrained_cfg)
    height, width = resolution or data["input_size"][1:]
    return PretrainedNetwork(
        source=ModelSource(f"timm:{architecture}", arguments=_json(arguments)),
        module=module,
        classes=module.num_classes,
        input_shape=(data["input_size"][0], height, width),
        normalisation=Normalisation(tuple(data["mean"]), tuple(data["std"])),
        preprocessing=timm_preprocessing(data, height, width),
        provenance=_provenance(
            f"timm:{name}",
            [_local_weights(folder) if file is None else file.path],
            file,
            module.pretrained_cfg.get("license"),
        ),
        labels=timm_names(module, config, f"timm:{name}", listed=not where),
    )


def _data_configuration(config: Mapping[str, Any]) -> dict[str, Any]:
    from timm.data.config import resolve_data_config

    data: dict[str, Any] = resolve_data_config(pretrained_cfg=config)  # type: ignore[no-untyped-call]
    return data


def _registered(timm: Any, name: str) -> tuple[dict[str, Any], HubFile | UrlFile]:
    """The configuration of a model in timm's own list, and the file with its weights."""
    try:
        known = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:
        tags = [full for full in timm.list_pretrained(f"{name.partition('.')[0]}.*")]
        raise NetworkError(
            f"timm has no weights {name}: expected one of {', '.join(tags) or 'none of this architecture'}"
        ) from None
    config = known.to_dict()
    if known.hf_hub_id:
        return config, HubFile.parse(known.hf_hub_id, _hub_names(config))
    if known.url:
        return config, UrlFile(known.url)
    with_weights = timm.list_pretrained(f"{name.partition('.')[0]}*")[:6]
    raise NetworkError(
        f"timm publishes no weights of {name}: expected one that has some"
        + (f", such as {', '.join(with_weights)}" if with_weights else "")
    )


def _hub_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Files that timm looks for, safetensors first."""
    given = config.get("hf_hub_filename")
    if given:
        return tuple(dict.fromkeys((f"{given.rpartition('.')[0]}.safetensors", given)))
    return "model.safetensors", "pytorch_model.bin"


def _configuration(path: Path) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """What timm keeps beside weights: configuration, architecture, arguments of the builder."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        config = content.get("pretrained_cfg", content)
        # channels and classes are given by whoever builds it
        arguments = {
            key: value
            for key, value in dict(content.get("model_args") or {}).items()
            if key not in ("in_chans", "num_classes")
        }
        trained_on = {key: content[key] for key in DATA_SET_KEYS if key in content}
        return {**trained_on, **config}, str(content["architecture"]), arguments
    except OSError:
        raise NetworkError(f"{path} is missing: expected a configuration that timm saved beside the weights") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise NetworkError(
            f"{path} is no configuration of timm ({type(error).__name__}: {error}): expected one that timm saved"
        ) from None


def _local_weights(folder: Path) -> Path:
    """The file that timm reads of a folder."""
    for name in ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth"):
        if (folder / name).is_file():
            return folder / name
    suffixes = (".safetensors", ".pth", ".bin")
    found = [path for path in folder.iterdir() if path.suffix in suffixes]
    if not found:
        raise NetworkError(f"{folder} has no weights: expected model.safetensors or pytorch_model.bin")
    return min(found, key=lambda path: (suffixes.index(path.suffix), path.name))


def timm_preprocessing(data: Mapping[str, Any], height: int, width: int) -> Preprocessing:
    """As timm's ``create_transform`` for evaluation, of a resolved configuration; timm/data/transforms_factory.py."""
    scaled = math.floor(height / data["crop_pct"]), math.floor(width / data["crop_pct"])
    mode = data["crop_mode"]
    fit = {"squash": "exact", "border": "inside"}.get(mode, "shorter" if scaled[0] == scaled[1] else "cover")
    fill = [round(255 * value) for value in data["mean"]] if mode == "border" else [0, 0, 0]
    return Preprocessing(
        crop=(height, width),
        resize=scaled,
        fit=fit,  # type: ignore[arg-type]
        interpolation=data["interpolation"],
        fill=(fill[0], fill[1], fill[2]),
    )


def _torchvision(name: str, resolution: tuple[int, int] | None) -> PretrainedNetwork:
    from torchvision import models

    base, _, tag = name.partition("@")
    require_known("torchvision", base, models.list_models(module=models))
    known = models.get_model_weights(base)
    if not len(known):
        raise NetworkError(f"torchvision publishes no weights of {base}: expected a model that has some")
    if (tag or "DEFAULT") not in known.__members__:
        raise NetworkError(f"torchvision:{base} has no weights {tag}: expected {', '.join(known.__members__)}")
    weights = known[tag or "DEFAULT"]
    preprocessing, normalisation = torchvision_preprocessing(weights.transforms(), resolution)
    height, width = preprocessing.crop
    file = UrlFile(weights.url, size=round(weights.meta.get("_file_size", 0) * 2**20))
    file.require()
    # what the builders of these two do when they are given weights
    arguments = {"transform_input": True, "init_weights": True} if base in ("googlenet", "inception_v3") else {}
    source = ModelSource(f"torchvision:{base}", arguments=_json(arguments))
    categories = weights.meta["categories"]
    module = source.build(len(categories), (3, height, width))
    with naming_weights(lambda: [file.path], base, lambda: module, published=True):
        module.load_state_dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True))
    return PretrainedNetwork(
        source=source,
        module=module,
        classes=len(categories),
        input_shape=(3, height, width),
        normalisation=normalisation,
        preprocessing=preprocessing,
        provenance=_provenance(f"torchvision:{base}@{weights.name}", [file.path], file, None),
        labels=OutputNames(with_synsets([(word,) for word in categories])),
    )


def torchvision_preprocessing(shown: Any, resolution: tuple[int, int] | None) -> tuple[Preprocessing, Normalisation]:
    """Of the preset of a model's weights (``weights.transforms()``), or scaled to another height and width."""
    crop, resize = (sides[0] if isinstance(sides, list) else sides for sides in (shown.crop_size, shown.resize_size))
    height, width = resolution or (crop, crop)
    preprocessing = Preprocessing(
        crop=(height, width),
        resize=(resize * height // crop, resize * width // crop),
        fit="shorter" if height == width else "cover",
        interpolation=shown.interpolation.value,
    )
    return preprocessing, Normalisation(tuple(shown.mean), tuple(shown.std))


def _transformers(name: str, resolution: tuple[int, int] | None) -> PretrainedNetwork:
    files = classifier_files(name)
    loaded = load_classifier(files, name)
    if resolution is not None and loaded.fixed_size:
        raise NetworkError(
            f"hf:{name} takes images of one size: leave out {argument('resolution')}, or expected a network without "
            "position embeddings"
        )
    preprocessing, normalisation = processor_preprocessing(files.folder, name, resolution)
    words = None if loaded.names is None else [tuple(label.split(", ")) for label in loaded.names]
    return PretrainedNetwork(
        source=ModelSource(f"hf:{loaded.kind}", arguments=_json(loaded.configuration)),
        module=loaded.module,
        classes=loaded.classes,
        input_shape=(3, *preprocessing.crop),
        normalisation=normalisation,
        preprocessing=preprocessing,
        provenance=_provenance(f"hf:{name}", files.weights, files.published, files.licence),
        labels=OutputNames(with_synsets(words)) if words else None,
    )


_LIBRARIES: dict[str, Callable[[str, tuple[int, int] | None], PretrainedNetwork]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "hf": _transformers,
}


def _provenance(name: str, paths: Sequence[Path], file: PublishedFile | None, licence: str | None) -> dict[str, str]:
    """The hash is over all files with weights, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    known = {
        "name": name,
        "file": paths[0].name if file is None else file.name,
        "revision": "" if file is None else file.revision,
        "sha256": digest.hexdigest(),
        "licence": licence or "not stated",
    }
    return {key: value for key, value in known.items() if value}


def _json(arguments: Mapping[str, Any]) -> str:
    return json.dumps(arguments, sort_keys=True)
