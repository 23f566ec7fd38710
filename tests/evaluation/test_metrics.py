"""Metrics against scikit-learn's, on any number of parts, and what decides which evaluation is the best."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import load, write_images
from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score, f1_score

from config import ConfigError, get_config
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
    (dict(top1=95.0, val_loss=0.1), dict(top1=95.0), False)])  # a checkpoint of an older version does not say
def test_of_equals_the_lower_loss_is_the_best(values: dict, best: dict, better: bool) -> None:
    assert Classification(get_config()).beats(values, best) == better


def test_the_metric_that_is_asked_for_decides(tiny_cfg: Path, program) -> None:
    write_images(program.folder / "uneven", "train", dict(a=40, b=8))
    write_images(program.folder / "uneven", "val", dict(a=12, b=3), seed=1)
    done = program("--cfg", tiny_cfg, "--data-path", "uneven", "--epochs", 4, "--opts", "TRAIN.BEST_METRIC", "loss", "TRAIN.EMA_DECAY", 0)
    assert done.returncode == 0, done.stderr
    run = program.folder / "output/tiny/default"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert load(run / "best.pth")["best"]["val_loss"] == min(row["val_loss"] for row in rows)
    assert done.stdout.count("mean recall") == 4 and 0 <= rows[0]["mean_recall"] <= 100
    with pytest.raises(ConfigError, match="TRAIN.BEST_METRIC"):
        get_config(None, ["TRAIN.BEST_METRIC", "accuracy"])
