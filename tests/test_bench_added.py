"""The benchmark of a pair of networks that were added: its floor, its peers, its memory, the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VisionTransformer, resnet18

import fastsitch
from fastsitch.benchmark.bare_products import BareProducts
from fastsitch.chains.chain import Chain
from fastsitch.errors import FailedError
from fastsitch.planning.machine_profile import Tuning, find_tuning, save_tuning
from tests.conftest import Command

CPU = torch.device("cpu")
VIT = Path(__file__).parents[1] / "docs" / "families" / "vit.py"


def test_the_floor_of_a_resnet_is_its_convolutions_worked_out_by_hand() -> None:
    chain = Chain.from_module(resnet18(num_classes=10), torch.zeros(1, 3, 32, 32))
    bare = BareProducts(chain, [2] + [0] * 8, 3, torch.float32, CPU)
    # two 3x3 convolutions of 64 channels on 8x8; 64 -> 128 to 4x4 with a projection
    assert bare.flops[0] == 6 * 2 * (2 * 8 * 8 * 64 * 64 * 9)
    assert bare.flops[2] == 6 * 2 * 4 * 4 * (128 * 64 * 9 + 128 * 128 * 9 + 128 * 64)
    assert bare.gradient_flops == bare.flops
    assert bare.flops[-1] == 6 * 2 * 512 * 10
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        bare.run()
    assert counter.get_total_flops() == bare.total_flops


def test_the_floor_of_a_transformer_is_its_linear_maps_and_two_products_of_attention() -> None:
    model = VisionTransformer(
        image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=3
    )
    chain = Chain.from_module(model, torch.zeros(1, 3, 8, 8))
    bare = BareProducts(chain, [1, 0, 0], 7, torch.float32, CPU)
    tokens, width = 5, 8
    maps = 2 * tokens * (3 * width * width + width * width + 2 * width * 16)
    attention = 2 * 2 * tokens * tokens * width
    assert bare.flops[:2] == [7 * (maps + attention)] * 2
    # of attention there are two gradients
    assert bare.gradient_flops[:2] == [7 * (maps + 2 * attention)] * 2


def test_a_group_has_the_floor_of_the_stitches_that_pass_each_segment() -> None:
    chain = Chain.from_module(resnet18(num_classes=10), torch.zeros(1, 3, 32, 32))
    one, other = (BareProducts(chain, counts + [0] * 6, 2, torch.float32, CPU) for counts in ([1, 0, 0], [1, 2, 0]))
    assert other.flops[0] == one.flops[0]
    assert other.flops[1:] == [3 * flops for flops in one.flops[1:]]
    late = BareProducts(chain, [0] * 8 + [1], 2, torch.float32, CPU)
    assert late.flops[:-1] == [0] * 8
    assert late.flops[-1] > 0


class _ByValue(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float(x.abs().max().item() > 0)


def test_a_network_whose_floor_cannot_be_counted_is_named() -> None:
    segments = [nn.Conv2d(3, 4, 4, 4), nn.Sequential(_ByValue(), nn.Conv2d(4, 4, 1))]
    head = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    chain = Chain.from_segments(segments, ["stem", "rest"], head, torch.zeros(1, 3, 8, 8))
    with pytest.raises(FailedError, match="what leads to rest cannot run on torch's meta device"):
        BareProducts(chain, [1, 0], 2, torch.float32, CPU)


@pytest.mark.slow
def test_the_command_measures_a_pair_that_was_added(factory: Path, few: str, run_cli: Command, tmp_path: Path) -> None:
    for name, source in (("mine", f"{factory}:small"), ("vit", f"{VIT}:small")):
        assert run_cli("add", name, "--from", source, "--dataset", few).returncode == 0
    untrained = run_cli("bench", "--receiver", "vit", "--dataset", few)
    assert untrained.returncode == 2
    assert "train first with" in untrained.stderr
    assert run_cli("train", "mine", "vit", "--dataset", few, "--epochs", "1").returncode == 0
    options = ["--batch-size", "8", "--precision", "fp32", "--group-sizes", "5,15", "--repeats", "1"]
    pair = ["--sender", "mine", "--receiver", "vit"]
    done = run_cli("bench", *pair, *options, "--peers", "--tune", "--json", "b.json")
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "work" / "b.json").read_text())
    assert f"of {few}, batch 8" in done.stdout
    assert f"--dataset {few}" in content["command"]
    assert content["unit"] == 15
    assert content["projection"] is None
    assert [block["name"] for block in content["ceiling"]["blocks"]][-1] == "head"
    assert set(content["agreements"]) == {"tuned loop", "plain cascade", "published way, fp32"}
    for agreement in content["agreements"].values():
        assert agreement["exact_error"] < 1e-9
        assert agreement["change_error"] < 1e-3
        assert agreement["cells"] == 5
    for group in content["groups"]:
        assert 0 < group["memory"] < 2 * group["predicted_memory"]
        assert group["over_bare"]["median"] > 0
    assert "sweeps of receiver vit, batch 8, fp32 will use groups of up to" in done.stdout
    rates, attention = content["tuning"]["rates"], content["tuning"]["attention"]
    assert attention == max(("fused", "products"), key=lambda kind: rates[f"attention {kind}"])
    assert f"compile off, attention {attention}" in done.stdout
    line = ["--senders", "mine", "--receivers", "vit", *options[:4]]
    swept = run_cli("sweep", *line, "--dry-run")
    assert swept.returncode == 0, swept.stderr
    tuned = content["tuning"]["group_size"]
    assert f"groups of up to {tuned} cells" in swept.stdout + swept.stderr
    # the form of attention is frozen into a run, whatever is measured later
    root = tmp_path / "work" / "fastsitch-data"
    profile = json.loads((root / "profile.json").read_text())
    profile["tunings"][0]["attention"] = "products"
    (root / "profile.json").write_text(json.dumps(profile))
    line = ["sweep", "--senders", "mine", "--receivers", "vit", *options[:4], "--epochs", "1", "--run", "one"]
    ended = run_cli(*line)
    assert ended.returncode == 0, ended.stderr
    assert "attention by products: as in the profile" in ended.stderr
    (root / "profile.json").unlink()
    run = fastsitch.open_run("one", root=root)
    assert run.resolved.attention == "products"
    (unit,) = run.path.glob("units/*.npz")
    first = np.load(unit)["accuracy"]
    unit.unlink()
    assert run_cli(*line).returncode == 0
    assert np.array_equal(np.load(unit)["accuracy"], first)
    # and where nothing is known of a network
    missing = run_cli("bench", "--receiver", "other")
    assert missing.returncode == 2
    assert "other" in missing.stderr


def test_what_was_tuned_for_a_receiver_is_for_it_alone(tmp_path: Path) -> None:
    shape = {"width": 64, "batch_size": 8, "precision": "fp32"}
    for receiver, size in (("vit", 30), ("swin", 20), (None, 50)):
        tuning = Tuning(**shape, group_size=size, compile="off", rates={}, receiver=receiver)  # type: ignore[arg-type]
        save_tuning(tmp_path, CPU, tuning)

    def found(*receivers: str) -> int | None:
        tuning = find_tuning(tmp_path, CPU, **shape, receivers=receivers)  # type: ignore[arg-type]
        return None if tuning is None else tuning.group_size

    assert found() == 50
    assert found("vit") == 30
    assert found("swin", "vit") == 20
    assert found("other") is None
