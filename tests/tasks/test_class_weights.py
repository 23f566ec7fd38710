"""TRAIN.CLASS_WEIGHTS: the weights, and the loss with them on classes, smoothed and mixed ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_images

from config import ConfigError, get_config
from data.transforms.mixup import build_mixup
from utils.tasks.class_weights import class_weights
from utils.tasks.classification import Classification

IMAGES = np.array([190.0, 10, 40])


def weights_of(asked: str, images: np.ndarray | None = IMAGES) -> np.ndarray:
    return class_weights(get_config(None, ["TRAIN.CLASS_WEIGHTS", asked]), 3, images).double().numpy()


@pytest.mark.parametrize("asked", ["balanced", "effective", "effective:0.9", "[1, 19, 4.75]", "[0, 3, 1]"])
def test_an_image_weighs_1_on_average(asked: str) -> None:
    weights = weights_of(asked)
    assert (weights * IMAGES).sum() == pytest.approx(IMAGES.sum(), rel=1e-6)
    numbers = {"balanced": IMAGES, "effective": (1 - 0.999 ** IMAGES) / 0.001, "effective:0.9": (1 - 0.9 ** IMAGES) / 0.1,
               "[1, 19, 4.75]": IMAGES, "[0, 3, 1]": 1 / np.array([1e-99, 3, 1])}
    assert weights[1] / weights[2] == pytest.approx(numbers[asked][2] / numbers[asked][1], rel=1e-6)
    assert asked == "[0, 3, 1]" or weights[1] / weights[0] == pytest.approx(numbers[asked][0] / numbers[asked][1], rel=1e-6)


def test_what_cannot_be_weighed_is_a_sentence() -> None:
    assert class_weights(get_config(), 3, IMAGES) is None
    assert weights_of("[1, 2, 3]", None).tolist() == pytest.approx([0.5, 1, 1.5])  # of a stream
    assert weights_of("balanced", np.array([30.0, 0, 10]))[1] == 0
    rows = (("balanced", None, "a stream"), ("[1, 2]", IMAGES, "2 weights"), ("[0, 1, 0]", np.array([1.0, 0, 1]), "0 to every"))
    for asked, images, word in rows:
        with pytest.raises(ConfigError, match=word):
            weights_of(asked, images)
    for asked in ("inverse", "effective:2", "[1, -1]", "[0, 0]", "[]", "[a]", "{}"):
        with pytest.raises(ConfigError, match=r"TRAIN\.CLASS_WEIGHTS"):
            get_config(None, ["TRAIN.CLASS_WEIGHTS", asked])


def test_the_loss_weighs_classes_smoothed_and_mixed_ones_alike(tmp_path: Path) -> None:
    """Against the sum written out, and against torch's mean, whose weights need not be scaled."""
    write_images(tmp_path, "train", dict(a=12, b=3, c=5))
    write_images(tmp_path, "val", dict(a=1, b=1, c=1), seed=1)
    config = get_config(None, ["DATA.DATA_PATH", str(tmp_path), "DATA.NUM_WORKERS", "0", "DATA.BATCH_SIZE", "4", "TRAIN.CLASS_WEIGHTS",
                               "balanced", "MODEL.LABEL_SMOOTHING", "0.2"])
    task = Classification(config)
    loaders = task.build_loaders(config)
    assert task.weights.tolist() == pytest.approx([20 / 36, 20 / 9, 20 / 15]) and any("class weights" in line for line in loaders.notices)
    targets = torch.tensor([0] * 12 + [1] * 3 + [2] * 5)
    logits, images = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(20, 3, 8, 8)
    smooth = 0.8 * F.one_hot(targets, 3) + 0.2 / 3
    expected = -(task.weights * smooth * logits.log_softmax(1)).sum()
    assert torch.allclose(task.loss(logits, (images, targets)), expected) and torch.allclose(task.loss(logits, (images, smooth)), expected)
    assert float(expected) / 20 == pytest.approx(float(F.cross_entropy(logits, targets, 7 * task.weights, label_smoothing=0.2)), rel=1e-5)
    _, mixed = build_mixup(config, 3, 0)(images, targets, 0)
    assert not torch.allclose(mixed, smooth)
    assert torch.allclose(task.loss(logits, (images, mixed)), -(task.weights * mixed * logits.log_softmax(1)).sum())
    sampled = get_config(None, ["DATA.DATA_PATH", str(tmp_path), "DATA.NUM_WORKERS", "0", "DATA.SAMPLING", "balanced",
                                "TRAIN.CLASS_WEIGHTS", "balanced"])
    task = Classification(sampled)
    task.build_loaders(sampled)
    assert task.weights.tolist() == pytest.approx([1, 1, 1])  # what sampling has evened out is not weighed again
