"""Metrics against scikit-learn's, on any number of parts, and what decides which evaluation is the best."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import load, write_images
from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score, f1_score, roc_auc_score

from config import ConfigError, get_config
from utils.tasks.build import build_task
from utils.tasks.classification import Classification


def evaluated(logits: torch.Tensor, targets: torch.Tensor, batch: int, *opts: object):
    evaluator = Classification(get_config(None, [*map(str, opts)])).evaluator(torch.device("cpu"))
    for part in zip(logits.split(batch), targets.split(batch), strict=True):
        evaluator.update(*part)
    return evaluator.result()


@pytest.mark.parametrize("batch", [7, 60])
def test_metrics_are_those_of_scikit_learn(batch: int) -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.tensor([0] * 40 + [1] * 15 + [2] * 5 + [-1] * 3)  # the last rows only fill a batch; class 3 has no image
    logits = torch.randn(63, 4, generator=generator) + 2 * torch.nn.functional.one_hot(targets.clamp(min=0), 4)
    true, predicted = targets[:60].numpy(), logits.argmax(1)[:60].numpy()
    expected = dict(mean_recall=100 * balanced_accuracy_score(true, predicted), kappa=cohen_kappa_score(true, predicted),
                    f1=100 * f1_score(true, predicted, average="macro", labels=[0, 1, 2]), top1=100 * float((true == predicted).mean()))
    for name, value in expected.items():
        found = evaluated(logits, targets, batch, "TRAIN.BEST_METRIC", name)
        assert found.values[name] == pytest.approx(value, abs=1e-9) and found.samples == 60
        assert "mean recall" in found.line


@pytest.mark.parametrize("batch", [7, 60])
def test_auroc_is_that_of_scikit_learn_and_of_two_classes(batch: int, images: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.tensor([0] * 50 + [1] * 10 + [-1] * 3)
    logits = (4 * torch.randn(63, 2, generator=generator)).round()  # with ties
    found = evaluated(logits, targets, batch, "TRAIN.BEST_METRIC", "auroc")
    assert found.values["auroc"] == pytest.approx(roc_auc_score(targets[:60], (logits[:, 1] - logits[:, 0])[:60]), abs=1e-12)
    assert "AUROC 0." in found.line and "top5" not in found.line
    assert math.isnan(evaluated(logits[:50], targets[:50], batch, "TRAIN.BEST_METRIC", "auroc").values["auroc"])
    with pytest.raises(ConfigError, match="choose from top1, loss, ") as told:  # what the key takes
        build_task(get_config(None, ["TRAIN.BEST_METRIC", "map"]))
    for word in str(told.value).partition("choose from ")[2].split(", "):
        build_task(get_config(None, ["TRAIN.BEST_METRIC", word]))
    with pytest.raises(ConfigError, match=r"TRAIN\.BEST_METRIC is auroc.* has 4"):
        config = get_config(None, ["DATA.DATA_PATH", str(images), "DATA.NUM_WORKERS", "0", "TRAIN.BEST_METRIC", "auroc"])
        Classification(config).build_loaders(config)


def test_a_model_of_one_answer_is_cautioned_against() -> None:
    logits = torch.tensor([[1.0, 0.0, 0.5]] * 20)
    assert "number 0" in evaluated(logits, torch.tensor([0] * 19 + [1]), 7).caution
    assert not evaluated(logits, torch.tensor([0] * 19 + [-1]), 7).caution  # all are of that class
    logits[3, 1] = 2
    assert not evaluated(logits, torch.tensor([0] * 19 + [1]), 7).caution


def test_top5_is_told_from_six_classes_on() -> None:
    targets = torch.arange(5)
    assert "top5" not in evaluated(torch.eye(5), targets, 5).line and "top5 100.00" in evaluated(torch.eye(6)[:5], targets, 5).line


def test_mean_recall_is_told_where_classes_are_uneven() -> None:
    logits = torch.tensor([[1.0, 0.0]] * 20)
    constant = evaluated(logits, torch.tensor([0] * 19 + [1]), 20)
    assert constant.values["top1"] == 95 and constant.values["mean_recall"] == 50 and "mean recall 50.00" in constant.line
    assert "mean recall" not in evaluated(logits, torch.tensor([0, 1] * 10), 20).line


@pytest.mark.parametrize(("values", "best", "better"), [
    (dict(top1=95.0, val_loss=0.2), {}, True),
    (dict(top1=95.0, val_loss=0.2), dict(top1=95.0, val_loss=0.3), True),
    (dict(top1=95.0, val_loss=0.3), dict(top1=95.0, val_loss=0.2), False),
    (dict(top1=94.9, val_loss=0.1), dict(top1=95.0, val_loss=0.2), False),
    (dict(top1=float("nan"), val_loss=0.1), dict(top1=float("nan"), val_loss=0.2), True),
    (dict(top1=95.0, val_loss=0.1), dict(top1=95.0), False)])  # a checkpoint of an older version does not say
def test_of_equals_the_lower_loss_is_the_best(values: dict, best: dict, better: bool) -> None:
    assert Classification(get_config()).beats(values, best) == better


def test_the_metric_that_is_asked_for_decides(tiny_cfg: Path, program) -> None:
    write_images(program.folder / "uneven", "train", dict(a=40, b=8))
    write_images(program.folder / "uneven", "val", dict(a=12, b=3), seed=1)
    done = program("--cfg", tiny_cfg, "--data-path", "uneven", "--epochs", 4, "--opts", "TRAIN.BEST_METRIC", "auroc", "TRAIN.EMA_DECAY",
                   0)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("every image is taken for the class 'a'") == 1, done
    run = program.folder / "output/tiny/default"
    evaluated_alone = program("--eval", "--resume", run / "last.pth")
    assert "every image is taken for the class 'a'" in evaluated_alone.stdout + evaluated_alone.stderr
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert load(run / "best.pth")["best"]["auroc"] == max(row["auroc"] for row in rows) > 0
    assert done.stdout.count("AUROC") == 5 and "top5" not in done.stdout + (run / "report.html").read_text()
    assert done.stdout.count("mean recall") == 4 and 0 <= rows[0]["mean_recall"] <= 100
    with pytest.raises(ConfigError, match="TRAIN.BEST_METRIC"):
        get_config(None, ["TRAIN.BEST_METRIC", "accuracy"])
