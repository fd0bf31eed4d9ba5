"""All peers and the engine on the same cells, timed in turn."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fastsitch.benchmark.agreement import ENGINE, PEERS, Agreement, Trainer
from fastsitch.benchmark.bench_pair import BenchPair
from fastsitch.benchmark.short_training import short_training
from fastsitch.benchmark.timed_engine import Engine
from fastsitch.benchmark.timing_rounds import Spread, alternate, ratios
from fastsitch.progress import Report, ignore
from fastsitch.timing import seconds

SWEEP = "fastsitch, evaluation included"

_ROUND_SECONDS, _MOST_STEPS, _SWEEP_STEPS = 0.8, 4, 8


@dataclass(frozen=True)
class PeerMeasure:
    """One way to train all cells of the pair. Seconds are of one step of all cells."""

    name: str
    steps: int
    """Steps per round: fewer for slow ways."""
    seconds: Spread
    rate: Spread
    """Images x cells per second."""
    times_ours: Spread
    """Seconds over those of the engine, round by round."""
    agreement: Agreement | None


def time_peers(
    pair: BenchPair,
    agreements: Mapping[str, Agreement],
    repeats: int,
    report: Report = ignore,
) -> list[PeerMeasure]:
    """Time the engine, a whole training with evaluation, and every peer in ``agreements``; the engine comes first."""
    cells = pair.cells
    trainers: dict[str, Trainer] = {ENGINE: Engine(pair, cells)}
    trainers |= {name: PEERS[name](pair, cells) for name in agreements}
    works: dict[str, Callable[[], object]] = {}
    steps: dict[str, float] = {}
    for name, trainer in trainers.items():
        trainer.run(pair.batches(1))
        first = seconds(lambda trainer=trainer: trainer.run(pair.batches(1)), pair.device)  # type: ignore[misc]
        count = max(1, min(_MOST_STEPS, round(_ROUND_SECONDS / first)))
        batches = pair.batches(count)
        works[name] = lambda trainer=trainer, batches=batches: trainer.run(batches)  # type: ignore[misc]
        steps[name] = count
    steps[SWEEP] = min(_SWEEP_STEPS, len(pair.source.train) // pair.batch_size)
    works[SWEEP] = short_training(pair, cells, int(steps[SWEEP]))
    times = alternate(works, repeats, pair.device, report)
    samples = len(cells) * pair.batch_size
    per_step = {name: [time / steps[name] for time in rounds] for name, rounds in times.items()}
    return [
        PeerMeasure(
            name=name,
            steps=int(steps[name]),
            seconds=Spread.of(per_step[name]),
            rate=Spread.of([samples / time for time in per_step[name]]),
            times_ours=ratios(per_step[name], per_step[ENGINE]),
            agreement=agreements.get(name),
        )
        for name in (ENGINE, SWEEP, *agreements)
    ]
