"""Many machines: a Ray cluster gives the results of one machine, bit by bit, even if workers or drivers are killed."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.cluster_utils
import torch

import fastsitch
from fastsitch.activations.store import ActivationStore
from fastsitch.cli.options import with_addresses
from fastsitch.cluster import worker_pool
from fastsitch.cluster.affinity_queue import AffinityQueue
from fastsitch.cluster.cluster import Cluster
from fastsitch.cluster.worker import Started
from fastsitch.cluster.worker_pool import Work, WorkerPool, WorkerSlots
from fastsitch.data import Dataset
from fastsitch.errors import ConfigError, FailedError, StoreError
from fastsitch.execution.distribute_sweep import UnitTask
from fastsitch.machine import versions
from fastsitch.root import Root
from tests.conftest import Command, save_npz
from tests.processes import PATIENCE, RunningCommand
from tests.test_study import contents as study_contents
from tests.test_study import start_tiny_study

pytestmark = pytest.mark.cluster

SWEEP = ["--senders", "R1111,R1112", "--receivers", "R1111,R1112", "--recipe", "small", "--batch-size", "16"]
SWEEP += ["--epochs", "1", "--seeds", "0,1"]
OPTIONS = {"recipe": "small", "batch_size": 16, "epochs": 1, "seeds": [0, 1]}


@pytest.fixture(scope="module")
def root(fashion: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with R1111 and R1112 trained on 160 images, and runs made by this machine alone."""
    folder = tmp_path_factory.mktemp("ray")
    save_npz(folder / "small.npz", fashion.train, fashion.test, 160, 80)
    dataset = f"npz:{folder / 'small.npz'}"
    fastsitch.train("R1111", "R1112", dataset=dataset, width=4, epochs=2, root=folder)
    fastsitch.sweep("R1111,R1112", "R1111,R1112", root=folder, run="alone", **OPTIONS)
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two nodes with one processor each."""
    with short_folder() as folder:
        nodes = ray.cluster_utils.Cluster()
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("RAY_TMPDIR", str(folder))
            # beside other tests, workers that Ray makes nice would wait for minutes
            patched.setenv("RAY_worker_niceness", "0")
            for _ in range(2):
                nodes.add_node(num_cpus=1, num_gpus=0, include_dashboard=False)
        yield nodes.address
        nodes.shutdown()


@contextmanager
def short_folder() -> Iterator[Path]:
    """A folder for sockets, for which pytest's have too long a name."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def units(root: Path, run: str) -> dict[str, bytes]:
    folder = fastsitch.open_run(run, root=root).path / "units"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def sweeping(root: Path, run: str, *options: str, **variables: str) -> Iterator[RunningCommand]:
    """The sweep under way as a command; killed in the end if it is still there."""
    command = RunningCommand("sweep", *SWEEP, "--run", run, "--root", root, *options, **variables)
    try:
        yield command
    finally:
        command.kill()


def wait_for_units(command: RunningCommand, root: Path, run: str, count: int) -> None:
    """Wait until so many units are saved."""
    (folder,) = (root / "runs").iterdir()
    saved = folder / run / "units"
    assert command.wait_for(lambda: len(list(saved.glob("*.npz"))) >= count, pause=0.01), command.ended()


def processes(text: str) -> list[int]:
    """Processes whose command line contains a text."""
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if text in command_line(path.name)]


def workers(cluster: str) -> list[int]:
    """Processes of the workers of a cluster, found by its address in their command lines."""
    return [pid for pid in processes("ray::Worker.run") if cluster in command_line(parent(pid))]


def command_line(pid: str) -> str:
    return proc(pid, "cmdline").replace("\0", " ")


def parent(pid: int) -> str:
    return proc(str(pid), "stat").rpartition(")")[2].split()[1]


