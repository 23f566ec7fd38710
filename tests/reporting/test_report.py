"""What a run records of itself, and what is made of it: reports, comparisons, settings with their sources, trackers."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from conftest import ROOT, environment

from config import ConfigError, get_config, history
from utils.evaluation.paired_test import compare
from utils.evaluation.per_class import PerClass
from utils.evaluation.predictions_file import PredictionsFile, PredictionsFileError, confused_pairs, confusion, reliability
from utils.evaluation.statistics import mcnemar
from utils.loggers.metrics_files import JsonLines, MetricsLog
from utils.reporting.charts import charts
from utils.reporting.repeats import repeats
from utils.reporting.run_reader import Run, facts, read_run

RUN = "output/tiny/a"


@pytest.fixture(scope="module")
def finished(tiny_cfg: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two runs of two epochs have ended, tagged a and b; histograms and all."""
    import main
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for tag, more in (("a", ["--opts", "TRAIN.TENSORBOARD_HISTOGRAMS", "1"]), ("b", ["--seed", "1", "--lr", "0.01"])):
            assert main.main(["--cfg", str(tiny_cfg), "--tag", tag, *more]) == 0
    return folder


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Page(HTMLParser):
    """What a browser would find in a page: tags, attributes, and the text outside style and script."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(self.words)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("style", "script"):
            self.words.append(data.strip())

    def harmless(self) -> bool:
        """Nothing is loaded from anywhere, and there is no script but the page's own."""
        links = [value for _, attrs in self.tags for name, value in attrs.items() if name in ("src", "href", "data", "action")]
        handlers = [name for _, attrs in self.tags for name in attrs if name.startswith("on")]
        scripts = [tag for tag, _ in self.tags if tag in ("script", "iframe", "object", "embed", "link")]
        inner = [value for _, attrs in self.tags for name, value in attrs.items() if name == "xlink:href"]
        return (all(link.startswith("data:image/jpeg;base64,") for link in links) and all(link.startswith("#") for link in inner)
                and not handlers and scripts == ["script"])


# --------------------------------------------------------------------------------------------------
# Records
# --------------------------------------------------------------------------------------------------

def test_a_run_records_its_steps_epochs_starts_and_images(finished: Path, images: Path) -> None:
    run = finished / RUN
    steps = lines(run / "steps.jsonl")
    assert [row["step"] for row in steps] == [2, 4, 5, 7, 9, 10]
    assert all(math.isfinite(row[key]) for row in steps for key in ("loss", "grad_norm", "lr", "images_per_s", "data_share"))
    rows = lines(run / "metrics.jsonl")
    with open(run / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [{key: str(value) for key, value in row.items()} for row in rows] == table
    assert [event["event"] for event in lines(run / "history.jsonl")] == ["start", "finished"]

    made = PredictionsFile.read(str(run / "predictions.npz"))
    assert sorted(made.paths) == sorted(str(path.relative_to(images / "val")) for path in (images / "val").rglob("*.*"))
    assert [path.split("/")[0] for path in made.paths] == [made.classes[target] for target in made.target]
    assert 100 * made.right.mean() == pytest.approx(rows[-1]["top1"])
    assert np.array_equal(made.right, made.probability == made.correct_probability)
    with open(run / "mistakes.csv", newline="") as file:
        mistakes = list(csv.DictReader(file))
    assert {row["path"] for row in mistakes} == {str(images / "val" / made.paths[i]) for i in np.flatnonzero(~made.right)}
    assert set(mistakes[0]) == {"path", "true", "predicted", "probability", "second"}
    assert set(made.thumbnails) == set(made.worst(24)) and all(blob[:2] == b"\xff\xd8" for blob in made.thumbnails.values())


def test_predictions_of_an_evaluation_are_those_of_the_run(finished: Path, program) -> None:
    done = program("--eval", "--resume", finished / RUN / "last.pth", "--batch-size", 4, "--opts", "TEST.PREDICTIONS", "own.npz")
    assert done.returncode == 0, done.stderr
    ours, theirs = (PredictionsFile.read(str(path)) for path in (program.folder / "own.npz", finished / RUN / "predictions.npz"))
    assert ours.paths == theirs.paths and np.array_equal(ours.predicted, theirs.predicted)
    assert np.allclose(ours.correct_probability, theirs.correct_probability, atol=1e-5)
    lost = program("--eval", "--resume", finished / RUN / "last.pth", "--opts", "TEST.PREDICTIONS", "nowhere/own.npz")
    assert lost.returncode == 2 and "TEST.PREDICTIONS is nowhere/own.npz; no file can be written" in lost.stderr


def test_images_of_all_ranks_keep_their_numbers(images: Path, tmp_path: Path, monkeypatch) -> None:
    """Two ranks, batches that are filled up, an image that cannot be read."""
    import torch

    from data import build_loaders
    from utils.evaluation.image_predictions import PredictionRecorder, recordable, write_predictions
    from utils.runtime import distributed
    root = tmp_path / "images"
    shutil.copytree(images, root)
    (root / "val/b/2.jpg").write_bytes(b"no image")
    config = get_config(None, ["DATA.DATASET", "folder", "DATA.DATA_PATH", str(root), "DATA.NUM_WORKERS", "0", "DATA.BATCH_SIZE", "4",
                               "DATA.IMG_SIZE", "16"])
    parts = []
    for rank in (0, 1):
        val = build_loaders(config, rank, 2, splits=("val",)).val
        record = PredictionRecorder()
        assert recordable(val)
        for _, targets in val:
            logits = torch.nn.functional.one_hot((targets.clamp(min=0) + (targets == 3)) % 4, 4).float()  # d is taken for a
            record(logits, targets)
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "gather_objects", lambda own, kept=parts: kept.append(own) or kept)
            answers = record.predictions(val)
    write_predictions(answers, val, val.dataset.source.classes, str(tmp_path / "all.npz"))
    made = PredictionsFile.read(str(tmp_path / "all.npz"))
    assert made.index.tolist() == [i for i in range(19) if i != 7] and "b/2.jpg" not in made.paths
    assert [path[0] for path in made.paths] == [made.classes[target] for target in made.target]
    assert (~made.right == (made.target == 3)).all()


