"""Boxes, areas and masks of COCO's format against pycocotools' own class; broken annotations are counted and left out."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT  # noqa: F401 - puts the program on the path
from PIL import Image
from pycocotools import mask as masks
from pycocotools.coco import COCO

from config import get_config
from data.dense.layouts import object_counts, open_dense_sources
from data.dense.shapes import run_lengths
from data.errors import DataError, UnreadableImage

CATEGORIES = [dict(id=90, name="toothbrush"), dict(id=3, name="car"), dict(id=18, name="hund ü")]
DISC = np.asfortranarray(np.hypot(*(np.mgrid[:40, :60] - 20)) < 9)


def compressed(mask: np.ndarray) -> dict[str, Any]:
    runs = masks.encode(np.asfortranarray(mask.astype(np.uint8)))
    return dict(size=runs["size"], counts=runs["counts"].decode())


def uncompressed(mask: np.ndarray) -> dict[str, Any]:
    pixels = mask.astype(np.uint8).ravel(order="F")
    changes = np.flatnonzero(np.diff(pixels, prepend=0)).tolist()
    return dict(size=list(mask.shape), counts=np.diff([0, *changes, len(pixels)]).tolist())


def annotated(number: int, image: int, category: int, box: list[float], shape: Any = None, **more: Any) -> dict[str, Any]:
    x, y, w, h = box
    shape = [[x, y, x + w, y, x + w, y + h, x + 0.3 * w, y + h + 0.7]] if shape is None else shape
    return dict(id=number, image_id=image, category_id=category, bbox=box, area=w * h * 0.9, iscrowd=0, segmentation=shape) | more


SOUND = [
    annotated(11, 7, 3, [10.7, 3.3, 20.1, 15.9]), annotated(12, 7, 90, [0, 0, 60, 40], uncompressed(DISC), iscrowd=1),
    annotated(13, 9, 18, [11, 11, 19, 19], compressed(DISC)),
    annotated(15, 9, 3, [1, 2, 30, 30], [[1, 2, 31, 2, 31, 32], [5.25, 8.5, 9.75, 8.5, 9.1, 12.9, 4.2, 11.7]]),
    annotated(14, 7, 3, [30.25, 20.5, 40.25, 10], area=333.25)]


def write_coco(root: Path, annotations: list[dict[str, Any]], split: str = "train", layout: str = "coco", ids: tuple[int, ...] = (9, 7, 4),
               **more: Any) -> Path:
    """A miniature of COCO's or Roboflow's layout, images of 60x40 pixels."""
    folder = root / f"{split}2017" if layout == "coco" else root / split
    file = root / "annotations" / f"instances_{split}2017.json" if layout == "coco" else folder / "_annotations.coco.json"
    for path in (folder, file.parent):
        path.mkdir(parents=True, exist_ok=True)
    for i in ids:
        Image.new("RGB", (60, 40), (i, 0, len(split))).save(folder / f"bild ü {i}.png")
    images = [dict(id=i, file_name=f"bild ü {i}.png", width=60, height=40) for i in ids]
    file.write_text(json.dumps(dict(info={}, images=images, annotations=annotations, categories=CATEGORIES) | more))
    return file


def opened(root: Path, *options: object, task: str = "instance", splits: tuple[str, ...] = ("train",), classes: Any = None) -> Any:
    return open_dense_sources(get_config(None, ["TASK", task, "DATA.DATA_PATH", str(root), *options]), splits, classes)[0]


@pytest.mark.parametrize("layout", ["coco", "roboflow"])
def test_equals_pycocotools(tmp_path: Path, layout: str) -> None:
    file = write_coco(tmp_path, SOUND, layout=layout)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = COCO(str(file))
    source = opened(tmp_path, "DATA.DENSE.EMPTY", True)["train"]
    assert source.classes == ["car", "hund ü", "toothbrush"] and source.category_ids == [3, 18, 90]
    assert source.image_ids.tolist() == [9, 7, 4] and source.sizes.tolist() == [[40, 60]] * 3 and source.has_masks
    assert object_counts(source).tolist() == [2, 2, 0] and [fault.kind for fault in source.faults] == ["partly outside"]
    for index, image in enumerate(source.image_ids.tolist()):
        found = source.objects(index)
        expected = theirs.loadAnns(theirs.getAnnIds([image]))
        assert found.ids.tolist() == [a["id"] for a in expected] and found.crowd.tolist() == [bool(a["iscrowd"]) for a in expected]
        assert [source.category_ids[label] for label in found.labels] == [a["category_id"] for a in expected]
        for box, area, mask, a in zip(found.boxes, found.areas, found.masks, expected, strict=True):
            x, y, w, h = a["bbox"]
            assert np.allclose(box, [x, y, min(x + w, 60), min(y + h, 40)], atol=1e-5)
            assert np.isclose(area, a["area"])
            assert (masks.decode(mask) == theirs.annToMask(a)).all() and masks.area(mask) == theirs.annToMask(a).sum()
        assert source.load(index).getpixel((0, 0)) == (image, 0, 5)


def test_faults_are_counted_and_left_out(tmp_path: Path) -> None:
    wrong = [
        annotated(21, 7, 3, [5, 5, 0, 9]), annotated(22, 7, 3, [5, 5, -3, 9]), annotated(23, 7, 3, [70, 5, 9, 9]),
        annotated(24, 7, 3, [5, 5, 9, 9], bbox=[float("nan"), 5, 9, 9]),
        annotated(25, 7, 4, [5, 5, 9, 9]), annotated(26, 99, 3, [5, 5, 9, 9]),
        annotated(27, 7, 3, [5, 5, 9, 9], compressed(DISC[:, :30])), annotated(28, 7, 3, [5, 5, 9, 9], [[1, 2, 3, 4]]),
        annotated(29, 7, 3, [5, 5, 9, 9], dict(size=[40, 60], counts="~~")), annotated(11, 7, 3, [5, 5, 9, 9]),
        annotated(30, 5, 3, [5, 5, 9, 9]), annotated(31, 7, 3, [5, 5, 9, 9], bbox=[5, 5, 9]),
        annotated(32, 7, 3, [5, 5, 9, 9], [[0, 0, 1e9, 0, 1e9, 1e9]]),
        annotated(33, 7, 3, [5, 5, 9, 9], bbox=["5", 5, 9, 9]), "odd"]
    images = [dict(id=i, file_name=f"bild ü {i}.png", width=60, height=40) for i in (7, 9, 4)]
    images += [dict(id=5, file_name="gone.png", width=60, height=40), dict(id=7, file_name="again.png", width=60, height=40)]
    write_coco(tmp_path, [*SOUND, *wrong], images=images)
    source = opened(tmp_path)["train"]
    kinds = {fault.kind: fault.count for fault in source.faults}
    assert kinds == {
        "entry of annotations that is no object": 1, "image given twice": 1, "image missing": 1, "unknown image": 1, "unknown class": 1,
        "not a box": 3, "no area": 2, "outside": 1, "mask of another size": 1, "no usable mask": 3, "partly outside": 1, "repeated id": 1}
    assert all(fault.examples and fault.remedy for fault in source.faults)
    assert [len(source.objects(i)) for i in range(len(source))] == [4, 2]
    assert len([line for line in source.notices if line.code == "fault"]) == len(kinds)
    for task in ("detection", "instance"):
        for i in range(2):
            boxes = opened(tmp_path, task=task)["train"].objects(i).boxes
            assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= 60).all() and (boxes[:, 3] <= 40).all()


def test_sizes_that_are_not_the_files(tmp_path: Path) -> None:
    write_coco(tmp_path, SOUND)
    Image.new("RGB", (40, 60)).save(tmp_path / "train2017" / "bild ü 7.png")
    source = opened(tmp_path)["train"]
    with pytest.raises(UnreadableImage, match=r"bild ü 7.*DATA.EXIF"):
        source.load(1)
    images = [dict(id=i, file_name=f"C:\\data\\bild ü {i}.png") for i in (9, 7, 4)]  # no sizes, another system's folders
    write_coco(tmp_path, SOUND, images=images)
    assert opened(tmp_path)["train"].sizes.tolist() == [[40, 60]] * 2


def test_one_image_and_annotations_of_others(tmp_path: Path) -> None:
    write_coco(tmp_path, SOUND, images=[dict(id=7, file_name="bild ü 7.png", width=60, height=40), 0])
    source = opened(tmp_path)["train"]
    assert {fault.kind: fault.count for fault in source.faults} == {
        "unknown image": 2, "partly outside": 1, "entry of images that is no object": 1}
    assert len(source.objects(0)) == 3


def test_splits_and_classes(tmp_path: Path) -> None:
    write_coco(tmp_path, [annotated(i, i, 3 if i % 2 else 18, [5, 5, 9, 9]) for i in range(1, 21)], ids=tuple(range(1, 21)))
    with pytest.raises(DataError, match=r"DATA.VAL_FRACTION"):
        opened(tmp_path, splits=("train", "val"))
    parts = opened(tmp_path, "DATA.VAL_FRACTION", 0.2, splits=("train", "val"))
    assert (len(parts["train"]), len(parts["val"])) == (16, 4)
    assert not set(parts["train"].image_ids) & set(parts["val"].image_ids)
    assert sorted(parts["val"].objects(i).labels[0] for i in range(4)) == [0, 0, 1, 1]
    assert len(opened(tmp_path, "DATA.SUBSET", 0.5)["train"]) == 10
    write_coco(tmp_path, [annotated(1, 9, 1, [5, 5, 9, 9]), annotated(2, 7, 2, [1, 1, 9, 9])], split="val",
               categories=[dict(id=1, name="hund ü"), dict(id=2, name="car")])
    val = opened(tmp_path, splits=("train", "val"))["val"]
    assert val.classes == ["car", "hund ü", "toothbrush"] and [val.objects(i).labels.tolist() for i in range(3)] == [[1], [0], []]
    with pytest.raises(DataError, match=r"'hund ü' is unknown"):
        opened(tmp_path, splits=("val",), classes=["car", "tree"])
    chosen = opened(tmp_path, splits=("val",), classes=["hund ü", "car", "tree"])["val"]  # toothbrush is on no image
    assert [chosen.objects(i).labels.tolist() for i in range(3)] == [[0], [1], []]
    (tmp_path / "names.txt").write_text("hund ü\n", encoding="utf-8")
    chosen = opened(tmp_path, "DATA.CLASS_NAMES", str(tmp_path / "names.txt"), splits=("train", "val"))
    assert len(chosen["train"]) == 10 and chosen["train"].category_ids == [18]
    assert [len(chosen["val"].objects(i)) for i in range(3)] == [1, 0, 0] and object_counts(chosen["val"]).tolist() == [1, 0, 0]


def test_run_lengths_as_pycocotools_has_them() -> None:
    generator = np.random.RandomState(0)
    for share in (0.01, 0.5, 0.99):
        mask = np.asfortranarray(generator.rand(300, 200) < share)
        assert run_lengths(masks.encode(mask.astype(np.uint8))["counts"]).tolist() == uncompressed(mask)["counts"]
    assert run_lengths(b"") is None and run_lengths(b"P") is None and run_lengths(b"\xff") is None and run_lengths(b"O") is None


@pytest.mark.parametrize("content", ["", "[]", "{", '{"images": [], "annotations": {}, "categories": []}', '{"images": [1, 2', "\xff",
                                     '{"images": [], "annotations": [], "categories": []}', '{"images": [' + "[" * 5000])
def test_broken_files_are_one_sentence(tmp_path: Path, content: str) -> None:
    file = write_coco(tmp_path, SOUND)
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=str(tmp_path)):
        opened(tmp_path)


def test_a_relative_place_is_as_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_coco(tmp_path, SOUND)
    monkeypatch.chdir(tmp_path.parent)
    assert all(opened(Path(tmp_path.name))["train"].fetch(i) for i in range(2))


def test_outlines_are_drawn_to_the_last_bit(tmp_path: Path) -> None:
    """Tenths lie where pycocotools rounds half up: coordinates that lose a bit on the way make other masks."""
    generator = np.random.RandomState(0)
    outlines = [(generator.randint(0, [600, 400], (5, 2)) / 10).ravel().tolist() for _ in range(300)]
    file = write_coco(tmp_path, [annotated(i, 7, 3, [0, 0, 60, 40], [outline]) for i, outline in enumerate(outlines)])
    drawn = opened(tmp_path)["train"].objects(0).masks
    assert [mask["counts"] for mask in drawn] == [masks.merge(masks.frPyObjects([outline], 40, 60))["counts"] for outline in outlines]
    annotations = json.loads(file.read_text())
    annotations["annotations"][0]["segmentation"][0][0] = 1 / 3  # not hundredths: all are kept as they are
    file.write_text(json.dumps(annotations))
    again = opened(tmp_path)["train"].objects(0).masks
    assert again[1:] == drawn[1:] and again[0] == masks.merge(masks.frPyObjects([[1 / 3, *outlines[0][1:]]], 40, 60))
