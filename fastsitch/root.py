"""The folder that holds networks, activation stores and runs, each by data set."""

import os
from dataclasses import dataclass
from pathlib import Path

from fastsitch.advice import DEFAULT_ROOT
from fastsitch.data import dataset_folder
from fastsitch.errors import ConfigError
from fastsitch.networks.names import NetworkName


@dataclass(frozen=True)
class Root:
    """``PATH/models``, ``PATH/activations`` and ``PATH/runs``; ``data_dir`` is where files of data sets lie."""

    path: Path
    data_dir: Path

    @classmethod
    def at(cls, path: str | os.PathLike[str] | None = None, data_dir: str | os.PathLike[str] | None = None) -> "Root":
        """The root at ``path`` (default: FASTSITCH_ROOT, then ./fastsitch-data).

        Files of data sets are looked for in ``data_dir`` (default: FASTSITCH_DATA_DIR, then ``data`` in the root).
        Raises ConfigError when the root is a file.
        """
        root = Path(path or os.environ.get("FASTSITCH_ROOT") or DEFAULT_ROOT)
        if root.exists() and not root.is_dir():
            raise ConfigError(f"--root {root} is a file: expected a folder, or a name for a new one")
        return cls(root, Path(data_dir or os.environ.get("FASTSITCH_DATA_DIR") or root / "data"))

    def absolute(self) -> "Root":
        """The same root for processes that work elsewhere."""
        return Root(self.path.absolute(), self.data_dir.absolute())

    def models(self, dataset: str) -> Path:
        return self.path / "models" / dataset_folder(dataset)

    def activations(self, dataset: str) -> Path:
        return self.path / "activations" / dataset_folder(dataset)

    def store(self, dataset: str, network: NetworkName) -> Path:
        return self.activations(dataset) / str(network)

    def runs(self, dataset: str) -> Path:
        return self.path / "runs" / dataset_folder(dataset)

    def run(self, dataset: str, name: str) -> Path:
        return self.runs(dataset) / name
