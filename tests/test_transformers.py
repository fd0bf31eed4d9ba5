"""Image classifiers of transformers: out of the hub's cache or a folder, offline, as the library itself gives them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo
from transformers import AutoImageProcessor, AutoModelForImageClassification

import fastsitch
from fastsitch.errors import NetworkError
from fastsitch.network_names import NetworkName
from fastsitch.networks.checkpoint import load_network
from fastsitch.networks.model_source import ModelSource
from fastsitch.networks.pretrained_network import load_pretrained
from fastsitch.networks.transformers_network import build_classifier, processor_preprocessing
from tests.conftest import Command
from tests.test_pretrained import REVISION, SYNSETS, caches, photos, range_of

__all__ = ["caches", "photos"]

WORDS = ImageNetInfo().label_descriptions()

SMALL: dict[str, dict[str, Any]] = {
    "vit": {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "image_size": 64,
        "patch_size": 16,
    },
    "deit": {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "image_size": 64,
        "patch_size": 16,
    },
    "dinov2": {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 16,
    },
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2], "layer_type": "basic"},
    "convnext": {"hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 2, 1]},
    "swin": {
        "embed_dim": 24,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "image_size": 64,
        "window_size": 4,
        "patch_size": 2,
    },
}

PROCESSORS: dict[str, dict[str, Any]] = {
    "dinov2": {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 72}, "crop_size": 64},
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": 64, "width": 64}},
    "deit": {
        "image_processor_type": "DeiTImageProcessor",
        "size": {"height": 73, "width": 73},
        "crop_size": {"height": 64, "width": 64},
    },
    "resnet": {
        "feature_extractor_type": "ConvNextFeatureExtractor",
        "size": {"shortest_edge": 64},
        "crop_pct": 0.875,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
    },
    "convnext": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 96}, "crop_pct": 0.95},
    "swin": {"image_processor_type": "ViTImageProcessor", "size": 64, "resample": 3, "image_std": [0.2, 0.3, 0.25]},
}


def save(folder: Path, kind: str, seed: int = 0, **options: Any) -> Path:
    """What a repository of the hub has."""
    torch.manual_seed(seed)
    model = build_classifier(kind, len(WORDS), SMALL[kind])
    model.config.id2label = dict(enumerate(WORDS))
    model.config.label2id = {word: k for k, word in enumerate(WORDS)}
    model.save_pretrained(folder, **options)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[kind]))
    (folder / "README.md").write_text("---\ntags: [vision]\nlicense: bsd-3-clause\n---\n# A network\n")
    return folder


def in_the_cache(caches: Path, kind: str, repository: str, **options: Any) -> Path:
    """As a download leaves it."""
    folder = caches / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(REVISION)
    return save(folder / "snapshots" / REVISION, kind, **options)


@pytest.mark.parametrize("kind", SMALL)
def test_a_network_gives_its_librarys_logits(caches: Path, photos: Path, kind: str) -> None:
    snapshot = in_the_cache(caches, kind, "someone/birds")
    dataset = f"imagefolder:{photos}"
    definition, record = fastsitch.add(
        "net", "hf:someone/birds", pretrained=True, dataset=dataset, root=caches / "root"
    )
    assert record is not None
    assert definition.class_outputs == tuple(range_of(SYNSETS))
    assert definition.source.text == f"hf:{kind}"
    known = record.recipe["pretrained"]
    assert known["name"] == "hf:someone/birds"
    assert known["file"] == "hf.co/someone/birds/model.safetensors"
    assert known["revision"] == REVISION
    assert known["licence"] == "bsd-3-clause"
    # the network comes back without its repository
    theirs = AutoModelForImageClassification.from_pretrained(snapshot).eval()
    processor = AutoImageProcessor.from_pretrained(snapshot, backend="pil")
    shutil.rmtree(caches / "hub")
    network = load_network(next((caches / "root" / "models").iterdir()), NetworkName("net"))
    files = sorted((photos / "test").rglob("*.jpg"))
    with torch.no_grad():
        x = network.record.transform.apply(fastsitch.load_dataset(dataset).test.images)
        expected_x = processor([Image.open(file).convert("RGB") for file in files], return_tensors="pt")["pixel_values"]
        assert torch.equal(x, expected_x)
        assert torch.equal(network.chain(x), theirs(x).logits[:, range_of(SYNSETS)])
    # every block is a position
    blocks = sum(SMALL[kind].get("depths", [])) or SMALL[kind]["num_hidden_layers"]
    assert len(network.chain.positions) >= 1 + blocks


def test_folders_shards_and_revisions(caches: Path, photos: Path) -> None:
    """The same weights in one file, in shards, in a folder, under a revision, and half of them in bf16."""
    whole = load_pretrained(ModelSource.parse(f"hf:{save(caches / 'saved', 'vit')}"))
    sharded = in_the_cache(caches, "vit", "someone/shards", max_shard_size="80KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    shards = load_pretrained(ModelSource.parse(f"hf:someone/shards@{REVISION}"))
    assert shards.provenance["file"] == "hf.co/someone/shards/model.safetensors.index.json"
    assert shards.provenance["revision"] == REVISION
    weights = [loaded.module.state_dict() for loaded in (whole, shards)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())
    assert whole.provenance["licence"] == "bsd-3-clause"
    next(sharded.glob("model-00002*")).unlink()
    with pytest.raises(NetworkError, match=r"model-00002-of-\d+.safetensors of hf.co/someone/shards is not in"):
        load_pretrained(ModelSource.parse("hf:someone/shards"))


def test_weights_are_drawn_from_the_seed(caches: Path) -> None:
    """Untrained controls come from the recorded configuration."""
    loaded = load_pretrained(ModelSource.parse(f"hf:{save(caches / 'saved', 'swin')}"))
    source = ModelSource.from_dict(json.loads(json.dumps(loaded.source.to_dict())))
    one, same, other = (source.build(1000, (3, 64, 64), key).state_dict() for key in (1, 1, 2))
    assert one.keys() == loaded.module.state_dict().keys()
    name = "swin.encoder.layers.0.blocks.0.mlp.fc1.weight"
    name = name if name in one else next(key for key in one if key.endswith("weight") and one[key].dim() == 2)
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])
    plain = build_classifier("resnet", 7, SMALL["resnet"])
    assert plain(torch.zeros(2, 3, 64, 64)).logits.shape == (2, 7)


def remove(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def changed(name: str, **entries: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))

    return change


def without(part: str, folder: Path) -> None:
    path = str(folder / "model.safetensors")
    weights = {key: value for key, value in load_file(path).items() if part not in key}
    assert len(weights) == len(load_file(path)) - 2
    save_file(weights, path, metadata={"format": "pt"})


def without_a_layer(folder: Path) -> None:
    without("layer.1.output.dense", folder)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": Path("/")}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (remove("config.json"), r"has no config.json: expected a folder that transformers saved"),
        (remove("preprocessor_config.json"), r"has no preprocessor_config.json"),
        (remove("model.safetensors"), r"has no model.safetensors or model.safetensors.index.json or pytorch_model.bin"),
        (changed("config.json", model_type="bert"), r"is of the type bert: expected one with an image classifier"),
        (changed("config.json", model_type="no_such"), r"is of the type no_such: expected one with an image"),
        (changed("config.json", model_type="my", auto_map={"AutoConfig": "code.My"}), r"is of the type my: expected"),
        (
            without_a_layer,
            r"has no weights for vit.layers.1.mlp.fc2.bias, vit.layers.1.mlp.fc2.weight: expected a network",
        ),
        (pickled, r"pytorch_model.bin holds more than tensors \(pathlib.*\), which is never unpickled: convert it"),
        (
            changed("preprocessor_config.json", image_processor_type="MobileViTImageProcessor"),
            r"its image processor MobileViTImageProcessorPil does more than resizing, cropping and normalising",
        ),
        (
            changed(
                "preprocessor_config.json", image_processor_type="TextNetImageProcessor", size={"shortest_edge": 64}
            ),
            r"its image processor TextNetImageProcessorPil gives images of several sizes: expected one size",
        ),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), r"is no configuration of transformers"),
    ],
)
def test_what_cannot_be_taken_is_refused_in_a_line(
    caches: Path, photos: Path, run_cli: Command, spoil: Any, line: str
) -> None:
    folder = save(caches / "saved", "vit")
    spoil(folder)
    ended = run_cli(
        *("add", "net", "--from", f"hf:{folder}", "--pretrained", "--dataset", f"imagefolder:{photos}"),
        *("--root", caches / "root"),
    )
    assert ended.returncode == 2, ended.stderr
    assert len(ended.stderr.strip().splitlines()) <= 3, ended.stderr
    assert re.search(line, ended.stderr.replace("\n", " ")), ended.stderr
    assert not list((caches / "root").rglob("*.json"))


@pytest.mark.parametrize("kind", ["vit", "resnet", "dinov2"])
def test_a_network_without_a_classifier_gives_features(caches: Path, photos: Path, kind: str) -> None:
    """As DINOv2 and others are published; with a probe it is a receiver."""
    folder = save(caches / "saved", kind)
    without("classifier", folder)
    loaded = load_pretrained(ModelSource.parse(f"hf:{folder}"))
    assert loaded.classes == 0
    assert loaded.labels is None or len(loaded.labels) == 0
    with torch.no_grad():
        features = loaded.module(torch.zeros(2, 3, 64, 64)).logits
    options = {"pretrained": True, "dataset": f"imagefolder:{photos}", "root": caches / "root"}
    definition, record = fastsitch.add("net", f"hf:{folder}", head="probe", **options)
    assert record is not None
    assert record.accuracy is not None
    assert definition.features is not None
    network = load_network(next((caches / "root" / "models").iterdir()), NetworkName("net"))
    with torch.no_grad():
        assert network.chain(torch.zeros(2, 3, 64, 64)).shape == (2, 3)
    assert features.flatten(1).shape[1] >= 32


def test_what_is_not_in_the_cache_is_named(caches: Path) -> None:
    with pytest.raises(NetworkError, match=rf"config.json of hf.co/no/such is not in {caches}/hub, and HF_HUB_OFFLINE"):
        load_pretrained(ModelSource.parse("hf:no/such"))
    with pytest.raises(NetworkError, match="hf:no/such is a published network: add it with pretrained=True"):
        ModelSource.parse("hf:no/such").build(3, (3, 64, 64))


def test_a_resolution_needs_a_network_that_takes_it(caches: Path) -> None:
    convolutions = ModelSource.parse(f"hf:{save(caches / 'resnet', 'resnet')}")
    loaded = load_pretrained(convolutions, (96, 80))
    assert loaded.input_shape == (3, 96, 80)
    assert loaded.preprocessing.resize == (109, 91)
    with pytest.raises(NetworkError, match="takes images of one size: leave out resolution"):
        load_pretrained(ModelSource.parse(f"hf:{save(caches / 'vit', 'vit')}"), (96, 96))


@pytest.mark.parametrize(
    "content",
    [
        {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 96}, "crop_size": 80},
        {"image_processor_type": "CLIPImageProcessor", "size": 96, "crop_size": 96},
        {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}},
        {"image_processor_type": "LevitImageProcessor", "size": {"shortest_edge": 96}, "crop_size": 96},
        {"image_processor_type": "PoolFormerImageProcessor", "size": {"shortest_edge": 90}, "crop_size": 90},
        {"image_processor_type": "PvtImageProcessor", "size": {"height": 64, "width": 96}},
        {"image_processor_type": "SegformerImageProcessor", "size": {"height": 64, "width": 64}, "resample": 1},
        {"image_processor_type": "SiglipImageProcessor", "size": {"height": 64, "width": 64}},
        {
            "image_processor_type": "EfficientNetImageProcessor",
            "size": 80,
            "rescale_offset": True,
            "rescale_factor": 1 / 127.5,
        },
        {"image_processor_type": "ViTImageProcessor", "size": 64, "do_normalize": False, "resample": 0},
        {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 64}, "crop_size": 80},
    ],
    ids=lambda content: str(content["image_processor_type"]),
)
def test_pixels_are_those_of_the_processor(tmp_path: Path, content: dict[str, Any]) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    preprocessing, normalisation = processor_preprocessing(tmp_path, "net", None)
    generator = torch.Generator().manual_seed(0)
    for height, width in ((331, 222), (97, 98), (64, 301)):
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        image = Image.fromarray(pixels.numpy())
        expected = processor(image, return_tensors="pt")["pixel_values"][0]
        shown = normalisation.apply(preprocessing.apply(pixels[None]))[0]
        assert (shown - expected).abs().max() < 1e-6, (height, width)
