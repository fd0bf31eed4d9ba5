"""What records say: by which versions results were made, and nothing of another type than it should be."""

import json
from pathlib import Path

import pytest

import fastsitch
from fastsitch.checked_files import with_hash
from fastsitch.root import Root
from fastsitch.runs import inventory
from tests.conftest import Command
from tests.test_tampering import OPTIONS, UNITS, run_of
from tests.test_tampering import made as made
from tests.test_tampering import root as root


@pytest.mark.parametrize(("file", "kind"), [("models/*/R1111.json", "record"), ("networks/*/mine.json", "definition")])
def test_a_folder_in_the_place_of_a_file_is_to_be_removed(
    file: str, kind: str, root: Path, run_cli: Command, factory: Path
) -> None:
    (few,) = [entry.dataset for entry in inventory.networks(Root.at(root))]
    data = ["--dataset", few]
    assert run_cli("add", "mine", "--from", f"{factory}:small", *data, "--root", root).returncode == 0
    (path,) = root.glob(file)
    path.unlink()
    path.mkdir()
    name = path.stem
    for line in (["precompute", name], ["train", name, "--force", "--epochs", "1"]):
        ended = run_cli(*line, *data, "--root", root)
        assert ended.returncode == 2
        assert f"{path} is no regular file: expected" in ended.stderr
        # at once, not after hours of training
        assert "steps" not in ended.stderr
    assert f"{kind} of a network; remove it" in run_cli("list", "--root", root).stdout


def test_a_run_that_goes_on_with_other_versions_says_so_and_records_both(
    root: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    run = run_of(root)
    now = run.versions
    before = {**now, "torch": "2.9.1", "timm": "1.0.1"}
    file = run.path / "run.json"
    content = {key: value for key, value in json.loads(file.read_text()).items() if key != "run_hash"}
    file.write_text(json.dumps(with_hash({**content, "versions": before}, "run_hash")))
    # a run that is finished is not gone on with
    fastsitch.sweep("R1111", "R1111", root=root, run="run", **OPTIONS)
    assert run_of(root).record.continued == ()
    (run.path / "units" / f"{UNITS[0]}.npz").unlink()
    with caplog.at_level("WARNING"):
        fastsitch.sweep("R1111", "R1111", root=root, run="run", **OPTIONS)
    (said,) = [record.getMessage() for record in caplog.records if "goes on with" in record.getMessage()]
    assert "torch 2.9.1" in said
    assert f"goes on with torch {now['torch']}" in said
    assert "numpy" not in said
    assert (run_of(root).versions, run_of(root).record.continued) == (before, (now,))
    # once
    (run.path / "units" / f"{UNITS[1]}.npz").unlink()
    fastsitch.sweep("R1111", "R1111", root=root, run="run", **OPTIONS)
    assert run_of(root).record.continued == (now,)
    fastsitch.export_run(run_of(root), tmp_path / "out")
    sidecar = json.loads((tmp_path / "out" / "R1111--R1111.T2T.json").read_text())
    assert (sidecar["versions"], sidecar["continued"]) == (before, [now])


@pytest.mark.parametrize(
    ("file", "place", "value"),
    [
        ("models/*/R1111.json", ("dataset",), ["fashion-mini"]),
        ("models/*/R1111.json", ("weights_file",), 7),
        ("models/*/R1111.json", ("weights_file",), "../../few.safetensors"),
        ("models/*/R1111.json", ("recipe",), "fast"),
        ("models/*/R1111.json", ("classes",), True),
        ("models/*/R1111.json", ("normalisation", "std", 0), "much"),
        ("models/*/R1111.json", ("versions", "torch"), 2.14),
        ("runs/*/run/run.json", ("resolved", "group_size"), "all"),
        ("runs/*/run/run.json", ("networks", "R1111", "accuracy"), None),
        ("runs/*/run/run.json", ("networks", "R1111", "positions", 0, 1, 0), 4.5),
        ("runs/*/run/run.json", ("config", "recipe", "epochs"), "2"),
        ("runs/*/run/run.json", ("data_hash",), 12),
        ("activations/*/R1111/manifest.json", ("sizes", "train"), "160"),
        ("activations/*/R1111/manifest.json", ("sizes",), []),
        ("activations/*/R1111/manifest.json", ("identity", "weights"), None),
        ("activations/*/R1111/manifest.json", ("positions", 0, "shape", 0), "4"),
    ],
)
def test_values_of_another_type_are_refused_also_where_the_hash_is_right(
    file: str, place: tuple[str | int, ...], value: object, root: Path, run_cli: Command
) -> None:
    (path,) = root.glob(file)
    content = json.loads(path.read_text())
    (key,) = [
        name for name in content if name.endswith("_hash") and name.split("_")[0] in ("record", "run", "manifest")
    ]
    del content[key]
    inner = content
    for step in place[:-1]:
        inner = inner[step]
    assert inner[place[-1]] != value
    inner[place[-1]] = value
    path.write_text(json.dumps(with_hash(content, key)))
    line = {
        "models": ["precompute", "R1111"],
        "runs": ["export", "run", "--out", root / "out"],
        "activations": ["precompute", "R1111"],
    }[file.split("/")[0]]
    ended = run_cli(*line, "--root", root)
    assert (ended.returncode, ended.stdout) == (2, ""), ended.stderr
    assert path.name in ended.stderr
    assert "unusable" in run_cli("list", "--root", root).stdout
