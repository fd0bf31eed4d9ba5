"""A bucket as Zarr reads a complete store from it."""

from typing import Any

from zarr.storage import ObjectStore


class CompleteObjectStore(ObjectStore[Any]):
    """Raises FileNotFoundError for a file that is missing, where Zarr would take fill values."""

    async def get(self, key: str, *arguments: Any, **options: Any) -> Any:
        found = await super().get(key, *arguments, **options)
        if found is None:
            raise FileNotFoundError(f"{key} is missing")
        return found
