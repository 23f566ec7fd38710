"""Tiny data sets in the layouts of real ones, folder for folder and value for value.

Each function writes one below ``root`` and returns what it holds: for a layout of maps, per image path the values of its mask.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 12, 16
ADE_NAMES = ("wall", "building, edifice", "sky", "floor, flooring", "tree")


def picture(path: Path, height: int = HEIGHT, width: int = WIDTH, shade: int = 90) -> Path:
    """Write a picture with some structure, as JPEG or PNG by the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((height, width, 3), shade, dtype=np.uint8)
    pixels[:height // 2, :, 0] = 200
    Image.fromarray(pixels).save(path)
    return path


def mask(path: Path, values: np.ndarray, palette: bool = False) -> np.ndarray:
    """Write a mask of numbers; ``palette``: with colours, as Pascal VOC's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values.astype(np.uint8), "P" if palette else "L")
    if palette:
        image.putpalette([shade for value in range(256) for shade in voc_colour(value)])
    image.save(path)
    return values.astype(np.uint8)


def voc_colour(value: int) -> tuple[int, int, int]:
    """The colour of a value in Pascal VOC's palette: its bits, three by three, from the highest bit of each channel on."""
    channels = [0, 0, 0]
    for bit in range(8):
        for channel in range(3):
            channels[channel] |= (value >> (3 * bit + channel) & 1) << (7 - bit)
    return tuple(channels)


def stripes(*values: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A mask of vertical stripes of these values."""
    return np.repeat(np.array(values), -(-width // len(values)))[:width][None].repeat(height, axis=0)


def ade20k(root: Path) -> dict[str, np.ndarray]:
    """ADEChallengeData2016 with five classes: value 0 is "other"."""
    found, top = {}, root / "ADEChallengeData2016"
    for split, short, rows in (("training", "train", [(0, 1, 2), (3, 4, 5)]), ("validation", "val", [(5, 0, 1)])):
        for number, values in enumerate(rows, 1):
            name = f"ADE_{short}_{number:08d}"
            path = picture(top / "images" / split / f"{name}.jpg")
            found[str(path)] = mask(top / "annotations" / split / f"{name}.png", stripes(*values))
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName", *(f"{i}\t0.1\t10\t2\t{int(i != 5)}\t{name}" for i, name in enumerate(ADE_NAMES, 1))]
    (top / "objectInfo150.txt").write_text("\n".join(lines) + "\n")
    (top / "sceneCategories.txt").write_text("ADE_train_00000001 bathroom\n")
    return found


def cityscapes(root: Path, train_ids: bool = True) -> dict[str, np.ndarray]:
    """leftImg8bit and gtFine; the values of labelIds.png, and of labelTrainIds.png where ``train_ids``."""
    found = {}
    for split, city, ids in (("train", "aachen", (7, 26, 3)), ("val", "ulm", (33, 11, 0))):
        name = f"{city}_000000_000019"
        path = picture(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png")
        folder = root / "gtFine" / split / city
        found[str(path)] = mask(folder / f"{name}_gtFine_labelIds.png", stripes(*ids))
        mask(folder / f"{name}_gtFine_instanceIds.png", stripes(1, 2))
        mask(folder / f"{name}_gtFine_color.png", stripes(1, 2), palette=True)
        (folder / f"{name}_gtFine_polygons.json").write_text("{}")
        if train_ids:
            mask(folder / f"{name}_gtFine_labelTrainIds.png", stripes(*({7: 0, 26: 13, 33: 18, 11: 2}.get(i, 255) for i in ids)))
    return found


def voc_segmentation(root: Path) -> dict[str, np.ndarray]:
    """VOCdevkit/VOC2012 with palette masks whose borders are 255, and one photograph more than has a mask."""
    found, top = {}, root / "VOCdevkit" / "VOC2012"
    for split, name, values in (("train", "2007_000032", (0, 1, 255)), ("train", "2007_000039", (0, 20)),
                                ("val", "2007_000033", (15, 255))):
        path = picture(top / "JPEGImages" / f"{name}.jpg")
        found[str(path)] = mask(top / "SegmentationClass" / f"{name}.png", stripes(*values), palette=True)
        mask(top / "SegmentationObject" / f"{name}.png", stripes(1, 2), palette=True)
        (top / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        with open(top / "ImageSets/Segmentation" / f"{split}.txt", "a") as file:
            file.write(f"{name}\n")
    picture(top / "JPEGImages" / "2008_000001.jpg")
    return found


def roboflow_masks(root: Path) -> dict[str, np.ndarray]:
    """Roboflow's "Semantic Segmentation Masks": image and mask side by side, with a table of the values."""
    found = {}
    for split, values in (("train", (0, 1)), ("train", (2, 0)), ("valid", (1, 2))):
        name = f"photo{len(found)}_jpg.rf.0a1b{len(found)}"
        path = picture(root / split / f"{name}.jpg")
        found[str(path)] = mask(root / split / f"{name}_mask.png", stripes(*values))
        (root / split / "_classes.csv").write_text("Pixel Value, Class\n0, background\n1, cat\n2, dog\n")
    return found


def folders_of_masks(root: Path, names: str = "") -> dict[str, np.ndarray]:
    """images/{train,val} and masks/{train,val}, and ``names`` as classes.txt where given."""
    found = {}
    for split, name, values in (("train", "a", (0, 1)), ("train", "b", (2, 255)), ("val", "c", (2, 0, 1))):
        path = picture(root / "images" / split / f"{name}.jpg")
        found[str(path)] = mask(root / "masks" / split / f"{name}.png", stripes(*values))
    if names:
        (root / "classes.txt").write_text(names)
    return found


def coco_panoptic(root: Path) -> dict[str, np.ndarray]:
    """annotations/panoptic_{train,val}2017.json with folders of PNG files of the same names; per image path the segment of each pixel."""
    categories = [dict(id=1, name="person", isthing=1, supercategory="person", color=[220, 20, 60]),
                  dict(id=3, name="car", isthing=1, supercategory="vehicle", color=[0, 0, 142]),
                  dict(id=184, name="tree-merged", isthing=0, supercategory="plant", color=[107, 142, 35])]
    found = {}
    for split, name, number in (("train2017", "000000000009", 9), ("val2017", "000000000139", 139)):
        segments = stripes(0, 3226956, 6979964, 3103879)  # 0 is nothing; numbers of three bytes
        segments[:HEIGHT // 2, -3:] = 7000001
        path = picture(root / split / f"{name}.jpg")
        coloured = np.stack([segments & 255, segments >> 8 & 255, segments >> 16], axis=-1).astype(np.uint8)
        (root / "annotations" / f"panoptic_{split}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(coloured).save(root / "annotations" / f"panoptic_{split}" / f"{name}.png")
        rows = [dict(id=segment, category_id=category, iscrowd=crowd, **_extent(segments == segment))
                for segment, category, crowd in ((3226956, 1, 0), (6979964, 3, 0), (3103879, 184, 0), (7000001, 1, 1))]
        content = dict(images=[dict(id=number, file_name=f"{name}.jpg", height=HEIGHT, width=WIDTH)],
                       annotations=[dict(image_id=number, file_name=f"{name}.png", segments_info=rows)], categories=categories)
        (root / "annotations" / f"panoptic_{split}.json").write_text(json.dumps(content))
        found[str(path)] = segments
    return found


def _extent(mask: np.ndarray) -> dict[str, object]:
    rows, columns = np.nonzero(mask)
    x, y = int(columns.min()), int(rows.min())
    return dict(area=int(mask.sum()), bbox=[x, y, int(columns.max()) + 1 - x, int(rows.max()) + 1 - y])
