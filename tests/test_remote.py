"""Activation stores in a bucket: the same bytes and rules, whole or absent. The server is another process."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastsitch
from fastsitch.activations.store import ActivationStore
from fastsitch.bucket_folder import BucketFolder
from fastsitch.data import Dataset
from fastsitch.errors import StoreError
from fastsitch.folders import Folder, LocalFolder
from fastsitch.network_names import NetworkName
from fastsitch.root import Root
from tests.conftest import Command, save_npz
from tests.processes import RunningCommand

pytestmark = pytest.mark.bucket

SERVER = "import sys; from moto.server import main; main(['-H', '127.0.0.1', '-p', sys.argv[1]])"
KEYS = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}


def serve(bucket: str, **variables: str) -> tuple["subprocess.Popen[bytes]", str]:
    """A server with one bucket, and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(port)],
        env={**os.environ, **variables},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    # not the opener that all share: it keeps the proxy that the environment named when it was first used
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            opener.open(urllib.request.Request(f"{url}/{bucket}", method="PUT")).close()
            return server, url
        except OSError:
            assert time.monotonic() < deadline
            assert server.poll() is None
            time.sleep(0.1)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    process, url = serve("stores")
    yield url
    process.kill()
    process.wait()


@pytest.fixture(autouse=True)
def environment(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": server}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def trained(fashion: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A root with R1111 and R1112 trained on 600 images, and their data set."""
    folder = tmp_path_factory.mktemp("remote")
    save_npz(folder / "small.npz", fashion.train, fashion.test, 600, 80)
    dataset = f"npz:{folder / 'small.npz'}"
    fastsitch.train("R1111", "R1112", dataset=dataset, width=4, epochs=1, root=folder)
    return folder, dataset


def contents(folder: Folder) -> dict[str, bytes]:
    return {name: folder.read(name) for name in folder.sizes()}


def local_store(root: Path, dataset: str) -> dict[str, bytes]:
    (store,) = fastsitch.precompute("R1111", root=root, dataset=dataset)
    assert isinstance(store.path, LocalFolder)
    return contents(store.path)


def test_a_store_in_a_bucket_has_the_same_bytes(trained: tuple[Path, str], run_cli: Command) -> None:
    root, dataset = trained
    line = ["precompute", "R1111", "--root", root, "--activations", "s3://stores/same"]
    made = run_cli(*line)
    assert made.returncode == 0, made.stderr
    assert " is made: s3://stores/same/" in made.stderr
    folder = Root.at(root, activations="s3://stores/same").store(dataset, NetworkName.parse("R1111"))
    assert contents(folder) == local_store(root, dataset)
    assert " is up to date: s3://stores/same/" in run_cli(*line).stderr


@pytest.mark.parametrize("source", ["resident", "streamed"])
def test_a_sweep_reads_from_a_bucket(trained: tuple[Path, str], source: str) -> None:
    root, _ = trained
    options = {"recipe": "small", "epochs": 1, "batch_size": 16, "init": "matched", "source": source, "root": root}
    here = fastsitch.sweep("R1111", "R1112", run=f"{source}-here", **options)
    there = fastsitch.sweep("R1111", "R1112", run=f"{source}-there", activations="s3://stores/sweep", **options)
    for path in (here.path / "units").iterdir():
        assert (there.path / "units" / path.name).read_bytes() == path.read_bytes()


def test_a_sweep_keeps_its_stores_in_another_folder(trained: tuple[Path, str], tmp_path: Path) -> None:
    root, _ = trained
    options = {"recipe": "small", "epochs": 1, "batch_size": 16, "root": root}
    fastsitch.sweep("R1112", "R1111", run="elsewhere", activations=tmp_path / "fast", **options)
    (store,) = (tmp_path / "fast").glob("*/R1112")
    ActivationStore.open(store)
    (store / "manifest.json").unlink()
    with pytest.raises(StoreError, match=f"fastsitch precompute R1112 --activations {tmp_path / 'fast'} --force"):
        ActivationStore.open(store)


def test_precompute_survives_kills(trained: tuple[Path, str], run_process: Command) -> None:
    """There is no rename: without a manifest a store does not exist, and the next attempt clears up."""
    root, dataset = trained
    whole = local_store(root, dataset)
    line = ["precompute", "R1111", "--root", root, "--activations", "s3://stores/killed"]
    folder = Root.at(root, activations="s3://stores/killed").store(dataset, NetworkName.parse("R1111"))
    assert isinstance(folder, BucketFolder)
    for count in sorted(random.SystemRandom().sample(range(1, len(whole) - 1), 3)):
        command = RunningCommand(*line)
        assert command.wait_for(lambda count=count: len(folder.sizes()) >= count)
        if command.kill() == -signal.SIGKILL and "manifest.json" not in folder.sizes():
            assert not folder.exists()
            with pytest.raises(StoreError, match=r"has no manifest\.json"):
                ActivationStore.open(folder)
    folder.write("train/0/999.0.0.0", b"of another attempt")
    folder.remove("manifest.json")
    finished = run_process(*line)
    assert finished.returncode == 0, finished.stderr
    assert contents(folder) == whole


def test_damage_is_found(trained: tuple[Path, str], run_cli: Command) -> None:
    root, dataset = trained
    base = "s3://stores/damaged"
    (store,) = fastsitch.precompute("R1111", root=root, activations=base)
    folder = store.path
    assert isinstance(folder, BucketFolder)
    chunk = folder.read("train/1/0.0.0.0")
    for damage, message in (
        (None, "train/1/0.0.0.0 is missing"),
        (chunk[:-1], f"train/1/0.0.0.0 has {len(chunk) - 1} bytes, expected {len(chunk)}"),
        (folder.read("train/1/1.0.0.0"), "train/1/0.0.0.0 has another checksum than in the manifest"),
    ):
        if damage is None:
            folder.remove("train/1/0.0.0.0")
        else:
            folder.write("train/1/0.0.0.0", damage)
        found = run_cli("precompute", "R1111", "--root", root, "--activations", base)
        assert found.returncode == 2
        assert message in found.stderr
        assert f"precompute R1111 --root {root} --activations {base} --force" in found.stderr
        assert found.stderr.count("\n") == 1
    # altered inside, which shows when it is read; gone after the store was opened
    folder.write("train/1/0.0.0.0", bytes([chunk[0] ^ 1]) + chunk[1:])
    opened = ActivationStore.open(folder)
    with pytest.raises(StoreError, match=r"train/1/0\.0\.0\.0 was altered or damaged"):
        opened.read("train", 1, 0, 600)
    folder.remove("train/1/0.0.0.0")
    with pytest.raises(StoreError, match=r"train/1/0\.0\.0\.0 was altered or damaged"):
        opened.read("train", 1, 0, 600)
    assert run_cli("precompute", "R1111", "--root", root, "--activations", base, "--force").returncode == 0
    assert contents(folder) == local_store(root, dataset)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://", "--activations s3://: expected s3://BUCKET, s3://BUCKET/PREFIX, or a folder"),
        ("s3://stores//x", "--activations s3://stores//x: expected s3://BUCKET"),
        ("gs://stores/x", "--activations gs://stores/x: expected s3://BUCKET"),
        ("s3://nothing/x", "--activations s3://nothing/x: there is no bucket 'nothing' at http://127.0.0.1:"),
    ],
)
def test_folders_that_cannot_be_used(trained: tuple[Path, str], url: str, message: str, run_cli: Command) -> None:
    root, _ = trained
    for line in (["precompute", "R1111"], ["sweep", "--senders", "R1111", "--receivers", "R1111", "--run", "none"]):
        refused = run_cli(*line, "--root", root, "--activations", url)
        assert refused.returncode == 2
        assert message in refused.stderr
        assert refused.stderr.count("\n") == 1


