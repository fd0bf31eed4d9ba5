"""The shape of the project itself: which part may import which, and that a wheel holds all of it."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

PROJECT = Path(__file__).parents[1]

LAYERS = [
    {"errors", "files", "identity", "kernels", "advice", "remote"},
    {"machine"},
    {"cluster"},
    {"data"},
    {"root", "networks"},
    {"activations"},
    {"stitching"},
    {"sweep"},
    {"analysis", "benchmark", "report", "inventory"},
    {"api", "demo", "paper", "__init__"},
    {"cli"},
]
"""Lower layers first; a module imports from its own layer or lower ones."""

# names of networks are text, and where a root keeps things is arithmetic on it: neither loads a network
EXCEPTIONS = {("root", "networks")}


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


def test_the_library_never_prints() -> None:
    for path in (PROJECT / "fastsitch").rglob("*.py"):
        if "cli" in path.relative_to(PROJECT).parts:
            continue
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"], path


def test_a_bare_kernels_is_refused() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", "import kernels"], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert "import fastsitch.kernels instead" in ended.stderr


def test_the_wheel_holds_every_module_and_the_data(tmp_path: Path) -> None:
    files = subprocess.run(
        ["git", "ls-files", "fastsitch", "kernels", "cli", "pyproject.toml", "README.md", "LICENSE"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    copy = tmp_path / "copy"
    for name in files:
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        source = PROJECT / name
        if source.is_symlink():
            target.symlink_to(source.readlink())
        else:
            target.write_bytes(source.read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, copy],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
    expected = set()
    for name in files:
        if name.endswith((".py", ".npz", ".txt", ".json", "py.typed")):
            expected.add(name if name.startswith("fastsitch/") else f"fastsitch/{name}")
    assert packed == expected
