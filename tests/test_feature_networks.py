"""Networks without a classifier: senders as they are, receivers with a linear probe on their features."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import fastsitch
from fastsitch.data import Dataset, load_dataset
from fastsitch.errors import ConfigError, NetworkError
from fastsitch.network_names import NetworkName
from fastsitch.networks.checkpoint import Network, load_network
from fastsitch.networks.linear_probe import fit_probes
from fastsitch.root import Root
from tests.conftest import Command, save_npz

FILE = '''
import timm
import torch
from torch import nn
from fastsitch import Chain


def headless():
    return timm.create_model("test_resnet", num_classes=0)


def tokens():
    return Last(timm.create_model("test_vit", num_classes=0, img_size=32, patch_size=8))


class Last(nn.Module):
    """All tokens, as transformers without pooling give them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.forward_features(x)


def maps():
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU())


def chain():
    stem, body, end = nn.Conv2d(3, 8, 4, 4), nn.Sequential(nn.ReLU(), nn.Conv2d(8, 12, 3)), nn.ReLU()
    return Chain.from_segments([stem, body], ["stem", "body"], end, torch.zeros(1, 3, 32, 32))


def classifier(classes):
    body = [nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(512, 20), nn.ReLU()]
    return nn.Sequential(*body, nn.Linear(20, classes))


def several():
    return Several()


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, 8)
        self.last = nn.Conv2d(8, 16, 2, 2)

    def forward(self, x):
        y = self.last(torch.relu(self.stem(x)))
        return {"last_hidden_state": y.flatten(2).transpose(1, 2), "pooler_output": torch.tanh(y.amax((2, 3)))}


def products():
    return Products()


