"""Files that a user hands in, with one thing wrong each: data, images, weights, factories, records."""

import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from bench.fault_cases.damage import READERS, content_of, judge
from bench.fault_cases.lines import Fault, try_line
from bench.fault_cases.stage import DATA, ROOT, Outcome, Stage
from fastsitch.checked_files import with_hash

Arrays = dict[str, NDArray[Any]]

_CHANGES: dict[str, Callable[[Arrays], Arrays]] = {
    "no x_train": lambda arrays: {name: array for name, array in arrays.items() if name != "x_train"},
    "no y_test": lambda arrays: {name: array for name, array in arrays.items() if name != "y_test"},
    "unknown names": lambda arrays: {f"my_{name}": array for name, array in arrays.items()},
    "two names": lambda arrays: {
        **{name: array for name, array in arrays.items() if name != "x_train"},
        **{name: arrays["x_train"] for name in ("train_images", "images_train")},
    },
    "float images": lambda arrays: {**arrays, "x_train": arrays["x_train"].astype(np.float32)},
    "images beyond bytes": lambda arrays: {**arrays, "x_test": arrays["x_test"].astype(np.int64) * 2},
    "normalised images": lambda arrays: {
        name: array / 127.5 - 1 if array.ndim > 1 else array for name, array in arrays.items()
    },
    "bool images": lambda arrays: {**arrays, "x_train": arrays["x_train"] > 99},
    "complex images": lambda arrays: {**arrays, "x_train": arrays["x_train"].astype(complex)},
    "flat images": lambda arrays: {**arrays, "x_train": arrays["x_train"].reshape(160, -1)},
    "channels at both ends": lambda arrays: {**arrays, "x_train": arrays["x_train"][:, :3, :, None]},
    "four channels": lambda arrays: {**arrays, "x_train": np.stack(4 * [arrays["x_train"]], -1)},
    "two channels": lambda arrays: {**arrays, "x_test": np.stack(2 * [arrays["x_test"]], -1)},
    "another size for tests": lambda arrays: {**arrays, "x_test": arrays["x_test"][:, :20, :20]},
    "no images": lambda arrays: {**arrays, "x_test": arrays["x_test"][:0], "y_test": arrays["y_test"][:0]},
    "images without pixels": lambda arrays: {**arrays, "x_train": arrays["x_train"][:, :, :0]},
    "a scalar": lambda arrays: {**arrays, "x_train": np.uint8(3)},  # type: ignore[dict-item]
    "fewer labels": lambda arrays: {**arrays, "y_train": arrays["y_train"][:-1]},
    "two ones in a row": lambda arrays: {
        name: array if array.ndim > 1 else np.eye(10)[array] + np.eye(10)[0] for name, array in arrays.items()
    },
    "labels of two kinds": lambda arrays: {**arrays, "y_train": np.eye(10)[arrays["y_train"]]},
    "half labels": lambda arrays: {**arrays, "y_train": arrays["y_train"] / 2},
    "NaN labels": lambda arrays: {**arrays, "y_test": arrays["y_test"] * np.nan},
    "text labels": lambda arrays: {**arrays, "y_train": arrays["y_train"].astype(str)},
    "object labels": lambda arrays: {**arrays, "y_train": arrays["y_train"].astype(object)},
    "dates as labels": lambda arrays: {**arrays, "y_train": arrays["y_train"].astype("datetime64[s]")},
    "negative labels": lambda arrays: {**arrays, "y_train": arrays["y_train"] - 3},
    "huge labels": lambda arrays: {**arrays, "y_train": arrays["y_train"].astype(np.int64) + (1 << 40)},
    "a label that only tests have": lambda arrays: {**arrays, "y_test": arrays["y_test"] + 5},
    "too few images": lambda arrays: {**arrays, "x_train": arrays["x_train"][:9], "y_train": arrays["y_train"][:9]},
}


