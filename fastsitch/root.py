"""The folder that holds networks, activation stores and runs, each by data set."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from fastsitch.bucket_folder import bucket_folder
from fastsitch.data import dataset_folder
from fastsitch.errors import ConfigError, argument
from fastsitch.files import usable_folder
from fastsitch.folders import STORES, Folder, LocalFolder
from fastsitch.network_names import NetworkName
from fastsitch.vocabulary import DEFAULT_ROOT


@dataclass(frozen=True)
class Root:
    """``PATH/models``, ``PATH/networks`` (definitions of added ones), ``PATH/activations`` and ``PATH/runs``.

    ``data_dir`` is where files of data sets lie, ``stores`` where activation stores lie if not in ``PATH/activations``.
    """

    path: Path
    data_dir: Path
    stores: Folder

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
        named = os.environ.get("FASTSITCH_ACTIVATIONS", "") if activations is None else os.fspath(activations)
        root = usable_folder("root", os.environ.get("FASTSITCH_ROOT") or DEFAULT_ROOT if path is None else path)
        data = os.environ.get("FASTSITCH_DATA_DIR") or root / "data" if data_dir is None else data_dir
        stores = _stores(named, root / STORES, reach=activations is not None)
        return cls(root, usable_folder("data_dir", data), stores)

    def absolute(self) -> "Root":
        """The same root for processes that work elsewhere."""
        return Root(self.path.absolute(), self.data_dir.absolute(), self.stores.absolute())

    def models(self, dataset: str) -> Path:
        return self.path / "models" / dataset_folder(dataset)

    def networks(self, dataset: str) -> Path:
        return self.path / "networks" / dataset_folder(dataset)

    @property
    def disk(self) -> Path:
        """A folder on the disk that stores would fill; with stores in a bucket that of the root."""
        return self.stores.disk or self.path

    def activations(self, dataset: str) -> Folder:
        return self.stores.reached() / dataset_folder(dataset)

    def store(self, dataset: str, network: NetworkName) -> Folder:
        return self.activations(dataset) / str(network)

    def runs(self, dataset: str) -> Path:
        return self.path / "runs" / dataset_folder(dataset)

    def run(self, dataset: str, name: str) -> Path:
        return self.runs(dataset) / name


def _stores(text: str, default: Path, *, reach: bool) -> Folder:
    """The folder of stores; ``reach`` where an argument names it, which may not be blank then."""
    if "://" in text:
        folder = bucket_folder(text, default)
        return folder.reached() if reach else folder
    if re.match(r"\w+:/|(s3|gs|gcs|az|https?|ftp|file):", text):
        raise ConfigError(f"{argument('activations', text)}: expected a folder, or s3://BUCKET/PREFIX")
    return LocalFolder(usable_folder("activations", text) if text or reach else default)
