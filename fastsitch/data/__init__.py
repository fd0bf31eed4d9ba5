"""Data sets as uint8 tensors in memory."""

from fastsitch.data.dataset import Dataset, Split, Whole
from fastsitch.data.dataset_name import (
    canonical_dataset,
    dataset_folder,
    dataset_of_folder,
    known_size,
    whole_dataset,
)
from fastsitch.data.image_files import ImageFiles
from fastsitch.data.known_sizes import SIZES, DatasetSize
from fastsitch.data.normalisation import Normalisation
from fastsitch.data.preprocessing import Preprocessing
from fastsitch.data.random_views import Views
from fastsitch.data.read_dataset import dataset_size, load_dataset
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
    "Whole",
    "canonical_dataset",
    "dataset_folder",
    "dataset_of_folder",
    "dataset_size",
    "known_size",
    "load_dataset",
    "whole_dataset",
]