def proc(pid: str, name: str) -> str:
    """Empty when the process has ended in the meantime."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def test_a_sweep_survives_the_loss_of_a_worker(cluster: str, root: Path) -> None:
    with sweeping(root, "lost", "--ray", cluster) as driver:
        wait_for_units(driver, root, "lost", 2)
        first, _ = workers(cluster)
        os.kill(first, signal.SIGKILL)
        ended = driver.ended()
    assert ended.returncode == 0, ended.stderr
    assert "trying it again" in ended.stderr
    assert units(root, "lost") == units(root, "alone")
    # Ray itself says nothing
    assert "raylet" not in ended.stdout + ended.stderr
    assert not [line for line in ended.stderr.splitlines() if line.startswith("[20")]
    first_words = [line.split()[0] for line in ended.stdout.splitlines()[:-1]]
    assert first_words == ["run", "pair", *["R1111"] * 2, *["R1112"] * 2]


def test_local_and_distributed_runs_continue_each_other(root: Path, run_cli: Command) -> None:
    """Each killed without a chance to clean up; a cluster of its own goes down with its driver."""
    with short_folder() as folder:
        with sweeping(root, "first", "--ray", TMPDIR=str(folder)) as driver:
            wait_for_units(driver, root, "first", 1)
        (left,) = folder.iterdir()
        assert left.name.startswith("fastsitch-ray-")
        deadline = time.monotonic() + PATIENCE
        while processes(left.name):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        ended = run_cli("sweep", *SWEEP, "--run", "first", "--root", root)
        assert ended.returncode == 0, ended.stderr
        assert "of 8 units are done already" in ended.stderr
        assert units(root, "first") == units(root, "alone")

        with sweeping(root, "second") as alone:
            wait_for_units(alone, root, "second", 1)
        with sweeping(root, "second", "--ray", TMPDIR=str(folder)) as driver:
            ended = driver.ended()
        assert ended.returncode == 0, ended.stderr
        assert "of 8 units are done already" in ended.stderr
        assert units(root, "second") == units(root, "alone")
        # nothing is left, not even of the killed one
        assert list(folder.iterdir()) == []


def test_an_interrupted_driver_ends_its_cluster(root: Path) -> None:
    # so long that it does not end before the signal comes: 8 units
    line = ["--ray", "--epochs", "12"]
    with short_folder() as folder, sweeping(root, "interrupted", *line, TMPDIR=str(folder)) as driver:
        wait_for_units(driver, root, "interrupted", 1)
        driver.send_signal(signal.SIGINT)
        ended = driver.ended()
        assert ended.returncode == 1
        assert ended.stderr.splitlines()[-1] == (
            "fastsitch: interrupted; finished units are saved, run the same command to resume"
        )
        assert list(folder.iterdir()) == []
        assert not processes(f"{folder}/fastsitch-ray-")


@pytest.mark.parametrize("options", [{"init": "matched"}, {"loss": "match"}, {"loss": "match", "solver": "sgd"}])
def test_matched_runs_are_the_same_too(cluster: str, root: Path, options: dict[str, str]) -> None:
    name = "-".join(options.values())
    settings = {**OPTIONS, "seeds": [0], "root": root, **options}
    fastsitch.sweep("R1111", "R1112", run=f"{name}-alone", **settings)
    fastsitch.sweep("R1111", "R1112", run=name, ray=cluster, **settings)
    assert units(root, name) == units(root, f"{name}-alone")


def test_stores_are_the_same(cluster: str, fashion: Dataset, tmp_path: Path, run_cli: Command) -> None:
    save_npz(tmp_path / "small.npz", fashion.train, fashion.test, 160, 80)
    dataset = f"npz:{tmp_path / 'small.npz'}"
    fastsitch.train("R1111", "R1112", dataset=dataset, width=4, epochs=1, root=tmp_path)
    made = run_cli("precompute", "R1111", "R1112", "--root", tmp_path, "--ray", cluster)
    assert made.returncode == 0, made.stderr
    assert made.stderr.count(" is made: ") == 2
    stores = Path(Root.at(tmp_path).activations(dataset))
    there = {path: path.read_bytes() for path in stores.rglob("*") if path.is_file()}
    shutil.rmtree(stores)
    assert run_cli("precompute", "R1111", "R1112", "--root", tmp_path).returncode == 0
    assert {path: path.read_bytes() for path in stores.rglob("*") if path.is_file()} == there


def test_a_study_gives_the_same_results(cluster: str, small_npz: Path, tmp_path: Path) -> None:
    """Its networks, stores and stitches are made by workers, the rest by the driver."""
    stages = ["--stages", "train,precompute,sweep", "--settings", "T2T"]
    for folder, options in ((tmp_path / "alone", []), (tmp_path / "together", ["--ray", cluster])):
        folder.mkdir()
        ended = start_tiny_study(folder, *stages, *options).ended()
        assert ended.returncode == 0, ended.stderr
    assert "making the activation stores" not in ended.stderr
    assert study_contents(tmp_path / "together") == study_contents(tmp_path / "alone")


class Counting:
    """A task that also returns how often this worker read each chunk."""

    def __init__(self, *arguments: Any) -> None:
        self.opened: list[ActivationStore] = []
        whole = ActivationStore.open

        def open_store(path: Path) -> ActivationStore:
            self.opened.append(whole(path))
            return self.opened[-1]

        ActivationStore.open = open_store  # type: ignore[method-assign, assignment]
        self.task = UnitTask(*arguments)

    def __call__(self, unit: Any, report: Callable[[Any], None]) -> tuple[int, Counter[tuple[str, str, int]]]:
        self.task(unit, report)
        reads: Counter[tuple[str, str, int]] = Counter()
        for store in self.opened:
            reads.update({(store.path.name, *chunk): count for chunk, count in store.reads.items()})
        return os.getpid(), reads


def test_a_worker_reads_no_chunk_twice(cluster: str, root: Path) -> None:
    run = fastsitch.open_run("alone", root=root)
    assert run.resolved.source == "resident"
    read: dict[int, Counter[tuple[str, str, int]]] = {}
    with Cluster(cluster, root=root) as machines:
        slots = machines.worker_slots("auto")
        assert (slots.device, slots.threads, slots.total, slots.per_machine) == ("cpu", 1, 2, 1)
        make = partial(Counting, Root.at(root).absolute(), run.path, "cpu", run.units)
        for _, (worker, reads) in machines.run_jobs(make, run.units, slots, key=lambda unit: unit.sender_network):
            read[worker] = reads
    assert len(read) == 2
    for reads in read.values():
        assert set(reads.values()) == {1}
    senders = {worker: {store for store, *_ in reads} for worker, reads in read.items()}
    assert set.union(*senders.values()) == {"R1111", "R1112"}


def test_workers_have_a_gpu_each_where_there_are_any(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With what Ray reports for three machines, one of which has died."""
    threads = float(torch.get_num_threads())
    nodes = [
        {"Alive": True, "Resources": {"CPU": 2 * threads, "GPU": 2.0}},
        {"Alive": True, "Resources": {"CPU": threads}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
    ]
    monkeypatch.setattr(Cluster, "_connected", lambda self: SimpleNamespace(nodes=lambda: nodes))
    machines = Cluster("auto", root=tmp_path)
    for device, kind, total in (("auto", "cuda", 2), ("cuda", "cuda", 2), ("cpu", "cpu", 3)):
        assert machines.worker_slots(device) == WorkerSlots(
            device=kind, threads=int(threads), total=total, per_machine=2
        )


def refuse(job: str, report: Callable[[Any], None]) -> None:
    raise StoreError(f"{job} is stale")


def fail(folder: Path, job: str, report: Callable[[Any], None]) -> None:
    (folder / f"{os.getpid()}").touch()
    raise RuntimeError(f"no {job} today\nand more")


def test_refusals_are_raised_at_once_and_failures_after_three_attempts(
    cluster: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Cluster(cluster, root=tmp_path) as machines:
        slots = machines.worker_slots("cpu")
        with pytest.raises(StoreError, match="a is stale"):
            list(machines.run_jobs(lambda: refuse, ["a"], slots))
        assert not [record for record in caplog.records if record.levelno > logging.INFO]
        with pytest.raises(FailedError, match=r"job a failed 3 times on the Ray cluster, last on .*RuntimeError: no a"):
            list(machines.run_jobs(partial(partial, fail, tmp_path), ["a"], slots, name="job {}".format))
    assert len(list(tmp_path.iterdir())) == 3
    assert [record.getMessage().partition(" on ")[0] for record in caplog.records] == ["job a failed"] * 2
    assert all(record.getMessage().endswith("(no a today): trying it again") for record in caplog.records)


def test_jobs_of_one_key_stay_together() -> None:
    queue = AffinityQueue(["a1", "a2", "b1", "b2", "c1"], key=lambda job: job[0])
    assert [queue.take(0), queue.take(1), queue.take(0), queue.take(1)] == ["a1", "b1", "a2", "b2"]
    assert queue.take(0) == "c1"
    # worker 1 is lost: its job is for anyone who has not left its key, or still has it loaded
    queue.put_back(1, "b2")
    assert queue.take(0) == "b2"
    assert queue.take(0) is None
    queue = AffinityQueue(["a1", "a2", "a3", "b1"], key=lambda job: job[0])
    assert [queue.take(0), queue.take(0), queue.take(1), queue.take(1)] == ["a1", "a2", "b1", "a3"]
    assert [queue.take(0), queue.take(1)] == [None, None]
    queue.put_back(1, "a3")
    # worker 0 has left a
    assert queue.take(0) is None
    assert queue.take(2) == "a3"


def test_an_address_may_be_left_out() -> None:
    assert with_addresses([]) == []
    assert with_addresses(["sweep", "--ray"]) == ["sweep", "--ray=local"]
    assert with_addresses(["sweep", "--ray", "--run", "x"]) == ["sweep", "--ray=local", "--run", "x"]
    assert with_addresses(["sweep", "--ray", "host:1", "--run"]) == ["sweep", "--ray", "host:1", "--run"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda"], "--device cuda: no machine of the Ray cluster has a GPU; use --device cpu"),
        (["--device", "cuda:1"], "--device cuda:1: expected auto, cpu or cuda"),
        (["--batch-size", "1000"], "160 training images are fewer than one batch of 1000 images"),
        (["--memory", "1kB"], "--memory leaves"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_nothing_behind(
    options: list[str], message: str, cluster: str, root: Path, run_cli: Command
) -> None:
    refused = run_cli("sweep", *SWEEP, "--root", root, "--run", "refused", "--ray", cluster, *options)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (fastsitch.open_run("alone", root=root).path.parent / "refused").exists()
    # nor are those of drivers that were killed left in the root
    assert not list(root.glob(".fastsitch-*"))


def test_a_sweep_waits_for_a_busy_cluster_and_logs_it(
    cluster: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_pool, "_WAITING_NOTICE", 1.0)
    with Cluster(cluster, root=tmp_path) as machines:
        slots = machines.worker_slots("cpu")
        sleep = ray.remote(num_cpus=1)(lambda: time.sleep(6))
        others = [sleep.remote() for _ in range(2)]
        time.sleep(1)
        ((job, pid),) = machines.run_jobs(lambda: lambda job, report: os.getpid(), ["a"], slots)
        ray.get(others)
    assert (job, pid != os.getpid()) == ("a", True)
    (line,) = [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]
    assert line == "waiting for free CPUs or GPUs on the Ray cluster: other work is using them"


def test_workers_that_would_do_something_else_are_refused(tmp_path: Path) -> None:
    slots = WorkerSlots(device="cpu", threads=1, total=1, per_machine=1)
    work: Work[str] = Work(make_task=lambda: refuse, jobs=[], name=str, key=str, report=lambda job, value: None)
    pool = WorkerPool(None, slots, work, tmp_path / "marker")
    pool._require_compatible(Started("far", 1, versions(), sees_root=True))
    with pytest.raises(ConfigError, match=f"far does not see this machine's {tmp_path}: with ray"):
        pool._require_compatible(Started("far", 1, versions(), sees_root=False))
    with pytest.raises(ConfigError, match="far has torch 1.0: expected "):
        pool._require_compatible(Started("far", 1, {**versions(), "torch": "1.0+cpu"}, sees_root=True))


def test_ray_is_optional(root: Path) -> None:
    line = ["sweep", "--senders", "R1111", "--receivers", "R1111", "--root", str(root), "--ray"]
    code = f"import sys; sys.modules['ray'] = None; sys.argv[1:] = {line}; import fastsitch.cli.main as m; m.main()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr == "fastsitch: --ray needs Ray, which is not installed: pip install 'fastsitch[ray]'\n"
