"""What cluster workers and their driver refuse; no cluster is needed here."""

import http.server
import threading
from pathlib import Path

import pytest

import fastsitch
from fastsitch.cluster.connect_ray import _require_same, checked_address
from fastsitch.errors import ConfigError, RunError
from fastsitch.execution.distribute_sweep import UnitTask
from fastsitch.root import Root


def test_a_worker_trains_with_the_networks_that_the_run_began_with(few: str, tmp_path: Path) -> None:
    networks = {"dataset": few, "width": 4, "epochs": 1, "root": tmp_path}
    fastsitch.train("R1111", "R1112", **networks)
    run = fastsitch.sweep("R1111", "R1112", dataset=few, batch_size=16, epochs=1, root=tmp_path, run="first")
    task = UnitTask(Root.at(tmp_path), run.path, "cpu", run.units)
    assert len(task(run.units[0], lambda cells: None).cells) == 30
    # while others still work on the run
    fastsitch.train("R1112", **{**networks, "epochs": 2}, force=True)
    task = UnitTask(Root.at(tmp_path), run.path, "cpu", run.units)
    with pytest.raises(RunError, match="R1112 is not what run 'first' began with: it was trained again"):
        task(run.units[0], lambda cells: None)


def test_a_network_that_is_named_twice_is_one(few: str, tmp_path: Path) -> None:
    records = fastsitch.train("R1111", "R1111@0", dataset=few, width=2, epochs=1, root=tmp_path)
    assert [record.name for record in records] == ["R1111"]
    assert len(fastsitch.precompute("R1111", "R1111@0", dataset=few, root=tmp_path)) == 1


def test_a_connection_to_another_cluster_is_not_used() -> None:
    for address in ("auto", "local", "127.0.0.1:6379", "localhost:6379"):
        _require_same(address, "127.0.0.1:6379")
    with pytest.raises(ConfigError, match=r"ray='.*:6380': this process is connected to Ray at .*:6379"):
        _require_same("127.0.0.1:6380", "127.0.0.1:6379")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("R1111", "ray='R1111': expected HOST:PORT of a Ray cluster, auto for the one that runs on this machine"),
        ("ray://host:10001", "ray='ray://host:10001': expected HOST:PORT"),
        ("127.0.0.1:1", "ray='127.0.0.1:1': nothing answers there"),
        ("nowhere.invalid:6379", "ray='nowhere.invalid:6379': nothing answers there"),
    ],
)
def test_malformed_addresses_are_refused(address: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked_address(address)


def test_an_address_of_another_service_is_refused() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with pytest.raises(ConfigError, match="the server there is not a Ray cluster; expected the address that"):
            checked_address(f"127.0.0.1:{server.server_port}")
        thread.join()
