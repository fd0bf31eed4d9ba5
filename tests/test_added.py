"""Custom, torchvision and timm networks: added under a name, with or without weights, and used like small ResNets."""

import json
import re
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

import fastsitch
from fastsitch.data import Dataset, load_dataset
from fastsitch.errors import ConfigError, NetworkError
from fastsitch.network_names import NetworkName
from fastsitch.networks.checkpoint import load_network
from fastsitch.root import Root
from tests.conftest import Command, save_npz
from tests.network_factories import small


@pytest.mark.slow
def test_an_added_network_is_trained_stored_stitched_and_listed_like_a_built_in_one(
    factory: Path, few: str, run_cli: Command, tmp_path: Path
) -> None:
    added = run_cli("add", "mine", "--from", f"{factory}:small", "--dataset", few)
    assert added.returncode == 0, added.stderr
    assert re.search(r"^ +1 +body\.0 +8x8x8 +map$", added.stdout, re.MULTILINE)
    assert "no weights yet; train it with" in added.stdout
    assert re.search(r"mine .* not trained, from .*network_factories\.py:small", run_cli("list").stdout)
    refused = run_cli("sweep", "--senders", "mine", "--receivers", "R1111", "--dataset", few)
    assert refused.returncode == 2
    assert "fastsitch train R1111 mine --dataset" in refused.stderr
    dry_run = run_cli(
        "sweep", "--senders", "mine", "--receivers", "R1111", "--dataset", few, "--batch-size", "16", "--dry-run"
    )
    assert dry_run.returncode == 0, dry_run.stderr
    assert "1 unit, 15 cells" in dry_run.stdout
    trained = run_cli("train", "mine", "mine@1", "R1111", "--width", "4", "--epochs", "1", "--dataset", few)
    assert trained.returncode == 0, trained.stderr
    assert re.search(r"^mine: test accuracy 0\.\d{4}, width 8, 1 epoch", trained.stdout)
    again = run_cli("train", "mine", "--epochs", "1", "--dataset", few)
    assert "mine is already trained" in again.stderr
    stored = run_cli("precompute", "mine@1")
    assert "mine@1: 3 positions" in stored.stdout
    options = ["--settings", "T2T,R2T,T2R", "--batch-size", "16", "--epochs", "1", "--run", "first"]
    swept = run_cli("sweep", "--senders", "mine,R1111", "--receivers", "mine,R1111", *options)
    assert swept.returncode == 0, swept.stderr
    assert run_cli("plot", "first", "--out", "maps").returncode == 0
    assert (tmp_path / "work" / "maps" / "mine--R1111.T2T.png").is_file()
    listed = run_cli("list").stdout
    assert re.search(r"^mine +npz:\S+ +8 +\d+x\d+ +0\.\d{4} +fast, 1 epoch$", listed, re.MULTILINE)
    run = fastsitch.open_run("first", root=tmp_path / "work" / "fastsitch-data")
    assert run.matrix("mine", "R1111").shape == (3, 5)
    first, control = (run.networks[NetworkName.parse(name)] for name in ("mine", "mine-random@0"))
    assert first.weights_hash != control.weights_hash
    # the same again: nothing is left to do
    again = run_cli("sweep", "--senders", "mine,R1111", "--receivers", "mine,R1111", *options)
    assert again.returncode == 0, again.stderr
    assert "run first is done already" in again.stderr


def test_an_identity_stitch_reproduces_an_added_network(factory: Path, few: str, tmp_path: Path) -> None:
    fastsitch.add("mine", f"{factory}:small", dataset=few, root=tmp_path)
    (record,) = fastsitch.train("mine", dataset=few, epochs=1, root=tmp_path)
    network = load_network(Root.at(tmp_path).models(few), NetworkName("mine"))
    assert network.record == record
    images = load_dataset(few, tmp_path)
    x = images.normalisation.apply(images.test.images)
    with torch.no_grad():
        logits = network.chain(x)
        for index, representation in enumerate(network.chain.representations(x)):
            assert torch.equal(network.chain.tail(representation, index), logits)
    assert (logits.argmax(1) == images.test.labels).float().mean().item() == pytest.approx(record.accuracy)


