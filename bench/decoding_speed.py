"""Images in files: how fast they are decoded beside the bare decoder, and how much memory it takes.

    python bench/make_photos.py photos --train 20000 --test 2000
    python bench/decoding_speed.py photos [--counts 2000,20000] [--repeats 3] [--json FILE]

Reads every training image once, resized and cropped to 224 pixels, in batches of 256: through fastsitch, once as pixels
and once normalised, as a network gets them, and through as many threads that do nothing else. Every measurement is a
process of its own; peaks are those of the process.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

OURS = """
import resource, sys, time
from pathlib import Path
import torch
from fastsitch.data import Normalisation, Preprocessing, Transform
from fastsitch.data.dataset_name import DatasetName
from fastsitch.data.image_folder import ImageFolder
count = int(sys.argv[2])
name = DatasetName.parse(f"imagefolder:{sys.argv[1]}")
files = ImageFolder.scan(name, Path(sys.argv[1]).parent).files()[0][:count]
preprocessing = Preprocessing((224, 224), (256, 256))
transform = Transform(Normalisation((0.5,) * 3, (0.5,) * 3), (224, 224), preprocessing)
use = transform.apply if sys.argv[3] == "normalised" else lambda images: images.read(preprocessing)
order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
shuffled = files[order]
shuffled.announce()
# torchvision is imported when the first image is resized
use(files[:1])
shuffled.announce()
start = time.perf_counter()
for first in range(0, count, 256):
    use(shuffled[first : first + 256])
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


def measured(code: str, folder: Path, count: int, what: str = "") -> tuple[float, int]:
    """Images per second, and the peak of memory in KiB."""
    ended = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(count), what], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    rate, peak = ended.stdout.split()
    return float(rate), int(peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--counts", default="2000,20000")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = {}
    for count in map(int, options.counts.split(",")):
        rates: dict[str, list[float]] = {"alone": [], "pixels": [], "normalised": []}
        peaks: dict[str, list[int]] = {"alone": [], "pixels": [], "normalised": []}
        for _ in range(options.repeats):
            for what in rates:
                rate, peak = measured(ALONE if what == "alone" else OURS, options.folder, count, what)
                rates[what].append(rate)
                peaks[what].append(peak)
        print(f"{count} images: the decoder alone {statistics.median(rates['alone']):.0f} images/s", flush=True)
        for what in ("pixels", "normalised"):
            ratios = [ours / alone for ours, alone in zip(rates[what], rates["alone"], strict=True)]
            print(
                f"  {what}: {statistics.median(rates[what]):.0f} images/s, {statistics.median(ratios):.2f} of it "
                f"({min(ratios):.2f} to {max(ratios):.2f}); peak {statistics.median(peaks[what]) / 1024:.0f} MB; "
                f"n = {options.repeats}",
                flush=True,
            )
        found[count] = {"rates": rates, "peaks": peaks}
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
