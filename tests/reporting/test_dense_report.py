"""What a report shows of runs of dense tasks, from files as a run's last evaluation writes them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.evaluation.dense_predictions_file import Curves, DenseFile, DetectionsFile, MapsFile, PanopticFile
from utils.reporting.charts import charts
from utils.reporting.dense_plots import of_dense
from utils.reporting.dense_sections import MOST_IMAGES, sections, worst
from utils.reporting.html_page import render
from utils.reporting.plots import curves as curves_of
from utils.reporting.run_reader import Run, facts, read_run
from utils.reporting.write import write_plots

IMAGES = 20
CLASSES = ["cat <b>", "dog", "never there"]
SCORE = np.linspace(0.05, 1.0, IMAGES, dtype=np.float32)
SCORE[3] = np.nan


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 20), (200, 30, 30)).save(file, "JPEG")
    return file.getvalue()


def common(pictures: int = IMAGES) -> tuple:
    return (np.arange(IMAGES), SCORE.copy(), [f"val/{number}.png" for number in range(IMAGES)], CLASSES,
            dict.fromkeys(range(pictures), jpeg()))


def curves(ap: float) -> Curves:
    """Of a class of that AP at all overlaps, of one without any right answer, and of one without an object."""
    nan = np.nan
    precision = np.zeros((10, 101, 3), np.float32)
    precision[:, :round(101 * ap), 0], precision[..., 2] = 1, nan
    return Curves(precision, np.array([[ap, ap, nan, nan], [0, 0, 0, nan], [nan] * 4]),
                  np.array([[ap, ap, nan, nan], [0.2] * 4, [nan] * 4]),
                  np.array([[7, 7, 0, 0], [3, 1, 2, 0], [0] * 4]), np.array([9, 1, 0]), np.tile([1, 0, 1], (IMAGES, 1)))


def objects(ap: float = 0.6, pictures: int = IMAGES) -> DetectionsFile:
    return DetectionsFile(*common(pictures), {"box": curves(ap), "mask": curves(ap / 2)})


def maps(classes: int = 3) -> MapsFile:
    counts = np.diag(np.full(classes, 90))
    counts[0, 1] = 30
    counts[-1] = 0
    made = MapsFile(*common(), counts)
    made.classes = [*CLASSES[:2], *(f"class {i}" for i in range(2, classes))]
    return made


def segments() -> PanopticFile:
    return PanopticFile(*common(), np.array([[1.6, 2, 1, 1], [0.9, 1, 0, 0], [0, 0, 0, 0]]), np.array([True, False, True]))


def run_of(folder: Path, predictions: DenseFile | None, task: str, metrics: dict[str, float]) -> Run:
    folder.mkdir()
    start = dict(event="start", step=0, task=task, best=next(iter(metrics)), steps_per_epoch=5,
                 metrics=[dict(name=name, label=name.replace("_", " "), higher_is_better=True, digits=2) for name in metrics])
    (folder / "history.jsonl").write_text(json.dumps(start) + "\n")
    (folder / "config.yaml").write_text(f"MODEL: {{NAME: tiny}}\nTAG: {folder.name}\nTASK: {task}\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": 5 * i, "epoch": i, **metrics}) + "\n" for i in (1, 2)))
    if predictions is not None:
        predictions.write(str(folder / "predictions.npz"))
    return read_run(str(folder))


FIGURES = dict(detection=dict(box_ap=30.0, box_ap50=31.0, box_ap75=32.0, box_ar1=33.0, box_ap_small=34.0),
               semantic=dict(miou=60.0, pixel_accuracy=70.0), mask=dict(pq=50.0, sq=60.0))
MADE = dict(detection=objects, semantic=maps, mask=segments)


@pytest.mark.parametrize(("task", "words", "drawn"), [
    ("detection", ["box AP 30.0 %", "mask AP 15.0 %", "objects up to 32 x 32", "AP75", "F1", "1 found, 0 wrong, 1 missed"],
     {"box_precision_recall", "box_precision_recall_classes", "box_ap_classes", "mask_ap_classes", "val_box_overlaps", "val_box_sizes"}),
    ("semantic", ["pixel accuracy 85.7 %", "mIoU 75.0 %", "dog (25.0 %)"], {"iou_classes", "confusion", "val_maps"}),
    ("mask", ["PQ 71.7 %", "stuff", "matched"], {"pq_classes", "val_panoptic"}),
])
def test_a_run_is_shown(tmp_path: Path, task: str, words: list[str], drawn: set[str]) -> None:
    run = run_of(tmp_path / "a", MADE[task](), task, FIGURES[task])
    assert not any("predictions" in problem for problem in run.problems)
    page = render([run])
    assert [word for word in words if word.lower() not in page.lower()] == []
    assert "<b>" not in page.split("cat &lt;")[1][:10] and page.count(base64.b64encode(jpeg()).decode()) == MOST_IMAGES
    line = write_plots([run], str(tmp_path))
    assert {name for name in drawn if not (tmp_path / "plots" / f"{name}.png").exists()} == set(), line


def test_a_run_without_its_history_is_known_by_its_config(tmp_path: Path) -> None:
    run_of(tmp_path / "a", objects(), "detection", FIGURES["detection"])
    (tmp_path / "a/history.jsonl").unlink()
    run = read_run(str(tmp_path / "a"))
    assert isinstance(run.predictions, DetectionsFile) and facts(run)["best box AP"] == "30.00"


def test_the_worst_images_come_first_and_lost_ones_are_told() -> None:
    shown = worst(objects(pictures=2))
    assert [card["path"] for card in shown["cards"]] == ["val/0.png", "val/1.png"] and f"{MOST_IMAGES - 2} could not" in shown["how"]
    assert shown["cards"][0]["told"].startswith("F1 5.0 %")
    perfect = maps()
    perfect.score[:] = 1
    assert not worst(perfect)["some"]


def test_classes_are_sorted_by_their_figure_and_sizes_counted() -> None:
    (section,) = sections(objects())
    by_size, of_classes = section["tables"][0][1], section["tables"][1][1]
    assert [row[0] for row in of_classes.rows] == ["dog", "cat <b>", "never there"] and of_classes.rows[2][3][1] == "–"
    assert [row[1][1] for row in by_size.rows] == ["10", "8", "2", "0"] and by_size.rows[0][2][1] == "30.0"


def test_of_many_classes_pairs_are_told_and_few_bars_drawn() -> None:
    (section,) = sections(maps(classes=120))
    assert [caption for caption, *_ in section["tables"]] == ["Classes", "Most pixels confused"]
    assert section["tables"][1][1].rows[0][:2] == CLASSES[:2] and [plot.name for plot in of_dense(maps(classes=120))] == ["iou_classes"]


def test_runs_beside_each_other_and_of_other_tasks(tmp_path: Path) -> None:
    first = run_of(tmp_path / "a", objects(0.6), "detection", FIGURES["detection"])
    second = run_of(tmp_path / "b", objects(0.8), "detection", FIGURES["detection"])
    other = run_of(tmp_path / "c", maps(), "semantic", FIGURES["semantic"])
    page = render([first, second, other])
    assert "A and B on 20 images" in page and "+10.0" in page and "mask AP of each class" in page
    assert "A and C are of different tasks" in page and "last miou" in page
    assert {chart.name for chart in charts([first, other])} >= {"val_box_ap", "val_miou"}
    alone = run_of(tmp_path / "d", None, "semantic", FIGURES["semantic"])
    assert "one has no predictions.npz" in render([other, alone])


def test_few_tiles_of_many_figures(tmp_path: Path) -> None:
    run = run_of(tmp_path / "a", None, "detection", FIGURES["detection"])
    assert "last box ar1" in facts(run) and {"last box ap50", "last box ap75"} <= facts(run, brief=True).keys()
    assert not {"last box ar1", "last box ap small"} & facts(run, brief=True).keys()


@pytest.mark.parametrize("damage", ["missing", "cut", "other", "classification"])
def test_damaged_files_are_told(tmp_path: Path, damage: str) -> None:
    run_of(tmp_path / "a", objects(), "detection", FIGURES["detection"])
    path = tmp_path / "a/predictions.npz"
    with np.load(path) as file:
        found = dict(file)
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:2000])
    elif damage == "other":
        np.savez(path, **found | {"box.ap": found["box.ap"][:1]})
    else:
        np.savez(path, target=np.zeros(3))
    run = read_run(str(tmp_path / "a"))
    assert run.predictions is None and any("predictions.npz" in problem for problem in run.problems)
    assert not any("TEST.PREDICTIONS" in problem for problem in run.problems)
    assert "predictions.npz" in render([run])


def test_an_evaluation_of_nothing(tmp_path: Path) -> None:
    nothing = DetectionsFile(np.arange(IMAGES), SCORE, common()[2], [], {}, {"box": Curves(
        np.zeros((10, 101, 0), np.float32), *(np.zeros((0, 4)) for _ in range(2)), np.zeros((0, 4), int), np.zeros(0, int),
        np.zeros((IMAGES, 3), int))})
    for name, made in (("a", nothing), ("b", MapsFile(np.zeros(0, int), np.zeros(0, np.float32), [], CLASSES, {}, np.zeros((3, 3), int)))):
        assert "tiny" in render([run_of(tmp_path / name, made, "detection", FIGURES["detection"])])


@pytest.mark.parametrize(("value", "low", "high"), [(0.0, 0.0, 1.0), (60.0, 50.0, 70.0)])
def test_a_flat_curve_has_an_axis_of_some_length(value: float, low: float, high: float) -> None:
    run = Run("", "a", rows=[dict(step=step, miou=value) for step in (1, 2)])
    plot = next(plot for plot in curves_of([run]) if plot.name == "val_miou")
    bottom, top = plot.figure.axes[0].get_ylim()
    assert low <= bottom <= value < top <= high and top - bottom >= 1
