"""Networks whose weights or methods are not what they seem: added and trained, or refused in one line."""

from pathlib import Path

import pytest
import torch

from tests.conftest import Command

# torch's, of torch.jit and quantised tensors
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated")

FACTORIES = """
import torch
from torch import nn

def small(classes, kind=nn.Sequential):
    return kind(
        nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, classes),
    )

def of_meta(classes):
    return small(classes).to("meta")

def partly_meta(classes):
    model = small(classes)
    model[5] = nn.Linear(8, classes, device="meta")
    return model

def default_device(classes):
    torch.set_default_device("meta")
    return small(classes)

def default_device_afterwards(classes):
    model = small(classes)
    torch.set_default_device("meta")
    return model

class Nothing(nn.Sequential):
    def float(self):
        pass
    def cpu(self):
        pass
    def to(self, *args, **kwargs):
        pass
    def requires_grad_(self, requires_grad=True):
        pass

def nothing(classes):
    return small(classes, Nothing).double()

class Raises(nn.Sequential):
    def parameters(self, recurse=True):
        raise RuntimeError("none\\nof yours")

def raises(classes):
    return small(classes, Raises)

class Numbers(nn.Sequential):
    def parameters(self, recurse=True):
        return [1, 2]

def numbers(classes):
    return small(classes, Numbers)

class Hides(nn.Sequential):
    def parameters(self, recurse=True):
        return iter([])

def hides(classes):
    return small(classes, Hides)

class Extra(nn.Sequential):
    def get_extra_state(self):
        return {"a": 1}
    def set_extra_state(self, state):
        pass

def extra(classes):
    return small(classes, Extra)

class ExtraFails(nn.Sequential):
    def get_extra_state(self):
        raise OSError("never")

def extra_fails(classes):
    return small(classes, ExtraFails)

class LoadFails(nn.Sequential):
    def load_state_dict(self, *args, **kwargs):
        raise OSError("never")

def load_fails(classes):
    return small(classes, LoadFails)

def lazy(classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))

def sparse(classes):
    model = small(classes)
    model[5].weight = nn.Parameter(model[5].weight.detach().to_sparse())
    return model

def quantised(classes):
    model = small(classes)
    model.register_buffer("kept", torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8))
    return model

def expanded(classes):
    model = small(classes)
    model[5].weight = nn.Parameter(torch.randn(1, 8).expand(classes, 8))
    return model

def infinite(classes):
    model = small(classes)
    model[1].running_var.fill_(float("inf"))
    return model

def undefined(classes):
    model = small(classes)
    model[1].running_mean.fill_(float("nan"))
    return model

def locked(classes):
    import threading
    model = small(classes)
    model.lock = threading.Lock()
    return model

def script(classes):
    model = small(classes)
    model[2] = torch.jit.script(nn.ReLU())
    return model
"""


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(FACTORIES)
    return tmp_path / "nets.py"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("of_meta", "weights on the meta device, without values (0.weight of Conv2d)"),
        ("partly_meta", "weights on the meta device, without values (5.weight of Linear)"),
        ("default_device", "weights on the meta device"),
        ("raises", "parameters() raises RuntimeError: none"),
        ("numbers", "has parameters that parameters() does not give"),
        ("hides", "has parameters that parameters() does not give"),
        ("extra", "_extra_state of its state_dict() is a dict; expected tensors alone"),
        ("extra_fails", "cannot be saved and loaded (OSError: never)"),
        ("load_fails", "cannot be saved and loaded (OSError: never)"),
        ("lazy", "has lazy modules without weights yet: run the network once"),
        ("sparse", "sparse or quantised weights (5.weight of Linear)"),
        ("quantised", "sparse or quantised weights (kept of Sequential)"),
        ("expanded", "weights that share memory among their elements (5.weight of Linear)"),
        ("infinite", "initial weights that are not finite (1.running_var of BatchNorm2d)"),
        ("undefined", "initial weights that are not finite (1.running_mean of BatchNorm2d)"),
        ("locked", "cannot copy lock of a Sequential (TypeError"),
    ],
)
def test_odd_networks_are_refused_in_one_line(
    name: str, message: str, nets: Path, few: str, tmp_path: Path, run_cli: Command
) -> None:
    ended = run_cli("add", "net", "--from", f"{nets}:{name}", "--dataset", few, "--root", tmp_path / "root")
    assert ended.returncode == 2, ended.stderr
    assert message in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "root").exists()
    assert torch.get_default_device() == torch.device("cpu")


@pytest.mark.parametrize("name", ["default_device_afterwards", "nothing", "script"])
def test_odd_networks_that_are_whole_are_trained_and_stitched(
    name: str, nets: Path, few: str, tmp_path: Path, run_cli: Command
) -> None:
    where = ["--dataset", few, "--root", tmp_path / "root"]
    for line in (
        ["add", "net", "--from", f"{nets}:{name}", *where],
        ["train", "net", "--epochs", "1", *where],
        ["sweep", "--senders", "net", "--receivers", "net", "--epochs", "1", "--batch-size", "32", *where],
    ):
        ended = run_cli(*line)
        assert ended.returncode == 0, ended.stderr