def test_a_resumed_run_has_each_step_once_and_marks_where_it_began_again(finished: Path, tiny_cfg: Path, program) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run, straight = program.folder / RUN, finished / RUN
    shutil.copytree(straight, run, symlinks=True)
    (run / "ckpt_00000010.pth").unlink()  # as if killed before it was written
    (run / "steps.jsonl").write_text((run / "steps.jsonl").read_text() + '{"step": 11, "lo')
    done = program("--cfg", tiny_cfg, "--tag", "a", "--opts", "TRAIN.TENSORBOARD_HISTOGRAMS", 1)
    assert done.returncode == 0 and "at step 5" in done.stdout, done.stderr
    for name in ("steps.jsonl", "metrics.jsonl"):
        ours, theirs = (lines(folder / name) for folder in (run, straight))
        assert [(row["step"], row["lr"]) for row in ours] == [(row["step"], row["lr"]) for row in theirs]
    assert (run / "metrics.csv").read_text().count("epoch,") == 1 and len((run / "metrics.csv").read_text().splitlines()) == 3
    starts = [event for event in lines(run / "history.jsonl") if event["event"] == "start"]
    assert [(event["step"], event["again"]) for event in starts] == [(0, 0), (5, 5)]
    assert "restarted at step 5, 5 steps done again" in Page(run / "report.html").text

    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("step/loss")] == [2, 4, 5, 7, 9, 10]
    assert [event.step for event in board.Scalars("val/top1")] == [5, 10]
    assert board.Tags()["images"] == ["train/first_batch"] and "weights/head.weight" in board.Tags()["histograms"]
    assert board.Scalars("result/top1")


def test_time_at_work_leaves_out_the_time_between_starts() -> None:
    events = [dict(event="start", step=0, time=100.0), dict(event="rollback", step=3, time=120.0),
              dict(event="start", step=4, time=1000.0, before=160.0), dict(event="stopped", step=6, time=1030.0),
              dict(event="start", step=6, time=2000.0, before=1029.0)]
    assert Run("x", "x", events=events, steps=[dict(step=8, time=2005.0)]).seconds == 60 + 30 + 5
    assert Run("x", "x", rows=[dict(step=1, seconds=2.5), dict(step=2, seconds=3)]).seconds == 5.5


