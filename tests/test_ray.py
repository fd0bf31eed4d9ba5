"""Many machines: a Ray cluster does what one machine would, bit by bit, and workers and drivers may be killed."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray.cluster_utils

import fastsitch
from fastsitch.activations.store import ActivationStore
from fastsitch.cluster.cluster import Cluster
from fastsitch.cluster.connect import checked_address
from fastsitch.cluster.crew import Crew, Places, Work
from fastsitch.cluster.deal import Deal
from fastsitch.cluster.worker import Arrived
from fastsitch.data import Dataset
from fastsitch.errors import ConfigError, StoreError
from fastsitch.machine import versions
from fastsitch.root import Root
from fastsitch.sweep.distribute import UnitStation
from tests.conftest import Command, cli_environment, cli_line, save_npz

SWEEP = ["--senders", "R1111,R1112", "--receivers", "R1111,R1112", "--recipe", "small", "--batch-size", "16"]
OPTIONS = {"recipe": "small", "batch_size": 16, "seeds": [0, 1]}


@pytest.fixture(scope="module")
def root(fashion: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with R1111 and R1112 trained on 160 images, and the runs that this machine makes alone."""
    folder = tmp_path_factory.mktemp("ray")
    save_npz(folder / "small.npz", fashion.train, fashion.test, 160, 80)
    dataset = f"npz:{folder / 'small.npz'}"
    fastsitch.train("R1111", "R1112", dataset=dataset, width=4, epochs=2, root=folder)
    fastsitch.sweep("R1111,R1112", "R1111,R1112", root=folder, run="alone", **OPTIONS)
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two nodes with one processor each."""
    # sockets lie in it: pytest's folders have too long a name
    folder = tempfile.mkdtemp(dir="/tmp")
    nodes = ray.cluster_utils.Cluster()
    for _ in range(2):
        nodes.add_node(num_cpus=1, num_gpus=0, include_dashboard=False, temp_dir=folder)
    yield nodes.address
    nodes.shutdown()
    shutil.rmtree(folder)


def units(root: Path, run: str) -> dict[str, bytes]:
    folder = fastsitch.open_run(run, root=root).path / "units"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def start(root: Path, run: str, *options: str, **variables: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        cli_line("sweep", *SWEEP, "--seeds", "0,1", "--run", run, "--root", root, *options),
        env={**cli_environment(), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_units(process: "subprocess.Popen[str]", root: Path, run: str, count: int) -> None:
    """Until so many units are saved."""
    (folder,) = (root / "runs").iterdir()
    deadline = time.monotonic() + 120
    while len(list((folder / run / "units").glob("*.npz"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def processes(text: str) -> list[int]:
    """Those whose command line or environment has a text in it."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            content = (place / "cmdline").read_bytes() + (place / "environ").read_bytes()
        except OSError:
            # gone meanwhile, or another user's
            continue
        if text.encode() in content:
            found.append(int(place.name))
    return found


def test_a_sweep_survives_the_loss_of_a_worker(cluster: str, root: Path) -> None:
    driver = start(root, "lost", "--ray", cluster)
    wait_for_units(driver, root, "lost", 2)
    workers = [pid for pid in processes(cluster) if title(pid).startswith("ray::Worker.run")]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    output, errors = driver.communicate(timeout=300)
    assert driver.returncode == 0, errors
    assert "trying it again" in errors
    assert units(root, "lost") == units(root, "alone")
    # Ray itself says nothing
    assert "raylet" not in output + errors
    assert "Ray" not in output


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_local_and_distributed_runs_continue_each_other(root: Path) -> None:
    """Each killed without a chance to clean up; a cluster of its own goes down with its driver."""
    place = Path(tempfile.mkdtemp(dir="/tmp"))
    driver = start(root, "first", "--ray", TMPDIR=str(place))
    wait_for_units(driver, root, "first", 1)
    driver.kill()
    driver.communicate()
    (left,) = place.iterdir()
    assert left.name.startswith("fastsitch-ray-")
    deadline = time.monotonic() + 60
    while processes(left.name):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    alone = start(root, "first")
    _, errors = alone.communicate(timeout=300)
    assert alone.returncode == 0, errors
    assert "of 8 units are done already" in errors
    assert units(root, "first") == units(root, "alone")

    alone = start(root, "second")
    wait_for_units(alone, root, "second", 1)
    alone.kill()
    alone.communicate()
    driver = start(root, "second", "--ray", TMPDIR=str(place))
    _, errors = driver.communicate(timeout=300)
    assert driver.returncode == 0, errors
    assert "of 8 units are done already" in errors
    assert units(root, "second") == units(root, "alone")
    # nothing is left, not even of the killed one
    assert list(place.iterdir()) == []
    place.rmdir()


