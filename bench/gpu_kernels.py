"""The stitch kernels on a GPU: right, and how fast. Exit code 2 without CUDA, 1 when a number is wrong.

    python bench/gpu_kernels.py [--json FILE] [--quick] [--tune] [--sanitizer]

First the numerics of every launch of the study (bench/kernel_model.py) at full size, forward and gradients, per
stitch against fp64 products of the same inputs; a time is reported only for launches whose numbers are right. Then
the timing table: median of 20 with a cold L2 and without the time that Python takes to launch, achieved GB/s of the
unavoidable bytes, the share of the measured copy bandwidth, and the same launch by the torch path and by cuDNN
convolutions. --sanitizer runs a small subset once more under compute-sanitizer, where it is installed.
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from fastsitch.kernels import space_to_depth, stitch_grad, stitch_out
from fastsitch.kernels.choose_tiles import forward_plan, grad_plan
from fastsitch.kernels.reference import conv_weight
from fastsitch.kernels.shapes import StitchShape
from fastsitch.kernels.study_launches import study_launches
from fastsitch.kernels.tiles import FORWARD, GRAD, DeviceLimits, device_limits
from fastsitch.kernels.traffic import Traffic, forward_traffic, grad_traffic
from fastsitch.kernels.tuning import median_seconds, tune

# images in memory for each image of the batch
STORED = 4
COPY_BYTES = 2**30
SANITIZER_SECONDS = 180


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Tensors of one launch on the device."""

    x: Tensor
    w: Tensor
    b: Tensor
    g: Tensor
    dw: Tensor
    db: Tensor
    index: Tensor
    shape: StitchShape

    def forward(self, kernel: str, out: Tensor) -> None:
        s = self.shape
        stitch_out(self.x, self.w, self.b, out, s.source, self.index, down=s.down, up=s.up, kernel=kernel)

    def backward(self, kernel: str) -> None:
        s = self.shape
        stitch_grad(self.x, self.g, self.dw, self.db, s.source, self.index, down=s.down, up=s.up, kernel=kernel)


