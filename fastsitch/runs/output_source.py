"""What a result file shows, written into it, so that no other result silently takes its place."""

import json
import zipfile
from pathlib import Path

from fastsitch.errors import ConfigError, argument
from fastsitch.runs.run import Run

PNG_KEY = "Source"
"""The keyword of a PNG file for what an image was made from."""


MATRICES = "matrices"
"""The kind of what export writes."""


def source_of(kind: str, *runs: Run) -> str:
    """What is written into a file: ``the matrix of run a on fashion-mini``."""
    return f"{kind} of {' and '.join(f'run {run.name} on {run.config.dataset}' for run in runs)}"


def require_replaceable(path: Path, source: str) -> None:
    """Raise ConfigError where ``path`` shows something else than ``source``; files that say nothing may be replaced."""
    found = _written(path)
    if found and found != source:
        raise ConfigError(f"{path} shows {found}, not {source}: choose another {argument('out')}, or remove it")


def _written(path: Path) -> str:
    """The source in a PNG or npz file, or of matrices in a JSON file; empty where there is none."""
    if not path.is_file():
        return ""
    try:
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                return archive.comment.decode()
        if path.suffix == ".json":
            content = json.loads(path.read_bytes())
            return f"{MATRICES} of run {content['run']} on {content['dataset']}"
        from PIL import Image

        with Image.open(path) as picture:
            return str(picture.info.get(PNG_KEY, ""))
    # whatever lies there is not ours, or damaged: it is replaced as any other file
    except (OSError, ValueError, SyntaxError, KeyError, TypeError, RecursionError, zipfile.BadZipFile):
        return ""
