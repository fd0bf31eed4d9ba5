"""Which source a sweep takes, and that its matrices do not depend on it."""

import logging
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastsitch
from fastsitch.activations.store import ActivationStore
from fastsitch.data import Dataset
from fastsitch.errors import ConfigError, MemoryLimitError
from fastsitch.execution import prepare_sweep as prepare
from fastsitch.network_names import NetworkName
from fastsitch.planning import source_choice as choices
from fastsitch.planning import source_rates
from fastsitch.planning import sweep_estimate as estimates
from fastsitch.planning.source_choice import SenderCosts, SourceCosts, SourceRates, choose_source, source_costs
from fastsitch.root import Root
from fastsitch.runs.sweep_config import sweep_config
from fastsitch.runs.sweep_plan import SweepPlan
from tests.conftest import Command, save_npz

TRAIN, TEST = 620, 500
OPTIONS: dict[str, Any] = {"recipe": "small", "epochs": 2, "batch_size": 62, "window": 256}


@pytest.fixture(scope="module")
def trained(fashion: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A root with R1111 and R1112 of width 4, and the name of their data set."""
    folder = tmp_path_factory.mktemp("choice")
    save_npz(folder / "few.npz", fashion.train, fashion.test, TRAIN, TEST)
    dataset = f"npz:{folder / 'few.npz'}"
    fastsitch.train("R1111", "R1112", dataset=dataset, width=4, epochs=3, root=folder)
    return folder, dataset


def chunks(store: ActivationStore, split: str) -> set[tuple[str, int]]:
    images = {"train": TRAIN, "test": TEST}[split]
    return {
        (f"{split}/{position.index}", number)
        for position in store.positions
        for number in range(-(-images // store.chunk_images(split, position.index)))
    }


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[ActivationStore]:
    """Every store that is opened during a test."""
    stores: list[ActivationStore] = []
    open_store = ActivationStore.open

    def remember(path: Path) -> ActivationStore:
        stores.append(open_store(path))
        return stores[-1]

    monkeypatch.setattr(ActivationStore, "open", remember)
    return stores


SEVERAL: dict[str, Any] = {"settings": ["T2T", "R2T"], "seeds": [0, 1], "group_size": 15}
"""With two receivers of 25 and 30 cells: 2 groups in each of the 4 units of a sender."""


def reads(opened: list[ActivationStore]) -> dict[str, Counter[tuple[str, int]]]:
    total: dict[str, Counter[tuple[str, int]]] = {}
    for store in opened:
        total.setdefault(store.path.name, Counter()).update(store.reads)
    return {name: counter for name, counter in total.items() if counter}


@pytest.mark.slow
def test_resident_reads_every_chunk_of_a_sender_once_for_all_receivers_settings_and_seeds(
    trained: tuple[Path, str], opened: list[ActivationStore]
) -> None:
    root, _ = trained
    fastsitch.sweep(
        ["R1111"],
        ["R1111", "R1112"],
        source="resident",
        root=root,
        run="counted",
        **{**OPTIONS, **SEVERAL, "epochs": 1},
    )
    counted = reads(opened)
    assert sorted(counted) == ["R1111", "R1111-random@0"]
    for counter in counted.values():
        assert counter.keys() >= chunks(opened[0], "train") | chunks(opened[0], "test")
        assert set(counter.values()) == {1}


@pytest.mark.slow
def test_streaming_reads_every_chunk_once_per_pass(trained: tuple[Path, str], opened: list[ActivationStore]) -> None:
    root, _ = trained
    options = {**OPTIONS, **SEVERAL, "seeds": [0]}
    fastsitch.sweep(["R1111"], ["R1111", "R1112"], source="streamed", root=root, run="passes", **options)
    counted = reads(opened)
    assert sorted(counted) == ["R1111", "R1111-random@0"]
    groups = 2 * 2
    for counter in counted.values():
        assert {counter[chunk] for chunk in chunks(opened[0], "train")} == {groups * OPTIONS["epochs"]}
        assert {counter[chunk] for chunk in chunks(opened[0], "test")} == {groups}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"precision": "fp32"}, {"precision": "bf16"}, {"precision": "fp32", "loss": "match"}],
)
def test_every_source_gives_the_same_matrix(options: dict[str, str], trained: tuple[Path, str]) -> None:
    root, _ = trained
    name = "-".join(options.values())
    runs = [
        fastsitch.sweep(["R1111"], ["R1112"], source=source, root=root, run=f"{name}-{source}", **OPTIONS, **options)
        for source in ("resident", "streamed", "live")
    ]
    assert [run.resolved.source for run in runs] == ["resident", "streamed", "live"]
    resident, streamed, live = runs
    for metric in resident.metrics:
        one, other = (run.matrix("R1111", "R1112", metric) for run in (resident, streamed))
        assert np.array_equal(one, other), metric
    # the sender ran in other batches: the contract is 0.2 % of the test images
    assert np.abs(live.matrix("R1111", "R1112") - resident.matrix("R1111", "R1112")).max() <= 0.002
    np.testing.assert_allclose(
        live.matrix("R1111", "R1112", "loss"), resident.matrix("R1111", "R1112", "loss"), rtol=0.02
    )


def test_with_the_live_source_no_store_is_needed_or_made(fashion: Dataset, tmp_path: Path, run_cli: Command) -> None:
    save_npz(tmp_path / "few.npz", fashion.train, fashion.test, 160, 80)
    fastsitch.train("R1111", dataset=f"npz:{tmp_path / 'few.npz'}", width=2, epochs=1, root=tmp_path)
    pair = ["sweep", "--senders", "R1111", "--receivers", "R1111", "--root", tmp_path]
    few = ["--epochs", "1", "--batch-size", "16"]
    for name, recipe in (
        ("live", ["--source", "live", "--init", "matched"]),
        ("views", ["--recipe", "published-schedule"]),
    ):
        ended = run_cli(*pair, *few, *recipe, "--run", name)
        assert ended.returncode == 0, ended.stderr
        assert fastsitch.open_run(name, root=tmp_path).resolved.source == "live"
    assert "source live: recipe published-schedule shows new views of the images in every epoch" in ended.stderr
    assert not (tmp_path / "activations").exists()
    refused = run_cli(*pair, *few, "--recipe", "published-schedule", "--source", "resident")
    assert refused.returncode == 2
    assert re.fullmatch(
        "fastsitch: --source resident: recipe published-schedule shows new views .* only --source live can do\n",
        refused.stderr,
    )
    dry_run = run_cli(*pair, "--recipe", "published-schedule", "--batch-size", "16", "--dry-run")
    assert "source (predicted): live: recipe published-schedule shows new views" in dry_run.stdout
    assert re.search(r"disk \(predicted\): \d+\.\d kB", dry_run.stdout)


@pytest.mark.slow
def test_the_source_of_a_run_is_chosen_once(
    trained: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root, _ = trained
    resident = (4 * 1024 * 2 + 8 * 256 + 16 * 64 + 32 * 16) * (TRAIN + TEST) * 4
    options: dict[str, Any] = {
        "root": root,
        "run": "chosen",
        "precision": "fp32",
        **OPTIONS,
        "batch_size": 16,
        "epochs": 0.2,
    }
    with monkeypatch.context() as small, caplog.at_level(logging.INFO):
        small.setattr(prepare, "available_memory", lambda device: int(1.5 * resident))
        small.setattr(source_rates, "live_rate", lambda split: 5.0)
        run = fastsitch.sweep(["R1111"], ["R1111", "R1112"], **options)
    (line,) = re.findall("source streamed: .*", caplog.text)
    assert re.fullmatch(
        r"source streamed: 52\.8 MB do not fit into [\d.]+ MB; reading [\d.]+ GB/s = [\d,]+ images/s "
        r"against 5 images/s live \(\d+ FLOPs per stored byte, \d+ in the time of reading it\)",
        line,
    )
    caplog.clear()
    (run.path / "units" / "R1111--R1112.T2T.task.seed0.npz").unlink()
    with caplog.at_level(logging.INFO):
        again = fastsitch.sweep(["R1111"], ["R1111", "R1112"], **options)
    assert again.resolved.source == "streamed"
    assert "streamed representations" in caplog.text
    assert "source resident" not in caplog.text


CONFIG = sweep_config(dataset="cifar10", senders="R1111", receivers="R1112")
SENDER = SenderCosts(memory={"resident": 31 * 10**9, "streamed": 10**9, "live": 10**8}, missing=10**9, image=135_000)
R1111, R2222 = map(NetworkName.parse, ("R1111", "R2222"))
COSTS = SourceCosts(senders={R1111: SENDER})
RATES = SourceRates(read=1.9e9, live=3000)


@pytest.mark.parametrize(
    ("memory", "disk", "rates", "reason"),
    [
        (100, 10, RATES, "resident: 31.0 GB fit into 50.0 GB"),
        (
            24,
            10,
            RATES,
            "streamed: 31.0 GB do not fit into 12.0 GB; reading 1.9 GB/s = 14,074 images/s against 3,000 images/s live",
        ),
        (
            24,
            10,
            replace(RATES, live=20_000),
            "live: 31.0 GB do not fit into 12.0 GB; 20,000 images/s live against reading 1.9 GB/s = 14,074 images/s",
        ),
        (100, 0.5, RATES, "live: stores that are missing need 1.0 GB of disk, 0.5 GB are free"),
        (1, 10, RATES, "live: 31.0 GB do not fit into 0.5 GB, nor does a window of 1.0 GB"),
        (24, 10, None, "streamed: 31.0 GB do not fit into 12.0 GB; or live, if that is faster when the run begins"),
    ],
)
def test_the_automatic_source(memory: float, disk: float, rates: SourceRates | None, reason: str) -> None:
    choice = choose_source(
        CONFIG,
        COSTS,
        available=int(memory * 1e9),
        free_disk=int(disk * 1e9),
        rates=None if rates is None else lambda _: rates,
    )
    assert choice.reason == reason
    assert choice.name == reason.partition(":")[0]
    assert choice.memory == COSTS.memory(choice.name)


@pytest.mark.parametrize(
    ("source", "disk", "error", "message"),
    [
        (
            "resident",
            10,
            MemoryLimitError,
            "needs 31.0 GB of memory, a sweep may take 24.0 GB: use source=",
        ),
        (
            "streamed",
            0.5,
            ConfigError,
            "source='streamed': stores that are missing need 1.0 GB of disk, 0.5 GB are free",
        ),
    ],
)
def test_a_source_that_cannot_work_is_refused_not_replaced(
    source: str, disk: float, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        choose_source(
            replace(CONFIG, source=source),
            COSTS,
            available=24 * 10**9,
            free_disk=int(disk * 1e9),
            rates=lambda _: RATES,
        )


def test_every_sender_has_a_source_of_its_own() -> None:
    """A small one is held in memory, one that is slow to run is streamed, a quick one runs live, as the disk allows."""
    small = replace(SENDER, memory={"resident": 10**9, "streamed": 10**8, "live": 10**7}, missing=10**8)
    names = [NetworkName.parse(name) for name in ("R1111", "R1112", "R1121", "R1122")]
    costs = SourceCosts(
        senders=dict(zip(names, (small, SENDER, SENDER, replace(SENDER, missing=2 * 10**9)), strict=True))
    )
    quick = replace(RATES, live=20_000, flops=1e9)
    rates = {names[1]: RATES, names[2]: quick, names[3]: RATES}
    choice = choose_source(CONFIG, costs, available=24 * 10**9, free_disk=22 * 10**8, rates=rates.__getitem__)
    assert list(choice.senders.values()) == ["resident", "streamed", "live", "live"]
    assert choice.name == "streamed"
    assert choice.others == {"R1111": "resident", "R1121": "live", "R1122": "live"}
    assert choice.memory == 10**9
    assert choice.reason.split("; ")[0] == "R1111 resident: 1.0 GB fit into 12.0 GB"
    # 1e9 FLOPs for 135,000 bytes; 20,000 images/s are 2e13 FLOP/s, over 1.9e9 bytes/s
    assert "20,000 images/s live (7,407 FLOPs per stored byte, 10,526 in the time of reading it)" in choice.reason
    assert "R1122 live: stores that are missing need 3.1 GB of disk, 2.2 GB are free" in choice.reason


def test_senders_of_one_sweep_have_sources_of_their_own(
    trained: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One is stored, the other runs live; results are those of one source for both."""
    root, _ = trained
    options = {**OPTIONS, "precision": "fp32", "epochs": 1, "positions": ["layer1.0", "layer3.0"]}
    expected = {
        source: fastsitch.sweep(["R1111", "R1112"], ["R1111"], source=source, root=root, run=f"one-{source}", **options)
        for source in ("streamed", "live")
    }
    monkeypatch.setattr(choices, "RESIDENT_SHARE", 0)
    live = {"R1111": 1e3, "R1112": 1e9}
    measured = source_rates.live_rate
    rates = iter(live.values())
    monkeypatch.setattr(source_rates, "live_rate", lambda split: next(rates) + 0 * measured(split))
    monkeypatch.setattr(source_rates, "store_rate", lambda store: 1e5 * 1e4)
    with caplog.at_level(logging.INFO):
        run = fastsitch.sweep(["R1111", "R1112"], ["R1111"], root=root, run="both", **options)
    assert (run.resolved.source_of("R1111"), run.resolved.source_of("R1112")) == ("streamed", "live")
    assert fastsitch.Run.open(run.path).resolved == run.resolved
    for sender in live:
        one = expected[run.resolved.source_of(sender)]
        assert np.array_equal(run.matrix(sender, "R1111"), one.matrix(sender, "R1111"), equal_nan=True)
    assert "FLOPs per stored byte" in caplog.text


def test_a_sweep_with_a_source_that_does_not_fit_leaves_nothing_behind(
    trained: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, dataset = trained
    monkeypatch.setattr(prepare, "available_memory", lambda device: 10_000_000)
    with pytest.raises(
        MemoryLimitError, match=r"source='resident' needs \d+\.\d MB of memory, a sweep may take .* MB: "
    ):
        fastsitch.sweep(["R1111"], ["R1112"], source="resident", root=root, run="large", precision="fp32", **OPTIONS)
    assert not (Root.at(root).run(dataset, "large") / "run.json").exists()


def test_a_dry_run_counts_the_memory_of_the_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(estimates, "available_memory", lambda device: 24 * 10**9)
    monkeypatch.setattr(estimates, "free_space", lambda path: 10**12)
    options: dict[str, Any] = {"dataset": "cifar10", "root": tmp_path, "group_size": 1, "precision": "bf16"}
    memory = {}
    for source in ("auto", "streamed", "live"):
        estimate = fastsitch.estimate(["R2222"], ["R1111"], source=source, **options)
        memory[source] = estimate.memory
        assert estimate.source.startswith("streamed: " if source == "auto" else f"{source}: as asked for")
    assert memory["auto"] == memory["streamed"] > memory["live"]
    # a window of 8,192 images, a batch and a few blocks out of 60,000 images, 608 KiB each, and the step
    assert 8192 * 608 * 1024 < memory["streamed"] < 11_000 * 608 * 1024
    # a plan for another machine is shown, not refused
    too_large = fastsitch.estimate(["R2222"], ["R1111"], source="resident", **options)
    assert too_large.memory > 60_000 * 608 * 1024 > too_large.available


def test_the_source_is_part_of_the_configuration(trained: tuple[Path, str]) -> None:
    with pytest.raises(ConfigError, match="source='disk': expected one of auto, resident, streamed, live"):
        replace(CONFIG, source="disk")
    with pytest.raises(ConfigError, match="source='streamed': recipe published-schedule shows new views"):
        sweep_config(
            dataset="cifar10", senders="R1111", receivers="R1112", recipe="published-schedule", source="streamed"
        )
    # matching has no epochs, and so no views
    matching = sweep_config(
        dataset="cifar10",
        senders="R1111",
        receivers="R1112",
        recipe="published-schedule",
        source="streamed",
        loss="match",
    )
    assert not matching.augments


def test_disk_used_by_a_killed_precompute_counts_as_available(tmp_path: Path) -> None:
    root = Root.at(tmp_path)
    config = sweep_config(dataset="fashion-mini", senders="R1111", receivers="R1111")
    plan = SweepPlan(config, {NetworkName.parse("R1111"): [("stem", (1, 10, 10))]})

    def missing() -> int:
        return source_costs(root, plan, images=(900, 100), pixels=1, itemsize=2).missing

    assert missing() == 2 * 100 * 1000
    store = Path(root.store("fashion-mini", NetworkName.parse("R1111")))
    leftover = store.with_name("R1111.partial") / "train" / "0"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(bytes(150 * 1024))
    assert missing() == 2 * 100 * 1000 - 150 * 1024
    leftover.write_bytes(bytes(300 * 1024))
    assert missing() == 0
