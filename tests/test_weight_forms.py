"""Checkpoints in the forms in which they lie around: each gives exactly the network whose weights are in it."""

import json
import logging
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastsitch.errors import NetworkError
from tests.network_factories import small
from tests.weights_of_small import SHAPE, assert_equal, loaded, prefixed, state, write


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network and an optimiser that has a state for each of its weights."""
    torch.manual_seed(5)
    module = small(10, SHAPE)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(2, *SHAPE)).sum().backward()
    optimizer.step()
    return module, optimizer


NESTS = ["state_dict", "model", "net", "weights", "params", "params_ema", "teacher", "model_state_dict", "anything"]
PREFIXES = ["module.", "_orig_mod.", "model.", "backbone.", "encoder.", "module._orig_mod.model.", "my.own."]


@pytest.mark.parametrize("nest", [*NESTS, "checkpoint.state_dict", "a.b.c"])
def test_weights_are_found_in_nests_beside_everything_else(nest: str, tmp_path: Path) -> None:
    module, optimizer = trained()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    content: Any = OrderedDict(module.state_dict())
    for key in reversed(nest.split(".")):
        content = {
            "epoch": 3,
            "loss": torch.tensor(0.5),
            key: content,
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": scheduler.state_dict(),
            "scaler": {"scale": torch.tensor(1.0)},
            "args": {"lr": 0.1, "layers": [1, 2]},
            3: {"conv.weight": torch.ones(1)},
        }
    torch.save(content, tmp_path / "c.pth")
    found, provenance = loaded(tmp_path / "c.pth")
    assert_equal(found, module.state_dict())
    assert provenance == {"weights_key": nest}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_weights_are_found_behind_prefixes(
    prefix: str, form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = state(1)
    weights = {**prefixed(prefix, expected), "projector.0.weight": torch.ones(3), "n_averaged": torch.tensor(4)}
    path = tmp_path / f"w.{form}"
    write(weights if form == "safetensors" else {"state_dict": weights}, path, form)
    caplog.set_level(logging.INFO, "fastsitch")
    found, provenance = loaded(path)
    assert_equal(found, expected)
    nest = {} if form == "safetensors" else {"weights_key": "state_dict"}
    assert provenance == {**nest, "weights_prefix": prefix}
    key = ".".join((*nest.values(), prefix[:-1]))
    assert [record.message for record in caplog.records] == [
        f"the weights are those under {key} in w.{form}",
        f"2 tensors of w.{form} outside of them are left out: n_averaged, projector",
    ]


def test_keys_that_only_look_like_a_prefix_outside_are_an_error(tmp_path: Path) -> None:
    """Without a prefix nothing lies outside of it."""
    save_file({**state(1), "projector.weight": torch.ones(3)}, tmp_path / "w.safetensors")
    with pytest.raises(NetworkError, match=r"does not fit the network: unexpected: projector\.weight$"):
        loaded(tmp_path / "w.safetensors")
    save_file(prefixed("model.", {**state(1), "extra": torch.ones(3)}), tmp_path / "w.safetensors")
    with pytest.raises(NetworkError, match=r"\(under model\) does not fit the network: unexpected: model\.extra$"):
        loaded(tmp_path / "w.safetensors")


def test_a_wrapped_layer_inside_is_found(tmp_path: Path) -> None:
    expected = state(2)
    weights = {name.replace("body.0.", "body.0._orig_mod."): tensor for name, tensor in expected.items()}
    save_file(prefixed("module.", weights), tmp_path / "w.safetensors")
    found, provenance = loaded(tmp_path / "w.safetensors")
    assert_equal(found, expected)
    assert provenance == {"weights_prefix": "module."}


CHOICES: dict[str, tuple[Any, list[str]]] = {
    "raw and averaged": ({"state_dict": state(1), "state_dict_ema": state(2)}, ["state_dict", "state_dict_ema"]),
    "student and teacher": (
        {"student": prefixed("module.backbone.", state(1)), "teacher": prefixed("backbone.", state(2))},
        ["student.module.backbone", "teacher.backbone"],
    ),
    "one flat dict": ({**prefixed("student.", state(1)), **prefixed("teacher.", state(2))}, ["student", "teacher"]),
    "moco": (
        {
            "arch": "small",
            "state_dict": {
                **prefixed("module.encoder_q.", state(1)),
                **prefixed("module.encoder_k.", state(2)),
                "module.queue": torch.ones(3),
            },
        },
        ["state_dict.module.encoder_q", "state_dict.module.encoder_k"],
    ),
    "average behind a prefix": ({**state(1), **prefixed("ema.", state(2))}, [".", "ema"]),
    "average inside": ({**state(1), "ema": state(2)}, [".", "ema"]),
}


@pytest.mark.parametrize("case", CHOICES)
def test_where_there_is_a_choice_it_is_listed_and_the_key_chooses(case: str, tmp_path: Path) -> None:
    content, keys = CHOICES[case]
    path = tmp_path / "c.pt"
    torch.save(content, path)
    with pytest.raises(NetworkError, match="holds several weights that fit the network: ") as refused:
        loaded(path)
    listed = re.search(r"network: (.*); choose with weights_key='(.*)', or another$", str(refused.value))
    assert listed is not None
    assert sorted(listed[1].split(", ")) == sorted(keys)
    assert listed[2] in keys
    for seed, key in enumerate(keys, 1):
        assert_equal(loaded(path, key)[0], state(seed))
        # a word alone where it is clear, and with the dot of a prefix
        for word in key.split("."):
            if [word in other.split(".") for other in keys].count(True) == 1:
                assert_equal(loaded(path, f"{word}.")[0], state(seed))
    with pytest.raises(
        NetworkError, match=r"weights_key='none': there are no such weights in .*; expected one of "
    ) as no:
        loaded(path, "none")
    assert all(key in str(no.value) for key in keys)


def test_an_outer_key_does_where_one_inside_it_fits(tmp_path: Path) -> None:
    torch.save(CHOICES["student and teacher"][0], tmp_path / "c.pt")
    found, provenance = loaded(tmp_path / "c.pt", "teacher")
    assert_equal(found, state(2))
    assert provenance == {"weights_key": "teacher", "weights_prefix": "backbone."}


def test_a_key_chooses_what_does_not_fit_too(tmp_path: Path) -> None:
    other = {**state(2), "stem.bias": torch.ones(3)}
    torch.save({"model": state(1), "ema": other}, tmp_path / "c.pt")
    assert_equal(loaded(tmp_path / "c.pt")[0], state(1))
    with pytest.raises(NetworkError, match=r"\(under ema\) does not fit the network: misshapen: stem\.bias \(3,\)"):
        loaded(tmp_path / "c.pt", "ema")


def test_equal_weights_need_no_choice(tmp_path: Path) -> None:
    torch.save({"model": state(1), "ema": state(1)}, tmp_path / "c.pt")
    found, provenance = loaded(tmp_path / "c.pt")
    assert_equal(found, state(1))
    assert provenance == {"weights_key": "model"}
    assert loaded(tmp_path / "c.pt", "ema")[1] == {"weights_key": "ema"}


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("place", ["index", "folder"])
def test_shards_are_read_from_beside_their_index(form: str, place: str, tmp_path: Path) -> None:
    expected = prefixed("backbone.", state(3))
    stem = "model" if form == "safetensors" else "pytorch_model"
    files = [f"{stem}-0000{number}-of-00002.{form}" for number in (1, 2)]
    places = {name: files[number % 2] for number, name in enumerate(expected)}
    for file in files:
        shard = {name: tensor for name, tensor in expected.items() if places[name] == file}
        write(shard, tmp_path / file, form)
    index = tmp_path / f"{stem}.{form}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    found, provenance = loaded(index if place == "index" else tmp_path)
    assert_equal(found, state(3))
    assert provenance == {"weights_prefix": "backbone."}


@pytest.mark.parametrize("name", ["model.safetensors", "vit.safetensors", "pytorch_model.bin"])
def test_a_folder_stands_for_the_weights_in_it(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    # as a cache keeps it: a link to a file that is named by its hash
    blob = tmp_path / "3b7f"
    write(state(4), blob, name.rpartition(".")[2])
    assert_equal(loaded(blob)[0], state(4))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / name).symlink_to(blob)
    assert_equal(loaded(tmp_path / "folder")[0], state(4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in state(5).items()}
    save_file(weights, tmp_path / "w.safetensors")
    assert_equal(loaded(tmp_path / "w.safetensors")[0], {name: tensor.float() for name, tensor in weights.items()})


class Counted(nn.Sequential):
    """With BatchNorm, whose counters come and go."""

    def __init__(self) -> None:
        last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)]
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *last)


@pytest.mark.parametrize("counter", ["missing", "whole", "half"])
def test_counters_are_ignored(counter: str, tmp_path: Path) -> None:
    """Those of profilers, and those of BatchNorm that are missing or were cut to half precision with all the rest."""
    torch.manual_seed(6)
    expected = Counted().half().state_dict()
    weights = {f"module.{name}": tensor for name, tensor in expected.items()}
    if counter == "missing":
        del weights["module.1.num_batches_tracked"]
    if counter == "half":
        weights = {name: tensor.half() for name, tensor in weights.items()}
    for name in ("", "module.", "module.1."):
        weights |= {
            f"{name}{counted}": torch.zeros(1, dtype=torch.float64) for counted in ("total_ops", "total_params")
        }
    torch.save({"model": weights}, tmp_path / "c.pt")
    found, _ = loaded(tmp_path / "c.pt", module=Counted())
    assert_equal(found, {name: tensor.to(found[name].dtype) for name, tensor in expected.items()})


class Tied(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(3072, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 10))
        self[3].weight = self[2].weight


def test_tensors_with_two_names(tmp_path: Path) -> None:
    torch.manual_seed(7)
    module = Tied()
    expected = module.state_dict()
    # as safetensors.torch.save_model writes them
    save_file({name: tensor for name, tensor in expected.items() if name != "3.weight"}, tmp_path / "w.safetensors")
    assert_equal(loaded(tmp_path / "w.safetensors", module=Tied())[0], expected)
    torch.save(expected, tmp_path / "shared.pt")
    assert_equal(loaded(tmp_path / "shared.pt", module=Tied())[0], expected)
    torch.save({**expected, "3.weight": torch.ones(8, 8)}, tmp_path / "other.pt")
    with pytest.raises(NetworkError, match=r"has different values for 2\.weight, 3\.weight, which are one tensor"):
        loaded(tmp_path / "other.pt", module=Tied())