def make_inputs(shape: StitchShape, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(shape.dtype)

    stored, down, up = STORED * shape.images, shape.down, shape.up
    stitches, channels, outputs = shape.stitches, shape.channels, shape.receiver_channels
    return Inputs(
        x=draw(max(shape.source) + 1, stored, shape.height * down, shape.width * down, channels).relu_(),
        w=draw(stitches, shape.features, outputs).div_(shape.features**0.5),
        b=draw(stitches, outputs),
        g=draw(stitches, shape.images, shape.height * up, shape.width * up, outputs),
        dw=torch.full((stitches, shape.features, outputs), float("nan"), device=device),
        db=torch.full((stitches, outputs), float("nan"), device=device),
        index=torch.randperm(stored, generator=generator, device=device)[: shape.images],
        shape=shape,
    )


def exact(inputs: Inputs, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """One stitch in fp64 as the products it stands for: output, weight gradient, bias gradient."""
    s = inputs.shape
    cells = space_to_depth(inputs.x[s.source[k]][inputs.index].double(), s.down)
    x_MF = cells.reshape(-1, s.features)
    y = (x_MF @ inputs.w[k].double() + inputs.b[k].double()).view(s.images, s.height, s.width, -1)
    g = inputs.g[k].double().view(s.images, s.height, s.up, s.width, s.up, -1).sum((2, 4))
    g_MD = g.reshape(-1, s.receiver_channels)
    y = y.repeat_interleave(s.up, 1).repeat_interleave(s.up, 2)
    return y, x_MF.t() @ g_MD, g_MD.sum(0)


def errors(inputs: Inputs, kernel: str) -> list[tuple[float, float, float]]:
    """Per stitch the root mean square errors of output, weight gradient and bias gradient, relative to their size."""
    out = torch.full_like(inputs.g, float("nan"))
    inputs.dw.fill_(float("nan"))
    inputs.db.fill_(float("nan"))
    inputs.forward(kernel, out)
    inputs.backward(kernel)
    rows = []
    for k in range(inputs.shape.stitches):
        pairs = zip((out[k], inputs.dw[k], inputs.db[k]), exact(inputs, k), strict=True)
        relative = [((got.double() - true).norm() / true.norm()).item() for got, true in pairs]
        rows.append((relative[0], relative[1], relative[2]))
    return rows


def judge(inputs: Inputs) -> dict[str, Any]:
    """Errors of the kernels against twice those of plain torch, stitch by stitch, and the same bits twice."""
    made = errors(inputs, "triton")
    dw, db = inputs.dw.clone(), inputs.db.clone()
    inputs.backward("triton")
    repeatable = torch.equal(dw, inputs.dw) and torch.equal(db, inputs.db)
    allowed = errors(inputs, "torch")
    # where torch is exact, the last bits of fp32 sums over all rows remain
    floor = torch.finfo(torch.float32).eps * inputs.shape.rows**0.5
    pairs = zip(itertools.chain(*made), itertools.chain(*allowed), strict=True)
    right = all(error <= 2 * limit + floor for error, limit in pairs)
    return {"right": right, "repeatable": repeatable, "errors": made, "torch_errors": allowed}


def cudnn_forward(inputs: Inputs) -> Callable[[], None]:
    """The stitches as convolutions one after the other, channels-last, from a batch that is already gathered."""
    s = inputs.shape
    batches = [inputs.x[k][inputs.index].permute(0, 3, 1, 2) for k in s.source]
    weights = [conv_weight(w, s.down).contiguous(memory_format=torch.channels_last) for w in inputs.w]

    def run() -> None:
        for x, w, b in zip(batches, weights, inputs.b, strict=True):
            y = F.conv2d(F.interpolate(x, scale_factor=s.up) if s.up > 1 else x, w, b, stride=s.down)
            del y

    return run


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a device copy, read and written."""
    source = torch.empty(COPY_BYTES, dtype=torch.int8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    # a recording would use the copy engine, which is slower
    return 2 * COPY_BYTES / median_seconds(copy, device, recorded=False)


def timing_rows(inputs: Inputs, limits: DeviceLimits, bandwidth: float) -> Iterator[dict[str, Any]]:
    """Forward and gradient, by the kernels, by torch and by cuDNN (forward)."""
    device, s = inputs.x.device, inputs.shape
    out = torch.empty_like(inputs.g)
    forward, grad = forward_plan(s, limits), grad_plan(s, limits)
    cases: tuple[tuple[str, str, Traffic, dict[str, Callable[[], None]]], ...] = (
        (
            FORWARD,
            forward.config.name,
            forward_traffic(s, forward, limits),
            {
                "triton": lambda: inputs.forward("triton", out),
                "torch": lambda: inputs.forward("torch", out),
                "cudnn": cudnn_forward(inputs),
            },
        ),
        (
            GRAD,
            grad.config.name,
            grad_traffic(s, grad, limits),
            {"triton": lambda: inputs.backward("triton"), "torch": lambda: inputs.backward("torch")},
        ),
    )
    for kernel, config, traffic, paths in cases:
        for path, launch in paths.items():
            seconds = median_seconds(launch, device)
            rate = traffic.minimum_bytes / seconds
            yield {
                "kernel": kernel,
                "path": path,
                "config": config if path == "triton" else "",
                "shape": describe(s),
                "us": seconds * 1e6,
                "gb_per_s": rate / 1e9,
                "copy_share": rate / bandwidth,
                "tflop_per_s": traffic.flops / seconds / 1e12,
                "model_floor_us": traffic.floor_seconds * 1e6,
            }


def describe(shape: StitchShape) -> str:
    way = f"down{shape.down}" if shape.down > 1 else f"up{shape.up}" if shape.up > 1 else "equal"
    return f"{shape.channels}->{shape.receiver_channels} {way} {shape.height}x{shape.width} K{shape.stitches}"


def shapes(quick: bool) -> list[StitchShape]:
    """The launches of the study with the most stitches of each kind; three of them when quick."""
    most: dict[tuple[int, int], StitchShape] = {}
    for shape in study_launches():
        key = (shape.channels, shape.receiver_channels)
        if key not in most or shape.stitches > most[key].stitches:
            most[key] = shape
    ordered = [most[key] for key in sorted(most)]
    return [most[64, 64], most[64, 128], most[128, 64]] if quick else ordered


def sanitize() -> dict[str, Any]:
    """The quick numerics under compute-sanitizer: no access out of bounds."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"ran": False, "why": "compute-sanitizer is not installed"}
    script = [sys.executable, __file__, "--quick", "--numerics"]
    # without torch's cache every tensor is an allocation of its own, so that an overrun is seen
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *script]
    try:
        run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SANITIZER_SECONDS)
    except subprocess.TimeoutExpired:
        return {"ran": False, "why": f"compute-sanitizer took more than {SANITIZER_SECONDS} seconds"}
    return {"ran": True, "ok": run.returncode == 0, "tail": (run.stdout + run.stderr)[-2000:]}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--quick", action="store_true", help="three launches instead of sixteen")
    parser.add_argument("--numerics", action="store_true", help="no timings")
    parser.add_argument("--tune", action="store_true", help="choose tile configurations by timing them")
    parser.add_argument("--sanitizer", action="store_true", help="quick numerics under compute-sanitizer")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("expected a CUDA device, found none; bench/compile_report.py needs none", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    limits = device_limits(device)
    bandwidth = 0.0 if options.numerics else copy_bandwidth(device)
    report: dict[str, Any] = {
        "device": limits.name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "copy_gb_per_s": bandwidth / 1e9,
        "numerics": [],
        "timings": [],
    }
    wrong = 0
    for shape in shapes(options.quick):
        inputs = make_inputs(shape, device)
        if options.tune:
            out = torch.empty_like(inputs.g)
            tune(FORWARD, shape, device, lambda inputs=inputs, out=out: inputs.forward("triton", out))
            tune(GRAD, shape, device, lambda inputs=inputs: inputs.backward("triton"))
        verdict = judge(inputs)
        report["numerics"].append({"shape": describe(shape), **verdict})
        fine = verdict["right"] and verdict["repeatable"]
        print(f"{describe(shape):<32} {'right' if fine else 'WRONG: ' + json.dumps(verdict)}", flush=True)
        wrong += not fine
        if options.numerics or not fine:
            continue
        for row in timing_rows(inputs, limits, bandwidth):
            report["timings"].append(row)
            print(
                f"  {row['kernel']:<15} {row['path']:<7} {row['us']:>9.1f} us {row['gb_per_s']:>7.0f} GB/s"
                f" {row['copy_share']:>6.1%} of copy {row['tflop_per_s']:>6.1f} TFLOP/s {row['config']}",
                flush=True,
            )
        del inputs
    if options.sanitizer:
        report["sanitizer"] = sanitize()
        wrong += report["sanitizer"].get("ok") is False
        print(f"compute-sanitizer: {report['sanitizer']}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
