"""Compile every stitch kernel for GPUs that need not be here, and fail on what would be slow or wrong there.

    python bench/compile_report.py [--json FILE] [--full] [--select TEXT]

Each row is one kernel x configuration x dtype x target. A row is ok when it compiles, nothing spills, shared memory
and registers leave room for the programs that are meant to share a processor, 16-bit variants use tensor cores, and
every access to an aligned tile is 16 bytes wide. Exit code 1 when a row is not ok. By default every configuration
and dtype is built on every target for equal sizes, and every geometry on sm_90 in bf16; --full builds the product.
Results are cached by the hash of the kernels' sources in ~/.cache/fastsitch (or XDG_CACHE_HOME).
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import triton

import fastsitch.kernels
from fastsitch.kernels.choose_tiles import override_config
from fastsitch.kernels.launch import Launch
from fastsitch.kernels.offline import SHARED, compile_launch
from fastsitch.kernels.shapes import StitchShape
from fastsitch.kernels.tiles import CONFIGS, FORWARD, GRAD, DeviceLimits, TileConfig, candidates
from fastsitch.kernels.triton_forward import forward_launch
from fastsitch.kernels.triton_grad import grad_launches

REDUCE = "reduce_partials"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VECTOR_BYTES = 16
BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sender and receiver of a launch."""

    name: str
    size: int
    channels: int
    receiver_channels: int
    down: int = 1
    up: int = 1
    gather: bool = True

    def shape(self, dtype: torch.dtype) -> StitchShape:
        return StitchShape(
            source=(0, 0, 1),
            images=BATCH,
            height=self.size // self.down,
            width=self.size // self.down,
            channels=self.channels,
            receiver_channels=self.receiver_channels,
            down=self.down,
            up=self.up,
            dtype=dtype,
            gather=self.gather,
        )


