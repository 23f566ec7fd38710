"""What --eval writes of dense tasks beside the metrics, and what a run keeps of its last evaluation, on real canvases."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from config import ConfigError, get_config
from data.dense.base import DenseSource
from data.dense.canvases import write_canvases
from data.dense.layouts import open_dense_sources
from utils.evaluation.dense_predictions_file import read_dense_predictions
from utils.evaluation.detection_metrics import DetectionEvaluator, evaluate_found
from utils.evaluation.map_metrics import MapEvaluator
from utils.evaluation.panoptic_metrics import PanopticEvaluator
from utils.inference.found import Found, Panoptic
from utils.tasks.dense_logs import DetectionLog, MapLog, PanopticLog, keeps_log
from utils.tasks.detection_report import DetectionReport
from utils.tasks.map_report import MapReport, PanopticReport, inside

IMAGES = 5


@pytest.fixture(scope="module")
def canvases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("pycocotools")
    root = tmp_path_factory.mktemp("canvases")
    write_canvases(str(root), 2, IMAGES)
    return root


def opened(root: Path, task: str, layout: str) -> SimpleNamespace:
    """Something with the parts of ``Loaders`` that reports and logs look at."""
    config = get_config(None, ["TASK", task, "DATA.DATASET", layout, "DATA.DATA_PATH", str(root)])
    source = open_dense_sources(config, ["val"], None)[0]["val"]
    return SimpleNamespace(val=SimpleNamespace(dataset=SimpleNamespace(source=source)), classes=source.classes)


def as_found(source: DenseSource) -> dict[int, Found]:
    """The objects exactly; of image 1 all but the first, of image 2 one of another class beside."""
    found = {}
    for number in range(len(source)):
        truth = source.objects(number)
        part = slice(1, None) if number == 1 else slice(None)
        found[number] = Found(truth.boxes[part], np.linspace(0.9, 0.6, len(truth))[part].astype(np.float32), truth.labels[part],
                              list(truth.masks)[part])
    one = found[2]
    found[2] = Found(one.boxes[[0, *range(len(one))]], np.concatenate([[0.95], one.scores]).astype(np.float32),
                     np.concatenate([[(one.labels[0] + 1) % 10], one.labels]), [one.masks[0], *one.masks])
    return found


def test_detections_are_written_as_coco_has_them_and_read_back_to_the_same_figures(canvases: Path, tmp_path: Path) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    loaders = opened(canvases, "instance", "coco")
    config = get_config(None, ["TASK", "instance", "TEST.PREDICTIONS", str(tmp_path / "found.json"),
                               "TEST.PER_CLASS", str(tmp_path / "classes.csv")])
    result = evaluate_found(as_found(loaders.val.dataset.source), loaders.val.dataset.source, ("box", "mask"))
    report = DetectionReport(None, config)
    report.begin(loaders)
    lines = report.lines(result, [])
    assert lines[-1] == result.line and "AP50" in lines[0] and lines[1].split()[1] == f"{result.values['box_ap']:.2f}"
    assert len(report.write()) == 2
    truth = COCO(str(canvases / "annotations/instances_val.json"))
    done = COCOeval(truth, truth.loadRes(str(tmp_path / "found.json")), "bbox")
    done.evaluate()
    done.accumulate()
    done.summarize()
    assert 100 * done.stats[0] == pytest.approx(result.values["box_ap"], abs=1e-9) and 50 < result.values["box_ap"] < 100
    rows = list(csv.DictReader((tmp_path / "classes.csv").open()))
    assert [row["class"] for row in rows] == loaders.classes and sum(int(row["objects"]) for row in rows) == len(truth.anns)
    ap = [float(row["mask_ap"]) for row in rows if row["mask_ap"]]
    assert 100 * np.mean(ap) == pytest.approx(result.values["mask_ap"], abs=1e-3)
    assert float(rows[0]["box_ap50"] or 1) >= float(rows[0]["box_ap"] or 1) and rows[0]["box_ar_large"] == ""
    nothing = evaluate_found({}, loaders.val.dataset.source, ("box",))
    report.lines(nothing, [])
    report.write()
    assert json.loads((tmp_path / "found.json").read_text()) == []


def test_another_ending_is_a_sentence() -> None:
    for report, name, ending in ((DetectionReport, "a.npz", ".json"), (MapReport, "a.json", ".zip"), (PanopticReport, "a", ".zip")):
        with pytest.raises(ConfigError, match=rf"TEST.PREDICTIONS is {name}; .*\{ending}"):
            report(None, get_config(None, ["TASK", "semantic", "TEST.PREDICTIONS", name]))


def map_batch(source: DenseSource) -> tuple[list[torch.Tensor], list[torch.Tensor | None], SimpleNamespace]:
    """Images 0 to 4, of which 3 has its background everywhere and 4 could not be read."""
    maps = [torch.from_numpy(source.index_map(number)) for number in range(IMAGES)]
    answers = [one.clone() for one in maps]
    answers[3][:] = 0
    return answers, [*maps[:4], None], SimpleNamespace(numbers=torch.tensor([0, 1, 2, 3, -1]))


def test_maps_are_written_with_the_values_of_the_data(canvases: Path, tmp_path: Path) -> None:
    loaders = opened(canvases, "semantic", "maps")
    source = loaders.val.dataset.source
    source.category_ids = [value + 3 for value in source.category_ids]
    config = get_config(None, ["TASK", "semantic", "TEST.PREDICTIONS", str(tmp_path / "maps.zip"),
                               "TEST.PER_CLASS", str(tmp_path / "classes.csv")])
    answers, targets, batch = map_batch(source)
    evaluator, report = MapEvaluator(loaders.classes, torch.device("cpu")), MapReport(None, config)
    report.begin(loaders)
    evaluator.update(answers, targets)
    report.record(answers, batch)
    lines = report.lines(evaluator.result(), [])
    assert len(lines) == len(loaders.classes) + 3 and f"mean accuracy {evaluator.result().values['mean_accuracy']:.2f}" == lines[-2]
    assert "IoU" in lines[0] and lines[1].endswith(loaders.classes[0])
    report.write()
    with zipfile.ZipFile(tmp_path / "maps.zip") as archive:
        assert sorted(archive.namelist()) == [f"images/val/{number:04d}.png" for number in range(4)]
        for number in range(4):
            picture = Image.open(io.BytesIO(archive.read(f"images/val/{number:04d}.png")))
            assert picture.mode == "P" and np.array_equal(np.asarray(picture), answers[number].numpy() + 3)
    rows = list(csv.DictReader((tmp_path / "classes.csv").open()))
    assert [row["class"] for row in rows] == loaders.classes
    assert 100 * np.mean([float(row["iou"]) for row in rows if row["iou"]]) == pytest.approx(evaluator.result().values["miou"], abs=1e-3)


def test_names_in_an_archive_stay_inside_it_and_differ() -> None:
    assert inside(["a/b.jpg", "../../c.png", "a/b.png", "x.zip::e\\f.jpg"]) == ["a/b.png", "c.png", "a/b-3.png", "x.zip/e/f.png"]
    names = inside(["../../a.jpg", "a.png", "..", "/etc/passwd"])
    assert len(set(names)) == 4 and not any(name.startswith("/") or ".." in name.split("/") for name in names)


def test_a_run_keeps_what_was_found_and_pictures_of_the_worst_images(canvases: Path, tmp_path: Path) -> None:
    loaders = opened(canvases, "instance", "coco")
    source = loaders.val.dataset.source
    evaluator, found = DetectionEvaluator(source, ("box", "mask")), as_found(source)
    log = DetectionLog(loaders, lambda: evaluator)
    evaluator.update(list(found.values()), torch.arange(IMAGES))
    evaluator.result()
    log.write(str(tmp_path))
    kept = read_dense_predictions(str(tmp_path / "predictions.npz"))
    objects = [len(source.objects(number)) for number in range(IMAGES)]
    assert kept.errors.tolist() == [[count - (i == 1), int(i == 2), int(i == 1)] for i, count in enumerate(objects)]
    assert keeps_log(loaders) and kept.paths[0].endswith("0000.png") and kept.classes == loaders.classes
    assert set(kept.worst(9)) == set(kept.pictures) == {1, 2} and set(kept.curves) == {"box", "mask"}
    for picture in kept.pictures.values():
        image = Image.open(io.BytesIO(picture))
        left, right = (np.asarray(image.crop((x, 0, x + image.height // 2, image.height))) for x in (0, image.width // 2 + 4))
        assert image.width > image.height and np.abs(left.astype(int) - right).max() > 100


def test_a_run_keeps_the_counts_of_maps_and_the_worst_images(canvases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.tasks.dense_logs.MOST_PICTURES", 1)
    loaders = opened(canvases, "semantic", "maps")
    answers, targets, batch = map_batch(loaders.val.dataset.source)
    answers[1][:4] = 5  # not as bad as image 3
    log, evaluator = MapLog(loaders, lambda batch: targets), MapEvaluator(loaders.classes, torch.device("cpu"))
    log(answers, batch)
    evaluator.update(answers, targets)
    log.write(str(tmp_path))
    kept = read_dense_predictions(str(tmp_path / "predictions.npz"))
    assert np.array_equal(kept.counts, evaluator.result().counts) and kept.index.tolist() == [0, 1, 2, 3]
    assert kept.worst(9) == [3, 1] and kept.score[[0, 2]].tolist() == [1, 1] and list(kept.pictures) == [3]


def test_segments_are_written_as_coco_has_them_and_kept(canvases: Path, tmp_path: Path) -> None:
    loaders = opened(canvases, "mask", "coco")
    source = loaders.val.dataset.source
    answers = []
    for number in range(3):
        truth, segments = source.objects(number), np.zeros(source.sizes[number], np.int32)
        from pycocotools.mask import decode
        for i, mask in enumerate(truth.masks):
            segments[decode([dict(mask)])[..., 0] > 0] = i + 1
        answers.append(Panoptic(segments, truth.labels.copy(), np.ones(len(truth), np.float32)))
    answers[2].labels[0] = (answers[2].labels[0] + 1) % 10
    batch = SimpleNamespace(numbers=torch.tensor([0, 1, 2]))
    evaluator = PanopticEvaluator(source)
    config = get_config(None, ["TASK", "mask", "TEST.PREDICTIONS", str(tmp_path / "found.zip"), "TEST.PER_CLASS", str(tmp_path / "c.csv")])
    report, log = PanopticReport(None, config), PanopticLog(loaders, lambda: evaluator)
    report.begin(loaders)
    evaluator.update(answers, batch.numbers)
    report.record(answers, batch)
    log(answers, batch)
    result = evaluator.result()
    *_, things, stuff, last = report.lines(result, [])
    assert 20 < result.values["pq"] < 100 and last == result.line and float(things.split()[0]) == round(result.values["pq_things"], 2)
    assert things.endswith("all things") and stuff.split()[0] == "-"
    report.write()
    log.write(str(tmp_path))
    with zipfile.ZipFile(tmp_path / "found.zip") as archive:
        row = json.loads(archive.read("panoptic.json"))["annotations"][2]
        pixels = np.asarray(Image.open(io.BytesIO(archive.read(row["file_name"])))).astype(int)
    assert np.array_equal(pixels @ [1, 256, 65536], answers[2].segments) and row["image_id"] == source.image_ids[2]
    assert [segment["category_id"] for segment in row["segments_info"]] == [source.category_ids[label] for label in answers[2].labels]
    kept = read_dense_predictions(str(tmp_path / "predictions.npz"))
    assert np.array_equal(kept.sums, result.sums) and list(kept.pictures) == [2] and kept.score[:2].tolist() == [1, 1]
    assert sum(int(line["matched"]) for line in csv.DictReader((tmp_path / "c.csv").open())) == result.sums[:, 1].sum()
