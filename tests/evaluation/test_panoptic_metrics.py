"""Panoptic quality by hand, and equal to the paper's rules written pair by pair."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.dense.base import Objects
from utils.evaluation.dense_figures import class_quality
from utils.evaluation.panoptic_metrics import PanopticEvaluator, matched, quality
from utils.inference.found import Panoptic, encode
from utils.runtime import distributed


def truth_of(segments: np.ndarray, labels: list[int], crowd: list[bool] | None = None) -> Objects:
    count = len(labels)
    masks = encode(torch.from_numpy(segments[None] == np.arange(1, count + 1)[:, None, None]))
    return Objects(np.zeros((count, 4), np.float32), np.array(labels, np.int64), np.array(crowd or [False] * count, bool),
                   np.zeros(count, np.float32), np.arange(count), masks)


def found_of(segments: np.ndarray, labels: list[int]) -> Panoptic:
    return Panoptic(segments.astype(np.int32), np.array(labels, np.int64), np.ones(len(labels), np.float32))


def pair_by_pair(found: Panoptic, truth: np.ndarray, labels: list[int], crowd: list[bool]) -> dict[int, list[float]]:
    """Section 4 of the paper and its rules for void and crowds, with sets of pixels."""
    sums: dict[int, list[float]] = {}
    regions = [{*zip(*np.nonzero(truth == i + 1), strict=True)} for i in range(len(labels))]
    own = [{*zip(*np.nonzero(found.segments == i + 1), strict=True)} for i in range(len(found.labels))]
    void, matched_true, matched_found = {*zip(*np.nonzero(truth == 0), strict=True)}, set(), set()
    for i, region in enumerate(regions):
        for j, segment in enumerate(own):
            union = region | (segment - void)
            if labels[i] == found.labels[j] and not crowd[i] and union and len(region & segment) / len(union) > 0.5:
                row = sums.setdefault(labels[i], [0.0] * 4)
                row[0] += len(region & segment) / len(union)
                row[1] += 1
                matched_true.add(i)
                matched_found.add(j)
    for i, region in enumerate(regions):
        if region and not crowd[i] and i not in matched_true:
            sums.setdefault(labels[i], [0.0] * 4)[3] += 1
    for j, segment in enumerate(own):
        label = int(found.labels[j])
        crowds = set().union(*[regions[i] for i in range(len(labels)) if crowd[i] and labels[i] == label])
        if segment and j not in matched_found and len(segment & (void | crowds)) / len(segment) <= 0.5:
            sums.setdefault(label, [0.0] * 4)[2] += 1
    return sums


def test_quality_by_hand() -> None:
    """A thing found with an overlap of 3/4, another missed, one that is not there; stuff found exactly."""
    truth = np.array([[1, 1, 1, 1, 2, 2], [3, 3, 3, 3, 3, 3], [0, 0, 0, 0, 0, 0]])
    found = np.array([[1, 1, 1, 0, 3, 3], [2, 2, 2, 2, 2, 2], [0, 0, 4, 4, 0, 0]])
    sums = matched(found_of(found, [0, 1, 2, 0]), truth_of(truth, [0, 0, 1]))
    assert {label: row.tolist() for label, row in sums.items()} == {0: [0.75, 1, 0, 1], 1: [1, 1, 0, 0], 2: [0, 0, 1, 0]}
    table = np.stack([sums[label] for label in (0, 1, 2)] + [np.zeros(4)])
    values = quality(table, [True, False, True, True])
    assert values["pq"] == pytest.approx(100 * (0.75 / 1.5 + 1 + 0) / 3) and values["pq_things"] == pytest.approx(25)
    assert values["sq_things"] == pytest.approx(37.5) and values["rq_things"] == pytest.approx(100 / 3) and values["pq_stuff"] == 100
    assert np.isnan(class_quality(table)[3]).all() and math.isnan(quality(np.zeros((1, 4)), [True])["pq"])


def images() -> list[tuple[Panoptic, np.ndarray, list[int], list[bool]]]:
    generator, made = np.random.RandomState(0), []
    for _ in range(12):
        truth = np.kron(generator.randint(0, 6, (3, 4)), np.ones((4, 4), int))
        found = np.roll(truth, generator.randint(0, 3), generator.randint(0, 2))
        found[generator.rand(*found.shape) < 0.1] = generator.randint(0, 6)
        labels = generator.randint(0, 3, 5).tolist()
        guessed = [label if generator.rand() < 0.8 else (label + 1) % 3 for label in labels]
        made.append((found_of(found, guessed), truth, labels, (generator.rand(5) < 0.2).tolist()))
    return made


def test_sums_are_those_of_the_rules_pair_by_pair() -> None:
    kinds = set()
    for found, truth, labels, crowd in images():
        expected = pair_by_pair(found, truth, labels, crowd)
        ours = matched(found, truth_of(truth, labels, crowd))
        assert ours.keys() == expected.keys() and all(ours[label] == pytest.approx(row) for label, row in expected.items())
        kinds |= {column for row in expected.values() for column in range(4) if row[column]}
    assert kinds == {0, 1, 2, 3}


def test_ranks_give_the_same_figures_and_count_an_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = images()
    source = SimpleNamespace(classes=["a", "b", "c"], things=[True, True, False],
                             objects=lambda number: truth_of(*made[number][1:]))
    whole = PanopticEvaluator(source)
    whole.update([found for found, *_ in made] + [made[0][0]], torch.tensor([*range(12), -1]))
    expected = whole.result()
    ranks = [PanopticEvaluator(source) for _ in range(2)]
    for number, (found, *_) in reversed([*enumerate(made)]):
        ranks[number % 2].update([found], torch.tensor([number]))
    ranks[1].update([made[0][0]], torch.tensor([0]))
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [rank._sums for rank in ranks])
    for rank in ranks:
        result = rank.result()
        assert result.values == expected.values and result.samples == 12 and result.line == expected.line
    assert 10 < expected.values["pq"] < 100 and f"PQ {expected.values['pq']:.2f}" in expected.line
