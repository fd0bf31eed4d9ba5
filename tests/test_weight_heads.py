"""The last layer of a network whose weights have another one, or none; and what is recorded of the choice."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fastsitch
from fastsitch.data import load_dataset
from fastsitch.errors import NetworkError
from fastsitch.network_names import NetworkName
from fastsitch.networks.checkpoint import load_network
from fastsitch.networks.head_layers import head_layers
from fastsitch.root import Root
from tests.conftest import Command
from tests.network_factories import small
from tests.weights_of_small import SHAPE, State, assert_equal, loaded, prefixed, state

HEADS: dict[str, tuple[State, str, str]] = {
    "another size": (
        state(1, 20),
        r"misshapen: head\.weight \(20, 8\) instead of \(10, 8\), head\.bias \(20,\) instead of \(10,\)",
        ", or classes=20 to have that of the file",
    ),
    "none": ({k: v for k, v in state(1).items() if "head" not in k}, r"missing: head\.weight, head\.bias", ""),
    "a projection in its place": (
        {
            **{k: v for k, v in state(1).items() if "head" not in k},
            "head.0.weight": torch.ones(8, 8),
            "head.2.weight": torch.ones(128, 8),
        },
        r"missing: head\.weight, head\.bias; unexpected: encoder\.head\.0\.weight, encoder\.head\.2\.weight",
        "",
    ),
}


@pytest.mark.parametrize("case", HEADS)
def test_a_head_of_another_size_is_refused_or_new(case: str, tmp_path: Path) -> None:
    weights, faults, keep = HEADS[case]
    path = tmp_path / "c.pt"
    torch.save({"state_dict": prefixed("encoder.", weights)}, path)
    remedy = f"{faults}; give head='new' to leave the head untrained, head='probe' to fit one{keep}$"
    with pytest.raises(
        NetworkError, match=rf"\(under state_dict\.encoder\) fits the network but for its head: {remedy}"
    ):
        loaded(path)
    torch.manual_seed(8)
    module = small(10, SHAPE)
    drawn = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found, provenance = loaded(path, module=module, head="new")
    assert_equal(found, {name: drawn[name] if "head" in name else state(1)[name] for name in drawn})
    assert provenance == {"weights_key": "state_dict", "weights_prefix": "encoder.", "head": "new"}


def test_a_new_head_is_new_also_where_the_old_one_fits(tmp_path: Path) -> None:
    torch.save(state(1), tmp_path / "c.pt")
    torch.manual_seed(8)
    module = small(10, SHAPE)
    drawn = module.head.weight.detach().clone()
    found, _ = loaded(tmp_path / "c.pt", module=module, head="new")
    assert torch.equal(found["head.weight"], drawn)
    assert torch.equal(found["stem.weight"], state(1)["stem.weight"])


@pytest.mark.parametrize("choice", ["probe", "none"])
def test_a_file_may_have_a_head_that_the_network_lacks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, choice: str
) -> None:
    """Weights of a whole classifier for its body alone; any other surplus is refused."""
    body = small(10, SHAPE)
    body.head = nn.Identity()
    save_file(prefixed("model.", state(3)), tmp_path / "c.safetensors")
    refused = (
        r"does not fit the network: unexpected: model\.head\.bias, model\.head\.weight; give head='probe' to leave out"
    )
    with pytest.raises(NetworkError, match=refused):
        loaded(tmp_path / "c.safetensors", module=body)
    with caplog.at_level("INFO"):
        found, provenance = loaded(tmp_path / "c.safetensors", module=body, head=choice)
    assert_equal(found, {name: tensor for name, tensor in state(3).items() if "head" not in name})
    assert provenance["head"] == choice
    assert "the head in the file (head) is left out" in caplog.text
    save_file({**state(3), "other.weight": torch.ones(3)}, tmp_path / "more.safetensors")
    with pytest.raises(NetworkError, match=r"unexpected: head\.bias, head\.weight, other\.weight"):
        loaded(tmp_path / "more.safetensors", module=body, head=choice)


@pytest.mark.parametrize("choice", ["probe", "none", "new"])
def test_a_head_of_another_name_is_set_aside_with_the_networks_own(
    choice: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    renamed = {name.replace("head.", "classifier."): tensor for name, tensor in state(3).items()}
    path = tmp_path / "c.safetensors"
    save_file(prefixed("model.", renamed), path)
    refused = (
        r"fits the network but for its head: missing: head\.weight, head\.bias; unexpected: model\.classifier\.bias"
    )
    with pytest.raises(
        NetworkError, match=rf"{refused}, .*; give head='new' to leave the head untrained, head='probe'"
    ):
        loaded(path)
    torch.manual_seed(8)
    module = small(10, SHAPE)
    drawn = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with caplog.at_level("INFO"):
        found, provenance = loaded(path, module=module, head=choice)
    assert_equal(found, {name: drawn[name] if "head" in name else state(3)[name] for name in drawn})
    assert provenance == {"weights_prefix": "model.", "head": choice}
    assert "the head in the file (classifier) is left out" in caplog.text
    # a second surplus, or one beside a head of the right name, is no head
    for surplus in ({**renamed, "more.weight": torch.ones(3)}, {**state(3), "more.weight": torch.ones(3)}):
        save_file(surplus, path)
        with pytest.raises(NetworkError, match=r"does not fit the network: .*unexpected: .*more\.weight$"):
            loaded(path, head=choice)


def test_a_probe_takes_the_place_of_both_heads(factory: Path, few: str, run_cli: Command, tmp_path: Path) -> None:
    renamed = {name.replace("head.", "classifier."): tensor for name, tensor in state(3, 12).items()}
    save_file(renamed, tmp_path / "c.safetensors")
    line = ["add", "mine", "--from", f"{factory}:small", "--dataset", few, "--weights", tmp_path / "c.safetensors"]
    ended = run_cli(*line, "--head", "probe")
    assert ended.returncode == 0, ended.stderr
    assert "the head in the file (classifier) is left out" in ended.stderr


def test_more_than_a_head_that_does_not_fit_is_no_matter_of_the_head(tmp_path: Path) -> None:
    weights = {name: tensor for name, tensor in state(1).items() if name not in ("head.weight", "stem.bias")}
    torch.save(weights, tmp_path / "c.pt")
    with pytest.raises(NetworkError, match=r"does not fit the network: missing: stem\.bias, head\.weight$"):
        loaded(tmp_path / "c.pt")
    with pytest.raises(NetworkError, match=r"does not fit the network: missing: stem\.bias$"):
        loaded(tmp_path / "c.pt", head="new")


class Two(nn.Module):
    """Two heads whose outputs are averaged, behind a layer that also has ten outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.dist, self.last, self.body = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 6)
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x))
        return (self.last(x) + self.dist(x)) / 2


