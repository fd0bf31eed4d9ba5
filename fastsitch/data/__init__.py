"""Data sets as uint8 tensors in memory."""

from fastsitch.data.dataset import Dataset, Normalisation, Split
from fastsitch.data.image_files import ImageFiles
from fastsitch.data.preprocessing import Preprocessing
from fastsitch.data.random_views import Views
from fastsitch.data.read_dataset import (
    SIZES,
    DatasetSize,
    canonical_dataset,
    dataset_folder,
    dataset_size,
    known_size,
    load_dataset,
)
from fastsitch.data.transform import Transform

__all__ = [
    "SIZES",
    "Dataset",
    "DatasetSize",
    "ImageFiles",
    "Normalisation",
    "Preprocessing",
    "Split",
    "Transform",
    "Views",
    "canonical_dataset",
    "dataset_folder",
    "dataset_size",
    "known_size",
    "load_dataset",
]
