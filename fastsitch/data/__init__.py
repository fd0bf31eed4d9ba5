"""Data sets as uint8 tensors in memory."""

from fastsitch.data.dataset import Dataset, Normalisation, Split, augment
from fastsitch.data.load import DEFAULT_DATASET, SIZES, DatasetSize, canonical_dataset, dataset_folder, load_dataset

__all__ = [
    "DEFAULT_DATASET",
    "SIZES",
    "Dataset",
    "DatasetSize",
    "Normalisation",
    "Split",
    "augment",
    "canonical_dataset",
    "dataset_folder",
    "load_dataset",
]
