"""Weights that cannot be read or found: one to three lines that say why, and nothing from the file is run."""

import argparse
import collections
import json
import os
import pickle
import re
import shlex
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fastsitch
from fastsitch.errors import ConfigError, NetworkError
from fastsitch.networks.foreign_weights import read_weights
from tests.conftest import Command
from tests.network_factories import small
from tests.weights_of_small import SHAPE, assert_equal, loaded, prefixed, state


class Trap:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("sprung",))


def nested(depth: int) -> Any:
    content: Any = state(1)
    for _ in range(depth):
        content = {"deeper": content}
    return content


def laughing() -> Any:
    """A few bytes that stand for 10 to the 12th dicts."""
    content: Any = {"weight": torch.ones(1)}
    for _ in range(3):
        content = {f"key{number}": content for number in range(10_000)}
    return content


def contents() -> dict[str, tuple[Any, str]]:
    return {
        "a nest of depth 4": (
            nested(4),
            "holds no named tensors, .* down to 3 keys below it .it has deeper.: expected a",
        ),
        "an empty dict": ({}, r"holds no named tensors, .* \(it is empty\)"),
        "empty nests": ({"state_dict": {}, "epoch": 1}, r"holds no named tensors, .* \(it has state_dict, epoch\)"),
        "keys that are numbers": (dict(enumerate(state(1).values())), r"holds no named tensors, .*\(it has 0, 1, 2, 3"),
        "a tensor": (torch.ones(3), "holds a Tensor: expected a state dict of nothing but named tensors"),
        "dicts without end": (laughing(), "has more than 10000 dicts inside each other"),
        "another network": (
            {"state_dict": {"wq": torch.ones(3), "wk": torch.ones(3)}},
            r"none of its keys \(wq, wk\) ends with one of the network's \(stem\.weight, stem\.bias, .* and 2 more\)",
        ),
        "bits": (
            {**state(1), "stem.bias": torch.ones(8).to(torch.float8_e4m3fn)},
            "stem.bias quantised to 8 bits instead",
        ),
        "whole numbers": (
            {**state(1), "head.bias": torch.ones(10, dtype=torch.int8)},
            "head.bias whole numbers instead",
        ),
        "quantised": (
            {**state(1), "head.bias": torch.quantize_per_tensor(torch.ones(10), 1.0, 0, torch.qint8)},
            "head.bias sparse or quantised instead",
        ),
        "no tensors": (
            {**state(1), "stem.bias": None, "body.0.conv.bias": 3},
            r"missing: stem\.bias, body\.0\.conv\.bias",
        ),
        "lines in names": ({"a\nb\x1b[31m": torch.ones(1)}, r"none of its keys \(a\?b\?\[31m\)"),
    }


