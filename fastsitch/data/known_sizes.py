"""How large the data sets are that are known by name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetSize:
    """What planning needs to know of a data set: images per split, classes, image size; ``assumed`` if guessed.

    Height and width are 0 where images have several sizes.
    """

    train: int
    test: int
    classes: int
    height: int = 32
    width: int = 32
    assumed: bool = False


SIZES = {
    "fashion-mini": DatasetSize(10_000, 2_000, 10),
    "fashion-mnist": DatasetSize(60_000, 10_000, 10),
    "cifar10": DatasetSize(50_000, 10_000, 10),
    "cifar100": DatasetSize(50_000, 10_000, 100),
}
