"""Files that libraries keep in their caches: found there, or announced before they are downloaded."""

import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import torch

from fastsitch.errors import NetworkError

log = logging.getLogger(__name__)

_PATIENCE = 15
"""Seconds until a server counts as out of reach."""


class PublishedFile(Protocol):
    """A file that a library downloads once."""

    @property
    def name(self) -> str:
        """Where it is published."""

    @property
    def path(self) -> Path:
        """In the cache; it has to be there."""

    @property
    def revision(self) -> str:
        """The version of its repository, where there are several; otherwise empty."""

    def cached(self) -> Path | None:
        """The same, or None where it is not there."""

    def require(self) -> None:
        """Say what is to be downloaded; raises NetworkError where it is neither in the cache nor to be had."""


@dataclass(frozen=True)
class UrlFile:
    """A file under a fixed address, in the cache of torch.hub; ``size`` in bytes where the library states it."""

    url: str
    size: int = 0

    @property
    def name(self) -> str:
        return self.url

    @property
    def path(self) -> Path:
        return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(self.url).path).name

    @property
    def revision(self) -> str:
        return ""

    def cached(self) -> Path | None:
        return self.path if self.path.is_file() else None

    def require(self) -> None:
        if self.cached() is not None:
            return
        try:
            with urlopen(Request(self.url, method="HEAD"), timeout=_PATIENCE) as answer:
                size = int(answer.headers.get("Content-Length", 0)) or self.size
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise NetworkError(
                f"{self.path} is missing and {self.url} cannot be reached ({reason}): put the file there, or set "
                "TORCH_HOME to the folder whose hub/checkpoints has it"
            ) from None
        _announce(self.url, size, self.path.parent)


@dataclass(frozen=True)
class HubFile:
    """A file of the Hugging Face hub: the first of ``names`` that a repository has, in a revision of it."""

    repository: str
    names: tuple[str, ...]
    asked_revision: str | None = None

    @classmethod
    def parse(cls, text: str, names: tuple[str, ...]) -> "HubFile":
        """Of ``ORG/MODEL`` or ``ORG/MODEL@REVISION``."""
        repository, _, revision = text.partition("@")
        return cls(repository, names, revision or None)

    @property
    def name(self) -> str:
        return f"hf.co/{self.repository}/{self.path.name}"

    @property
    def path(self) -> Path:
        found = self.cached()
        assert found is not None, f"{self.repository} was not loaded"
        return found

    @property
    def revision(self) -> str:
        # the hub's cache has a folder per commit
        return self.path.parent.name

    def require(self) -> None:
        if self.cached() is not None:
            return
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

        missing = f"{' or '.join(self.names)} of {self._described} is not in {constants.HF_HUB_CACHE}"
        if constants.is_offline_mode():
            raise NetworkError(f"{missing}, and HF_HUB_OFFLINE is set: unset it, or set HF_HOME to a cache that has it")
        for name in self.names:
            try:
                url = hf_hub_url(self.repository, name, revision=self.asked_revision)
                _announce(url, get_hf_file_metadata(url, timeout=_PATIENCE).size or 0, Path(constants.HF_HUB_CACHE))
                return
            except EntryNotFoundError:
                continue
            except HfHubHTTPError as error:
                raise NetworkError(f"{missing}, and the hub refuses it ({_brief(error)})") from None
            # the errors of several libraries for transfers
            except Exception as error:
                raise NetworkError(
                    f"{missing}, and the hub cannot be reached ({_brief(error)}): run this once where it can, or set "
                    "HF_HOME to a cache that has it"
                ) from None
        raise NetworkError(f"{self._described} has none of {', '.join(self.names)}: expected a repository with weights")

    def fetched(self) -> Path:
        """In the cache, downloaded where it is not there yet; :meth:`require` comes before."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        for name in self.names if self.cached() is None else ():
            with suppress(EntryNotFoundError):
                hf_hub_download(self.repository, name, revision=self.asked_revision)
                break
        return self.path

    @property
    def _described(self) -> str:
        return f"hf.co/{self.repository}" + (f"@{self.asked_revision}" if self.asked_revision else "")

    def cached(self) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        for name in self.names:
            found = try_to_load_from_cache(self.repository, name, revision=self.asked_revision)
            if isinstance(found, str):
                return Path(found)
        return None


def _announce(address: str, size: int, folder: Path) -> None:
    log.info("downloads %s (%s) to %s", address, f"{size / 1e6:.0f} MB" if size else "of unknown size", folder)


def _brief(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
