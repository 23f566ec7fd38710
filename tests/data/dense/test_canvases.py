"""The embedded data set of dense tasks: what is written agrees with the pixels, in both forms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.dense import canvases
from data.layouts import digits


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("canvases")
    canvases.write_canvases(str(folder), 20, 10)
    return folder


def test_masks_in_both_forms_are_the_same_pixels(written: Path) -> None:
    names = (written / "classes.txt").read_text().split()
    for split, count in (("train", 20), ("val", 10)):
        found = json.loads((written / f"annotations/instances_{split}.json").read_text())
        digit_of = {category["id"]: category["name"] for category in found["categories"]}
        assert len(found["images"]) == count == len(list((written / "images" / split).iterdir()))
        assert len({annotation["id"] for annotation in found["annotations"]}) == len(found["annotations"])
        for image in found["images"]:
            picture = Image.open(written / "images" / split / image["file_name"])
            painted = np.zeros((image["height"], image["width"]), dtype=int)
            assert picture.size == painted.shape[::-1] and min(painted.shape) >= 96 and max(painted.shape) <= 128
            for annotation in (a for a in found["annotations"] if a["image_id"] == image["id"]):
                counts = annotation["segmentation"]["counts"]
                mask = np.repeat(np.arange(len(counts)) % 2, counts).reshape(painted.shape, order="F").astype(bool)
                x, y, width, height = annotation["bbox"]
                rows, columns = np.nonzero(mask)
                assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x, y, x + width, y + height)
                assert mask.sum() == annotation["area"] and not painted[mask].any()
                painted[mask] = names.index(digit_of[annotation["category_id"]])
            stored = Image.open(written / "masks" / split / image["file_name"])
            assert stored.mode == "P" and (np.asarray(stored) == painted).all()
            assert np.asarray(picture)[painted > 0].mean() > np.asarray(picture)[painted == 0].mean() + 60


def test_runs_are_those_of_pycocotools() -> None:
    masks = pytest.importorskip("pycocotools.mask")
    random = np.random.RandomState(0)
    for mask in (random.rand(5, 7) > 0.5, np.zeros((3, 2), bool), np.ones((3, 2), bool)):
        assert (masks.decode(masks.frPyObjects(canvases.run_lengths(mask), *mask.shape)) == mask).all()


def test_no_digit_is_drawn_in_both_splits_and_each_is_seen() -> None:
    pixels, targets = digits.load_pixels()
    train, val = digits.split_indices(targets)
    assert not set(train) & set(val)
    image, covering, labels = canvases.draw_canvas(pixels, targets, val, 7)
    again, *_ = canvases.draw_canvas(pixels, targets, val, 7)
    assert (image == again).all() and set(np.unique(covering)) == set(range(len(labels) + 1))
    blank = np.zeros_like(pixels)
    blank[val] = pixels[val]
    assert (canvases.draw_canvas(blank, targets, val, 7)[0] == image).all()  # the training digits were not looked at


def test_they_are_written_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(canvases.write_canvases, "__defaults__", (2, 1))
    assert canvases.ensure_canvases(str(tmp_path / "c")) and not canvases.ensure_canvases(str(tmp_path / "c"))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
