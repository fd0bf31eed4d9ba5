"""Data sets of the hub that are damaged, dangerous or named wrongly: a line each, before anything is written."""

import re
import shutil
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastsitch.data import Dataset, canonical_dataset, dataset_size
from fastsitch.errors import DataError
from tests.conftest import Command
from tests.test_any_data import pictures
from tests.test_hub_data import Rows, load, parquets, rows_of, table, write

pytestmark = pytest.mark.usefixtures("hub_caches")


def test_what_is_damaged_is_refused_by_name(fashion: Dataset, tmp_path: Path, run_cli: Command) -> None:
    folder = pictures(tmp_path / "pics", fashion)
    rows = rows_of(folder / "train")

    def refused(made: Path, message: str) -> None:
        ended = run_cli("train", "R1111", "--dataset", f"hf:{made}", "--root", tmp_path / "root")
        assert ended.returncode == 2, ended.stderr
        # what is being done is said before
        (line,) = [line for line in ended.stderr.splitlines() if not line.startswith(f"hf:{made}")]
        assert line.startswith("fastsitch: ")
        assert re.search(message, line), line
        assert not (tmp_path / "root" / "models").exists()

    def changed(name: str, train: Rows) -> Path:
        made = parquets(tmp_path / name, folder)
        write(made / "data" / "train-00001-of-00002.parquet", table(train))
        return made

    refused(changed("cut", [(rows[7][0][:200], 1)]), r"cut, train row 7 \(image\) as an image|truncated")
    refused(changed("other", [(b"no image", 1)]), r"cannot read hf:.*other, train row 7 \(image\) as an image")
    empty = changed("empty", rows[7:])
    nothing = table(rows[7:]).data.table.set_column(0, "image", pa.nulls(len(rows[7:]), datasets.Image().pa_type))
    pq.write_table(
        nothing.replace_schema_metadata(table(rows).data.table.schema.metadata),
        empty / "data" / "train-00001-of-00002.parquet",
    )
    refused(empty, r"empty, train row 7 \(image\) is empty: expected an image in every row")
    lacking = parquets(tmp_path / "lacking", folder)
    (lacking / "data" / "train-00000-of-00002.parquet").unlink()
    refused(lacking, r"data/train-\*-of-00002.parquet: found 1 of 2 files; download it again")
    broken = parquets(tmp_path / "broken", folder)
    (broken / "data" / "train-00000-of-00002.parquet").write_bytes(b"PAR1 and nothing else")
    refused(broken, r"train-00000-of-00002.parquet cannot be read as parquet")
    other = changed("columns", rows[7:])
    write(other / "data" / "train-00001-of-00002.parquet", table(rows[7:]).rename_column("image", "picture"))
    refused(other, r"hf:.*columns cannot be read: ")
    swapped = table(rows[7:])
    classes = swapped.features["label"].names
    swapped = swapped.cast_column("label", datasets.ClassLabel(names=classes[::-1]))
    other = parquets(tmp_path / "order", folder)
    write(other / "data" / "train-00001-of-00002.parquet", swapped)
    refused(other, "order: column label has the classes .* in train-0000.* expected one order of classes in all files")
    (tmp_path / "nothing").mkdir()
    refused(tmp_path / "nothing", r"hf:.*nothing cannot be read: ")
    refused(tmp_path / "none", r"none does not exist: expected a folder with parquet files such as train-\*.parquet")
    refused(folder / "train" / "boot" / "0.png", r"0.png is no folder: expected a folder with parquet files")


def test_nothing_that_comes_with_a_data_set_is_executed(fashion: Dataset, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pics", fashion)
    made = parquets(tmp_path / "made", folder)
    (made / "made.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(DataError, match="scripts are no longer supported"):
        load(made)
    (made / "made.py").unlink()
    (made / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {folder}/*/*/*.png\n---\n")
    with pytest.raises(DataError, match=f"names {folder}.*: expected files in the folder alone"):
        load(made)
    archive = tmp_path / "packed" / "train-0.tar"
    archive.parent.mkdir()
    shutil.make_archive(str(archive.with_suffix("")), "tar", folder / "train" / "boot")
    with pytest.raises(DataError, match="is made of webdataset files: expected parquet or arrow files, or images"):
        load(archive.parent)
    with pytest.raises(DataError, match="hf:pandas is a kind of file: expected hf:ORG/NAME"):
        load("pandas")
    assert not (tmp_path / "ran").exists()


def test_a_folder_here_is_not_taken_for_a_name_on_the_hub(fashion: Dataset, tmp_path: Path, run_cli: Command) -> None:
    parquets(tmp_path / "work" / "made", pictures(tmp_path / "pics", fashion))
    with pytest.raises(DataError, match=r"hf:made: there is a folder of that name here; write hf:./made to take it"):
        load("made")
    assert canonical_dataset("hf:./made") == f"hf:{tmp_path / 'work' / 'made'}"
    for wrong in ("hf:a/b/c", "hf:-a", "hf:a/b:c/d", "hf:a/b@train=x", "hf:a/b@64@64", "hf:a b"):
        with pytest.raises(DataError, match=r"expected (hf:ORG/NAME|@train=N)"):
            canonical_dataset(wrong)


def test_without_the_library_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"need the library datasets: pip install 'fastsitch\[hf\]'"):
        load("a/b")
    assert dataset_size("hf:a/b", Path("scratch")) is None
