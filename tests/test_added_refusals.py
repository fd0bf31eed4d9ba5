"""Networks that cannot be added, and names that were not: one line that says why, and nothing written."""

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fastsitch
from fastsitch.errors import FastsitchError, NetworkError
from tests.conftest import Command
from tests.network_factories import small


class Trap:
    def __reduce__(self) -> Any:
        return (print, ("this must never run",))


def refusals(tmp_path: Path, factory: Path) -> dict[str, tuple[list[str], str]]:
    """Arguments after ``add NAME --from`` and part of the message."""
    source = f"{factory}:small"
    state = small(10, (3, 32, 32)).state_dict()
    renamed = {("body.0.conv.w" if key == "body.0.conv.weight" else key): value for key, value in state.items()}
    renamed["head.weight"] = renamed["head.weight"][:, :4].contiguous()
    save_file(renamed, tmp_path / "renamed.safetensors")
    save_file({**state, "head.bias": state["head.bias"] * float("nan")}, tmp_path / "nan.safetensors")
    (tmp_path / "trap.pt").write_bytes(pickle.dumps(Trap()))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "nan.safetensors").read_bytes()[:100])
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("error 404: not found\n")
    torch.save({**state, "head.weight": state["head.weight"].long()}, tmp_path / "whole.pt")
    torch.save({**state, "head.bias": state["head.bias"].to(torch.complex64)}, tmp_path / "complex.pt")
    torch.save({**state, "head.bias": state["head.bias"].to("meta")}, tmp_path / "meta.pt")
    torch.save({**state, "head.weight": state["head.weight"].to_sparse()}, tmp_path / "sparse.pt")
    (tmp_path / "exits.py").write_text("def small(classes):\n    raise SystemExit(0)\n")
    (tmp_path / "broken.py").write_text("def small(classes:\n")
    (tmp_path / "fails.py").write_text("def small(classes):\n    raise KeyError('no such layer')\n")
    (tmp_path / "dict.py").write_text(
        "from torch import nn\n\n\nclass Many(nn.Module):\n    def forward(self, x):\n        return {'a': x}\n\n\n"
        "def small():\n    return Many()\n"
    )
    (tmp_path / "nowhere.py").write_text(
        "from torch import nn\n\n\ndef small():\n    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))\n"
        "    nn.init.constant_(net[1].weight, float('nan'))\n    return net\n"
    )
    (tmp_path / "lazy.py").write_text(
        "from torch import nn\n\n\ndef small():\n    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))\n"
    )
    (tmp_path / "other.py").write_text("def small():\n    return 3\n")
    (tmp_path / "decides.py").write_text(
        "from torch import nn\n\n\nclass Decides(nn.Module):\n    def forward(self, x):\n"
        "        return x.mean((2, 3)) if x.sum() > 9 else x.amax((2, 3))\n\n\ndef small():\n    return Decides()\n"
    )
    return {
        "form": (["resnet18"], "--from resnet18: expected torchvision:NAME, timm:NAME, hf:NAME or FILE.py:FACTORY"),
        "no such model": (["torchvision:resnet19"], "torchvision has no model resnet19: expected .* resnet18"),
        "no such file": ([f"{tmp_path}/none.py:small"], r"cannot read \S*none\.py .No such file"),
        "no such function": ([f"{factory}:large"], "has no function large"),
        "syntax": ([f"{tmp_path}/broken.py:small"], "cannot be built: SyntaxError"),
        "factory fails": ([f"{tmp_path}/fails.py:small"], r"KeyError in .*fails\.py:2: 'no such layer'"),
        "no module": ([f"{tmp_path}/other.py:small"], "returns a int: expected an nn.Module"),
        "untraceable": (
            [f"{tmp_path}/decides.py:small"],
            r"cannot trace Decides, .*decides\.py:6 .*Chain.from_segments",
        ),
        "position": ([source, "--positions", "body.*,legs"], "no position of Net matches 'legs'; it has stem"),
        "no position": (
            [source, "--positions", ","],
            r"--positions \(none\): expected names or patterns of positions",
        ),
        "classes": ([source, "--classes", "3"], "--classes 3: .* has 10 classes; expected at least that many"),
        "first weights": (
            [f"{tmp_path}/nowhere.py:small"],
            r"initial weights that are not finite \(1\.weight of Linear\)",
        ),
        "lazy": ([f"{tmp_path}/lazy.py:small"], "has lazy modules without weights yet: run the network once"),
        "outputs": (
            [f"{tmp_path}/dict.py:small"],
            r"expected logits \(B, classes\), found a dict of a \(2, 3, 32, 32\)",
        ),
        "mean alone": ([source, "--mean", "0.5"], r"--mean 0.5 --std \(none\): expected both"),
        "two means": ([source, "--mean", "0.5,0.5", "--std", "1"], "one number or three"),
        "std 0": ([source, "--mean", "0.5", "--std", "0"], "deviations from 0.001 to 1"),
        "mean of bytes": ([source, "--mean", "128", "--std", "64"], r"--mean 128 --std 64: .* pixels in \[0, 1\]"),
        "exits": ([f"{tmp_path}/exits.py:small"], r"cannot be built: SystemExit in .*exits\.py:2: 0"),
        "huge": ([source, "--resolution", "100000"], "--resolution 100000x100000: expected sides from 1 to 4096"),
        "no number": ([source, "--mean", "half", "--std", "1"], "--mean half: expected numbers"),
        "resolution": ([source, "--resolution", "big"], "--resolution big: expected a side"),
        "too small": (["torchvision:vgg11", "--resolution", "8"], "cannot cut a VGG: it does not run on images"),
        "no weights": ([source, "--weights", "none.pt"], "cannot read --weights none.pt"),
        "keys": (
            [source, "--weights", f"{tmp_path}/renamed.safetensors"],
            r"missing: body\.0\.conv\.weight; unexpected: body\.0\.conv\.w; misshapen: head\.weight \(10, 4\) instead",
        ),
        "not finite": ([source, "--weights", f"{tmp_path}/nan.safetensors"], "the test loss of new is nan"),
        "text": ([source, "--weights", f"{tmp_path}/text.pt"], "holds no weights that can be read safely"),
        "pickle": (
            [source, "--weights", f"{tmp_path}/trap.pt"],
            r"trap\.pt holds more than tensors \(builtins\.print\), which is never unpickled: convert it",
        ),
        "cut off": ([source, "--weights", f"{tmp_path}/cut.safetensors"], "holds no weights that can be read safely"),
        "whole numbers": (
            [source, "--weights", f"{tmp_path}/whole.pt"],
            r"of another kind: head\.weight whole numbers instead of floating-point",
        ),
        "complex": ([source, "--weights", f"{tmp_path}/complex.pt"], "head.bias complex instead of floating-point"),
        "no values": ([source, "--weights", f"{tmp_path}/meta.pt"], "head.bias without values instead of"),
        "sparse": ([source, "--weights", f"{tmp_path}/sparse.pt"], "head.weight sparse or quantised instead of"),
        "no dict": (
            [source, "--weights", f"{tmp_path}/list.pt"],
            "holds a list: expected a state dict of nothing but named tensors",
        ),
    }


