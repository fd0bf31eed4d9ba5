"""Activation stores: what was written is read back, and nothing damaged is ever taken for whole."""

import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsitch.activations import precompute as precompute_module
from fastsitch.activations import store_writer as writer_module
from fastsitch.activations.precompute import ensure_store, store_identity
from fastsitch.activations.resident_source import ResidentSource
from fastsitch.activations.store import ActivationStore
from fastsitch.activations.store_writer import StoreWriter, writing
from fastsitch.data import Dataset, Split, load_dataset
from fastsitch.errors import BusyError, ConfigError, FastsitchError, MemoryLimitError, NetworkError, StoreError
from fastsitch.files import exclusive
from fastsitch.machine import DTYPES
from fastsitch.network_names import NetworkName
from fastsitch.networks.checkpoint import Network, load_network
from fastsitch.networks.train_network import network_recipe, train_network
from fastsitch.receivers.frozen_network import FrozenNetwork
from fastsitch.root import Root

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(fashion: Dataset) -> Dataset:
    """300 + 70 real images under the name of another data set."""
    return Dataset(
        "npz:few.npz",
        Split(fashion.train.images[:300], fashion.train.labels[:300]),
        Split(fashion.test.images[:70], fashion.test.labels[:70]),
        10,
    )


@pytest.fixture(scope="module")
def network(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Network:
    """A network trained for one epoch."""
    root = Root.at(tmp_path_factory.mktemp("root"))
    name = NetworkName.parse("R1111")
    train_network(root, data, name, width=8, recipe=network_recipe("fast", 1), device=CPU)
    return load_network(root.models(data.name), name)


def make(path: Path, data: Dataset, network: Network, **options: str) -> ActivationStore:
    store, made = ensure_store(path, data, network, device=CPU, **options)
    assert made
    return store


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("compress", ["none", "zstd"])
def test_a_store_holds_what_the_network_computes(
    dtype: str, compress: str, data: Dataset, network: Network, tmp_path: Path
) -> None:
    store = make(tmp_path / "R1111", data, network, dtype=dtype, compress=compress)
    frozen = FrozenNetwork(network.chain, dtype=DTYPES[store.identity.compute], device=CPU)
    for split, images in (("train", data.train), ("test", data.test)):
        assert torch.equal(store.labels(split), images.labels)
        assert torch.equal(store.ids(split), torch.arange(len(images)))
        # the batches of 256 images that precompute ran, so that the bits are the same
        passes = [frozen.representations(network.record.normalisation.apply(x)) for x in images.images.split(256)]
        for position in store.positions:
            expected = torch.cat([outputs[position.index] for outputs in passes]).permute(0, 2, 3, 1).to(DTYPES[dtype])
            assert torch.equal(store.read(split, position.index, 0, len(images)), expected)
            assert torch.equal(store.read(split, position.index, 5, 40), expected[5:40])
    source = ResidentSource.load(store, dtype=torch.float32, device=CPU)
    index = torch.tensor([3, 250, 7])
    batch, _, _ = source.train.batch(index).operand((8, 32, 32), 1, "torch")
    assert torch.equal(batch[1], store.read("train", 1, 0, 300)[index].float())


def test_a_store_that_is_up_to_date_is_left_alone(data: Dataset, network: Network, tmp_path: Path) -> None:
    path = tmp_path / "R1111"
    make(path, data, network)
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    _, made = ensure_store(path, data, network, device=CPU)
    assert not made
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before


def test_a_chunk_of_zeros_exists(data: Dataset, network: Network, tmp_path: Path) -> None:
    identity = store_identity(data, network, dtype="bf16", compress="none", device=CPU)
    positions = network.chain.positions[:1]
    with writing(tmp_path / "zeros", identity, positions, {"train": 300}) as writer:
        writer.write("train", 0, 0, torch.zeros(300, 32, 32, 8))
        writer.write_samples("train", torch.zeros(300, dtype=torch.int64), torch.arange(300))
    store = ActivationStore.open(tmp_path / "zeros")
    assert (tmp_path / "zeros" / "train" / "0" / "0.0.0.0").is_file()
    (tmp_path / "zeros" / "train" / "0" / "0.0.0.0").unlink()
    with pytest.raises(StoreError, match=r"train/0/0\.0\.0\.0 is missing"):
        ActivationStore.open(store.path)


def truncate(store: Path) -> Path:
    file = store / "train" / "1" / "1.0.0.0"
    file.write_bytes(file.read_bytes()[:-100])
    return file


def remove(store: Path) -> Path:
    file = store / "train" / "3" / "0.0.0.0"
    file.unlink()
    return file


def flip_a_bit(store: Path) -> Path:
    return flip(store / "train" / "0" / "0.0.0.0")


def flip_a_bit_of_the_last_chunk(store: Path) -> Path:
    """A chunk that reaches beyond the array, of which a reader could decode a part without its checksum."""
    return flip(store / "train" / "0" / "1.0.0.0")


def flip_a_bit_of_the_only_chunk(store: Path) -> Path:
    return flip(store / "test" / "4" / "0.0.0.0")


def flip_a_label(store: Path) -> Path:
    return flip(store / "train" / "labels" / "0")


def flip(file: Path) -> Path:
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    return file


def exchange_chunks(store: Path) -> Path:
    first, second = store / "train" / "0" / "0.0.0.0", store / "train" / "1" / "0.0.0.0"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    return first


def alter_metadata(store: Path) -> Path:
    file = store / "train" / "2" / "zarr.json"
    file.write_text(file.read_text().replace('"bf16"', '"fp16"'))
    return file


def alter_the_manifest(store: Path) -> Path:
    file = store / "manifest.json"
    file.write_text(file.read_text().replace('"train": 300', '"train": 299'))
    return file


def empty_the_manifest(store: Path) -> Path:
    file = store / "manifest.json"
    file.write_text("")
    return file


@pytest.mark.parametrize("compress", ["none", "zstd"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "bytes, expected"),
        (remove, "is missing"),
        (flip_a_bit, "was altered or damaged"),
        (flip_a_bit_of_the_last_chunk, "was altered or damaged"),
        (flip_a_bit_of_the_only_chunk, "was altered or damaged"),
        (flip_a_label, "was altered or damaged"),
        (exchange_chunks, "another checksum than in the manifest|bytes, expected"),
        (alter_metadata, "another checksum than in the manifest"),
        (alter_the_manifest, "was altered"),
        (empty_the_manifest, "is not the manifest of an activation store"),
    ],
)
def test_damage_is_refused_by_file_and_reason(
    damage: Callable[[Path], Path], reason: str, compress: str, data: Dataset, network: Network, tmp_path: Path
) -> None:
    # as in a root: other folders of stores are named by themselves
    (tmp_path / "models").mkdir()
    path = tmp_path / "activations" / "few" / "R1111"
    make(path, data, network, compress=compress)
    file = damage(path)
    with pytest.raises(StoreError) as caught:
        ResidentSource.load(ActivationStore.open(path), dtype=torch.bfloat16, device=CPU)
    assert str(file) in str(caught.value)
    assert re.search(reason, str(caught.value))
    assert f"fastsitch precompute R1111 --root {path.parents[2]} --force" in str(caught.value)


