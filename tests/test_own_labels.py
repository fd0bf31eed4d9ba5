"""Outputs that a network's own configuration names; and those that a file says by hand."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

import fastsitch
from fastsitch.errors import NetworkError
from fastsitch.networks.class_names import matched_outputs, read_class_outputs
from fastsitch.networks.model_source import ModelSource
from fastsitch.networks.pretrained_network import load_pretrained
from tests.conftest import Command

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture
def rgb(tmp_path: Path) -> Path:
    return coloured(tmp_path / "rgb", {name: name for name in COLOURS})


def coloured(folder: Path, names: dict[str, str]) -> Path:
    """Images of a colour in folders of other names."""
    for split in ("train", "test"):
        for name, colour in names.items():
            (folder / split / name).mkdir(parents=True)
            for k in range(2):
                Image.new("RGB", (32, 32), COLOURS[colour]).save(folder / split / name / f"{k}.png")
    return folder


def saved(folder: Path, outputs: int = 3, **config: Any) -> str:
    """A network whose first outputs are red, green and blue, with what its configuration says."""
    torch.manual_seed(0)
    module = timm.create_model("test_resnet", num_classes=outputs).eval()
    x = torch.stack([torch.tensor(colour) for colour in COLOURS.values()]) / 255
    x = (x - torch.tensor(module.pretrained_cfg["mean"])) / torch.tensor(module.pretrained_cfg["std"])
    with torch.no_grad():
        z = module.forward_head(module.forward_features(x[:, :, None, None].expand(-1, -1, 160, 160)), pre_logits=True)
        head = module.get_classifier()
        head.weight.zero_()
        head.bias.fill_(-1)
        centred = z - z.mean(0)
        head.weight[:3] = torch.linalg.pinv(centred).T
        head.bias[:3] = -head.weight[:3] @ z.mean(0)
    timm.models.save_for_hf(module, str(folder), model_config=config, safe_serialization=True)
    return f"timm:local-dir:{folder}"


def added(source: str, data: Path, root: Path, **options: Any) -> tuple[Any, float]:
    definition, record = fastsitch.add(
        "net", source, pretrained=True, dataset=f"imagefolder:{data}", root=root, **options
    )
    assert record is not None
    assert record.accuracy is not None
    return definition.class_outputs, record.accuracy


@pytest.mark.parametrize(
    "config",
    [
        {"label_names": ["red", "green", "blue"]},
        {"label_names": {"2": "blue", "0": "red", "1": "green"}},
        {"label_names": ["c1", "c2", "c3"], "label_descriptions": {"c1": "red", "c2": "green, leaves", "c3": "Blue"}},
        {"labels": ["red", "green", "blue"]},
        {"label_names": ["red", "green", "blue", "of no output"]},
        {"outputs": 5, "label_names": ["red", "green", "blue"]},
        {"outputs": 1000, "label_names": {"1": "green", "0": "red", "2": "blue"}},
        {"outputs": 1000, "label_names": ["red", "green", "blue", *(f"colour {k}" for k in range(997))]},
    ],
)
def test_outputs_are_matched_by_the_names_in_a_timm_configuration(
    rgb: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    assert added(saved(tmp_path / "m", **config), rgb, tmp_path / "root") == ((2, 1, 0), 1.0)


def test_names_in_a_repository_of_the_hub(rgb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--colours"
    saved(repository / "snapshots" / revision, label_names=["red", "green", "blue"])
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    assert added("timm:hf-hub:someone/colours", rgb, tmp_path / "root") == ((2, 1, 0), 1.0)


def test_folders_with_other_names_than_the_outputs_are_refused(tmp_path: Path, run_cli: Command) -> None:
    """Also as many as there are outputs: nothing says that their order is that of the outputs."""
    synsets = coloured(tmp_path / "photos", {"n01440764": "red", "n02102040": "green", "n03028079": "blue"})
    few = saved(tmp_path / "few", label_names=["red", "green", "blue"])
    many = saved(tmp_path / "many", 1000, label_names=[f"colour {k}" for k in range(1000)])
    for source, outputs in ((few, "3 outputs, such as red or blue, and"), (many, "1000 outputs, such as colour 0 or")):
        where = ["--dataset", f"imagefolder:{synsets}", "--root", tmp_path / "root"]
        ended = run_cli("add", "net", "--from", source, "--pretrained", *where)
        assert ended.returncode == 2, ended.stdout
        said = " ".join(ended.stderr.split())
        assert outputs in said
        assert "whose names are not those of its outputs: say which is which in a file for --classes-from" in said
    file = tmp_path / "classes.csv"
    file.write_text("n01440764,red\nn02102040,1\nn03028079,blue\n")
    assert added(few, synsets, tmp_path / "root", classes_from=file) == (None, 1.0)


@pytest.mark.parametrize(
    ("config", "guessed"),
    [
        ({}, True),
        ({"dataset": "imagenet-1k"}, True),
        ({"dataset": "timm/in1k-wds"}, True),
        ({"dataset": "food-1000"}, None),
        ({"datasets": ["inat-birds"]}, None),
        ({"label_names": ["a", *map(str, range(999))]}, False),
        ({"label_names": timm.data.ImageNetInfo().label_names()}, False),
    ],
)
def test_a_thousand_outputs_without_names_are_those_of_imagenet_unless_another_is_named(
    tmp_path: Path, config: dict[str, Any], guessed: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        labels = load_pretrained(ModelSource.parse(saved(tmp_path / "m", 1000, **config))).labels
    assert (labels is None) == (guessed is None)
    assert ("does not name its 1000 outputs: they are taken for those of imagenet-1k" in caplog.text) == bool(guessed)
    if labels is not None:
        assert labels.guessed == guessed
        assert ("tench" in labels.names[0]) == ("a" not in config.get("label_names", []))


@pytest.mark.parametrize("names", ["red", {"x": "red"}, {"-1": "red"}, {"1": "red", "01": "green"}, 7])
def test_names_that_cannot_be_read_are_refused(names: Any, tmp_path: Path) -> None:
    source = saved(tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "label_names": names}))
    with pytest.raises(NetworkError, match="label_names of timm:local-dir:.* cannot be read .*: expected a list of"):
        load_pretrained(ModelSource.parse(source))


def test_an_output_that_is_not_there_is_named() -> None:
    labels = (("n01440764", "tench"), (), ("n03028079", "church"))
    named = r"expected an index from 0 to 2, or a name such as n01440764 or church"
    for wanted in ("1000", "3", "-1", "nosuch", "9" * 9999):
        line = rf"says that n01440764 is the output {wanted[:60]}, which net does not have: {named}$"
        with pytest.raises(NetworkError, match=line):
            matched_outputs(["n01440764"], labels, {"n01440764": wanted}, "net")
    assert matched_outputs(["a", "b"], labels, {"a": "1", "b": "02"}, "net") == (1, 2)
    with pytest.raises(NetworkError, match=r"the output x, which net does not have: expected an index from 0 to 1$"):
        matched_outputs(["a"], (("0",), ("1",)), {"a": "x"}, "net")


def test_a_byte_order_mark_is_no_part_of_a_class(tmp_path: Path) -> None:
    file = tmp_path / "classes.csv"
    file.write_bytes("red,0\r\ngreen,1\r\n".encode("utf-8-sig"))
    assert read_class_outputs(file) == {"red": "0", "green": "1"}
