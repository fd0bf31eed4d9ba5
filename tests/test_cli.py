"""The command line as a user sees it: exit codes, plain lines, no tracebacks."""

import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import fastsitch
from fastsitch.cli.text_formats import duration, rate_text, size, table
from fastsitch.data import Dataset
from tests.conftest import Command, cli_environment, cli_line, save_npz
from tests.processes import RunningCommand


@pytest.fixture(scope="module")
def root(fashion: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with two trained networks on 160 images, a store and a run."""
    folder = tmp_path_factory.mktemp("cli")
    save_npz(folder / "small.npz", fashion.train, fashion.test, 160, 80)
    dataset = f"npz:{folder / 'small.npz'}"
    fastsitch.train("R1111", "R1112", dataset=dataset, width=4, epochs=1, root=folder)
    fastsitch.sweep(["R1111"], ["R1112"], root=folder, run="first", recipe="small", epochs=1, batch_size=16)
    return folder


@pytest.mark.slow
def test_from_training_to_heat_maps(fashion: Dataset, tmp_path: Path, run_cli: Command, run_process: Command) -> None:
    save_npz(tmp_path / "small.npz", fashion.train, fashion.test, 160, 80)
    dataset = f"npz:{tmp_path / 'small.npz'}"
    trained = run_process("train", "R1111", "R1112", "--dataset", dataset, "--width", "4", "--epochs", "1")
    assert trained.returncode == 0, trained.stderr
    assert re.search(r"R1112: test accuracy 0\.\d{4}, width 4, 1 epoch on npz:", trained.stdout)
    stored = run_cli("precompute", "R1111")
    assert re.search(r"R1111: 5 positions, \d+\.\d [kM]B: fastsitch-data", stored.stdout)
    assert "the store of R1111 is made" in stored.stderr
    assert "the store of R1111 is up to date" in run_cli("precompute", "R1111").stderr
    options = ["--senders", "R1111", "--receivers", "R1112", "--settings", "T2T,R2T", "--recipe", "small"]
    swept = run_process("sweep", *options, "--epochs", "1", "--batch-size", "16")
    assert swept.returncode == 0, swept.stderr
    assert "R1111-random@0 has no activation store yet: making" in swept.stderr
    name = swept.stdout.split()[1]
    assert re.search(r"R1111 -> R1112 +T2T +30/30", swept.stdout)
    assert run_cli("export", name, "--out", "out").returncode == 0
    assert run_cli("plot", name, "--out", "out").returncode == 0
    out = tmp_path / "work" / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        f"R1111--R1112.{setting}.{kind}" for setting in ("R2T", "T2T") for kind in ("json", "npz", "pdf", "png")
    ]
    with np.load(out / "R1111--R1112.T2T.npz", allow_pickle=False) as file:
        assert file["accuracy"].shape == (5, 6)
    # the same command again trains nothing and says the same
    again = run_cli("sweep", *options, "--epochs", "1", "--batch-size", "16")
    assert " is done already" in again.stderr
    assert again.stdout.splitlines()[:3] == swept.stdout.splitlines()[:3]


def test_the_list_shows_networks_stores_and_runs(root: Path, run_cli: Command) -> None:
    listed = run_cli("list", "--root", root)
    assert listed.returncode == 0
    for pattern in ("networks: 2", "stores: 1", "runs: 1", r"first .* 1/1 units +small +R1111 -> R1112"):
        assert re.search(pattern, listed.stdout)
    empty = run_cli("list")
    assert empty.returncode == 0
    assert "networks: none" in empty.stdout


def test_the_doctor_names_what_this_machine_uses(run_cli: Command) -> None:
    report = run_cli("doctor")
    assert report.returncode == 0
    for word in ("device", "precision", "kernel", "threads", "memory", "disk", "torch", "zarrs", "python"):
        assert re.search(rf"^{word} +\S", report.stdout, re.MULTILINE)


def test_a_dry_run_needs_nothing_but_names(run_cli: Command, tmp_path: Path) -> None:
    small = [f"R{a}{b}{c}{d}" for a in "12" for b in "12" for c in "12" for d in "12"]
    names = ",".join(small)
    dry_run = run_cli(
        "sweep",
        "--senders",
        names,
        "--receivers",
        names,
        "--dataset",
        "cifar10",
        "--source",
        "streamed",
        "--dry-run",
        "--precision",
        "bf16",
    )
    assert dry_run.returncode == 0, dry_run.stderr
    assert "256 units, 12,544 cells, 50000 + 10000 images 32x32" in dry_run.stdout
    assert "not trained: width 64 assumed" in dry_run.stdout
    for pattern in (
        r"memory \(predicted\): \d",
        r"source \(predicted\): streamed: as asked for, [4-9]\.\d GB",
        r"disk \(predicted\): 4\d\d\.\d GB, .* into the \d.* that are free",
        r"time \(predicted\): \d",
        "stitches by kind",
    ):
        assert re.search(pattern, dry_run.stdout)
    assert list((tmp_path / "work").iterdir()) == []


def test_the_version_and_the_help(run_cli: Command) -> None:
    assert run_cli("--version").stdout == f"fastsitch {fastsitch.__version__}\n"
    for command in ("train", "precompute", "sweep", "bench", "export", "plot", "list", "doctor", "demo"):
        shown = run_cli(command, "--help")
        assert shown.returncode == 0
        assert "--root" in shown.stdout


SWEEP = ["sweep", "--senders", "R1111", "--receivers", "R1112"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["sweep", "--frobnicate"], "No such option: --frobnicate"),
        (["sweep", "--senders", "R1111"], "Missing option '--receivers'"),
        (["train", "R1111", "--epochs", "many"], "--epochs many: expected a whole number"),
        (["train", "R1113"], "unknown network 'R1113': expected an architecture out of R1111"),
        (["train", "R1111", "--recipe", "slow"], "--recipe slow: expected one of fast, published"),
        (["train", "R1111", "--dataset", "mnist"], "unknown data set 'mnist': expected fashion-mini"),
        (["train", "R1111", "--dataset", "npz:none.npz"], "none.npz does not exist: expected an npz file"),
        (["train", "R1111", "--width", "0"], "--width 0: expected a whole number from 1 to 4096"),
        (["train", "R1111@1", "--seed", "2"], "R1111@1 names seed 1: leave out --seed 2"),
        (["train", "R1111-random@0"], "is an untrained control"),
        (["train", "R1111", "--device", "tpu"], "--device tpu: expected auto, cpu, cuda"),
        (["precompute", "R1111"], "not trained yet on fashion-mini: R1111; train first with"),
        (
            ["precompute", "R1111", "--root", "ROOT", "--dtype", "int4"],
            "--dtype int4: expected one of bf16, fp16, fp32",
        ),
        ([*SWEEP], "fastsitch train R1111 R1112 --dataset fashion-mini"),
        (
            [*SWEEP, "--root", "ROOT"],
            "160 training images are fewer than one batch of 256 images: use --batch-size 160",
        ),
        ([*SWEEP, "--root", "ROOT", "--settings", "T2X"], "--settings T2X: expected some of T2T"),
        ([*SWEEP, "--root", "ROOT", "--seeds", "a"], "--seeds a: expected whole numbers"),
        ([*SWEEP, "--root", "ROOT", "--precision", "fp64"], "--precision fp64: expected one of auto, bf16, fp32"),
        ([*SWEEP, "--root", "ROOT", "--run", "../x"], "--run ../x: expected letters, digits"),
        ([*SWEEP, "--root", "ROOT", "--run", "first"], "fewer than one batch of 256 images"),
        (
            [*SWEEP, "--root", "ROOT", "--run", "first", "--batch-size", "8"],
            "run 'first' has another configuration: recipe.",
        ),
        (["export", "none", "--out", "x", "--root", "ROOT"], "no run 'none' in"),
        (["export", "../first", "--out", "x", "--root", "ROOT"], "run '../first': expected letters, digits"),
        (["export", "first", "--out", "/etc/hostname", "--root", "ROOT"], "--out /etc/hostname is a file"),
        (["export", "first", "--out", "/etc/hostname/x", "--root", "ROOT"], "--out /etc/hostname/x: /etc/hostname is"),
        (["list", "--root", "/etc/hostname"], "--root /etc/hostname is a file: expected a folder"),
        (["train", "R1111", "--root", ""], "--root is empty: expected the name of a folder"),
        (["list", "--root", "nowhere"], "--root nowhere: there is no such folder"),
        (["list", "--root", ""], "--root is empty: expected the name of a folder"),
        (["train", "R1111", "--data-dir", ""], "--data-dir is empty: expected the name of a folder"),
        (["swep"], "(fastsitch --help shows the commands)"),
        (["sweep", "--sender", "x"], "(fastsitch sweep --help shows the options)"),
        ([*SWEEP, "--root", "ROOT", "--run", ""], "--run '': expected letters, digits"),
        ([*SWEEP, "--root", "ROOT", "--dry-run"], "fewer than one batch of 256 images"),
        (
            ["precompute", "R1111", "--activations", "/etc/hostname/x"],
            "--activations /etc/hostname/x: /etc/hostname is a",
        ),
        (
            ["train", "R1111", "--data-dir", "/etc/hostname/x/y"],
            "--data-dir /etc/hostname/x/y: /etc/hostname is a",
        ),
        (
            ["precompute", "R1111", "--root", "ROOT", "--activations", "s3:bucket/x"],
            "expected a folder, or s3://BUCKET",
        ),
        (["bench", "--json", "/proc/x"], "--json /proc/x: cannot write in /proc"),
        (["export", "no\x1b[31mrun", "--root", "ROOT", "--out", "x"], "run 'no?[31mrun': expected letters"),
        (["list", "--root", "  "], "--root is empty: expected the name of a folder"),
        (["precompute", "R1111", "--root", "ROOT", "--activations", ""], "--activations is empty: expected the name"),
        (["train", "R1111", "--root", "/proc/x"], "cannot use /proc/x (No such file or directory): expected a file"),
        (["precompute", "R1111", "--root", "ROOT", "--activations", "s3:/b"], "--activations s3:/b: expected a folder"),
        ([*SWEEP, "--root", "ROOT", "--epochs", "1e12"], "--epochs 1000000000000: expected a number above 0"),
        (["paper", "--networks", ",", "--dry-run"], "--networks ,: expected names separated by commas"),
        (["plot", "none", "--out", "x"], "no run 'none' in fastsitch-data/runs: found none"),
    ],
)
def test_bad_usage_ends_with_2_and_plain_lines(
    arguments: list[str], message: str, root: Path, run_cli: Command
) -> None:
    ended = run_cli(*(str(root) if part == "ROOT" else part for part in arguments))
    assert ended.returncode == 2
    assert message in ended.stderr
    assert ended.stderr.startswith("fastsitch: ")
    assert "Traceback" not in ended.stderr
    assert not set("╭│╰─") & set(ended.stderr)
    assert len(ended.stderr.splitlines()) <= 3


def test_tables_check_the_folder_before_anything_is_measured(root: Path, run_cli: Command) -> None:
    ended = run_cli("tables", "first", "--out", "/etc/hostname/x", "--root", root)
    assert ended.returncode == 2
    assert re.fullmatch(r"fastsitch: --out /etc/hostname/x: /etc/hostname is a file[^\n]*\n", ended.stderr)
    assert not ended.stdout


def test_sizes_that_cannot_be_stitched_are_refused(run_cli: Command, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        f"{kind}_{split}": values
        for split in ("train", "test")
        for kind, values in (("x", rng.integers(0, 256, (64, 20, 20), np.uint8)), ("y", np.arange(64) % 10))
    }
    np.savez(tmp_path / "odd.npz", **arrays)
    dataset = f"npz:{tmp_path / 'odd.npz'}"
    small = ["--width", "4", "--epochs", "1"]
    assert (
        "64 training images are fewer than one batch of 128" in run_cli("train", "R1111", "--dataset", dataset).stderr
    )
    np.savez(tmp_path / "odd.npz", **{key: np.concatenate([value] * 3) for key, value in arrays.items()})
    assert run_cli("train", "R1111", "--dataset", dataset, *small).returncode == 0
    ended = run_cli("sweep", "--senders", "R1111", "--receivers", "R1111", "--batch-size", "16")
    assert ended.returncode == 2
    assert "R1111 layer4.0 -> R1111 stem: no stitch from 3x3 to 20x20" in ended.stderr


def test_a_data_set_has_to_be_chosen_when_several_have_the_networks(
    fashion: Dataset, tmp_path: Path, run_cli: Command
) -> None:
    for name in ("one", "two"):
        save_npz(tmp_path / f"{name}.npz", fashion.train, fashion.test, 130, 20)
        run_cli("train", "R1111", "--dataset", f"npz:{tmp_path / name}.npz", "--width", "2", "--epochs", "1")
    ended = run_cli("precompute", "R1111")
    assert ended.returncode == 2
    assert "several data sets have R1111: choose one with --dataset" in ended.stderr
    assert "one.npz" in ended.stderr
    assert "two.npz" in ended.stderr


def test_a_path_of_the_wrong_kind_ends_with_2_and_one_line(root: Path, run_cli: Command, tmp_path: Path) -> None:
    out = tmp_path / "work" / "out"
    (out / "R1111--R1112.T2T.npz").mkdir(parents=True)
    ended = run_cli("export", "first", "--out", "out", "--root", root)
    assert ended.returncode == 2
    assert re.fullmatch(r"fastsitch: out/\S+ is no regular file: expected a file, or a name .*\n", ended.stderr)
    assert [path.name for path in out.iterdir()] == ["R1111--R1112.T2T.npz"]


@pytest.mark.slow
def test_a_bug_or_a_failing_machine_ends_with_1_and_one_line(root: Path, tmp_path: Path) -> None:
    """A machine that writes no more than a kilobyte into any file."""

    def ended(*more: str) -> subprocess.CompletedProcess[str]:
        line = cli_line("export", "first", "--out", tmp_path / "out", "--root", root, *more)
        limited = ["bash", "-c", 'ulimit -f 1; exec "$@"', "bash", *line]
        return subprocess.run(limited, env=cli_environment(), capture_output=True, text=True, timeout=300, check=False)

    failed = ended()
    assert failed.returncode == 1
    assert re.fullmatch(
        r"fastsitch: .*/out/.*\.npz: File too large; make room and run the same command again\n", failed.stderr
    )
    debugged = ended("--debug")
    assert debugged.returncode == 1
    assert "Traceback" in debugged.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_broken_networks_are_listed_and_do_not_affect_others(
    fashion: Dataset, tmp_path: Path, run_cli: Command
) -> None:
    save_npz(tmp_path / "small.npz", fashion.train, fashion.test, 160, 80)
    dataset, work = f"npz:{tmp_path / 'small.npz'}", tmp_path / "work"
    assert run_cli("train", "R1111", "R1112", "--dataset", dataset, "--width", "2", "--epochs", "1").returncode == 0
    (record,) = work.glob("fastsitch-data/models/*/R1111.json")
    whole = record.read_text()
    for broken, reason in (
        ("{ not json", "R1111.json as a network record"),
        ("[]", "R1111.json as a network record"),
        (whole.replace('"width": 2', '"width": 4'), "R1111.json as a network record (it was altered: record_hash"),
        (record.with_name("R1112.json").read_text(), "R1111.json describes R1112"),
    ):
        record.write_text(broken)
        listed = run_cli("list")
        assert listed.returncode == 0
        assert reason in listed.stdout
        assert re.search(r"R1112 .*0\.\d{4} +fast, 1 epoch", listed.stdout)
        assert run_cli("precompute", "R1112").returncode == 0
        ended = run_cli("precompute", "R1111")
        assert ended.returncode == 2
        assert reason in ended.stderr


def test_all_names_are_checked_before_work_begins(fashion: Dataset, tmp_path: Path, run_cli: Command) -> None:
    save_npz(tmp_path / "small.npz", fashion.train, fashion.test, 160, 80)
    ended = run_cli("train", "R1111", "R9999", "--dataset", f"npz:{tmp_path / 'small.npz'}", "--width", "2")
    assert ended.returncode == 2
    assert not (tmp_path / "work" / "fastsitch-data").exists()


def test_suggested_commands_quote_paths_with_spaces(fashion: Dataset, tmp_path: Path, run_cli: Command) -> None:
    (tmp_path / "työ tila").mkdir()
    save_npz(tmp_path / "työ tila" / "a b.npz", fashion.train, fashion.test, 160, 80)
    dataset = f"npz:{tmp_path / 'työ tila' / 'a b.npz'}"
    ended = run_cli("sweep", "--senders", "R1111", "--receivers", "R1111", "--dataset", dataset, "--root", "rö öt")
    assert ended.returncode == 2
    line = shlex.split(ended.stderr.splitlines()[1])
    assert line == ["fastsitch", "train", "R1111", "--dataset", dataset, "--root", "rö öt"]
    assert run_cli(*line[1:], "--width", "2", "--epochs", "1").returncode == 0


def hear_interrupts() -> None:
    """Tests that a shell runs in the background ignore interrupts, and their children would too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def be_interrupted() -> None:
    """As in a process that Python has just started."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.slow
def test_an_interrupted_sweep_ends_with_1_and_says_so(fashion: Dataset, tmp_path: Path) -> None:
    save_npz(tmp_path / "small.npz", fashion.train, fashion.test, 160, 80)
    fastsitch.train("R1111", dataset=f"npz:{tmp_path / 'small.npz'}", width=4, epochs=1, root=tmp_path)
    options = ["--senders", "R1111", "--receivers", "R1111", "--batch-size", "8", "--epochs", "1000", "--run", "long"]
    command = RunningCommand("sweep", *options, "--root", tmp_path, prepare=be_interrupted)
    assert command.wait_for(lambda: bool(list(tmp_path.glob("runs/*/long/run.json"))))
    time.sleep(1)
    command.send_signal(signal.SIGINT)
    ended = command.ended()
    assert ended.returncode == 1
    assert ended.stderr.endswith("fastsitch: interrupted; finished units are saved, run the same command to resume\n")
    assert "Traceback" not in ended.stderr


_INTERRUPTED = "import os, signal; os.kill(os.getpid(), signal.SIGINT); [i for i in range(9)]"
_SWALLOWED = f"""
with ProgressDisplay() as display:
    try:
        {_INTERRUPTED}
    except BaseException:
        pass
    display.report(Progress(0, 9, "cells", "sweep"))
"""


@pytest.mark.parametrize("work", [_INTERRUPTED, _SWALLOWED])
def test_an_interrupt_inside_exec_ends_with_1(work: str, tmp_path: Path) -> None:
    """Imports run ``exec`` (dataclasses, named tuples), and Python remembers a KeyboardInterrupt that passes it.

    Those of torch also try modules, and go on whatever they raise.
    """
    (tmp_path / "interrupted.py").write_text(
        "from fastsitch.cli import main\n"
        "from fastsitch.cli.progress_display import ProgressDisplay\n"
        "from fastsitch.progress import Progress\n"
        f"main.app = lambda **_: exec({work!r}, globals())\n"
        "main.main()\n"
    )
    line = [sys.executable, "-m", "interrupted"]
    ended = subprocess.run(
        line, cwd=tmp_path, env=cli_environment(), capture_output=True, text=True, preexec_fn=hear_interrupts
    )
    assert ended.returncode == 1
    assert ended.stderr == "fastsitch: interrupted; finished units are saved, run the same command to resume\n"


def test_texts() -> None:
    assert [duration(s) for s in (5, 200, 18420, 300000)] == ["5 s", "3:20 min", "5:07 h", "3.5 days"]
    assert [size(n) for n in (10, 1500, 2.5e6, 1.2e9, 4e11)] == ["10 B", "1.5 kB", "2.5 MB", "1.2 GB", "400.0 GB"]
    assert rate_text(0.5, "cells") == "30.0 cells/min"
    assert table(["a", "b"], [["x", "1"], ["yy", "22"]]) == "a    b\nx    1\nyy  22"
