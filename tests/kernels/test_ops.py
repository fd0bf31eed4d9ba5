"""The registered ops: registration, autograd, compilation, the meta device, wrong arguments."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsitch.kernels import grouped_stitch, grouped_stitch_reference, ops, stitch_grad, stitch_out
from fastsitch.kernels.launch import Launch

SOURCE = (0, 0, 1)
GEOMETRIES = ({}, {"down": 2}, {"up": 2})

each_geometry = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)


def make(geometry: dict[str, int], device: str = "cpu", dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    down, up = geometry.get("down", 1), geometry.get("up", 1)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return {
        "x_SNHWC": draw(2, 5, 4, 6, 3),
        "w_KFD": draw(3, down * down * 3, 7),
        "b_KD": draw(3, 7),
        "source": SOURCE,
        "index_B": torch.tensor([4, 0, 0], device=device),
        "down": down,
        "up": up,
    }


def received(arguments: dict[str, Any]) -> Tensor:
    x, down, up = arguments["x_SNHWC"], arguments["down"], arguments["up"]
    return x.new_full((3, 3, 4 // down * up, 6 // down * up, 7), float("nan"))


@each_geometry
def test_agrees_with_the_reference(geometry: dict[str, int]) -> None:
    arguments = make(geometry)
    w, b = arguments["w_KFD"].requires_grad_(), arguments["b_KD"].requires_grad_()
    expected = grouped_stitch_reference(**arguments)
    g = torch.randn_like(expected)
    y = grouped_stitch(**arguments)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    made, wanted = torch.autograd.grad(y, (w, b), g), torch.autograd.grad(expected, (w, b), g)
    torch.testing.assert_close(made, wanted, rtol=1e-12, atol=1e-12)


# opcheck itself looks at the gradients of its intermediate tensors
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@each_geometry
def test_registrations(geometry: dict[str, int]) -> None:
    a = make(geometry)
    out = received(a).fill_(0.0)
    tail = (a["source"], a["index_B"], a["down"], a["up"], "torch")
    w, b = a["w_KFD"], a["b_KD"]
    torch.library.opcheck(ops._stitch_out, (a["x_SNHWC"], w, b, out.clone(), *tail))
    dw, db = torch.zeros_like(w), torch.zeros_like(b)
    torch.library.opcheck(ops._stitch_grad, (a["x_SNHWC"], out, dw, db, *tail))
    torch.library.opcheck(ops._grouped_stitch_grad, (a["x_SNHWC"], out, *tail))
    learned = (w.clone().requires_grad_(), b.clone().requires_grad_())
    torch.library.opcheck(ops._grouped_stitch, (a["x_SNHWC"], *learned, *tail))


@each_geometry
def test_compiles_without_graph_breaks(geometry: dict[str, int]) -> None:
    arguments = make(geometry)
    w, b = arguments["w_KFD"].requires_grad_(), arguments["b_KD"].requires_grad_()

    def loss(**given: Any) -> Tensor:
        return grouped_stitch(**given).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    made = torch.autograd.grad(compiled(**arguments), (w, b))
    torch.testing.assert_close(made, torch.autograd.grad(loss(**arguments), (w, b)), rtol=1e-12, atol=1e-12)


def test_the_writing_op_compiles_too() -> None:
    arguments = make({"up": 2})

    def double(out_KBPQD: Tensor, **given: Any) -> Tensor:
        stitch_out(out_KBPQD=out_KBPQD, **given)
        return out_KBPQD * 2

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    out = received(arguments)
    assert torch.equal(compiled(out, **arguments), 2 * grouped_stitch(**arguments))
    assert torch.equal(out, grouped_stitch(**arguments))


@each_geometry
@pytest.mark.parametrize("kernel", ["auto", "torch", "triton"])
def test_a_step_on_the_meta_device(geometry: dict[str, int], kernel: str) -> None:
    """Forward, backward and optimizer; anything that read a value would fail."""
    arguments = make(geometry, device="meta", dtype=torch.bfloat16)
    w, b = (torch.nn.Parameter(arguments[name]) for name in ("w_KFD", "b_KD"))
    arguments |= {"w_KFD": w, "b_KD": b}
    optimizer = torch.optim.SGD([w, b], lr=0.1, momentum=0.9)
    grouped_stitch(**arguments, kernel=kernel).square().sum().backward()
    optimizer.step()
    assert w.grad is not None
    assert (w.grad.shape, w.grad.device.type) == (w.shape, "meta")
    out = received(arguments)
    with torch.no_grad():
        stitch_out(out_KBPQD=out, **arguments, kernel=kernel)
    del arguments["w_KFD"], arguments["b_KD"]
    stitch_grad(g_KBPQD=out, dw_KFD=w.grad.float(), db_KD=b.grad.float(), **arguments, kernel=kernel)


WRONG: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
    ({"x_SNHWC": torch.zeros(2, 5, 4, 6)}, ValueError, r"x_SNHWC: expected 5 dimensions \(S, N, H, W, C\), got shape"),
    ({"x_SNHWC": torch.zeros(2, 5, 4, 6, 3, dtype=torch.int32)}, TypeError, r"x_SNHWC: expected .*, got torch\.int32"),
    ({"w_KFD": torch.zeros(3, 4, 7)}, TypeError, r"w_KFD: expected torch\.float64 as x_SNHWC has, got torch\.float32"),
    (
        {"w_KFD": torch.zeros(3, 4, 7, dtype=torch.float64)},
        ValueError,
        r"w_KFD: expected shape \(3, 3, 7\), got \(3, 4, 7\)",
    ),
    (
        {"b_KD": torch.zeros(7, dtype=torch.float64)},
        ValueError,
        r"b_KD: expected 2 dimensions \(K, D\), got shape \(7,\)",
    ),
    (
        {"b_KD": torch.zeros(3, 7, dtype=torch.float64, device="meta")},
        ValueError,
        "b_KD: expected it on cpu .*, got meta",
    ),
    ({"source": (0, 2, 1)}, ValueError, r"source: expected indices of the 2 senders in x_SNHWC, got \[0, 2, 1\]"),
    (
        {"index_B": torch.tensor([0, 1], dtype=torch.int32)},
        TypeError,
        r"index_B: expected 1-d int64, got 1-d torch\.int32",
    ),
    (
        {"index_B": torch.tensor([0, 5, 1])},
        ValueError,
        r"index_B: expected indices in \[0, 5\), got values from 0 to 5",
    ),
    ({"down": 2, "up": 2}, ValueError, "expected down and up of at least 1, one of them 1, got down=2, up=2"),
    ({"down": 0}, ValueError, "got down=0, up=1"),
    ({"down": 4}, ValueError, "expected a height and width that down=4 divides, got 4 x 6"),
    ({"kernel": "cuda"}, ValueError, "^expected one of auto, triton, torch, got 'cuda'"),
)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("kernel", ["torch", "triton"])
def test_the_ops_never_wait_for_a_device(
    geometry: dict[str, int], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bodies of the ops, which tracing does not run, on meta tensors: every read of a value is an error there."""
    launched = []
    monkeypatch.setattr(Launch, "run", lambda launch, device: launched.append(launch))
    arguments = {key: on_meta(value) for key, value in make(geometry, dtype=torch.float32).items()}
    out = torch.empty(received(arguments).shape, device="meta", dtype=arguments["x_SNHWC"].dtype)
    x, w, b = (arguments[name] for name in ("x_SNHWC", "w_KFD", "b_KD"))
    where = (arguments["source"], arguments.get("index_B"), geometry.get("down", 1), geometry.get("up", 1), kernel)
    ops._stitch_out._init_fn(x, w, b, out, *where)
    ops._stitch_grad._init_fn(x, out, torch.empty_like(w), torch.empty_like(b), *where)
    assert len(launched) >= 2 * (kernel == "triton")


