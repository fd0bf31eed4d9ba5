"""Stitch errors on disk: ``RUN/errors/UNIT.npz``, each with the hash of the stitches that were measured."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastsitch.analysis.stitch_errors import MEASURES, StitchErrors
from fastsitch.checked_files import DamagedFile, read_npz
from fastsitch.errors import RunError
from fastsitch.files import write_npz
from fastsitch.network_names import NetworkName
from fastsitch.runs.run import Run
from fastsitch.stitching.cells import Unit
from fastsitch.vocabulary import SPLITS, Setting, SplitName, require_choice

_ARRAYS = (*MEASURES, "variance")

_REMEDY = "measure them with fastsitch.measure_errors(run)"


def read_errors(
    run: Run,
    sender: str,
    receiver: str,
    setting: Setting = "T2T",
    seed: int | None = None,
    split: SplitName = "train",
) -> StitchErrors:
    """The errors of all cells of a pair, as :func:`fastsitch.measure_errors` measured them.

    Args:
        run: a vanilla run.
        sender: a sender of the run.
        receiver: a receiver of the run.
        setting: which of the two networks are trained.
        seed: one of the run's seeds; None: the mean over all of them.
        split: the images that errors are means over.

    Returns:
        EV, ES and SV, each (sender positions, receiver positions); a cell that diverged with any of the seeds is NaN.

    Raises:
        RunError: the run has no such pair or seed, or its errors were not measured, or were measured of other stitches.
    """
    require_choice("split", split, SplitName)
    if seed is not None and seed not in run.config.seeds:
        raise RunError(f"run {run.name!r} has no seed {seed}: expected one of {run.config.seeds}")
    run.pair_networks(sender, receiver, setting)
    sender, receiver = (str(NetworkName.parse(name)) for name in (sender, receiver))
    found = []
    for unit_seed in run.config.seeds if seed is None else [seed]:
        unit = Unit(sender=sender, receiver=receiver, setting=setting, loss=run.config.loss, seed=unit_seed)
        found.append(load_stitch_errors(run, unit)[split])
    means = {name: np.mean([getattr(errors, name) for errors in found], axis=0) for name in _ARRAYS}
    return replace(found[0], **means)


def read_run_errors(run: Run, split: SplitName = "train") -> dict[tuple[str, str, Setting], StitchErrors]:
    """The stitch errors of all pairs and settings of a run, as :func:`read_errors` gives them."""
    return {pair: read_errors(run, *pair, split=split) for pair in run.pairs()}


def load_stitch_errors(run: Run, unit: Unit) -> dict[str, StitchErrors]:
    """The stitch errors of a unit by split; raises RunError when the file is missing, damaged or stale."""
    path = _file(run, unit)
    try:
        content = read_npz(path)
        named, stitches_hash = str(content["unit"]), str(content["stitches_hash"])
        arrays = {split: {name: content[f"{name}_{split}"] for name in _ARRAYS} for split in SPLITS}
    except FileNotFoundError:
        raise RunError(f"the stitch errors of unit {unit.name} are not measured yet: {_REMEDY}") from None
    except (DamagedFile, KeyError) as error:
        raise RunError(f"{path} is damaged ({error}): {_REMEDY}") from None
    if named != unit.name:
        raise RunError(f"{path} holds unit {named}: {_REMEDY}")
    if stitches_hash != run.stitches_hash(unit):
        raise RunError(f"{path} was measured of other stitches than those of the run: {_REMEDY}")
    requested = run.read(unit)["status"] > 0
    return {split: StitchErrors(**matrices, requested=requested) for split, matrices in arrays.items()}


def save_stitch_errors(
    run: Run, unit: Unit, errors: Mapping[str, StitchErrors], stitches_hash: str, stores: Mapping[str, str]
) -> None:
    """Write the stitch errors of a unit by split; ``stores`` are the hashes of the stores that were read."""
    provenance = {"unit": unit.name, "stitches_hash": stitches_hash, **stores}
    write_npz(
        _file(run, unit),
        {
            **{name: np.array(value) for name, value in provenance.items()},
            **{f"{name}_{split}": getattr(matrices, name) for split, matrices in errors.items() for name in _ARRAYS},
        },
    )


def is_measured(run: Run, unit: Unit) -> bool:
    """Whether a unit has a file, which may be damaged."""
    return _file(run, unit).is_file()


def _file(run: Run, unit: Unit) -> Path:
    return run.path / "errors" / f"{unit.name}.npz"
