"""Stitches into a receiver's input, trained or matched, and how a run keeps them."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsitch.checked_files import DamagedFile, read_npz
from fastsitch.data import Split, Transform
from fastsitch.identity import stable_hash
from fastsitch.runs.run import Run
from fastsitch.runs.stitch_files import read_stitches, save_stitches
from fastsitch.stitching.cell_result import CellResult
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.stitching.geometry import Shape
from fastsitch.vocabulary import Status

log = logging.getLogger(__name__)

VARIANTS = ("vanilla", "matched")
"""Trained on the task loss through the whole receiver, or of least squared error to the image as it sees it."""

_NUMBERS = ("accuracy", "loss", "train_loss", "status", "matched_error")

InputStitches = Mapping[str, Sequence[CellResult]]
"""By variant, the stitch of every sender position that the run asks for."""


def input_unit(unit: Unit) -> Unit:
    """The unit of the stitches into the input of a unit's receiver.

    Its receiver has a name of its own: its position 0 is the image, not the stem.
    """
    return Unit(
        sender=unit.sender, receiver=f"{unit.receiver}-input", setting=unit.setting, loss="task", seed=unit.seed
    )


def input_cells(run: Run, unit: Unit) -> list[Cell]:
    """One cell for each sender position that the run asks for."""
    senders = dict.fromkeys(cell.i for cell in run.cells(unit))
    return [Cell(input_unit(unit), i, 0) for i in senders]


class InputImages:
    """Training images as what a receiver expects at its input: an OrderedSplit of one position, in fp32."""

    def __init__(self, split: Split, transform: Transform, device: torch.device) -> None:
        self._images = split.images
        self._transform = transform
        self._device = device
        channels = 1 if transform.grey else 3
        resolution = transform.resolution or split.size
        assert resolution is not None
        self.shapes: Sequence[Shape] = [(channels, *resolution)]
        self.labels = split.labels.to(device)
        self.ids = torch.arange(len(split), device=device)

    def images(self, position: int, start: int, stop: int) -> Tensor:
        assert position == 0
        return self._transform.apply(self._images[start:stop].to(self._device)).permute(0, 2, 3, 1)


class InputStitchFiles:
    """The input stitches of a run: safetensors, and an npz written after it whose presence says that they are done.

    They are tied to the networks, the data and the configuration that they come from.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.folder = run.path / "images" / "units"

    def save(self, unit: Unit, stitches: InputStitches, store_hash: str) -> None:
        """Keep the stitches of a unit; ``store_hash`` says which representations they were trained on."""
        tensors: dict[str, Tensor] = {}
        arrays: dict[str, NDArray[Any]] = {
            "inputs": np.array(self._inputs(unit)),
            "store_hash": np.array(store_hash),
        }
        for variant, results in stitches.items():
            for i, result in enumerate(results):
                tensors[f"{variant}.{i}.weight"] = result.weight_FD.contiguous()
                tensors[f"{variant}.{i}.bias"] = result.bias_D.contiguous()
            for name in _NUMBERS:
                arrays[f"{variant}.{name}"] = np.array([getattr(result, name) for result in results], np.float64)
        save_stitches(self._file(unit), tensors, arrays)

    def read(self, unit: Unit) -> InputStitches | None:
        """The stitches of a unit; None, with a line in the log, where there are none or they cannot be used."""
        path = self._file(unit)
        if not path.is_file():
            return None
        try:
            arrays = read_npz(path)
            tensors = read_stitches(path, arrays)
            stitches = {variant: _results(variant, arrays, tensors) for variant in VARIANTS}
            inputs = str(arrays["inputs"])
        except (DamagedFile, KeyError) as error:
            log.warning("%s is damaged (%s): training its stitches again", path, error)
            return None
        if inputs != self._inputs(unit):
            log.warning("%s belongs to another run or other networks: training its stitches again", path)
            return None
        return stitches

    def _inputs(self, unit: Unit) -> str:
        """A hash of everything that the stitches depend on."""
        run = self._run
        networks = [run.networks[name].weights_hash for name in (unit.sender_network, unit.receiver_network)]
        resolved = {key: value for key, value in run.resolved.to_dict().items() if key != "group_size"}
        return stable_hash([input_unit(unit).name, networks, run.data_hash, run.config.to_dict(), resolved])

    def _file(self, unit: Unit) -> Path:
        return self.folder / f"{input_unit(unit).name}.npz"


def _results(variant: str, arrays: Mapping[str, NDArray[Any]], weights: Mapping[str, Tensor]) -> list[CellResult]:
    numbers = {name: arrays[f"{variant}.{name}"].tolist() for name in _NUMBERS}
    return [
        CellResult(
            accuracy=numbers["accuracy"][i],
            loss=numbers["loss"][i],
            train_loss=numbers["train_loss"][i],
            status=Status(int(numbers["status"][i])),
            weight_FD=weights[f"{variant}.{i}.weight"],
            bias_D=weights[f"{variant}.{i}.bias"],
            matched_error=numbers["matched_error"][i],
        )
        for i in range(len(numbers["accuracy"]))
    ]
