"""How fast images with objects are read: the loaders of dense tasks against torchvision's own, in turns, in one process on one thread.

The images are synthetic JPEGs of 640x480 with seven polygons each, annotated in COCO's format. The reference is torchvision's
CocoDetection with its transforms v2 (shortest size 800, flip, sanitized boxes), boxes and masks, without collation.

    python scripts/bench_dense_data.py [--images 40] [--repeats 5] [--profile instance]

The last lines are images/s of each path and, of those that do the reference's work, the ratio to it.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when numpy and torch are imported
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import numpy as np
import torch
from bench_data import textured_image
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

from config import get_config
from data.dense.loaders import build_dense_loaders

BATCH, OBJECTS, CLASSES = 4, 7, 5
SEMANTIC = ("DATA.DENSE.SHORT_SIDE", [512], "DATA.DENSE.LONG_SIDE", 2048, "DATA.DENSE.SCALE", [0.5, 2], "DATA.DENSE.CROP", 512,
            "DATA.DENSE.CROP_CATEGORY", 0.75, "DATA.DENSE.PHOTOMETRIC", True)
JITTER = ("DATA.DENSE.SHORT_SIDE", [1024], "DATA.DENSE.LONG_SIDE", 1024, "DATA.DENSE.SCALE", [0.1, 2], "DATA.DENSE.CROP", 1024)
PATHS = {  # task, split, keys
    "detection": ("detection", "train", ()),
    "instance": ("instance", "train", ()),
    "detr-crops": ("instance", "train", ("DATA.DENSE.DETR_CROPS", True, "DATA.DENSE.SHORT_SIDE", [480, 640, 800])),
    "copy-paste": ("instance", "train", (*JITTER, "DATA.DENSE.COPY_PASTE", 1.0)),
    "jitter": ("mask", "train", JITTER),
    "semantic": ("semantic", "train", SEMANTIC),
    "val": ("instance", "val", ()),
    "val-256": ("instance", "val", ("DATA.DENSE.SHORT_SIDE", [256], "DATA.DENSE.LONG_SIDE", 426)),
    "val-semantic": ("semantic", "val", SEMANTIC),
}


def make_set(root: str, count: int) -> None:
    """Write ``root/{train,val}2017/*.jpg`` and their annotations; val is a link to train."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for folder in ("train2017", "annotations"):
        os.makedirs(os.path.join(root, folder))
    for number in range(1, count + 1):
        name = f"{number:012d}.jpg"
        textured_image(rng, (640, 480)).save(os.path.join(root, "train2017", name), quality=90)
        images.append(dict(id=number, file_name=name, width=640, height=480))
        for _ in range(OBJECTS):
            x, y, radius, angles = rng.uniform(60, 580), rng.uniform(60, 420), rng.uniform(20, 120), np.sort(rng.uniform(0, 2 * np.pi, 24))
            corners = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1).clip(0, (639, 479))
            (left, top), (right, bottom) = corners.min(axis=0), corners.max(axis=0)
            annotations.append(dict(id=len(annotations) + 1, image_id=number, category_id=int(rng.integers(1, CLASSES + 1)), iscrowd=0,
                                    bbox=[left, top, right - left, bottom - top], area=float((right - left) * (bottom - top) / 2),
                                    segmentation=[corners.reshape(-1).round(2).tolist()]))
    categories = [dict(id=i, name=f"class {i}") for i in range(1, CLASSES + 1)]
    for split in ("train", "val"):
        with open(os.path.join(root, "annotations", f"instances_{split}2017.json"), "w", encoding="utf-8") as file:
            json.dump(dict(images=images, annotations=annotations, categories=categories), file)
    os.symlink("train2017", os.path.join(root, "val2017"))


def path_of(root: str, task: str, split: str, opts: tuple) -> Callable[[list[int]], object]:
    """Batches of the images with some numbers, to the end: normalised on the device, which is the CPU."""
    config = get_config(None, [str(part) for part in ("TASK", task, "DATA.DATA_PATH", root, "DATA.NUM_WORKERS", 0, *opts)])
    loaders = build_dense_loaders(config, splits=(split,))
    images, epoch, device = (loaders.train or loaders.val).dataset, iter(range(1 << 30)), torch.device("cpu")

    def read(indices: list[int]) -> object:
        keys = [(next(epoch), index, 0) for index in indices] if split == "train" else indices
        return images.move(images.__getitems__(keys).parts, device)
    return read


def reference(root: str) -> Callable[[list[int]], object]:
    transform = v2.Compose([v2.ToImage(), v2.RandomShortestSize([800], 1333), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, True),
                            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), v2.SanitizeBoundingBoxes()])
    annotations = os.path.join(root, "annotations", "instances_train2017.json")
    images = wrap_dataset_for_transforms_v2(CocoDetection(os.path.join(root, "train2017"), annotations, transforms=transform),
                                            target_keys=["boxes", "labels", "masks"])
    return lambda indices: [images[i] for i in indices]


def in_turns(paths: dict[str, Callable[[list[int]], object]], count: int, repeats: int) -> dict[str, float]:
    """Median milliseconds an image of every path, of this process's own time; in each round every path reads the same images."""
    times: dict[str, list[float]] = {name: [] for name in paths}
    for number in range(repeats + 1):
        for name, read in paths.items():
            start = time.process_time()
            for first in range(0, count, BATCH):
                read(list(range(first, first + BATCH)))
            if number:  # the first round warms up
                times[name].append(1000 * (time.process_time() - start) / count)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=40, help="images to make (a multiple of 4)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; medians are taken over them")
    parser.add_argument("--profile", choices=PATHS, help="where the time of one path goes, in place of all figures")
    options = parser.parse_args()
    count = max(BATCH, options.images // BATCH * BATCH)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench-dense-data-") as root:
        make_set(root, count)
        if options.profile:
            paths = {options.profile: path_of(root, *PATHS[options.profile])}
            profile = cProfile.Profile()
            profile.runcall(in_turns, paths, count, options.repeats)
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)
            return
        paths = {"reference": reference(root), **{name: path_of(root, *path) for name, path in PATHS.items()}}
        medians = in_turns(paths, count, options.repeats)
    for name, value in medians.items():
        ratio = f"  {medians['reference'] / value:.2f}x" if name == "instance" else ""
        print(f"{name:14s} {value:7.2f} ms an image  {1000 / value:6.1f} images/s{ratio}")


if __name__ == "__main__":
    main()
