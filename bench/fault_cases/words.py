"""Command lines that work, and what their arguments and options must not be."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bench.fault_cases.stage import DATA, ROOT, SWEEP, TRAIN
from fastsitch.vocabulary import (
    ClassToken,
    Compile,
    Compression,
    FigureKind,
    Init,
    Kernel,
    Loss,
    Metric,
    NetworkRecipe,
    Optimizer,
    Precision,
    ReceiverBN,
    Resample,
    ScaleName,
    Solver,
    SourceName,
    SplitName,
    StitchRecipe,
    StoredDtype,
    StudyName,
)

_BIG = "1" + 30 * "0"
RED, LONG, _TWO_LINES = "\x1b[31mred", "x" * 5000, "one\ntwo"
ODD = (RED, LONG, _TWO_LINES, "\N{COLLISION SYMBOL}", "a\tb")
_NO_NUMBER = ("many", "", "1 2", "½", "²", "Ⅻ", "0x10", "1,5", "--", "1..0", *ODD)
_NO_NETWORK = (
    *("R1113", "R111", "R11111", "r1111", "R0000", "ResNet50", "ResNet", "R1111@", "R1111@-1", "R1111@x", "R1111@1.5"),
    *("R1111@1234567890", "R1111@\u0661", "R\u0661111", "R1111--random@0", "R1111@0@1", "R1111.safetensors"),
    *("../R1111", "R1111/", "R1111:0", "unheard_of", "R1111;R1112", "1R", "R1111-randum@0"),
    *ODD,
)
_UNTRAINED = ("R1122", "R1111@7", "mine@5", "R2222-random@0", "ResNet18")
_NO_DATA = (
    *("mnist", "", "npz:", "npz:none.npz", "npz:root", "npz:mine.py", "imagefolder:none", "imagefolder:few.npz"),
    *("fashion-mini:0", "fashion-mini:-5", "fashion-mini:99999999", "fashion-mini:x", "fashion-mini:1_0"),
    *("fashion-mini:\u0665", "fashion-mini:007", "fashion-mini:", "NPZ:few.npz", "npz:few.npz@32", "few.npz"),
    *("hf:", "hf:a/b/c", "hf:root", "hf:json", "hf:a/b@64@64", "python:none", "python:a b", "python:"),
    *("imagefolder:root", "imagefolder:none@32", "cifar10:0", "cifar100:50001", "npz:/dev/null"),
    *("fashion-mini@train=0", "fashion-mini@train=x", "fashion-mini@64", "fashion-mini@train=5", "cifar10@"),
    *(
        "fashion-mini@test=20@test=30",
        "fashion-mini@train=10001",
        "fashion-mini@test=\u0665",
        "npz:few.npz@train=99999",
    ),
    *(
        "fashion-mini@holdout=0.2",
        "npz:few.npz@holdout=0.2",
        "imagefolder:none@holdout=2",
        "imagefolder:root@holdout=.2",
    ),
    *ODD,
)
_NO_FOLDER = ("", "few.npz", "few.npz/below", "mine.py/a/b", "/dev/null", "/proc/x/y", "f" * 300, "/dev/null/x")
_NO_RUN = ("nosuch", "", "../run", "run/", "/run", "run.partial", "r" * 200, "run ", "Run", ".", "..", "rün", *ODD)
_NO_NEW_RUN = ("", "../x", "a/b", ".x", "x" * 101, "x y", "ü", "x.partial", "x:y", "x*", *ODD)
_NO_DEVICE = ("tpu", "", "cpu:x", "gpu", "CPU", "meta", "cuda:99", "cuda:-1", "cpu,cuda", *ODD)
_NO_SETTING = ("T2X", "", "t2t", "T2T;R2T", "T2T R2T", "TT", ",", "2T2", "R2R2", *ODD)
_NO_MEMORY = ("lots", "", "0", "-1GB", "8XB", "nan", "1e", "GB", "1..5GB", "8 8GB", "inf", "1e400GB", "0.1B", *ODD)

WRONG: dict[str, tuple[str, ...]] = {
    "whole": (*_NO_NUMBER, "1.5", "nan", "inf", "-1", "1e3", "-" + _BIG),
    "whole from 1": (*_NO_NUMBER, "1.5", "nan", "inf", "-1", "0", "1e3"),
    "small": (*_NO_NUMBER, "1.5", "nan", "inf", "-1", "0", "1e3", _BIG, "100001"),
    "huge": (*_NO_NUMBER, "1.5", "nan", "inf", "-1", "0", "1e3", _BIG),
    "images": (*_NO_NUMBER, "1.5", "nan", "inf", "-1", "0", "1e3", _BIG, "10001"),
    "share": (*_NO_NUMBER, "0", "1", "-0.2", "2", "nan", "inf", "0.2"),
    "eights": (*_NO_NUMBER, "7", "-8", "0", "12", "1.5", "8e1"),
    "number": (*_NO_NUMBER, "nan", "inf", "-inf", "-1", "0", "1e400", "-0.0", "1e-400"),
    "sides": (*_NO_NUMBER, "0", "8x", "x8", "8x8x8", "-8", "99999", "8X8", "8 x 8", "0x0", "1.5", "nan"),
    "seeds": ("a", "0,a", "1.5", "-1", ",", "nan", "½", "0;1", "0-3", "", "0x1", *ODD),
    "indices": ("a", "0,a", "1.5", "-1", ",", "64", _BIG, "0-3", "", *ODD),
    "sizes": ("a", "1,a", "1.5", "-1", "0", ",", "nan", *ODD),
    "group": ("0", "-1", "many", "1.5", "", "AUTO", "½", "²", "auto,1", *ODD),
    "mean": ("a", "1,2", "nan", "", "1,2,3,4", ",", "inf", "0.5;0.5", "0,0,nan", *ODD),
    "std": ("a", "1,2", "nan", "", "1,2,3,4", ",", "inf", "0", "-1", "1,1,0", "1,1,-inf", *ODD),
    "layout": (
        *ODD,
        *("stem", "=map", "stem=", "stem=maps", "stem=tokens:0x3", "stem=tokens:axb", "nosuch=map"),
        *("stem=tokens:3", "stem=tokens:2x2", "stem=vector", "stem=tokens:-1+8x8", "stem=tokens:1+8x8"),
    ),
    "cut": ("nosuch", "layer9.*", "", ",", "[", "STEM", *ODD),
    "positions": ("nosuch", "layer9.*", "", ",", "[", "STEM", "stem.0", "layer1", *ODD),
    "network": _NO_NETWORK,
    "trained": (*_NO_NETWORK, *_UNTRAINED),
    "names": (*_NO_NETWORK, *_UNTRAINED, "", ",", "R1111-random@0", "R1111,R1113", "R1111 R1112"),
    "some names": (*_NO_NETWORK, "", ",", "R2222", "R1111,R2222", "R1111 R1112"),
    "study names": (*_NO_NETWORK, ",", "ResNet34", "R1111@1", "R1111-random@0"),
    "new network": ("R1111", "ResNet18", "mine@5", "1x", "", "x-y", "x" * 65, "ü", "x.y", "R9", "r1111", "a b", *ODD),
    "source": (
        "",
        "mine.py",
        "mine.py:",
        "none.py:small",
        "mine.py:none",
        "few.npz:small",
        "torchvision:",
        "timm:",
        *("torchvision:resnet19", "timm:resnet19x", "torch:resnet18", "mine.py:small()", "root:small"),
        *ODD,
    ),
    "weights": ("", "none.safetensors", "few.npz", "mine.py", "root", "/dev/null", *ODD),
    "data": _NO_DATA,
    "data of the run": (*_NO_DATA, "fashion-mini", "cifar10", "npz:mine.npz"),
    "settings": _NO_SETTING,
    "run settings": (*_NO_SETTING, "R2R", "T2T,R2T"),
    "stages": ("tabels", "", ",", "train;sweep", "TRAIN", "train sweep", "all", *ODD),
    "colour": ("", "purple", "#fff", "#12345g", "255", "rgb(0,0,0)", "white", *ODD),
    "device": (*_NO_DEVICE, *(() if torch.cuda.is_available() else ("cuda", "cuda:0"))),
    "memory": _NO_MEMORY,
    "run": _NO_RUN,
    "new run": _NO_NEW_RUN,
    "folder": _NO_FOLDER,
    "old folder": (*_NO_FOLDER, "nowhere"),
    "root": ("", "few.npz", "mine.py", "/dev/null"),
    "stores": ("", "few.npz", "/dev/null", "s3:/b", "s3://", "ftp://x/y", "file:///x", "s3:bucket/x"),
    "file": ("", "root", "few.npz/x", "/dev/null", "/proc/x", "f" * 300),
    "address": ("", "nowhere", "host:port", "127.0.0.1", "http://x:1", "localhost:", *ODD),
}
"""Values that are wrong by the rules of ``--help`` and the guides, whatever a command makes of them."""


@dataclass(frozen=True)
class Line:
    """A command line that works, and of what kind its arguments and options are: a key of WRONG, or a Literal."""

    arguments: tuple[str, ...]
    options: Mapping[str, Any]
    positional: tuple[tuple[int, str], ...] = ()
    """Where they are, and of what kind."""
    required: tuple[str, ...] = ()
    begins: bool = True
    """Whether it takes no time as it is."""


_PARTS = {"--background": "colour", "--holdout": "share", "--train-images": "images", "--test-images": "images"}
"""Of data sets that are no folders: what has images of a folder alone is wrong with every value."""
_COMMON = {"--root": "folder", "--device": "device"}
_RUN = {"--dataset": "data of the run", "--root": "folder"}
_STITCHES = {
    "--settings": "settings", "--seeds": "seeds", "--recipe": StitchRecipe, "--epochs": "number", "--solver": Solver,
    "--receiver-bn": ReceiverBN, "--memory": "memory", "--device": "device", "--ray": "address", "--root": "folder",
}  # fmt: skip
LINES: dict[str, Line] = {
    "train": Line(
        ("train", "R1111", *TRAIN[3:]),
        {**_COMMON, "--width": "small", "--resolution": "eights", "--seed": "whole", "--dataset": "data"}
        | {**_PARTS, "--recipe": NetworkRecipe, "--epochs": "whole from 1"},
        positional=((1, "network"),),
    ),
    "add": Line(
        ("add", "fresh", "--from", "mine.py:small", *DATA, *ROOT),
        {**_COMMON, "--from": "source", "--weights": "weights", "--positions": "cut", "--layout": "layout"}
        | {"--classes": "small", "--mean": "mean", "--std": "std", "--resolution": "sides", "--dataset": "data"}
        | _PARTS,
        positional=((1, "new network"),),
        required=("--from",),
    ),
    "precompute": Line(
        ("precompute", "R1111", *ROOT),
        {**_COMMON, "--dataset": "data", "--dtype": StoredDtype, "--compress": Compression, "--activations": "stores"}
        | {"--ray": "address", **_PARTS},
        positional=((1, "trained"),),
    ),
    "sweep": Line(
        (*SWEEP, "--run", "run"),
        {**_STITCHES, "--senders": "names", "--receivers": "names", "--positions": "positions", "--dataset": "data"}
        | _PARTS
        | {"--lr": "number", "--optimizer": Optimizer, "--batch-size": "small", "--loss": Loss, "--init": Init}
        | {"--resample": Resample, "--class-token": ClassToken, "--group-size": "group", "--source": SourceName}
        | {"--precision": Precision, "--kernel": Kernel, "--compile": Compile, "--run": "new run"}
        | {"--activations": "stores"},
        required=("--senders", "--receivers"),
    ),
    "paper": Line(
        ("paper", "--scale", "small", "--dry-run", *ROOT),
        {**{name: kind for name, kind in _STITCHES.items() if name != "--ray"}, "--root": "root"}
        | {"--study": StudyName, "--scale": ScaleName, "--networks": "study names", "--stages": "stages"},
    ),
    "export": Line(
        ("export", "run", "--out", "o/new", *ROOT),
        {**_RUN, "--out": "folder"},
        positional=((1, "run"),),
        required=("--out",),
    ),
    "plot": Line(
        ("plot", "run", "--out", "o/new", *ROOT),
        {**_RUN, "--out": "folder", "--metric": Metric, "--figure": FigureKind, "--matched": "run"},
        positional=((1, "run"),),
        required=("--out",),
    ),
    "tables": Line(
        ("tables", "run", *ROOT),
        {**_RUN, "--split": SplitName, "--device": "device", "--out": "folder", "--activations": "stores"},
        positional=((1, "run"),),
    ),
    "images": Line(
        ("images", "run", *ROOT),
        {**_RUN, "--senders": "some names", "--receivers": "some names", "--settings": "run settings"}
        | {"--images": "indices", "--count": "small", "--seed": "whole", "--memory": "memory", "--device": "device"}
        | {"--out": "folder", "--activations": "stores"},
        positional=((1, "run"),),
    ),
    "compare": Line(("compare", "run", *ROOT), _RUN, positional=((1, "run"),)),
    "list": Line(("list", *ROOT), {"--root": "old folder"}),
    "doctor": Line(("doctor", *ROOT), {"--device": "device"}),
    "bench": Line(
        ("bench", "--width", "4", "--repeats", "1", *ROOT),
        {"--root": "root", "--sender": "network", "--receiver": "network"}
        | {"--width": "small", "--device": "device"}
        | {"--batch-size": "huge", "--group-sizes": "sizes", "--repeats": "whole from 1"}
        | {"--precision": Precision, "--kernel": Kernel}
        | {"--compile": Compile, "--json": "file"},
        begins=False,
    ),
    "demo": Line(("demo", "--width", "4", *ROOT), {**_COMMON, "--width": "small", "--out": "folder"}, begins=False),
}  # fmt: skip
ELSEWHERE = {"--data-dir", "--ray", "--help", "-h", "--debug", "--dry-run", "--force", "--peers", "--tune"}
"""Options without a value, or whose value is not always read: of some data sets alone, or not by a dry run."""

CONTRADICTIONS: tuple[tuple[tuple[str, ...], str], ...] = (
    ((*SWEEP, "--run", "c", "--solver", "sgd"), "--solver sgd"),
    ((*SWEEP, "--run", "c", "--loss", "match", "--init", "matched"), "--init matched"),
    ((*SWEEP, "--run", "c", "--loss", "match", "--receiver-bn", "batch"), "--receiver-bn batch"),
    ((*SWEEP, "--run", "c", "--optimizer", "preconditioned"), "--optimizer preconditioned"),
    ((*SWEEP, "--run", "c", "--recipe", "published-schedule", "--source", "resident"), "--source resident"),
    ((*SWEEP, "--run", "c", "--batch-size", "161"), "--batch-size 160"),
    ((*SWEEP, "--run", "run", "--lr", "0.3"), "recipe.lr"),
    ((*SWEEP, "--run", "run", "--seeds", "0"), "seeds"),
    ((*SWEEP, "--run", "run", "--precision", "bf16"), "precision"),
    (("train", "R1111@1", "--seed", "2", *TRAIN[3:]), "--seed 2"),
    (("train", "R1111-random@0", *TRAIN[3:]), "R1111-random@0"),
    (("train", "R1111", *TRAIN[3:], "--width", "8"), "width"),
    (("train", "R1111", *TRAIN[3:], "--epochs", "3"), "epochs"),
    (("train", "mine", "--resolution", "16", *TRAIN[3:]), "resolution"),
    (("add", "mine", "--from", "mine.py:two", *DATA, *ROOT), "mine"),
    (("precompute", "R1111", "--dtype", "fp32", *ROOT), "bf16"),
    (("precompute", "R1111", "--compress", "zstd", *ROOT), "compression"),
    (("images", "run", "--images", "1", "--count", "2", *ROOT), "--images"),
    (("images", "run", "--images", "1", "--seed", "2", *ROOT), "--images"),
    (("plot", "run", "--metric", "matched_error", "--out", "o/new", *ROOT), "matched_error"),
    (("plot", "run", "--matched", "other", "--out", "o/new", *ROOT), "other"),
    (("tables", "matched", *ROOT), "matched"),
    (("images", "run", "--senders", "R1112", *ROOT), "R1112"),
    (("paper", "--study", "r18-r34", "--networks", "ResNet18", "--dry-run"), "ResNet18"),
    (("paper", "--study", "small-resnets", "--networks", "ResNet18,ResNet34", "--dry-run"), "ResNet18"),
    (("add", "x", "--from", "mine.py:small", "--weights", "few.npz", "--dataset", "mnist", *ROOT), "mnist"),
)
"""Each part is right on its own; with what has to be named."""