EQUAL = Geometry(name="equal", size=32, channels=64, receiver_channels=64)
GEOMETRIES = (
    EQUAL,
    Geometry(name="equal-all", size=32, channels=64, receiver_channels=64, gather=False),
    Geometry(name="deep", size=4, channels=512, receiver_channels=512),
    Geometry(name="down2", size=32, channels=64, receiver_channels=128, down=2),
    Geometry(name="down4", size=32, channels=64, receiver_channels=256, down=4),
    Geometry(name="down8", size=32, channels=64, receiver_channels=512, down=8),
    Geometry(name="up2", size=16, channels=128, receiver_channels=64, up=2),
    Geometry(name="up4", size=8, channels=256, receiver_channels=64, up=4),
    Geometry(name="up8", size=4, channels=512, receiver_channels=64, up=8),
    # nothing divides anything: built for its masks, not for its speed
    Geometry(name="odd", size=9, channels=100, receiver_channels=63),
    Geometry(name="odd-down3", size=9, channels=3, receiver_channels=100, down=3),
    Geometry(name="odd-up3", size=7, channels=63, receiver_channels=3, up=3),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row to be."""

    kernel: str
    config: TileConfig
    geometry: Geometry
    dtype: str
    sm: int

    @property
    def label(self) -> str:
        return f"{self.kernel} {self.config.name} {self.geometry.name} {self.dtype} sm_{self.sm}"


def cases(full: bool) -> Iterator[Case]:
    """The rows of the default report, or of the whole product."""
    for sm, (_, shared) in SHARED.items():
        limits = DeviceLimits(name=f"sm_{sm}", processors=132, shared_bytes=shared, l2_bytes=50 * 2**20)
        for kernel, (dtype, torch_dtype), geometry in product((FORWARD, GRAD), DTYPES.items(), GEOMETRIES):
            if full or geometry is EQUAL or (sm == 90 and dtype == "bf16"):
                for config in candidates(kernel, geometry.shape(torch_dtype), limits):
                    yield Case(kernel=kernel, config=config, geometry=geometry, dtype=dtype, sm=sm)
        # the partials are fp32 whatever the inputs, and do not depend on the tiles
        yield Case(kernel=REDUCE, config=CONFIGS[GRAD][-1], geometry=EQUAL, dtype="fp32", sm=sm)


def launch_of(case: Case) -> Launch:
    """The launch, on meta tensors: three stitches of the study's size, two of which share a sender."""
    g, dtype = case.geometry, DTYPES[case.dtype]
    features, size = g.down * g.down * g.channels, g.size // g.down * g.up
    x = torch.empty(2, 4 * BATCH, g.size, g.size, g.channels, dtype=dtype, device="meta")
    w = torch.empty(3, features, g.receiver_channels, dtype=dtype, device="meta")
    b = torch.empty(3, g.receiver_channels, dtype=dtype, device="meta")
    images = BATCH if g.gather else 4 * BATCH
    y = torch.empty(3, images, size, size, g.receiver_channels, dtype=dtype, device="meta")
    index = torch.empty(BATCH, dtype=torch.int64, device="meta") if g.gather else None
    if case.kernel == FORWARD:
        with override_config(FORWARD, case.config):
            return forward_launch(x, w, b, y, (0, 0, 1), index, g.down, g.up)
    with override_config(GRAD, case.config):
        launches = grad_launches(x, y, w.float(), b.float(), (0, 0, 1), index, g.down, g.up)
    return launches[0] if case.kernel == GRAD else launches[1]


def report_row(case: Case) -> dict[str, object]:
    """Compile the case and judge it."""
    row: dict[str, object] = {
        "kernel": case.kernel,
        "dtype": case.dtype,
        "config": f"{case.config.name} {case.geometry.name}",
        "target": f"sm_{case.sm}",
    }
    try:
        # triton prints a failing kernel's whole assembly
        with contextlib.redirect_stdout(io.StringIO()):
            built = compile_launch(launch_of(case), case.sm)
    except Exception as error:
        nothing = dict.fromkeys(("registers", "spill_bytes", "shared_bytes", "vector_bytes"), 0)
        return {
            **row,
            **nothing,
            "tensor_core": False,
            "ok": False,
            "why": f"{type(error).__name__}: {str(error)[:300]}",
        }
    shape = case.geometry.shape(DTYPES[case.dtype])
    resident = 1 if shape.register_hungry else case.config.resident
    complaints = []
    if built.spill_bytes:
        complaints.append(f"spills {built.spill_bytes} bytes")
    if built.shared_bytes > SHARED[case.sm][1]:
        complaints.append(f"{built.shared_bytes} bytes of shared memory, {SHARED[case.sm][1]} allowed")
    if built.programs_per_processor < resident:
        complaints.append(f"{built.programs_per_processor} programs to a processor, {resident} intended")
    if case.dtype != "fp32" and not built.tensor_core:
        complaints.append("no tensor-core instruction")
    if shape.aligned and built.vector_bytes < VECTOR_BYTES:
        complaints.append(f"accesses of {built.vector_bytes} bytes to aligned tiles")
    return {
        **row,
        "registers": built.registers,
        "spill_bytes": built.spill_bytes,
        "shared_bytes": built.shared_bytes,
        "tensor_core": built.tensor_core,
        "vector_bytes": built.vector_bytes,
        "ok": not complaints,
        "why": "; ".join(complaints),
    }


def source_hash() -> str:
    """Of everything a row depends on: the kernels, this script, triton."""
    digest = hashlib.sha256(triton.__version__.encode())
    folder = Path(fastsitch.kernels.__file__).parent
    for path in [*sorted(folder.glob("*.py")), Path(__file__)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cache_file() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "fastsitch" / "compile_report" / f"{source_hash()}.json"


def build_rows(full: bool, select: str) -> list[dict[str, object]]:
    """All rows, from the cache where it has them; failures are tried again."""
    path = cache_file()
    cache: dict[str, dict[str, object]] = json.loads(path.read_text()) if path.exists() else {}
    rows = []
    for case in cases(full):
        if select not in case.label:
            continue
        if case.label not in cache:
            cache[case.label] = report_row(case)
        rows.append(cache[case.label])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({label: row for label, row in cache.items() if row["ok"]}))
    temporary.replace(path)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    parser.add_argument("--full", action="store_true", help="every geometry on every target and dtype")
    parser.add_argument("--select", default="", help="only rows whose label contains this text")
    options = parser.parse_args(arguments)
    rows = build_rows(options.full, options.select)
    print("kernel           dtype target  config                        regs spill  shared tensor vector ok")
    for row in rows:
        print(
            f"{row['kernel']:<16} {row['dtype']:<5} {row['target']:<7} {row['config']:<29} {row['registers']:>4}"
            f" {row['spill_bytes']:>5} {row['shared_bytes']:>7} {'yes' if row['tensor_core'] else 'no':>6}"
            f" {row['vector_bytes']:>6} {'ok' if row['ok'] else row['why']}"
        )
    failed = sum(not row["ok"] for row in rows)
    print(f"{len(rows)} rows, {failed} not ok")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    raise SystemExit(main())
