"""Run first_study.ipynb in an empty folder; fails where a cell does. ``--write`` keeps the new output."""

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

NOTEBOOK = Path(__file__).with_name("first_study.ipynb")

notebook = nbformat.read(NOTEBOOK, as_version=4)
with tempfile.TemporaryDirectory() as folder:
    # the kernel is reached through files, which nobody else can read, instead of ports
    kernel = {"transport": "ipc", "connection_file": str(Path(folder) / "kernel.json")}
    client = NotebookClient(
        notebook,
        timeout=600,
        record_timing=False,
        resources={"metadata": {"path": folder}},
        config=Config({"KernelManager": kernel}),
    )
    client.execute()
if "--write" in sys.argv[1:]:
    nbformat.write(notebook, NOTEBOOK)
