"""COCO's figures equal pycocotools run by hand on files, on any number of ranks, and say when nothing was found."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from config import ConfigError
from data.dense.base import DenseSource, Objects
from utils.evaluation.detection_metrics import FIGURES, DetectionEvaluator, coco_json_rows, detection_metrics, evaluate_found, table
from utils.inference.found import Found, pasted
from utils.runtime import distributed

SIDE, CLASSES = 160, ["cat", "dog", "none of these", "owl"]


class Annotated(DenseSource):
    """Images of 160 x 160 pixels with random ellipses; class 2 never occurs."""

    def __init__(self, images: int, seed: int = 0):
        self.generator = np.random.RandomState(seed)
        self.root, self.classes, self.targets = "", CLASSES, np.zeros(images, np.int64)
        self.sizes, self.image_ids = np.full((images, 2), SIDE, np.int32), 1000 - 7 * np.arange(images)
        self.category_ids, self.things, self.has_masks = [90, 3, 5, 17], [True] * 4, True
        self.annotated = [self.draw(0 if i == 1 else 4) for i in range(images)]

    def draw(self, count: int) -> Objects:
        generator = self.generator
        sides = np.array([28, 60, 105])[generator.randint(0, 3, count), None] + 12 * generator.rand(count, 2)
        corner = generator.rand(count, 2) * (SIDE - sides)
        boxes = np.concatenate([corner, corner + sides], axis=1).astype(np.float32)
        labels, crowd = np.array([0, 1, 3])[generator.randint(0, 3, count)], generator.rand(count) < 0.1
        return Objects(boxes, labels, crowd, np.prod(sides, axis=1).astype(np.float32) * 0.7, np.arange(count), ellipses(boxes))

    def objects(self, index: int) -> Objects:
        return self.annotated[index]


def ellipses(boxes: np.ndarray) -> list[dict]:
    blob = (np.hypot(*np.mgrid[-1:1:28j, -1:1:28j]) < 1).astype(float)
    return [pasted(blob, box, SIDE, SIDE) for box in boxes.astype(float)]


def detections(source: Annotated, seed: int = 1) -> dict[int, Found]:
    """The objects, moved a little, some with another class, and some that are not there; scores often equal."""
    generator, found = np.random.RandomState(seed), {}
    for number, objects in enumerate(source.annotated):
        near = np.clip(np.repeat(objects.boxes, 2, 0) + generator.randn(2 * len(objects), 4) * 4, 0, SIDE)
        far = source.draw(3).boxes
        boxes = np.concatenate([near, far]).astype(np.float32)
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        labels = np.concatenate([np.repeat(objects.labels, 2), generator.randint(0, 4, 3)])
        labels[generator.rand(len(labels)) < 0.1] = 1
        scores = np.sort(generator.randint(1, 12, len(boxes)).astype(np.float32) / np.float32(12.3))[::-1].copy()
        found[number] = Found(boxes, scores, labels, ellipses(boxes))
    return found


def by_hand(source: Annotated, found: dict[int, Found], folder: Path, kind: str) -> list[float]:
    """pycocotools on a file of annotations and a file of results, as its own demo has it."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    annotations = []
    for number, objects in enumerate(source.annotated):
        for box, label, crowd, area, mask in zip(objects.boxes.tolist(), objects.labels, objects.crowd, objects.areas, objects.masks,
                                                 strict=True):
            annotations.append(dict(
                id=len(annotations) + 1, image_id=int(source.image_ids[number]), category_id=source.category_ids[label], area=float(area),
                bbox=[box[0], box[1], box[2] - box[0], box[3] - box[1]], iscrowd=int(crowd),
                segmentation=dict(size=mask["size"], counts=mask["counts"].decode())))
    (folder / "truth.json").write_text(json.dumps(dict(
        info={}, images=[dict(id=int(i), width=SIDE, height=SIDE) for i in source.image_ids], annotations=annotations,
        categories=[dict(id=i, name=name) for i, name in zip(source.category_ids, CLASSES, strict=True)])))
    rows = list(coco_json_rows(found, source))
    if kind == "segm":  # else sizes are those of the boxes
        rows = [{key: value for key, value in row.items() if key != "bbox"} for row in rows]
    (folder / "results.json").write_text(json.dumps(rows))
    truth = COCO(str(folder / "truth.json"))
    done = COCOeval(truth, truth.loadRes(str(folder / "results.json")), kind)
    done.evaluate()
    done.accumulate()
    done.summarize()
    return list(done.stats)


@pytest.fixture(scope="module")
def source() -> Annotated:
    return Annotated(12)


def update(evaluator: DetectionEvaluator, found: dict[int, Found], numbers: list[int]) -> None:
    evaluator.update([found[max(number, 0)] for number in numbers], torch.tensor(numbers))


