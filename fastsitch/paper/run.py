"""Carry out a study, stage by stage; every stage finds what an earlier attempt has done."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastsitch import api
from fastsitch.analysis.compare import compare_run
from fastsitch.cluster.cluster import Cluster, connected
from fastsitch.data import load_dataset
from fastsitch.errors import RunError
from fastsitch.files import output_folder
from fastsitch.paper.estimate import PaperEstimate, estimate_study, runs_live
from fastsitch.paper.results import StudyRuns, draw_all_figures, write_all_tables
from fastsitch.paper.study import PaperConfig, paper_config
from fastsitch.report.comparison import comparison_text
from fastsitch.report.output import write_text
from fastsitch.root import Root
from fastsitch.sweep.config import SweepConfig
from fastsitch.sweep.export import export_run
from fastsitch.sweep.results import Run
from fastsitch.sweep.run import run_sweep

log = logging.getLogger(__name__)

Report = Callable[[str, str, float, float], None]
"""report(what, unit, done, total)."""


ABOVE_CHANCE = 0.1
"""An untrained network whose accuracy exceeds chance by more than this is reported."""


class Paper:
    """One study in one root, writing to one folder."""

    def __init__(
        self,
        config: PaperConfig,
        *,
        root: Root,
        out: Path,
        device: str = "auto",
        memory: str = "auto",
        cluster: Cluster | None = None,
        report: Report | None = None,
    ) -> None:
        self.config = config
        self.root = root
        self.out = output_folder(out)
        self.device = device
        self.memory = memory
        self.cluster = cluster
        self.tell: Report = report or (lambda what, unit, done, total: None)
        self.files: list[Path] = []
        """What was written."""

    def carry_out(self) -> None:
        """All chosen stages in order. Those that only read need the runs of the stages before them."""
        for stage in self.config.stages:
            log.info("stage %s", stage)
            getattr(self, f"_{stage}")()

    @property
    def _place(self) -> dict[str, Any]:
        scale = self.config.dimensions
        where = {"root": self.root.path, "data_dir": self.root.data_dir}
        return {"dataset": scale.dataset, "device": self.device, **where}

    def _train(self) -> None:
        scale = self.config.dimensions
        api.train(
            *self.config.chosen,
            *self.config.twins,
            width=scale.width,
            recipe=scale.training,
            ray=self.cluster,
            report=lambda name, step: self.tell(f"train {name}", "steps", step.step, step.steps),
            **self._place,
        )

    def _precompute(self) -> None:
        if runs_live(self.root, self.config, self.device, self.memory):
            log.info("nothing is stored: the sweeps will run their senders live")
            return
        api.precompute(
            *self.config.chosen,
            *self.config.controls(),
            ray=self.cluster,
            report=lambda name, done, total: self.tell(f"precompute {name}", "images", done, total),
            **self._place,
        )

    def _sweep(self) -> None:
        runs = [self._run(config, "sweep") for config in (*self.config.sweeps(), *self.config.baselines())]
        for run in runs:
            self.files += export_run(run, self.out / "matrices")
        self._check_controls(runs)

    def _matched(self) -> None:
        for vanilla in self.config.sweeps():
            run = self._run(self.config.matched(vanilla), "matched")
            self.files += export_run(run, self.out / "matrices-matched")

    def _run(self, config: SweepConfig, what: str) -> Run:
        return run_sweep(
            self.root,
            config,
            run=self.config.run_name(config),
            device=self.device,
            memory=self.memory,
            report=lambda step: self.tell(what, "cells", step.cells, step.total),
            cluster=self.cluster,
        )

    def _check_controls(self, runs: list[Run]) -> None:
        """Networks with their accuracies; untrained ones that know more than chance are named."""
        networks = {name: network for run in runs for name, network in run.networks.items()}
        chance = 1 / load_dataset(self.config.dimensions.dataset, self.root.data_dir).classes
        lines = ["network,trained,width,accuracy,chance"]
        for name, network in networks.items():
            trained = "no" if name.random else "yes"
            lines.append(f"{name},{trained},{network.width},{network.accuracy:.4f},{chance:.4f}")
            if name.random and network.accuracy > chance + ABOVE_CHANCE:
                log.warning("control %s has accuracy %.3f, far above chance (%.3f)", name, network.accuracy, chance)
        self.files.append(write_text(self.out / "networks.csv", "\n".join(lines) + "\n"))

    def _tables(self) -> None:
        runs = self._finished()
        for run in runs.vanilla:
            api.measure_errors(
                run,
                root=self.root.path,
                data_dir=self.root.data_dir,
                device=self.device,
                report=lambda step: self.tell("errors", "units", step.units, step.total),
            )
        self.files += write_all_tables(runs, self.out)

    def _figures(self) -> None:
        self.files += draw_all_figures(self._finished(), self.out / "figures")

    def _images(self) -> None:
        """Of the first network's positions in its own input and in that of the last one; trained networks."""
        run = self._finished().vanilla[0]
        config = run.config
        self.files += api.images(
            run.name,
            senders=config.senders[:1],
            receivers=list(dict.fromkeys((config.receivers[0], config.receivers[-1]))),
            settings=config.settings[:1],
            out=self.out / "images",
            memory=self.memory,
            report=lambda step: self.tell("images", "cells", step.cells, step.total),
            **self._place,
        )

    def _compare(self) -> None:
        runs = self._finished()
        texts = []
        for run in (*runs.vanilla, *runs.matched):
            try:
                texts.append(comparison_text(compare_run(run)))
            except RunError as error:
                # of some pairs nothing was published in digits
                log.info("%s", error)
                texts.append(str(error))
        self.files.append(write_text(self.out / "comparison.txt", "\n\n".join(texts) + "\n"))

    def _finished(self) -> StudyRuns:
        """The runs of the study; raises RunError where one is missing or unfinished."""
        config = self.config
        return StudyRuns(
            vanilla=[self._open(own, "sweep") for own in config.sweeps()],
            matched=[self._open(config.matched(own), "matched") for own in config.sweeps()],
            baselines=[self._open(own, "sweep") for own in config.baselines()],
        )

    def _open(self, config: SweepConfig, stage: str) -> Run:
        name = self.config.run_name(config)
        path = self.root.run(config.dataset, name)
        if (path / "run.json").is_file():
            run = Run.open(path)
            if all(run.done(planned.unit) for planned in run.units):
                return run
        raise RunError(f"run {name!r} is not finished: let stage {stage} end first, as in --stages {stage}")