def _npz(place: Path, draw: random.Random) -> Fault:
    """A data set as an npz file."""
    with np.load(place / "few.npz") as file:
        arrays = dict(file)
    path = place / "bad.npz"
    title = draw.choice(
        [*_CHANGES, "cut off", "header", "header", "a single array", "a pickle", "text", "empty", "bomb"]
    )
    if title in _CHANGES:
        np.savez(path, **_CHANGES[title](arrays))  # type: ignore[arg-type]
    elif title == "cut off":
        content = (place / "few.npz").read_bytes()
        path.write_bytes(content[: draw.randrange(1, len(content))])
    elif title == "header":
        np.savez(path, **arrays)  # type: ignore[arg-type]
        wanted = b"(160, 28, 28), }"
        wrong = draw.choice([b"(-60, 28, 28), }", b"(160, 28, 28, }", b"(999999,28,28),}", b"[160, 28, 28], }"])
        path.write_bytes(path.read_bytes().replace(wanted, wrong.ljust(len(wanted))))
    elif title == "a single array":
        with path.open("wb") as stream:
            np.save(stream, arrays["x_train"])
    elif title == "a pickle":
        path.write_bytes(pickle.dumps(arrays))
    elif title == "bomb":
        np.savez_compressed(path, **{**arrays, "x_train": np.zeros((40_000, 300, 300), np.uint8)})  # type: ignore[arg-type]
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_text("x_train" if title == "text" else "")
    line = ("train", "R1122", "--dataset", "npz:bad.npz", "--width", "4", "--epochs", "1", *ROOT)
    return Fault(line, f"npz: {title}", ("bad.npz", "9 training images"))


