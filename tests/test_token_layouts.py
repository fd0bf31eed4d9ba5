"""Transformers and modules that are run as a whole: where they are cut, and what their tokens mean."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastsitch.chains.chain import Chain
from fastsitch.chains.layout import Layout, parse_layout, token_layout
from fastsitch.errors import ConfigError, NetworkError
from tests.conftest import Command
from tests.test_vetting import IMAGES, Apply


class Patches(nn.Module):
    """Tokens from an image; run as a whole, since its path depends on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return self.embed(x).flatten(2).transpose(1, 2)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.block, self.head = Patches(), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.patches(x)).mean(1))


@pytest.mark.parametrize(("size", "grid"), [((8, 32), (2, 8)), ((32, 8), (8, 2)), ((16, 16), (4, 4))])
def test_the_grid_of_tokens_has_the_proportions_of_the_image(
    size: tuple[int, int], grid: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.randn(1, 3, *size)
    (patches, block, *_) = Chain.from_module(Tokens(), x, "patches,block").positions
    assert (patches.grid, block.grid) == (grid, grid)
    assert (
        f"the 16 tokens at patches ... block (2 positions) are taken for a grid of {grid[0]}x{grid[1]}" in caplog.text
    )
    (segment,) = Chain.from_segments([Patches()], ["a"], Apply(lambda _, x: x.mean(1)), x).positions
    assert segment.grid == grid


def test_tokens_on_no_grid_of_the_image_are_no_position() -> None:
    x = torch.randn(1, 3, 16, 24)
    assert token_layout(24, (16, 24)) == Layout("tokens", 0, (4, 6))
    assert token_layout(16, (16, 24)) is None
    some = Apply(lambda s, x: s.patches(x)[:, :16], patches=Patches())
    with pytest.raises(NetworkError, match="'a' has 16 tokens, which form no grid in the proportions of .* 16x24"):
        Chain.from_segments([some], ["a"], Apply(lambda _, x: x.mean(1)), x)
    layouts = {"a": parse_layout("tokens:2x8")}
    chain = Chain.from_segments([some], ["a"], Apply(lambda _, x: x.mean(1)), x, layouts)
    assert chain.positions[0].grid == (2, 8)


def test_a_layout_that_is_given_settles_it(few: str, tmp_path: Path, run_cli: Command) -> None:
    x = torch.randn(1, 3, 16, 16)
    chain = Chain.from_module(Tokens(), x, "patches,block", {"patches": Layout("tokens", 0, (2, 8))})
    assert [position.grid for position in chain.positions] == [(2, 8), (2, 8)]
    (tmp_path / "tokens.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Patches(nn.Module):\n"
        "    def __init__(self):\n        super().__init__(); self.embed = nn.Conv2d(3, 8, 8, 8)\n"
        "    def forward(self, x):\n"
        "        if x.sum() > 1e9: return x\n"
        "        return self.embed(x).flatten(2).transpose(1, 2)\n"
        "class Tokens(nn.Module):\n"
        "    def __init__(self, classes):\n        super().__init__()\n"
        "        self.patches, self.head = Patches(), nn.Linear(8, classes)\n"
        "    def forward(self, x):\n        return self.head(self.patches(x).mean(1))\n"
        "def tokens(classes): return Tokens(classes)\n"
    )
    line = ["add", "tok", "--from", f"{tmp_path}/tokens.py:tokens", "--positions", "patches", "--dataset", few]
    guessed = run_cli(*line, "--root", tmp_path / "guessed")
    assert "taken for a grid of 4x4" in guessed.stderr
    given = run_cli(*line, "--layout", "patches=tokens:2x8", "--root", tmp_path / "given")
    assert given.returncode == 0, given.stderr
    assert "taken for" not in given.stderr
    trained = run_cli("train", "tok", "--epochs", "1", "--dataset", few, "--root", tmp_path / "given")
    assert trained.returncode == 0, trained.stderr
    pair = ["--senders", "tok", "--receivers", "tok", "--batch-size", "32"]
    dry = run_cli("sweep", *pair, "--root", tmp_path / "given", "--dry-run")
    assert "8x2x8" in dry.stdout
    for text, message in (
        ("patches", "--layout patches: expected POSITION=KIND"),
        ("patches=grid", "--layout grid: expected map, map-last"),
    ):
        assert message in run_cli(*line, "--layout", text, "--root", tmp_path / "bad").stderr


def test_layouts_are_parsed_or_refused() -> None:
    assert parse_layout("map") == Layout()
    assert parse_layout("tokens:1+14x14") == Layout("tokens", 1, (14, 14))
    for text in ("", "maps", "tokens:14", "tokens:1+", "tokens:axb", "tokens:99999x1"):
        with pytest.raises(ConfigError, match="expected map, map-last, vector, tokens"):
            parse_layout(text)


class Block(nn.Module):
    """A residual block over tokens; one that ``explains`` also returns something else."""

    def __init__(self, explains: bool = False) -> None:
        super().__init__()
        self.norm, self.linear, self.explains = nn.LayerNorm(8), nn.Linear(8, 8), explains

    def forward(self, x: Tensor) -> Any:
        y = x + self.linear(self.norm(x))
        return (y, self.linear(y)) if self.explains else y


class Transformer(nn.Module):
    """With the tokens first, or with blocks that return a tuple; ``uses`` what the blocks return beside."""

    def __init__(self, tokens_first: bool = False, explains: bool = False, uses: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList([Block(explains) for _ in range(3)])
        self.head = nn.Linear(8, 10)
        self.tokens_first, self.uses = tokens_first, uses

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2)
        x = x.permute(2, 0, 1) if self.tokens_first else x.transpose(1, 2)
        beside = 0
        for block in self.blocks:
            found = block(x)
            x, other = found if isinstance(found, tuple) else (found, 0)
            beside = beside + other if self.uses else 0
        return self.head((x + beside).mean(0 if self.tokens_first else 1))


@pytest.mark.parametrize(
    "options", [{"tokens_first": True}, {"explains": True}, {"tokens_first": True, "explains": True}]
)
def test_transformers_of_every_build_are_cut_at_their_blocks(options: dict[str, bool]) -> None:
    model = Transformer(**options).eval()
    chain = Chain.from_module(model, IMAGES)
    assert [position.name for position in chain.positions[1:]] == ["blocks.0", "blocks.1", "blocks.2"]
    assert {(position.shape, position.layout, position.grid) for position in chain.positions} == {
        ((16, 8), "tokens", (4, 4))
    }
    kept: list[Tensor] = []
    hook = model.blocks[1].register_forward_hook(
        lambda module, inputs, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    expected = model(IMAGES)
    hook.remove()
    (known,) = kept
    wanted = known.transpose(0, 1) if options.get("tokens_first") else known
    for count in (3, 2, 1):
        x = IMAGES[:count]
        representations = chain.representations(x)
        torch.testing.assert_close(representations[2], wanted[:count])
        for position, representation in zip(chain.positions, representations, strict=True):
            torch.testing.assert_close(chain.tail(representation, position.index), expected[:count])
            rows = position.to_rows(representation)
            torch.testing.assert_close(position.to_raw(rows.contiguous()), representation)


def test_blocks_that_are_left_out_are_said(caplog: pytest.LogCaptureFixture) -> None:
    chain = Chain.from_module(Transformer(explains=True, uses=True), IMAGES)
    names = [position.name for position in chain.positions]
    left = re.findall(r"block (\S+) is no position: its output is not on every path", caplog.text)
    assert left
    assert not set(left) & set(names)
    assert {"blocks.0", "blocks.1", "blocks.2"} <= set(names) | set(left)


class Pair(nn.Module):
    """Run as a whole; returns two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        if x.sum() > 1e9:
            return x
        return self.linear(x), self.linear(x)


def test_of_several_tensors_of_a_module_that_is_run_as_a_whole_the_first_alone_has_its_name() -> None:
    for first, choose in (
        (True, lambda found: found[0]),
        (False, lambda found: found[1]),
        (False, lambda found: found[0] + found[1]),
    ):
        model = Apply(
            lambda s, x: s.head(choose(s.pair(s.embed(x).flatten(2).transpose(1, 2))).mean(1)),  # noqa: B023
            embed=nn.Conv2d(3, 8, 4, 4),
            pair=Pair(),
            head=nn.Linear(8, 10),
        ).eval()
        chain = Chain.from_module(model, IMAGES, "*")
        assert {"embed", "transpose"} <= {position.name for position in chain.positions}
        assert ("pair" in {position.name for position in chain.positions}) == first
        assert torch.equal(chain(IMAGES), model(IMAGES))