def test_a_folder_without_a_manifest_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "R1111").mkdir()
    with pytest.raises(StoreError, match=r"is no complete activation store: it has no manifest\.json"):
        ActivationStore.open(tmp_path / "R1111")


def test_a_stale_store_is_refused_and_replaced_by_force(data: Dataset, network: Network, tmp_path: Path) -> None:
    path = tmp_path / "R1111"
    make(path, data, network)
    retrained = Network(replace(network.record, weights_hash="0" * 64), network.chain)
    with pytest.raises(
        StoreError, match=r"is stale: the network was trained again since; .*precompute R1111 .*--force"
    ):
        ensure_store(path, data, retrained, device=CPU, content_only=True)
    _, made = ensure_store(path, data, retrained, device=CPU, force=True)
    assert made
    assert ActivationStore.open(path).identity.weights == "0" * 64
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["R1111", "R1111.lock"]


def test_other_data_other_dtypes_and_foreign_stores_are_told_apart(
    data: Dataset, network: Network, tmp_path: Path
) -> None:
    path = tmp_path / "R1111"
    make(path, data, network)
    fewer = Dataset(data.name, Split(data.train.images[1:], data.train.labels[1:]), data.test, 10)
    with pytest.raises(NetworkError, match="has changed since R1111 was trained on it"):
        ensure_store(path, fewer, network, device=CPU)
    trained_on_fewer = Network(replace(network.record, data_hash=fewer.hash), network.chain)
    with pytest.raises(StoreError, match="the data set has changed since"):
        ensure_store(path, fewer, trained_on_fewer, device=CPU)
    with pytest.raises(StoreError, match="it holds bf16 instead of fp32"):
        ensure_store(path, data, network, dtype="fp32", device=CPU)
    assert ensure_store(path, data, network, dtype="fp32", device=CPU, content_only=True)[1] is False
    shutil.copytree(path, tmp_path / "R1112")
    other = Network(replace(network.record, name="R1112"), network.chain)
    with pytest.raises(StoreError, match="it holds another network"):
        ensure_store(tmp_path / "R1112", data, other, device=CPU)


def test_values_that_fp16_cannot_hold_are_refused(data: Dataset, network: Network, tmp_path: Path) -> None:
    scaled = load_copy(network)
    with torch.no_grad():
        scaled.chain.segments[4].bn2.weight.mul_(1e7)
    with pytest.raises(StoreError, match="R1111 has values at position layer4.0 that fp16 cannot hold"):
        ensure_store(tmp_path / "R1111", data, scaled, dtype="fp16", device=CPU)
    assert not (tmp_path / "R1111").exists()
    # a disk that was too small must not stay full
    assert not (tmp_path / "R1111.partial").exists()


