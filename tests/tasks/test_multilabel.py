"""Several labels an image: trained, judged, resumed, predicted, reported and exported, against scikit-learn's figures."""

from __future__ import annotations

import csv
import json
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL, differences, load
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score

from config import ConfigError, get_config
from utils.evaluation.label_figures import LabelFigures, best_thresholds
from utils.evaluation.label_predictions import LabelEvaluator
from utils.evaluation.label_predictions_file import LabelPredictionsFile
from utils.runtime import distributed
from utils.tasks.build import build_task

NAMES = ["blue", "green", "red"]
SETS = [which for number in range(4) for which in combinations(range(3), number)]
RUN = "output/tiny/default"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with patches of the colours that they are labelled with, in a list, and a run on it; what follows is done in this folder."""
    import main
    here, generator, rows = tmp_path_factory.mktemp("labels"), np.random.RandomState(0), ["path,labels,split"]
    (here / "data").mkdir()
    for split, count in (("train", 40), ("val", 21)):
        for i in range(count):
            pixels = generator.randint(0, 110, (36, 36, 3))
            for label in SETS[i % 8]:
                y, x = generator.randint(0, 20, 2)
                pixels[y:y + 16, x:x + 16, 2 - label] += 140
            Image.fromarray(pixels.astype(np.uint8)).save(here / f"data/{split}{i}.png")
            rows.append(f"{split}{i}.png,{'|'.join(NAMES[label] for label in SETS[i % 8])},{split}")
    (here / "data/list.csv").write_text("\n".join(rows))
    (here / "cfg.yaml").write_text("DATA: {DATA_PATH: data/list.csv, IMG_SIZE: 32, BATCH_SIZE: 8, NUM_WORKERS: 0}\n" + TINY_MODEL +
                                   "TRAIN: {EPOCHS: 4, WARMUP_EPOCHS: 1, BASE_LR: 0.2, EMA_DECAY: 0.7, KEEP_CHECKPOINTS: 0, "
                                   "SAVE_EVERY_STEPS: 7, REPORT: html}\nAUG: {AUTO_AUGMENT: none, REPROB: 0.0, SCALE: [0.8, 1.0]}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        assert main.main(["--cfg", "cfg.yaml"]) == 0
    return here


@pytest.fixture
def here(world: Path, program, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(world)
    return world


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_it_is_found_in_the_list_trained_and_judged(here: Path, program) -> None:
    rows, last, best = rows_of(here / RUN), load(here / RUN / "last.pth"), load(here / RUN / "best.pth")
    assert "TASK: multilabel" in last["config"] and last["classes"] == NAMES
    assert {"map", "f1", "micro_f1", "val_loss", "raw_map"} <= rows[0].keys() and "top1" not in rows[0]
    assert best["best"]["map"] == max(row["map"] for row in rows) > 55 and set(best["best"]) == {"map", "val_loss", "epoch", "step"}
    found = LabelPredictionsFile.read(str(here / RUN / "predictions.npz"))
    assert found.thresholds.tolist() == last["task"]["thresholds"] and found.target.tolist() == [
        [int(label in SETS[i % 8]) for label in range(3)] for i in range(21)] and found.paths == [f"val{i}.png" for i in range(21)]
    given = found.probability >= found.thresholds
    assert rows[-1]["map"] == pytest.approx(100 * average_precision_score(found.target, found.probability, average="macro"))
    for name, average in (("f1", "macro"), ("micro_f1", "micro")):
        assert rows[-1][name] == pytest.approx(100 * f1_score(found.target, given, average=average))
    loss = torch.nn.functional.binary_cross_entropy(torch.tensor(found.probability), torch.tensor(found.target, dtype=torch.float32))
    assert rows[-1]["val_loss"] == pytest.approx(float(loss), rel=1e-5)

    row = rows[best["best"]["epoch"] - 1]
    done = program("--eval", "--resume", f"{RUN}/best.pth", "--batch-size", 5, "--per-class", "classes.csv", "--opts",
                   "TEST.PREDICTIONS", "judged.npz")
    line = f"mAP {row['map']:.2f} macro F1 {row['f1']:.2f} micro F1 {row['micro_f1']:.2f} loss {row['val_loss']:.4f} (21)"
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == line, done.stdout + done.stderr
    table = list(csv.DictReader((here / "classes.csv").open()))
    assert [row["class"] for row in table] == NAMES
    assert [float(row["threshold"]) for row in table] == pytest.approx(best["task"]["thresholds"], abs=1e-6)
    assert f"raw mAP {row['raw_map']:.2f} macro F1 {row['raw_f1']:.2f} " in done.stdout
    done = program("--eval", "--resume", f"{RUN}/best.pth", "--weights", "raw")
    assert f"macro F1 {row['raw_f1']:.2f} " in done.stdout.splitlines()[-1]  # by the raw weights' own thresholds
    judged = LabelPredictionsFile.read(str(here / "judged.npz"))
    expected = f1_score(judged.target, judged.probability >= 0.4, average="macro")
    done = program("--eval", "--resume", f"{RUN}/best.pth", "--opts", "TEST.THRESHOLDS", 0.4)
    assert f" macro F1 {100 * expected:.2f} " in done.stdout.splitlines()[-1]


def test_a_run_that_was_cut_off_ends_in_the_same_bits(here: Path, program) -> None:
    again = here / "output/tiny/again"
    again.mkdir()
    shutil.copy(here / RUN / "ckpt_00000007.pth", again)  # in the second epoch, with the thresholds of the first
    assert load(again / "ckpt_00000007.pth")["task"]["thresholds"]
    done = program("--cfg", "cfg.yaml", "--tag", "again", "--weights", "raw")  # which is about commands on a checkpoint
    assert done.returncode == 0 and "auto-resume" in done.stdout, done.stderr
    ours, theirs = load(again / "last.pth"), load(here / RUN / "last.pth")
    assert ours["step"] == theirs["step"] == 20
    for part in ("model", "ema", "optimizer", "best", "task"):
        assert differences(ours[part], theirs[part], part) == []
    assert program("--cfg", "cfg.yaml").returncode == 0  # finished already


def test_predicted_reported_exported_and_planned(here: Path, program) -> None:
    kept = load(here / RUN / "best.pth")["task"]["thresholds"]
    images = [f"data/val{i}.png" for i in range(8)]
    done = program("--predict", *images, "--resume", f"{RUN}/best.pth", "--csv", "o.csv", "--json", "o.json", "--sheet", "o.png")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (here / "o.json").read_text().splitlines()]
    for row, record in zip(csv.DictReader((here / "o.csv").open()), records, strict=True):
        over = [name for name, threshold in zip(NAMES, kept, strict=True) if float(row[f"probability_{name}"]) >= threshold]
        assert sorted(filter(None, row["labels"].split("|"))) == over == sorted(label["class"] for label in record["labels"])
    assert len({row["path"] for row in records}) == 8 and any(record["labels"] for record in records)
    done = program("--predict", "data/val1.png", "--resume", f"{RUN}/best.pth", "--opts", "TEST.THRESHOLDS", "[1, 1, 0]")
    assert any(line.startswith("data/val1.png: red ") and "," not in line for line in done.stdout.splitlines()), done.stdout

    assert program("--report", RUN).returncode == 0
    page = (here / RUN / "report.html").read_text()
    assert "macro F1" in page and "average precision" in page and "top-1" not in page and "confused" not in page
    assert program("--export", "exported/", "--resume", f"{RUN}/best.pth").returncode == 0
    described = json.loads((here / "exported/config.json").read_text())
    assert described["problem_type"] == "multi_label_classification" and described["thresholds"] == kept
    assert described["label_names"] == NAMES
    told = [program("--predict", "data/val5.png", "--resume", file).stdout.splitlines()[1:2] for file in (f"{RUN}/best.pth", "exported")]
    assert told[0] == told[1] and "%" in told[0][0]
    done = program("--plan", "--cfg", "cfg.yaml", "--tag", "other", "--opts", "PLAN.SECONDS", 0.1)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "fits: yes", done.stderr
    assert program("--show-batch", "batch.png", "--cfg", "cfg.yaml").returncode == 0
    done = program("--doctor", "--data-path", "data/list.csv", "--opts", "DOCTOR.FOLDER", "doctor")
    report = json.loads((here / "doctor/report.json").read_text())
    assert done.returncode == 0 and [row["train"] for row in report["classes"]] == [20, 20, 20]


@pytest.mark.parametrize("arguments, status, words", [
    (("--cfg", "cfg.yaml", "--tag", "x", "--opts", "TASK", "classification"), 2, "TASK multilabel"),
    (("--cfg", "cfg.yaml", "--tag", "x", "--opts", "TRAIN.BEST_METRIC", "top1"), 2, "map, f1, micro_f1, loss"),
    (("--cfg", "cfg.yaml", "--tag", "x", "--opts", "TRAIN.CLASS_WEIGHTS", "balanced"), 2, "DATA.SAMPLING balanced"),
    (("--predict", "data/val1.png", "--resume", f"{RUN}/best.pth", "--opts", "TASK", "classification"), 2, "--opts TASK multilabel"),
    (("--eval", "--resume", f"{RUN}/best.pth", "--opts", "TEST.THRESHOLDS", "[0.5, 0.5]"), 2, "3 classes"),
    (("--eval", "--resume", f"{RUN}/best.pth", "--labels", "real"), 2, "TEST.LABELS"),
    (("--compare", f"{RUN}/best.pth", f"{RUN}/last.pth"), 2, "TASK multilabel"),
])
def test_what_does_not_go_is_a_sentence(here: Path, program, arguments: tuple, status: int, words: str) -> None:
    done = program(*arguments)
    assert done.returncode == status and words in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_figures_are_the_same_on_any_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 4, generator=generator).round(decimals=1)  # some are equal
    truth = torch.randint(-1, 2, (50, 4), generator=generator, dtype=torch.int8)
    truth[:, 3] = truth[:, 3].clamp(max=0)  # a label that no image has
    truth[-2:] = -1  # rows that only fill a batch

    def evaluated(*parts: slice) -> tuple[dict, list[float]]:
        found, evaluators = [], [LabelEvaluator(lambda labels: None, lambda values: found.append(values)) for _ in parts]
        for evaluator, part in zip(evaluators, parts, strict=True):
            evaluator.update(logits[part], truth[part])
        gathered = []
        for evaluator in evaluators:
            monkeypatch.setattr(distributed, "gather_objects", lambda mine: gathered.append(mine) or [mine])
            evaluator.update.gathered()
        monkeypatch.setattr(distributed, "gather_objects", lambda mine: gathered)
        result = evaluators[-1].result()
        return {**result.values, "samples": result.samples, "line": result.line}, found[-1]

    whole, thresholds = evaluated(slice(None))
    assert evaluated(slice(0, 17), slice(17, 31), slice(31, 50)) == (whole, thresholds)
    known, probability = truth.numpy(), logits.double().sigmoid().numpy()
    scores = [average_precision_score(known[rows, label], probability[rows, label])
              for label in range(3) for rows in [known[:, label] >= 0]]
    assert whole["map"] == pytest.approx(100 * np.mean(scores)) and whole["samples"] == int((known >= 0).any(1).sum()) < 49
    for label in range(3):  # no other threshold has a greater F1
        rows = known[:, label] >= 0
        best = f1_score(known[rows, label], probability[rows, label] >= thresholds[label])
        assert best == pytest.approx(max(f1_score(known[rows, label], probability[rows, label] >= t) for t in probability[rows, label]))
    assert thresholds[3] == 0.5 and np.isnan(LabelFigures.of(known, probability, np.full(4, 0.5)).precision_area[3])
    assert best_thresholds(np.array([[1], [0]], np.int8), np.array([[0.9], [0.1]])).tolist() == [0.5]


def test_loss_counts_what_is_known_and_smooths_towards_the_middle() -> None:
    config = get_config(None, ["TASK", "multilabel", "MODEL.LABEL_SMOOTHING", "0.2"])
    task, logits = build_task(config), torch.tensor([[0.5, -1.0, 2.0], [1.0, 1.0, 1.0]])
    targets = torch.tensor([[1, 0, -1], [-1, -1, -1]], dtype=torch.int8)
    expected = sum(-(t * x.sigmoid().log() + (1 - t) * (-x).sigmoid().log()) for x, t in ((logits[0, 0], 0.9), (logits[0, 1], 0.1))) / 3
    assert task.loss(logits, (None, targets)) == pytest.approx(float(expected))
    with pytest.raises(ConfigError, match="TEST.THRESHOLDS"):
        get_config(None, ["TEST.THRESHOLDS", "[0.5, 1.5]"])
