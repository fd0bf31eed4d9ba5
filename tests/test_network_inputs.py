"""Networks that differ in resolution and normalisation are stitched on the same images in the same order."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

import fastsitch
from fastsitch.activations.image_order import ImageOrder
from fastsitch.activations.precompute import store_identity
from fastsitch.activations.representations import Representations
from fastsitch.activations.store import ActivationStore
from fastsitch.activations.store_writer import writing
from fastsitch.data import Dataset, Normalisation, load_dataset
from fastsitch.kernels.reference import conv_weight
from fastsitch.network_names import NetworkName
from fastsitch.networks.checkpoint import Network, load_network
from fastsitch.root import Root
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.stitching.geometry import Geometry
from tests.conftest import Command, save_npz

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = {"R1111": 32, "R2111": 16, "R1112": 64}
TRAIN, TEST, EPOCHS = 160, 80, 8
ORDER = ImageOrder(seed=3, block=32, window=64)


@pytest.fixture(scope="module")
def root_and_dataset(fashion: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """R1111 trained at 32x32, R2111 at 16x16, R1112 at 64x64 with another mean and std; the name of the data set."""
    folder = tmp_path_factory.mktemp("inputs")
    save_npz(folder / "small.npz", fashion.train, fashion.test, TRAIN, TEST)
    dataset = f"npz:{folder / 'small.npz'}"
    options = {"dataset": dataset, "width": 4, "epochs": EPOCHS, "root": folder}
    fastsitch.train("R1111", **options)
    fastsitch.train("R2111", resolution=16, **options)
    fastsitch.train("R1112", resolution=64, normalisation=Normalisation(MEAN, STD), **options)
    return folder, dataset


def networks(root_and_dataset: tuple[Path, str]) -> dict[str, Network]:
    root, dataset = root_and_dataset
    return {name: load_network(Root.at(root).models(dataset), NetworkName.parse(name)) for name in SIDE}


def network_inputs(name: str, data: Dataset, images: Tensor) -> Tensor:
    """The inputs of a network, made from uint8 images by torchvision."""
    pixels = functional.to_dtype(images.permute(0, 3, 1, 2), torch.float32, scale=True)
    normalisation = Normalisation(MEAN, STD) if name == "R1112" else data.normalisation
    return functional.normalize(
        functional.resize(pixels, [SIDE[name]] * 2), list(normalisation.mean), list(normalisation.std)
    )


def test_the_record_holds_the_resolution_and_normalisation(root_and_dataset: tuple[Path, str]) -> None:
    root, dataset = root_and_dataset
    data = load_dataset(dataset, root)
    for name, network in networks(root_and_dataset).items():
        record = network.record
        assert record.input_shape == (3, SIDE[name], SIDE[name])
        assert record.normalisation == (Normalisation(MEAN, STD) if name == "R1112" else data.normalisation)
        torch.testing.assert_close(
            record.transform.apply(data.test.images), network_inputs(name, data, data.test.images), rtol=0, atol=1e-5
        )
        with torch.no_grad():
            logits = network.chain(network_inputs(name, data, data.test.images))
        accuracy = (logits.argmax(-1) == data.test.labels).double().mean().item()
        assert record.accuracy == pytest.approx(accuracy, abs=1.5 / TEST)


def test_training_again_with_another_transform_is_refused(root_and_dataset: tuple[Path, str]) -> None:
    root, dataset = root_and_dataset
    options = {"dataset": dataset, "width": 4, "epochs": EPOCHS, "root": root}
    (again,) = fastsitch.train("R2111", resolution=16, **options)
    assert again == networks(root_and_dataset)["R2111"].record
    with pytest.raises(fastsitch.FastsitchError, match=r"resolution \(16, 16\) instead of \(32, 32\); use force=True"):
        fastsitch.train("R2111", **options)
    with pytest.raises(fastsitch.FastsitchError, match=r"mean \(0\.485, .*std \(0\.229, "):
        fastsitch.train("R1112", resolution=64, **options)
    for side in (0, 20, -8):
        with pytest.raises(fastsitch.FastsitchError, match=f"resolution={side}: expected a multiple of 8"):
            fastsitch.train("R1121", resolution=side, **options)


def test_a_control_that_could_have_two_resolutions_is_refused(
    root_and_dataset: tuple[Path, str], tmp_path: Path
) -> None:
    _, dataset = root_and_dataset
    options = {"dataset": dataset, "width": 4, "epochs": 1, "root": tmp_path}
    fastsitch.train("R1111", **options)
    fastsitch.train("R1111@1", resolution=16, **options)
    with pytest.raises(fastsitch.FastsitchError, match="R1111-random@0 is ambiguous: R1111, R1111@1 differ in resol"):
        fastsitch.precompute("R1111-random@0", dataset=dataset, root=tmp_path)


def test_all_sources_give_the_same_images_in_the_same_order(root_and_dataset: tuple[Path, str]) -> None:
    """From every source, for every network; values are those that plain modules compute."""
    root, dataset = root_and_dataset
    data, known = load_dataset(dataset, root), networks(root_and_dataset)
    sequence = ORDER.epoch(0, TRAIN)
    for name, network in known.items():
        fastsitch.precompute(name, dataset=dataset, dtype="fp32", root=root, force=True)
        with torch.no_grad():
            wanted = network.chain.representations(network_inputs(name, data, data.train.images))
        ordered = []
        for kind in ("resident", "streamed", "live"):
            opened = Representations(
                Root.at(root),
                data,
                lambda network_name: known[str(network_name)],
                source=lambda _, kind=kind: kind,  # type: ignore[misc]
                dtype=torch.float32,
                device=CPU,
            )
            source, in_order, origin = opened.sender(NetworkName.parse(name))
            assert origin.identity.normalisation.get("resolution") == (
                None if SIDE[name] == 32 else [SIDE[name], SIDE[name]]
            )
            done = 0
            for batch in source.train.shuffled(ORDER, 0, 24):
                index = sequence[done : done + 24]
                assert torch.equal(batch.labels, data.train.labels[index])
                for position, shape in enumerate(source.shapes):
                    stack_index = list(source.shapes[:position]).count(shape)
                    values = batch.values(shape, stack_index).permute(0, 3, 1, 2)
                    # a live store's rounding is bf16, the others' here fp32
                    assert_near(values, wanted[position][index], 0.02 if kind == "live" else 1e-3)
                done += len(batch)
            assert done == TRAIN // 24 * 24
            ordered.append([in_order.images(p, 0, TRAIN) for p in range(len(source.shapes))])
        for one, other in zip(ordered[0], ordered[1], strict=True):
            assert torch.equal(one, other)


def assert_near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_live_and_stored_representations_are_the_same_bits(root_and_dataset: tuple[Path, str]) -> None:
    root, dataset = root_and_dataset
    data, known = load_dataset(dataset, root), networks(root_and_dataset)
    for name in SIDE:
        fastsitch.precompute(name, dataset=dataset, root=root, force=True)
        both = []
        for kind in ("streamed", "live"):
            opened = Representations(
                Root.at(root),
                data,
                lambda network_name: known[str(network_name)],
                source=lambda _, kind=kind: kind,  # type: ignore[misc]
                dtype=torch.float32,
                device=CPU,
            )
            _, in_order, origin = opened.sender(NetworkName.parse(name))
            both.append([in_order.images(p, 0, TRAIN) for p in range(len(in_order.shapes))] + [origin.identity.hash])
        for one, other in zip(*both, strict=True):
            assert one == other if isinstance(one, str) else torch.equal(one, other)


@pytest.mark.slow
def test_the_commands_stitch_them_end_to_end(
    root_and_dataset: tuple[Path, str], tmp_path: Path, run_cli: Command
) -> None:
    root, dataset = root_and_dataset
    names = ",".join(SIDE)

    def run(*arguments: str) -> str:
        ended = run_cli(*arguments, "--root", root, "--dataset", dataset)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    run("train", "R2111", "--width", "4", "--epochs", str(EPOCHS), "--resolution", "16")
    options = ["--senders", names, "--receivers", names, "--recipe", "small", "--epochs", "0.2", "--batch-size", "16"]
    dry = run("sweep", *options, "--dry-run")
    assert re.search(r"R2111 .*16x16", dry)
    # in fp32, so that plain modules see the same
    run("precompute", *SIDE, "--dtype", "fp32", "--force")
    run("sweep", *options, "--run", "vanilla", "--precision", "fp32")
    run("sweep", *options, "--loss", "match", "--run", "matched", "--precision", "fp32")
    pair = ["--senders", "R2111", "--receivers", "R1112", "--batch-size", "16"]
    run("sweep", *pair, "--settings", "R2R", "--epochs", "1", "--run", "controls", "--source", "live")
    run("export", "vanilla", "--out", str(tmp_path / "out"))
    run("plot", "vanilla", "--out", str(tmp_path / "out"))
    run("tables", "vanilla", "--out", str(tmp_path / "out"))
    run("images", "vanilla", "--senders", "R2111", "--receivers", "R1112", "--settings", "T2T", "--images", "3,5")

    data, known = load_dataset(dataset, root), networks(root_and_dataset)
    for kind in ("vanilla", "matched"):
        found = fastsitch.open_run(kind, root=root)
        for sender, receiver in (("R2111", "R1112"), ("R1112", "R1111"), ("R1111", "R2111")):
            accuracy = found.matrix(sender, receiver, "accuracy")
            loss = "task" if kind == "vanilla" else "match"
            unit = Unit(sender=sender, receiver=receiver, setting="T2T", loss=loss, seed=0)
            for i, j in ((0, 0), (4, 1), (2, 4)):
                stitch = found.read_stitch(Cell(unit, i, j))
                logits = stitched(
                    known[sender], known[receiver], network_inputs(sender, data, data.test.images), stitch, i, j
                )
                rebuilt = (logits.argmax(-1) == data.test.labels).double().mean().item()
                # one image may fall on the other side
                assert abs(rebuilt - accuracy[i, j]) <= 1.5 / TEST
    sidecar = json.loads((tmp_path / "out" / "R2111--R1112.T2T.json").read_text())
    assert sidecar["sender"]["transform"]["resolution"] == [16, 16]
    assert sidecar["receiver"]["transform"] == {"mean": list(MEAN), "std": list(STD), "resolution": [64, 64]}
    assert "transform" not in json.loads((tmp_path / "out" / "R1111--R2111.T2T.json").read_text())["sender"]
    folder = found.path.parent / "vanilla" / "images"
    drawn = np.load(folder / "R2111--R1112.T2T.npz")
    assert drawn["vanilla"].shape == (6, 2, 64, 64, 3)
    shown = functional.resize(data.test.images[[3, 5]].permute(0, 3, 1, 2) / 255, [64, 64])
    np.testing.assert_allclose(drawn["actual"], shown.permute(0, 2, 3, 1).numpy(), atol=1e-5)
    assert matplotlib.image.imread(folder / "R2111--R1112.T2T.matched.png").size > 0


def stitched(sender: Network, receiver: Network, x: Tensor, stitch: Sequence[Tensor], i: int, j: int) -> Tensor:
    """Logits of a stitched network, of plain modules alone."""
    geometry = Geometry.between(sender.chain.positions[i].shape, receiver.chain.positions[j].shape)
    weight, bias = stitch
    with torch.no_grad():
        provided = sender.chain.representations(x)[i]
        if geometry.up > 1:
            provided = nn.Upsample(scale_factor=geometry.up)(provided)
        made = nn.functional.conv2d(provided, conv_weight(weight, geometry.down), bias, stride=geometry.down)
        return receiver.chain.tail(made, j)


def test_matching_compares_representations_of_the_same_images(root_and_dataset: tuple[Path, str]) -> None:
    """The matched stitch of a cell is the least-squares solution between representations that plain modules compute."""
    root, dataset = root_and_dataset
    data, known = load_dataset(dataset, root), networks(root_and_dataset)
    run = fastsitch.sweep(
        "R1112", "R1111", dataset=dataset, loss="match", source="live", precision="fp32", root=root, recipe="small"
    )
    unit = Unit(sender="R1112", receiver="R1111", setting="T2T", loss="match", seed=0)
    with torch.no_grad():
        provided = known["R1112"].chain.representations(network_inputs("R1112", data, data.train.images))
        expected = known["R1111"].chain.representations(network_inputs("R1111", data, data.train.images))
    # 64x64 and 32x32 maps meet: positions of equal size
    for i, j in ((2, 0), (3, 2), (4, 3)):
        x, y = (part.permute(0, 2, 3, 1).flatten(0, 2).double() for part in (provided[i], expected[j]))
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
        best = torch.linalg.lstsq(x, y, driver="gelsd").solution
        error = (x @ best - y).square().mean().item()
        assert run.matrix("R1112", "R1111", "matched_error")[i, j] == pytest.approx(error, rel=0.02)
        weight, bias = run.read_stitch(Cell(unit, i, j))
        saved = (x @ torch.cat([weight, bias[None]]).double() - y).square().mean().item()
        assert saved == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("what", ["sample ids", "labels"])
@pytest.mark.parametrize("role", ["sender", "receiver"])
def test_stores_of_other_samples_are_refused(
    what: str, role: str, root_and_dataset: tuple[Path, str], tmp_path: Path, run_cli: Command
) -> None:
    _, dataset = root_and_dataset
    path = other_samples(root_and_dataset, tmp_path / "copy", "R1111" if role == "sender" else "R2111", what)
    ended = run_cli(
        *("sweep", "--senders", "R1111", "--receivers", "R2111", "--loss", "match", "--batch-size", "16"),
        *("--dataset", dataset, "--root", tmp_path / "copy"),
    )
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert f"{path} holds other samples than {dataset}, or in another order: the {what} in train differ" in line
    assert "precompute" in line
    assert not list((tmp_path / "copy").rglob("runs/*/*"))


def other_samples(root_and_dataset: tuple[Path, str], copy: Path, name: str, what: str) -> Path:
    """A copy of the root in which a network's store, complete and valid, has two samples exchanged."""
    root, dataset = root_and_dataset
    source, target = Root.at(root), Root.at(copy)
    target.models(dataset).mkdir(parents=True)
    for file in source.models(dataset).iterdir():
        (target.models(dataset) / file.name).write_bytes(file.read_bytes())
    data, network = load_dataset(dataset, root), networks(root_and_dataset)[name]
    fastsitch.precompute(name, dataset=dataset, root=root, force=True)
    store = ActivationStore.open(source.store(dataset, NetworkName.parse(name)))
    identity = store_identity(data, network, dtype="bf16", compress="none", device=CPU)
    path = target.store(dataset, NetworkName.parse(name))
    with writing(path, identity, store.positions, store.sizes) as writer:
        for split, images in store.sizes.items():
            for position in store.positions:
                writer.write(split, position.index, 0, store.read(split, position.index, 0, images))
            swapped = torch.arange(images)
            first = int(torch.nonzero(store.labels(split) != store.labels(split)[0])[0])
            swapped[[0, first]] = swapped[[first, 0]]
            labels, ids = store.labels(split), store.ids(split)
            writer.write_samples(
                split, labels[swapped] if what == "labels" else labels, ids[swapped] if what == "sample ids" else ids
            )
    return path


def test_stores_of_other_data_are_refused(root_and_dataset: tuple[Path, str], tmp_path: Path, run_cli: Command) -> None:
    """A receiver's store whose data hash differs from the sender's."""
    _, dataset = root_and_dataset
    path = other_samples(root_and_dataset, tmp_path / "copy", "R2111", "labels")
    store = ActivationStore.open(path)
    parts = {
        (split, position.index): store.read(split, position.index, 0, images)
        for split, images in store.sizes.items()
        for position in store.positions
    }
    with writing(path, replace(store.identity, data="another"), store.positions, store.sizes) as writer:
        for (split, index), values in parts.items():
            writer.write(split, index, 0, values)
        for split, images in store.sizes.items():
            writer.write_samples(split, store.labels(split), torch.arange(images))
    ended = run_cli(
        *("sweep", "--senders", "R1111", "--receivers", "R2111", "--loss", "match", "--batch-size", "16"),
        *("--dataset", dataset, "--root", tmp_path / "copy"),
    )
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert f"{path} is stale: the data set has changed since" in line
    assert not list((tmp_path / "copy").rglob("runs/*/*"))