def test_facts_of_rows_with_gaps() -> None:
    found = facts(Run("x", "x", rows=[dict(step=1, top1=50.0, skipped_steps=2), dict(step=2, top1=None, skipped_steps=None)]))
    assert (found["best top-1"], found["best epoch"], found["epochs"], found["skipped steps"]) == ("50.00 %", "?", "? of ?", "2")


def test_facts_of_a_task_with_its_own_metrics() -> None:
    metrics = [7, dict(label="no name"), dict(name="near"), dict(name="error", label="mean error", higher_is_better=False, digits=1)]
    start = dict(event="start", step=0, task="regression", metrics=metrics, best="error")
    rows = [dict(step=i, epoch=i, error=error, near=i / 3) for i, error in ((1, 0.5), (2, 0.25), (3, None), (4, 0.75))]
    found = facts(Run("x", "x", rows=rows, events=[start, dict(event="start", step=2)]))
    assert [*found.items()][:4] == [("best mean error", "0.2"), ("best epoch", "2"), ("last near", "1.3333"), ("last mean error", "0.8")]
    # of a checkpoint, or a damaged start, the deciding metric's name alone is known
    assert facts(Run("", "x", rows=[dict(error=0.5, epoch=3)], events=[dict(event="start", best="error")])) == {
        "best error": "0.5000", "best epoch": "3"}
    assert facts(Run("", "x", rows=[dict(top1=50, epoch=3)])) == {"best top-1": "50.00 %", "best epoch": "3"}


@pytest.mark.parametrize("end", ["", "\n", '\n{"step": 2, "lo'])
def test_lines_go_on_behind_what_a_kill_left(tmp_path: Path, end: str) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text(f'{{"step": 1}}{end}')
    JsonLines(str(path), 1).write(dict(step=2))
    assert lines(path) == [dict(step=1), dict(step=2)]


def test_columns_of_the_table_grow(tmp_path: Path) -> None:
    log = MetricsLog(str(tmp_path), 0)
    for row in (dict(step=1, a=1), dict(step=2, a=None, b="x,y"), dict(step=3, a=4)):
        log.write(row)
    assert (tmp_path / "metrics.csv").read_text() == 'step,a,b\n1,1,\n2,,"x,y"\n3,4,\n'
    MetricsLog(str(tmp_path), 2).write(dict(step=9, c=0))
    assert (tmp_path / "metrics.csv").read_text() == 'step,a,b,c\n1,1,,\n2,,"x,y",\n9,,,0\n'


# --------------------------------------------------------------------------------------------------
# Reports
# --------------------------------------------------------------------------------------------------

def test_report_of_a_run(finished: Path) -> None:
    page = Page(finished / RUN / "report.html")
    assert page.harmless()
    for words in ("tiny/a", "Curves", "Loss", "averaged weights", "Gradient norm", "Throughput", "waiting for data", "Most confused pairs",
                  "expected calibration error", "Most confident mistakes", "TRAIN.TENSORBOARD_HISTOGRAMS", "command line", "torch",
                  "git commit", "skipped steps", "finished"):
        assert words in page.text, words
    assert all(words in page.text for words in ("recall (%)", "precision (%)", "mostly confused with"))
    assert [tag for tag, _ in page.tags].count("svg") == 8  # six charts, the matrix, the reliability


def test_report_of_two_runs_tests_them_on_the_same_images(finished: Path, program) -> None:
    a, b = finished / RUN, finished / "output/tiny/b"
    done = program("--report", a, b, "--opts", "REPORT.FILE", "both.html")
    assert done.returncode == 0, done.stderr
    page = Page(program.folder / "both.html")
    first, second = (read_run(str(folder)).predictions for folder in (a, b))
    only = [int((x.right & ~y.right).sum()) for x, y in ((first, second), (second, first))]
    assert page.harmless() and f"{only[0]}, {only[1]}" in page.text and f"p = {mcnemar(*only):.3g}" in page.text
    assert "A and B on 19 images" in page.text and "0.05" in page.text and "TRAIN.BASE_LR" in page.text


