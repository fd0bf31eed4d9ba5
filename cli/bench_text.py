"""A benchmark as tables for the terminal."""

from fastsitch.benchmark.agreement import ACCURACY_STEPS, EXACT_STEPS
from fastsitch.benchmark.bench_config import BenchConfig
from fastsitch.benchmark.flops import STUDY_SETTINGS, STUDY_WIDTH
from fastsitch.benchmark.run_bench import BenchResult
from fastsitch.benchmark.study_projection import H100_RATE, Projection
from fastsitch.benchmark.timing_rounds import Spread
from fastsitch.cli.text_formats import duration, table
from fastsitch.network_names import NetworkName


def sections(result: BenchResult) -> list[str]:
    """A benchmark as tables for the terminal."""
    sections = [_machine(result), _checks(result), _ceilings(result), _groups(result), _parts(result)]
    if result.peers:
        sections.append(_peers(result))
    if result.projection is not None:
        sections.append(_projection(result.projection))
    if result.tuning is not None:
        tuned = result.tuning
        what = f"width {tuned.width}" if tuned.receiver is None else f"receiver {tuned.receiver}"
        sections.append(
            f"sweeps of {what}, batch {tuned.batch_size}, {tuned.precision} will use groups of up to "
            f"{tuned.group_size} cells, compile {tuned.compile}"
            + (f", attention {tuned.attention}" if "attention fused" in tuned.rates else "")
            + f": {result.profile}"
        )
    return sections


def _machine(result: BenchResult) -> str:
    config = result.config
    return (
        f"{result.machine}, {result.device}, {result.threads} threads, torch {result.versions['torch']}, "
        f"{result.precision}, {result.kernel} kernel, compile {result.compile}\n"
        f"{config.sender} -> {config.receiver}, {result.unit} cells, {_networks(config)}, batch {config.batch_size}; "
        f"median of {config.repeats} (smallest to largest)\n{result.command}"
    )


def _networks(config: BenchConfig) -> str:
    small = [NetworkName.parse(name).built_in for name in (config.sender, config.receiver)]
    width = [f"width {config.width}"] if any(small) else []
    return ", ".join([*width, *([] if all(small) else [f"of {config.dataset}"])])


def _checks(result: BenchResult) -> str:
    if any(agreement.change_error is not None for agreement in result.agreements.values()):
        return _change_checks(result)
    rows = [
        [
            name,
            f"{agreement.exact_error:.1e}",
            str(agreement.cells),
            f"{agreement.our_accuracy:.4f}",
            f"{agreement.accuracy:.4f}",
            f"{agreement.largest_difference:.4f}",
        ]
        for name, agreement in result.agreements.items()
    ]
    head = [
        "checked against",
        f"error, {EXACT_STEPS} steps in fp64",
        "cells",
        f"accuracy, {ACCURACY_STEPS} steps",
        "theirs",
        "largest difference",
    ]
    return table(head, rows)


def _change_checks(result: BenchResult) -> str:
    rows = [
        [name, str(agreement.cells), f"{agreement.exact_error:.1e}", f"{agreement.change_error:.1e}"]
        for name, agreement in result.agreements.items()
    ]
    precision = f"error, {EXACT_STEPS} steps in {result.precision}"
    return table(["checked against", "cells", f"error, {EXACT_STEPS} steps in fp64", precision], rows)


def _ceilings(result: BenchResult) -> str:
    blocks = [
        [
            block.name,
            str(block.samples),
            f"{block.flops / 1e9:.1f}",
            _spread(block.forward, 1e9),
            _spread(block.gradient, 1e9),
        ]
        for block in result.ceiling.blocks
    ]
    products = table(["products of", "samples", "GFLOP", "forward, GFLOP/s", "gradient, GFLOP/s"], blocks)
    speeds = [[name, _spread(speed, 1e9)] for name, speed in result.bandwidths.items()]
    whole = f"all of them, forward and gradient: {_spread(result.ceiling.rate, 1e9)} GFLOP/s"
    return "\n".join([products, whole, "", table(["bytes", "GB/s"], speeds)])


def _groups(result: BenchResult) -> str:
    rows = [
        [
            str(group.group_size),
            str(group.cells),
            _spread(group.seconds, 1e-3),
            f"{group.rate.median:.0f}",
            f"{group.cost.median * 1e6:.1f}",
            f"{group.flops_rate.median / 1e9:.1f}",
            f"{100 * group.fraction.median:.1f} %",
            _spread(group.over_bare),
            f"{group.predicted_memory / 1e6:.0f}",
            "-" if group.memory is None else f"{group.memory / 1e6:.0f}",
        ]
        for group in result.groups
    ]
    head = [
        "group size",
        "cells",
        "step, ms",
        "images x cells/s",
        "us per image and cell",
        "GFLOP/s",
        "of the ceiling",
        "step over bare products",
        "memory predicted, MB",
        "measured",
    ]
    return table(head, rows)


def _parts(result: BenchResult) -> str:
    names = list(result.groups[0].parts)
    rows = []
    for group in result.groups:
        total = sum(part.median for part in group.parts.values())
        shares = [f"{1e3 * part.median:.1f} ({100 * part.median / total:.0f} %)" for part in group.parts.values()]
        rows.append([str(group.group_size), *shares])
    return table(["group size: ms", *names], rows)


def _peers(result: BenchResult) -> str:
    rows = [
        [peer.name, str(peer.steps), _spread(peer.seconds, 1e-3), f"{peer.rate.median:.0f}", _spread(peer.times_ours)]
        for peer in result.peers
    ]
    return table(["all cells", "steps", "step, ms", "images x cells/s", "times ours"], rows)


def _projection(projection: Projection) -> str:
    head = ["the study: 256 pairs, 50,000 images, 4 epochs", "T2T", f"{STUDY_SETTINGS} settings"]
    rate = f"{100 * projection.fraction:.0f} % of {projection.ceiling.rate.median / 1e9:.0f} GFLOP/s"
    here = f"here: {rate} at width {STUDY_WIDTH}"
    modelled = f"predicted, not measured: an H100 at {H100_RATE / 1e12:.0f} TFLOP/s"
    return table(
        head,
        [
            [here, duration(projection.seconds), duration(projection.seconds_all_settings)],
            [modelled, duration(projection.h100_seconds), duration(projection.h100_seconds_all_settings)],
        ],
    )


def _spread(value: Spread, unit: float = 1.0) -> str:
    """Median (smallest to largest), with three digits."""
    numbers = [number / unit for number in (value.median, value.min, value.max)]
    digits = 0 if numbers[0] >= 100 else 1 if numbers[0] >= 10 else 2
    median, low, high = (f"{number:.{digits}f}" for number in numbers)
    return f"{median} ({low} to {high})"
