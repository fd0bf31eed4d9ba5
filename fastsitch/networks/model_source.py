"""Where the modules of added networks come from: torchvision, timm, or a factory in a Python file of the user."""

import hashlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fastsitch.errors import NetworkError
from fastsitch.identity import stable_hash
from fastsitch.networks.trace import first_line

Size = tuple[int, int, int]
"""Channels, height, width of an image."""


@dataclass(frozen=True)
class ModelSource:
    """``torchvision:NAME``, ``timm:NAME``, or ``FILE.py:FACTORY`` with an absolute path and the file's sha256."""

    text: str
    file_hash: str | None = None

    @classmethod
    def parse(cls, text: str) -> "ModelSource":
        """Read what a user named; raises NetworkError for another form or a missing file. Nothing is imported."""
        kind, _, name = text.partition(":")
        if kind in _LIBRARIES and name:
            return cls(text)
        location, _, factory = text.rpartition(":")
        if not location.endswith(".py") or not factory.isidentifier():
            raise NetworkError(f"--from {text}: expected torchvision:NAME, timm:NAME or FILE.py:FACTORY")
        path = Path(location).resolve()
        return cls(f"{path}:{factory}", hashlib.sha256(_read(path)).hexdigest())

    def build(self, classes: int, input_shape: Size, key: Any = 0) -> nn.Module:
        """The network with the weights that its own code draws, from a generator seeded by ``key``: fp32, CPU, eval.

        Code of the library, or of the file that the user named, runs here. Raises NetworkError when it fails, and when
        the file is no longer the one that was named.
        """
        kind, _, name = self.text.partition(":")
        generator = torch.default_generator
        state = generator.get_state()
        try:
            generator.manual_seed(int(stable_hash(key)[:15], 16))
            with _failures_named(self.text):
                library = _LIBRARIES.get(kind)
                made = self._from_file(classes, input_shape) if library is None else library(name, classes, input_shape)
        finally:
            generator.set_state(state)
        if not isinstance(made, nn.Module):
            raise NetworkError(f"{self.text} gives a {type(made).__name__}: expected an nn.Module")
        made = made.float().cpu()
        # a train() of its own need not return anything
        made.eval()
        return made

    def _from_file(self, classes: int, input_shape: Size) -> Any:
        location, _, name = self.text.rpartition(":")
        path = Path(location)
        content = _read(path)
        found = hashlib.sha256(content).hexdigest()
        if found != self.file_hash:
            raise NetworkError(
                f"{path} has changed since the network was added (its sha256 begins with {found[:8]}, not with "
                f"{(self.file_hash or '')[:8]}): restore it, or add the network and train it, both again with --force"
            )
        factory = getattr(_imported(path, content, found), name, None)
        if not callable(factory):
            raise NetworkError(f"{path} has no function {name}: expected one that returns an nn.Module")
        known = {"classes": classes, "num_classes": classes, "input_shape": input_shape}
        taken = inspect.signature(factory).parameters
        return factory(**{key: value for key, value in known.items() if key in taken})


def _torchvision(name: str, classes: int, input_shape: Size) -> nn.Module:
    from torchvision import models

    # classification alone: builders of other tasks would download a backbone
    _require_known("torchvision", name, models.list_models(module=models))
    _, height, width = input_shape
    # what a few families have to know of the image beforehand
    options: dict[str, Any] = {}
    if name.startswith("vit_"):
        options = {"image_size": height}
    elif name.startswith("maxvit_"):
        options = {"input_size": (height, width)}
    return models.get_model(name, weights=None, num_classes=classes, **options)  # type: ignore[no-any-return]


def _timm(name: str, classes: int, input_shape: Size) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise NetworkError(f"timm:{name}: timm is not installed; pip install 'fastsitch[timm]'") from None
    # other schemes would have timm ask the network for configurations
    _require_known("timm", name.partition(".")[0], timm.list_models())
    channels, *size = input_shape
    fixed = getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)
    options: dict[str, Any] = {"img_size": tuple(size)} if fixed else {}
    made: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels, **options)
    return made


_LIBRARIES: dict[str, Callable[[str, int, Size], nn.Module]] = {"torchvision": _torchvision, "timm": _timm}


def _require_known(library: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        close = get_close_matches(name, known) or known[:3]
        raise NetworkError(f"{library} has no model {name}: expected one of its names, such as {', '.join(close)}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise NetworkError(f"{path} cannot be read ({error.strerror}): expected a Python file with a factory") from None


def _imported(path: Path, content: bytes, digest: str) -> ModuleType:
    """The module made of exactly these bytes, which were hashed; run once per process."""
    name = f"fastsitch_file_{digest[:16]}"
    if name not in sys.modules:
        module = ModuleType(name)
        module.__file__ = str(path)
        sys.modules[name] = module
        try:
            exec(compile(content, str(path), "exec"), module.__dict__)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


@contextmanager
def _failures_named(text: str) -> Iterator[None]:
    """Turn whatever a library's or a user's code raises into one line with the place where it arose."""
    try:
        yield
    except NetworkError:
        raise
    # an exit or an interrupt of the code's own is a failure too
    except (Exception, SystemExit) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise NetworkError(
            f"{text} cannot be built: {type(error).__name__} in {frame.filename}:{frame.lineno}: {first_line(error)}"
        ) from error