@pytest.mark.parametrize(("kind", "name"), [("bbox", "box"), ("segm", "mask")])
def test_figures_are_those_of_pycocotools_on_files(source: Annotated, kind: str, name: str, tmp_path: Path, capsys) -> None:
    found = detections(source)
    expected = by_hand(source, found, tmp_path, kind)
    capsys.readouterr()
    evaluator = DetectionEvaluator(source, ("box", "mask"))
    update(evaluator, found, [11, 3, 4, -1, 0, 1, 2, 5, 6, 7])  # in any order; -1 could not be read
    update(evaluator, found, [10, 9, 8, -1])
    result = evaluator.result()
    ours = [result.values[f"{name}_{figure}"] for figure in FIGURES]
    assert ours == [100 * value for value in expected] and min(ours) > 1
    assert result.samples == 12 and list(result.values) == [metric.name for metric in detection_metrics(("box", "mask"))]
    assert capsys.readouterr().out == ""
    assert f"{name} AP {ours[0]:.2f}" in result.line and "AP50" not in result.line
    lines = table(result.values, ("box", "mask"))
    row = [cell for number in (1, 4) for cell in lines[number + (name == "mask")].split()[1 if number == 4 else 0:]]
    assert max(map(len, lines)) < 80
    assert row == [name, *(f"{value:.2f}" for value in ours)]


def test_two_ranks_give_the_same_figures_and_count_an_image_once(source: Annotated, monkeypatch: pytest.MonkeyPatch) -> None:
    found = detections(source)
    whole = evaluate_found(found, source, ("box",))
    ranks = [DetectionEvaluator(source, ("box",)) for _ in range(2)]
    update(ranks[0], found, [0, 1, 2, 3, 4, 5])
    update(ranks[1], found, [6, 7, 8, 9, 10, 11, 0])
    told: list[tuple] = []  # rank 0's figures, which all get

    def gathered(own: object) -> list:
        return [evaluator._found for evaluator in ranks] if isinstance(own, dict) else told.append(own) or told

    monkeypatch.setattr(distributed, "gather_objects", gathered)
    first = ranks[0].result()
    assert first.values == whole.values and list(first.found) == list(range(12))
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    second = ranks[1].result()
    assert (second.values, second.samples, second.line) == (first.values, first.samples, first.line) and not second.found


def test_only_images_that_were_read_count(source: Annotated) -> None:
    found = detections(source)
    few = evaluate_found({number: found[number] for number in (2, 5)}, source, ("box",))
    assert few.samples == 2 and few.curves["box"].objects[:, 0].sum() == sum(
        int((~source.annotated[number].crowd).sum()) for number in (2, 5))


def test_figures_of_each_class_and_of_what_does_not_occur(source: Annotated) -> None:
    found = detections(source)
    result = evaluate_found(found, source, ("box", "mask"))
    for kind in ("box", "mask"):
        curves = result.curves[kind]
        assert curves.precision.shape == (10, 101, 4) and np.isnan(curves.ap[2]).all() and curves.objects[2].tolist() == [0] * 4
        for column, name in enumerate(("ap", "ap_small", "ap_medium", "ap_large")):
            assert 100 * np.nanmean(curves.ap[:, column]) == pytest.approx(result.values[f"{kind}_{name}"])
        assert 100 * np.nanmean(curves.ar[:, 0]) == pytest.approx(result.values[f"{kind}_ar100"])
        assert curves.found.sum() == sum(map(len, found.values()))
    only = Annotated(1)
    only.annotated = [Objects(np.array([[0, 0, 10, 10]], np.float32), np.array([0]), np.zeros(1, bool), np.array([100.0]), np.zeros(1))]
    exact = evaluate_found({0: Found(only.annotated[0].boxes, np.ones(1, np.float32), np.array([0]))}, only, ("box",))
    assert exact.values["box_ap"] == exact.values["box_ap_small"] == pytest.approx(100) and exact.curves["box"].ap[0, 0] > 0.999
    assert math.isnan(exact.values["box_ap_large"]) and "-1" not in "".join(table(exact.values, ("box",)))


def test_nothing_found_is_zero_with_a_caution_and_no_image_is_no_figure(source: Annotated) -> None:
    nothing = Found(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), [])
    result = evaluate_found(dict.fromkeys(range(12), nothing), source, ("box", "mask"))
    assert result.values["box_ap"] == result.values["mask_ap"] == 0 and "MODEL.DENSE.MIN_SCORE" in result.caution
    empty = DetectionEvaluator(source, ("box",)).result()
    assert empty.samples == 0 and math.isnan(empty.values["box_ap"]) and empty.caution == ""


def test_without_pycocotools_a_sentence_names_it(source: Annotated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ConfigError, match="requirements-extras.txt"):
        DetectionEvaluator(source, ("box",))
