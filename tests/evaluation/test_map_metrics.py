"""Figures of maps equal a confusion matrix in numpy, whatever the batches and ranks."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import torch

from utils.evaluation.dense_figures import MapFigures
from utils.evaluation.map_metrics import MAP_METRICS, MapEvaluator
from utils.runtime import distributed

CLASSES = ["sky", "road", "car", "never"]


def maps(images: int = 7) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    answers, targets = [], []
    for number in range(images):
        target = torch.randint(3, (5 + number, 9), generator=generator)
        moved = torch.rand(target.shape, generator=generator) < 0.4
        answers.append(torch.where(moved, torch.randint(3, target.shape, generator=generator), target).to(torch.uint8))
        target[torch.rand(target.shape, generator=generator) < 0.2] = 255
        targets.append(target.to(torch.uint8))
    return answers, targets


def in_numpy(answers: list[torch.Tensor], targets: list[torch.Tensor]) -> tuple[np.ndarray, dict[str, float]]:
    answer, target = (torch.cat([one.flatten() for one in many]).numpy().astype(int) for many in (answers, targets))
    counts = np.zeros((4, 4), int)
    for true, taken in zip(target[target != 255], answer[target != 255], strict=True):
        counts[true, taken] += 1
    iou = [counts[c, c] / (counts[c].sum() + counts[:, c].sum() - counts[c, c]) for c in range(3)]
    accuracy = [counts[c, c] / counts[c].sum() for c in range(3)]
    right = np.trace(counts) / counts.sum()
    return counts, dict(miou=100 * np.mean(iou), pixel_accuracy=100 * right, mean_accuracy=100 * np.mean(accuracy))


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_figures_are_those_of_a_confusion_matrix(batch: int) -> None:
    answers, targets = maps()
    counts, expected = in_numpy(answers, targets)
    evaluator = MapEvaluator(CLASSES, torch.device("cpu"))
    for start in range(0, 7, batch):
        evaluator.update(answers[start:start + batch], targets[start:start + batch])
    evaluator.update([answers[0]], [None])  # could not be read
    for result in (evaluator.result(), evaluator.result()):
        assert np.array_equal(result.counts, counts) and result.samples == 7
        assert result.values == pytest.approx(expected, abs=1e-12) and list(result.values) == [metric.name for metric in MAP_METRICS]
    assert f"mIoU {expected['miou']:.2f}" in result.line and not result.caution


def test_a_class_counts_where_it_is_or_was_answered() -> None:
    evaluator = MapEvaluator(CLASSES, torch.device("cpu"))
    evaluator.update([torch.tensor([[0, 0, 3, 1]])], [torch.tensor([[0, 0, 0, 1]])])
    figures, values = MapFigures(evaluator.result().counts), evaluator.result().values
    assert figures.iou.tolist()[:2] == pytest.approx([2 / 3, 1]) and math.isnan(figures.iou[2]) and figures.iou[3] == 0
    assert math.isnan(figures.accuracy[3])
    assert values == pytest.approx(dict(miou=100 * 5 / 9, pixel_accuracy=75, mean_accuracy=100 * 5 / 6))
    rows = list(csv.reader(figures.csv(CLASSES).splitlines()))
    assert rows[1] == ["sky", "0.666667", "0.666667", "3", "2", "2", "never", "1"] and rows[3][1:4] == ["", "", "0"]


def test_ranks_are_added_up_and_one_may_be_without_images(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, targets = maps()
    parts = [MapEvaluator(CLASSES, torch.device("cpu")) for _ in range(3)]
    parts[0].update(answers[:5], targets[:5])
    parts[1].update(answers[5:], targets[5:])
    calls = []

    def summed(own: torch.Tensor) -> torch.Tensor:
        calls.append(own)
        return sum(part.images for part in parts) if own.ndim == 0 else sum(part.counts for part in parts)

    monkeypatch.setattr(distributed, "all_reduce_sum", summed)
    results = [part.result() for part in parts]
    assert all(result.values == pytest.approx(in_numpy(answers, targets)[1]) and result.samples == 7 for result in results)
    assert len(calls) == 6


def test_one_answer_for_everything_is_cautioned_and_nothing_is_no_figure() -> None:
    evaluator = MapEvaluator(CLASSES, torch.device("cpu"))
    evaluator.update([torch.full((2, 2), 1)], [torch.tensor([[0, 1], [1, 255]])])
    assert "'road'" in evaluator.result().caution
    assert math.isnan(MapEvaluator(CLASSES, torch.device("cpu")).result().values["miou"])