def writer_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("store-writer")]


def test_overlapping_changes_no_byte(
    data: Dataset, network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next block is computed while one is written, and the store is that of one thing after the other."""
    # 16 images of position 0 per chunk: several blocks, whole chunks at every position, and a part at the end
    monkeypatch.setattr(writer_module, "CHUNK_BYTES", 1 << 18)
    monkeypatch.setattr(writer_module, "MAX_CHUNK_IMAGES", 64)
    computed, met, writers = threading.Event(), [], set()
    forward, write = precompute_module.forward_block, StoreWriter.write

    def forward_and_report(*arguments: Any) -> Any:
        block = forward(*arguments)
        if writers:
            computed.set()
        return block

    def write_late(*arguments: Any) -> None:
        writers.add(threading.current_thread())
        if not met:
            # the first write cannot end before another block has been computed
            met.append(computed.wait(timeout=60))
        write(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(precompute_module, "forward_block", forward_and_report)
        patched.setattr(StoreWriter, "write", write_late)
        make(tmp_path / "overlapping" / "R1111", data, network)
    assert met == [True]
    assert len(writers) == 1
    assert not writer_threads()
    identity = store_identity(data, network, dtype="bf16", compress="none", device=CPU)
    frozen = FrozenNetwork(network.chain, dtype=DTYPES[identity.compute], device=CPU)
    sizes = {"train": 300, "test": 70}
    with writing(tmp_path / "R1111", identity, network.chain.positions, sizes) as writer:
        assert writer.block_images == 64
        for name, split in (("train", data.train), ("test", data.test)):
            for start in range(0, len(split), 64):
                x = network.record.normalisation.apply(split.images[start : start + 64])
                for index, representation in enumerate(frozen.representations(x)):
                    writer.write(name, index, start, representation.permute(0, 2, 3, 1))
            writer.write_samples(name, split.labels, torch.arange(len(split)))
    assert contents(tmp_path / "overlapping" / "R1111") == contents(tmp_path / "R1111")


@pytest.mark.parametrize("failing", ["write", "write_samples", "forward", "report"])
def test_an_error_ends_the_writing_thread_and_leaves_no_store(
    failing: str, data: Dataset, network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt if failing == "report" else OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        if failing == "forward":
            patched.setattr(FrozenNetwork, "representations", fail)
        elif failing != "report":
            patched.setattr(StoreWriter, failing, fail)
        with pytest.raises(KeyboardInterrupt if failing == "report" else OSError, match="^$|No space left on device"):
            ensure_store(
                tmp_path / "R1111", data, network, device=CPU, **({"report": fail} if failing == "report" else {})
            )
    assert not writer_threads()
    assert not (tmp_path / "R1111").exists()
    # the next attempt finds neither the lock nor what is left of this one in its way
    assert make(tmp_path / "R1111", data, network).sizes == {"train": 300, "test": 70}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def load_copy(network: Network) -> Network:
    chain = network.record.build()
    chain.load_state_dict(network.chain.state_dict())
    return Network(network.record, chain)


def test_a_store_that_is_there_needs_no_lock(data: Dataset, network: Network, tmp_path: Path) -> None:
    path = tmp_path / "R1111"
    make(path, data, network)
    with exclusive(path.with_name("R1111.lock"), "the store of R1111"):
        assert ensure_store(path, data, network, device=CPU)[1] is False


def test_representations_that_do_not_fit_into_memory_are_refused_before_reading(
    data: Dataset, network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make(tmp_path / "R1111", data, network)
    monkeypatch.setattr("fastsitch.activations.resident_source.available_memory", lambda device: 20_000_000)
    with pytest.raises(MemoryLimitError, match=r"need \d+\.\d GB of cpu memory, 0\.0 GB are free"):
        ResidentSource.load(store, dtype=torch.float32, device=CPU)


def test_two_writers_do_not_meet(data: Dataset, network: Network, tmp_path: Path) -> None:
    path = tmp_path / "R1111"
    with (
        exclusive(path.with_name("R1111.lock"), "the store of R1111"),
        pytest.raises(BusyError, match="another process"),
    ):
        ensure_store(path, data, network, device=CPU)


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"compress": "lz4"}])
def test_unknown_formats_are_refused(options: dict[str, str], data: Dataset, network: Network, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected one of"):
        make(tmp_path / "R1111", data, network, **options)


def test_a_network_for_other_images_is_refused(network: Network, tmp_path: Path, fashion: Dataset) -> None:
    cropped = Split(fashion.test.images[:, :24, :24], fashion.test.labels)
    with pytest.raises(FastsitchError, match="npz:x.npz has changed since R1111 was trained on it"):
        make(tmp_path / "R1111", Dataset("npz:x.npz", cropped, cropped, 10), network)


def test_the_embedded_data_set_loads_from_the_package() -> None:
    assert len(load_dataset("fashion-mini", Path("unused")).train) == 10_000
