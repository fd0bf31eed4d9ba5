"""Folders of transformers as they lie around: whole processors, shards of pickles, towers; types built for any size."""

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, CLIPImageProcessorPil, CLIPVisionModelWithProjection

import fastsitch
from fastsitch.errors import NetworkError
from fastsitch.network_names import NetworkName
from fastsitch.networks.checkpoint import load_network
from fastsitch.networks.model_source import ModelSource
from fastsitch.networks.pretrained_network import load_pretrained
from fastsitch.networks.transformers_network import build_classifier
from tests.conftest import Command
from tests.test_pretrained import caches, photos
from tests.test_transformers import PROCESSORS, SMALL, in_the_cache, save

__all__ = ["caches", "photos"]

TOWERS = ("clip_vision_model", "siglip_vision_model", "dinov3_vit")


class Trap:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("sprung",))


def as_whole_processor(folder: Path) -> None:
    """As ``CLIPProcessor.save_pretrained`` writes it."""
    content = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    whole = {"image_processor": content, "processor_class": "CLIPProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(whole))


def save_tower(folder: Path, kind: str) -> Any:
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **SMALL["vit"])).eval()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS["vit"]))
    return model


def in_pickled_shards(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {key: f"pytorch_model-{1 + number % 2}.bin" for number, key in enumerate(weights)}
    for name in set(places.values()):
        torch.save({key: weights[key] for key, place in places.items() if place == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_a_whole_processor_has_that_of_the_images(caches: Path) -> None:
    expected = load_pretrained(ModelSource.parse(f"hf:{save(caches / 'saved', 'vit')}"))
    as_whole_processor(caches / "saved")
    found = load_pretrained(ModelSource.parse(f"hf:{caches / 'saved'}"))
    as_whole_processor(in_the_cache(caches, "vit", "someone/whole"))
    published = load_pretrained(ModelSource.parse("hf:someone/whole"))
    for loaded in (found, published):
        assert (loaded.preprocessing, loaded.normalisation) == (expected.preprocessing, expected.normalisation)
    CLIPImageProcessorPil(size={"shortest_edge": 72}, crop_size=64).save_pretrained(caches / "saved")
    again = load_pretrained(ModelSource.parse(f"hf:{caches / 'saved'}"))
    assert again.preprocessing == expected.preprocessing


def test_a_whole_processor_without_images_is_refused(caches: Path) -> None:
    folder = save(caches / "saved", "vit")
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    with pytest.raises(NetworkError, match=r"saved has no image processor that can be read .*with an image_processor"):
        load_pretrained(ModelSource.parse(f"hf:{folder}"))


def test_shards_of_pickles_are_read_and_not_run(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(caches / "saved", "vit")
    whole = load_pretrained(ModelSource.parse(f"hf:{folder}")).module.state_dict()
    in_pickled_shards(folder)
    loaded = load_pretrained(ModelSource.parse(f"hf:{folder}"))
    assert loaded.provenance["file"] == "pytorch_model-1.bin"
    found = loaded.module.state_dict()
    assert found.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[key]) for key, tensor in found.items())
    monkeypatch.chdir(caches)
    (folder / "pytorch_model-2.bin").write_bytes(pickle.dumps({"trap": Trap()}, 2))
    with pytest.raises(NetworkError):
        load_pretrained(ModelSource.parse(f"hf:{folder}"))
    assert not Path("sprung").exists()


@pytest.mark.parametrize("kind", TOWERS)
def test_towers_are_networks_without_a_classifier(caches: Path, photos: Path, kind: str) -> None:
    theirs = save_tower(caches / "saved", kind)
    options: dict[str, Any] = {"pretrained": True, "dataset": f"imagefolder:{photos}", "root": caches / "root"}
    definition, record = fastsitch.add("tower", f"hf:{caches / 'saved'}", **options)
    assert record is not None
    assert definition.source.text == f"hf:{kind}"
    assert definition.features is not None
    assert definition.features.width == 48
    network = load_network(next((caches / "root" / "models").iterdir()), NetworkName("tower"))
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(network.chain(x), theirs(x).pooler_output)
    assert len(network.chain.positions) >= 3
    fastsitch.add("probed", f"hf:{caches / 'saved'}", head="probe", **options)


def test_a_tower_with_a_projection_is_the_tower(caches: Path) -> None:
    save_tower(caches / "saved", "clip_vision_model")
    expected = load_pretrained(ModelSource.parse(f"hf:{caches / 'saved'}")).module.state_dict()
    projected = CLIPVisionModelWithProjection(AutoConfig.for_model("clip_vision_model", **SMALL["vit"]))
    projected.vision_model.load_state_dict(expected)
    projected.save_pretrained(caches / "saved")
    loaded = load_pretrained(ModelSource.parse(f"hf:{caches / 'saved'}"))
    assert loaded.classes == 0
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.module.state_dict().items())


@pytest.mark.parametrize(("shape", "size"), [((3, 32, 32), 32), ((3, 32, 48), (32, 48)), ((1, 32, 32), 32)])
def test_a_type_is_built_for_the_images(shape: tuple[int, int, int], size: Any) -> None:
    module = build_classifier("vit", 4, {}, shape)
    assert module.config.image_size == size
    with torch.no_grad():
        assert module(torch.zeros(1, *shape)).logits.shape == (1, 4)
    assert build_classifier("vit", 4, SMALL["vit"], shape).config.image_size == 64


def test_a_type_that_cannot_be_so_small_names_the_resolution(few: str, run_cli: Command) -> None:
    ended = run_cli("add", "net", "--from", "hf:swin", "--dataset", few)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert re.search(r"does not run on images \(3, 32, 32\) .*; give --resolution with a size", ended.stderr)