def test_report_on_folds_gives_mean_and_spread(images: Path, tiny_cfg: Path, program) -> None:
    command = ["--cfg", tiny_cfg, "--data-path", images / "train", "--epochs", "1", "--opts", "TRAIN.WARMUP_EPOCHS", "0", "TRAIN.REPORT",
               "none", "DATA.FOLD"]
    best = []
    for k in (1, 2):
        done = program(*command, f"{k}/3", "TAG", f"fold{k}")
        assert done.returncode == 0, done.stderr
        best.append(float(re.search(r"best top1 (\S+)", done.stdout)[1]))
    done = program(*command, "3/3", "TAG", "fold2")  # the tag was forgotten
    assert done.returncode == 2 and "images are others" in done.stderr and "--tag" in done.stderr
    judged = program("--eval", "--resume", "output/tiny/fold2/best.pth")
    assert judged.stdout.splitlines()[-1].startswith(f"top1 {best[1]:.2f} ") and re.search(r"of 1[45]\)", judged.stdout)
    done = program("--report", "output/tiny/fold1", "output/tiny/fold2")
    page = Page(program.folder / "output/tiny/fold1/comparison.html")
    for text in (done.stdout + done.stderr, page.text):
        assert "2 runs of 2 folds" in text and "fold 3/3 is missing" in text
        assert f"{np.mean(best):.2f} %" in text and f"{np.std(best, ddof=1):.2f} %" in text


def test_repeated_runs_by_hand() -> None:
    def run(name: str, fold: str, top1: float, seed: int = 0, epochs: int = 2, lr: float = 0.1) -> Run:
        return Run(name, name, {"DATA.FOLD": fold, "SEED": seed, "TRAIN.EPOCHS": 2, "TRAIN.BASE_LR": lr, "TAG": name},
                   rows=[dict(step=epoch, epoch=epoch, top1=top1 - epochs + epoch) for epoch in range(1, epochs + 1)])

    (group,) = repeats([run("a", "1/2", 80.0), run("b", "2/2", 84.0), run("c", "", 1.0, lr=0.2)])
    assert group.title == "2 runs of 2 folds" and not group.problems
    assert [(f.name, f.mean, round(f.spread, 4)) for f in group.figures] == [("best top-1", 82, 2.8284), ("last top-1", 82, 2.8284)]
    first, second = repeats([run(f"{lr}{k}{s}", f"{k}/2", 80.0 + k, s, lr=lr) for lr in (0.1, 0.2) for k in (1, 2) for s in (0, 1)])
    assert first.title == second.title == "4 runs of 2 folds and 2 seeds" and not first.problems
    (group,) = repeats([run("a", "1/3", 80.0), run("b", "1/3", 84.0), run("c", "2/3", 84.0, epochs=1)])
    assert len(group.problems) == 3 and "3/3 is missing" in group.problems[0]
    assert not repeats([run("a", "1/2", 80.0), run("b", "1/3", 80.0), run("c", "1/2", 80.0)])
    early = [run("a", "1/2", 80.0, epochs=1), run("b", "2/2", 84.0)]  # by TRAIN.PATIENCE
    early[0].events.append({"event": "finished"})
    for one in early:
        one.predictions, one.rows[0]["top5"], one.rows[-1]["top5"] = predictions([True]), 100.0, 100.0  # of two classes
    (group,) = repeats(early)
    assert not group.problems and [figure.name for figure in group.figures] == ["best top-1", "last top-1"]


def predictions(right: list[bool], names: list[str] | None = None) -> PredictionsFile:
    target = np.zeros(len(right), dtype=np.int32)
    probability = np.linspace(0.5, 0.9, len(right), dtype=np.float32)
    return PredictionsFile(np.arange(len(right)), target, (~np.array(right)).astype(np.int32), probability, probability,
                       names or [f"{i}.png" for i in range(len(right))], ["x", "y"], {})


def test_paired_test_by_hand() -> None:
    # one image right in the first alone, five in the second alone: 2 (C(6,0) + C(6,1)) / 2^6
    assert mcnemar(1, 5) == mcnemar(5, 1) == pytest.approx(14 / 64, abs=1e-12)
    assert mcnemar(0, 0) == 1 and mcnemar(3, 3) == 1 and mcnemar(0, 10) == pytest.approx(2 / 1024)
    first, second = [True, *[False] * 5, True, True], [False, *[True] * 5, True, True]
    names = [f"{i}.png" for i in range(8)]
    order = [3, 1, 0, 2, 7, 5, 6, 4]
    shuffled = predictions([second[i] for i in order], [names[i] for i in order])
    found = compare(predictions(first), shuffled)
    assert (found.images, found.only_first, found.only_second, found.p) == (8, 1, 5, mcnemar(1, 5))
    assert found.accuracies == (3 / 8, 7 / 8) and found.interval[0] < 0.5 < found.interval[1]
    assert compare(predictions(first), predictions(second, [f"other{i}" for i in range(8)])) is None


