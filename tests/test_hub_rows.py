"""Rows of a table are treated as files are: looked at once, and left where they are if there are many."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastsitch.data import Dataset, ImageFiles, folder_dataset, image_folder, load_dataset
from tests.test_any_data import pictures
from tests.test_hub_data import load, mixed, parquets

pytestmark = pytest.mark.usefixtures("hub_caches")


@pytest.mark.parametrize("parts", ["", "@16"])
def test_tables_that_memory_does_not_hold_stay_on_the_disk(
    parts: str, fashion: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = parquets(tmp_path / "made", pictures(tmp_path / "pics", fashion, (28, 28), each=60))
    held = load(made, parts)
    assert isinstance(held.train.images, torch.Tensor)
    monkeypatch.setattr(folder_dataset, "MOST_IN_MEMORY", 0)
    left = load(made, parts)
    assert isinstance(left.train.images, ImageFiles)
    assert (left.hash, left.normalisation, left.size) == (held.hash, held.normalisation, held.size)
    assert torch.equal(left.train.pixels, held.train.pixels)
    assert torch.equal(left.test[torch.tensor([9, 2])].pixels, held.test.pixels[[9, 2]])


def test_rows_are_looked_at_once(fashion: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of the rows is remembered as that of files is, for every column by itself."""
    monkeypatch.setattr("fastsitch.data.file_facts._WORTH", 1)
    monkeypatch.setattr("fastsitch.data.file_facts._SETTLED", 0)
    folder = mixed(tmp_path / "pics", fashion)
    made = parquets(tmp_path / "made", folder)
    looked: list[str] = []
    opened = image_folder.opened

    def counted(file: Any) -> Any:
        looked.append(str(file))
        return opened(file)

    monkeypatch.setattr("fastsitch.data.image_folder.opened", counted)
    first = load_dataset(f"hf:{made}", tmp_path).hash
    assert len(looked) == 24
    assert load_dataset(f"hf:{made}", tmp_path).hash == first
    assert len(looked) == 24
