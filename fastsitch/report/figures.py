"""Figures that set matrices side by side: a pair with its controls, both directions, vanilla beside matched."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastsitch.errors import ConfigError
from fastsitch.files import output_folder
from fastsitch.report.heatmap import figure_name, pair_panel, panels_figure, seeds_note
from fastsitch.report.metrics import style_of
from fastsitch.report.output import save_figure
from fastsitch.sweep.results import Run

PathLike = str | os.PathLike[str]
Pairs = Sequence[tuple[str, str]]


def plot_controls(run: Run, out: PathLike, *, pairs: Pairs | None = None, metric: str = "accuracy") -> list[Path]:
    """Figure 2: for each pair all settings of the run side by side, the pair beside its controls.

    ``pairs`` (sender, receiver) are all of the run's unless named. Files ``SENDER--RECEIVER.controls.png`` and
    ``.pdf``; returns the PNG paths. Raises RunError for a pair that the run has not.
    """
    style = style_of(run, metric)
    folder = output_folder(out)
    paths = []
    for sender, receiver in pairs or _all_pairs(run):
        units = [(sender, receiver, setting) for setting in run.config.settings]
        figure = panels_figure(
            [[pair_panel(run, *unit, metric) for unit in units]], style, title=seeds_note(run, units, metric)
        )
        paths.append(save_figure(figure, folder / figure_name(f"{sender}--{receiver}.controls", metric)))
    return paths


def plot_directions(
    run: Run, out: PathLike, *, pairs: Pairs | None = None, metric: str = "accuracy", back: Run | None = None
) -> list[Path]:
    """Figure 4: for each pair that the run has both ways, both directions above each other, settings side by side.

    ``back`` is the run with the second direction, where that is another. ``pairs`` are, unless named, all two
    different networks that are joined both ways. Files
    ``FIRST--SECOND.directions.png`` and ``.pdf``; returns the PNG paths. Raises ConfigError when there is no such pair,
    RunError for one that the run has not.
    """
    style = style_of(run, metric)
    folder = output_folder(out)
    known = _all_pairs(run)
    returning = _all_pairs(back) if back is not None else []
    chosen = pairs or [
        (a, b)
        for place, (a, b) in enumerate(known)
        if a != b and (b, a) in (known[place + 1 :] if back is None else returning)
    ]
    if not chosen:
        raise ConfigError(
            f"run {run.name!r} has no two networks stitched both ways: it joins {', '.join(run.config.senders)} to "
            f"{', '.join(run.config.receivers)}"
        )
    paths = []
    for first, second in chosen:
        ways = ((run, first, second), (run if back is None else back, second, first))
        figure = panels_figure(
            [[pair_panel(own, a, b, setting, metric) for setting in run.config.settings] for own, a, b in ways],
            style,
            title=seeds_note(run, [(first, second, setting) for setting in run.config.settings], metric),
        )
        paths.append(save_figure(figure, folder / figure_name(f"{first}--{second}.directions", metric)))
    return paths


def plot_matched(
    vanilla: Run, matched: Run, out: PathLike, *, pairs: Pairs | None = None, metric: str = "accuracy"
) -> list[Path]:
    """Figure 5: vanilla stitches of one run beside the matched stitches of another, for each pair and setting of both.

    Files ``SENDER--RECEIVER.SETTING.matched.png`` and ``.pdf``; returns the PNG paths. Raises ConfigError unless the
    first run is trained on the task, the second matched, both of the same networks and with a common pair and setting.
    """
    for run, loss in ((vanilla, "task"), (matched, "match")):
        if run.config.loss != loss:
            raise ConfigError(f"run {run.name!r} has loss {run.config.loss}: expected one with --loss {loss}")
    style = style_of(vanilla, metric)
    style_of(matched, metric)
    folder = output_folder(out)
    there = set(matched.pairs())
    units = [unit for unit in vanilla.pairs() if unit in there and (pairs is None or unit[:2] in pairs)]
    if not units:
        raise ConfigError(f"runs {vanilla.name!r} and {matched.name!r} have no pair and setting in common")
    paths = []
    for sender, receiver, setting in units:
        if vanilla.pair_networks(sender, receiver, setting) != matched.pair_networks(sender, receiver, setting):
            raise ConfigError(f"{sender}, {receiver}: trained again between {vanilla.name!r} and {matched.name!r}")
        panels = [pair_panel(run, sender, receiver, setting, metric) for run in (vanilla, matched)]
        titles = [
            ", ".join(filter(None, (kind, seeds_note(run, [(sender, receiver, setting)], metric))))
            for kind, run in (("vanilla", vanilla), ("matched (similarity-trained)", matched))
        ]
        figure = panels_figure(
            [[replace(panel, title=title) for panel, title in zip(panels, titles, strict=True)]],
            style,
            title=panels[0].title,
        )
        path = folder / figure_name(f"{sender}--{receiver}.{setting}.matched", metric)
        paths.append(save_figure(figure, path))
    return paths


def plot_baseline(run: Run, twin: Run, out: PathLike, *, metric: str = "accuracy") -> list[Path]:
    """The classical baseline: a network into itself, beside the same network into one of another seed, T2T.

    ``run`` has the self-pair, ``twin`` the pair of one sender and one receiver. Files ``SENDER--RECEIVER.baseline.png``
    and ``.pdf``; returns the PNG path. Raises RunError where a run has not its pair.
    """
    style = style_of(run, metric)
    sender, receiver, setting = next(iter(twin.pairs()))
    units = [(run, (sender, sender, setting)), (twin, (sender, receiver, setting))]
    figure = panels_figure(
        [[pair_panel(own, *unit, metric) for own, unit in units]],
        style,
        title=seeds_note(run, [unit for _, unit in units[:1]], metric),
    )
    path = output_folder(out) / figure_name(f"{sender}--{receiver}.baseline", metric)
    return [save_figure(figure, path)]


def _all_pairs(run: Run) -> list[tuple[str, str]]:
    return list(dict.fromkeys((sender, receiver) for sender, receiver, _ in run.pairs()))