def paper(
    *,
    out: api.PathLike,
    root: api.PathLike | None = None,
    data_dir: api.PathLike | None = None,
    device: str = "auto",
    memory: str = "auto",
    ray: str | Cluster | None = None,
    report: Report | None = None,
    **options: Any,
) -> list[Path]:
    """Reproduce the published study and write everything to ``out``; return the files written.

    ``options``: study, scale, networks, stages, settings, seeds, recipe, epochs, solver, receiver_bn; see
    :func:`fastsitch.paper.study.paper_config`. What an earlier call has finished is used again. ``ray``, as in
    :func:`fastsitch.sweep`: networks, stores and stitches are made there, all else here. Raises ConfigError, DataError,
    NetworkError, StoreError or RunError.
    """
    config = paper_config(**options)
    place = Root.at(root, data_dir)
    with connected(ray, place.path) as cluster:
        options = {"device": device, "memory": memory, "cluster": cluster, "report": report}
        study = Paper(config, root=place, out=Path(out), **options)
        study.carry_out()
    return study.files


def estimate_paper(
    *,
    root: api.PathLike | None = None,
    data_dir: api.PathLike | None = None,
    device: str = "auto",
    memory: str = "auto",
    **options: Any,
) -> PaperEstimate:
    """What :func:`paper` with the same options would take; needs neither data nor networks."""
    return estimate_study(Root.at(root, data_dir), paper_config(**options), device, memory)
