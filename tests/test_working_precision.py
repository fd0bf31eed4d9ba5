"""Networks that do not work in bf16: said in one line before any work, with what does work."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastsitch
from fastsitch.chains.chain import Chain
from fastsitch.data import Dataset, Split
from fastsitch.errors import NetworkError
from fastsitch.machine import native_bf16
from tests.conftest import Command

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class Network(nn.Module):
    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.middle = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 1), middle
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.second(self.middle(self.first(x))).mean((2, 3)))
        return y


def orthogonal() -> nn.Module:
    torch.manual_seed(0)
    return nn.utils.parametrizations.orthogonal(nn.Conv2d(8, 8, 1), orthogonal_map="householder")


def small_differences(x: Tensor) -> Tensor:
    """Zero divided by zero, where seven bits do not hold them."""
    difference = (1 + 1e-3 * x.sigmoid()) - 1
    return x * difference / difference


class Late(torch.autograd.Function):
    """Has no gradient in bf16."""

    @staticmethod
    def forward(context: object, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:
        if gradient.dtype is torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'")
        return gradient


class Through(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Late.apply(x)
        return y


def few_of(fashion: Dataset) -> Dataset:
    train, test = (
        Split(split.images[:count], split.labels[:count]) for split, count in ((fashion.train, 64), (fashion.test, 32))
    )
    return replace(fashion, train=train, test=test)


def chain_of(middle: Callable[[Tensor], Tensor]) -> Chain:
    return Chain.from_module(Network(middle), IMAGES, "first,second")


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (lambda x: torch.fft.irfft2(torch.fft.rfft2(x)), "Unsupported dtype BFloat16"),
        (lambda x: torch.linalg.qr(x)[0], "not implemented for 'BFloat16'"),
        (lambda x: (x.double() / 3).float(), "RuntimeError"),
        (orthogonal(), "not implemented for 'BFloat16'"),
        (small_differences, "ValueError: values that are not finite"),
    ],
    ids=["rfft2", "qr", "double", "orthogonal", "not finite"],
)
def test_a_network_that_does_not_work_in_the_precision_is_refused(
    middle: Callable[[Tensor], Tensor], reason: str, fashion: Dataset
) -> None:
    bad, good, data = chain_of(middle), chain_of(nn.ReLU()), few_of(fashion)
    for pair, role in (((bad, good), "sender"), ((good, bad), "receiver")):
        message = rf"the {role} does not work in bf16 at position second \(.*({reason}).*\): use precision='fp32'"
        with pytest.raises(NetworkError, match=message):
            fastsitch.stitch(*pair, data, batch_size=32, epochs=1, precision="bf16", device="cpu")
        in_fp32 = fastsitch.stitch(*pair, data, batch_size=32, epochs=1, precision="fp32", device="cpu")
        assert in_fp32.status.all()


def test_the_way_back_is_tried_too(fashion: Dataset) -> None:
    good, data = chain_of(nn.ReLU()), few_of(fashion)
    second, head = nn.Sequential(Through(), nn.Conv2d(8, 8, 1)), nn.Sequential(nn.Flatten(), nn.Linear(512, 10))
    bad = Chain.from_segments([nn.Conv2d(3, 8, 4, 4), second], ["first", "second"], head, IMAGES)
    with pytest.raises(NetworkError, match="the receiver does not work in bf16 on the way back from position second"):
        fastsitch.stitch(good, bad, data, batch_size=32, epochs=1, precision="bf16", device="cpu")
    matched = fastsitch.stitch(good, bad, data, batch_size=32, precision="bf16", device="cpu", loss="match")
    assert (matched.status == 1).all()


FACTORY = """
import torch
from torch import nn

class Fourier(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, classes)
    def forward(self, x):
        x = torch.fft.irfft2(torch.fft.rfft2(self.first(x)))
        return self.head(self.second(x).relu().mean((2, 3)))

def fourier(classes):
    return Fourier(classes)
"""


@pytest.mark.skipif(not native_bf16(torch.device("cpu")), reason="stores are computed in fp32 here")
def test_a_sweep_is_refused_before_any_store_and_says_what_works(few: str, tmp_path: Path, run_cli: Command) -> None:
    (tmp_path / "nets.py").write_text(FACTORY)
    root = ["--root", tmp_path / "root"]
    where = ["--dataset", few, *root]
    for line in (
        ["add", "net", "--from", f"{tmp_path}/nets.py:fourier", "--positions", "first,second", *where],
        ["train", "net", "R1111", "--width", "4", "--epochs", "1", *where],
    ):
        ended = run_cli(*line)
        assert ended.returncode == 0, ended.stderr

    def refused(message: str, *line: str | Path) -> None:
        ended = run_cli(*line)
        assert ended.returncode == 2, ended.stderr
        assert message in ended.stderr.splitlines()[-1]
        assert not (tmp_path / "root" / "activations").exists() or not list(tmp_path.glob("root/activations/*/net"))
        assert not list(tmp_path.glob("root/runs/*/*"))

    short = ["--batch-size", "32", "--epochs", "1", *where]
    into, out_of = (
        ["sweep", "--senders", a, "--receivers", b, *short] for a, b in (("R1111", "net"), ("net", "R1111"))
    )
    at_second = "net does not work in bf16 at position second"
    refused(at_second, *into)
    refused("use --precision fp32", *into)
    refused(at_second, *out_of)
    refused("--dtype fp32", *out_of, "--precision", "fp32")
    refused("and leave out --source live", *out_of, "--source", "live")
    refused("use --dtype fp32", "precompute", "net", *where)
    assert run_cli("precompute", "net", "--dtype", "fp32", *where).returncode == 0
    assert run_cli(*out_of).returncode == 0
    assert run_cli(*into, "--precision", "fp32").returncode == 0


def test_a_dry_run_refuses_what_the_sweep_refuses(few: str, tmp_path: Path, run_cli: Command) -> None:
    (tmp_path / "nets.py").write_text(FACTORY)
    where = ["--dataset", few, "--root", tmp_path / "root"]
    add = ["add", "net", "--from", f"{tmp_path}/nets.py:fourier", "--positions", "first,second"]
    assert run_cli(*add, *where).returncode == 0
    assert run_cli("train", "net", "R1111", "--width", "4", "--epochs", "1", *where).returncode == 0
    line = ["sweep", "--senders", "R1111", "--receivers", "net", "--batch-size", "32", "--epochs", "1", *where]
    ended = run_cli(*line, "--dry-run", "--precision", "bf16")
    assert ended.returncode == 2
    assert "net does not work in bf16 at position second" in ended.stderr
    assert "use --precision fp32" in ended.stderr
    for dry in (["--dry-run"], []):
        ended = run_cli(*line, "--precision", "fp32", *dry)
        assert ended.returncode == 0, ended.stderr
