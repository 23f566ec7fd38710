"""What --predict writes of objects and maps beside its lines: annotated pictures, masks, a file in COCO's form."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from config import ConfigError
from data.dense.shapes import decode_mask
from data.errors import UnreadableImage
from data.layouts.input_paths import InputImages
from utils.inference.found import Found
from utils.inference.outputs import Prediction
from utils.runtime.files import write_atomically
from utils.visualization.drawing import save
from utils.visualization.overlays import palette

_SMALL = 480  # pixels: pictures of a longer side below are enlarged by a whole number, so that words can be read on them


def files_in(folder: str, given: InputImages) -> list[str]:
    """A PNG in ``folder`` for each image, named as it is; of images of the same name the later ones have their number behind it."""
    stems = [os.path.splitext(os.path.basename(given.path(number)))[0] or "image" for number in range(len(given))]
    taken: set[str] = set()
    for number, stem in enumerate(stems):
        while stems[number] in taken:
            stems[number] = stem = f"{stem}-{number + 1}"
        taken.add(stems[number])
    return [os.path.join(folder, f"{stem}.png") for stem in stems]


def make_folder(path: str, key: str) -> str:
    """``path``, with the home folder put in, as a folder that is there.

    Raises:
        ConfigError: it cannot be made.
    """
    path = os.path.expanduser(path)
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{key} is {path}, which cannot be made a folder ({error.strerror}); give another one") from None
    return path


class Pictures:
    """Each image with what was found drawn on it, a PNG each; images are read once more."""

    def __init__(self, folder: str, given: InputImages):
        self.given, self.paths = given, files_in(folder, given)

    def add(self, prediction: Prediction) -> None:
        if prediction.fault or prediction.draw is None:
            return
        try:
            image = self.given.load(prediction.number)
        except UnreadableImage:  # it could be read a moment ago
            return
        factor = max(1, _SMALL // max(image.size))
        picture = image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST) if factor > 1 else image
        save(prediction.draw(picture, float(factor)), self.paths[prediction.number])


class Masks:
    """A PNG an image of the image's size: a map of classes has each pixel's class, with colours; of objects each pixel has the number of
    the likeliest object there, from 1 in the order of the record, 0 where there is none (16 bits where there are more than 255)."""

    def __init__(self, folder: str, given: InputImages):
        self.paths = files_in(folder, given)

    def add(self, prediction: Prediction) -> None:
        if prediction.fault:
            return
        numbers = prediction.found if isinstance(prediction.found, np.ndarray) else _numbered(prediction.found)
        image = Image.fromarray(numbers)
        if numbers.dtype == np.uint8:
            image.putpalette(palette() if isinstance(prediction.found, np.ndarray) else [0, 0, 0, *palette()[:-3]])
        write_atomically(self.paths[prediction.number], lambda file: image.save(file, format="PNG"))


def _numbered(found: Found) -> np.ndarray:
    """(H, W) numbers of the objects."""
    numbers = np.zeros(found.size, dtype=np.uint8 if len(found) < 256 else np.uint16)
    for number, mask in reversed(list(enumerate(found.masks, 1))):
        numbers[decode_mask(mask)] = number
    return numbers


class CocoFile:
    """All objects in COCO's form, as tools for annotating open it: images, annotations with a score, categories.

    Args:
        classes: names, in the order of the labels.
    """

    def __init__(self, path: str, classes: Sequence[str], given: InputImages):
        self.path, self.given = path, given
        self.content: dict[str, list[dict[str, Any]]] = dict(
            images=[], annotations=[], categories=[dict(id=number, name=name) for number, name in enumerate(classes, 1)])

    def __enter__(self) -> CocoFile:
        return self

    def add(self, prediction: Prediction) -> None:
        if prediction.fault:
            return
        height, width = prediction.found.size
        self.content["images"].append(dict(id=prediction.number + 1, file_name=prediction.path, height=height, width=width))
        for found in prediction.record["objects"]:
            left, top, right, bottom = found["box"]
            box = [left, top, round(right - left, 2), round(bottom - top, 2)]
            mask = dict(segmentation=found["mask"], area=int(decode_mask(found["mask"]).sum())) if "mask" in found else dict(
                segmentation=[], area=round(box[2] * box[3], 2))
            self.content["annotations"].append(dict(
                id=len(self.content["annotations"]) + 1, image_id=prediction.number + 1, category_id=found["number"] + 1, bbox=box,
                iscrowd=0, score=found["score"], **mask))

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            write_atomically(self.path, lambda file: file.write(json.dumps(self.content).encode()))
