"""``--predict``: the classes of images, in the order given, as evaluation would see them."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import Any

import torch
from yacs.config import CfgNode

from config import ConfigError, lookup
from data.layouts.input_paths import InputImages, find_input_images
from data.loading.loader import ImageLoader
from utils.commands.outputs import check_outputs
from utils.evaluation.setup import prepare
from utils.inference.outputs import Console, CsvTable, Features, JsonLines, PredictionFormat, listing_of, standard_output, text_file
from utils.inference.predict import predictions_of, require_features
from utils.inference.trained_model import Trained, open_trained
from utils.loggers.console import plain, tell
from utils.loggers.progress import live_line_hidden, track
from utils.runtime.compile import compile_model
from utils.runtime.files import STANDARD
from utils.runtime.precision import Precision
from utils.tasks.base import Task
from utils.tasks.build import build_task
from utils.visualization.contact_sheet import Sheet, pages_of
from utils.visualization.found_files import CocoFile, Masks, Pictures, files_in, make_folder

EXIT_UNREADABLE = 3


def predict_run(config: CfgNode, content: Any, device: torch.device, logger: logging.Logger) -> int:
    """Predict PREDICT.PATHS; the exit status: 0, or 3 when some of them could not be read.

    Raises:
        ConfigError: no weights, or an output cannot be written.
        DataError: no image was found.
    """
    wanted = config.PREDICT
    given = find_input_images(wanted.PATHS, getattr(sys.stdin, "buffer", None))
    outputs = [(f"PREDICT.{key}", wanted[key]) for key in ("CSV", "JSON", "FEATURES", "SHEET", "COCO") if wanted[key]]
    beside = [("PREDICT.FEATURES", listing_of(wanted.FEATURES))] if wanted.FEATURES else []
    beside += [("PREDICT.SHEET", page) for page in pages_of(wanted.SHEET)[1:]] if wanted.SHEET else []
    check_outputs(config, [*outputs, *beside], map(given.path, range(len(given))))
    files = [os.path.expanduser(path) for _, path in outputs if path != STANDARD]
    task = build_task(config)
    trained = open_trained(task, config, content, "--predict")
    config = trained.config
    form = task.prediction_format(config, trained)
    for key in ("PREDICT.COCO", "PREDICT.PICTURES", "PREDICT.MASKS"):
        if lookup(config, key) and key not in getattr(form, "gives", ()):
            raise ConfigError(f"{key}: there is no such output for TASK {task.name}; leave it out")
    beside += [(f"PREDICT.{key}", path) for key in ("PICTURES", "MASKS") if wanted[key]
               for path in files_in(make_folder(wanted[key], f"PREDICT.{key}"), given)]
    check_outputs(config, [*outputs, *beside], map(given.path, range(len(given))))
    if wanted.FEATURES:
        require_features(trained.model, config)
    precision = prepare(config, device, logger)
    loader, notices = task.prediction_loader(config, given, device, trained.published)
    tell(logger, notices)
    logger.info(f"predicting {len(given)} image{'s' * (len(given) != 1)} by {trained.line()}, {len(trained.classes)} classes, on {device} "
                f"in {precision.name}")
    with contextlib.closing(loader):
        bad = _predict(config, task, trained, form, given, loader, device, precision, logger)
    logger.info(f"images {loader.dataset.pipeline.summary(*loader.decoded)}")
    for path in files:
        logger.info(f"wrote {path}")
    if bad:
        logger.warning(f"{bad} of {len(given)} could not be read")
    return EXIT_UNREADABLE if bad else 0


def _predict(config: CfgNode, task: Task, trained: Trained, form: PredictionFormat, given: InputImages, loader: ImageLoader,
             device: torch.device, precision: Precision, logger: logging.Logger) -> int:
    """Every prediction to every output; how many items could not be read."""
    wanted, bad = config.PREDICT, 0
    with contextlib.ExitStack() as stack:
        outputs: list[Any] = []
        for kind, path in ((CsvTable, wanted.CSV), (JsonLines, wanted.JSON)):
            if path:
                file = standard_output() if path == "-" else stack.enter_context(text_file(os.path.expanduser(path)))
                outputs.append(kind(file, form))
        if "-" not in (wanted.CSV, wanted.JSON):
            outputs.append(Console(logger))
        if wanted.SHEET:
            outputs.append(stack.enter_context(Sheet(os.path.expanduser(wanted.SHEET), given, logger)))
        if wanted.COCO:
            outputs.append(stack.enter_context(CocoFile(os.path.expanduser(wanted.COCO), trained.classes, given)))
        outputs += [kind(os.path.expanduser(path), given) for kind, path in ((Pictures, wanted.PICTURES), (Masks, wanted.MASKS)) if path]
        features = stack.enter_context(Features(os.path.expanduser(wanted.FEATURES))) if wanted.FEATURES else None
        model = trained.model.to(device)
        compile_model(model, config.COMPILE)
        batches = predictions_of(task, model, form, loader, device, precision, features is not None)
        for predictions, vectors in track(batches, len(loader), "predicting", logger):
            for prediction in predictions:
                if prediction.fault:
                    bad += 1
                    with live_line_hidden():
                        print(f"warning: {plain(prediction.path)}: {plain(prediction.fault)}", file=sys.stderr, flush=True)
                for output in outputs:
                    output.add(prediction)
            if features is not None:
                features.add([prediction.path for prediction in predictions if not prediction.fault], vectors)
    return bad