def test_an_interrupted_driver_ends_its_cluster(root: Path) -> None:
    place = Path(tempfile.mkdtemp(dir="/tmp"))
    driver = start(root, "interrupted", "--ray", TMPDIR=str(place))
    wait_for_units(driver, root, "interrupted", 1)
    driver.send_signal(signal.SIGINT)
    _, errors = driver.communicate(timeout=60)
    assert driver.returncode == 1
    assert errors.splitlines()[-1] == (
        "fastsitch: interrupted; what is finished is kept, the same command does the rest"
    )
    assert not processes(str(place))
    place.rmdir()


@pytest.mark.parametrize("options", [{"init": "matched"}, {"loss": "match"}, {"loss": "match", "solver": "sgd"}])
def test_matched_runs_are_the_same_too(cluster: str, root: Path, options: dict[str, str]) -> None:
    name = "-".join(options.values())
    settings = {**OPTIONS, "seeds": [0], "epochs": 1, "root": root, **options}
    if options == {"loss": "match"}:
        del settings["epochs"]
    fastsitch.sweep("R1111", "R1111,R1112", run=f"{name}-alone", **settings)
    fastsitch.sweep("R1111", "R1111,R1112", run=name, ray=cluster, **settings)
    assert units(root, name) == units(root, f"{name}-alone")


def test_stores_are_the_same(cluster: str, fashion: Dataset, tmp_path: Path, run_cli: Command) -> None:
    save_npz(tmp_path / "small.npz", fashion.train, fashion.test, 160, 80)
    dataset = f"npz:{tmp_path / 'small.npz'}"
    fastsitch.train("R1111", "R1112", dataset=dataset, width=4, epochs=1, root=tmp_path)
    made = run_cli("precompute", "R1111", "R1112", "--root", tmp_path, "--ray", cluster)
    assert made.returncode == 0, made.stderr
    assert made.stdout.count(", made: ") == 2
    stores = Root.at(tmp_path).activations(dataset)
    there = {path: path.read_bytes() for path in stores.rglob("*") if path.is_file()}
    shutil.rmtree(stores)
    assert run_cli("precompute", "R1111", "R1112", "--root", tmp_path).returncode == 0
    assert {path: path.read_bytes() for path in stores.rglob("*") if path.is_file()} == there


class Counting:
    """A station that also says how often each chunk was read by this worker."""

    def __init__(self, *arguments: Any) -> None:
        self.opened: list[ActivationStore] = []
        whole = ActivationStore.open

        def open_store(path: Path) -> ActivationStore:
            self.opened.append(whole(path))
            return self.opened[-1]

        ActivationStore.open = open_store  # type: ignore[method-assign, assignment]
        self.station = UnitStation(*arguments)

    def __call__(self, planned: Any, tell: Callable[[Any], None]) -> tuple[int, Counter[tuple[str, str, int]]]:
        self.station(planned, tell)
        reads: Counter[tuple[str, str, int]] = Counter()
        for store in self.opened:
            reads.update({(store.path.name, *chunk): count for chunk, count in store.reads.items()})
        return os.getpid(), reads


def test_a_worker_reads_no_chunk_twice(cluster: str, root: Path) -> None:
    run = fastsitch.open_run("alone", root=root)
    assert run.resolved.source == "resident"
    read: dict[int, Counter[tuple[str, str, int]]] = {}
    with Cluster(cluster, root=root) as workers:
        places = workers.places("auto")
        assert (places.device, places.threads, places.total, places.per_machine) == ("cpu", 1, 2, 1)
        make = partial(Counting, Root.at(root).absolute(), run.path, "cpu", run.units)
        for _, (worker, reads) in workers.carry_out(make, run.units, places, key=lambda planned: planned.sender):
            read[worker] = reads
    assert len(read) == 2
    for reads in read.values():
        assert set(reads.values()) == {1}
    senders = {worker: {store for store, *_ in reads} for worker, reads in read.items()}
    assert set.union(*senders.values()) == {"R1111", "R1112"}


def refuse(job: str, tell: Callable[[Any], None]) -> None:
    raise StoreError(f"{job} is stale")


