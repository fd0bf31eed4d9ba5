"""The measured errors of a run on disk: ``RUN/errors/UNIT.npz``, each tied to the unit's stitches by their hash."""

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastsitch.analysis.errors import MEASURES, StitchErrors
from fastsitch.errors import RunError
from fastsitch.files import write_npz
from fastsitch.networks.names import NetworkName
from fastsitch.stitching.cells import Unit
from fastsitch.sweep.results import Run

SPLITS = ("train", "test")
"""The images that errors are means over."""

_ARRAYS = (*MEASURES, "variance")

_REMEDY = "measure them with fastsitch.measure_errors(run)"


def read_errors(
    run: Run,
    sender: str,
    receiver: str,
    setting: str = "T2T",
    seed: int | None = None,
    split: str = "train",
) -> StitchErrors:
    """The errors of all cells of a pair: the mean over the run's seeds, or those of one of them.

    A cell that diverged with any of the seeds is NaN. Raises RunError when the run has no such pair or seed, and when
    the errors of one of its units were not measured, or belong to other stitches.
    """
    if split not in SPLITS:
        raise RunError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    if seed is not None and seed not in run.config.seeds:
        raise RunError(f"run {run.name!r} has no seed {seed}: expected one of {run.config.seeds}")
    run.pair_networks(sender, receiver, setting)
    sender, receiver = (str(NetworkName.parse(name)) for name in (sender, receiver))
    found = []
    for own in run.config.seeds if seed is None else [seed]:
        unit = Unit(sender=sender, receiver=receiver, setting=setting, loss=run.config.loss, seed=own)
        found.append(load_errors(run, unit)[split])
    means = {name: np.mean([getattr(errors, name) for errors in found], axis=0) for name in _ARRAYS}
    return replace(found[0], **means)


def run_errors(run: Run, split: str = "train") -> dict[tuple[str, str, str], StitchErrors]:
    """The errors of all pairs and settings of a run, as :func:`read_errors` gives them."""
    return {unit: read_errors(run, *unit, split=split) for unit in run.pairs()}


def load_errors(run: Run, unit: Unit) -> dict[str, StitchErrors]:
    """The errors of a unit by split; raises RunError when there are none, or the file is damaged or stale."""
    path = _file(run, unit)
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            named, stitches_hash = str(file["unit"]), str(file["stitches_hash"])
            arrays = {split: {name: file[f"{name}_{split}"] for name in _ARRAYS} for split in SPLITS}
    except FileNotFoundError:
        raise RunError(f"the errors of unit {unit.name} are not measured yet: {_REMEDY}") from None
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise RunError(f"{path} is damaged ({error}): {_REMEDY}") from None
    if named != unit.name:
        raise RunError(f"{path} holds unit {named}: {_REMEDY}")
    if stitches_hash != run.stitches_hash(unit):
        raise RunError(f"{path} belongs to other stitches than those of the run: {_REMEDY}")
    asked = run.read(unit)["status"] > 0
    return {split: StitchErrors(**own, asked=asked) for split, own in arrays.items()}


def save_errors(
    run: Run, unit: Unit, errors: Mapping[str, StitchErrors], stitches_hash: str, stores: Mapping[str, str]
) -> None:
    """Write the errors of a unit by split; ``stores`` are hashes of what the representations came from."""
    provenance = {"unit": unit.name, "stitches_hash": stitches_hash, **stores}
    write_npz(
        _file(run, unit),
        {
            **{name: np.array(value) for name, value in provenance.items()},
            **{f"{name}_{split}": getattr(own, name) for split, own in errors.items() for name in _ARRAYS},
        },
    )


def measured(run: Run, unit: Unit) -> bool:
    """Whether there is a file for a unit, whole or not."""
    return _file(run, unit).is_file()


def _file(run: Run, unit: Unit) -> Path:
    return run.path / "errors" / f"{unit.name}.npz"
