"""``--eval``: judge weights on images, and say how sure, how even and how calibrated the figures are."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from yacs.config import CfgNode

from config import ConfigError
from utils.checkpoints.file_format import is_own
from utils.evaluation.data_messages import decoding, tell_uncounted
from utils.evaluation.label_sets import Labels, LabelSet
from utils.evaluation.loop import evaluate
from utils.evaluation.per_class import PerClass
from utils.evaluation.predictions_file import MOST_IMAGES
from utils.evaluation.recorder import Answers, Recorder, recordable, write_outcomes
from utils.evaluation.setup import open_images, prepare
from utils.evaluation.summary import describe
from utils.inference.evaluation_models import judged_models
from utils.inference.trained_model import weights_to_judge
from utils.loggers.console import RESULT, tell
from utils.loggers.progress import track
from utils.runtime import distributed
from utils.runtime.files import replace_file, require_place


def evaluate_run(config: CfgNode, content: Any, device: torch.device, logger: logging.Logger) -> None:
    """Judge a checkpoint, or published weights, on the validation images; the training images are not touched."""
    labels = Labels(config)
    for key, path in (("TEST.PER_CLASS", config.TEST.PER_CLASS), ("TEST.PREDICTIONS", config.TEST.PREDICTIONS)):
        if path:
            require_place(os.path.expanduser(path), f"{key} is ")
    path, content = weights_to_judge(config, content, "--eval")
    precision, own = prepare(config, device, logger), is_own(content)
    loaders, label_set = open_images(config, content, labels, device, logger)
    if config.TEST.PREDICTIONS and not recordable(loaders.val):
        raise ConfigError("TEST.PREDICTIONS: not for a stream, whose images have no numbers, nor beyond "
                          f"{MOST_IMAGES:,} images; leave it empty")
    models = judged_models(config, path, content, loaders.classes, device)
    logger.info(f"evaluating {path}" + (f" (step {content['step']})" if own else "")
                + f" on {config.DATA.VAL_PATH or config.DATA.DATA_PATH}, "
                f"{len(loaders.val.dataset.folder) or 'an unknown number of'} images, {len(loaders.classes)} classes"
                + (f", mean of {config.TEST.FLIP} with the mirror image" if config.TEST.FLIP != "none" else ""))
    everything, chosen = Recorder(), Recorder(label_set.allowed)

    def record(logits: Tensor, targets: Tensor) -> None:
        everything(logits, targets)
        if label_set.allowed is not None:
            chosen(logits, targets)

    with contextlib.closing(loaders):
        *raw, result = evaluate(models, track(loaders.val, len(loaders.val), "evaluating", logger), device, precision, record=record)
        tell_uncounted(loaders.val, result, logger)
    logger.info(f"images {decoding(loaders.val)}")
    answers = everything.answers(loaders.val)
    among = chosen.answers(loaders.val) if label_set.allowed is not None else None
    *lines, last = _figures(label_set, answers, among, result, loaders.classes)
    written, failure = [], None
    try:
        written = _write_files(config, label_set, answers, among, loaders)
    except OSError as error:  # the figures are told all the same
        failure = error
    whose = "raw, all images and classes:" if label_set.headline else "raw"
    tell(logger, (*lines, *written, *(f"{whose} {other.line()}" for other in raw)))
    logger.info(last, extra=RESULT)
    if failure is not None:
        raise failure


def _figures(label_set: LabelSet, answers: Answers, among: Answers | None, result: Any, classes: Sequence[str]) -> list[str]:
    """The lines of a report, the figure that counts last."""
    lines, allowed = [], label_set.allowed
    if among is not None and label_set.headline:
        lines.append(f"answers from all {len(classes)} classes: {answers.on(allowed).evaluation().line()}")
        answers = among.on(allowed)
        result = answers.evaluation()
    elif among is not None:
        lines.append(f"answers from the {len(allowed)} classes with images alone: {among.evaluation().line()}")
    lines += describe(answers, PerClass.of(answers.target, answers.top1, len(classes)), classes, result)
    if label_set.real is not None:
        lines.append(f"by the original labels: {result.line()}")
        return [*lines, _real_line(label_set.real, answers)]
    return [*lines, result.line()]


def _write_files(config: CfgNode, label_set: LabelSet, answers: Answers, among: Answers | None, loaders: Any) -> list[str]:
    """Write TEST.PREDICTIONS and TEST.PER_CLASS, where they are asked for; lines that say so. Rank 0's business.

    Raises:
        OSError: one cannot be written.
    """
    lines, classes = [], loaders.classes
    if not distributed.is_main():
        return lines
    if config.TEST.PREDICTIONS:
        write_outcomes(answers, loaders.val, classes, os.path.expanduser(config.TEST.PREDICTIONS))
        lines.append(f"prediction of each image: {config.TEST.PREDICTIONS}")
    if config.TEST.PER_CLASS:
        counted = among.on(label_set.allowed) if among is not None and label_set.headline else answers
        table = PerClass.of(counted.target, counted.top1, len(classes)).csv(classes, label_set.allowed)
        replace_file(os.path.expanduser(config.TEST.PER_CLASS), table.encode("utf-8", "backslashreplace"))
        lines.append(f"figures of each class: {config.TEST.PER_CLASS}")
    return lines


def _real_line(real: Sequence[Sequence[int]], answers: Answers) -> str:
    judged = [(label_list, answer) for label_list, answer, target in zip(real, answers.top1.tolist(), answers.target.tolist(), strict=True)
              if target >= 0]
    counted = [(label_list, answer) for label_list, answer in judged if label_list]
    right = sum(answer in label_list for label_list, answer in counted)
    return (f"top1 {100 * right / max(1, len(counted)):.2f} by ReaL labels ({right} of {len(counted)}; "
            f"images without a label, left out: {len(judged) - len(counted)})")