@pytest.mark.parametrize("form", ["safetensors", "state dict", "nested"])
def test_weights_from_a_file_give_the_network_that_had_them(form: str, factory: Path, few: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = small(10, (3, 32, 32)).eval()
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict() if form == "state dict" else {"epoch": 3, "state_dict": model.state_dict()}, path)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    definition, record = fastsitch.add(
        "mine", f"{factory}:small", weights=path, mean=mean, std=std, dataset=few, root=tmp_path
    )
    assert record is not None
    assert (record.normalisation.mean, record.normalisation.std) == (mean, std)
    images = load_dataset(few, tmp_path)
    network = load_network(Root.at(tmp_path).models(few), NetworkName("mine"))
    x = record.normalisation.apply(images.test.images)
    with torch.no_grad():
        assert torch.equal(network.chain(x), model(x))
        accuracy = (model(x).argmax(1) == images.test.labels).float().mean().item()
    assert record.accuracy == pytest.approx(accuracy)
    assert definition.positions == network.chain.positions
    # the same again is no change; other weights are one
    assert fastsitch.add("mine", f"{factory}:small", weights=path, mean=mean, std=std, dataset=few, root=tmp_path) == (
        definition,
        record,
    )
    other = tmp_path / "other.safetensors"
    save_file(small(10, (3, 32, 32)).state_dict(), other)
    options: dict[str, Any] = {"weights": other, "mean": mean, "std": std, "dataset": few, "root": tmp_path}
    with pytest.raises(NetworkError, match=r"mine already has other weights .* such as mine@1"):
        fastsitch.add("mine", f"{factory}:small", **options)
    with pytest.raises(NetworkError, match="mine has weights from a file .* use force=True to train it again"):
        fastsitch.train("mine", dataset=few, epochs=1, root=tmp_path)
    _, second = fastsitch.add("mine@1", f"{factory}:small", **options)
    assert second is not None
    assert second.weights_hash != record.weights_hash


