"""How fast images are read: every path of the loader against the usual stack, in turns, in one process on one thread.

The reference is torchvision's ImageFolder (Pillow) with timm's training transform (224, rand-m9-mstd0.5-inc1, erasing 0.25, bicubic)
and float32 collation; for evaluation, timm's evaluation transform. The images are synthetic, so that nothing is downloaded: coloured
1/f textures under translucent polygons in ImageNet's sizes and JPEG qualities, which take a decoder as long as ImageNet's do; and
copies of them with a shorter side of 352 and 256 pixels, quality 90.

    python scripts/bench_data.py [--images 200] [--repeats 9] [--workers]

The last lines are ratios of medians to the reference: `ratio-device`, `ratio-352`, `ratio-256`, `ratio-val` and, last, `ratio`, that of
the path that finishes images in the DataLoader workers.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when numpy and torch are imported
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import default_collate
from torchvision.datasets import ImageFolder

from config import get_config
from data import build_loaders
from data.decoding.jpeg import LIBRARY
from data.loading.dataset import EvalImages
from data.loading.workers import usable_cpus
from data.sources.folder import scan_folder
from data.transforms.build import build_eval_transform, build_train_transform, preprocessing
from data.transforms.build_pipelines import build_eval_pipeline

BATCH = 20
# ImageNet's sizes, roughly: width, height, share.
SIZES = [(500, 375, 0.48), (375, 500, 0.14), (500, 333, 0.12), (333, 500, 0.05), (500, 500, 0.03), (400, 300, 0.05), (640, 480, 0.09),
         (320, 240, 0.02), (250, 200, 0.02)]


def textured_image(rng: np.random.Generator, size: tuple[int, int] | None = None) -> Image.Image:
    """A synthetic photograph: a 1/f texture in correlated colours, some translucent polygons; its file and those of its copies come to
    the size of ImageNet's (110, 50 and 30 KB on average). Of ``size`` (width, height), or of one of ImageNet's."""
    width, height = size or SIZES[rng.choice(len(SIZES), p=[share for *_, share in SIZES])][:2]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = np.maximum(frequency, 1 / max(width, height)) ** -rng.uniform(1.3, 1.6)
    planes = []
    for _ in range(3):
        spectrum = amplitude * (rng.standard_normal(amplitude.shape) + 1j * rng.standard_normal(amplitude.shape))
        plane = np.fft.irfft2(spectrum, s=(height, width))
        planes.append((plane - plane.mean()) / plane.std())
    light, warm, cold = planes
    colours = np.stack([light + 0.6 * warm, light - 0.3 * warm - 0.2 * cold, light + 0.65 * cold], axis=-1)
    colours = rng.uniform(90, 150) + rng.uniform(35, 60) * colours + 6 * rng.standard_normal(colours.shape)  # and a sensor's noise
    image = Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8)).convert("RGBA")
    sheet = Image.new("RGBA", image.size)
    draw = ImageDraw.Draw(sheet)
    for _ in range(rng.integers(2, 7)):
        x, y, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(20, 160)
        corners = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 7)))
        draw.polygon([(x + radius * np.cos(a), y + radius * np.sin(a)) for a in corners],
                     fill=(*rng.integers(0, 256, 3).tolist(), int(rng.integers(60, 200))))
    return Image.alpha_composite(image, sheet).convert("RGB")


def make_sets(root: str, count: int, names: Sequence[str] = ("originals", "352", "256"), distinct: int | None = None) -> None:
    """Write ``root/{originals,352,256}/{train,val}/<class>/*.jpg``, on all cores; val is a link to train.

    Args:
        names: these sets alone.
        distinct: images that are made; further ones are links to their files, which take a reader as long.
    """
    for name in names:
        for label in range(4):
            os.makedirs(os.path.join(root, name, "train", str(label)))
        os.symlink("train", os.path.join(root, name, "val"))
    made = min(count, distinct or count)
    with ProcessPoolExecutor(usable_cpus()) as pool:
        pixels = sum(pool.map(_write_image, itertools.repeat(root, made), range(made), itertools.repeat(names), chunksize=4))
    for number, name in itertools.product(range(made, count), names):
        os.link(_path(root, name, number % made), _path(root, name, number))
    sizes = {name: sum(os.path.getsize(_path(root, name, number)) for number in range(made)) / made / 1000 for name in names}
    print(f"{count} images: {pixels / made / 1e6:.3f} MP, {', '.join(f'{name} {size:.1f} KB' for name, size in sizes.items())}; "
          f"decoder {LIBRARY}, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")


def _path(root: str, name: str, number: int) -> str:
    return os.path.join(root, name, "train", str(number % 4), f"{number:05d}.jpg")


def _write_image(root: str, number: int, names: Sequence[str]) -> int:
    """Image ``number`` into each of the sets; its pixels."""
    rng = np.random.default_rng((0, number))
    image = textured_image(rng)
    quality, subsampling = int(rng.integers(85, 97)), 0 if rng.random() < 0.78 else 2
    for name in names:
        if name == "originals":
            image.save(_path(root, name, number), quality=quality, subsampling=subsampling)
            continue
        scale = min(1.0, int(name) / min(image.size))
        smaller = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        smaller.save(_path(root, name, number), quality=90)
    return image.width * image.height


def configuration(root: str, name: str, *opts: object):
    return get_config(None, ["DATA.DATA_PATH", os.path.join(root, name), "DATA.NUM_WORKERS", 0, "DATA.BATCH_SIZE", BATCH,
                             "TEST.BATCH_SIZE", BATCH, *opts])


def reference(folder: str, transform: Callable) -> Callable[[list[int]], object]:
    images = ImageFolder(folder, transform)
    return lambda indices: default_collate([images[i] for i in indices])


def training(root: str, name: str, where: str) -> Callable[[list[int]], object]:
    images = build_loaders(configuration(root, name, "DATA.AUGMENT_ON", where), splits=("train",)).train.dataset
    epoch = iter(range(1 << 30))
    return lambda indices: images.__getitems__([(next(epoch), i, 0) for i in indices])


def evaluation(root: str, device: str) -> Callable[[list[int]], object]:
    config = configuration(root, "originals", "DATA.DECODER", "fast")
    pipeline, _ = build_eval_pipeline(config, torch.device(device), published=False)
    return EvalImages(scan_folder(os.path.join(config.DATA.DATA_PATH, "val")), pipeline, BATCH).__getitems__


def in_turns(paths: dict[str, Callable[[list[int]], object]], count: int, repeats: int) -> dict[str, float]:
    """Median milliseconds an image of every path, of this process's own time; in each round every path reads the same images."""
    times: dict[str, list[float]] = {name: [] for name in paths}
    batches = [list(range(i, i + BATCH)) for i in range(0, count - BATCH + 1, BATCH)]
    for number in range(repeats + 1):
        for name, path in paths.items():
            start = time.process_time()
            for batch in batches:
                path(batch)
            if number:  # the first round warms up
                times[name].append(1000 * (time.process_time() - start) / (len(batches) * BATCH))
    return {name: statistics.median(values) for name, values in times.items()}


def scaling(root: str, count: int) -> float:
    """Speed of two DataLoader workers over that of one, for the path that finishes images there."""
    rates = []
    for workers in (1, 2):
        config = configuration(root, "originals", "DATA.AUGMENT_ON", "worker", "DATA.NUM_WORKERS", workers,
                               "TRAIN.EPOCHS", 25, "TRAIN.WARMUP_EPOCHS", 0)
        loaders = build_loaders(config, splits=("train",))
        batches = loaders.batches()
        for _ in range(4):
            next(batches)
        steps = max(20, 4 * count // BATCH)
        start = time.perf_counter()
        for _ in range(steps):
            next(batches)
        rates.append(steps * BATCH / (time.perf_counter() - start))
        loaders.close()
        print(f"{workers} DataLoader worker{'s' if workers > 1 else ''}: {rates[-1]:.0f} images/s")
    return rates[1] / rates[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=200, help="images to make (a multiple of 20)")
    parser.add_argument("--repeats", type=int, default=9, help="rounds; medians are taken over them")
    parser.add_argument("--workers", action="store_true", help="also how two DataLoader workers compare with one (needs two idle cores)")
    options = parser.parse_args()
    count = max(BATCH, options.images // BATCH * BATCH)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench-data-") as root:
        make_sets(root, count)
        plain = get_config(None, [])
        originals = os.path.join(root, "originals", "train")
        paths = {
            "reference": reference(originals, build_train_transform(plain)),
            "worker": training(root, "originals", "worker"),
            "device": training(root, "originals", "device"),
            "352": training(root, "352", "device"),
            "256": training(root, "256", "device"),
            "reference-val": reference(originals, build_eval_transform(preprocessing(plain))),
            "val": evaluation(root, "cpu"),
        }
        medians = in_turns(paths, count, options.repeats)
        ratios = {name: medians["reference-val" if name == "val" else "reference"] / value for name, value in medians.items()}
        for name, value in medians.items():
            ratio = f"  {ratios[name]:.2f}x" if name in ratios else ""
            print(f"{name:14s} {value:6.3f} ms an image  {1000 / value:6.0f} images/s{ratio}")
        if options.workers:
            print(f"scale-2 {scaling(root, count):.2f}")
    for name in ("device", "352", "256", "val"):
        print(f"ratio-{name} {ratios[name]:.2f}")
    print(f"ratio {ratios['worker']:.2f}")


if __name__ == "__main__":
    main()
