"""Receivers whose segments run as graphs: what a sweep computes with them is what plain autograd gives."""

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

from fastsitch.chains.chain import Chain
from fastsitch.receivers import compiled_blocks, graph_segment
from fastsitch.receivers.compiled_blocks import compile_blocks
from fastsitch.receivers.frozen_network import FrozenNetwork
from fastsitch.receivers.frozen_segments import AutogradSegment
from fastsitch.receivers.graph_segment import GraphSegment, segment_costs, use_graphs
from fastsitch.stitching.cascade import Cascade
from tests.test_cut import randomised
from tests.test_frozen_graphs import network

CPU = torch.device("cpu")
FAMILIES = ("resnet18", "mobilenet_v3_small", "densenet", "convnext", "vit", "swin")


def receiver(name: str) -> Chain:
    model = randomised(network(name)).eval().double().requires_grad_(False)
    return Chain.from_module(model, torch.zeros(1, 3, 32, 32))


def both(chain: Chain, dtype: torch.dtype = torch.float64) -> tuple[FrozenNetwork, FrozenNetwork]:
    """The same receiver through autograd and as graphs."""
    one, other = (FrozenNetwork(chain, dtype=dtype, device=CPU) for _ in range(2))
    return one, use_graphs(other, chain)


def passed(model: FrozenNetwork, counts: list[int], images: int, spoilt: int | None = None) -> list[Tensor]:
    """Logits, and the gradients at every position, of stitches whose outputs are random, but equal for every model."""
    cascade = Cascade(model, counts, images)
    generator = torch.Generator().manual_seed(0)

    def fill(j: int, out: Tensor) -> None:
        # about as large as what the network itself has there
        values = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        if spoilt is not None and j == 0:
            values[spoilt, 0] = torch.nan
        out.copy_(values)

    logits = cascade.forward(fill)
    g = torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits.dtype)
    return [logits.clone(), *(gradient.clone() for _, gradient in cascade.backward(g))]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_stitches_get_the_logits_and_gradients_of_autograd(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_segment, "_MOST_IMAGES", {"cpu": 32})
    chain = receiver(name)
    before = copy.deepcopy(chain.state_dict())
    plain, graphs = both(chain)
    assert all(isinstance(segment, GraphSegment) for segment in graphs.segments[1:])
    # stitches into some positions alone, and micro-batches that are not whole
    counts = [2 if j % 3 == 0 else 0 for j in range(len(chain.positions))]
    counts[-1] += 1
    assert all(segment.images <= 32 for segment in graphs.segments[1:] if isinstance(segment, GraphSegment))
    for expected, found in zip(passed(plain, counts, 35), passed(graphs, counts, 35), strict=True):
        assert (found - expected).norm() <= 1e-12 * expected.norm()
    assert all(torch.equal(tensor, before[key]) for key, tensor in chain.state_dict().items())


@pytest.mark.parametrize("name", ["vit", "swin"])
@torch.no_grad()
def test_attention_by_products_is_the_same(name: str) -> None:
    chain = receiver(name)
    plain, fused = both(chain)
    products = use_graphs(FrozenNetwork(chain, dtype=torch.float64, device=CPU), chain, "products")
    attending = [isinstance(segment, GraphSegment) and segment.attends for segment in fused.segments]
    # torchvision's Swin multiplies by itself
    assert any(attending) == (name == "vit")
    assert all(isinstance(segment, GraphSegment) and not segment.attends for segment in products.segments[1:])
    counts = [1] * len(chain.positions)
    for expected, found in zip(passed(plain, counts, 9), passed(products, counts, 9), strict=True):
        assert (found - expected).norm() <= 1e-12 * expected.norm()
    assert not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("name", ["resnet18", "vit"])
@torch.no_grad()
def test_rounding_is_that_of_the_network(name: str) -> None:
    chain = receiver(name)
    exact = passed(FrozenNetwork(chain, dtype=torch.float64, device=CPU), [1] + [0] * (len(chain.positions) - 1), 16)
    plain, graphs = both(chain.float(), torch.bfloat16)
    errors = [
        [float((found.double() - wanted).norm() / wanted.norm()) for found, wanted in zip(outputs, exact, strict=True)]
        for outputs in (passed(model, [1] + [0] * (len(chain.positions) - 1), 16) for model in (plain, graphs))
    ]
    assert all(graph <= 2 * own for own, graph in zip(*errors, strict=True))


@pytest.mark.parametrize("name", ["resnet18", "convnext"])
@torch.no_grad()
def test_stitches_do_not_see_each_other(name: str) -> None:
    _, graphs = both(receiver(name))
    counts = [3, 1] + [0] * (len(graphs.positions) - 2)
    together, spoilt = passed(graphs, counts, 8), passed(graphs, counts, 8, spoilt=1)
    logits, changed = together[0], spoilt[0]
    assert changed[1, 0].isnan().any()
    assert torch.equal(changed[[0, 2, 3]], logits[[0, 2, 3]])
    assert torch.equal(changed[1, 1:], logits[1, 1:])
    # one stitch alone
    generator = torch.Generator().manual_seed(0)
    rows = graphs.positions[0].to_rows(graphs.positions[0].empty(8, torch.float64, CPU))
    values = torch.randn(3, *rows.shape, generator=generator, dtype=torch.float64)
    alone = Cascade(graphs, [1] + [0] * (len(graphs.positions) - 1), 8)
    single = alone.forward(lambda j, out: out.copy_(values[:1]) if j == 0 else None)
    assert (single[0] - logits[0]).norm() <= 1e-13 * logits[0].norm()