def test_heads_are_the_last_layers_that_run() -> None:
    assert head_layers(Two().eval(), 10, SHAPE) == ["dist", "last"]
    assert head_layers(small(10, SHAPE), 10, SHAPE) == ["head"]
    assert head_layers(small(10, SHAPE), 12, SHAPE) == []
    ten = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10), nn.Linear(10, 10), nn.Linear(10, 10))
    assert head_layers(ten, 10, SHAPE) == ["3"]
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert head_layers(conv, 10, SHAPE) == ["1"]


def test_what_was_chosen_is_recorded_with_the_network(
    factory: Path, few: str, run_cli: Command, tmp_path: Path
) -> None:
    path = tmp_path / "dino.pth"
    torch.save({"student": prefixed("module.", state(1, 12)), "teacher": prefixed("module.", state(2, 12))}, path)
    line = ["add", "mine", "--from", f"{factory}:small", "--weights", path, "--dataset", few]
    ended = run_cli(*line, "--weights-key", "teacher")
    assert ended.returncode == 2
    advice = "give --head new to leave the head untrained, --head probe to fit one, or --classes 12 to have that of the"
    assert ended.stderr.endswith(f"{advice} file\n")
    assert not list((tmp_path / "work").iterdir())
    ended = run_cli(*line, "--weights-key", "teacher", "--head", "new")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.splitlines() == [
        "the weights are those under teacher.module in dino.pth",
        "the head (head) is new: its weights are as they were drawn, and not trained",
    ]
    root = Root.at(tmp_path / "work" / "fastsitch-data")
    network = load_network(root.models(few), NetworkName("mine"))
    assert network.record.recipe == {
        "name": "added",
        "weights": "dino.pth",
        "weights_key": "teacher",
        "weights_prefix": "module.",
        "head": "new",
    }
    images = load_dataset(few, tmp_path)
    body = small(10, SHAPE).eval()
    body.load_state_dict({**state(2), "head.weight": torch.ones(10, 8), "head.bias": torch.zeros(10)})
    x = images.normalisation.apply(images.test.images[:3])
    with torch.no_grad():
        assert torch.equal(network.chain.representations(x)[-1], body.body(body.stem(x)))
    # the same again is no change, and another seed has another head
    again = run_cli(*line, "--weights-key", "teacher", "--head", "new")
    assert again.returncode == 0, again.stderr
    line[1] = "mine@1"
    assert run_cli(*line, "--weights-key", "teacher", "--head", "new").returncode == 0
    other = load_network(root.models(few), NetworkName("mine", seed=1))
    assert other.record.weights_hash != network.record.weights_hash
    with torch.no_grad():
        assert torch.equal(other.chain.representations(x)[-1], network.chain.representations(x)[-1])
        assert not torch.equal(other.chain(x), network.chain(x))


def test_a_trivial_place_is_not_recorded(factory: Path, few: str, tmp_path: Path) -> None:
    save_file(state(1), tmp_path / "w.safetensors")
    _, record = fastsitch.add(
        "mine", f"{factory}:small", weights=tmp_path / "w.safetensors", dataset=few, root=tmp_path
    )
    assert record is not None
    assert record.recipe == {"name": "added", "weights": "w.safetensors"}