def _picture(path: Path, draw: random.Random, mode: str = "RGB", size: tuple[int, int] = (16, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", size, draw.randbytes(3 * size[0] * size[1])).convert(mode).save(path)


def _pictures(place: Path, draw: random.Random) -> Fault:
    """A folder of images."""
    folder = place / "pics"
    for split in ("train", "test"):
        for label in ("boot", "coat"):
            for k in range(3):
                _picture(folder / split / label / f"{k}.png", draw)
    split = draw.choice(["train", "test"])
    image = folder / split / "coat" / "1.png"
    content = image.read_bytes()
    title = draw.choice(list(_SPOILED))
    name = _SPOILED[title](folder, split, image, content, draw)
    line = ("train", "R1122", "--dataset", "imagefolder:pics", "--width", "4", "--epochs", "1", *ROOT)
    return Fault(line, f"images: {title}", (name,))


def _write(path: Path, content: bytes, name: str | None = None) -> str:
    path.write_bytes(content)
    return name or path.name


def _renamed(path: Path, target: Path, name: str | None = None) -> str:
    path.rename(target)
    return name or target.name


def _removed(path: Path, name: str) -> str:
    shutil.rmtree(path)
    return name


def _repainted(path: Path, draw: random.Random, name: str, **options: Any) -> str:
    _picture(path, draw, **options)
    return name


def _floats(path: Path) -> str:
    Image.new("F", (16, 16)).save(path)
    return path.name


def _looped(folder: Path) -> str:
    (folder / "again").symlink_to(folder)
    return "again"


_SPOILED: dict[str, Callable[[Path, str, Path, bytes, random.Random], str]] = {
    "cut off": lambda folder, split, image, content, draw: _write(image, content[: draw.randrange(len(content) - 20)]),
    "noise": lambda folder, split, image, content, draw: _write(image, draw.randbytes(300)),
    "empty": lambda folder, split, image, content, draw: _write(image, b""),
    "text": lambda folder, split, image, content, draw: _write(image, b"no image\n"),
    "another size": lambda folder, split, image, content, draw: _repainted(image, draw, "1.png", size=(24, 16)),
    "a heic": lambda folder, split, image, content, draw: _renamed(image, image.with_suffix(".heic")),
    "floats": lambda folder, split, image, content, draw: _floats(image.with_suffix(".tiff")),
    "outside of classes": lambda folder, split, image, content, draw: _renamed(image, folder / split / "x.png"),
    "an empty class": lambda folder, split, image, content, draw: _renamed(
        image.parent, folder / split / ".coat", "coat"
    ),
    "no split": lambda folder, split, image, content, draw: _removed(folder / split, split),
    "a class in one split": lambda folder, split, image, content, draw: _removed(image.parent, "coat"),
    "a loop": lambda folder, split, image, content, draw: _looped(image.parent),
}


def _weights(place: Path, draw: random.Random) -> Fault:
    """Weights for an added network."""
    (kept,) = place.glob("root/models/*/mine.*.safetensors")
    weights = load_file(kept)
    (foreign,) = place.glob("root/models/*/R1111.*.safetensors")
    path = place / "bad.safetensors"
    content = kept.read_bytes()
    first = next(iter(weights))
    title = draw.choice(_WEIGHTS)
    if title == "cut off":
        path.write_bytes(content[: draw.randrange(len(content))])
    elif title == "of another network":
        shutil.copy(foreign, path)
    elif title == "a key too few":
        save_file({name: tensor for name, tensor in weights.items() if name != first}, path)
    elif title == "a key too many":
        save_file({**weights, "extra.weight": torch.zeros(3)}, path)
    elif title == "another shape":
        save_file({**weights, first: torch.zeros(7)}, path)
    elif title == "whole numbers":
        save_file({**weights, first: torch.zeros_like(weights[first], dtype=torch.int64)}, path)
    elif title == "header":
        path.write_bytes((1 << 60).to_bytes(8, "little") + content[8:])
    elif title == "noise":
        path.write_bytes(draw.randbytes(2000))
    elif title == "NaN":
        save_file({**weights, first: torch.full_like(weights[first], torch.nan)}, path)
    else:
        path = place / "bad.pt"
        torch.save(
            {
                "a list": [1, 2],
                "a number": 3,
                "names that are numbers": dict(enumerate(weights.values())),
                "a module": torch.nn.Linear(2, 2),
                "nested too deep": {"a": {"b": weights}},
                "nothing": {},
            }[title],
            path,
        )
    line = ("add", "fresh", "--from", "mine.py:small", "--weights", path.name, *DATA, *ROOT)
    return Fault(line, f"weights: {title}", (path.name,))


_WEIGHTS = (
    *("cut off", "of another network", "a key too few", "a key too many", "another shape", "whole numbers", "header"),
    *("noise", "NaN", "a list", "a number", "names that are numbers", "a module", "nested too deep", "nothing"),
)

_FACTORIES = {
    "raises": "def bad():\n    raise ValueError('on purpose\\x1b[31m' + 2000 * 'x')",
    "exits": "import sys\ndef bad():\n    sys.exit(0)",
    "interrupts no one": "class Strange(BaseException):\n    pass\ndef bad():\n    raise Strange",
    "recursion": "def bad():\n    return bad()",
    "syntax": "def bad(:\n    pass",
    "indentation": "def bad():\nreturn 3",
    "null byte": "def bad():\n    return '\0'",
    "imports what is not there": "import no_such_module\ndef bad():\n    pass",
    "raises on import": "raise RuntimeError('at once')\ndef bad():\n    pass",
    "returns None": "def bad():\n    pass",
    "returns a number": "def bad():\n    return 3",
    "returns a class": "from torch import nn\ndef bad():\n    return nn.Linear",
    "is no function": "bad = 3",
    "needs arguments": "def bad(one, two):\n    return one",
    "wrong outputs": "from torch import nn\ndef bad():\n    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 7))",
    "wrong inputs": "from torch import nn\ndef bad():\n    return nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten())",
    "raises in forward": "from torch import nn\nclass N(nn.Module):\n    def forward(self, x):\n"
    "        return x.nosuch\n"
    "def bad():\n    return N()",
    "exits in forward": "import sys\nfrom torch import nn\nclass N(nn.Module):\n    def forward(self, x):\n"
    "        sys.exit(0)\ndef bad():\n    return N()",
    "returns text in forward": "from torch import nn\nclass N(nn.Module):\n    def forward(self, x):\n"
    "        return 'x'\n"
    "def bad():\n    return N()",
    "NaN weights": "import torch\nfrom torch import nn\ndef bad():\n    last = nn.Linear(3072, 10)\n"
    "    nn.init.constant_(last.weight, float('nan'))\n"
    "    return nn.Sequential(nn.Flatten(), nn.Unflatten(1, (3, 32, 32)), nn.Flatten(), last)",
    "no positions": "from torch import nn\nclass N(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    "        self.last = nn.Linear(3072, 10)\n    def forward(self, x):\n        return self.last(x.flatten(1))\n"
    "def bad():\n    return N()",
    "latin-1": None,
    "a folder": None,
    "noise": None,
}


def _factory(place: Path, draw: random.Random) -> Fault:
    """A Python file with a factory."""
    path = place / "bad.py"
    title = draw.choice(list(_FACTORIES))
    text = _FACTORIES[title]
    if text is not None:
        path.write_text(text + "\n")
    elif title == "latin-1":
        path.write_bytes("def bad():\n    return 'caf\xe9'\n".encode("latin-1"))
    elif title == "noise":
        path.write_bytes(draw.randbytes(500))
    else:
        path.mkdir()
    return Fault(("add", "fresh", "--from", "bad.py:bad", *DATA, *ROOT), f"factory: {title}", ("bad.py",))


def _record(place: Path, draw: random.Random) -> Fault:
    """A record, definition, manifest or run with something missing or of another type, vouched for by its hash."""
    pattern, key, reader = draw.choice(
        [
            ("root/models/*/R1111.json", "record_hash", "precompute"),
            ("root/models/*/R1111.json", "record_hash", "sweep"),
            ("root/models/*/mine.json", "record_hash", "precompute mine"),
            ("root/networks/*/mine.json", "definition_hash", "train mine"),
            ("root/activations/*/R1111/manifest.json", "manifest_hash", "precompute"),
            ("root/runs/*/run/run.json", "run_hash", "export"),
            ("root/runs/*/run/run.json", "run_hash", "sweep"),
        ]
    )
    (path,) = place.glob(pattern)
    content = json.loads(path.read_bytes())
    del content[key]
    keys = [name for name in content if name not in ("versions", "hash")]
    name = draw.choice(keys)
    way = draw.choice(["removed", "renamed", "null", "a list", "text", "a number", "altered without its hash"])
    if way == "altered without its hash":
        text = path.read_bytes()
        position = draw.choice([k for k, letter in enumerate(text) if chr(letter).isalnum()])
        path.write_bytes(text[:position] + b"z" + text[position + 1 :])
    else:
        value = content.pop(name)
        if way == "renamed":
            content[name + "z"] = value
        elif way != "removed":
            wrong = {"null": None, "a list": [[1, "x"]], "text": "wrong", "a number": -7}[way]
            content[name] = wrong if wrong != value and not (value is None and wrong is None) else "wrong"
        path.write_text(json.dumps(with_hash(content, key)))
    return Fault(READERS[reader], f"{path.name} ({reader}): {name} {way}", (path.relative_to(place).as_posix(),))


_INPUTS: tuple[Callable[[Path, random.Random], Fault], ...] = (_npz, _pictures, _weights, _factory, _record)


def input_case(stage: Stage, draw: random.Random, number: int) -> Outcome:
    """One file with one thing wrong, and a command that reads it."""
    make = draw.choice(_INPUTS)
    if make is not _record:
        stage.set("finished")
        return try_line(stage, make(stage.place, draw))
    stage.set("finished")
    state = draw.getstate()
    arguments = make(stage.place, draw).arguments
    whole = stage.whole("finished", arguments)
    stage.set("finished")
    draw.setstate(state)
    fault = make(stage.place, draw)
    # what a command does not read may be wrong, as long as the result is right
    damaged = content_of(stage, fault.names[0])
    ended = stage.run(*fault.arguments)
    word, wrong = judge(stage, fault.names[0], damaged, ended, whole)
    return Outcome.of(
        arguments[0],
        fault.title,
        word,
        wrong,
        arguments,
        ended,
    )