def test_equal_blocks_are_one_program() -> None:
    _, graphs = both(receiver("vit"))
    first, second = (segment for segment in graphs.segments[-2:] if isinstance(segment, GraphSegment))
    assert first._halves is second._halves
    # also of networks with other weights
    _, others = both(receiver("vit"))
    assert [segment._halves for segment in others.segments[1:]] == [segment._halves for segment in graphs.segments[1:]]


def test_what_is_run_again_is_run_when_it_is_needed() -> None:
    """Densely connected layers: all that comes before each of them, normalised, is computed again on the way back."""
    _, graphs = both(receiver("densenet"))
    blocks = [segment._halves for segment in graphs.segments if isinstance(segment, GraphSegment)]
    again = 0
    for halves in blocks:
        nodes = list(halves.backward.graph.nodes)
        place = {node: index for index, node in enumerate(nodes)}
        first_gradient = place[next(node for node in reversed(nodes) if node.op == "placeholder")]
        reads_gradient: set[object] = {nodes[first_gradient]}
        for node in nodes:
            if any(each in reads_gradient for each in node.all_input_nodes):
                reads_gradient.add(node)
        for node in nodes:
            if node.op == "call_function" and node not in reads_gradient:
                # up to the gradient that it is for, nothing but what that needs
                end = min(place[user] for user in node.users)
                between = nodes[place[node] + 1 : end]
                assert not any(each in reads_gradient for each in between)
                again += 1
    assert again > 10


@torch.no_grad()
def test_a_head_that_ends_in_a_relu_passes_no_gradient_where_it_is_zero() -> None:
    torch.manual_seed(0)
    chain = Chain.from_segments(
        [nn.Conv2d(3, 4, 3)],
        ["first"],
        nn.Sequential(nn.Flatten(), nn.Linear(4 * 6 * 6, 5), nn.ReLU()),
        torch.zeros(1, 3, 8, 8),
    )
    plain, graphs = both(chain.double().eval())
    (logits, wanted), (_, found) = passed(plain, [1], 9), passed(graphs, [1], 9)
    assert (logits == 0).any()
    assert (found - wanted).norm() <= 1e-12 * wanted.norm()


class OfTheBatch(nn.Module):
    """Gives every image the same in any batch, in a way that counts its images squared."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() + x.new_zeros(len(x) ** 2).sum()


def test_what_cannot_be_a_graph_runs_through_autograd(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    chain = Chain.from_segments(
        [nn.Conv2d(3, 4, 3), OfTheBatch(), nn.Conv2d(4, 4, 3)],
        ["first", "second", "third"],
        nn.Sequential(nn.Flatten(), nn.Linear(4 * 4 * 4, 5)),
        torch.zeros(1, 3, 8, 8),
    )
    caplog.set_level(logging.INFO)
    plain, graphs = both(chain.double())
    kinds = [type(segment) for segment in graphs.segments]
    assert kinds == [AutogradSegment, AutogradSegment, GraphSegment]
    (line,) = (record.message for record in caplog.records if "autograd" in record.message)
    assert "position second" in line
    assert "number of images" in line
    for expected, found in zip(passed(plain, [1, 0, 1], 6), passed(graphs, [1, 0, 1], 6), strict=True):
        assert (found - expected).norm() <= 1e-12 * expected.norm()
    # sin keeps its input, of 8 bytes per number
    assert segment_costs(graphs)[1].kept in (0, 8 * 4 * 6 * 6)


@torch.no_grad()
def test_kept_memory_is_what_is_said() -> None:
    _, graphs = both(receiver("mobilenet_v3_small"))
    cascade = Cascade(graphs, [1] + [0] * (len(graphs.positions) - 1), 10)
    cascade.forward(lambda j, out: out.normal_())
    for segment, saved in zip(graphs.segments[1:], cascade._saved[1:], strict=True):
        assert isinstance(segment, GraphSegment)
        assert sum(tensor.untyped_storage().nbytes() for tensor in saved) == 10 * segment.cost.kept


@pytest.mark.slow
@torch.no_grad()
def test_compiled_graphs_give_the_same() -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.SiLU()) for _ in range(2)]
    chain = Chain.from_segments(
        [nn.Conv2d(3, 4, 3), *map(randomised, blocks)],
        ["first", "second", "third"],
        nn.Sequential(nn.Flatten(), nn.Linear(4 * 6 * 6, 5)),
        torch.zeros(1, 3, 8, 8),
    ).eval()
    plain, graphs = both(chain, torch.float32)
    compile_blocks(graphs)
    for expected, found in zip(passed(plain, [1, 0, 1], 70), passed(graphs, [1, 0, 1], 70), strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


@torch.no_grad()
def test_what_cannot_be_compiled_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("no such operation here")

    monkeypatch.setattr(compiled_blocks, "BACKEND", refuse)
    monkeypatch.setattr(compiled_blocks, "_cache", {})
    torch.manual_seed(0)
    chain = Chain.from_segments(
        [nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ELU())],
        ["first", "second"],
        nn.Sequential(nn.Flatten(), nn.Linear(4 * 6 * 6, 5)),
        torch.zeros(1, 3, 8, 8),
    ).eval()
    plain, graphs = both(chain, torch.float32)
    compile_blocks(graphs)
    for expected, found in zip(passed(plain, [1, 0], 70), passed(graphs, [1, 0], 70), strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert any("no such operation here" in record.message for record in caplog.records)
