"""Frozen blocks equal plain autograd in values and gradients, whatever the micro-batch, and keep less."""

import pytest
import torch
from torch import Tensor

from fastsitch.activations.image_order import ImageOrder
from fastsitch.data import Dataset
from fastsitch.identity import torch_generator
from fastsitch.networks.resnet import BasicBlock
from fastsitch.receivers import residual_block as blocks
from fastsitch.receivers.convolution import convolve, input_gradient
from fastsitch.receivers.frozen_network import FrozenNetwork
from fastsitch.receivers.relu_mask import apply_mask, mask_bytes, pack_mask
from fastsitch.receivers.residual_block import BlockWeights, FrozenBlock, MaskedBlock
from fastsitch.stitching.cascade import Cascade
from fastsitch.stitching.engine import train_group
from tests.conftest import network
from tests.test_engine import RECIPE, all_cells, assert_same, source_of

CPU = torch.device("cpu")


def block_of(stride: int, channels: int) -> BasicBlock:
    """A block in fp64 and eval mode whose BatchNorm is not the identity."""
    segment = network("R1111", width=channels).segments[1 if stride == 1 else 2]
    assert isinstance(segment, BasicBlock)
    return segment


def random_maps(*shape: int) -> Tensor:
    images, channels, height, width = shape
    x = torch.randn(images, height, width, channels, dtype=torch.float64, generator=torch_generator("maps", *shape))
    return x.permute(0, 3, 1, 2)


@pytest.mark.parametrize("form", ["frozen", "masked", "masked, whole micro-batches"])
@pytest.mark.parametrize(("stride", "height", "width"), [(1, 8, 8), (2, 8, 8), (2, 7, 5), (1, 3, 5)])
def test_blocks_equal_autograd(
    form: str, stride: int, height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(blocks.CHUNK_BYTES, "cpu", 1)
    module, samples, capacity = block_of(stride, 6), 19, 24
    block = FrozenBlock(module, torch.float64, CPU)
    masked = MaskedBlock(block.weights, 8 if "whole" in form else None)
    segment = block if form == "frozen" else masked

    values = random_maps(capacity, 6, height, width)
    leaf = values[:samples].clone().requires_grad_()
    expected = module(leaf)
    g = random_maps(capacity, *expected.shape[1:])
    expected.backward(g[:samples])

    x, out = values.clone(), torch.full_like(g, float("nan"))
    with torch.no_grad():
        saved = segment.memory(out[:samples])
        segment.forward(x, out, saved, samples)
        torch.testing.assert_close(out[:samples], expected, rtol=1e-11, atol=1e-11)
        inferred = torch.full_like(g, float("nan"))
        segment.infer(x, inferred, samples)
        torch.testing.assert_close(inferred[:samples], expected, rtol=1e-11, atol=1e-11)
        # the gradient of the last ReLU's input is what a block that rectifies is given
        given = torch.where(expected > 0, g[:samples], 0) if segment.rectifies else g[:samples]
        whole = torch.cat([given, g[samples:]]).contiguous(memory_format=torch.channels_last)
        segment.backward(whole, x, saved, samples, 0)
    torch.testing.assert_close(x[:samples], leaf.grad, rtol=1e-10, atol=1e-10)


def test_samples_that_come_from_a_relu_get_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blocks.CHUNK_BYTES, "cpu", 1)
    block = FrozenBlock(block_of(1, 6), torch.float64, CPU)
    x, g = random_maps(20, 6, 8, 8), random_maps(20, 6, 8, 8)
    out = torch.empty_like(x)
    with torch.no_grad():
        saved = block.memory(out)
        block.forward(x, out, saved, 20)
        plain, part = x.clone(), x.clone()
        block.backward(g, plain, saved, 20, 0)
        block.backward(g, part, saved, 20, 13)
    assert torch.equal(part[:13], torch.where(x[:13] > 0, plain[:13], 0))
    assert torch.equal(part[13:], plain[13:])


def test_the_gradient_reads_no_value_of_the_input(images: Tensor) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        weight = random_maps(5, 3, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last)
        x = images.to(dtype).contiguous(memory_format=torch.channels_last)
        for stride in (1, 2):
            g = torch.randn_like(convolve(x, weight, None, stride))
            dummy = torch.full((1, 1, 1, 1), float("nan"), dtype=dtype).expand_as(x)
            assert torch.equal(input_gradient(g, dummy, weight, stride), input_gradient(g, x, weight, stride))


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (2, 3, 3, 3), (1, 1, 1, 1), (5, 16, 4, 4)])
def test_masks_hold_one_bit_per_element(shape: tuple[int, int, int, int]) -> None:
    y, g = random_maps(*shape), random_maps(*shape).flip(0)
    y[0, 0, 0, 0] = 0
    y[-1, -1, -1, -1] = float("nan")
    mask = pack_mask(y)
    assert mask.shape == (shape[0], mask_bytes(y[0].numel()))
    assert mask.dtype == torch.uint8
    assert torch.equal(apply_mask(g, mask), torch.ops.aten.threshold_backward(g, y, 0))


def test_a_masked_receiver_trains_the_same_stitches_and_keeps_less(fashion: Dataset) -> None:
    sender, receiver = network("R1111"), network("R1122", seed=1)
    source, cells = source_of(sender, fashion), all_cells(sender, receiver)
    order = ImageOrder(seed=0, block=8, window=16)
    kept = FrozenNetwork(receiver, dtype=torch.float64, device=CPU)
    masked = FrozenNetwork(receiver, dtype=torch.float64, device=CPU, masked=True)
    ours, theirs = (train_group(model, source, cells, RECIPE, order) for model in (masked, kept))
    for cell in cells:
        assert_same(ours[cell], theirs[cell], 1e-10)
    counts = [5] * 7
    sizes = [held_bytes(Cascade(model, counts, 8)) for model in (masked, kept)]
    # two buffers, and two bits where there were two numbers
    assert sizes[0] < 0.6 * sizes[1]
    bf16 = [
        held_bytes(Cascade(FrozenNetwork(receiver, dtype=torch.bfloat16, device=CPU, masked=on), counts, 8))
        for on in (True, False)
    ]
    assert bf16[0] < 0.7 * bf16[1]


def held_bytes(cascade: Cascade) -> int:
    """Bytes that a cascade holds between forward and backward."""
    cascade._allocate()
    tensors = [*cascade._kept, *(tensor for saved in cascade._saved for tensor in saved)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def test_weights_are_folded_once_and_shared(fashion: Dataset) -> None:
    weights = BlockWeights.of(block_of(2, 4), torch.bfloat16, CPU)
    assert weights.projection is not None
    assert weights.rows is not None
    assert weights.w1.is_contiguous(memory_format=torch.channels_last)
    assert weights.rows.shape == (8, 8)
    assert torch.equal(weights.rows[:, :4], weights.projection[:, :, 0, 0])
    assert not weights.rows[:, 4:].any()
