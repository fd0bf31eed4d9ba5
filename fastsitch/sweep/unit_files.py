"""The two files of a finished unit: its stitches, and its matrices, which are written after them."""

import hashlib
import logging
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as format_safetensors
from torch import Tensor

from fastsitch.errors import RunError
from fastsitch.files import write_atomically, write_npz
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.stitching.engine import CellResult

log = logging.getLogger(__name__)

MATCHED = "matched_error"
"""The matrix of runs that compute matched stitches, beside those of all runs."""

_RAW = ("accuracy", "loss", "train_loss", "status")
_PROVENANCE = ("unit", "store_hash", "stitches_bytes")


class UnitFiles:
    """``UNIT.safetensors`` and ``UNIT.npz`` in the folder ``units`` of the run at ``path``.

    ``matches``: whether the run computes matched stitches, whose error and origin are kept too.
    """

    def __init__(self, path: Path, *, matches: bool) -> None:
        self._path = path
        self.raw: tuple[str, ...] = (*_RAW, MATCHED) if matches else _RAW
        self._provenance = (*_PROVENANCE, "receiver_store_hash") if matches else _PROVENANCE

    def done(self, unit: Unit) -> bool:
        """Whether a unit's results are saved."""
        return self._file(unit).is_file()

    def save(
        self,
        unit: Unit,
        shape: tuple[int, int],
        results: Mapping[Cell, CellResult],
        store_hash: str,
        receiver_store_hash: str | None,
    ) -> None:
        """Write the stitches first, then matrices of this shape, whose presence says that the unit is done."""
        arrays: dict[str, NDArray[Any]] = {name: np.full(shape, np.nan) for name in self.raw}
        arrays["status"] = np.zeros(shape, np.int8)
        weights: dict[str, Tensor] = {}
        for cell, result in results.items():
            for name in self.raw:
                arrays[name][cell.i, cell.j] = getattr(result, name)
            weights[f"{cell.i}-{cell.j}.weight"] = result.weight_FD.to(torch.float32).contiguous()
            weights[f"{cell.i}-{cell.j}.bias"] = result.bias_D.to(torch.float32).contiguous()
            for name, tensor in result.statistics.items():
                weights[f"{cell.i}-{cell.j}.{name}"] = tensor.to(torch.float32).contiguous()
        stitches = format_safetensors(weights)
        write_atomically(self._file(unit, ".safetensors"), lambda file: file.write(stitches))
        provenance = {
            "unit": np.array(unit.name),
            "store_hash": np.array(store_hash),
            "stitches_bytes": np.array(len(stitches)),
        }
        if receiver_store_hash is not None:
            provenance["receiver_store_hash"] = np.array(receiver_store_hash)
        write_npz(self._file(unit), {**provenance, **arrays})

    def read(self, unit: Unit) -> dict[str, NDArray[Any]]:
        """The raw matrices of a finished unit, and where they come from; raises RunError when the file is damaged."""
        try:
            with self._file(unit).open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                arrays = {name: file[name] for name in (*self.raw, *self._provenance)}
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise RunError(f"{self._file(unit)} is damaged ({error}): sweep again to replace it") from None
        if str(arrays["unit"]) != unit.name:
            raise RunError(f"{self._file(unit)} holds unit {arrays['unit']}: sweep again to replace it")
        return arrays

    def intact(self, unit: Unit) -> bool:
        """Whether a unit is done and both of its files are whole; what is not is logged."""
        if not self.done(unit):
            return False
        try:
            arrays = self.read(unit)
        except RunError as error:
            log.warning("%s", error)
            return False
        stitches = self._file(unit, ".safetensors")
        if not stitches.is_file() or stitches.stat().st_size != int(arrays["stitches_bytes"]):
            log.warning("%s is missing or damaged: training the unit again", stitches)
            return False
        return True

    def tensors(self, cell: Cell) -> dict[str, Tensor]:
        """All that is saved of a cell, by name; raises RunError when its unit is not done, or damaged."""
        file, prefix = self._file(cell.unit, ".safetensors"), f"{cell.i}-{cell.j}."
        try:
            with safe_open(file, "pt") as content:
                names = [name for name in content.keys() if name.startswith(prefix)]  # noqa: SIM118
                tensors = {name.removeprefix(prefix): content.get_tensor(name) for name in names}
        except FileNotFoundError:
            raise RunError(f"unit {cell.unit.name} of run {self._path.name!r} is not done") from None
        except SafetensorError as error:
            raise RunError(f"{file} is damaged ({error}): sweep again to replace it") from None
        if not {"weight", "bias"} <= tensors.keys():
            raise RunError(f"{file} has no stitch ({cell.i}, {cell.j})")
        return tensors

    def stitches(self, unit: Unit) -> dict[Cell, tuple[Tensor, Tensor]]:
        """Weight and bias of all cells of a finished unit; raises RunError."""
        file = self._file(unit, ".safetensors")
        try:
            weights = parse_safetensors(self._stitches(unit))
            found = {}
            for name in weights:
                place, _, part = name.partition(".")
                if part == "weight":
                    i, j = map(int, place.split("-"))
                    found[Cell(unit, i, j)] = weights[name], weights[f"{place}.bias"]
        except (SafetensorError, ValueError, KeyError) as error:
            raise RunError(f"{file} is damaged ({error}): sweep again to replace it") from None
        return found

    def stitches_hash(self, unit: Unit) -> str:
        """sha256 (hex) of the file with a finished unit's stitches; raises RunError where there is none."""
        return hashlib.sha256(self._stitches(unit)).hexdigest()

    def _stitches(self, unit: Unit) -> bytes:
        try:
            return self._file(unit, ".safetensors").read_bytes()
        except FileNotFoundError:
            raise RunError(
                f"unit {unit.name} of run {self._path.name!r} is not done: sweep again to finish it"
            ) from None

    def _file(self, unit: Unit, suffix: str = ".npz") -> Path:
        return self._path / "units" / (unit.name + suffix)
