"""``--compare A B``: two checkpoints on the same images, and whether their difference is more than chance."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from config import KEYS, ConfigError, config_from_text, lookup
from data import DataError, preprocessing
from data.messages import NOTICE
from utils.checkpoints.file_format import is_own, task_of
from utils.evaluation.data_messages import tell_unreadable
from utils.evaluation.image_predictions import ImagePredictions, PredictionRecorder
from utils.evaluation.label_sets import Labels
from utils.evaluation.loop import evaluate
from utils.evaluation.paired_test import report as paired_report
from utils.evaluation.setup import config_for_data, open_loaders, prepare
from utils.inference.evaluation_models import evaluation_models
from utils.loggers.console import tell
from utils.loggers.progress import track
from utils.runtime.precision import Precision
from utils.tasks.base import Batch
from utils.tasks.build import build_task
from utils.tasks.classification_report import ClassificationReport

Pair = tuple[CfgNode, Any]
# What a file's own config says even here: its model, and how it wants its images. All else is the first file's, or the command's.
_OF_THE_FILE = ("MODEL.", "TRAIN.", "DATA.IMG_SIZE", "DATA.FIT", "DATA.INTERPOLATION", "DATA.WINDOW", "DATA.MEAN", "DATA.STD",
                "TEST.CROP", "FUSED_LAYERNORM")


class _KeepsLogits(nn.Module):
    """A model that passes its logits on to ``record`` too, so that two of them are evaluated in one pass over the images."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.logits = model, torch.empty(0)

    def forward(self, images: Tensor) -> Tensor:
        self.logits = self.model(images)
        return self.logits


def compare_run(config: CfgNode, content: Sequence[Pair], device: torch.device, logger: logging.Logger) -> None:
    """Evaluate both files on the first one's data, in one pass where they prepare images alike, and print the paired test.

    Raises:
        ConfigError: a label set that images do not allow for here, or other classes.
    """
    report = build_task(config).evaluation_report(config)
    if not isinstance(report, ClassificationReport):
        raise ConfigError(f"--compare counts right and wrong predictions, which TASK {config.TASK} does not have; lay the runs side by "
                          "side with --report FOLDER FOLDER")
    for (_, other), path in zip(content, config.COMPARE.FILES, strict=True):
        if is_own(other) and task_of(other) != report.task.name:
            raise ConfigError(f"--compare: {path} was trained for TASK {task_of(other)}, the other file for {report.task.name}; lay the "
                              "runs side by side with --report FOLDER FOLDER")
    labels = report.labels
    if labels.name == "real":
        raise ConfigError("--compare counts one label an image; leave --labels real out")
    config = config_for_data(report.task, config, content[0][1], logger)
    pairs = [(config, content[0][1]), (_with_data_of(config, content[1][0]), content[1][1])]
    precision = prepare(config, device, logger)
    alike = preprocessing(pairs[0][0]) == preprocessing(pairs[1][0]) and len({is_own(c) for _, c in pairs}) == 1
    evaluate_both = _in_one_pass if alike else _in_two_passes
    predictions = evaluate_both(pairs, labels, device, precision, logger)
    for line in paired_report(config.COMPARE.FILES, *predictions):
        logger.info(line)


def _with_data_of(first: CfgNode, own: CfgNode) -> CfgNode:
    """``own`` with everything that is not the file's own matter taken from ``first``."""
    opts = [item for key, *_ in KEYS if key != "BASE" and not key.startswith(_OF_THE_FILE) for item in (key, lookup(first, key))]
    return config_from_text(own.dump(), opts)


def _opened(pair: Pair, labels: Labels, device: torch.device, logger: logging.Logger,
            classes: Sequence[str] | None = None) -> tuple[Any, Any]:
    """(loaders, classes that predictions are chosen from or None) for a file; its targets count ``classes``, else the file's own."""
    report = ClassificationReport(build_task(pair[0]), pair[0], labels)
    loaders = open_loaders(report.task, pair[0], device, logger, splits=("val",), classes=classes or report.classes_wanted(pair[1]),
                           published=not is_own(pair[1]))
    tell(logger, report.begin(loaders))
    return loaders, report.label_set.allowed if report.label_set.headline else None


def _last_model(pair: Pair, classes: Sequence[str], device: torch.device) -> nn.Module:
    config, content = pair
    if is_own(content) and set(content["classes"]) != set(classes):
        raise ConfigError(f"{config.MODEL.RESUME}: has other classes ({len(content['classes'])}: {', '.join(content['classes'][:3])}, ...) "
                          f"than the file it is compared with ({len(classes)}: {', '.join(classes[:3])}, ...)")
    return evaluation_models(build_task(config), config, config.MODEL.RESUME, content, classes, device)[-1]


def _in_one_pass(pairs: Sequence[Pair], labels: Labels, device: torch.device, precision: Precision,
                 logger: logging.Logger) -> list[ImagePredictions]:
    loaders, allowed = _opened(pairs[0], labels, device, logger)
    first, second = _KeepsLogits(_last_model(pairs[0], loaders.classes, device)), _last_model(pairs[1], loaders.classes, device)
    recorders = PredictionRecorder(allowed), PredictionRecorder(allowed)

    def record(logits: Tensor, batch: Batch) -> None:
        recorders[0](first.logits.float(), batch[1])
        recorders[1](logits, batch[1])

    with contextlib.closing(loaders):
        images = track(loaders.val, len(loaders.val), "comparing", logger)
        result = evaluate(build_task(pairs[0][0]), [first, second], images, device, precision, record=record)[-1]
        tell_unreadable(loaders.val, result, logger)
    return [_of(recorder, loaders.val, allowed) for recorder in recorders]


def _in_two_passes(pairs: Sequence[Pair], labels: Labels, device: torch.device, precision: Precision,
                   logger: logging.Logger) -> list[ImagePredictions]:
    logger.log(NOTICE, "the two prepare their images differently; two passes over the data")
    predictions, classes = [], None
    for pair in pairs:
        loaders, allowed = _opened(pair, labels, device, logger, classes)
        recorder = PredictionRecorder(allowed)
        with contextlib.closing(loaders):
            images = track(loaders.val, len(loaders.val), "comparing", logger)
            models = [_last_model(pair, loaders.classes, device)]
            result = evaluate(build_task(pair[0]), models, images, device, precision,
                              record=lambda logits, batch, recorder=recorder: recorder(logits, batch[1]))[-1]
            tell_unreadable(loaders.val, result, logger)
        classes = loaders.classes
        predictions.append(_of(recorder, loaders.val, allowed))
    a, b = (found.target for found in predictions)
    if len(a) != len(b) or ((a != b) & (a >= 0) & (b >= 0)).any():
        raise DataError("the data has changed between the two passes; run it again")
    return predictions


def _of(recorder: PredictionRecorder, loader: Any, allowed: np.ndarray | None) -> ImagePredictions:
    """What was recorded; where predictions are chosen from ``allowed``, images of other classes do not count."""
    predictions = recorder.predictions(loader)
    return predictions if allowed is None else predictions.on(allowed)
