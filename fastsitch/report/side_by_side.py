"""Figures with several matrices: a pair with its controls, both directions, vanilla beside matched."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastsitch.errors import ConfigError, argument
from fastsitch.files import output_folder
from fastsitch.report.heatmap import figure_name, pair_panel, panels_figure, seeds_note
from fastsitch.report.metric_styles import style_of
from fastsitch.report.write_figures import save_figure
from fastsitch.runs.output_source import source_of
from fastsitch.runs.run import Run
from fastsitch.vocabulary import Metric

PathLike = str | os.PathLike[str]
Pairs = Sequence[tuple[str, str]]


def plot_controls(run: Run, out: PathLike, *, pairs: Pairs | None = None, metric: Metric = "accuracy") -> list[Path]:
    """Figure 2: for each pair all settings of the run side by side, the trained networks beside their controls.

    ``pairs`` (sender, receiver): all of the run by default. Files ``SENDER--RECEIVER.controls.png`` and
    ``.pdf``; returns the PNG paths. Raises RunError for a pair that the run does not have.
    """
    style = style_of(run, metric)
    folder = output_folder(out)
    source = source_of("matrices side by side", run)
    paths = []
    for sender, receiver in pairs or _all_pairs(run):
        units = [(sender, receiver, setting) for setting in run.config.settings]
        figure = panels_figure(
            [[pair_panel(run, *unit, metric) for unit in units]], style, title=seeds_note(run, units, metric)
        )
        paths.append(save_figure(figure, folder / figure_name(f"{sender}--{receiver}.controls", metric), source))
    return paths


def plot_directions(
    run: Run, out: PathLike, *, pairs: Pairs | None = None, metric: Metric = "accuracy", reverse: Run | None = None
) -> list[Path]:
    """Figure 4: for each pair that is stitched in both directions one above the other, settings side by side.

    ``reverse`` is the run with the second direction, where it is not the same run. ``pairs``: by default all two
    different networks that are stitched in both directions. Files ``FIRST--SECOND.directions.png`` and ``.pdf``;
    returns the PNG paths. Raises ConfigError when there is no such pair, RunError for one that the run does not have.
    """
    style = style_of(run, metric)
    folder = output_folder(out)
    forward = _all_pairs(run)
    backward = _all_pairs(reverse) if reverse is not None else []
    chosen = pairs or [
        (a, b)
        for index, (a, b) in enumerate(forward)
        if a != b and (b, a) in (forward[index + 1 :] if reverse is None else backward)
    ]
    if not chosen:
        raise ConfigError(
            f"run {run.name!r} has no two networks stitched in both directions: it stitches "
            f"{', '.join(run.config.senders)} to {', '.join(run.config.receivers)}"
        )
    source = source_of("both directions", run, *([] if reverse is None else [reverse]))
    paths = []
    for first, second in chosen:
        directions = ((run, first, second), (run if reverse is None else reverse, second, first))
        figure = panels_figure(
            [[pair_panel(one, a, b, setting, metric) for setting in run.config.settings] for one, a, b in directions],
            style,
            title=seeds_note(run, [(first, second, setting) for setting in run.config.settings], metric),
        )
        paths.append(save_figure(figure, folder / figure_name(f"{first}--{second}.directions", metric), source))
    return paths


def plot_matched(
    vanilla: Run, matched: Run, out: PathLike, *, pairs: Pairs | None = None, metric: Metric = "accuracy"
) -> list[Path]:
    """Figure 5: vanilla stitches of one run beside the matched stitches of another, for each pair and setting of both.

    Files ``SENDER--RECEIVER.SETTING.matched.png`` and ``.pdf``; returns the PNG paths. Raises ConfigError unless the
    first run is trained on the task, the second is matched, and both have a common pair and setting of the same
    networks.
    """
    for run, loss in ((vanilla, "task"), (matched, "match")):
        if run.config.loss != loss:
            raise ConfigError(
                f"run {run.name!r} has loss {run.config.loss}: expected one with {argument('loss', loss)}"
            )
    style = style_of(vanilla, metric)
    style_of(matched, metric)
    folder = output_folder(out)
    matched_pairs = set(matched.pairs())
    units = [unit for unit in vanilla.pairs() if unit in matched_pairs and (pairs is None or unit[:2] in pairs)]
    if not units:
        raise ConfigError(f"runs {vanilla.name!r} and {matched.name!r} have no pair and setting in common")
    paths = []
    for sender, receiver, setting in units:
        if vanilla.pair_networks(sender, receiver, setting) != matched.pair_networks(sender, receiver, setting):
            raise ConfigError(f"{sender}, {receiver}: trained again between runs {vanilla.name!r} and {matched.name!r}")
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
        paths.append(save_figure(figure, path, source_of("matched stitches", vanilla, matched)))
    return paths


def plot_baseline(run: Run, twin: Run, out: PathLike, *, metric: Metric = "accuracy") -> list[Path]:
    """The classical baseline: a network stitched to itself, beside the same network stitched to its twin, T2T.

    ``run`` has the self-pair, ``twin`` is the run of the network and its twin (the same architecture, another seed).
    Files ``SENDER--RECEIVER.baseline.png`` and ``.pdf``; returns the PNG path. Raises RunError where ``run`` does not
    have the self-pair.
    """
    style = style_of(run, metric)
    sender, receiver, setting = next(iter(twin.pairs()))
    units = [(run, (sender, sender, setting)), (twin, (sender, receiver, setting))]
    figure = panels_figure(
        [[pair_panel(one, *unit, metric) for one, unit in units]],
        style,
        title=seeds_note(run, [units[0][1]], metric),
    )
    path = output_folder(out) / figure_name(f"{sender}--{receiver}.baseline", metric)
    return [save_figure(figure, path, source_of("a network and its twin", run, twin))]


def _all_pairs(run: Run) -> list[tuple[str, str]]:
    return list(dict.fromkeys((sender, receiver) for sender, receiver, _ in run.pairs()))
