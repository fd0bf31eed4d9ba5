"""Run a study, stage by stage; every stage keeps what an earlier attempt has finished."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from fastsitch import api_networks, api_runs
from fastsitch.analysis.compare_published import compare_run
from fastsitch.api_networks import PathLike
from fastsitch.cluster.cluster import Cluster, connected
from fastsitch.data import load_dataset
from fastsitch.errors import RunError, argument
from fastsitch.execution.run_sweep import run_sweep
from fastsitch.files import output_folder
from fastsitch.progress import Report, ignore
from fastsitch.report.comparison import comparison_text
from fastsitch.report.write_figures import write_text
from fastsitch.root import Root
from fastsitch.runs.export import export_run
from fastsitch.runs.run import Run
from fastsitch.runs.sweep_config import SweepConfig
from fastsitch.study.study_config import StudyConfig, StudyOptions, make_study_config
from fastsitch.study.study_estimate import StudyEstimate, estimate_study, runs_live
from fastsitch.study.study_outputs import StudyRuns, draw_all_figures, write_all_tables

log = logging.getLogger(__name__)

ABOVE_CHANCE = 0.1
"""An untrained network whose accuracy exceeds chance by more than this gets a warning."""


class Study:
    """A study whose networks, stores and runs are in one root, and whose results go to one folder."""

    def __init__(
        self,
        config: StudyConfig,
        *,
        root: Root,
        out: Path,
        device: str = "auto",
        memory: str = "auto",
        cluster: Cluster | None = None,
        report: Report = ignore,
    ) -> None:
        self.config = config
        self.root = root
        self.out = output_folder(out)
        self.device = device
        self.memory = memory
        self.cluster = cluster
        self.report = report
        self.files: list[Path] = []
        """The files written so far."""

    def run(self) -> None:
        """Run the chosen stages in order. Those that only read results need the runs of earlier stages."""
        for stage in self.config.stages:
            log.info("stage %s", stage)
            getattr(self, f"_{stage}")()

    @property
    def _data_and_device(self) -> dict[str, Any]:
        folders = {"root": self.root.path, "data_dir": self.root.data_dir}
        return {"dataset": self.config.dimensions.dataset, "device": self.device, **folders}

    def _train(self) -> None:
        scale = self.config.dimensions
        api_networks.train(
            *self.config.chosen,
            *self.config.twins,
            width=scale.width,
            recipe=scale.training,
            ray=self.cluster,
            report=self.report,
            **self._data_and_device,
        )

    def _precompute(self) -> None:
        if runs_live(self.root, self.config, self.device, self.memory):
            log.info("no representations are stored: the sweeps will run their senders live")
            return
        api_networks.precompute(
            *self.config.chosen,
            *self.config.controls(),
            ray=self.cluster,
            report=self.report,
            **self._data_and_device,
        )

    def _sweep(self) -> None:
        runs = [self._sweep_run(config, "sweep") for config in (*self.config.sweeps(), *self.config.baselines())]
        for run in runs:
            self.files += export_run(run, self.out / "matrices")
        self._check_controls(runs)

    def _matched(self) -> None:
        for vanilla in self.config.sweeps():
            run = self._sweep_run(self.config.matched(vanilla), "matched")
            self.files += export_run(run, self.out / "matrices-matched")

    def _sweep_run(self, config: SweepConfig, stage: str) -> Run:
        return run_sweep(
            self.root,
            config,
            run=self.config.run_name(config),
            device=self.device,
            memory=self.memory,
            report=lambda progress: self.report(replace(progress, task=stage)),
            cluster=self.cluster,
        )

    def _check_controls(self, runs: list[Run]) -> None:
        """Write the accuracies of all networks; warn of untrained ones that are far above chance."""
        networks = {name: network for run in runs for name, network in run.networks.items()}
        chance = 1 / load_dataset(self.config.dimensions.dataset, self.root.data_dir).classes
        lines = ["network,trained,width,accuracy,chance"]
        for name, network in networks.items():
            trained = "no" if name.random else "yes"
            lines.append(f"{name},{trained},{network.width},{network.accuracy:.4f},{chance:.4f}")
            if name.random and network.accuracy > chance + ABOVE_CHANCE:
                log.warning(
                    "the untrained control %s has accuracy %.3f, far above chance (%.3f)",
                    name,
                    network.accuracy,
                    chance,
                )
        self.files.append(write_text(self.out / "networks.csv", "\n".join(lines) + "\n"))

    def _tables(self) -> None:
        runs = self._finished()
        for run in runs.vanilla:
            api_runs.measure_errors(
                run,
                root=self.root.path,
                data_dir=self.root.data_dir,
                device=self.device,
                report=self.report,
            )
        self.files += write_all_tables(runs, self.out)

    def _figures(self) -> None:
        self.files += draw_all_figures(self._finished(), self.out / "figures")

    def _images(self) -> None:
        """The first sender's positions stitched into the inputs of the first and the last receiver."""
        run = self._finished().vanilla[0]
        config = run.config
        self.files += api_runs.images(
            run.name,
            senders=config.senders[:1],
            receivers=list(dict.fromkeys((config.receivers[0], config.receivers[-1]))),
            settings=config.settings[:1],
            out=self.out / "images",
            memory=self.memory,
            report=self.report,
            **self._data_and_device,
        )

    def _compare(self) -> None:
        runs = self._finished()
        texts = []
        for run in (*runs.vanilla, *runs.matched):
            try:
                texts.append(comparison_text(compare_run(run)))
            except RunError as error:
                # for some pairs the paper has figures but no numbers
                log.info("%s", error)
                texts.append(str(error))
        self.files.append(write_text(self.out / "comparison.txt", "\n\n".join(texts) + "\n"))

    def _finished(self) -> StudyRuns:
        """The runs of the study; raises RunError where one is missing or unfinished."""
        config = self.config
        return StudyRuns(
            vanilla=[self._open(sweep, "sweep") for sweep in config.sweeps()],
            matched=[self._open(config.matched(sweep), "matched") for sweep in config.sweeps()],
            baselines=[self._open(sweep, "sweep") for sweep in config.baselines()],
        )

    def _open(self, config: SweepConfig, stage: str) -> Run:
        name = self.config.run_name(config)
        path = self.root.run(config.dataset, name)
        if (path / "run.json").is_file():
            run = Run.open(path)
            if all(run.done(unit) for unit in run.units):
                return run
        raise RunError(f"run {name!r} is not finished: finish stage {stage} first, with {argument('stages', stage)}")


