"""YOLO's data.yaml and label files: boxes, outlines, paths as tools write them, and what is broken."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT  # noqa: F401 - puts the program on the path
from PIL import Image

from config import get_config
from data.dense.layouts import open_dense_sources
from data.errors import DataError

BOX, OUTLINE = "1 0.5 0.25 0.5 0.25", "0 0.1 0.1 0.6 0.1 0.6 0.5 0.1 0.5"


def write_yolo(root: Path, labels: dict[str, str | None], split: str = "train", inside: str = "{split}/images") -> None:
    """Images of 80x40 pixels with these label files; None: no file."""
    for name, text in labels.items():
        image = root / inside.format(split=split) / name
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 40)).save(image)
        above, _, below = str(image.with_suffix(".txt")).rpartition("images")
        if text is not None:
            os.makedirs(os.path.dirname(above + "labels" + below), exist_ok=True)
            Path(above + "labels" + below).write_text(text)


def opened(root: Path, *options: object, task: str = "detection", splits: tuple[str, ...] = ("train", "val")) -> Any:
    return open_dense_sources(get_config(None, ["TASK", task, "DATA.DATA_PATH", str(root), *options]), splits, None)[0]


@pytest.mark.parametrize("form", ["roboflow", "path", "lists", "folders"])
def test_layouts(tmp_path: Path, form: str) -> None:
    inside = "images/{split}" if form in ("path", "folders") else "{split}/images"
    write_yolo(tmp_path, {"a.png": f"{BOX}\n{BOX}\n0 0.25 0.5 0.1 0.2\n", "b.png": None, "c.png": ""}, "train", inside)
    write_yolo(tmp_path, {"d.png": BOX}, "valid" if form == "roboflow" else "val", inside)
    text = "names: [cat, no]\n"
    if form == "roboflow":
        text += "train: ../train/images\nval: ../valid/images\nnc: 2\n"
    elif form == "path":
        text = f"path: {tmp_path}\ntrain: images/train\nval: [images/val]\nnames: {{0: cat, 7: tree, 1: no}}\n"
    elif form == "lists":
        (tmp_path / "train.txt").write_text("./train/images/a.png\ntrain/images/b.png\ntrain/images/c.png\ntrain/images/gone.png\n")
        (tmp_path / "val.txt").write_text(str(tmp_path / "val/images/d.png"))
        text += "train: train.txt\nval: val.txt\n"
    if form == "folders":
        (tmp_path / "classes.txt").write_text("cat\nno\n")
    else:
        (tmp_path / "data.yaml").write_text(text)
    sources = opened(tmp_path, "DATA.DENSE.EMPTY", True)
    train, val = sources["train"], sources["val"]
    assert train.classes == val.classes == (["cat", "no", "tree"] if form == "path" else ["cat", "no"])
    assert train.category_ids == ([0, 1, 7] if form == "path" else [0, 1]) and not train.has_masks
    assert [os.path.basename(train.path(i)) for i in range(len(train))] == ["a.png", "b.png", "c.png"]
    found = train.objects(0)
    assert np.allclose(found.boxes, [[20, 5, 60, 15], [16, 16, 24, 24]]) and found.labels.tolist() == [1, 0]
    assert found.areas.tolist() == pytest.approx([400, 64]) and [len(train.objects(i)) for i in (1, 2)] == [0, 0]
    assert {f.kind: f.count for f in train.faults} == {"line given twice": 1} | ({"image missing": 1} if form == "lists" else {})
    assert train.sizes.tolist() == [[40, 80]] * 3 and val.objects(0).labels.tolist() == [1]
    assert len(opened(tmp_path)["train"]) == 1


def test_outlines(tmp_path: Path) -> None:
    write_yolo(tmp_path, {"a.png": OUTLINE})
    (tmp_path / "data.yaml").write_text("names: [x]\ntrain: train/images\n")
    source = opened(tmp_path, task="instance", splits=("train",))["train"]
    found = source.objects(0)
    assert np.allclose(found.boxes, [[8, 4, 48, 20]]) and source.has_masks and abs(found.areas[0] - 40 * 16) < 60
    assert set(np.unique(source.index_map(0))) == {0, 255} and source.index_map(0)[10, 20] == 0
    write_yolo(tmp_path, {"a.png": "0 0.5 0.5 0.1 0.1"})
    with pytest.raises(DataError, match="TASK detection"):
        opened(tmp_path, task="instance", splits=("train",))


def test_broken_lines_are_counted(tmp_path: Path) -> None:
    lines = [BOX, "0 0.5", "0 0.5 0.5 0.1 0.1 0.9", "x 0.5 0.5 0.1 0.1", "0 nan 0.5 0.1 0.1", "9 0.5 0.5 0.1 0.1", "0 40 20 8 8",
             "0 0.5 0.5 0 0.1", "0 1.5 0.5 0.1 0.1", "0 0.9 0.5 0.6 0.1", "9" * 5000 + " 0 0 1 1"]
    write_yolo(tmp_path, {"a.png": "\n".join(lines), "b.png": BOX})
    (tmp_path / "train/images/b.png").write_bytes(b"no image")
    (tmp_path / "data.yaml").write_text("names: [x, y]\ntrain: train/images\nval: train/images")
    source = opened(tmp_path, "DATA.DENSE.EMPTY", True)["train"]
    assert {f.kind: f.count for f in source.faults} == {
        "line that is neither a box nor an outline": 5, "numbers that are no shares of the image": 1, "unknown class": 1, "no area": 1,
        "outside": 1, "partly outside": 1, "image whose size cannot be read": 1}
    assert next(f for f in source.faults if f.kind == "no area").examples[0].endswith("labels/a.txt:8")
    assert np.allclose(source.objects(0).boxes, [[20, 5, 60, 15], [48, 18, 80, 22]])


@pytest.mark.parametrize("text", ["names: {a: b}\ntrain: train/images", "names: [a, a]\ntrain: train/images",
                                  "names: []\ntrain: train/images", "names: [a]\ntrain: gone", "nc: 99999999999\ntrain: train/images",
                                  "names: [[a]]\ntrain: [train/images]"])
def test_unusable_data_yaml(tmp_path: Path, text: str) -> None:
    write_yolo(tmp_path, {"a.png": BOX})
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=r"data\.yaml"):
        opened(tmp_path, splits=("train",))


def test_as_maps_the_background_has_a_value_of_its_own(tmp_path: Path) -> None:
    write_yolo(tmp_path, {"a.png": OUTLINE}, inside="images/{split}")
    write_yolo(tmp_path, {"b.png": OUTLINE}, "val", inside="images/{split}")
    (tmp_path / "data.yaml").write_text(f"path: {tmp_path}\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n")
    source = opened(tmp_path, task="semantic")["train"]
    assert source.classes == ["background", "cat", "dog"] and source.category_ids == [0, 1, 2]
    assert np.unique(source.index_map(0)).tolist() == [0, 1]
