"""The pages of the documentation do what they say: their Python runs as it stands there."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DOCS = Path(__file__).parents[1] / "docs"


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def test_the_python_page_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks in one namespace, one after the other, as in a notebook."""
    monkeypatch.chdir(tmp_path)
    for variable in ("FASTSITCH_ROOT", "FASTSITCH_DATA_DIR"):
        monkeypatch.delenv(variable, raising=False)
    blocks = python_blocks(DOCS / "python.md")
    assert len(blocks) > 5
    names: dict[str, Any] = {"__name__": "page"}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"python.md, block {number}", "exec"), names)
    assert names["accuracy"].shape == (5, 6)
    for path in ("results/R1111--R1112.T2T.npz", "results/R1111--R1112.T2T.png", "by-hand.npz"):
        assert (tmp_path / path).is_file()
    pair = names["pair"]
    assert pair.accuracy.shape == (3, 3)
    assert (pair.status == 1).all()
    # chance is 0.1: these are networks that were trained, and stitches that carry what they know
    assert pair.accuracy.mean() > 0.4
    assert np.isfinite(names["matched"].matched_error).all()


@pytest.mark.parametrize("page", [*sorted(DOCS.glob("*.md")), DOCS.parent / "README.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target
