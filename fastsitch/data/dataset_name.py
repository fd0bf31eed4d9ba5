"""Names of data sets: what is taken, and how it is read, is a part of the name, of which there is one spelling."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import TypeVar

from fastsitch.data.background import BLACK, canonical_colour, is_colour
from fastsitch.data.known_sizes import SIZES, DatasetSize
from fastsitch.data.subset import Subset
from fastsitch.errors import ConfigError, DataError, argument, plain
from fastsitch.files import expanded
from fastsitch.identity import stable_hash
from fastsitch.vocabulary import require_whole

Name = TypeVar("Name", str, str | None)

_LARGEST_SIDE = 4096

_MOST = 10**9
"""More images than any data set has."""

_FINEST = 1e-6
"""The smallest share to hold out: six decimals."""

_KEYS = {
    "npz": ("train", "test"),
    "imagefolder": ("train", "test", "holdout"),
    "hf": ("train", "test", "holdout", "image", "label"),
}
"""What can be said with ``@KEY=`` of files and folders."""

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_CONFIG = re.compile(r"[^<>:/\\|?*@]+")
_REGISTERED = re.compile(r"[A-Za-z0-9_-]+")

_EXPECTED_HF = "hf:ORG/NAME or hf:ORG/NAME:CONFIG of the Hugging Face hub, or hf:/DIR or hf:./DIR with parquet files"


@dataclass(frozen=True)
class DatasetName:
    """A data set by its parts; ``str`` is the name under which it is recorded.

    Source: ``cifar10``, ``fashion-mini:5000``, ``npz:FILE``, ``imagefolder:DIR@64@white@holdout=0.2``,
    ``hf:ORG/NAME:CONFIG@64@image=COLUMN@label=COLUMN`` or ``python:NAME``, each also with ``@train=5000@test=1000``
    behind it.
    """

    kind: str
    """A key of SIZES, ``npz``, ``imagefolder``, ``hf`` or ``python``."""
    path: Path | None = None
    """Absolute; None for a data set that has a name alone."""
    called: str | None = None
    """On the Hugging Face hub, or in this Python process."""
    config: str | None = None
    """Of a data set of the hub, or of parquet files; None: its only one, or its default."""
    first: int | None = None
    """Training images of a named data set; None: all."""
    side: int | None = None
    background: str = BLACK
    holdout: str | None = None
    """Share of the images of a folder without splits that are for the test, as a decimal number."""
    image: str | None = None
    label: str | None = None
    """Columns of a data set of the hub; None: those that only they can be."""
    subset: Subset = field(default_factory=Subset)

    @classmethod
    def parse(cls, name: str) -> "DatasetName":
        """The parts of a name as a user typed it; raises DataError."""
        kind = re.split("[:@]", name, maxsplit=1)[0]
        if kind in SIZES:
            return _named(name, kind)
        kind, separator, location = name.partition(":")
        if not separator or kind not in (*_KEYS, "python") or not location:
            raise DataError(
                f"unknown data set {name!r}: expected {', '.join(SIZES)}, one of them with :N for its first N training "
                "images, imagefolder:DIR, imagefolder:DIR@SIDE, npz:FILE or hf:NAME; behind it, @train=N@test=N for "
                "some images"
            )
        if kind == "python":
            return _registered(name, location)
        # of other kinds a location is always a path
        on_hub = kind == "hf" and re.match(r"[/~$]|\.\.?(/|$)", location) is None
        return _located(name, kind, location if on_hub else str(expanded(location)), on_hub=on_hub)

    def __str__(self) -> str:
        if self.kind in SIZES:
            return self.kind + ("" if self.first is None else f":{self.first}") + str(self.subset)
        return f"{self.kind}:{self._text}"

    @property
    def source(self) -> str:
        """What holds the images, whichever of them are taken: a path, or ``hf:ORG/NAME:CONFIG``."""
        return f"hf:{self._location}" if self.kind == "hf" else self._location

    @property
    def _location(self) -> str:
        config = "" if self.config is None else f":{self.config}"
        return f"{self.called if self.path is None else self.path}{config}"

    @property
    def _text(self) -> str:
        """Where it is and all parts behind it."""
        side = "" if self.side is None else f"@{self.side}"
        colour = "" if self.background == BLACK else f"@{self.background}"
        holdout = "" if self.holdout is None else f"@holdout={self.holdout}"
        columns = "".join(
            f"@{key}={column}" for key, column in (("image", self.image), ("label", self.label)) if column is not None
        )
        return f"{self._location}{side}{colour}{holdout}{columns}{self.subset}"

    @property
    def whole(self) -> "DatasetName":
        """The data set of which a subset is taken."""
        return replace(self, subset=Subset())

    @property
    def folder(self) -> str:
        """The folder name under ``models/``, ``activations/`` and ``runs/``.

        For all but named data sets it is their name and a hash of it, with the absolute path.
        """
        if self.kind in SIZES:
            return str(self).replace(":", "-first").replace("@", "-").replace("=", "")
        is_file = self.kind == "npz" and self.path is not None
        readable = self.path.stem + str(self.subset) if self.path and is_file else Path(self._text).name
        return f"{self.kind}-{re.sub(r'[^A-Za-z0-9_-]+', '-', readable)}-{stable_hash(self._text)[:8]}"

    @property
    def known_size(self) -> DatasetSize | None:
        """The size of a named data set; None for all others. Raises DataError where it has too few images."""
        if self.kind not in SIZES:
            return None
        size = SIZES[self.kind]
        return self.subset.of(size if self.first is None else replace(size, train=self.first), str(self))


def _named(name: str, kind: str) -> DatasetName:
    first, *parts = name[len(kind) :].split("@")
    size, number = SIZES[kind], first[1:]
    if first and (not _is_whole(number) or number != str(int(number)) or not 0 < int(number) <= size.train):
        raise DataError(f"data set {name}: expected {kind}:N, the first N of its {size.train} training images")
    found: dict[str, str] = {}
    for part in parts:
        key, value = _keyed(name, part, _KEYS["npz"]) or ("", "")
        if not key:
            raise DataError(f"data set {name}: expected @train=N or @test=N behind {kind}, found @{plain(part)}")
        _add(name, found, key, value)
    return DatasetName(kind, first=int(number) if first else None, subset=_subset(found))


def _registered(name: str, location: str) -> DatasetName:
    called, *parts = location.split("@")
    found: dict[str, str] = {}
    for part in parts:
        key, value = _keyed(name, part, _KEYS["npz"]) or ("", "")
        if not key:
            raise DataError(f"data set {name}: expected @train=N or @test=N behind python:NAME, found @{plain(part)}")
        _add(name, found, key, value)
    if not _REGISTERED.fullmatch(called):
        raise DataError(f"data set {name}: expected python:NAME with a name of letters, digits, _ and -")
    return DatasetName("python", called=called, subset=_subset(found))


def _located(name: str, kind: str, location: str, *, on_hub: bool = False) -> DatasetName:
    found: dict[str, str] = {}
    folders = kind != "npz"
    # a folder or file that has that very name comes first; names on the hub have no @
    while "@" in location and not _is_there(kind, location, on_hub=on_hub):
        rest, _, part = location.rpartition("@")
        keyed = _keyed(name, part, _KEYS[kind]) if rest else None
        if keyed is not None:
            _add(name, found, *keyed)
        elif rest and folders and "side" not in found and _is_whole(part):
            found["side"] = part
        elif rest and folders and "background" not in found and is_colour(part):
            found["background"] = canonical_colour(part)
        else:
            break
        location = rest
    side = int(found["side"]) if "side" in found else None
    if side is not None and not 8 <= side <= _LARGEST_SIDE:
        what = "imagefolder:DIR@SIDE" if kind == "imagefolder" else "hf:NAME@SIDE"
        raise DataError(f"data set {name}: expected {what} with a side of 8 to {_LARGEST_SIDE} pixels")
    place, config = _place(location, on_hub=on_hub) if kind == "hf" else (location, None)
    if on_hub and not (_HUB.fullmatch(place) and (config is None or _CONFIG.fullmatch(config))):
        raise DataError(f"data set {name}: expected {_EXPECTED_HF}")
    return DatasetName(
        kind,
        path=None if on_hub else Path(place).resolve(),
        called=place if on_hub else None,
        config=config,
        side=side,
        background=found.get("background", BLACK),
        holdout=found.get("holdout"),
        image=found.get("image"),
        label=found.get("label"),
        subset=_subset(found),
    )


def _is_there(kind: str, location: str, *, on_hub: bool) -> bool:
    if kind == "hf":
        return not on_hub and Path(_place(location, on_hub=False)[0]).is_dir()
    return Path(location).is_dir() if kind == "imagefolder" else Path(location).exists()


def _place(location: str, *, on_hub: bool) -> tuple[str, str | None]:
    """``ORG/NAME:CONFIG`` or ``DIR:CONFIG`` in two; the whole is the folder where there is one of that very name."""
    place, separator, config = location.partition(":") if on_hub else location.rpartition(":")
    of_folder = Path(place).is_dir() and not Path(location).is_dir() and _CONFIG.fullmatch(config) is not None
    return (place, config) if separator and (on_hub or of_folder) else (location, None)


def _keyed(name: str, part: str, keys: Sequence[str]) -> tuple[str, str] | None:
    """``train=5000`` as key and value in its one spelling, None where it is none; raises DataError for a bad value."""
    key, separator, value = part.partition("=")
    if not separator or key not in keys:
        return None
    if key in ("image", "label"):
        if not value:
            raise DataError(f"data set {name}: expected @{key}=COLUMN")
        return key, value
    if key == "holdout":
        if not re.fullmatch(r"0?\.[0-9]{1,6}", value) or not Decimal(value):
            raise DataError(f"data set {name}: expected @holdout=SHARE with a share between 0 and 1, such as 0.2")
        return key, f"{Decimal(value).normalize():f}"
    if not _is_whole(value) or not int(value):
        raise DataError(f"data set {name}: expected @{key}=N with a whole number from 1")
    return key, str(int(value))


def _is_whole(text: str) -> bool:
    return re.fullmatch("[0-9]{1,12}", text) is not None


def _add(name: str, found: dict[str, str], key: str, value: str) -> None:
    if key in found:
        raise DataError(f"data set {name}: it says @{key}= twice; leave one out")
    found[key] = value


def _subset(found: dict[str, str]) -> Subset:
    return Subset(**{split: int(found[split]) for split in ("train", "test") if split in found})


def known_size(name: str) -> DatasetSize | None:
    """The size of a named data set, of its first images (``fashion-mini:5000``) or of a subset of it.

    None for all others; raises DataError when it has fewer images than that.
    """
    return DatasetName.parse(name).known_size


def canonical_dataset(name: str) -> str:
    """The name under which a data set is recorded: with the absolute path of a file or folder; raises DataError."""
    parsed = DatasetName.parse(name)
    # raises where it has too few images
    _ = parsed.known_size
    return str(parsed)


def whole_dataset(name: str) -> str:
    """The name of the data set of which a data set is a subset; that of one that is no subset."""
    return str(DatasetName.parse(name).whole)


def dataset_folder(name: str) -> str:
    """The folder name of a data set under ``models/``, ``activations/`` and ``runs/``; raises DataError."""
    return DatasetName.parse(name).folder


def dataset_of_folder(folder: str) -> str | None:
    """The named data set that has a folder name; None for those of files and image folders, which do not tell."""
    name = re.sub(r"-(train|test)(\d+)", r"@\1=\2", re.sub(r"-first(\d+)", r":\1", folder))
    try:
        return name if DatasetName.parse(name).folder == folder else None
    except DataError:
        return None


def with_options(
    dataset: Name,
    *,
    background: str | None = None,
    holdout: float | None = None,
    train_images: int | None = None,
    test_images: int | None = None,
) -> Name:
    """The name of a data set with what options say of it; without any the name as it is.

    Where no data set is named the parts of a subset stand alone (``@train=5000``): of the one that has the networks.
    Raises ConfigError for an option that cannot be, or that the name contradicts.
    """
    given = {"background": background, "holdout": holdout, "train_images": train_images, "test_images": test_images}
    if all(value is None for value in given.values()):
        return dataset
    if background is not None and not is_colour(background):
        raise ConfigError(f"{argument('background', background)}: expected black, white, grey or #RRGGBB")
    if holdout is not None and not _FINEST <= holdout <= 1 - _FINEST:
        raise ConfigError(f"{argument('holdout', holdout)}: expected a share between 0 and 1, such as 0.2")
    for key, why in (("background", "can be transparent"), ("holdout", "are split by it")):
        if given[key] is not None and (dataset is None or not dataset.startswith(("imagefolder:", "hf:"))):
            raise ConfigError(
                f"{argument(key, given[key])}: only images of a folder {why}; name it with "
                f"{argument('dataset', 'imagefolder:DIR')} or hf:NAME"
            )
    counts = {"train_images": train_images, "test_images": test_images}
    subset = Subset(*(None if count is None else require_whole(key, count, 1, _MOST) for key, count in counts.items()))
    if dataset is None:
        return str(subset)
    named = DatasetName.parse(dataset)
    share = None if holdout is None else f"{Decimal(f'{holdout:.6f}').normalize():f}"
    colour = None if background is None else canonical_colour(background)
    for key, there, asked in (
        ("background", None if named.background == BLACK else named.background, colour),
        ("holdout", named.holdout, share),
        ("train_images", named.subset.train, subset.train),
        ("test_images", named.subset.test, subset.test),
    ):
        if asked is not None and there is not None and there != asked:
            raise ConfigError(f"{argument(key, given[key])}: {dataset} says {there}; leave one of them out")
    return str(
        replace(
            named,
            background=colour or named.background,
            holdout=share or named.holdout,
            subset=Subset(subset.train or named.subset.train, subset.test or named.subset.test),
        )
    )