CASES = [
    "a nest of depth 4", "an empty dict", "empty nests", "keys that are numbers", "a tensor", "dicts without end",
    "another network", "bits", "whole numbers", "quantised", "no tensors", "lines in names",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_contents_without_usable_weights_are_refused(case: str, tmp_path: Path) -> None:
    content, message = contents()[case]
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(NetworkError, match=message) as refused:
        loaded(tmp_path / "c.pt")
    assert len(str(refused.value).splitlines()) == 1


def test_ten_thousand_keys_take_no_time(tmp_path: Path) -> None:
    one = torch.ones(8, 3, 4, 4)
    weights = {f"{'layers.' * (number % 50)}{number}.stem.weight": one for number in range(10_000)}
    torch.save({"state_dict": {**prefixed("model.", state(1)), **weights}}, tmp_path / "c.pt")
    began = time.monotonic()
    found, _ = loaded(tmp_path / "c.pt")
    assert torch.equal(found["stem.weight"], state(1)["stem.weight"])
    torch.save(weights, tmp_path / "d.pt")
    with pytest.raises(NetworkError, match="does not fit the network: missing: "):
        loaded(tmp_path / "d.pt")
    assert time.monotonic() - began < 30


def index(folder: Path, content: Any) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight_map": {"a": "../secret.safetensors"}}, r"names the shard '\.\./secret\.safetensors': expected names"),
        ({"weight_map": {"a": "/etc/passwd"}}, "names the shard '/etc/passwd': expected names of files beside"),
        ({"weight_map": {"a": ".."}}, r"names the shard '\.\.'"),
        ({"weight_map": {"a": "..\\secret"}}, r"names the shard "),
        ({"weight_map": {"a": ""}}, "names the shard ''"),
        ({"weight_map": {"a": "x\0y"}}, r"names the shard 'x\?y'"),
        ({"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "stem.bias": "part.safetensors"}},
         r"lacks 1\.safetensors, 2\.safetensors of its 3 shards: put them beside it"),
        ({"weight_map": {"stem.bias": "part.safetensors", "more": "part.safetensors"}},
         r"shard part\.safetensors lacks more, which the index says it has"),
        ({"weight_map": {"stem.bias": "folder"}}, "shard folder is no regular file"),
        ({"weight_map": {"stem.bias": "trap.bin"}}, r"shard trap\.bin holds more than tensors \(posix\.mkdir\)"),
        ({"weight_map": {}}, "is no index of shards: expected JSON with"),
        ({"weight_map": {"a": 3}}, "is no index of shards"),
        ({"weight_map": ["a"]}, "is no index of shards"),
        ([], "is no index of shards"),
        ("[" * 200_000, "is no index of shards"),
        ("", "is no index of shards"),
    ],
)  # fmt: skip
def test_an_index_that_leads_nowhere_or_elsewhere_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    save_file(state(1), tmp_path / "secret.safetensors")
    folder = tmp_path / "folder"
    (folder / "folder").mkdir(parents=True)
    save_file({"stem.bias": torch.ones(8)}, folder / "part.safetensors")
    (folder / "trap.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(NetworkError, match=message) as refused:
        loaded(index(folder, content))
    assert len(str(refused.value).splitlines()) <= 3
    assert not Path("sprung").exists()


def test_folders_without_one_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match=r"is a folder, no regular file: expected model\.safetensors, .* in it"):
        read_weights(tmp_path)
    for name in ("one", "two"):
        save_file(state(1), tmp_path / f"{name}.safetensors")
    with pytest.raises(NetworkError, match=r"it has one\.safetensors, two\.safetensors: name one of them"):
        read_weights(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(NetworkError, match="model.safetensors' is no regular file"):
        read_weights(tmp_path)
    with pytest.raises(NetworkError, match="cannot read weights='none/model.safetensors.index.json' .No such file"):
        read_weights(Path("none/model.safetensors.index.json"))
    with pytest.raises(NetworkError, match="cannot read .* .File name too long"):
        read_weights(Path("a" * 5000))
    os.mkfifo(tmp_path / "pipe.index.json")
    with pytest.raises(NetworkError, match="is no regular file: expected the index"):
        read_weights(tmp_path / "pipe.index.json")


@pytest.mark.parametrize("protocol", range(6))
def test_what_a_pickle_would_import_is_named_and_not_run(
    protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    counted = collections.defaultdict(int, {"state_dict": 1})
    Path("c.pt").write_bytes(pickle.dumps({"state_dict": counted, "trap": Trap(), "again": Trap()}, protocol))
    with pytest.raises(NetworkError, match=r"\(.*collections\.defaultdict, posix\.mkdir\)") as refused:
        read_weights(Path("c.pt"))
    assert re.search(r'weights_only=False\)\["state_dict"\]; torch.save', str(refused.value))
    with zipfile.ZipFile("z.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("z/data.pkl", pickle.dumps(Trap(), protocol))
        archive.writestr("z/version", "3")
        archive.writestr("z/byteorder", "little")
    with pytest.raises(NetworkError, match=r"holds (no weights that can be read|more than tensors \(posix\.mkdir\))"):
        read_weights(Path("z.pt"))
    assert not Path("sprung").exists()


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("what", ["arguments", "numpy", "module", "module in a dict"])
def test_the_advice_on_a_pickle_converts_it(
    what: str, old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    module = small(10, SHAPE)
    content, names = {
        "arguments": ({"state_dict": state(1), "args": argparse.Namespace(lr=1)}, "argparse.Namespace"),
        "numpy": ({"best": np.float64(0.5), "model": state(1)}, r"numpy\._core\.multiarray\.scalar, numpy\.dtype"),
        "module": (module, r"builtins\.set, .*tests\.network_factories\.Block, .*Net"),
        "module in a dict": ({"epoch": 1, "model": module}, r".*tests\.network_factories\.Block"),
    }[what]
    if what.startswith("module"):
        names = r".*tests\.network_factories\.Block"
    path = tmp_path / 'it\'s a "c".pt'
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    with pytest.raises(NetworkError, match=f"holds more than tensors \\({names}.*which is never unpickled") as refused:
        loaded(path)
    first, line = str(refused.value).splitlines()
    assert first.endswith("convert it where you trust it, such as by")
    program, option, code = shlex.split(line)
    assert (program, option) == ("python", "-c")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert_equal(loaded(tmp_path / "weights.pt")[0], state(1))


def test_the_advice_on_torchscript_converts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    path = tmp_path / "script.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(small(10, SHAPE).eval(), torch.zeros(1, *SHAPE)), path)
    with pytest.raises(NetworkError, match="is a TorchScript archive, which is a program and is not run: ") as refused:
        loaded(path)
    _, line = str(refused.value).splitlines()
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(shlex.split(line)[2], {})
    assert_equal(loaded(tmp_path / "weights.pt")[0], state(1))


def test_names_of_a_pickle_are_made_plain_and_few(tmp_path: Path) -> None:
    names = [f"cmodule{number}\nname\n0" for number in range(9)]
    (tmp_path / "c.pt").write_bytes("".join([*names, "cbad\x1b[31m\nname\n0", "N."]).encode())
    with pytest.raises(NetworkError, match=r"\(module0\.name, module1\.name, .* and 5 more\), which") as refused:
        read_weights(tmp_path / "c.pt")
    assert "\x1b" not in str(refused.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        b"\x80\x02",
        b"\x80\x02X\x01",
        b"error 404\n",
        b"cos\nsystem\n",
        b"\x80\x04\x8e" + b"\xff" * 9,
    ],
)
def test_what_is_no_checkpoint_is_said_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(NetworkError, match="holds no weights that can be read safely") as refused:
        read_weights(tmp_path / "c.pt")
    assert len(str(refused.value).splitlines()) == 1


def test_options_that_need_weights(factory: Path, few: str, run_cli: Command, tmp_path: Path) -> None:
    line = ["add", "mine", "--from", f"{factory}:small", "--dataset", few]
    for options, message in (
        (["--head", "new"], "--head new: expected --weights too"),
        (["--weights-key", "ema"], "--weights-key ema: expected --weights too"),
    ):
        ended = run_cli(*line, *options)
        assert (ended.returncode, ended.stderr) == (2, f"fastsitch: {message}\n")
    ended = run_cli(*line, "--head", "old", "--weights", "w.pt")
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) <= 3
    assert not list((tmp_path / "work").iterdir())


def test_a_head_that_is_none_of_the_words(factory: Path, few: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"weights": "w.pt", "head": "old", "dataset": few, "root": tmp_path / "root"}
    with pytest.raises(ConfigError, match="^head='old': expected one of new, probe, none$"):
        fastsitch.add("mine", f"{factory}:small", **options)


def test_a_network_without_a_last_layer_has_no_new_head(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(3072, 10).state_dict(), tmp_path / "c.pt")
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
    with pytest.raises(NetworkError, match="head='new': the network has no linear layer or convolution, one output"):
        loaded(tmp_path / "c.pt", module=module, head="new")