def on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG)
def test_wrong_arguments(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        grouped_stitch(**(make({}) | wrong))


def test_a_sender_that_wants_a_gradient_is_refused() -> None:
    arguments = make({})
    arguments["x_SNHWC"].requires_grad_()
    with pytest.raises(ValueError, match="expected a frozen sender"):
        grouped_stitch(**arguments)


def test_outputs_that_cannot_be_written_are_refused() -> None:
    arguments = make({})
    wrong_shape, scattered = received(arguments)[:2], received(arguments).transpose(2, 3).contiguous().transpose(2, 3)
    overlapping = received(arguments)[:1].expand(3, -1, -1, -1, -1)
    for out, message in (
        (wrong_shape, r"out_KBPQD: expected shape \(3, 3, 4, 6, 7\), got \(2, 3, 4, 6, 7\)"),
        (scattered, r"out_KBPQD: expected each stitch's \(B, P, Q, D\) contiguous, got strides"),
        (overlapping, "out_KBPQD: expected stitches 504 elements apart, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            stitch_out(out_KBPQD=out, **arguments)


def test_gradients_that_cannot_be_written_are_refused() -> None:
    arguments = make({})
    w, b, g = arguments.pop("w_KFD"), arguments.pop("b_KD"), received(arguments)
    with pytest.raises(ValueError, match=r"dw_KFD: expected shape \(3, 3, 7\), got \(2, 3, 7\)"):
        stitch_grad(g_KBPQD=g, dw_KFD=w[:2], db_KD=b, **arguments)
    with pytest.raises(TypeError, match=r"expected one floating dtype, got torch\.float64 and torch\.float32"):
        stitch_grad(g_KBPQD=g, dw_KFD=w, db_KD=b.float(), **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("blocked", [False, True], ids=["installed", "missing"])
def test_import_leaves_triton_alone(blocked: bool) -> None:
    """Importing the kernels neither needs triton nor loads it, and the torch path works without."""
    code = f"""
import sys
if {blocked}:
    sys.modules["triton"] = None
import torch
import fastsitch.kernels as kernels
assert {blocked} or "triton" not in sys.modules
x = torch.ones(1, 1, 2, 2, 1)
assert kernels.grouped_stitch(x, torch.ones(1, 1, 1), torch.ones(1, 1), [0]).eq(2).all()
if {blocked}:
    try:
        kernels.grouped_stitch(x, torch.ones(1, 1, 1), torch.ones(1, 1), [0], kernel="triton")
    except ValueError as error:
        assert "triton is not installed" in str(error)
    else:
        raise AssertionError
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
