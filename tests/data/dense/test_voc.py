"""Pascal VOC's XML files: devkit and pairs, corners counted from 1, difficult objects, what is broken or malicious."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT  # noqa: F401 - puts the program on the path
from PIL import Image

from config import get_config
from data.dense.layouts import open_dense_sources
from data.dense.voc import VOC_CLASSES
from data.errors import DataError


def item(name: str, *corners: object, more: str = "") -> str:
    box = "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
    return f"<object><name>{name}</name>{more}<bndbox>{box}</bndbox><part><bndbox><xmin>1</xmin></bndbox></part></object>"


def write_pair(images: Path, annotations: Path, name: str, *objects: str, size: str | None = None) -> None:
    for folder in (images, annotations):
        folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 40)).save(images / f"{name}.jpg")
    size = "<size><width>60</width><height>40</height></size>" if size is None else size
    (annotations / f"{name}.xml").write_text(f"<?xml version='1.0'?>\n<annotation>{size}{''.join(objects)}</annotation>")


def opened(root: Path, *options: object, task: str = "detection", splits: tuple[str, ...] = ("train",)) -> Any:
    return open_dense_sources(get_config(None, ["TASK", task, "DATA.DATA_PATH", str(root), *options]), splits, None)[0]


@pytest.mark.parametrize("above", ["VOCdevkit/VOC2012", "VOC2007", ""])
def test_devkit(tmp_path: Path, above: str) -> None:
    root = tmp_path / above
    places = root / "JPEGImages", root / "Annotations"
    write_pair(*places, "a", item("dog", 1, 1, 60, 40), item("cat", 3, 5, 10, 10, more="<difficult>1</difficult>"))
    write_pair(*places, "b", item("person", 2, 2, 9, 9), size="")
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    (root / "ImageSets" / "Main" / "val.txt").write_text("b\ngone\n")
    (root / "ImageSets" / "Main" / "trainval.txt").write_text("a\nb\n")
    if not above:
        with pytest.raises(DataError, match="'person' is unknown"):
            opened(tmp_path, splits=("train", "val"))
        return
    sources = opened(tmp_path, splits=("train", "val"))
    train, val = sources["train"], sources["val"]
    assert train.classes == val.classes == list(VOC_CLASSES)
    found = train.objects(0)
    assert found.boxes.tolist() == [[0, 0, 60, 40], [2, 4, 10, 10]] and found.crowd.tolist() == [False, True]
    assert [train.classes[label] for label in found.labels] == ["dog", "cat"] and found.areas.tolist() == [2400, 48]
    assert any("1 objects are marked difficult" in line for line in train.notices)
    assert val.sizes.tolist() == [[40, 60]] and [fault.kind for fault in val.faults] == ["image missing"]
    with pytest.raises(DataError, match="TASK detection"):
        opened(tmp_path, task="instance")


def test_pairs(tmp_path: Path) -> None:
    for name in "abcd":
        write_pair(tmp_path, tmp_path, name, item("z" if name in "ab" else "y", 1, 1, 9, 9))
    Image.new("RGB", (60, 40)).save(tmp_path / "untold.png")
    parts = opened(tmp_path, "DATA.VAL_FRACTION", 0.5, splits=("train", "val"))
    assert parts["train"].classes == ["y", "z"] and len(parts["train"]) == len(parts["val"]) == 2
    assert {f.kind: f.count for f in parts["train"].faults} == {"image without an annotation": 1}
    for split in ("train", "valid"):
        write_pair(tmp_path / "two" / split, tmp_path / "two" / split, "a", item("z", 1, 1, 9, 9))
    assert len(opened(tmp_path / "two", splits=("train", "val"))["val"]) == 1


BOMB = "<!DOCTYPE a [<!ENTITY b 'bbbbbbbbbb'><!ENTITY c '&b;&b;&b;&b;'>]><annotation><object><name>&c;</name></object></annotation>"


def test_broken_files_are_counted(tmp_path: Path) -> None:
    write_pair(tmp_path, tmp_path, "a", item("z", 1, 1, 9, 9), item("z", 9, 9, 5, 5), item("z", "x", 1, 2, 3), item("", 1, 1, 9, 9),
               item("z", 100, 1, 109, 9), item("z", 1, 1, "inf", 9), "<object><name>z</name></object>", item("z", 50, 1, 80, 9))
    broken = {"b": BOMB, "c": "<annotation>" * 5000, "d": "no xml", "e": "", "f": "<annotation><object></annotation>"}
    for name, text in broken.items():
        write_pair(tmp_path, tmp_path, name)
        (tmp_path / f"{name}.xml").write_text(text)
    source = opened(tmp_path, "DATA.DENSE.EMPTY", True, "DATA.VAL_FRACTION", 0, splits=("val",))["val"]
    assert {f.kind: f.count for f in source.faults} == {
        "unreadable annotation": 5, "no area": 1, "not a box": 3, "unknown class": 1, "outside": 1, "partly outside": 1}
    assert len(source) == 6 and np.allclose(source.objects(0).boxes, [[0, 0, 9, 9], [49, 0, 60, 9]])
    (tmp_path / "a.xml").write_text("<annotation></annotation>")
    with pytest.raises(DataError, match="none of its 6 images"):
        opened(tmp_path, splits=("val",))
