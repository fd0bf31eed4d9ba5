"""Image folders as data sets: few pixels are decoded into memory once and for all, many stay in their files."""

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsitch.checked_files import DamagedFile, read_json, with_hash
from fastsitch.data.dataset import Dataset, PixelFacts, Split, Whole
from fastsitch.data.dataset_name import DatasetName
from fastsitch.data.image_folder import ImageFolder
from fastsitch.data.normalisation import Normalisation
from fastsitch.errors import ConfigError
from fastsitch.files import free_space, write_atomically, write_json
from fastsitch.identity import stable_hash
from fastsitch.machine import available_memory

log = logging.getLogger(__name__)

MOST_IN_MEMORY = 2 << 30
"""Bytes of pixels, beyond which images stay in their files."""

MEMORY_SHARE = 0.5
"""Of the free memory, beyond which they do so too."""

WORTH_KEEPING = 1000
"""Fewer files are decoded as quickly as their pixels are read and checked."""


def folder_dataset(name: DatasetName, data_dir: Path) -> Dataset:
    """An image folder, or a table of images; of a subset no other image is decoded.

    Results do not depend on where the pixels are. Raises DataError, see :meth:`ImageFolder.scan`, and for an image that
    cannot be decoded.
    """
    folder = ImageFolder.scan(name, data_dir)
    whole = Whole(str(name.whole), None, all_tested=name.subset.test is None) if name.subset else None
    labels = (torch.tensor(split.labels) for split in (folder.train, folder.test))
    train, test = (Split(files, known) for files, known in zip(folder.files(), labels, strict=True))
    images = Dataset(str(name), train, test, len(folder.classes), folder.classes, whole)
    if folder.size is None:
        # every network brings them to its own size
        return replace(images, files_hash=folder.hash())
    remembered = _Remembered(folder, data_dir)
    if folder.bytes <= min(MOST_IN_MEMORY, MEMORY_SHARE * available_memory(torch.device("cpu"))):
        return remembered.in_memory(images)
    return remembered.in_files(images)


class _Remembered:
    """What is kept in ``data_dir`` of a folder's pixels, as long as its files are the same."""

    def __init__(self, folder: ImageFolder, data_dir: Path) -> None:
        self._folder = folder
        path = data_dir / "scans" / stable_hash(str(folder.name))[:16]
        self._facts, self._pixels = path.with_suffix(".json"), path.with_suffix(".pixels")
        self._signature = folder.signature()

    def in_memory(self, images: Dataset) -> Dataset:
        """The same data set with its pixels decoded."""
        facts = self._known()
        kept = self._kept(images, facts)
        if kept is not None:
            return kept
        log.info("%s: %s, decoded into memory", self._folder.name.source, self._folder.described)
        decoded = replace(images, train=_decoded(images.train), test=_decoded(images.test))
        if self._signature is None or len(images.train) + len(images.test) < WORTH_KEEPING:
            return decoded
        decoded = replace(decoded, content=PixelFacts.of(decoded.train, decoded.test))
        self._keep(decoded)
        return decoded

    def in_files(self, images: Dataset) -> Dataset:
        """The same data set with what a look at all pixels says."""
        facts = self._known()
        if facts is None:
            log.info(
                "%s: %s: they stay in their files; all are decoded once, for their hash and mean",
                self._folder.name.source,
                self._folder.described,
            )
            facts = PixelFacts.of(images.train, images.test)
            self._write(self._facts, facts)
        return replace(images, content=facts)

    def _known(self) -> PixelFacts | None:
        """What was found before, if it is of these files."""
        if self._signature is None:
            return None
        try:
            content = read_json(self._facts, "facts_hash")
            if content["files"] != self._signature:
                return None
            return PixelFacts(
                content["hash"], _normalisation(content["colours"]), _normalisation(content["brightness"])
            )
        except FileNotFoundError:
            return None
        except (DamagedFile, OSError, KeyError, TypeError, ConfigError) as error:
            log.debug("%s is not used: %s", self._facts, error)
            return None

    def _kept(self, images: Dataset, facts: PixelFacts | None) -> Dataset | None:
        """The data set with pixels that were decoded before, unless they have been altered since."""
        if facts is None:
            return None
        height, width = images.train.size or (0, 0)
        shape = (len(images.train) + len(images.test), height, width, 3)
        try:
            if not self._pixels.is_file() or self._pixels.stat().st_size != self._folder.bytes:
                return None
            pixels = torch.from_numpy(np.fromfile(self._pixels, np.uint8).reshape(shape))
        except (OSError, ValueError) as error:
            log.debug("%s is not used: %s", self._pixels, error)
            return None
        count = len(images.train)
        kept = replace(
            images,
            train=Split(pixels[:count], images.train.labels),
            test=Split(pixels[count:], images.test.labels),
        )
        if kept.hash != facts.hash:
            log.debug("%s is not used: it was altered", self._pixels)
            return None
        return replace(kept, content=facts)

    def _keep(self, decoded: Dataset) -> None:
        assert decoded.content is not None
        if free_space(self._pixels) < 2 * self._folder.bytes:
            log.debug("%s is not kept: the disk is nearly full", self._pixels)
            return
        try:
            self._pixels.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(
                self._pixels,
                lambda file: [file.write(split.pixels.numpy().data) for split in (decoded.train, decoded.test)],
            )
        except (OSError, ConfigError) as error:
            log.debug("%s cannot be written: %s", self._pixels, error)
        else:
            self._write(self._facts, decoded.content)

    def _write(self, path: Path, facts: PixelFacts) -> None:
        if self._signature is None:
            return
        content: dict[str, Any] = {
            "files": self._signature,
            "hash": facts.hash,
            "colours": asdict(facts.normalisation),
            "brightness": asdict(facts.grey_normalisation),
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, with_hash(content, "facts_hash"))
        except (OSError, ConfigError) as error:
            log.debug("%s cannot be written: %s", path, error)


def _decoded(split: Split) -> Split:
    height, width = split.size or (0, 0)
    pixels = torch.empty(len(split), height, width, 3, dtype=torch.uint8)
    start = 0
    for block in split.blocks():
        pixels[start : start + len(block)] = block
        start += len(block)
    return Split(pixels, split.labels)


def _normalisation(content: dict[str, Any]) -> Normalisation:
    return Normalisation(tuple(content["mean"]), tuple(content["std"]))
