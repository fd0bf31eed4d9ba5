"""Data sets as uint8 tensors in memory."""

from fastsitch.data.dataset import Dataset, Normalisation, Split
from fastsitch.data.load import (
    DEFAULT_DATASET,
    SIZES,
    DatasetSize,
    canonical_dataset,
    dataset_folder,
    dataset_size,
    known_size,
    load_dataset,
)
from fastsitch.data.transform import Transform
from fastsitch.data.views import Views

__all__ = [
    "DEFAULT_DATASET",
    "SIZES",
    "Dataset",
    "DatasetSize",
    "Normalisation",
    "Split",
    "Transform",
    "Views",
    "canonical_dataset",
    "dataset_folder",
    "dataset_size",
    "known_size",
    "load_dataset",
]
