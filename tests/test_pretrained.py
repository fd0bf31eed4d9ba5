"""Networks with published weights: out of the libraries' own caches, offline, with their own preprocessing."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from torchvision import models

import fastsitch
from fastsitch.data import Preprocessing
from fastsitch.data.preprocessing import pixels
from fastsitch.errors import ConfigError, NetworkError
from fastsitch.network_names import NetworkName
from fastsitch.networks.checkpoint import load_network
from fastsitch.networks.class_names import matched_outputs, read_class_outputs
from fastsitch.networks.model_source import ModelSource
from fastsitch.networks.pretrained_network import load_pretrained, timm_preprocessing, torchvision_preprocessing
from tests.conftest import Command

REVISION = "0123456789abcdef0123456789abcdef01234567"
SYNSETS = {"n01440764": "tench", "n02102040": "english springer", "n03028079": "church"}


def drawn(seed: int, height: int, width: int) -> Image.Image:
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (max(2, height // 16), max(2, width // 16), 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches of the libraries, and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """JPEGs of several sizes in folders named by synsets."""
    folder = tmp_path / "photos"
    for split in ("train", "test"):
        for label, name in enumerate(SYNSETS):
            (folder / split / name).mkdir(parents=True)
            for k in range(4):
                picture = drawn(100 * label + 10 * k + len(split), 90 + 13 * k, 120 - 11 * label)
                picture.save(folder / split / name / f"{k}.jpg", quality=92)
    return folder


def on_the_hub(caches: Path, repository: str, module: torch.nn.Module, config: dict[str, Any] | None = None) -> Path:
    """Weights as a download leaves them."""
    folder = caches / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(REVISION)
    weights = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    save_file(weights, str(snapshot / "model.safetensors"), metadata={"format": "pt"})
    if config is not None:
        (snapshot / "config.json").write_text(json.dumps(config))
    return snapshot / "model.safetensors"


def in_torch_hub(caches: Path, url: str, module: torch.nn.Module) -> Path:
    path = caches / "torch" / "hub" / "checkpoints" / url.rpartition("/")[2]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(module.state_dict(), path)
    return path


def test_pixels_are_those_of_timm() -> None:
    """Every way in which timm crops, on upright, flat and small images."""
    cases: list[dict[str, Any]] = [
        {"input_size": (3, 48, 48), "crop_pct": 0.875, "interpolation": "bicubic", "crop_mode": "center"},
        {"input_size": (3, 48, 48), "crop_pct": 0.95, "interpolation": "bilinear", "crop_mode": "center"},
        {"input_size": (3, 48, 64), "crop_pct": 0.9, "interpolation": "bicubic", "crop_mode": "center"},
        {"input_size": (3, 48, 48), "crop_pct": 1.0, "interpolation": "bicubic", "crop_mode": "squash"},
        {"input_size": (3, 40, 56), "crop_pct": 0.9, "interpolation": "lanczos", "crop_mode": "squash"},
        {"input_size": (3, 48, 48), "crop_pct": 1.0, "interpolation": "bilinear", "crop_mode": "border"},
        {"input_size": (3, 48, 64), "crop_pct": 0.9, "interpolation": "nearest", "crop_mode": "border"},
    ]
    for case in cases:
        data = resolve_data_config({}, pretrained_cfg=case)
        theirs = create_transform(**data, is_training=False, normalize=False)
        ours = timm_preprocessing(data, *case["input_size"][1:])
        assert Preprocessing.from_dict(json.loads(json.dumps(ours.to_dict()))) == ours
        for height, width in ((90, 121), (131, 77), (48, 48), (20, 33)):
            picture = drawn(height, height, width)
            expected = theirs(picture).permute(1, 2, 0)
            assert torch.equal(pixels(ours.shown(picture)), expected), (case, height, width)


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16@IMAGENET1K_SWAG_LINEAR_V1", "efficientnet_b0", "swin_t"])
def test_pixels_are_those_of_torchvision(name: str) -> None:
    base, _, tag = name.partition("@")
    weights = models.get_model_weights(base)[tag or "DEFAULT"]
    theirs = weights.transforms()
    ours, normalisation = torchvision_preprocessing(theirs, None)
    for height, width in ((300, 421), (231, 177), (224, 224)):
        picture = drawn(height, height, width)
        shown = pixels(ours.shown(picture))
        assert torch.equal(normalisation.apply(shown[None])[0], theirs(picture)), (name, height, width)


@pytest.mark.parametrize(
    "name", ["resnet18.a1_in1k", "vit_tiny_patch16_224.augreg_in21k_ft_in1k", "mobilenetv3_small_050"]
)
def test_a_timm_network_gives_its_librarys_logits(caches: Path, photos: Path, name: str) -> None:
    torch.manual_seed(1)
    module = timm.create_model(name, pretrained=False)
    hub_id = timm.get_pretrained_cfg(name).hf_hub_id
    path = on_the_hub(caches, hub_id, module)
    theirs = timm.create_model(name, pretrained=True).eval()
    transform = create_transform(**resolve_data_config({}, model=theirs), is_training=False)
    dataset = f"imagefolder:{photos}"
    definition, record = fastsitch.add("net", f"timm:{name}", pretrained=True, dataset=dataset, root=caches / "root")
    assert record is not None
    assert definition.class_outputs == tuple(range_of(SYNSETS))
    known = record.recipe["pretrained"]
    assert known["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert known["revision"] == REVISION
    assert known["licence"] == "apache-2.0"
    assert known["name"] == f"timm:{name}"
    assert_same_logits(caches / "root", photos, theirs, transform)


def range_of(synsets: dict[str, str]) -> list[int]:
    names = timm.data.ImageNetInfo().label_names()
    return [names.index(name) for name in synsets]


def assert_same_logits(root: Path, photos: Path, theirs: torch.nn.Module, transform: Any) -> None:
    """Of the saved network, as sweeps load it, on the same files."""
    dataset = fastsitch.load_dataset(f"imagefolder:{photos}")
    network = load_network(next((root / "models").iterdir()), NetworkName("net"))
    files = sorted((photos / "test").rglob("*.jpg"))
    with torch.no_grad():
        x = network.record.transform.apply(dataset.test.images)
        expected_x = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
        assert torch.equal(x, expected_x)
        logits = network.chain(x)
        expected = theirs(x)[:, list(network.record.definition.class_outputs)]  # type: ignore[union-attr,arg-type]
    assert torch.equal(logits, expected)


@pytest.mark.parametrize(
    "name",
    ["resnet18@IMAGENET1K_V1", "mobilenet_v3_small", "mnasnet0_5", pytest.param("googlenet", marks=pytest.mark.slow)],
)
def test_a_torchvision_network_gives_its_librarys_logits(caches: Path, photos: Path, name: str) -> None:
    base, _, tag = name.partition("@")
    weights = models.get_model_weights(base)[tag or "DEFAULT"]
    torch.manual_seed(2)
    options = {"init_weights": False} if base == "googlenet" else {}
    in_torch_hub(caches, weights.url, models.get_model(base, weights=None, **options))
    theirs = models.get_model(base, weights=weights).eval()
    dataset = f"imagefolder:{photos}"
    _, record = fastsitch.add("net", f"torchvision:{name}", pretrained=True, dataset=dataset, root=caches / "root")
    assert record is not None
    assert record.recipe["pretrained"]["name"] == f"torchvision:{base}@{weights.name}"
    assert_same_logits(caches / "root", photos, theirs, weights.transforms())


def test_folders_that_timm_saved(caches: Path, photos: Path) -> None:
    """A configuration decides on the architecture and its arguments; the folder may be gone later."""
    torch.manual_seed(3)
    module = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=3, img_size=64, depth=2)
    saved = caches / "saved"
    saved.mkdir()
    save_file(module.state_dict(), str(saved / "model.safetensors"))
    published = {**module.pretrained_cfg, "num_classes": 3, "input_size": (3, 64, 64), "license": "mit"}
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 3,
        "model_args": {"img_size": 64, "depth": 2, "in_chans": 3},
        "pretrained_cfg": published,
    }
    (saved / "config.json").write_text(json.dumps(config))
    source = f"timm:local-dir:{saved}"
    classes = caches / "classes.csv"
    classes.write_text("# class, output\nn01440764,2\nn02102040,0\n\nn03028079,1\n")
    definition, record = fastsitch.add(
        "net", source, pretrained=True, classes_from=classes, dataset=f"imagefolder:{photos}", root=caches / "root"
    )
    assert record is not None
    assert definition.class_outputs == (2, 0, 1)
    assert definition.input_shape == (3, 64, 64)
    assert record.recipe["pretrained"]["licence"] == "mit"
    (saved / "model.safetensors").unlink()
    transform = create_transform(**resolve_data_config({}, pretrained_cfg=published), is_training=False)
    assert_same_logits(caches / "root", photos, module.eval(), transform)


def test_repositories_of_the_hub(caches: Path, photos: Path) -> None:
    torch.manual_seed(4)
    module = timm.create_model("resnet10t", pretrained=False, num_classes=3)
    config = {
        "architecture": "resnet10t",
        "num_classes": 3,
        "pretrained_cfg": {
            "input_size": [3, 64, 64],
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "crop_mode": "center",
        },
    }
    on_the_hub(caches, "someone/birds", module, config)
    source = f"timm:hf-hub:someone/birds@{REVISION}"
    loaded = load_pretrained(ModelSource.parse(source))
    assert loaded.provenance["revision"] == REVISION
    assert all(torch.equal(loaded.module.state_dict()[key], value) for key, value in module.state_dict().items())
    dataset = f"imagefolder:{photos}"
    definition, _ = fastsitch.add("net", source, pretrained=True, dataset=dataset, root=caches / "root")
    assert definition.source.text == "timm:resnet10t"
    assert definition.class_outputs is None


def test_what_is_not_in_a_cache_is_named(caches: Path, photos: Path, run_cli: Command) -> None:
    refused = {
        "timm:resnet18.a1_in1k": r"model.safetensors or pytorch_model.bin of hf.co/timm/resnet18.a1_in1k is not in "
        rf"{caches}/hub, and HF_HUB_OFFLINE is set",
        "timm:hf-hub:no/such@v1": r"config.json of hf.co/no/such@v1 is not in",
        "torchvision:resnet18": rf"{caches}/torch/hub/checkpoints/resnet18-f37072fd.pth is missing and https://",
        "torchvision:resnet18@V9": r"torchvision:resnet18 has no weights V9: expected IMAGENET1K_V1",
        "timm:resnet18.no_such": r"timm has no weights resnet18.no_such: expected one of .*resnet18.a1_in1k",
        "timm:local-dir:/nowhere": r"/nowhere/config.json is missing: expected a configuration that timm saved",
        "timm:wrong:x": r"expected timm:NAME, timm:hf-hub:ORG/MODEL or timm:local-dir:PATH",
    }
    for source, line in refused.items():
        ended = run_cli(
            "add", "net", "--from", source, "--pretrained", "--dataset", f"imagefolder:{photos}", "--root", caches / "r"
        )
        assert ended.returncode == 2, ended.stderr
        assert len(ended.stderr.strip().splitlines()) <= 3
        assert re.search(line, ended.stderr.replace("\n", " ")), (source, ended.stderr)
    assert not list((caches / "r").rglob("*.json"))


def test_weights_that_need_more_than_tensors_are_not_loaded(caches: Path, photos: Path) -> None:
    weights = models.ResNet18_Weights.IMAGENET1K_V1
    path = caches / "torch" / "hub" / "checkpoints" / weights.url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": Path("/")}, path)
    with pytest.raises(
        NetworkError, match=r"(?s)resnet18-f37072fd\.pth holds more than tensors \(pathlib.*weights_only=False"
    ):
        load_pretrained(ModelSource.parse("torchvision:resnet18"))


def test_options_that_contradict_each_other(tmp_path: Path) -> None:
    for options, line in (
        ({"pretrained": True, "weights": tmp_path / "x.pt"}, "leave out weights"),
        ({"pretrained": True, "classes": 5}, "leave out classes"),
        ({"classes_from": tmp_path / "x"}, "classes_from is for networks with pretrained=True"),
    ):
        with pytest.raises(ConfigError, match=line):
            fastsitch.add("net", "timm:resnet10t", root=tmp_path, **options)  # type: ignore[arg-type]


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    labels = (("n01", "tench", "Tinca tinca"), ("n02", "crane"), ("n03", "crane"), ("n04", "great_white shark"))
    assert matched_outputs(["Tinca_tinca", "Great White-Shark"], labels, {}, "net") == (0, 3)
    assert matched_outputs(["n03", "tench"], labels, {}, "net") == (2, 0)
    assert matched_outputs(["mine", "tench"], labels, {"mine": "2"}, "net") == (2, 0)
    assert matched_outputs(["mine", "tench"], labels, {"mine": "n04"}, "net") == (3, 0)
    for classes, given, line in (
        (["crane", "tench"], {}, "several outputs named crane"),
        (["tench", "dodo"], {}, "no output named dodo"),
        (["tench", "n01"], {}, "tench, n01 are one output"),
        (["tench"], {"carp": "n01"}, "names carp: no such classes"),
    ):
        with pytest.raises(NetworkError, match=line):
            matched_outputs(classes, labels, given, "net")  # type: ignore[arg-type]
    # as ImageNet's classes are called on the hub, of which a few are not certain
    info = timm.data.ImageNetInfo()
    words = [info.index_to_description(index) for index in range(1000)]
    synsets = tuple((name, *words[index].split(", ")) for index, name in enumerate(info.label_names()))
    assert matched_outputs([*words[:517], "crane2", *words[518:]], synsets, {}, "net") == tuple(range(1000))
    assert matched_outputs([words[638], words[0]], synsets, {words[638]: "638"}, "net") == (638, 0)
    with pytest.raises(NetworkError, match="several outputs named missile, maillot, harp, crane, cardigan"):
        matched_outputs(words[::-1], synsets, {}, "net")
    file = tmp_path / "classes.tsv"
    file.write_text("a b\tn01\nc,d\t3\n")
    assert read_class_outputs(file) == {"a b": "n01", "c,d": "3"}
    for content in ("a\n", "a,1\na,2\n", ",1\n"):
        file.write_text(content)
        with pytest.raises(NetworkError, match=r"classes.tsv:\d: expected class,output"):
            read_class_outputs(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(NetworkError, match="is no text"):
        read_class_outputs(file)


def test_an_accuracy_near_chance_is_said(caches: Path, photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = timm.create_model("resnet10t", pretrained=False)
    for parameter in module.get_classifier().parameters():
        torch.nn.init.zeros_(parameter)
    on_the_hub(caches, timm.get_pretrained_cfg("resnet10t").hf_hub_id, module)
    with caplog.at_level("WARNING"):
        fastsitch.add("net", "timm:resnet10t", pretrained=True, dataset=f"imagefolder:{photos}", root=caches / "root")
    assert "near chance" in caplog.text


@pytest.fixture
def stitched(caches: Path, photos: Path) -> Path:
    for name, seed in (("resnet10t", 5), ("mobilenetv3_small_050", 6)):
        torch.manual_seed(seed)
        module = timm.create_model(name, pretrained=False)
        on_the_hub(caches, timm.get_pretrained_cfg(name).hf_hub_id, module)
        fastsitch.add(
            name.partition("_")[0], f"timm:{name}", pretrained=True, dataset=f"imagefolder:{photos}", root=caches / "r"
        )
    return caches / "r"


def test_images_of_several_sizes_are_stitched(stitched: Path) -> None:
    """Each network has its own preprocessing; stored, streamed and live sources see the same."""
    matrices = []
    for source in ("resident", "streamed", "live"):
        run = fastsitch.sweep(
            "resnet10t",
            "mobilenetv3",
            settings=("T2T", "R2T"),
            root=stitched,
            run=source,
            source=source,
            batch_size=4,
            epochs=1,
            positions="layer2.0,layer4.0,blocks.1.1",
            resample="bilinear",
            precision="fp32",
        )
        matrices.append(run.matrix("resnet10t", "mobilenetv3", "loss"))
        assert run.networks[NetworkName("resnet10t")].weights is not None
    np.testing.assert_array_equal(matrices[0], matrices[1])
    np.testing.assert_array_equal(matrices[0], matrices[2])


def test_small_resnets_want_images_of_one_size(photos: Path, tmp_path: Path, run_cli: Command) -> None:
    ended = run_cli("train", "R1111", "--dataset", f"imagefolder:{photos}", "--root", tmp_path)
    assert ended.returncode == 2
    assert "expected images of one size" in ended.stderr
    assert "DIR@SIDE" in ended.stderr