def test_a_file_is_no_folder(trained: tuple[Path, str], tmp_path: Path, run_cli: Command) -> None:
    (tmp_path / "file").touch()
    refused = run_cli("precompute", "R1111", "--root", trained[0], "--activations", tmp_path / "file")
    assert refused.returncode == 2
    assert refused.stderr == (
        f"fastsitch: --activations {tmp_path / 'file'} is a file: expected a folder, or a name for a new one\n"
    )


def test_servers_that_do_not_answer_or_do_not_let_us_in(
    trained: tuple[Path, str], run_process: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["precompute", "R1111", "--root", trained[0], "--activations", "s3://stores/x"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    refused = run_process(*line)
    assert refused.returncode == 2
    assert "--activations s3://stores/x: no answer at http://127.0.0.1:1 (" in refused.stderr
    assert refused.stderr.count("\n") == 1
    # one action is free: making the bucket
    process, url = serve("stores", INITIAL_NO_AUTH_ACTION_COUNT="1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    refused = run_process(*line)
    process.kill()
    process.wait()
    assert refused.returncode == 2
    assert f"--activations s3://stores/x: access denied at {url}; expected AWS_ACCESS_KEY_ID" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_obstore_is_optional(trained: tuple[Path, str]) -> None:
    line = ["precompute", "R1111", "--root", str(trained[0]), "--activations", "s3://stores/x"]
    code = f"import sys; sys.modules['obstore'] = None; sys.argv[1:] = {line}; import fastsitch.cli.main as m; m.main()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr == (
        "fastsitch: --activations s3://stores/x needs obstore, which is not installed: pip install 'fastsitch[s3]'\n"
    )


def test_the_list_shows_the_stores_that_the_environment_names(
    trained: tuple[Path, str], tmp_path: Path, run_cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, dataset = trained
    monkeypatch.setenv("FASTSITCH_ACTIVATIONS", str(tmp_path / "fast"))
    fastsitch.precompute("R1111", dataset=dataset, root=root)
    shown = run_cli("list", "--root", root)
    assert re.search(r"stores: 1\n.*\nR1111 ", shown.stdout)
    # a bucket is not looked for by commands that need no store
    monkeypatch.setenv("FASTSITCH_ACTIVATIONS", "s3://stores/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    shown = run_cli("list", "--root", root)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "stores: in s3://stores/x, not listed\n" in shown.stdout
    refused = run_cli("precompute", "R1112", "--root", root, "--dataset", dataset)
    assert refused.returncode == 2
    assert "--activations s3://stores/x: no answer at http://127.0.0.1:1" in refused.stderr
