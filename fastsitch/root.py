"""The folder that holds networks, activation stores and runs, each by data set."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from fastsitch.advice import DEFAULT_ROOT
from fastsitch.data import dataset_folder
from fastsitch.errors import ConfigError
from fastsitch.networks.names import NetworkName
from fastsitch.remote import Place, RemoteFolder, reached, remote_folder

STORES = "activations"
"""The folder of activation stores in a root."""


@dataclass(frozen=True)
class Root:
    """``PATH/models``, ``PATH/networks`` (definitions of added ones), ``PATH/activations`` and ``PATH/runs``.

    ``data_dir`` is where files of data sets lie, ``stores`` where activation stores lie if not in ``PATH/activations``.
    """

    path: Path
    data_dir: Path
    stores: Place

    @classmethod
    def at(
        cls,
        path: str | os.PathLike[str] | None = None,
        data_dir: str | os.PathLike[str] | None = None,
        activations: str | os.PathLike[str] | None = None,
    ) -> "Root":
        """The root at ``path`` (default: FASTSITCH_ROOT, then ./fastsitch-data).

        Files of data sets are looked for in ``data_dir`` (default: FASTSITCH_DATA_DIR, then ``data`` in the root),
        activation stores in ``activations``, a folder or s3://BUCKET/PREFIX (default: FASTSITCH_ACTIVATIONS, then
        ``activations`` in the root). Raises ConfigError when the root is a file, or a bucket that is named cannot be
        reached; one that the environment names is not looked for before a store is.
        """
        for option, given in (("--root", path), ("--data-dir", data_dir), ("--activations", activations)):
            if given is not None and not os.fspath(given):
                raise ConfigError(f"{option} is empty: expected the name of a folder")
        named = os.fspath(activations) if activations else os.environ.get("FASTSITCH_ACTIVATIONS", "")
        root = Path(path or os.environ.get("FASTSITCH_ROOT") or DEFAULT_ROOT)
        if root.exists() and not root.is_dir():
            raise ConfigError(f"--root {root} is a file: expected a folder, or a name for a new one")
        data = Path(data_dir or os.environ.get("FASTSITCH_DATA_DIR") or root / "data")
        return cls(root, data, _stores(named, root / STORES, reach=bool(activations)))

    def absolute(self) -> "Root":
        """The same root for processes that work elsewhere."""
        stores = self.stores
        if isinstance(stores, RemoteFolder):
            stores = RemoteFolder(stores.url, stores.locks.absolute())
        else:
            stores = stores.absolute()
        return Root(self.path.absolute(), self.data_dir.absolute(), stores)

    def models(self, dataset: str) -> Path:
        return self.path / "models" / dataset_folder(dataset)

    def networks(self, dataset: str) -> Path:
        return self.path / "networks" / dataset_folder(dataset)

    @property
    def disk(self) -> Path:
        """A folder on the disk that stores on a disk take."""
        return self.stores if isinstance(self.stores, Path) else self.path

    def activations(self, dataset: str) -> Place:
        stores = self.stores
        if isinstance(stores, RemoteFolder):
            stores = reached(stores)
        return stores / dataset_folder(dataset)

    def store(self, dataset: str, network: NetworkName) -> Place:
        return self.activations(dataset) / str(network)

    def runs(self, dataset: str) -> Path:
        return self.path / "runs" / dataset_folder(dataset)

    def run(self, dataset: str, name: str) -> Path:
        return self.runs(dataset) / name


def _stores(text: str, default: Path, *, reach: bool) -> Place:
    if "://" in text:
        folder = remote_folder(text, default)
        return reached(folder) if reach else folder
    if re.match(r"\w+:/", text):
        raise ConfigError(f"--activations {text}: expected a folder, or s3://BUCKET/PREFIX")
    stores = Path(text) if text else default
    if stores.exists() and not stores.is_dir():
        raise ConfigError(f"--activations {stores} is a file: expected a folder, or a name for a new one")
    return stores
