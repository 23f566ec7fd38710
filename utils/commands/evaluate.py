"""``--eval``: evaluate weights on the validation images, and say how certain, how even and how calibrated the figures are."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from yacs.config import CfgNode

from config import ConfigError, lookup
from utils.checkpoints.file_format import is_own, with_found
from utils.commands.outputs import check_outputs
from utils.evaluation.data_messages import decoding, tell_unreadable
from utils.evaluation.loop import evaluate
from utils.evaluation.setup import config_for_data, open_loaders, prepare
from utils.inference.evaluation_models import evaluation_models
from utils.inference.trained_model import weights_to_evaluate
from utils.loggers.console import RESULT, tell
from utils.loggers.progress import track
from utils.runtime import distributed
from utils.tasks.build import build_task


def evaluate_run(config: CfgNode, content: Any, device: torch.device, logger: logging.Logger) -> None:
    """Evaluate a checkpoint, or published weights, on the validation images; the training images are not touched."""
    task = build_task(config)
    check_outputs(config, [(key, lookup(config, key)) for key in ("TEST.PER_CLASS", "TEST.PREDICTIONS", "PREDICT.CSV")])
    report = task.evaluation_report(config)
    if config.PREDICT.CSV and not report.tells_mistakes:
        raise ConfigError(f"PREDICT.CSV: --eval has no table of mistakes for TASK {config.TASK}; leave --csv out")
    path, content = weights_to_evaluate(config, content, "--eval")
    config = with_found(config, content, path)
    config = config_for_data(task, config, content, logger)
    precision = prepare(config, device, logger)
    loaders = open_loaders(task, config, device, logger, splits=("val",), classes=report.classes_wanted(content),
                           published=not is_own(content))
    tell(logger, report.begin(loaders))
    models = evaluation_models(task, config, path, content, loaders.classes, device)
    logger.info(f"evaluating {path}" + (f" (step {content['step']})" if is_own(content) else "")
                + f" on {config.DATA.VAL_PATH or config.DATA.DATA_PATH}, "
                f"{len(loaders.val.dataset.source) or 'an unknown number of'} images, {len(loaders.classes)} classes"
                + (f", mean of {config.TEST.FLIP} with the mirror image" if config.TEST.FLIP != "none" else ""))
    with contextlib.closing(loaders):
        images = track(loaders.val, len(loaders.val), "evaluating", logger)
        *raw, result = evaluate(task, models, images, device, precision, record=report.record)
        tell_unreadable(loaders.val, result, logger)
    if result.caution:
        logger.warning(result.caution)
    logger.info(f"images {decoding(loaders.val)}")
    *lines, last = report.lines(result, raw)
    written, failure = [], None
    try:
        written = report.write() if distributed.is_main() else []
    except OSError as error:  # the figures are told all the same
        failure = error
    tell(logger, (*lines, *written))
    logger.info(last, extra=RESULT)
    if failure is not None:
        raise failure
