"""Raw representations and their rows: in memory, in stores, and from every source."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsitch.activations.alignment import Alignment, resample
from fastsitch.activations.image_order import ImageOrder
from fastsitch.activations.live_source import LiveSource, LiveSplit, LiveSplitInOrder
from fastsitch.activations.ordered_split import OrderedSplit, ResidentSplitInOrder, StoredSplitInOrder
from fastsitch.activations.precompute import ensure_store
from fastsitch.activations.resident_source import ResidentSource
from fastsitch.activations.source import Source
from fastsitch.activations.store import ActivationStore
from fastsitch.activations.streamed_source import StreamedSource
from fastsitch.chains.chain import Chain
from fastsitch.chains.layout import Layout, elements, grid_rows, index_among_equal_shapes, shape_text, stored_size
from fastsitch.chains.position import Position
from fastsitch.data import Dataset, Split
from fastsitch.errors import NetworkError
from fastsitch.identity import tensors_hash
from fastsitch.kernels import stitch_grad, stitch_out
from fastsitch.networks.checkpoint import Network, NetworkRecord
from fastsitch.planning.group_memory import StepKind, group_memory, matching_memory
from fastsitch.receivers.frozen_network import FrozenNetwork
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.stitching.engine import train_group
from fastsitch.stitching.geometry import Geometry, Rules
from tests.layout_chains import CPU, first_chain, second_chain
from tests.test_engine import RECIPE

UNIT = Unit(sender="R1111", receiver="R1112", setting="T2T", loss="task", seed=0)

POSITIONS = {
    (5, 6, 4): Position(0, "map", (5, 6, 4)),
    (5, 6, 8): Position(0, "map-last", (6, 8, 5), "map-last"),
    (3, 4, 4): Position(0, "tokens", (16, 3), "tokens"),
    (3, 4, 4, 1): Position(0, "class", (17, 3), "tokens", 1),
    (3, 2, 5, 2): Position(0, "register", (12, 3), "tokens", 2, (2, 5)),
    (3, 2, 8): Position(0, "strip", (16, 3), "tokens", 0, (2, 8)),
    (7,): Position(0, "vector", (7,), "vector"),
}


def test_positions_are_counted_among_those_of_their_shape() -> None:
    large, small = (4, 8, 8), (4, 4, 4)
    assert index_among_equal_shapes([large, large, small, large, small, (4, 4, 4, 1)]) == [0, 1, 0, 2, 1, 0]
    assert index_among_equal_shapes([]) == []


@pytest.mark.parametrize("shape", POSITIONS)
def test_rows_are_a_view_of_the_raw_tensor_and_back(shape: tuple[int, ...]) -> None:
    position = POSITIONS[shape]
    assert position.rows == shape
    raw = position.empty(4, torch.float64, CPU)
    assert raw.shape == (4, *position.shape)
    raw.copy_(torch.randn(raw.shape, dtype=torch.float64))
    rows = position.to_rows(raw)
    assert rows.shape == (4, *stored_size(shape), shape[0])
    assert rows.is_contiguous()
    assert rows[0].numel() == elements(shape)
    assert rows.data_ptr() == raw.data_ptr()
    back = position.to_raw(rows)
    assert torch.equal(back, raw)
    assert back.data_ptr() == raw.data_ptr()
    # a row is a token, or a cell with all its channels
    tokens = raw.flatten(2).mT if position.layout == "map" else raw.reshape(4, -1, shape[0])
    assert torch.equal(rows.flatten(1, 2), tokens)
    assert Position.from_dict(json.loads(json.dumps(position.to_dict()))).rows == shape


def test_a_position_of_maps_is_written_as_before() -> None:
    assert POSITIONS[5, 6, 4].to_dict() == {"index": 0, "name": "map", "shape": (5, 6, 4)}
    assert list(POSITIONS[5, 6, 4].to_dict()) == ["index", "name", "shape"]
    assert [shape_text(shape) for shape in POSITIONS] == [
        "5x6x4",
        "5x6x8",
        "3x4x4",
        "3x4x4 and 1 token",
        "3x2x5 and 2 tokens",
        "3x2x8",
        "7",
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (((5, 6), "map"), r"shape \(5, 6\): expected \(C, H, W\) for layout map"),
        (((5, 6, 7), "tokens"), r"expected \(N, C\) for layout tokens"),
        (((5, 6), "vector"), r"expected \(C,\) for layout vector"),
        (((5, 6, 7), "grid"), "expected layout map, map-last, tokens, vector, found 'grid'"),
        (((5, 6, 7), "map", 1), "has layout map: expected tokens where there are prefix tokens or a grid"),
        (
            ((17, 6), "tokens"),
            "17 tokens: expected prefix tokens and a square, found 0 prefix tokens and 17 others",
        ),
        (((17, 6), "tokens", 1, (3, 5)), "expected prefix tokens and a grid of 3x5, found 1 prefix tokens and 16"),
        (((1, 6), "tokens", 1), "found 1 prefix tokens and 0 others"),
    ],
)
def test_positions_that_do_not_fit_are_refused(content: tuple[object, ...], reason: str) -> None:
    with pytest.raises(NetworkError, match=reason):
        Position(0, "block", *content)  # type: ignore[arg-type]


def test_a_chain_infers_layouts_from_dimensions_or_takes_given_ones() -> None:
    class Tokens(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(2).transpose(1, 2)

    def model(side: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 4, 8, side), Tokens(), nn.Flatten(), nn.Linear(4 * (24 // side + 1) ** 2, 10))

    chain = Chain.from_module(model(8), torch.zeros(1, 3, 32, 32))
    assert [position.layout for position in chain.positions] == ["map", "tokens", "vector"]
    assert [position.rows for position in chain.positions] == [(4, 4, 4), (4, 4, 4), (64,)]
    told = Chain.from_module(model(8), torch.zeros(1, 3, 32, 32), layouts={"1": Layout("tokens", grid=(2, 8))})
    assert told.positions[1].rows == (4, 2, 8)
    inputs = told.with_input()
    assert [position.rows for position in inputs.positions] == [(3, 32, 32), (4, 4, 4), (4, 2, 8), (64,)]
    with pytest.raises(NetworkError, match="layouts of 9: no such positions; the chain has 0, 1, 2"):
        Chain.from_module(model(8), torch.zeros(1, 3, 32, 32), layouts={"9": Layout()})
    with pytest.raises(NetworkError, match="position 'deep' is a tensor of 5 dimensions"):
        Chain([nn.Unflatten(1, (1, 3))], nn.Flatten(), ["deep"], (3, 32, 32))


def test_resampling_is_interpolate(fashion: Dataset, images: Tensor) -> None:
    x = images.view(2, 6, 3, 32, 32)
    rows = x.permute(0, 1, 3, 4, 2)
    for size in ((7, 7), (20, 45), (33, 5)):
        for method, options in (
            ("area", {"mode": "area"}),
            ("bilinear", {"mode": "bilinear", "align_corners": False, "antialias": True}),
            ("repeat", {"mode": "nearest"}),
        ):
            expected = F.interpolate(images, size, **options).view(2, 6, 3, *size).permute(0, 1, 3, 4, 2)
            found = resample(rows, size, method)
            assert found.is_contiguous()
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(resample(rows, (1, 1), "mean"), resample(rows, (1, 1), "area"), rtol=1e-12, atol=1e-12)
    for method in ("area", "bilinear"):
        half = resample(rows.to(torch.bfloat16), (7, 9), method)
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.double(), resample(rows, (7, 9), method), rtol=0.02, atol=0.02)


def test_an_alignment_is_computed_once_for_all_stitches_that_share_it(fashion: Dataset) -> None:
    source = record_source(fashion)
    batch = source.train.batch(torch.arange(8))
    geometries = [Geometry.between((6, 4, 4, 1), (d, 2, 2, 1)) for d in (4, 9)]
    first, second = (geometry.alignment for geometry in geometries)
    assert isinstance(first, Alignment)
    assert first == second
    assert batch.aligned(first) is batch.aligned(second)
    # the same tokens on the same grid go through as they are
    whole = Geometry.between((6, 4, 4, 1), (3, 4, 4, 1)).alignment
    assert whole is not None
    assert whole.whole
    assert torch.equal(batch.aligned(whole)[0], batch.values((6, 4, 4, 1), 0))


def record_source(data: Dataset) -> ResidentSource:
    chain = first_chain()
    model = FrozenNetwork(chain, dtype=torch.float64, device=CPU)
    found = model.representations(data.normalisation.apply(data.train.images[:24], torch.float64))
    labels = data.train.labels[:24]
    return ResidentSource.from_tensors(found, found, labels, labels, positions=chain.positions)


def test_the_operator_reads_the_grid_behind_prefix_tokens_in_place() -> None:
    """The operands of a kernel that gathers: strided rows and the images' index."""
    shape = (5, 4, 4, 2)
    x = torch.randn(2, 9, *stored_size(shape), 5, dtype=torch.float64)
    grid = grid_rows(x, shape)
    assert torch.equal(grid, x[:, :, 0, 2:].reshape(2, 9, 4, 4, 5))
    assert grid.data_ptr() == x[:, :, 0, 2:].data_ptr()
    w, b = torch.randn(3, 20, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    index, source = torch.tensor([7, 0, 3, 3]), (1, 0, 1)
    outs = [torch.empty(3, 4, 2, 2, 6, dtype=torch.float64) for _ in range(2)]
    g = torch.randn(outs[0].shape, dtype=torch.float64)
    grads = [(torch.empty_like(w), torch.empty_like(b)) for _ in range(2)]
    for x_SNHWC, out, (dw, db) in zip((grid, grid.contiguous()), outs, grads, strict=True):
        stitch_out(x_SNHWC, w, b, out, source, index, down=2)
        stitch_grad(x_SNHWC, g, dw, db, source, index, down=2)
    assert torch.equal(*outs)
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


@pytest.fixture(scope="module")
def data(fashion: Dataset) -> Dataset:
    """300 + 70 real images as a data set with another name."""
    return Dataset(
        "npz:few.npz",
        Split(fashion.train.images[:300], fashion.train.labels[:300]),
        Split(fashion.test.images[:70], fashion.test.labels[:70]),
        10,
    )


def network_of(chain: Chain, data: Dataset) -> Network:
    record = NetworkRecord(
        name="R1111",
        dataset=data.name,
        data_hash=data.hash,
        width=3,
        classes=10,
        input_shape=data.input_shape,
        normalisation=data.normalisation,
        recipe={},
        accuracy=None,
        loss=None,
        weights_hash=tensors_hash(chain.state_dict()),
        versions={},
    )
    return Network(record, chain)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_stores_hold_every_kind_and_all_sources_give_the_same(dtype: str, data: Dataset, tmp_path: Path) -> None:
    chain = first_chain().float()
    network = network_of(chain, data)
    store, _ = ensure_store(tmp_path / "R1111", data, network, device=CPU, dtype=dtype)
    store = ActivationStore.open(store.path)
    assert [position.rows for position in store.positions] == [position.rows for position in chain.positions]
    attributes = [json.loads(store.path.read(f"train/{i}/zarr.json"))["attributes"] for i in range(7)]
    assert attributes[0] == {"dtype": dtype, "position": "map8"}
    assert attributes[2] == {"dtype": dtype, "position": "last7", "layout": "map-last"}
    tokens = {"layout": "tokens", "prefix_tokens": 1, "grid": [4, 4]}
    assert attributes[4] == {"dtype": dtype, "position": "class4", **tokens}
    assert attributes[6] == {"dtype": dtype, "position": "vector", "layout": "vector"}
    assert [store.read("train", i, 0, 5).shape[1:] for i in (0, 4, 6)] == [(8, 8, 3), (1, 17, 6), (1, 1, 7)]

    frozen = FrozenNetwork(chain, dtype={"fp32": torch.float32}.get(store.identity.compute, torch.bfloat16), device=CPU)
    stored = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]

    def live(split: Split) -> LiveSplit:
        return LiveSplit(frozen, data.normalisation, split, stored=stored, dtype=torch.float64)

    resident = ResidentSource.load(store, dtype=torch.float64, device=CPU)
    streamed = StreamedSource(store, dtype=torch.float64, device=CPU)
    alive = LiveSource(live(data.train), live(data.test))
    ordered: list[OrderedSplit] = [
        ResidentSplitInOrder(resident),
        StoredSplitInOrder(store, dtype=torch.float64, device=CPU),
        LiveSplitInOrder(alive.train),
    ]
    with torch.no_grad():
        raw = chain.representations(data.normalisation.apply(data.train.images[:256]))
        for i, position in enumerate(chain.positions):
            one, *others = (split.images(i, 0, 256) for split in ordered)
            for other in others:
                assert torch.equal(one, other)
            tolerance = 1e-5 if dtype == "fp32" else 0.05
            torch.testing.assert_close(
                position.to_raw(one.contiguous()).float(), raw[i], rtol=tolerance, atol=tolerance
            )
        receiver = FrozenNetwork(second_chain(), dtype=torch.float64, device=CPU)
        cells = [Cell(UNIT, i, j) for i in range(7) for j in range(6)]
        sources: list[Source] = [resident, streamed, alive]
        order, recipe = ImageOrder(seed=0, block=64, window=128), replace(RECIPE, batch_size=50)
        rules = Rules(resample="area")
        results = [train_group(receiver, source, cells, recipe, order, rules=rules) for source in sources]
    for cell in cells:
        assert torch.equal(results[0][cell].weight_FD, results[1][cell].weight_FD)
        assert results[0][cell].loss == results[1][cell].loss
        # convolutions of other batches round otherwise
        assert results[2][cell].loss == pytest.approx(results[0][cell].loss, rel=1e-4 if dtype == "fp32" else 0.05)


