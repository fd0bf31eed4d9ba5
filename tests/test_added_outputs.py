"""Networks that return more than their logits, or take images of one channel, from the command line."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import fastsitch
from fastsitch.data import Dataset, Split
from fastsitch.data.grey import grey
from fastsitch.networks.model_source import ModelSource
from tests.conftest import Command

FILE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, channels, classes, wrap):
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(channels, 4, 4, 4), nn.Conv2d(4, 6, 2, 2), nn.Linear(6, classes)
        self.wrap = wrap

    def forward(self, x):
        y = torch.relu(self.body(torch.relu(self.stem(x)))).mean((2, 3))
        logits = self.head(y)
        return self.wrap(y, logits)


def several(classes):
    return Net(3, classes, lambda y, logits: {"features": y, "scores": logits})


def wrapped(classes):
    return nn.DataParallel(Net(3, classes, lambda y, logits: logits))


def grey(classes):
    return Net(1, classes, lambda y, logits: logits)


def adapts(classes, input_shape):
    return Net(input_shape[0], classes, lambda y, logits: logits)
"""


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    path = tmp_path / "several_nets.py"
    path.write_text(FILE)
    return path


def definition(tmp_path: Path, name: str) -> dict[str, object]:
    (path,) = (tmp_path / "work").rglob(f"networks/*/{name}.json")
    content: dict[str, object] = json.loads(path.read_text())["definition"]
    return content


def test_logits_are_chosen_recorded_and_used(nets: Path, small_npz: Path, run_cli: Command, tmp_path: Path) -> None:
    source, data = f"{nets}:several", f"npz:{small_npz}"
    found = run_cli("add", "found", "--from", source, "--dataset", data)
    assert found.returncode == 0, found.stderr
    # the first with one output per class
    assert definition(tmp_path, "found")["output"] == "scores"
    wrong = run_cli("add", "net", "--from", source, "--dataset", data, "--output", "features")
    assert wrong.returncode == 2
    assert "gives (6,) outputs per image: expected 10" in wrong.stderr
    unknown = run_cli("add", "net", "--from", source, "--dataset", data, "--output", "logits")
    assert unknown.returncode == 2
    assert "--output logits: expected a part of what the network returns, a dict of features (2, 6)" in unknown.stderr
    weights = {
        f"{key}": tensor for key, tensor in ModelSource.parse(source).build(10, (3, 32, 32)).state_dict().items()
    }
    save_file(weights, tmp_path / "weights.safetensors")
    added = run_cli(
        *("add", "net", "--from", source, "--dataset", data, "--output", "scores"),
        *("--weights", tmp_path / "weights.safetensors"),
    )
    assert added.returncode == 0, added.stderr
    assert definition(tmp_path, "net")["output"] == "scores"
    trained = run_cli("train", "net@1", "--dataset", data, "--epochs", "1")
    assert trained.returncode == 0, trained.stderr
    options = ["--batch-size", "16", "--epochs", "1", "--dataset", data]
    swept = run_cli("sweep", "--senders", "net", "--receivers", "net@1", *options)
    assert swept.returncode == 0, swept.stderr
    plain = run_cli("add", "plain", "--from", f"{nets}:wrapped", "--dataset", data)
    assert plain.returncode == 0, plain.stderr
    assert "Net is taken out of DataParallel" in plain.stderr
    # as definitions were before there was a choice
    assert "output" not in definition(tmp_path, "plain")


def test_networks_of_one_channel_see_grey(nets: Path, small_npz: Path, run_cli: Command, tmp_path: Path) -> None:
    data = f"npz:{small_npz}"
    for name, factory, options in (
        ("found", "grey", ()),
        ("said", "adapts", ("--channels", "1", "--mean", "0.3", "--std", "0.2")),
    ):
        added = run_cli("add", name, "--from", f"{nets}:{factory}", "--dataset", data, *options)
        assert added.returncode == 0, added.stderr
        assert "images 1x32x32" in added.stdout
        assert definition(tmp_path, name)["input_shape"] == [1, 32, 32]
    assert definition(tmp_path, "said")["normalisation"] == {"mean": [0.3], "std": [0.2]}
    assert run_cli("train", "found", "said", "--dataset", data, "--epochs", "1").returncode == 0
    options = ["--batch-size", "16", "--epochs", "1", "--dataset", data, "--run", "grey"]
    swept = run_cli("sweep", "--senders", "found", "--receivers", "said", *options)
    assert swept.returncode == 0, swept.stderr
    shown = run_cli("images", "grey", "--count", "1")
    assert shown.returncode == 0, shown.stderr
    for arguments, message in (
        (("--from", f"{nets}:adapts", "--channels", "2"), "--channels 2: expected 3, or 1 for grey images"),
        (("--from", f"{nets}:several", "--channels", "1"), "cannot cut a Net: it does not run on images (1, 32, 32)"),
        (
            ("--from", f"{nets}:grey", "--mean", "0.1,0.2,0.3", "--std", "0.2"),
            "expected one number of each for a network that sees images in grey",
        ),
    ):
        refused = run_cli("add", "other", "--dataset", data, *arguments)
        assert refused.returncode == 2, refused.stderr
        assert message in refused.stderr
        assert not list((tmp_path / "work").rglob("other*"))


def test_grey_is_what_pillow_makes_of_colours(fashion: Dataset) -> None:
    colours = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for image, found in zip(colours, grey(colours), strict=True):
        expected = torch.frombuffer(bytearray(Image.fromarray(image.numpy()).convert("L").tobytes()), dtype=torch.uint8)
        assert torch.equal(found.flatten(), expected)
    some: Tensor = fashion.train.images[:9]
    assert torch.equal(grey(some), some[..., :1])
    assert fashion.normalisation_for(1).mean == fashion.normalisation.mean[:1]
    coloured = Dataset("colours", Split(colours, torch.zeros(2)), Split(colours, torch.zeros(2)), 1)
    assert len(coloured.normalisation_for(1).std) == 1
    assert fastsitch.Transform(fashion.normalisation_for(1), grey=True).apply(some).shape == (9, 1, 32, 32)
