"""Images in the rows of an Arrow table, read as if each were a file: the table stays on the disk until one is asked."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastsitch.errors import DataError


class RowStatus(NamedTuple):
    """What of ``os.stat`` says whether a file has changed."""

    st_size: int
    st_mtime_ns: int


@dataclass(frozen=True)
class ImageColumn:
    """A column of encoded images: bytes, or structs with ``bytes`` or, where those are missing, the ``path`` of a file.

    ``modified``: when the files of the table were last written to, in nanoseconds.
    """

    source: str
    split: str
    name: str
    values: Any
    modified: int

    def find(self, index: int) -> Any:
        """The encoded image of a row as a pyarrow.Buffer, not copied, or the path of its file; raises DataError."""
        value = self.values[index]
        path = None
        if value.is_valid and hasattr(value, "keys"):
            path, value = value.get("path"), value["bytes"]
        if value.is_valid:
            return value.as_buffer()
        if path is None or not path.is_valid:
            raise DataError(f"{Row(self, index)} is empty: expected an image in every row")
        return Path(path.as_py())


@dataclass(frozen=True, slots=True)
class Row:
    """An image of a table; what is asked of the path of an image file can be asked of it."""

    column: ImageColumn
    index: int

    def __str__(self) -> str:
        return f"{self.column.source}, {self.column.split} row {self.index} ({self.column.name})"

    @property
    def name(self) -> str:
        """In its data set, wherever that lies."""
        return f"{self.column.split}/{self.index}"

    def open(self, mode: str = "rb") -> io.BytesIO:
        """Its bytes, as a file in memory."""
        found = self.column.find(self.index)
        return io.BytesIO(found.read_bytes() if isinstance(found, Path) else found)

    def stat(self) -> RowStatus:
        """Its size, and when it was written."""
        found = self.column.find(self.index)
        if isinstance(found, Path):
            status = found.stat()
            return RowStatus(status.st_size, status.st_mtime_ns)
        return RowStatus(found.size, self.column.modified)


ImageFile = Path | Row
"""What an image can be opened from."""
