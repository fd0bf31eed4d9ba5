"""The shape of the project itself: which part may import which, and that a wheel holds all of it."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import fastsitch

PROJECT = Path(__file__).parents[1]

LAYERS = [
    {
        "errors",
        "vocabulary",
        "progress",
        "timing",
        "learning_rate",
        "files",
        "identity",
        "checked_files",
        "typed_fields",
        "kernels",
        "suggested_command",
        "network_names",
    },
    {"folders", "bucket_folder", "zarr_bucket"},
    {"machine"},
    {"cluster"},
    {"data", "chains"},
    {"root"},
    {"networks"},
    {"receivers"},
    {"activations"},
    {"stitching"},
    {"runs"},
    {"planning"},
    {"execution"},
    {"generation", "analysis", "benchmark", "report"},
    {"api_networks", "api_runs"},
    {"demo", "study"},
    {"__init__"},
    {"cli"},
]
"""Lower layers first; a module imports from its own layer or lower ones."""


def imported_parts(path: Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        parts |= {
            name.split(".")[1] for name in names if name.startswith("fastsitch.") and name != "fastsitch.__version__"
        }
    return parts


def test_imports_point_one_way() -> None:
    level = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
    seen = 0
    for path in (
        sorted((PROJECT / "fastsitch").rglob("*.py"))
        + sorted(PROJECT.glob("kernels/**/*.py"))
        + sorted(PROJECT.glob("cli/**/*.py"))
    ):
        relative = path.relative_to(PROJECT)
        part = relative.parts[1 if relative.parts[0] == "fastsitch" else 0].removesuffix(".py")
        for target in imported_parts(path) - {part}:
            if target not in level:
                # a name defined in fastsitch/__init__.py
                assert level[part] >= level["__init__"], f"{relative} imports fastsitch.{target}"
                continue
            assert level[target] <= level[part], f"{relative} imports {target}, which lies above {part}"
            seen += 1
    assert seen > 50


def test_kernels_import_nothing_else_of_fastsitch() -> None:
    for path in (PROJECT / "kernels").rglob("*.py"):
        assert imported_parts(path) <= {"kernels"}


def test_chains_need_nothing_but_errors_and_words() -> None:
    for path in (PROJECT / "fastsitch" / "chains").rglob("*.py"):
        assert imported_parts(path) <= {"chains", "errors", "vocabulary"}, path


def source_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "fastsitch", "kernels", "cli", "bench", "tests"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return [PROJECT / name for name in listed if name.endswith(".py") and (PROJECT / name).exists()]


def test_a_file_name_says_which_file_it_is() -> None:
    names = Counter(path.name for path in source_files() if path.name not in ("__init__.py", "conftest.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_no_file_grew_past_repair() -> None:
    long = {path.name: count for path in source_files() if (count := len(path.read_text().splitlines())) > 400}
    assert long == {}


def test_the_library_never_prints() -> None:
    for path in (PROJECT / "fastsitch").rglob("*.py"):
        if "cli" in path.relative_to(PROJECT).parts:
            continue
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"], path


def test_a_bare_kernels_is_refused() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", "from kernels import grouped_stitch"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "import fastsitch.kernels instead" in ended.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git has of the package and its description: nothing else may come into a release, and nothing be written."""
    folder = tmp_path_factory.mktemp("release") / "copy"
    for name in packed_files():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        source = PROJECT / name
        if source.is_symlink():
            target.symlink_to(source.readlink())
        else:
            target.write_bytes(source.read_bytes())
    return folder


def packed_files() -> list[str]:
    about = ["pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "SECURITY.md"]
    names = ["fastsitch", "kernels", "cli", "CONTRIBUTING.md", *about]
    return subprocess.run(
        ["git", "ls-files", *names], cwd=PROJECT, capture_output=True, text=True, check=True
    ).stdout.split()


def build(what: str, source: Path) -> Path:
    """The wheel or sdist of a source tree, in ``dist`` beside it."""
    folder = source.parent / f"dist-{what}"
    run(sys.executable, "-m", "build", f"--{what}", "--no-isolation", "--outdir", folder, source)
    (file,) = folder.iterdir()
    return file


def run(*command: str | Path, **options: Any) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    return ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize("what", ["wheel", "sdist"])
def test_a_release_installs_and_runs(what: str, copy: Path, tmp_path: Path) -> None:
    """In an environment that has what fastsitch depends on, and nothing of this folder."""
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    dependencies = sysconfig.get_path("purelib")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed"]
    # for setuptools, of which the sdist is built
    building = {**clean_environment(), "PYTHONPATH": dependencies}
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, build(what, copy), env=building)
    (site / "dependencies.pth").write_text(dependencies)
    here = {"cwd": tmp_path, "env": clean_environment()}
    found = run(python, "-c", "import importlib.util as u; print(u.find_spec('fastsitch').origin)", **here)
    assert Path(found.strip()).is_relative_to(tmp_path)
    assert "--width" in run(python.with_name("fastsitch"), "demo", "--help", **here)
    version = run(python, "-c", "import importlib.metadata as m; print(m.version('fastsitch'))", **here)
    assert version.strip() == fastsitch.__version__


def clean_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def test_the_wheel_holds_every_module_and_the_data(copy: Path) -> None:
    with zipfile.ZipFile(build("wheel", copy)) as archive:
        packed = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
    expected = set()
    for name in packed_files():
        if name.endswith((".py", ".npz", ".txt", ".json", "py.typed")):
            expected.add(name if name.startswith("fastsitch/") else f"fastsitch/{name}")
    assert packed == expected


def test_the_citation_names_the_last_release() -> None:
    (released,) = re.findall(r"^version: (.+)$", (PROJECT / "CITATION.cff").read_text(), re.M)
    assert f"## {released} (" in (PROJECT / "CHANGELOG.md").read_text()
    assert not fastsitch.__version__.startswith(f"{released}.dev")
