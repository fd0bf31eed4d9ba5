"""Make the embedded data set ``fashion_mini.npz``: the first 1,000 training and 200 test images of every class.

Run once, with Fashion-MNIST's IDX files at hand:
    python -m fastsitch.data.make_fashion_mini FOLDER OUT.npz
"""

import sys
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastsitch.data.file_formats import read_idx_array
from fastsitch.identity import numpy_generator


def balanced(folder: Path, prefix: str, per_class: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The first ``per_class`` images of each of the 10 classes, in a fixed shuffled order."""
    images = read_idx_array(folder, f"{prefix}-images-idx3-ubyte", 3)
    labels = read_idx_array(folder, f"{prefix}-labels-idx1-ubyte", 1)
    chosen = np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in range(10)])
    numpy_generator("fashion-mini", prefix).shuffle(chosen)
    return images[chosen], labels[chosen]


def main(folder: Path, out: Path) -> None:
    """Write the npz with fixed time stamps, so that the same input makes the same file."""
    x_train, y_train = balanced(folder, "train", 1000)
    x_test, y_test = balanced(folder, "t10k", 200)
    arrays = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
    with zipfile.ZipFile(out, "w") as archive:
        for name, array in arrays.items():
            content = BytesIO()
            np.save(content, array)
            entry = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, content.getvalue(), zipfile.ZIP_DEFLATED, 9)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