def test_figures_of_classes_and_confidence_by_hand() -> None:
    target, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 1, 0])
    probability = np.array([0.9, 0.9, 0.5, 0.5, 0.9, 0.9])
    made = PredictionsFile(np.arange(6), target, predicted, probability, probability, list("abcdef"), ["u", "v", "w"], {})
    counts = confusion(made)
    assert counts.tolist() == [[0, 0, 1], [0, 1, 2], [1, 1, 2], [2, 0, 1]]
    table = PerClass.of(target, predicted, 3)
    assert (table.images.tolist(), table.mistaken.tolist(), table.times.tolist()) == ([3, 2, 1], [1, -1, 0], [2, 0, 1])
    assert table.worst() == [2, 0, 1] and table.recall.tolist() == [pytest.approx(1 / 3), 1, 0]
    assert table.answered.tolist() == [2, 4, 0] and table.precision.tolist() == [0.5, 0.5, 0]
    assert confused_pairs(counts) == [(0, 1, 2), (2, 0, 1)]
    bins, error = reliability(made, 2)
    # of four sure ones (0.9) two are right, of two unsure ones (0.5, the lower bin's edge) one is
    assert [images for images, *_ in bins] == [2, 4] and error == pytest.approx((2 * 0.0 + 4 * 0.4) / 6)
    assert made.worst(2) == [1, 5]


def test_a_damaged_file_of_predictions_is_told(tmp_path: Path) -> None:
    path = tmp_path / "predictions.npz"
    predictions([True, False] * 20).write(str(path))
    content, told = path.read_bytes(), 0
    for place in range(0, len(content), 5):
        path.write_bytes(content[:place] + bytes([content[place] ^ 12]) + content[place + 1:])
        try:
            PredictionsFile.read(str(path))
        except PredictionsFileError as error:
            told += "or damaged" in str(error)
    assert told > len(content) // 10


