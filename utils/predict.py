"""``--predict``: the classes of images, in the order given, as evaluation would see them."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from config import ConfigError
from data.build import build_given
from data.given import GivenImages, find_given
from data.loader import ImageLoader
from utils.compile import compile_model
from utils.device import Precision
from utils.evaluation import prepare
from utils.files import require_place
from utils.inference import Trained, open_trained
from utils.logger import plain
from utils.predictions import Console, CsvTable, Features, JsonLines, Prediction, standard_output, text_file
from utils.progress import aside, track
from utils.sheet import Sheet

EXIT_UNREADABLE = 3


def predict_run(config: CfgNode, content: Any, device: torch.device, logger: logging.Logger) -> int:
    """Predict PREDICT.PATHS; the exit status: 0, or 3 when some of them could not be read.

    Raises:
        ConfigError: no weights, or an output cannot be written.
        DataError: no image was found.
    """
    wanted = config.PREDICT
    files = [os.path.expanduser(path) for path in (wanted.CSV, wanted.JSON, wanted.FEATURES, wanted.SHEET) if path not in ("", "-")]
    for path in files:
        require_place(path)
    given = find_given(wanted.PATHS, getattr(sys.stdin, "buffer", None))
    trained = open_trained(config, content, "--predict")
    if wanted.FEATURES:
        _require_features(trained.model, config)
    precision = prepare(config, device, logger)
    loader, notices = build_given(config, given, device, trained.published)
    for line in notices:
        logger.info(line)
    logger.info(f"predicting {len(given)} image{'s' * (len(given) != 1)} by {trained.line()}, {len(trained.classes)} classes, on {device} "
                f"in {precision.name}")
    with contextlib.closing(loader):
        bad = _predict(config, trained, given, loader, device, precision, logger)
    logger.info(f"images {loader.dataset.pipeline.summary(*loader.decoded)}")
    for path in files:
        logger.info(f"wrote {path}")
    if bad:
        logger.info(f"warning: {bad} of {len(given)} could not be read")
    return EXIT_UNREADABLE if bad else 0


def _predict(config: CfgNode, trained: Trained, given: GivenImages, loader: ImageLoader, device: torch.device, precision: Precision,
             logger: logging.Logger) -> int:
    """Every prediction to every output; how many items could not be read."""
    wanted, bad = config.PREDICT, 0
    with contextlib.ExitStack() as stack:
        outputs: list[Any] = []
        for kind, path in ((CsvTable, wanted.CSV), (JsonLines, wanted.JSON)):
            if path:
                file = standard_output() if path == "-" else stack.enter_context(text_file(os.path.expanduser(path)))
                outputs.append(kind(file, trained, wanted.TOPK))
        if "-" not in (wanted.CSV, wanted.JSON):
            outputs.append(Console(logger, trained))
        if wanted.SHEET:
            outputs.append(stack.enter_context(Sheet(os.path.expanduser(wanted.SHEET), given, trained, logger)))
        features = stack.enter_context(Features(os.path.expanduser(wanted.FEATURES))) if wanted.FEATURES else None
        model = trained.model.to(device)
        compile_model(model, config.COMPILE)
        batches = predictions_of(model, loader, device, precision, wanted.TOPK, features is not None)
        for predictions, vectors in track(batches, len(loader), "predicting", logger):
            for prediction in predictions:
                if prediction.fault:
                    bad += 1
                    with aside():
                        print(f"warning: {plain(prediction.path)}: {plain(prediction.fault)}", file=sys.stderr, flush=True)
                for output in outputs:
                    output.add(prediction)
            if features is not None:
                features.add([prediction.path for prediction in predictions if not prediction.fault], vectors)
    return bad


@torch.inference_mode()
def predictions_of(model: nn.Module, loader: ImageLoader, device: torch.device, precision: Precision, topk: int,
                   with_features: bool = False) -> Iterator[tuple[list[Prediction], Tensor | None]]:
    """The predictions of each batch in the order given; with the features (images that were read, C) if asked for.

    Args:
        loader: of ``GivenImages``, whose targets are the images' numbers.
        topk: classes an image, capped at those there are.
    """
    given, done = loader.dataset.folder, 0
    faults = _Faults(loader, given)
    model.eval()
    for images, numbers in loader:
        images = images.to(device, non_blocking=True)
        with precision.autocast():
            inner = model.forward_features(images) if with_features else None
            logits = model.forward_head(inner) if with_features else model(images)
            vectors = model.forward_head(inner, pre_logits=True) if with_features else None
        probabilities, classes = logits.float().softmax(dim=1).topk(min(topk, logits.shape[1]), dim=1)
        numbers = numbers.cpu()
        read = numbers >= 0
        rows = zip(numbers.tolist(), classes.tolist(), probabilities.tolist(), strict=True)
        batch = []
        for index, (number, of_image, shares) in zip(range(done, min(done + len(numbers), len(given))), rows, strict=False):
            fault = "" if number >= 0 else faults.of(index)
            batch.append(Prediction(index, given.path(index), [] if fault else list(zip(of_image, shares, strict=True)), fault))
        done += len(numbers)
        yield batch, vectors.float().cpu()[read] if with_features else None


class _Faults:
    """Why images could not be read, by their numbers."""

    def __init__(self, loader: ImageLoader, given: GivenImages):
        self.loader, self.given, self.known, self.looked_at = loader, given, {}, 0

    def of(self, index: int) -> str:
        if index in self.given.faults:
            return self.given.faults[index]
        for failure in self.loader.failures[self.looked_at:]:
            self.known[failure.index] = failure.reason
        self.looked_at = len(self.loader.failures)
        return f"not a readable image ({self.known[index]})"


def _require_features(model: nn.Module, config: CfgNode) -> None:
    head = getattr(model, "forward_head", None)
    if head is None or not hasattr(model, "forward_features") or "pre_logits" not in inspect.signature(head).parameters:
        raise ConfigError(f"--features: {config.MODEL.NAME} does not give its features before the classifier; leave --features out")