def fail(folder: Path, job: str, tell: Callable[[Any], None]) -> None:
    (folder / f"{os.getpid()}").touch()
    raise RuntimeError(f"no {job} today\nand more")


def test_refusals_are_raised_at_once_and_failures_after_three_attempts(
    cluster: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Cluster(cluster, root=tmp_path) as workers:
        places = workers.places("cpu")
        with pytest.raises(StoreError, match="a is stale"):
            list(workers.carry_out(lambda: refuse, ["a"], places))
        assert not caplog.records
        with pytest.raises(RuntimeError, match="no a today"):
            list(workers.carry_out(partial(partial, fail, tmp_path), ["a"], places, name="job {}".format))
    assert len(list(tmp_path.iterdir())) == 3
    assert [record.getMessage().partition(" on ")[0] for record in caplog.records] == ["job a failed"] * 2
    assert all(record.getMessage().endswith("(no a today): trying it again") for record in caplog.records)


def test_jobs_of_one_key_stay_together() -> None:
    deal = Deal(["a1", "a2", "b1", "b2", "c1"], key=lambda job: job[0])
    assert [deal.take(0), deal.take(1), deal.take(0), deal.take(1)] == ["a1", "b1", "a2", "b2"]
    assert deal.take(0) == "c1"
    # worker 1 is lost: its job is for anyone who did not let its key go, or still holds it
    deal.put_back(1, "b2")
    assert deal.take(0) == "b2"
    assert deal.take(0) is None
    deal = Deal(["a1", "a2", "a3", "b1"], key=lambda job: job[0])
    assert [deal.take(0), deal.take(0), deal.take(1), deal.take(1)] == ["a1", "a2", "b1", "a3"]
    assert [deal.take(0), deal.take(1)] == [None, None]
    deal.put_back(1, "a3")
    # worker 0 has let go of a
    assert deal.take(0) is None
    assert deal.take(2) == "a3"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("R1111", "--ray R1111: expected HOST:PORT of a Ray cluster, auto for the one that runs on this machine"),
        ("ray://host:10001", "--ray ray://host:10001: expected HOST:PORT"),
        ("127.0.0.1:1", "--ray 127.0.0.1:1: nothing answers there (.*refused)"),
        ("nowhere.invalid:6379", "--ray nowhere.invalid:6379: nothing answers there"),
    ],
)
def test_addresses_that_cannot_be_one(address: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(.", r"\(.")):
        checked_address(address)


def test_a_cluster_that_cannot_be_used_is_refused(cluster: str, root: Path, run_cli: Command, tmp_path: Path) -> None:
    pair = ["--senders", "R1111", "--receivers", "R1111", "--root", root, "--run", "refused"]
    for options, message in (
        (["--ray", "auto"], "--ray auto: cannot join a Ray cluster there"),
        (["--ray", cluster, "--device", "cuda"], "no machine of the Ray cluster has a GPU"),
        (["--ray", cluster, "--device", "cuda:1"], "--device cuda:1: expected auto, cpu or cuda"),
        (["--ray", cluster, "--batch-size", "1000"], "fewer than one batch"),
    ):
        refused = run_cli("sweep", *pair, *options)
        assert refused.returncode == 2
        assert message in refused.stderr
        assert refused.stderr.count("\n") == 1
    assert not (fastsitch.open_run("alone", root=root).path.parent / "refused").exists()


def test_workers_that_would_do_something_else_are_refused(tmp_path: Path) -> None:
    places = Places(device="cpu", threads=1, total=1, per_machine=1)
    work: Work[str] = Work(make=lambda: refuse, jobs=[], name=str, key=str, report=lambda job, value: None)
    crew = Crew(None, places, work, tmp_path / "witness")
    crew._check(Arrived("far", 1, versions(), shares=True))
    with pytest.raises(ConfigError, match=f"{tmp_path} is another folder on far, or none"):
        crew._check(Arrived("far", 1, versions(), shares=False))
    with pytest.raises(ConfigError, match="far has torch 1.0: expected "):
        crew._check(Arrived("far", 1, {**versions(), "torch": "1.0+cpu"}, shares=True))


def test_ray_is_optional(root: Path) -> None:
    line = ["sweep", "--senders", "R1111", "--receivers", "R1111", "--root", str(root), "--ray"]
    code = f"import sys; sys.modules['ray'] = None; sys.argv[1:] = {line}; import fastsitch.cli.main as m; m.main()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr == "fastsitch: --ray needs Ray, which is not installed: pip install 'fastsitch[ray]'\n"
