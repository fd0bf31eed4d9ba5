"""Stable identities: hashes and random generators that are the same on every machine and in every process."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def stable_hash(content: Any) -> str:
    """sha256 (hex) of a JSON-able value; key order does not matter."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 (hex) over names, shapes, dtypes and bytes of named tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def torch_generator(*key: Any) -> torch.Generator:
    """A CPU generator seeded by the stable hash of ``key``."""
    generator = torch.Generator()
    generator.manual_seed(int(stable_hash(list(key))[:15], 16))
    return generator


def numpy_generator(*key: Any) -> np.random.Generator:
    """A NumPy generator seeded by the stable hash of ``key``."""
    return np.random.Generator(np.random.PCG64(int(stable_hash(list(key))[:32], 16)))
