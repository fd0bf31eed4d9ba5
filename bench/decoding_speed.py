"""Images in files: how fast they are decoded beside the bare decoder, and how much memory it takes.

    python bench/decoding_speed.py --make photos [--images 20000]
    python bench/decoding_speed.py photos [--counts 2000,20000] [--repeats 3] [--json FILE]

``--make`` writes JPEGs of 224 to 500 pixels, upscaled from the embedded images with noise, in 20 class folders.
Measuring reads every training image once, resized and cropped to 224 pixels, in batches of 256: through fastsitch, and
through as many threads that do nothing else. Every measurement is a process of its own; peaks are those of the process.
"""

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CLASSES = 20

OURS = """
import resource, sys, time
from pathlib import Path
import torch
from fastsitch.data import Preprocessing, Normalisation, Transform
from fastsitch.data.dataset_name import DatasetName
from fastsitch.data.image_folder import ImageFolder
count = int(sys.argv[2])
name = DatasetName.parse(f"imagefolder:{sys.argv[1]}")
files = ImageFolder.scan(name, Path(sys.argv[1]).parent).files()[0][:count]
transform = Transform(Normalisation((0.5,) * 3, (0.5,) * 3), (224, 224), Preprocessing((224, 224), (256, 256)))
order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
shuffled = files[order]
shuffled.announce()
# torchvision is imported when the first image is resized
transform.apply(files[:1])
shuffled.announce()
start = time.perf_counter()
for first in range(0, count, 256):
    transform.apply(shuffled[first : first + 256])
print(count / (time.perf_counter() - start), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""

ALONE = """
import os, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from PIL import Image
from torchvision.transforms import functional as F
count = int(sys.argv[2])
files = sorted(Path(sys.argv[1], "train").rglob("*.jpg"))[:count]
def decoded(file):
    with Image.open(file) as picture:
        return np.asarray(F.center_crop(F.resize(picture.convert("RGB"), [256]), [224]))
start = time.perf_counter()
with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
    for first in range(0, count, 256):
        list(pool.map(decoded, files[first : first + 256]))
print(count / (time.perf_counter() - start), 0)
"""


def make(folder: Path, images: int) -> None:
    """The same files on every machine with the same version of Pillow."""
    import numpy as np
    from PIL import Image

    import fastsitch

    dataset = fastsitch.load_dataset("fashion-mini")
    for split, data, count in (("train", dataset.train, images), ("test", dataset.test, max(CLASSES, images // 10))):
        for label in range(CLASSES):
            (folder / split / f"class{label:02d}").mkdir(parents=True, exist_ok=True)

        def write(k: int, split: str = split, pixels: object = data.pixels.numpy()) -> None:
            generator = np.random.default_rng([k, split == "test"])
            height, width = generator.integers(224, 501, 2)
            picture = Image.fromarray(pixels[k % len(pixels)])  # type: ignore[index]
            large = np.asarray(picture.resize((int(width), int(height)), Image.Resampling.BICUBIC), np.int16)
            noisy = large + generator.integers(-12, 13, large.shape, np.int16)
            path = folder / split / f"class{k % CLASSES:02d}" / f"{k:06d}.jpg"
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(write, range(count)))


def measured(code: str, folder: Path, count: int) -> tuple[float, int]:
    """Images per second, and the peak of memory in KiB."""
    ended = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(count)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    rate, peak = ended.stdout.split()
    return float(rate), int(peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--make", action="store_true")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--counts", default="2000,20000")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.make:
        make(options.folder, options.images)
        return
    found = {}
    for count in map(int, options.counts.split(",")):
        rates: dict[str, list[float]] = {"ours": [], "alone": []}
        peaks = []
        for _ in range(options.repeats):
            rates["alone"].append(measured(ALONE, options.folder, count)[0])
            rate, peak = measured(OURS, options.folder, count)
            rates["ours"].append(rate)
            peaks.append(peak)
        ratio = statistics.median(ours / alone for ours, alone in zip(rates["ours"], rates["alone"], strict=True))
        print(
            f"{count} images: {statistics.median(rates['ours']):.0f} images/s, the decoder alone "
            f"{statistics.median(rates['alone']):.0f}, {ratio:.2f} of it; "
            f"peak {statistics.median(peaks) / 1024:.0f} MB; n = {options.repeats}",
            flush=True,
        )
        found[count] = {"rates": rates, "peaks": peaks}
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
