"""Where the modules of added networks come from: a library, or a factory in a Python file of the user."""

import hashlib
import inspect
import json
import random
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastsitch.chains.kept_state import require_weights
from fastsitch.chains.trace import first_line
from fastsitch.chains.wrappers import unwrapped
from fastsitch.errors import FastsitchError, NetworkError, argument
from fastsitch.files import expanded
from fastsitch.identity import stable_hash
from fastsitch.networks.factory_file import file_hash, imported_neighbours, importing_neighbours
from fastsitch.networks.transformers_network import build_classifier

Size = tuple[int, int, int]
"""Channels, height, width of an image."""


@dataclass(frozen=True)
class ModelSource:
    """``torchvision:NAME``, ``timm:NAME``, ``hf:TYPE``, or ``FILE.py:FACTORY`` with an absolute path and its sha256.

    ``arguments`` are for the library's builder, as JSON: what a published configuration says of the network.
    ``neighbours`` are the files in its folder that it imports, each with its sha256; known once it was built.
    """

    text: str
    file_hash: str | None = None
    neighbours: tuple[tuple[str, str], ...] = ()
    arguments: str = "{}"

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "ModelSource":
        """The inverse of :meth:`to_dict`; raises KeyError or TypeError."""
        neighbours = tuple((name, digest) for name, digest in content.get("neighbours", {}).items())
        return cls(content["text"], content["file_hash"], neighbours, json.dumps(content.get("arguments", {})))

    def to_dict(self) -> dict[str, Any]:
        """For JSON; without neighbours and arguments as it was before there were any."""
        content: dict[str, Any] = {"text": self.text, "file_hash": self.file_hash}
        others = {"neighbours": dict(self.neighbours), "arguments": json.loads(self.arguments)}
        return {**content, **{key: value for key, value in others.items() if value}}

    @classmethod
    def parse(cls, text: str) -> "ModelSource":
        """Parse what a user typed; raises NetworkError for another form or a missing file. Nothing is imported."""
        kind, _, name = text.partition(":")
        if kind in _LIBRARIES and name:
            return cls(text)
        location, _, factory = text.rpartition(":")
        if not location.endswith(".py") or not factory.isidentifier():
            raise NetworkError(
                f"{argument('source', text, option='--from')}: expected torchvision:NAME, timm:NAME, hf:NAME or "
                "FILE.py:FACTORY"
            )
        path = expanded(location).resolve()
        return cls(f"{path}:{factory}", hashlib.sha256(_read(path)).hexdigest())

    def build(self, classes: int, input_shape: Size, key: Any = 0) -> nn.Module:
        """The network with the weights that its code draws from a generator seeded by ``key``: fp32, CPU, eval.

        Code of the library, or of the file that the user named, runs here. Raises NetworkError when it fails, and when
        the file is no longer the one that was named.
        """
        kind, _, name = self.text.partition(":")
        generator = torch.default_generator
        state, dtype, device = generator.get_state(), torch.get_default_dtype(), torch.get_default_device()
        seed = int(stable_hash(key)[:15], 16)
        others = np.random.get_state(), random.getstate()
        try:
            generator.manual_seed(seed)
            # what a library or a user draws weights from, if not from torch
            np.random.seed(seed % 2**32)
            random.seed(seed)
            with foreign_code(self.text):
                library = _LIBRARIES.get(kind)
                module = (
                    self._from_file(classes, input_shape)
                    if library is None
                    else library(name, classes, input_shape, json.loads(self.arguments))
                )
        finally:
            generator.set_state(state)
            np.random.set_state(others[0])
            random.setstate(others[1])
            torch.set_default_dtype(dtype)
            if torch.get_default_device() != device:
                torch.set_default_device(None if device.type == "cpu" else device)
        # not isinstance, which believes what an object says of its class
        if not issubclass(type(module), nn.Module):
            raise NetworkError(f"{self.text} returns a {type(module).__name__}: expected an nn.Module")
        module = unwrapped(module)
        with foreign_code(self.text):
            require_weights([module], self.text)
            # a module may override these, and do nothing
            nn.Module.float(module)
            nn.Module.cpu(module)
            module.eval()
        return module

    def with_neighbours(self) -> "ModelSource":
        """The same source, with the files that building it imported from its folder."""
        if self.file_hash is None:
            return self
        location, _, _ = self.text.rpartition(":")
        return replace(self, neighbours=imported_neighbours(Path(location), self.file_hash))

    def _from_file(self, classes: int, input_shape: Size) -> Any:
        location, _, name = self.text.rpartition(":")
        path = Path(location)
        content = _read(path)
        for file, found, expected in (
            (path, hashlib.sha256(content).hexdigest(), self.file_hash or ""),
            *((path.parent / file, file_hash(path.parent / file), digest) for file, digest in self.neighbours),
        ):
            if found != expected:
                now = f"its sha256 begins with {found[:8]}, not with {expected[:8]}" if found else "it is gone"
                raise NetworkError(
                    f"{file} has changed since the network was added ({now}): restore it, or add the network and train "
                    f"it again, both with {argument('force', True)}"
                )
        with importing_neighbours(path, content) as module:
            factory = getattr(module, name, None)
            if not callable(factory):
                raise NetworkError(f"{path} has no function {name}: expected one that returns an nn.Module")
            arguments = {"classes": classes, "num_classes": classes, "input_shape": input_shape}
            parameters = inspect.signature(factory).parameters
            return factory(**{key: value for key, value in arguments.items() if key in parameters})


