"""A folder of JPEGs of 224 to 500 pixels in 30 classes, from the embedded images: ten garments, each turned three ways.

    python bench/make_photos.py photos [--train 3000] [--test 600]

Images are upscaled, with noise that JPEG has to code as it does in photographs. They are the same on every machine with
the same version of Pillow. More images than there are embedded ones repeat them in other sizes, with other noise.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

import fastsitch

GARMENTS = ("tshirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
TURNS = ("upright", "left", "down")
NOISE = 12


def make(folder: Path, train: int, test: int) -> None:
    """Write ``folder/train/CLASS/NUMBER.jpg`` and the same for ``test``."""
    dataset = fastsitch.load_dataset("fashion-mini")
    for split, data, count in (("train", dataset.train, train), ("test", dataset.test, test)):
        for garment in GARMENTS:
            for turn in TURNS:
                (folder / split / f"{garment}-{turn}").mkdir(parents=True, exist_ok=True)

        def write(k: int, split: str = split, data: fastsitch.Split = data) -> None:
            generator = np.random.default_rng([k, split == "test"])
            height, width = (int(side) for side in generator.integers(224, 501, 2))
            index, turn = k % len(data), k % len(TURNS)
            picture = Image.fromarray(data.pixels[index].numpy()).rotate(90 * turn)
            large = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC), np.int16)
            noisy = large + generator.integers(-NOISE, NOISE + 1, large.shape, np.int16)
            name = f"{GARMENTS[int(data.labels[index])]}-{TURNS[turn]}"
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(
                folder / split / name / f"{k:06d}.jpg", quality=90
            )

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(write, range(count)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=3000)
    parser.add_argument("--test", type=int, default=600)
    options = parser.parse_args()
    make(options.folder, options.train, options.test)


if __name__ == "__main__":
    main()