def test_predicted_memory_counts_tokens_and_aligned_copies() -> None:
    kind = StepKind(images=8, itemsize=8, device="cpu", rules=Rules(resample="area"))
    sender, receiver = [(3, 8, 8)], [(5, 7, 7, 1)]
    empty = group_memory([], sender, receiver, kind)
    buffers = 8 * 8 * 5 * 50
    parameters = (3 + 1) * 5 * 4 * 8
    inputs = 8 * 8 * 3 * (64 + 50)
    assert group_memory([(0, 0)], sender, receiver, kind) - empty == buffers + parameters + inputs
    # products of the inputs, on 8x8 for the map and aligned for the tokens, and twice those of the cells
    pair = matching_memory(sender, [(5, 8, 8), (5, 7, 7, 1)], rules=kind.rules)
    assert pair == 8 * (3 * 3 + 3 * 3 + 2 * (3 * 5 + 3 * 5))


def test_the_format_of_a_store_of_maps_is_unchanged(data: Dataset, tmp_path: Path) -> None:
    """Attributes and manifest are the same as before there were other layouts."""
    chain = Chain([nn.Conv2d(3, 4, 4, 4)], nn.Sequential(nn.Flatten(), nn.Linear(256, 10)), ["stem"], (3, 32, 32))
    store, _ = ensure_store(tmp_path / "R1111", data, network_of(chain.eval(), data), device=CPU)
    manifest = json.loads(store.path.read("manifest.json"))
    assert manifest["positions"] == [{"index": 0, "name": "stem", "shape": [4, 8, 8]}]
    array = json.loads(store.path.read("train/0/zarr.json"))
    assert array["attributes"] == {"dtype": "bf16", "position": "stem"}
    assert np.prod(array["shape"]) == 300 * 8 * 8 * 4
