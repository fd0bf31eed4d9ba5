"""Stores with some of a network's positions: made, read, and made again where others are needed."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastsitch
from fastsitch.activations.store import ActivationStore
from fastsitch.data import Dataset
from fastsitch.errors import ConfigError
from fastsitch.network_names import NetworkName
from fastsitch.root import Root
from tests.conftest import Command, save_npz

OPTIONS: dict[str, Any] = {"recipe": "small", "epochs": 1, "batch_size": 50, "precision": "fp32"}
SOME = ["layer2.0", "layer3.0"]


@pytest.fixture
def trained(fashion: Dataset, tmp_path: Path) -> tuple[Path, str]:
    """A root with R1111 and R1112 of width 4, and the name of their data set."""
    save_npz(tmp_path / "few.npz", fashion.train, fashion.test, 200, 100)
    dataset = f"npz:{tmp_path / 'few.npz'}"
    fastsitch.train("R1111", "R1112", dataset=dataset, width=4, epochs=2, root=tmp_path)
    return tmp_path, dataset


def stored(root: Path, dataset: str, name: str = "R1111") -> ActivationStore:
    return ActivationStore.open(Root.at(root).store(dataset, NetworkName.parse(name)))


def names(store: ActivationStore) -> list[str]:
    return [position.name for position in store.positions]


def test_the_command_stores_some_positions(trained: tuple[Path, str], run_cli: Command) -> None:
    root, dataset = trained
    ended = run_cli("precompute", "R1111", "--positions", "stem,layer2*", "--root", root)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("R1111: 2 of 5 positions, ")
    some = stored(root, dataset)
    assert names(some) == ["stem", "layer2.0"]
    assert {path.name for path in Path(some.path / "train").iterdir() if path.name.isdigit()} == {"0", "2"}
    # what is there is enough
    before = (Path(some.path) / "manifest.json").stat().st_mtime_ns
    assert run_cli("precompute", "R1111", "--positions", "stem", "--root", root).returncode == 0
    assert (Path(some.path) / "manifest.json").stat().st_mtime_ns == before
    # others are added
    assert "3 of 5 positions" in run_cli("precompute", "R1111", "--positions", "layer4.0", "--root", root).stdout
    more = stored(root, dataset)
    assert names(more) == ["stem", "layer2.0", "layer4.0"]
    for index in (0, 2):
        assert np.array_equal(some_values(more, index), some_values(more, index))
    ended = run_cli("precompute", "R1111", "--root", root)
    assert ended.stdout.startswith("R1111: 5 positions, ")
    ended = run_cli("precompute", "R1111", "--positions", "layer9.0", "--root", root)
    assert ended.returncode == 2
    assert "--positions layer9.0: R1111 has no position layer9.0; it has stem, layer1.0" in ended.stderr


def some_values(store: ActivationStore, index: int) -> Any:
    return store.read("train", index, 0, 200).float().numpy()


def test_values_are_those_of_a_whole_store(trained: tuple[Path, str]) -> None:
    root, _ = trained
    (some,) = fastsitch.precompute("R1111", positions=SOME, root=root)
    values = {position.index: some_values(some, position.index) for position in some.positions}
    assert list(values) == [2, 3]
    shapes = some.shapes()
    assert len(shapes) == 5
    assert shapes[0] == shapes[1] == shapes[4] == (0, 0, 0)
    (whole,) = fastsitch.precompute("R1111", root=root)
    assert len(whole.positions) == 5
    assert whole.identity == some.identity
    assert "position_count" not in json.loads((Path(whole.path) / "manifest.json").read_text())
    for index, expected in values.items():
        assert np.array_equal(some_values(whole, index), expected)


@pytest.mark.parametrize("options", [{}, {"loss": "match"}, {"loss": "match", "optimizer": "adam"}])
@pytest.mark.parametrize("source", ["resident", "streamed", "live"])
def test_a_sweep_of_some_positions_needs_no_others(
    trained: tuple[Path, str], source: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Its matrices are those of the same cells of a sweep with stores of all positions."""
    if options.get("optimizer"):
        pytest.skip("matching by training has its own test")
    root, dataset = trained
    run = fastsitch.sweep("R1111", "R1112", positions=SOME, source=source, root=root, run="some", **OPTIONS, **options)
    if source != "live":
        assert names(stored(root, dataset)) == SOME
    with caplog.at_level(logging.INFO):
        whole = fastsitch.sweep("R1111", "R1112", source=source, root=root, run="all", **OPTIONS, **options)
    lacked = "lacks stem, layer1.0, layer4.0: it is made again with what it has and them"
    assert (lacked in caplog.text) == (source != "live")
    some, all_cells = (each.matrix("R1111", "R1112") for each in (run, whole))
    chosen = ~np.isnan(some)
    assert chosen.sum() == 2 * 2
    # in groups of other cells
    np.testing.assert_allclose(some[chosen], all_cells[chosen], atol=0.02)


def test_what_is_no_position_is_refused(trained: tuple[Path, str]) -> None:
    root, _ = trained
    with pytest.raises(ConfigError, match="expected names or patterns such as"):
        fastsitch.precompute("R1111", positions=[], root=root)
    with pytest.raises(ConfigError, match=r"R1111 has no position block\*; it has"):
        fastsitch.precompute("R1111", positions="block*", root=root)
    with pytest.raises(ConfigError, match="R1111 has no position nope; it has"):
        fastsitch.precompute("R1111", positions="stem,nope", root=root)
    assert not (root / "stores").exists() or not list((root / "stores").rglob("manifest.json"))
