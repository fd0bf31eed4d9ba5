"""Factories that import files beside them."""

import json
import py_compile
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastsitch
from fastsitch.data import Dataset
from fastsitch.errors import NetworkError
from fastsitch.networks.model_source import ModelSource
from tests.conftest import save_npz

NETWORK = """
from blocks import CHANNELS
import parts.head
from bare.scale import scale

def network(classes):
    from torch import nn
    import late
    late.touched = True
    return nn.Sequential(nn.Conv2d(3, CHANNELS, 4, stride=4), nn.ReLU(), *parts.head.head(CHANNELS * scale, classes))
"""

HEAD = """
from torch import nn
from . import pool

def head(channels, classes):
    return [nn.Conv2d(channels, channels, 3), nn.ReLU(), pool.pool(), nn.Flatten(), nn.Linear(channels, classes)]
"""


def project(folder: Path, channels: int) -> str:
    """A file with a factory whose layers come from a module, a package and a folder beside it."""
    files = {
        "network.py": NETWORK,
        "blocks.py": f"CHANNELS = {channels}\n",
        "late.py": "",
        "unused.py": "raise RuntimeError\n",
        "parts/__init__.py": "",
        "parts/head.py": HEAD,
        "parts/pool.py": "from torch import nn\npool = lambda: nn.AdaptiveAvgPool2d(1)\n",
        "bare/scale.py": "scale = 1\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return f"{folder / 'network.py'}:network"


@pytest.fixture
def few(fashion: Dataset, tmp_path: Path) -> str:
    save_npz(tmp_path / "few.npz", fashion.train, fashion.test, 160, 64)
    return f"npz:{tmp_path / 'few.npz'}"


def test_files_beside_a_factory_are_imported_recorded_and_watched(few: str, tmp_path: Path) -> None:
    modules, path = dict(sys.modules), list(sys.path)
    root = tmp_path / "root"
    for channels in (4, 6):
        # equal files of equal names in two folders, which differ in one neighbour
        fastsitch.add(f"net{channels}", project(tmp_path / str(channels), channels), dataset=few, root=root)
    definitions = {
        name: json.loads(next(root.glob(f"networks/*/{name}.json")).read_text()) for name in ("net4", "net6")
    }
    for channels in (4, 6):
        definition = definitions[f"net{channels}"]["definition"]
        assert definition["positions"][0]["shape"] == [channels, 8, 8]
        assert set(definition["source"]["neighbours"]) == {
            "blocks.py",
            "late.py",
            "bare/scale.py",
            "parts/__init__.py",
            "parts/head.py",
            "parts/pool.py",
        }
    # nothing of it stays where others would find it, nor beside the files
    assert sys.path == path
    assert not {"blocks", "parts", "parts.head", "late", "bare"} & set(sys.modules)
    assert all(sys.modules[name] is module for name, module in modules.items())
    assert not list(tmp_path.rglob("__pycache__"))

    fastsitch.train("net4", dataset=few, epochs=1, root=root)
    (tmp_path / "4" / "unused.py").write_text("")
    fastsitch.precompute("net4", dataset=few, root=root)
    changed = tmp_path / "4" / "parts" / "pool.py"
    changed.write_text(changed.read_text().replace("Avg", "Max"))
    with pytest.raises(NetworkError, match=r"parts/pool\.py has changed since the network was added .* force=True"):
        fastsitch.precompute("net4", dataset=few, root=root, force=True)
    changed.unlink()
    with pytest.raises(NetworkError, match=r"parts/pool\.py has changed since the network was added \(it is gone\)"):
        fastsitch.sweep("net4", "net4", dataset=few, batch_size=32, root=root)


def test_a_changed_neighbour_counts_within_one_process(few: str, tmp_path: Path) -> None:
    source = project(tmp_path / "project", 4)
    fastsitch.add("net", source, dataset=few, root=tmp_path / "root")
    (tmp_path / "project" / "blocks.py").write_text("CHANNELS = 10\n")
    with pytest.raises(NetworkError, match="already registered for another network"):
        fastsitch.add("net", source, dataset=few, root=tmp_path / "root")
    definition, _ = fastsitch.add("net", source, dataset=few, root=tmp_path / "root", force=True)
    assert definition.positions[0].shape == (10, 8, 8)


def test_neighbours_come_before_modules_of_their_name(few: str, tmp_path: Path) -> None:
    """Another program's module called ``blocks`` is loaded already, and is again afterwards."""
    import types

    other = types.ModuleType("blocks")
    sys.modules["blocks"] = other
    try:
        fastsitch.add("net", project(tmp_path / "project", 4), dataset=few, root=tmp_path / "root")
        assert sys.modules["blocks"] is other
    finally:
        del sys.modules["blocks"]


def test_weights_drawn_by_numpy_depend_on_the_seed_alone(tmp_path: Path) -> None:
    (tmp_path / "drawn.py").write_text(
        "import random\nimport numpy, torch\nfrom torch import nn\n\n\ndef network():\n    layer = nn.Linear(3, 2)\n"
        "    layer.weight.data = torch.tensor(numpy.random.randn(2, 3)).float() * random.random()\n    return layer\n"
    )
    source = ModelSource.parse(f"{tmp_path}/drawn.py:network")
    state = np.random.get_state()[1].copy()
    built = [source.build(2, (3, 1, 1), key).weight for key in (0, 0, 1)]
    assert torch.equal(built[0], built[1])
    assert not torch.equal(built[0], built[2])
    assert (np.random.get_state()[1] == state).all()


OTHER_WAYS = """
import importlib.util
import runpy
from pathlib import Path

HERE = Path(__file__).parent
loaded = importlib.util.spec_from_file_location("loaded", HERE / "parts" / "loaded.py")
module = importlib.util.module_from_spec(loaded)
loaded.loader.exec_module(module)
found = {}
exec((HERE / "executed.py").read_text(), found)

def network(classes):
    from torch import nn
    channels = module.CHANNELS * found["TIMES"] * runpy.run_path(str(HERE / "run.py"))["TIMES"]
    return nn.Sequential(nn.Conv2d(3, channels, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64 * channels, classes))
"""


def test_files_that_are_run_in_other_ways_are_recorded_too(few: str, tmp_path: Path) -> None:
    folder, root = tmp_path / "net", tmp_path / "root"
    files = {
        "network.py": OTHER_WAYS,
        "parts/loaded.py": "CHANNELS = 2\n",
        "executed.py": "TIMES = 1\n",
        "run.py": "TIMES = 2\n",
        "venv/lib/site-packages/other.py": "",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    # a source that was compiled before is not read
    py_compile.compile(str(folder / "parts" / "loaded.py"))
    source = f"{folder}/network.py:network"
    definition, _ = fastsitch.add("net", source, dataset=few, root=root)
    assert {name for name, _ in definition.source.neighbours} == {"parts/loaded.py", "executed.py", "run.py"}
    fastsitch.train("net", dataset=few, epochs=1, root=root)
    for name in ("parts/loaded.py", "executed.py", "run.py"):
        before = (folder / name).read_text()
        (folder / name).write_text(before + "# another\n")
        with pytest.raises(NetworkError, match=rf"{name} has changed since the network was added"):
            fastsitch.precompute("net", dataset=few, root=root, force=True)
        (folder / name).write_text(before)
    fastsitch.precompute("net", dataset=few, root=root)


def test_an_import_while_the_network_runs_is_refused_with_what_to_do(few: str, tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text("scale = 2\n")
    (tmp_path / "network.py").write_text(
        "from torch import nn\n\n\nclass Late(nn.Sequential):\n    def forward(self, x):\n        import late\n\n"
        "        return super().forward(x * late.scale)\n\n\n"
        "def network():\n    return Late(nn.Flatten(), nn.Linear(3072, 10))\n"
    )
    with pytest.raises(NetworkError, match="No module named 'late'.*; import it where the network is built: forward"):
        fastsitch.add("net", f"{tmp_path}/network.py:network", dataset=few, root=tmp_path / "root")
