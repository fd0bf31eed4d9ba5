"""Draw what `fastsitch bench --json FILE` measured: cost per cell against group size, total cost against cells.

.venv/bin/python bench/plots.py bench/results/FILE.json --out bench/results
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

ENGINE = "fastsitch"


def label(result: dict[str, Any]) -> str:
    """What was measured where, for the title."""
    config = result["config"]
    return (
        f"{config['sender']} → {config['receiver']}, width {config['width']}, batch {config['batch_size']}, "
        f"{result['precision']}\n{result['machine']}, {result['threads']} threads, median of {config['repeats']}"
    )


def cost_per_cell(axes: Axes, result: dict[str, Any]) -> None:
    """Microseconds per image and cell against the group size, with the bare convolutions as its lower bound."""
    groups = result["groups"]
    sizes = [group["group_size"] for group in groups]
    costs = [group["cost"]["median"] * 1e6 for group in groups]
    below = [(group["cost"]["median"] - group["cost"]["min"]) * 1e6 for group in groups]
    above = [(group["cost"]["max"] - group["cost"]["median"]) * 1e6 for group in groups]
    samples = [group["cells"] * result["config"]["batch_size"] for group in groups]
    bare = [group["bare_seconds"]["median"] / count * 1e6 for group, count in zip(groups, samples, strict=True)]
    axes.errorbar(sizes, costs, [below, above], marker="o", capsize=3, label="training step")
    axes.plot(
        sizes, bare, marker="s", linestyle="--", color="0.4", label="bare convolutions, each over the whole batch"
    )
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("cells per batch")
    axes.set_ylabel("µs per image and cell")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(label(result), fontsize=9)


def total_cost(axes: Axes, result: dict[str, Any]) -> None:
    """Seconds of a step against the number of cells: the engine as measured, peers in proportion to their cells."""
    groups = [group for group in result["groups"] if group["group_size"] >= result["unit"]] or result["groups"][-1:]
    most = max(group["cells"] for group in groups)
    axes.errorbar(
        [group["cells"] for group in groups],
        [group["seconds"]["median"] for group in groups],
        marker="o",
        color="C3",
        label=f"{ENGINE}, one batch",
        zorder=3,
    )
    peers = [peer for peer in result["peers"] if not peer["name"].startswith(ENGINE)]
    for number, peer in enumerate(peers):
        unit, seconds = result["unit"], peer["seconds"]["median"]
        color = f"C{number if number < 3 else number + 1}"
        axes.plot([unit], [seconds], marker="o", color=color)
        axes.plot([1, most], [seconds / unit, seconds / unit * most], linestyle="--", color=color, label=peer["name"])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("cells")
    axes.set_ylabel("seconds per step of all cells")
    axes.grid(alpha=0.3, which="both")
    axes.legend(title="dots are measured, dashes in proportion")
    axes.set_title(label(result), fontsize=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for path in options.results:
        result = json.loads(path.read_text())
        draws = {"cost-per-cell": cost_per_cell} | ({"total-cost": total_cost} if result["peers"] else {})
        for name, draw in draws.items():
            figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
            draw(axes, result)
            figure.savefig(options.out / f"{path.stem}.{name}.png", dpi=150)
            plt.close(figure)
            print(options.out / f"{path.stem}.{name}.png")


if __name__ == "__main__":
    main()
