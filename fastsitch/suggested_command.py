"""Commands that error messages tell the user to run; they can be pasted as they are."""

import shlex
from pathlib import Path

from fastsitch.vocabulary import DEFAULT_ROOT


def command(
    verb: str,
    *names: object,
    dataset: str | None = None,
    root: Path | str | None = None,
    activations: str | None = None,
    force: bool = False,
) -> str:
    """``fastsitch VERB NAMES --dataset ... --root ... --activations ... --force``, quoted for a shell.

    The default root is left out.
    """
    parts = ["fastsitch", verb, *map(str, names)]
    if dataset is not None:
        parts += ["--dataset", dataset]
    if root is not None and str(root) != DEFAULT_ROOT:
        parts += ["--root", str(root)]
    if activations is not None:
        parts += ["--activations", activations]
    return shlex.join([*parts, "--force"] if force else parts)
