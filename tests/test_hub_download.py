"""A data set of the hub is downloaded once, and found when the hub cannot be asked; a new version is noticed."""

from pathlib import Path

import pytest

from fastsitch.data import Dataset
from tests.conftest import Command
from tests.hub_server import hub, revision
from tests.test_any_data import pictures
from tests.test_hub_data import parquets, rows_of, table, write

CARD = """---
dataset_info:
  features:
  - {name: image, dtype: image}
  - name: label
    dtype: {class_label: {names: {'0': boot, '1': coat, '2': shirt}}}
  splits:
  - {name: train, num_bytes: 1, num_examples: 180}
  - {name: test, num_bytes: 1, num_examples: 180}
  download_size: 53000000
  dataset_size: 53000000
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
  - {split: test, path: data/test-*}
---
"""


@pytest.mark.slow
def test_a_data_set_is_downloaded_once(
    fashion: Dataset, tmp_path: Path, run_process: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pictures(tmp_path / "pics", fashion, (16, 16), each=60)
    repository = parquets(tmp_path / "repository", folder)
    (repository / "README.md").write_text(CARD)
    shards = ["data/test-00000-of-00001.parquet", *(f"data/train-0000{k}-of-00002.parquet" for k in (0, 1))]
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    train = ("train", "R1111", "--width", "2", "--epochs", "1", "--dataset", "hf:some-org/clothes")
    with hub(repository, "some-org/clothes") as (address, downloads):
        monkeypatch.setenv("HF_ENDPOINT", address)
        ended = run_process(*train)
        assert ended.returncode == 0, ended.stderr
        assert f"downloads hf:some-org/clothes (53 MB) to {tmp_path / 'home' / 'datasets'}" in ended.stderr
        assert sorted(downloads) == ["README.md", *shards]
        ended = run_process(*train[:-1], "hf:some-org/missing")
        assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
        assert "the hub does not give it (DatasetNotFoundError: Dataset 'some-org/missing' doesn't" in ended.stderr
        first = revision(repository)
        rows = rows_of(folder / "test")
        write(repository / shards[0], table([(content, 2 - label) for content, label in rows]))
        assert revision(repository) != first
        ended = run_process(*train)
        assert (ended.returncode, [downloads.count(name) for name in shards]) == (2, [2, 1, 1]), ended.stderr
        assert "R1111 was trained with other settings on hf:some-org/clothes: data" in ended.stderr
    # the hub cannot be reached any more
    ended = run_process(*train, "--force")
    assert ended.returncode == 0, ended.stderr
    assert "downloads" not in ended.stderr