def paper(
    *,
    out: PathLike,
    root: PathLike | None = None,
    data_dir: PathLike | None = None,
    device: str = "auto",
    memory: str = "auto",
    ray: str | Cluster | None = None,
    report: Report = ignore,
    **options: Unpack[StudyOptions],
) -> list[Path]:
    """Reproduce the published study and write everything to a folder; what an earlier call has finished is kept.

    Args:
        out: folder for matrices, tables, figures and the comparison.
        root: folder of networks, stores and runs; None: FASTSITCH_ROOT, then ``./fastsitch-data``.
        data_dir: folder with the files of data sets; None: ``data`` in the root.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        memory: what the study may take on the device: ``auto``, or a size such as ``8GB``.
        ray: as in :func:`fastsitch.sweep`: networks, stores and stitches are made on the cluster, all else here.
        report: gets the progress of every stage.
        options: study, scale, networks, stages, settings, seeds, recipe, epochs, solver, receiver_bn; see
            :class:`fastsitch.study.study_config.StudyOptions`.

    Returns:
        The files written.

    Raises:
        ConfigError: an option that cannot work.
        DataError: the data set is missing or malformed.
        NetworkError: a network was trained otherwise.
        StoreError: a store is stale or damaged.
        RunError: a run is missing that a stage needs, or has another configuration.
    """
    config = make_study_config(**options)
    folders = Root.at(root, data_dir)
    folder = output_folder(out)
    with connected(ray, folders.path) as cluster:
        study = Study(config, root=folders, out=folder, device=device, memory=memory, cluster=cluster, report=report)
        study.run()
    return study.files


def estimate_paper(
    *,
    root: PathLike | None = None,
    data_dir: PathLike | None = None,
    device: str = "auto",
    memory: str = "auto",
    **options: Unpack[StudyOptions],
) -> StudyEstimate:
    """Predict what :func:`paper` with the same options would take; needs neither data nor networks.

    Args:
        root: as in :func:`paper`, like all the other arguments.

    Returns:
        Units, cells, and predicted memory, disk and time of every stage.

    Raises:
        ConfigError: an option that cannot work.
    """
    return estimate_study(Root.at(root, data_dir), make_study_config(**options), device, memory)
