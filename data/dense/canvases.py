"""The embedded data set of dense tasks: scikit-learn's digits, scaled and pasted with overlap, written once with their boxes and masks.

Both forms that people's data have are written, of the same pixels: COCO's (boxes and masks of objects) and masks of class indices.
A digit's mask is what is visible of it, since later digits lie on top of earlier ones; its box is that of the mask.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from data import seeds
from data.layouts import digits

DEFAULT_PATH = "datasets/canvases"
CLASSES = ("background", *map(str, range(10)))  # of the masks; objects have the digits alone
SIDES = (96, 128)  # pixels of a canvas, each side by itself
DIGITS = (2, 4)  # on a canvas
SCALES = (0.3, 0.5)  # side of a digit's square, as a share of the canvas's shorter side
HIDDEN = 0.4  # a digit is never covered by more than this share of its pixels: people recognise it still
EDGE, CONTRAST = 0.35, 2.5  # where a digit ends, as a share of full ink, and how steeply: eight pixels made forty are blurred
PALETTE = (0, 0, 0, *(230, 25, 75), *(60, 180, 75), *(255, 225, 25), *(0, 130, 200), *(245, 130, 48), *(145, 30, 180), *(70, 240, 240),
           *(240, 50, 230), *(210, 245, 60), *(250, 190, 212))


def ensure_canvases(root: str = DEFAULT_PATH) -> bool:
    """Write ``root/images/{train,val}``, ``root/annotations/instances_{train,val}.json`` and ``root/masks/{train,val}`` unless they are
    there; True when this call wrote them.

    Raises:
        DataError: scikit-learn is missing, or ``root`` cannot be written.
    """
    return digits.write_once(root, ("images", "annotations", "masks"), write_canvases)


def write_canvases(folder: str, train: int = 1200, val: int = 200) -> None:
    """Write so many canvases into ``folder``; fewer of them are the first of the full set.

    The digits of training canvases are those that the digits' own split trains on, so that a backbone started from a classifier of digits
    has not seen those of the validation canvases.
    """
    pixels, targets = digits.load_pixels()
    os.makedirs(os.path.join(folder, "annotations"), exist_ok=True)
    with open(os.path.join(folder, "classes.txt"), "w", encoding="utf-8") as file:
        file.write("".join(f"{name}\n" for name in CLASSES))
    for number, (split, count, members) in enumerate(zip(("train", "val"), (train, val), digits.split_indices(targets), strict=True)):
        for kind in ("images", "masks"):
            os.makedirs(os.path.join(folder, kind, split), exist_ok=True)
        images, annotations = [], []
        for canvas in range(count):
            image, covering, labels = draw_canvas(pixels, targets, members, seeds.derive32(number, canvas))
            name, image_id = f"{canvas:04d}.png", canvas + 1
            Image.fromarray(image).save(os.path.join(folder, "images", split, name))
            _save_mask(os.path.join(folder, "masks", split, name), np.array([0, *(label + 1 for label in labels)])[covering])
            images.append(dict(id=image_id, file_name=name, height=image.shape[0], width=image.shape[1]))
            annotations += [dict(id=len(annotations) + at, image_id=image_id, category_id=int(label) + 1, iscrowd=0,
                                 **_outline(covering == at)) for at, label in enumerate(labels, 1)]
        categories = [dict(id=digit + 1, name=str(digit)) for digit in range(10)]
        with open(os.path.join(folder, "annotations", f"instances_{split}.json"), "w", encoding="utf-8") as file:
            json.dump(dict(images=images, annotations=annotations, categories=categories), file)


def draw_canvas(pixels: np.ndarray, targets: np.ndarray, members: Sequence[int], seed: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """A canvas with some of the digits ``members``.

    Returns:
        (the image (H, W) uint8; of each of its pixels the number of the digit that is seen there, from 1, 0 for the background; what each
        digit is)
    """
    # RandomState: its streams are the same in every version of numpy.
    random = np.random.RandomState(seed)
    height, width = random.randint(SIDES[0], SIDES[1] + 1, 2)
    canvas = random.uniform(0, 70) + random.normal(0, 6, (height, width))
    covering, labels, areas = np.zeros((height, width), dtype=np.int64), [], []
    count = random.randint(DIGITS[0], DIGITS[1] + 1)
    inks = random.permutation(np.linspace(150, 255, count))  # apart, so that overlapping digits are
    while len(labels) < count:
        index = members[random.randint(len(members))]
        side = round(random.uniform(*SCALES) * min(height, width))
        ink = np.asarray(Image.fromarray(pixels[index]).resize((side, side), Image.Resampling.BICUBIC)) / 255
        ink = ((ink - EDGE) * CONTRAST + 0.5).clip(0, 1)
        top, left = random.randint(height - side + 1), random.randint(width - side + 1)
        here = np.s_[top:top + side, left:left + side]
        after = covering.copy()
        after[here][ink > 0.5] = len(labels) + 1
        seen = np.bincount(after.ravel(), minlength=count + 1)[1:]
        if any(part < (1 - HIDDEN) * area for part, area in zip(seen.tolist(), areas, strict=False)):
            continue  # another place
        canvas[here] += ink * (inks[len(labels)] - canvas[here])
        covering = after
        areas.append(int(seen[len(labels)]))
        labels.append(int(targets[index]))
    return canvas.round().clip(0, 255).astype(np.uint8), covering, labels


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """A mask (H, W) in COCO's uncompressed form: the lengths of runs of 0 and 1 by turns, column by column, beginning with 0."""
    flat = np.concatenate([[False], mask.ravel(order="F").astype(bool)])
    changes = np.flatnonzero(np.diff(flat))
    return dict(size=list(mask.shape), counts=np.diff(np.concatenate([[0], changes, [mask.size]])).tolist())


def _outline(mask: np.ndarray) -> dict[str, Any]:
    """Box (x, y, width, height), area and mask of an object, as COCO's annotations have them."""
    rows, columns = np.flatnonzero(mask.any(axis=1)).tolist(), np.flatnonzero(mask.any(axis=0)).tolist()
    return dict(bbox=[columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]], area=int(mask.sum()),
                segmentation=run_lengths(mask))


def _save_mask(path: str, mask: np.ndarray) -> None:
    image = Image.fromarray(mask.astype(np.uint8), "P")
    image.putpalette(PALETTE)
    image.save(path)
