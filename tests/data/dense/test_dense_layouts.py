"""Which data serve which task, what is said where they do not, and the doctor's look at annotations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_images
from miniatures import coco_panoptic, voc_segmentation
from PIL import Image
from test_coco import SOUND, annotated, opened, write_coco
from test_voc import item, write_pair
from test_yolo import BOX, write_yolo

import main
from config import get_config
from data.dense.doctor import open_dense_survey
from data.errors import DataError
from data.layouts.detect import detect_layout
from data.layouts.options import Options


def _yolo(root: Path) -> None:
    write_yolo(root, {"a.png": BOX})
    (root / "data.yaml").write_text("names: [x, y]\ntrain: train/images\nval: train/images\n")


def _voc(root: Path) -> None:
    write_pair(root / "VOCdevkit/VOC2012/JPEGImages", root / "VOCdevkit/VOC2012/Annotations", "a", item("dog", 1, 1, 9, 9))


def _maps(root: Path) -> None:
    for kind in ("images", "masks"):
        for split in ("train", "val"):
            (root / kind / split).mkdir(parents=True)
            Image.new("L", (8, 8)).save(root / kind / split / "a.png")


@pytest.mark.parametrize(("make", "task"), [(lambda root: write_coco(root, SOUND), "detection"), (_yolo, "detection"), (_voc, "detection"),
                                            (lambda root: write_coco(root, SOUND, layout="roboflow"), "detection"), (_maps, "semantic"),
                                            (coco_panoptic, "mask")])
@pytest.mark.parametrize("alone", [False, True])
def test_classification_names_the_task_that_the_data_are_for(tmp_path: Path, make: Callable[[Path], None], task: str, alone: bool) -> None:
    make(tmp_path)
    config = get_config(None, ["DATA.DATA_PATH", str(tmp_path), "DATA.VAL_FRACTION", 0.0 if alone else 0.2])
    with pytest.raises(DataError, match=f"TASK {task}"):
        detect_layout(str(tmp_path), Options.of(config, alone=alone), ["val"] if alone else ["train", "val"])


def test_other_data_are_named(tmp_path: Path) -> None:
    write_images(tmp_path, "train", dict(a=1, b=1))
    for task in ("detection", "instance", "semantic", "mask"):
        with pytest.raises(DataError, match=rf"TASK {task} needs .* folders of classes"):
            opened(tmp_path, task=task)
    assert main.main(["--doctor", "--opts", "TASK", "detection", "DATA.DATA_PATH", str(tmp_path), "OUTPUT", str(tmp_path / "out")]) == 3
    write_coco(tmp_path / "boxes", [dict(annotated(1, 7, 3, [1, 1, 9, 9]), segmentation=[])])
    assert len(opened(tmp_path / "boxes", task="detection")["train"]) == 1
    with pytest.raises(DataError, match="TASK detection"):
        opened(tmp_path / "boxes", task="instance")
    with pytest.raises(DataError, match="layout coco"):
        opened(tmp_path / "boxes", "DATA.DATASET", "yolo", task="detection")
    for path in ("", str(tmp_path / "gone")):
        with pytest.raises((DataError, SystemExit, Exception), match=r"data-path|DATA_PATH"):
            opened(path, task="detection")


def test_one_file_for_all(tmp_path: Path) -> None:
    file = write_coco(tmp_path, [annotated(i, i, 3, [5, 5, 9, 9]) for i in (9, 7, 4)])
    file.rename(tmp_path / "annotations" / "instances_default.json")
    (tmp_path / "train2017").rename(tmp_path / "images")
    for root in (tmp_path, tmp_path / "annotations" / "instances_default.json"):
        assert len(opened(root, splits=("val",))["val"]) == 3
    parts = opened(tmp_path, "DATA.VAL_FRACTION", 0.4, "DATA.DENSE.EMPTY", True, splits=("train", "val"))
    assert len(parts["train"]) + len(parts["val"]) == 3


def test_doctor_tells_faults(tmp_path: Path) -> None:
    write_coco(tmp_path, [*SOUND, annotated(20, 7, 3, [5, 5, 0, 9]), annotated(21, 7, 77, [5, 5, 4, 9])])
    write_coco(tmp_path, [annotated(20, 7, 3, [5, 5, 9, 9])], split="val")
    Image.new("RGB", (40, 60)).save(tmp_path / "val2017" / "bild ü 7.png")
    (tmp_path / "train2017" / "bild ü 4.png").write_bytes(b"broken")
    out = tmp_path / "report.json"
    words = ["TASK", "instance", "DATA.DATA_PATH", str(tmp_path), "OUTPUT", str(tmp_path / "out"), "DATA.NUM_WORKERS", "1",
             "DATA.CORRUPT_BUDGET", "1"]
    assert main.main(["--doctor", "--doctor-json", str(out), "--opts", *words]) == 0
    found = {finding["code"]: finding for finding in json.loads(out.read_text())["findings"]}
    assert found["annotations-no-area"]["items"][0]["name"].startswith("annotation 20 of")
    assert {"annotations-unknown-class", "annotations-partly-outside", "unreadable-train"} <= set(found)
    assert found["annotations-size"]["count"] == 1 and "40 x 60, annotated as 60 x 40" in found["annotations-size"]["items"][0]["detail"]
    assert {finding["severity"] for finding in found.values()} <= {"warning", "note"}
    assert "one-class" not in found and found["missing-classes"]["items"][0]["name"] == "hund ü"
    write_coco(tmp_path, [annotated(i, 7, 77, [5, 5, 4, 9]) for i in range(9)] + SOUND[:1])
    assert main.main(["--doctor", "--doctor-json", str(out), "--opts", *words]) == 3
    (tmp_path / "annotations" / "instances_train2017.json").write_text("{")
    assert main.main(["--doctor", "--doctor-json", str(out), "--opts", *words]) == 3


@pytest.mark.parametrize(("make", "task", "counts"), [
    (voc_segmentation, "semantic", {"background": 2, "aeroplane": 1, "tvmonitor": 1, "person": 0}),
    (coco_panoptic, "mask", {"person": 1, "car": 1, "tree-merged": 1}),
    (lambda root: write_coco(root, SOUND), "semantic", {"background": 3, "car": 2, "hund ü": 1, "toothbrush": 0})])
def test_doctor_counts_the_classes_that_masks_show(tmp_path: Path, make: Callable[[Path], object], task: str,
                                                   counts: dict[str, int]) -> None:
    make(tmp_path)
    survey = open_dense_survey(get_config(None, ["DATA.DATA_PATH", str(tmp_path), "TASK", task]))
    found = dict(zip(survey.classes, survey.counts("train").tolist(), strict=True))
    assert {name: found[name] for name in counts} == counts