def test_hostile_names_do_no_harm(finished: Path, tmp_path: Path, capsys) -> None:
    import main
    run, evil = tmp_path / "run", '"><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m'
    shutil.copytree(finished / RUN, run, symlinks=True)
    made = PredictionsFile.read(str(run / "predictions.npz"))
    made.classes = [f"{evil}\udcff{number}" for number in range(4)]
    made.paths = [f"'{evil}\udcff/{number}.png" for number in range(len(made.paths))]
    made.write(str(run / "predictions.npz"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["TAG"] = evil.replace("\x1b", "")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "sources.json").write_text(json.dumps({"TAG": [[evil, evil]], evil: [["command line", evil]]}))
    with open(run / "history.jsonl", "a") as file:
        file.write(json.dumps(dict(event=evil, step=3, reason=evil)) + "\n")
        file.write(json.dumps(dict(event="start", step=4, flags=[evil], versions={evil: evil}, data={evil: evil})) + "\n")
    for arguments in ([str(run)], [str(run), str(run)]):
        assert main.main(["--report", *arguments, "--opts", "REPORT.FILE", str(tmp_path / "page.html")]) == 0
        page = Page(tmp_path / "page.html")
        assert page.harmless() and "<script>alert(1)" in page.text and "\x1b" not in (tmp_path / "page.html").read_text()
    assert "\x1b" not in capsys.readouterr().out


def test_the_pages_own_script_may_run_and_no_other(finished: Path) -> None:
    script = re.search(r"<script>(.*?)</script>", (finished / RUN / "report.html").read_text(), re.S)[1]
    policy = next(attrs["content"] for _, attrs in Page(finished / RUN / "report.html").tags if "http-equiv" in attrs)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_runs_of_different_tasks_beside_each_other(finished: Path, tmp_path: Path) -> None:
    from utils.reporting.write import write_plots, write_report
    other, evil = tmp_path / "other", "../<u>$x"
    other.mkdir()
    start = dict(event="start", step=0, task="regression", best=evil, metrics=[dict(name=evil, label=evil, higher_is_better=False)])
    (other / "history.jsonl").write_text(json.dumps(start) + "\n")
    (other / "metrics.jsonl").write_text("".join(json.dumps({"step": 5 * i, "epoch": i, evil: 1 / i}) + "\n" for i in (1, 2, 3)))
    runs = [read_run(str(folder)) for folder in (finished / RUN, other)]
    page = Page(Path(write_report(runs, str(tmp_path / "page.html"))))
    assert page.harmless() and "0.3333" in page.text and "best top-1" in page.text and f"best {evil}" in page.text
    assert "u" not in [tag for tag, _ in page.tags]
    assert "accuracy.png" in write_plots(runs, str(tmp_path)) and (tmp_path / "comparison-plots/val__u_x.png").exists()


@pytest.mark.parametrize(("kept", "words"), [
    (["metrics.jsonl"], ["Accuracy", "steps.jsonl is missing"]),
    (["config.yaml"], ["no figures yet", "predictions.npz is missing"]),
    (["steps.jsonl", "history.jsonl"], ["Gradient norm"]),
    (["config.yaml", "damaged"], ["predictions.npz: no file of predictions", "sources.json is damaged"]),
])
def test_report_without_some_of_the_files(finished: Path, tmp_path: Path, kept: list[str], words: list[str]) -> None:
    from utils.reporting.write import write_report
    for name in kept:
        if name == "damaged":
            (tmp_path / "predictions.npz").write_bytes((finished / RUN / "predictions.npz").read_bytes()[:900])
            (tmp_path / "sources.json").write_text("[1")
            (tmp_path / "steps.jsonl").write_text('7\n{"step": "x"}\n')
        else:
            shutil.copy(finished / RUN / name, tmp_path)
    page = Page(Path(write_report([read_run(str(tmp_path))])))
    assert page.harmless() and all(word in page.text for word in words), page.text
    both = Page(Path(write_report([read_run(str(folder)) for folder in (tmp_path, finished / RUN)])))
    assert both.harmless() and "cannot be compared image by image" in both.text


def test_report_asked_for_where_there_is_none(finished: Path, program) -> None:
    (program.folder / "empty").mkdir()
    for name, words in (("absent", "absent: no such run folder"), ("empty", "empty: holds no run")):
        done = program("--report", name)
        assert done.returncode == 2 and words in done.stderr
    done = program("--report", finished / RUN, "--opts", "REPORT.FILE", "absent/page.html")
    assert done.returncode == 2 and "REPORT.FILE is absent/page.html" in done.stderr


def test_a_report_that_fails_does_not_fail_the_run(tiny_cfg: Path, program, monkeypatch) -> None:
    from utils.reporting import html_page
    from utils.runtime import distributed
    watched = [True]
    monkeypatch.setattr(distributed, "stop_watching", watched.clear)  # no limit of time holds for what nobody waits for
    monkeypatch.setattr(html_page, "render", lambda runs: 1 / len(watched))
    done = program("--cfg", tiny_cfg, "--epochs", 1)
    assert done.returncode == 0 and done.stdout.count("warning: no report was written (ZeroDivisionError") == 1


def test_plots_beside_the_report(finished: Path, program) -> None:
    done = program("--report", finished / RUN)
    assert done.returncode == 0 and f"plots {finished / RUN / 'plots'}: loss.png, accuracy.png" in done.stdout
    from utils.reporting.write import write_plots
    assert "loss.png" in write_plots([read_run(str(finished / RUN))], str(program.folder))
    assert {path.name for path in (program.folder / "plots").iterdir()} >= {"loss.png", "accuracy.png", "confusion.png", "reliability.png"}
    assert all(path.read_bytes() == (finished / RUN / "plots" / path.name).read_bytes() for path in (program.folder / "plots").iterdir())
    write_plots([read_run(str(finished / RUN))] * 2, str(program.folder))
    assert {path.name for path in (program.folder / "comparison-plots").iterdir()} >= {"loss.png", "accuracy.png", "lr.png"}


def test_a_chart_shows_the_figures_in_the_pages_colors() -> None:
    from utils.reporting.plots import curves
    rows = [dict(step=step, epoch=step, top1=top1, lr=None) for step, top1 in ((1, 10.0), (2, float("nan")), (3, None), (4, 60.0))]
    start = [dict(event="start", step=0), dict(event="start", step=3)]
    plots = curves([Run("x", "x", rows=rows, events=start)])
    assert [plot.name for plot in plots] == ["accuracy"]
    drawn = [plots[0].svg(), curves([Run("x", "x", rows=rows, events=start)])[0].svg()]
    assert drawn[0] == drawn[1]  # the same again
    svg = ElementTree.fromstring(drawn[0])
    assert [title.text for title in svg.iter("{http://www.w3.org/2000/svg}title")] == [
        "top-1 at 1: 10", "top-1 at 4: 60", "restarted at step 3"]
    styles = " ".join(element.get("style", "") for element in svg.iter())
    assert "var(--c0)" in styles and "var(--fg)" in styles and "#" not in styles and "font-family" not in styles
    texts = [text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Accuracy on validation", "top-1 (%)", "step", "0", "60"} <= set(texts)


def test_a_long_curve_is_thinned_and_a_spike_does_not_flatten_it() -> None:
    from utils.reporting.plots import curves
    steps = [dict(step=step, loss=30.0 if step == 777 else 2 + 0.1 * (-1) ** step) for step in range(1, 40_001)]
    thinned = charts([Run("x", "x", steps=steps)])[0].lines[0].thinned()
    assert thinned.shape == (400, 4) and thinned[-1].tolist() == pytest.approx([40_000, 2, 1.9, 2.1])
    assert thinned[:, 3].max() == 30
    plot = curves([Run("x", "x", steps=steps)])[0]
    assert len(plot.svg()) < 40_000 and 2.2 < plot.figure.axes[0].get_ylim()[1] < 3


# --------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------

def test_every_value_has_its_source(tmp_path: Path, program) -> None:
    (tmp_path / "base.yaml").write_text("TRAIN:\n  EPOCHS: 90\n  WARMUP_EPOCHS: 5\nTAG: base\n")
    (tmp_path / "child.yaml").write_text("BASE: [base.yaml]\nTRAIN: {EPOCHS: 100}\nDATA: {IMG_SIZE: [192, 256]}\nAUG: {CUTMIX: 0}\n")
    child = str(tmp_path / "child.yaml")
    told = history(get_config(child, ["TRAIN.EPOCHS", "9", "AUG.SCALE", "[0.1, 1]"]))
    base = str(tmp_path / "base.yaml")
    assert told["TRAIN.EPOCHS"] == [(f"base {base}:2", 90), (f"{child}:2", 100), ("command line", 9)]
    assert told["TAG"] == [(f"base {base}:4", "base")] and "SEED" not in told
    assert told["TRAIN.LR_SCHEDULER.WARMUP_PREFIX"] == [("derived from MODEL.TYPE", False)]

    done = program("--print-config", "--cfg", child, "--epochs", 7, "--opts", "AUG.SCALE", "[0.1, 1]")
    assert done.returncode == 0, done.stderr
    printed = dict(part.strip().split("  # ") for part in done.stdout.splitlines() if "#" in part)
    printed = {key.strip(): source.strip() for key, source in printed.items()}
    assert printed["EPOCHS: 7"] == f"command line, over 100 of {child}:2, over 90 of base {base}:2"
    assert printed["IMG_SIZE: [192, 256]"] == f"{child}:3" and printed["SEED: 0"] == "default"
    (tmp_path / "printed.yaml").write_text(done.stdout)
    opts = ["TRAIN.EPOCHS", "7", "AUG.SCALE", "[0.1, 1]"]
    assert get_config(str(tmp_path / "printed.yaml")).dump() == get_config(child, opts).dump()


def test_config_of_a_checkpoint_says_so(finished: Path, program) -> None:
    done = program("--print-config", "--resume", finished / RUN / "last.pth", "--tag", "z")
    assert done.returncode == 0, done.stderr
    sources = {line.partition(":")[0].strip(): line.partition("# ")[2] for line in done.stdout.splitlines()}
    assert sources["TAG"] == f"command line, over a of checkpoint {finished / RUN / 'last.pth'}"
    assert sources["EMA_DECAY"].startswith("checkpoint ") and sources["EVAL_MODE"] == "default"


def test_difference_of_two_runs(finished: Path, tiny_cfg: Path, program) -> None:
    a, b = finished / RUN, finished / "output/tiny/b"
    done = program("--diff", a, b)
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.strip()}
    assert done.returncode == 0 and rows["TRAIN.BASE_LR"] == ["0.05", "0.01"] and rows["SEED"] == ["0", "1"]
    assert "TRAIN.EPOCHS" not in rows and rows["best"] and rows["circumstances:"] == ["no", "difference"]
    done = program("--diff", a / "last.pth", tiny_cfg)
    assert done.returncode == 0 and "TAG" in done.stdout and "TRAIN.BASE_LR" not in done.stdout
    assert program("--diff", a, "absent").returncode == 2
    done = program("--diff", a)
    assert done.returncode == 2 and "two are compared" in done.stderr
    assert program("--diff", a / "log.txt", a).returncode == 3


def test_settings_and_reports_need_no_torch(finished: Path, tmp_path: Path) -> None:
    for name in ("torch", "timm", "torchvision"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')\n")
    a, b = str(finished / RUN), str(finished / "output/tiny/b")
    script = ("import sys, main\nfor line in (['--print-config'], ['--diff', *sys.argv[1:]], "
              "['--report', *sys.argv[1:], '--opts', 'REPORT.FILE', 'page.html']):\n assert main.main(line) == 0, line")
    done = subprocess.run([sys.executable, "-c", script, a, b], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
                          env=environment() | {"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert done.returncode == 0, done.stderr
    assert Page(tmp_path / "page.html").harmless()


# --------------------------------------------------------------------------------------------------
# Trackers
# --------------------------------------------------------------------------------------------------

_FAKE = """
import json
def log(values, step):
    note("log", step=step, values=values)
    if FAILS: raise ConnectionError("the server is gone\\nand more")
def finish(): note("finish")
def note(what, **more):
    with open("tracked.jsonl", "a") as file: file.write(json.dumps(dict(what=what, **more)) + "\\n")
def init(**options): note("init", **options)
"""


def tracked(folder: Path, what: str) -> list[dict]:
    return [row for row in lines(folder / "tracked.jsonl") if row["what"] == what]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_tracker_goes_on_with_the_same_run(tiny_cfg: Path, program, monkeypatch, name: str) -> None:
    (program.folder / f"{name}.py").write_text(f"FAILS = False{_FAKE}")
    monkeypatch.syspath_prepend(str(program.folder))
    monkeypatch.delitem(sys.modules, name, raising=False)
    command = ("--cfg", tiny_cfg, "--opts", "TRACKER", name, "TRACKER_PROJECT", "mine")
    for epochs in (1, 2):
        done = program(*command, "--epochs", epochs)
        assert done.returncode == 0, done.stderr
    first, second = tracked(program.folder, "init")
    assert first["project"] == second["project"] == "mine" and first["name"] == second["name"] and first.get("id") == second.get("id")
    assert second["resume"] == "allow" and first["config"]["TRAIN.EPOCHS"] == 1
    steps = [row["step"] for row in tracked(program.folder, "log")]
    assert steps == [2, 4, 5, 5, 7, 9, 10, 10] and len(tracked(program.folder, "finish")) == 2
    (program.folder / "output/tiny/default/ckpt_00000010.pth").unlink()  # as if killed before it was written: five steps again
    assert program(*command, "--epochs", 2).returncode == 0
    assert steps == [row["step"] for row in tracked(program.folder, "log")]
    monkeypatch.delitem(sys.modules, name)


def test_tracker_that_is_missing_or_fails(tiny_cfg: Path, program, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    done = program("--cfg", tiny_cfg, "--opts", "TRACKER", "wandb")
    assert done.returncode == 2 and "pip install wandb" in done.stderr and not (program.folder / "output").exists()
    monkeypatch.undo()
    monkeypatch.chdir(program.folder)
    (program.folder / "wandb.py").write_text(f"FAILS = True{_FAKE}")
    monkeypatch.syspath_prepend(str(program.folder))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    done = program("--cfg", tiny_cfg, "--epochs", 1, "--opts", "TRACKER", "wandb")
    assert done.returncode == 0 and done.stdout.count("wandb gets no more figures of this run (the server is gone)") == 1
    assert len(tracked(program.folder, "log")) == 1
    with pytest.raises(ConfigError, match="choose from none, trackio, wandb"):
        get_config(None, ["TRACKER", "mlflow"])
    monkeypatch.delitem(sys.modules, "wandb")
