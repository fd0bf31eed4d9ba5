"""The two files of a finished unit: its stitches, and its matrices, which are written after them."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as parse_safetensors
from torch import Tensor

from fastsitch.checked_files import DamagedFile, read_npz, require_arrays
from fastsitch.errors import RunError
from fastsitch.runs.stitch_files import HASH, require_stitches, save_stitches, tensors_file
from fastsitch.stitching.cell_result import CellResult
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.vocabulary import Status

log = logging.getLogger(__name__)

_MATRICES = ("accuracy", "loss", "train_loss", "status")

_REPLACE = "run the same sweep again to replace it"


class UnitFiles:
    """``UNIT.safetensors`` and ``UNIT.npz`` in the folder ``units`` of the run at ``path``.

    ``matches``: whether the run computes matched stitches, whose error and origin are kept too. ``inputs`` gives a hash
    of all that a unit depends on, ``shape`` that of its matrices, ``cells`` those that the run asks for. ``vouched``:
    whether units are expected to say what they depend on.
    """

    def __init__(
        self,
        path: Path,
        *,
        matches: bool,
        inputs: Callable[[Unit], str],
        shape: Callable[[Unit], tuple[int, int]],
        cells: Callable[[Unit], Sequence[Cell]],
        vouched: bool,
    ) -> None:
        self._path = path
        self._inputs = inputs
        self._shape = shape
        self._cells = cells
        self._vouched = vouched
        self._verified: set[tuple[Path, int, int]] = set()
        self.raw: tuple[str, ...] = (*_MATRICES, "matched_error") if matches else _MATRICES
        self._texts = ("unit", "store_hash", *(("receiver_store_hash",) if matches else ()))

    def done(self, unit: Unit) -> bool:
        """Whether a unit's results are saved; raises RunError where something else has the name of one of its files."""
        file = self._file(unit)
        for path in (file, tensors_file(file)):
            if path.exists() and not path.is_file():
                raise RunError(f"{path} is no regular file: expected results of a unit; remove it")
        return file.is_file()

    def save(
        self,
        unit: Unit,
        results: Mapping[Cell, CellResult],
        store_hash: str,
        receiver_store_hash: str | None,
    ) -> None:
        """Write the stitches first, then the matrices, whose presence says that the unit is done."""
        matrices: dict[str, NDArray[Any]] = {name: np.full(self._shape(unit), np.nan) for name in self.raw}
        matrices["status"] = np.zeros(self._shape(unit), np.int8)
        tensors: dict[str, Tensor] = {}
        for cell, result in results.items():
            for name in self.raw:
                matrices[name][cell.i, cell.j] = getattr(result, name)
            kept = {"weight": result.weight_FD, "bias": result.bias_D, **result.statistics}
            for name, tensor in kept.items():
                tensors[f"{cell.i}-{cell.j}.{name}"] = tensor.to(torch.float32).contiguous()
        provenance = {"unit": unit.name, "inputs": self._inputs(unit), "store_hash": store_hash}
        if receiver_store_hash is not None:
            provenance["receiver_store_hash"] = receiver_store_hash
        texts = {name: np.array(text) for name, text in provenance.items()}
        save_stitches(self._file(unit), tensors, {**texts, **matrices})

    def read(self, unit: Unit) -> dict[str, NDArray[Any]]:
        """The raw matrices of a finished unit, and where they come from; raises RunError when the file is damaged."""
        path, shape = self._file(unit), self._shape(unit)
        try:
            arrays = read_npz(path)
            require_arrays(arrays, {name: ("U", ()) for name in self._texts})
            if str(arrays["unit"]) != unit.name:
                raise RunError(f"{path} holds unit {arrays['unit']}: {_REPLACE}")
            # version 0.1 did not write what a unit depends on
            if "inputs" in arrays and str(arrays["inputs"]) != self._inputs(unit):
                raise RunError(
                    f"{path} was made with other options, networks or data than those of the run: {_REPLACE}"
                )
            require_arrays(arrays, {name: ("i1" if name == "status" else "f8", shape) for name in self.raw})
            self._require_values(unit, arrays)
        except (DamagedFile, FileNotFoundError) as error:
            raise RunError(f"{path} is damaged ({error}): {_REPLACE}") from None
        if self._vouched and not {"inputs", HASH} <= arrays.keys():
            # once for all of them
            self._vouched = False
            log.warning(
                "unit %s of run %s does not record what it depends on, as in version 0.1: what was altered in it is "
                "not noticed",
                unit.name,
                self._path.name,
            )
        return arrays

    def _require_values(self, unit: Unit, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Raise DamagedFile where matrices hold what no training gives."""
        status = arrays["status"]
        asked = np.zeros(status.shape, bool)
        for cell in self._cells(unit):
            asked[cell.i, cell.j] = True
        done, diverged = status == Status.DONE, status == Status.DIVERGED
        accuracy, loss = arrays["accuracy"], arrays["loss"]
        wrong = {
            "status": (done | diverged) != asked,
            "accuracy": np.where(done, ~((accuracy >= 0) & (accuracy <= 1)), ~np.isnan(accuracy)),
            "loss": np.where(done, ~(np.isfinite(loss) & (loss >= 0)), ~np.isnan(loss)),
            "train_loss": done & ~np.isfinite(arrays["train_loss"]),
        }
        if "matched_error" in self.raw:
            wrong["matched_error"] = np.isinf(arrays["matched_error"])
        for name, cells in wrong.items():
            if cells.any():
                i, j = np.argwhere(cells)[0]
                raise DamagedFile(f"{name} of cell ({i}, {j}) is {arrays[name][i, j]}, with status {status[i, j]}")

    def intact(self, unit: Unit) -> bool:
        """Whether a unit is done and both of its files are whole; what is not is logged."""
        if not self.done(unit):
            return False
        try:
            require_stitches(self._file(unit), self.read(unit))
        except RunError as error:
            log.warning("%s", error)
            return False
        except DamagedFile as error:
            log.warning("%s: training the unit again", error)
            return False
        return True

    def tensors(self, cell: Cell) -> dict[str, Tensor]:
        """All that is saved of a cell, by name; raises RunError when its unit is not done, or damaged."""
        file, prefix = tensors_file(self._file(cell.unit)), f"{cell.i}-{cell.j}."
        try:
            self._require_verified(cell.unit)
            with safe_open(file, "pt") as content:
                names = [name for name in content.keys() if name.startswith(prefix)]  # noqa: SIM118
                tensors = {name.removeprefix(prefix): content.get_tensor(name) for name in names}
        except FileNotFoundError:
            raise self._not_done(cell.unit) from None
        except SafetensorError as error:
            raise RunError(f"{file} is damaged ({error}): {_REPLACE}") from None
        if not {"weight", "bias"} <= tensors.keys():
            raise RunError(f"{file} has no stitch ({cell.i}, {cell.j})")
        return tensors

    def stitches(self, unit: Unit) -> dict[Cell, tuple[Tensor, Tensor]]:
        """Weight and bias of all cells of a finished unit; raises RunError."""
        try:
            tensors = parse_safetensors(self._stitches(unit))
            found = {}
            for name in tensors:
                position, _, kind = name.partition(".")
                if kind == "weight":
                    i, j = map(int, position.split("-"))
                    found[Cell(unit, i, j)] = tensors[name], tensors[f"{position}.bias"]
        except (SafetensorError, ValueError, KeyError) as error:
            raise RunError(f"{tensors_file(self._file(unit))} is damaged ({error}): {_REPLACE}") from None
        return found

    def stitches_hash(self, unit: Unit) -> str:
        """sha256 (hex) of the file with a finished unit's stitches; raises RunError where there is none."""
        return hashlib.sha256(self._stitches(unit)).hexdigest()

    def _stitches(self, unit: Unit) -> bytes:
        """The file with a finished unit's stitches, which are those that were written with its matrices."""
        if not self.done(unit):
            raise self._not_done(unit)
        try:
            return require_stitches(self._file(unit), self.read(unit))
        except DamagedFile as error:
            raise RunError(f"{error}: {_REPLACE}") from None

    def _require_verified(self, unit: Unit) -> None:
        """As :meth:`_stitches`, but a file that has not changed since is not read again."""
        file = tensors_file(self._file(unit))
        status = file.stat()
        key = (file, status.st_mtime_ns, status.st_size)
        if key not in self._verified:
            self._stitches(unit)
            self._verified.add(key)

    def _not_done(self, unit: Unit) -> RunError:
        return RunError(
            f"unit {unit.name} of run {self._path.name!r} is not done: run the same sweep again to finish it"
        )

    def _file(self, unit: Unit) -> Path:
        return self._path / "units" / f"{unit.name}.npz"
