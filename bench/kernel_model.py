"""Model of the stitch kernels' traffic for the shapes of the study; no device needed.

    python bench/kernel_model.py [--json FILE]

The study: 16 small ResNets (R1111 to R2222) at width 64 on 32 x 32 images, batch 256, bf16, every ordered pair.
A launch serves one receiver position and all sender positions of one shape, images gathered by index. What is
printed is arithmetic (kernels/traffic.py), not a measurement.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from fastsitch.kernels.choose_tiles import forward_plan, grad_plan
from fastsitch.kernels.shapes import StitchShape
from fastsitch.kernels.study_launches import study_launches
from fastsitch.kernels.tiles import H100
from fastsitch.kernels.traffic import Traffic, forward_traffic, grad_traffic


def study_rows() -> list[dict[str, object]]:
    """One row per kernel and distinct launch."""
    rows: list[dict[str, object]] = []
    for shape, count in sorted(study_launches().items(), key=lambda item: _order(item[0])):
        rows.append(_row("forward", shape, count, forward_traffic(shape, forward_plan(shape, H100), H100)))
        rows.append(_row("grad", shape, count, grad_traffic(shape, grad_plan(shape, H100), H100)))
    return rows


def _order(shape: StitchShape) -> tuple[int, ...]:
    return shape.channels, shape.receiver_channels, shape.stitches


def _row(kernel: str, shape: StitchShape, count: int, traffic: Traffic) -> dict[str, object]:
    return {
        "kernel": kernel,
        "channels": shape.channels,
        "receiver_channels": shape.receiver_channels,
        "down": shape.down,
        "up": shape.up,
        "stitches": shape.stitches,
        "launches_per_step": count,
        "designed_bytes": traffic.designed_bytes,
        "minimum_bytes": traffic.minimum_bytes,
        "ratio": traffic.ratio,
        "flops": traffic.flops,
        "floor_us": traffic.floor_seconds * 1e6,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    options = parser.parse_args(arguments)
    rows = study_rows()
    print("kernel    C    D  down up  K   MB moved  ratio  GFLOP  FLOP/B  floor us")
    for row in rows:
        moved = int(str(row["designed_bytes"]))
        flops = int(str(row["flops"]))
        print(
            f"{row['kernel']:<7} {row['channels']:>3}  {row['receiver_channels']:>3}  {row['down']:>4} {row['up']:>2}"
            f"  {row['stitches']}  {moved / 1e6:>9.1f}  {row['ratio']:.3f}  {flops / 1e9:>5.1f}  {flops / moved:>6.1f}"
            f"  {row['floor_us']:>8.1f}"
        )
    largest = max(float(str(row["ratio"])) for row in rows)
    print(f"largest ratio of designed to unavoidable bytes: {largest:.3f}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