def _torchvision(name: str, classes: int, input_shape: Size, arguments: dict[str, Any]) -> nn.Module:
    from torchvision import models

    # classification alone: builders of other tasks would download a backbone
    require_known("torchvision", name, models.list_models(module=models))
    _, height, width = input_shape
    # a few families need the size of the image
    options = dict(arguments)
    if name.startswith("vit_"):
        options["image_size"] = height
    elif name.startswith("maxvit_"):
        options["input_size"] = (height, width)
    return models.get_model(name, weights=None, num_classes=classes, **options)  # type: ignore[no-any-return]


def _timm(name: str, classes: int, input_shape: Size, arguments: dict[str, Any]) -> nn.Module:
    timm = require_timm(name)
    # timm would look for its configuration, maybe on the hub
    if ":" in name:
        raise NetworkError(f"timm:{name} is a published network: add it with {argument('pretrained', True)}")
    require_known("timm", name.partition(".")[0], timm.list_models())
    channels, *size = input_shape
    fixed = getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)
    options = {**arguments, **({"img_size": tuple(size)} if fixed else {})}
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels, **options)
    return model


def require_timm(name: str) -> Any:
    """The module timm; raises NetworkError where it is not installed."""
    try:
        import timm
    except ImportError:
        raise NetworkError(f"timm:{name}: timm is not installed; pip install 'fastsitch[timm]'") from None
    return timm


def _transformers(name: str, classes: int, input_shape: Size, arguments: dict[str, Any]) -> nn.Module:
    if "/" in name:
        raise NetworkError(f"hf:{name} is a published network: add it with {argument('pretrained', True)}")
    return build_classifier(name, classes, arguments, input_shape)


_LIBRARIES: dict[str, Callable[[str, int, Size, dict[str, Any]], nn.Module]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "hf": _transformers,
}


def require_known(library: str, name: str, known: Sequence[str]) -> None:
    """Raise NetworkError, with names that are close, where a library has no such model."""
    if name not in known:
        close = get_close_matches(name, known) or known[:3]
        raise NetworkError(f"{library} has no model {name}: expected one of its names, such as {', '.join(close)}")


def _read(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise NetworkError(f"{path} is no regular file: expected a Python file with a factory")
    try:
        return path.read_bytes()
    except OSError as error:
        raise NetworkError(f"cannot read {path} ({error.strerror}): expected a Python file with a factory") from None


@contextmanager
def foreign_code(text: str) -> Iterator[None]:
    """Turn whatever a library's or a user's code raises into one line that names file and line."""
    try:
        yield
    except (FastsitchError, KeyboardInterrupt):
        raise
    # code may also call sys.exit, or raise what is no Exception
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise NetworkError(
            f"{text} cannot be built: {type(error).__name__} in {frame.filename}:{frame.lineno}: {first_line(error)}"
        ) from error