CASES = [
    "form", "no such model", "no such file", "no such function", "syntax", "factory fails", "no module", "untraceable",
    "position", "no position", "classes", "outputs", "mean alone", "two means", "std 0", "no number", "resolution",
    "too small", "no weights", "keys", "not finite", "pickle", "cut off", "no dict", "mean of bytes", "exits", "huge",
    "whole numbers", "complex", "no values", "sparse", "first weights", "lazy", "text",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_added_ends_with_2_one_line_and_nothing_written(
    case: str, factory: Path, few: str, tmp_path: Path, run_cli: Command
) -> None:
    arguments, message = refusals(tmp_path, factory)[case]
    ended = run_cli("add", "new", "--from", *arguments, "--dataset", few)
    assert ended.returncode == 2, ended.stderr
    assert re.search(message, ended.stderr), ended.stderr
    assert ended.stderr.startswith("fastsitch: ")
    # how a pickle is converted is a line of its own
    assert len(ended.stderr.splitlines()) == (2 if case == "pickle" else 1)
    assert "this must never run" not in ended.stdout + ended.stderr
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("R1111", "R1111 is built in"),
        ("r1112", "network name 'r1112': expected .* names like R1111 or ResNet18 are taken"),
        ("a.b", "network name 'a.b': expected up to 64 letters, digits and _"),
        ("mine-random@0", "an untrained control"),
        ("mine@2", "all seeds share one definition"),
    ],
)
def test_names_that_cannot_be_added_are_refused(name: str, message: str, factory: Path, tmp_path: Path) -> None:
    with pytest.raises(FastsitchError, match=message):
        fastsitch.add(name, f"{factory}:small", root=tmp_path / "root")
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("command", ["train", "precompute", "sweep", "dry run"])
def test_unknown_names_are_refused_with_the_command_that_adds_them(
    command: str, factory: Path, few: str, tmp_path: Path
) -> None:
    fastsitch.add("mine", f"{factory}:small", dataset=few, root=tmp_path)
    calls = {
        "train": lambda: fastsitch.train("mine", "yours", dataset=few, root=tmp_path),
        "precompute": lambda: fastsitch.precompute("yours", dataset=few, root=tmp_path),
        "sweep": lambda: fastsitch.sweep("yours", "yours", dataset=few, root=tmp_path),
        "dry run": lambda: fastsitch.estimate("yours", "yours", dataset=few, batch_size=16, root=tmp_path),
    }
    with pytest.raises(NetworkError, match=r"unknown network 'yours': .* \(mine\); add it with fastsitch add yours"):
        calls[command]()
    assert not list(tmp_path.glob("models/*/*.json"))