class Products(nn.Module):
    """A classifier whose last layer is none that torch knows."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 8, 8)
        self.weight = nn.Parameter(torch.randn(64, 10))

    def forward(self, x):
        return self.stem(x).flatten(1) @ self.weight


def nothing():
    return Nothing()


class Nothing(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 8, 8)

    def forward(self, x):
        return self.stem(x).flatten(1)[:, :0]
'''


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    path = tmp_path / "feature_nets.py"
    path.write_text(FILE)
    return path


@pytest.fixture
def some(fashion: Dataset, tmp_path: Path) -> str:
    """The name of a data set of 400 + 100 real images in a file."""
    save_npz(tmp_path / "some.npz", fashion.train, fashion.test, 400, 100)
    return f"npz:{tmp_path / 'some.npz'}"


def saved(root: Path, dataset: str, name: str = "net") -> Network:
    return load_network(Root.at(root).models(dataset), NetworkName.parse(name))


@pytest.mark.parametrize(
    ("factory", "width"),
    [("headless", 96), ("tokens", 64), ("maps", 12), ("chain", 12), ("classifier", 20), ("several", 16)],
)
def test_a_probe_is_fitted_to_the_features(factory: str, width: int, nets: Path, some: str, tmp_path: Path) -> None:
    definition, record = fastsitch.add("net", f"{nets}:{factory}", head="probe", dataset=some, root=tmp_path)
    assert record is not None
    network, images = saved(tmp_path, some), load_dataset(some, tmp_path)
    assert network.record == record
    # what the network's own code gives, with the weights that were saved
    (file,) = Root.at(tmp_path).models(some).glob("net.*.safetensors")
    weights = load_file(file)
    module = definition.source.build(10, definition.input_shape)
    if factory == "classifier":
        module[5] = nn.Identity()  # type: ignore[index,operator]
    module.load_state_dict({key.removeprefix("body."): x for key, x in weights.items() if key.startswith("body.")})
    transform = record.transform
    with torch.no_grad():
        outputs = module(transform.apply(images.train.images))
        outputs = outputs["pooler_output"] if factory == "several" else outputs
        features = {2: lambda x: x, 3: lambda x: x.mean(1), 4: lambda x: x.mean((2, 3))}[outputs.dim()](outputs)
        assert features.shape[1] == width
        (expected,) = fit_probes(features[None], images.train.labels, 10)
        assert torch.allclose(weights["probe.weight"].double(), expected.weight, rtol=1e-2, atol=1e-2)
        assert record.recipe["probe"]["strength"] == expected.strength
        assert record.recipe["probe"]["images"] == 400
        assert record.recipe["probe"]["train_accuracy"] == pytest.approx(expected.train_accuracy, abs=0.006)
        x = transform.apply(images.test.images)
        logits = network.chain(x)
        for index, representation in enumerate(network.chain.representations(x)):
            assert torch.equal(network.chain.tail(representation, index), logits)
        outputs = module(x)
        outputs = outputs["pooler_output"] if factory == "several" else outputs
        features = {2: lambda x: x, 3: lambda x: x.mean(1), 4: lambda x: x.mean((2, 3))}[outputs.dim()](outputs)
        by_hand = features @ weights["probe.weight"].T + weights["probe.bias"]
    assert torch.allclose(logits, by_hand, rtol=1e-4, atol=1e-4)
    assert record.accuracy == pytest.approx((logits.argmax(1) == images.test.labels).float().mean().item())
    assert record.accuracy > 0.3


def test_the_same_network_again_is_no_change_and_another_seed_is_one(nets: Path, some: str, tmp_path: Path) -> None:
    first = fastsitch.add("net", f"{nets}:maps", head="probe", dataset=some, root=tmp_path)
    assert fastsitch.add("net", f"{nets}:maps", head="probe", dataset=some, root=tmp_path) == first
    control, other = (saved(tmp_path, some, f"net-random@{seed}") for seed in (0, 1))
    assert not torch.equal(control.chain.head[1].weight, other.chain.head[1].weight)  # type: ignore[index]
    trained = saved(tmp_path, some)
    # a control's probe is drawn as torch's own linear layers are, not fitted
    bound = 12**-0.5
    assert control.chain.head[1].weight.abs().max() <= bound  # type: ignore[index]
    assert trained.chain.head[1].weight.abs().max() > bound  # type: ignore[index]
    assert control.record.accuracy is None
    assert again_equal(control, saved(tmp_path, some, "net-random@0"))


def again_equal(one: Network, other: Network) -> bool:
    return one.record.weights_hash == other.record.weights_hash


def test_senders_without_a_classifier(nets: Path, some: str, run_cli: Command, tmp_path: Path) -> None:
    torch.manual_seed(1)
    save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "w.safetensors")
    weights = ("--weights", tmp_path / "w.safetensors")
    options = ("--dataset", some)
    added = run_cli("add", "tower", "--from", f"{nets}:headless", *weights, *options)
    assert added.returncode == 0, added.stderr
    assert "gives 96 features, not one output for each of 10 classes: without --head probe" in added.stderr
    assert "no classifier: a sender only" in added.stdout
    # a name of a library: the classifier that it would be built with is left out
    bare = run_cli("add", "bare", "--from", "timm:test_resnet", *weights, "--head", "none", *options)
    assert bare.returncode == 0, bare.stderr
    assert re.search(r"^tower +npz:\S+ +\d+ +32x32 +none +weights of w.safetensors$", run_cli("list").stdout, re.M)
    for command in (
        ("sweep", "--senders", "bare", "--receivers", "bare,tower", *options),
        ("sweep", "--senders", "bare", "--receivers", "bare", "--loss", "match", "--dry-run", *options),
    ):
        refused = run_cli(*command)
        assert refused.returncode == 2
        assert refused.stderr == (
            "fastsitch: bare cannot be a receiver: it has no classifier, only features; add it with --head probe, or "
            "have it as a sender alone\n"
        )
    trained = run_cli("train", "tower@1", *options)
    assert trained.returncode == 2
    assert "tower@1 cannot be trained: it has no classifier" in trained.stderr
    assert run_cli("precompute", "tower", *options).returncode == 0
    assert run_cli("train", "R1111", "--width", "4", "--epochs", "1", *options).returncode == 0
    small = ("--batch-size", "16", "--epochs", "1", "--run", "first", *options)
    swept = run_cli("sweep", "--senders", "tower", "--receivers", "R1111", "--settings", "T2T,R2T", *small)
    assert swept.returncode == 0, swept.stderr
    assert (
        "is done already"
        in run_cli("sweep", "--senders", "tower", "--receivers", "R1111", "--settings", "T2T,R2T", *small).stderr
    )
    assert run_cli("export", "first", "--out", "results").returncode == 0
    exported = json.loads((tmp_path / "work" / "results" / "tower--R1111.T2T.json").read_text())
    assert exported["sender"]["accuracy"] is None
    assert run_cli("plot", "first", "--out", "maps").returncode == 0


@pytest.mark.slow
def test_a_receiver_with_a_probe(fashion: Dataset, run_cli: Command, tmp_path: Path) -> None:
    """A backbone that was trained, without its classifier: added, stored, stitched into and out of."""
    save_npz(tmp_path / "more.npz", fashion.train, fashion.test, 768, 150)
    data = ("--dataset", f"npz:{tmp_path / 'more.npz'}")
    assert run_cli("add", "full", "--from", "timm:test_resnet", *data).returncode == 0
    assert run_cli("train", "full", "--epochs", "5", *data).returncode == 0
    (weights,) = (tmp_path / "work").rglob("full.*.safetensors")
    added = run_cli("add", "tower", "--from", "timm:test_resnet", "--weights", weights, "--head", "probe", *data)
    assert added.returncode == 0, added.stderr
    shown = re.search(
        r"test accuracy (0\.\d+) \(added\), by a linear probe: strength \S+, (0\.\d+) on 768 training images",
        added.stdout,
    )
    assert shown is not None
    sweep = ("sweep", "--senders", "tower", "--receivers", "tower", "--positions", "layer?.0", *data)
    matched = run_cli(*sweep, "--loss", "match", "--settings", "T2T,T2R", "--run", "matched")
    assert matched.returncode == 0, matched.stderr
    run = fastsitch.open_run("matched", root=tmp_path / "work" / "fastsitch-data")
    own = run.networks[NetworkName("tower")].accuracy
    assert f"{own:.4f}" == shown[1]
    assert own > 0.6
    # the stitch from a position to itself is the identity
    itself = run.matrix("tower", "tower")[1:, 1:].diagonal()
    assert (abs(itself - own) <= 0.03).all(), (itself, own)
    assert run.matrix("tower", "tower", setting="T2R")[1:, 1:].max() < own - 0.2
    trained = run_cli(*sweep, "--batch-size", "32", "--epochs", "2", "--run", "trained")
    assert trained.returncode == 0, trained.stderr
    run = fastsitch.open_run("trained", root=tmp_path / "work" / "fastsitch-data")
    assert (run.matrix("tower", "tower", "status")[1:, 1:] == 1).all()
    assert run.matrix("tower", "tower")[4, 4] > own - 0.15
    assert run_cli("plot", "trained", "--out", "maps").returncode == 0
    assert re.search(r"^tower .* weights of full\.\w+\.safetensors, linear probe$", run_cli("list").stdout, re.M)
    # the last representation, averaged over its map, is the features
    probed = run_cli("probe", "tower", *data)
    assert probed.returncode == 0, probed.stderr
    last = re.search(r"^ +4 +layer4\.0 +96 +\S+ +(\S+) +(\S+)$", probed.stdout, re.M)
    assert last is not None
    assert abs(float(last[1]) - float(shown[2])) < 0.01
    assert abs(float(last[2]) - own) < 0.02


def test_published_weights_without_classifier(some: str, tmp_path: Path) -> None:
    """As DINOv2 is published: num_classes 0."""
    source, options = tower(tmp_path / "dino", 0), {"dataset": some, "root": tmp_path}
    model = weights_in(tmp_path / "dino", 0)
    definition, record = fastsitch.add("bare", source, pretrained=True, **options)  # type: ignore[arg-type]
    assert record is not None
    assert record.accuracy is None
    assert not definition.can_receive
    images = load_dataset(some, tmp_path)
    with torch.no_grad():
        x = record.transform.apply(images.test.images)
        assert torch.equal(saved(tmp_path, some, "bare").chain(x), model(x))
    definition, record = fastsitch.add("net", source, pretrained=True, head="probe", **options)  # type: ignore[arg-type]
    assert record is not None
    assert record.accuracy is not None
    assert record.accuracy > 0.3
    assert record.recipe["pretrained"]["name"] == source
    with torch.no_grad():
        chain = saved(tmp_path, some).chain
        probe = chain.head[1]  # type: ignore[index]
        assert torch.equal(chain(x), probe(model(x)))


def test_photos_of_several_sizes(fashion: Dataset, tmp_path: Path) -> None:
    """Files that are decoded as they are needed: the probe, and probes at all positions."""
    folder, count = tmp_path / "photos", {"train": 60, "test": 20}
    for split in ("train", "test"):
        images = getattr(fashion, split)
        for k in range(count[split]):
            path = folder / split / f"class{images.labels[k] // 5}" / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.images[k].numpy()).resize((40 + k % 7, 48)).save(path)
    dataset, source = f"imagefolder:{folder}", tower(tmp_path / "dino", 0)
    _, record = fastsitch.add("net", source, pretrained=True, head="probe", dataset=dataset, root=tmp_path)
    assert record is not None
    assert record.recipe["probe"]["images"] == 60
    (probes,) = fastsitch.probe("net", dataset=dataset, root=tmp_path)
    assert probes.accuracy == record.accuracy
    assert max(each.train_accuracy for each in probes.positions) > 0.5


def tower(folder: Path, classes: int) -> str:
    """A small transformer as timm publishes one; its weights are drawn."""
    torch.manual_seed(3)
    folder.mkdir()
    model = timm.create_model("test_vit", num_classes=classes, img_size=32)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    published = {"input_size": [3, 32, 32], "crop_pct": 1.0, "interpolation": "bicubic", "num_classes": classes}
    published |= {"mean": [0.5] * 3, "std": [0.5] * 3, "first_conv": "patch_embed.proj", "classifier": "head"}
    config = {"architecture": "test_vit", "model_args": {"img_size": 32}, "pretrained_cfg": published}
    (folder / "config.json").write_text(json.dumps({**config, "num_classes": classes}))
    return f"timm:local-dir:{folder}"


def weights_in(folder: Path, classes: int) -> nn.Module:
    model: nn.Module = timm.create_model("test_vit", num_classes=classes, img_size=32)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def test_a_published_classifier_is_replaced(some: str, tmp_path: Path) -> None:
    """Classes of others, or the projection of CLIP, whose tower counts 512 numbers as its classes."""
    source, model = tower(tmp_path / "clip", 24), weights_in(tmp_path / "clip", 24)
    with pytest.raises(NetworkError, match=r"24 outputs and .* 10 classes.* or take a linear probe: head='probe'"):
        fastsitch.add("net", source, pretrained=True, dataset=some, root=tmp_path)
    _, record = fastsitch.add("net", source, pretrained=True, head="probe", dataset=some, root=tmp_path)
    assert record is not None
    model.head = nn.Identity()
    with torch.no_grad():
        x = record.transform.apply(load_dataset(some, tmp_path).test.images)
        chain = saved(tmp_path, some).chain
        assert torch.equal(chain(x), chain.head[1](model.eval()(x)))  # type: ignore[index,operator]


def test_weights_of_a_file_without_their_head(some: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = timm.create_model("test_resnet", num_classes=7)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "c.pt")
    with pytest.raises(NetworkError, match="give head='new' to leave the head untrained, head='probe' to fit one"):
        fastsitch.add("net", "timm:test_resnet", weights=tmp_path / "c.pt", dataset=some, root=tmp_path)
    _, record = fastsitch.add(
        "net", "timm:test_resnet", weights=tmp_path / "c.pt", head="probe", dataset=some, root=tmp_path
    )
    assert record is not None
    assert record.recipe["head"] == "probe"
    model.reset_classifier(0)
    with torch.no_grad():
        x = record.transform.apply(load_dataset(some, tmp_path).test.images)
        chain = saved(tmp_path, some).chain
        assert torch.equal(chain(x), chain.head[1](model.eval()(x)))  # type: ignore[index,operator]


def test_a_classifier_that_is_not_found_is_taken_for_features(
    nets: Path, few: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    definition, _ = fastsitch.add("net", f"{nets}:products", head="probe", dataset=few, root=tmp_path)
    assert definition.features is not None
    assert (definition.features.width, definition.features.left_out) == (10, ())
    assert "no layer with 10 outputs was found that runs last: all that it gives is taken for features" in caplog.text
    caplog.clear()
    definition, _ = fastsitch.add("other", f"{nets}:classifier", head="probe", dataset=few, root=tmp_path)
    assert definition.features is not None
    assert (definition.features.width, definition.features.left_out) == (20, ("5",))
    assert "was found" not in caplog.text


def test_what_cannot_be_added_is_refused(nets: Path, few: str, tmp_path: Path) -> None:
    cases = {
        "headless": (NetworkError, {}, "neither a classifier nor weights, .* or head='probe'"),
        "nothing": (NetworkError, {"head": "probe"}, r"it gives no features, \(0,\) per image"),
        "maps": (NetworkError, {"classes": 12}, r"gives \(12, 8, 8\) outputs per image: expected 12, one per class"),
        "classifier": (ConfigError, {"head": "old"}, "head='old': expected one of new, probe, none"),
    }
    for factory, (kind, options, line) in cases.items():
        with pytest.raises(kind, match=line):
            fastsitch.add("net", f"{nets}:{factory}", dataset=few, root=tmp_path, **options)  # type: ignore[arg-type]
    assert not list(tmp_path.rglob("*.json"))
    with pytest.raises(ConfigError, match="leave out classes_from"):
        fastsitch.add("net", "timm:test_vit", pretrained=True, head="probe", classes_from="x", root=tmp_path)
