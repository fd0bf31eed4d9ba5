"""Linear probes at every position: from a store or live, as a table, as JSON and from Python."""

import json
import re
from pathlib import Path

import pytest
import torch

import fastsitch
from fastsitch.data import Dataset, load_dataset
from fastsitch.errors import ConfigError, NetworkError, StoreError
from fastsitch.network_names import NetworkName
from fastsitch.networks.checkpoint import load_network
from fastsitch.networks.linear_probe import fit_probes
from fastsitch.root import Root
from tests.conftest import Command, save_npz


@pytest.fixture
def some(fashion: Dataset, tmp_path: Path) -> str:
    """The name of a data set of 400 + 100 real images in a file."""
    save_npz(tmp_path / "some.npz", fashion.train, fashion.test, 400, 100)
    return f"npz:{tmp_path / 'some.npz'}"


def test_a_probe_sees_the_mean_of_each_representation(some: str, tmp_path: Path) -> None:
    """Of maps and of tokens behind a class token, from the store as from the running network."""
    fastsitch.train("R1111", width=4, epochs=2, dataset=some, root=tmp_path)
    fastsitch.add("vit", "timm:test_vit", head="probe", dataset=some, root=tmp_path)
    live = fastsitch.probe("R1111", "vit", dataset=some, root=tmp_path)
    assert [network.store for network in live] == ["", ""]
    fastsitch.precompute("R1111", dataset=some, positions="layer1.0", root=tmp_path)
    # a store without some of the positions does not do
    assert fastsitch.probe("R1111", dataset=some, root=tmp_path) == live[:1]
    fastsitch.precompute("R1111", "vit", dataset=some, root=tmp_path)
    steps = []
    stored = fastsitch.probe("R1111", "vit", dataset=some, root=tmp_path, report=steps.append)
    assert (steps[-1].done, steps[-1].total, steps[-1].task) == (500, 500, "probe vit")
    images = load_dataset(some, tmp_path)
    for one, other in zip(live, stored, strict=True):
        network = load_network(Root.at(tmp_path).models(some), NetworkName(one.network))
        assert one.accuracy == network.record.accuracy
        assert other.store.endswith(one.network)
        with torch.no_grad():
            x = network.chain.representations(network.record.transform.apply(images.train.images))
        for position, first, second in zip(network.chain.positions, one.positions, other.positions, strict=True):
            assert (first.index, first.position) == (position.index, position.name)
            assert first.strength == second.strength
            assert first.train_accuracy == second.train_accuracy
            assert first.test_accuracy == second.test_accuracy
            assert first.test_loss == pytest.approx(second.test_loss, rel=1e-6)
            means = x[position.index].mean((2, 3) if x[position.index].dim() == 4 else 1)
            assert first.features == means.shape[1]
            (by_hand,) = fit_probes(means[None], images.train.labels, 10)
            # in a store numbers are rounded to bf16
            assert first.train_accuracy == pytest.approx(by_hand.train_accuracy, abs=0.06)
            assert first.test_accuracy > 0.4


def test_the_command(some: str, run_cli: Command, tmp_path: Path) -> None:
    assert run_cli("train", "R1111", "--width", "4", "--epochs", "1", "--dataset", some).returncode == 0
    ended = run_cli("probe", "R1111", "R1111-random@0", "--json", "out/probes.json")
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"^R1111 on npz:\S+: test accuracy 0\.\d{4}, run once$", ended.stdout, re.M)
    assert re.search(r"^ +0 +stem +4 +\S+ +0\.\d{4} +0\.\d{4}$", ended.stdout, re.M)
    assert ended.stdout.endswith("out/probes.json\n")
    trained, control = json.loads((tmp_path / "work" / "out" / "probes.json").read_text())["networks"]
    assert [each["network"] for each in (trained, control)] == ["R1111", "R1111-random@0"]
    assert [each["position"] for each in trained["positions"]] == [
        "stem",
        "layer1.0",
        "layer2.0",
        "layer3.0",
        "layer4.0",
    ]
    assert [each["features"] for each in trained["positions"]] == [4, 4, 8, 16, 32]
    assert trained["weights_hash"] != control["weights_hash"]
    found = fastsitch.probe("R1111", dataset=some, root=tmp_path / "work" / "fastsitch-data")
    assert json.loads(json.dumps(found[0].to_dict())) == trained


def test_what_cannot_be_probed_is_refused(some: str, run_cli: Command, tmp_path: Path) -> None:
    root = tmp_path / "work" / "fastsitch-data"
    with pytest.raises(ConfigError, match="no network named: expected at least one"):
        fastsitch.probe(dataset=some, root=root)
    with pytest.raises(NetworkError, match="not trained yet on .*: R1111; train first"):
        fastsitch.probe("R1111", dataset=some, root=root)
    fastsitch.train("R1111", width=4, epochs=1, dataset=some, root=root)
    (tmp_path / "work" / "taken").mkdir()
    refused = run_cli("probe", "R1111", "--json", "taken")
    assert refused.returncode == 2
    assert refused.stderr == "fastsitch: taken is no regular file: expected a file, or a name for a new one\n"
    fastsitch.precompute("R1111", dataset=some, root=root)
    fastsitch.train("R1111", width=8, epochs=1, dataset=some, root=root, force=True)
    with pytest.raises(StoreError, match="is stale: "):
        fastsitch.probe("R1111", dataset=some, root=root)
