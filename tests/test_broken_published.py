"""Files behind pretrained networks that libraries cannot load: named, with what to do, and never run."""

import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torchvision import models

from fastsitch.errors import NetworkError
from fastsitch.networks.model_source import ModelSource
from fastsitch.networks.pretrained_network import load_pretrained
from tests.conftest import Command
from tests.test_pretrained import caches, in_torch_hub, on_the_hub, photos
from tests.test_transformers import save

__all__ = ["caches", "photos"]

AGAIN = {False: "put the whole file there again", True: "remove it, and it is downloaded again"}


class Trap:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("sprung",))


def local_timm(caches: Path) -> tuple[str, Path]:
    module = timm.create_model("resnet10t", pretrained=False, num_classes=3)
    folder = caches / "saved"
    folder.mkdir()
    save_file(module.state_dict(), str(folder / "model.safetensors"))
    config = {"architecture": "resnet10t", "num_classes": 3, "pretrained_cfg": {"input_size": [3, 64, 64]}}
    (folder / "config.json").write_text(json.dumps(config))
    return f"timm:local-dir:{folder}", folder / "model.safetensors"


def cached_timm(caches: Path) -> tuple[str, Path]:
    module = timm.create_model("resnet10t", pretrained=False)
    return "timm:resnet10t", on_the_hub(caches, timm.get_pretrained_cfg("resnet10t").hf_hub_id, module)


def cached_torchvision(caches: Path) -> tuple[str, Path]:
    weights = models.MNASNet0_5_Weights.DEFAULT
    return "torchvision:mnasnet0_5", in_torch_hub(caches, weights.url, models.mnasnet0_5())


def local_transformers(caches: Path) -> tuple[str, Path]:
    folder = save(caches / "saved", "vit")
    return f"hf:{folder}", folder / "model.safetensors"


PLACES: list[tuple[Callable[[Path], tuple[str, Path]], bool]] = [
    (local_timm, False),
    (cached_timm, True),
    (cached_torchvision, True),
    (local_transformers, False),
]


@pytest.mark.parametrize(("place", "published"), PLACES)
def test_half_a_file_is_named(place: Callable[[Path], tuple[str, Path]], published: bool, caches: Path) -> None:
    source, path = place(caches)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    line = rf"^{re.escape(str(path))} holds no weights that can be read safely .*; {AGAIN[published]}$"
    with pytest.raises(NetworkError, match=line):
        load_pretrained(ModelSource.parse(source))


@pytest.mark.parametrize(("place", "published"), PLACES[:3])
def test_weights_of_another_network_are_named(
    place: Callable[[Path], tuple[str, Path]], published: bool, caches: Path
) -> None:
    source, path = place(caches)
    other = {"layers.0.weight": torch.ones(3, 3)}
    if path.suffix == ".pth":
        torch.save(other, path)
    else:
        save_file(other, str(path), metadata={"format": "pt"})
    remedy = (
        AGAIN[True] if published else r"put those there that belong to the config\.json beside them, or correct that"
    )
    line = rf"^{re.escape(str(path))} does not hold weights of (resnet10t|mnasnet0_5) \(.*\): {remedy}$"
    with pytest.raises(NetworkError, match=line):
        load_pretrained(ModelSource.parse(source))


@pytest.mark.parametrize("place", [local_timm, local_transformers])
def test_what_would_be_run_comes_with_its_conversion(
    place: Callable[[Path], tuple[str, Path]],
    caches: Path,
    photos: Path,
    run_cli: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, path = place(caches)
    weights = load_file(path)
    path.unlink()
    path = path.with_name("pytorch_model.bin")
    torch.save({"state_dict": weights, "trap": Trap()}, path)
    ended = run_cli("add", "net", "--from", source, "--pretrained", "--dataset", f"imagefolder:{photos}")
    assert ended.returncode == 2
    first, code, last = ended.stderr.strip().splitlines()[-3:]
    assert f"{path} holds more than tensors (posix.mkdir), which is never unpickled: convert it" in first
    assert last.strip() == f"mv weights.pt {path}"
    assert not list(caches.rglob("sprung"))
    monkeypatch.chdir(caches)
    exec(shlex.split(code)[2], {})
    (caches / "weights.pt").rename(path)
    load_pretrained(ModelSource.parse(source))


def test_a_configuration_that_builds_nothing_is_not_the_fault_of_the_weights(caches: Path) -> None:
    source, path = local_timm(caches)
    config = json.loads((path.parent / "config.json").read_text())
    (path.parent / "config.json").write_text(json.dumps({**config, "model_args": {"no_such": 1}}))
    with pytest.raises(NetworkError, match=r"cannot be built: TypeError .*no_such"):
        load_pretrained(ModelSource.parse(source))
    path.unlink()
    (path.parent / "config.json").write_text(json.dumps(config))
    with pytest.raises(NetworkError, match=r"saved has no weights: expected model\.safetensors"):
        load_pretrained(ModelSource.parse(source))