def test_controls_are_initialised_by_the_networks_code_and_reproducible(
    factory: Path, few: str, tmp_path: Path
) -> None:
    fastsitch.add("mine", f"{factory}:small", dataset=few, root=tmp_path)
    fastsitch.train("mine", dataset=few, epochs=1, root=tmp_path)
    folder = Root.at(tmp_path).models(few)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first, again, other = (load_network(folder, NetworkName("mine", True, seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.record.weights_hash == again.record.weights_hash != other.record.weights_hash
    assert torch.equal(first.chain(torch.ones(1, 3, 32, 32)), again.chain(torch.ones(1, 3, 32, 32)))


def test_networks_of_torchvision_and_timm_are_added_by_name(tmp_path: Path, run_cli: Command) -> None:
    added = run_cli("add", "vit", "--from", "torchvision:vit_b_32", "--positions", "encoder.layers.*_[05]")
    assert added.returncode == 0, added.stderr
    assert re.search(r"0 +encoder\.layers\.encoder_layer_0 +2x768 +tokens, 1 before the grid", added.stdout)
    assert "images 3x32x32, on fashion-mini" in added.stdout
    pytest.importorskip("timm")
    definition, _ = fastsitch.add("tiny", "timm:resnet10t", root=tmp_path, positions="layer?.0")
    assert [position.name for position in definition.positions] == [f"layer{stage}.0" for stage in (1, 2, 3, 4)]
    assert definition.source.text == "timm:resnet10t"
    assert sum(definition.flops) > 1e6


MOBILE = "features.1,features.3,features.8"


@pytest.mark.slow
def test_three_families_are_stitched_with_each_other(few: str, run_cli: Command, tmp_path: Path) -> None:
    """Maps and tokens, with commands only; the transformer is that of docs/families/vit.py."""
    vit = Path(__file__).parents[1] / "docs" / "families" / "vit.py"
    names, data = "R1111,mobilenet,vit", ["--dataset", few]
    small = [*data, "--batch-size", "16", "--epochs", "0.2"]
    for line in (
        ["add", "mobilenet", "--from", "torchvision:mobilenet_v3_small", "--positions", MOBILE, *data],
        ["add", "vit", "--from", f"{vit}:small", *data],
        ["train", *names.split(","), "--width", "4", "--epochs", "1", *data],
        ["sweep", "--senders", names, "--receivers", names, "--run", "all", *small],
        ["sweep", "--senders", "vit", "--receivers", "mobilenet,vit", "--loss", "match", "--run", "matched", *small],
        ["export", "all", "--out", "out"],
        ["plot", "all", "--out", "out"],
    ):
        ended = run_cli(*line)
        assert ended.returncode == 0, (line, ended.stderr)
    out = tmp_path / "work" / "out"
    sizes = dict(zip(names.split(","), (5, 3, 5), strict=True))
    for (sender, i), (receiver, j) in product(sizes.items(), repeat=2):
        assert (out / f"{sender}--{receiver}.T2T.png").is_file()
        with np.load(out / f"{sender}--{receiver}.T2T.npz", allow_pickle=False) as matrices:
            assert matrices["accuracy"].shape == (i, j)
            assert (matrices["status"] == 1).all()
            assert np.isfinite(matrices["accuracy"]).all()
    matched = fastsitch.open_run("matched", root=tmp_path / "work" / "fastsitch-data")
    assert [shape for _, shape in matched.networks[NetworkName("vit")].positions] == [(64, 8, 8, 1)] * 5
    # a network matched to itself at the same position is left as it is
    assert abs(matched.matrix("vit", "vit", "accuracy_drop").diagonal()).max() < 0.05


def test_changed_files_changed_definitions_and_damage_are_noticed(factory: Path, few: str, tmp_path: Path) -> None:
    source = f"{factory}:small"
    fastsitch.add("mine", source, dataset=few, root=tmp_path)
    fastsitch.train("mine", dataset=few, epochs=1, root=tmp_path)
    with pytest.raises(
        NetworkError, match=r"mine is already registered for another network, .* \(different positions, flops\)"
    ):
        fastsitch.add("mine", source, dataset=few, positions="stem", root=tmp_path)
    factory.write_text(factory.read_text().replace("8, 4, stride=4", "8, 2, stride=2"))
    with pytest.raises(
        NetworkError, match=r"network_factories\.py has changed since the network was added .* force=True"
    ):
        fastsitch.precompute("mine", dataset=few, root=tmp_path)
    fastsitch.add("mine", source, dataset=few, root=tmp_path, force=True)
    with pytest.raises(NetworkError, match="mine was trained as another network"):
        fastsitch.train("mine", dataset=few, epochs=1, root=tmp_path)
    fastsitch.train("mine", dataset=few, epochs=1, root=tmp_path, force=True)
    assert load_network(Root.at(tmp_path).models(few), NetworkName("mine")).chain.positions[0].shape == (8, 16, 16)
    (file,) = tmp_path.glob("networks/*/mine.json")
    whole = file.read_text()
    content = json.loads(whole)
    content["definition"]["classes"] = 12
    for text, message in ((json.dumps(content), "was altered"), (whole[:50], "as the definition of a network")):
        file.write_text(text)
        with pytest.raises(NetworkError, match=message):
            fastsitch.train("mine@1", dataset=few, epochs=1, root=tmp_path)


def test_a_chain_from_segments_can_be_added(few: str, tmp_path: Path) -> None:
    path = tmp_path / "segments.py"
    path.write_text(
        "import torch\nfrom torch import nn\nfrom fastsitch import Chain\n\n\ndef chain(num_classes):\n"
        "    segments = [nn.Conv2d(3, 4, 4, stride=4), nn.ReLU(), nn.Flatten()]\n"
        "    names = ['conv', 'relu', 'flat']\n"
        "    return Chain.from_segments(segments, names, nn.Linear(256, num_classes), torch.zeros(1, 3, 32, 32))\n"
    )
    definition, _ = fastsitch.add("segmented", f"{path}:chain", dataset=few, root=tmp_path)
    assert [(position.name, position.layout) for position in definition.positions] == [
        ("conv", "map"),
        ("relu", "map"),
        ("flat", "vector"),
    ]
    with pytest.raises(ConfigError, match="returns a Chain, whose positions are fixed: leave out positions"):
        fastsitch.add("segmented2", f"{path}:chain", positions="conv", dataset=few, root=tmp_path)
    fastsitch.train("segmented", dataset=few, epochs=1, root=tmp_path)
    run = fastsitch.sweep("segmented", "segmented", dataset=few, batch_size=16, epochs=1, root=tmp_path)
    assert run.matrix("segmented", "segmented").shape == (3, 3)


def test_a_torchvision_network_and_its_weights_are_what_torchvision_makes(tmp_path: Path, fashion: Dataset) -> None:
    torch.manual_seed(1)
    model = torchvision.models.resnet18(num_classes=12).eval()
    torch.save(model.state_dict(), tmp_path / "resnet.pth")
    _, record = fastsitch.add(
        "r18",
        "torchvision:resnet18",
        weights=tmp_path / "resnet.pth",
        classes=12,
        root=tmp_path,
        dataset="fashion-mini",
    )
    assert record is not None
    chain = load_network(Root.at(tmp_path).models("fashion-mini"), NetworkName("r18")).chain
    x: Tensor = fashion.normalisation.apply(fashion.test.images[:5])
    with torch.no_grad():
        assert torch.equal(chain(x), model(x))
    assert record.classes == 12
    assert len(chain.positions) == 9


def test_layers_that_ask_for_their_version_get_it(tmp_path: Path, fashion: Dataset) -> None:
    """MNASNet loads no plain dict of tensors: neither from a file, nor when it was saved."""
    torch.manual_seed(1)
    model = torchvision.models.mnasnet0_5(num_classes=10).eval()
    save_file(model.state_dict(), tmp_path / "mnas.safetensors")
    options: dict[str, Any] = {"dataset": "fashion-mini", "root": tmp_path}
    fastsitch.add("mnas", "torchvision:mnasnet0_5", weights=tmp_path / "mnas.safetensors", **options)
    chain = load_network(Root.at(tmp_path).models("fashion-mini"), NetworkName("mnas")).chain
    x: Tensor = fashion.normalisation.apply(fashion.test.images[:5])
    with torch.no_grad():
        assert torch.equal(chain(x), model(x))


def test_auxiliary_outputs_in_training_mode_are_refused_in_one_line(
    factory: Path, few: str, run_cli: Command, tmp_path: Path
) -> None:
    assert run_cli("add", "two", "--from", f"{factory}:two", "--dataset", few).returncode == 0
    ended = run_cli("train", "two", "--epochs", "1", "--dataset", few)
    assert ended.returncode == 2
    assert "two returns a tuple in training mode: expected logits (B, classes); write a factory" in ended.stderr
    assert not list((tmp_path / "work").rglob("models/*/two.json"))


def test_accuracy_is_measured_again_when_the_data_changed(
    factory: Path, fashion: Dataset, tmp_path: Path, run_cli: Command
) -> None:
    data = tmp_path / "data.npz"
    save_npz(data, fashion.train, fashion.test, 160, 64)
    name = f"npz:{data}"
    line = ["add", "mine", "--from", f"{factory}:small", "--dataset", name]
    assert run_cli(*line).returncode == 0
    assert run_cli("train", "mine", "--epochs", "1", "--dataset", name).returncode == 0
    (weights,) = (tmp_path / "work").rglob("models/*/mine*.safetensors")
    line = [*line, "--weights", shutil.copy(weights, tmp_path / "weights.safetensors"), "--force"]
    assert run_cli(*line).returncode == 0
    save_npz(data, fashion.train, fashion.test, 168, 48)
    refused = run_cli("precompute", "mine", "--dataset", name)
    assert refused.returncode == 2
    assert "has changed since mine was trained on it: add it again with the same --weights" in refused.stderr
    assert run_cli(*line[:-1]).returncode == 0
    assert run_cli("precompute", "mine", "--dataset", name).returncode == 0


def test_a_network_whose_train_returns_nothing_is_added_and_trained(factory: Path, few: str, run_cli: Command) -> None:
    for line in (["add", "slip", "--from", f"{factory}:slip"], ["train", "slip", "--epochs", "1"]):
        ended = run_cli(*line, "--dataset", few)
        assert ended.returncode == 0, ended.stderr


def test_a_network_without_anything_to_train_is_refused(few: str, run_cli: Command, tmp_path: Path) -> None:
    (tmp_path / "still.py").write_text(
        "from torch import nn\n\n\ndef small(classes):\n"
        "    layers = nn.Conv2d(3, 4, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)\n"
        "    return nn.Sequential(*layers).requires_grad_(False)\n"
    )
    assert run_cli("add", "still", "--from", f"{tmp_path}/still.py:small", "--dataset", few).returncode == 0
    ended = run_cli("train", "still", "--epochs", "1", "--dataset", few)
    assert ended.returncode == 2
    assert "still has nothing to train: expected parameters" in ended.stderr
