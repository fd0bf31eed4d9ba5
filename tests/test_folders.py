"""A folder on a disk and one in a bucket keep the same promises."""

import pickle
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fastsitch.activations.store_files import open_array
from fastsitch.activations.store_manifest import remedy
from fastsitch.bucket_folder import bucket_folder
from fastsitch.folders import Folder, LocalFolder, as_folder
from fastsitch.root import Root
from tests.test_remote import KEYS, serve

import zarr  # isort: skip


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    process, url = serve("folders")
    yield url
    process.kill()
    process.wait()


@pytest.fixture(params=["disk", pytest.param("bucket", marks=pytest.mark.bucket)])
def root(request: pytest.FixtureRequest, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Root:
    """A root whose stores lie in it, or in a prefix of their own."""
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": server}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "models").mkdir()
    return Root.at(tmp_path, activations=f"s3://folders/{tmp_path.name}" if request.param == "bucket" else None)


@pytest.fixture
def folder(root: Root) -> Folder:
    """Where a store would lie."""
    return root.stores / "few" / "R1111"


def content(folder: Folder) -> dict[str, bytes]:
    return {name: folder.read(name) for name in folder.sizes()}


def test_files_are_written_read_and_removed(folder: Folder) -> None:
    for name, text in (("train/10/0", b"abcdef"), ("train/2/0", b"ghij"), ("train.json", b"{}")):
        folder.write(name, text)
    folder.write("train/2/0", b"another")
    # as one walks through the folders: what is in train/ before the file train.json
    assert list(folder.sizes().items()) == [("train/10/0", 6), ("train/2/0", 7), ("train.json", 2)]
    assert folder.read("train/2/0") == b"another"
    assert folder.tails({"train/10/0": 6, "train/2/0": 7}, 4) == {"train/10/0": b"cdef", "train/2/0": b"ther"}
    folder.flush()
    folder.forget("train/2/0")
    assert folder.read("train/2/0") == b"another"
    folder.remove("train/2/0")
    folder.remove("train/2/0")
    assert folder.sizes().keys() == {"train/10/0", "train.json"}
    for read in (lambda: folder.read("train/2/0"), lambda: folder.tails({"train/2/0": 7}, 4)):
        with pytest.raises(FileNotFoundError):
            read()
    folder.clear()
    folder.clear()
    assert folder.sizes() == {}


def test_a_store_is_there_once_it_is_whole(folder: Folder) -> None:
    assert not folder.exists()
    with folder.replacing() as partial:
        partial.write("chunk", b"first")
        assert not folder.exists()
        partial.write("manifest.json", b"{}")
    assert folder.exists()
    assert content(folder) == {"chunk": b"first", "manifest.json": b"{}"}
    with folder.replacing() as partial:
        partial.write("other", b"second")
        partial.write("manifest.json", b"[]")
    assert content(folder) == {"other": b"second", "manifest.json": b"[]"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_fails_leaves_nothing_behind(folder: Folder, error: type[BaseException]) -> None:
    def fail() -> None:
        with folder.replacing() as partial:
            partial.write("chunk", b"first")
            written.update(partial.sizes())
            raise error

    written: dict[str, int] = {}
    with pytest.raises(error):
        fail()
    assert written == {"chunk": 5}
    assert not folder.exists()
    assert folder.parent.sizes() == {}


def test_what_a_killed_attempt_left_behind_is_removed_first(folder: Folder) -> None:
    killed = folder.replacing()
    killed.__enter__().write("of-another-attempt", b"x")
    with folder.replacing() as partial:
        partial.write("manifest.json", b"{}")
    assert content(folder) == {"manifest.json": b"{}"}


def test_arrays_go_through_zarr(folder: Folder) -> None:
    values = np.arange(12, dtype=np.float32).reshape(6, 2)
    with folder.translating_errors(), zarr.config.set(folder.zarr_settings):
        group = zarr.open_group(folder.zarr_store(reading=False), mode="w", zarr_format=3)
        group.create_array("train/0", shape=(6, 2), chunks=(3, 2), dtype=np.float32, fill_value=float("nan"))[:] = (
            values
        )
    for quick in (True, False):
        assert np.array_equal(open_array(folder, "train/0", quick=quick)[:], values)


def test_names_lead_there_and_back(folder: Folder, root: Root) -> None:
    assert (folder.name, folder.parent.name, folder.parent.parent) == ("R1111", "few", root.stores)
    assert str(folder) == f"{root.stores}/few/R1111" == f"{folder.parent / 'R1111'}"
    assert pickle.loads(pickle.dumps(folder)) == folder
    assert len({folder, folder.parent / "R1111", folder.parent / "R1112"}) == 2
    assert as_folder(folder) is folder
    assert folder.absolute() == folder


def test_locks_lie_on_the_disk_beside_what_they_guard(folder: Folder, root: Root) -> None:
    assert folder.lock_file == root.path / "activations" / "few" / "R1111.lock"


def test_the_rate_of_reading_is_measured_where_nothing_is_yet(folder: Folder, root: Root) -> None:
    before = sorted(root.path.rglob("*"))
    assert folder.reading_rate(100_000) > 0
    assert sorted(root.path.rglob("*")) == before
    assert root.stores.sizes() == {}


def test_an_error_names_the_command_that_finds_the_store_again(folder: Folder, root: Root) -> None:
    line = remedy(folder).removeprefix("make the store again with ")
    options = dict(zip(*[iter(shlex.split(line)[3:-1])] * 2, strict=True))
    found = Root.at(options["--root"], activations=options.get("--activations"))
    assert found.stores == root.stores


def test_a_store_takes_space_where_it_lies(folder: Folder, root: Root) -> None:
    on_disk = isinstance(root.stores, LocalFolder)
    assert root.disk == (root.path / "activations" if on_disk else root.path)
    assert folder.disk_needed(1000) == (1000 if on_disk else 0)
    killed = folder.replacing()
    killed.__enter__().write("chunk", bytes(600))
    assert folder.disk_needed(1000) == (400 if on_disk else 0)
    with folder.replacing() as partial:
        partial.write("manifest.json", b"{}")
    assert folder.disk_needed(1000) == 0


def test_what_is_listed_is_complete(folder: Folder, root: Root) -> None:
    with folder.replacing() as partial:
        partial.write("manifest.json", b"{}")
    (folder.parent / "R1112").replacing().__enter__().write("chunk", b"unfinished")
    assert root.stores.listable == isinstance(root.stores, LocalFolder)
    found = [store for dataset in root.stores.folders() for store in dataset.folders()]
    assert found == ([folder] if root.stores.listable else [])


def test_a_path_is_a_folder_on_a_disk(tmp_path: Path) -> None:
    for path in (tmp_path / "R1111", str(tmp_path / "R1111")):
        assert as_folder(path) == LocalFolder(tmp_path / "R1111")
    assert Path(LocalFolder(tmp_path / "R1111")) == tmp_path / "R1111"
    assert LocalFolder(Path("here")).absolute() == LocalFolder(Path("here").absolute())
    locks = Path("root/activations")
    assert bucket_folder("s3://folders/x/", locks).absolute() == bucket_folder("s3://folders/x", locks.absolute())
