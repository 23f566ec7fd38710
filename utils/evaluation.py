"""``--eval``: judge weights on images, and say how sure, how even and how calibrated the figures are."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from config import ConfigError
from data import build_loaders
from data.classes import imagenet_classes
from models import build_model, check_input_size, load_state
from models.weights import check_finite, unwrap_state_dict
from utils import checkpoint, distributed
from utils.answers import Answers, Recorder, describe
from utils.compile import compile_model, require_compiler
from utils.device import Precision, choose_precision
from utils.engine import evaluate
from utils.files import replace_file, require_place
from utils.labels import Labels, LabelSet
from utils.modes import weights_to_judge
from utils.outcomes import MOST_IMAGES
from utils.per_class import PerClass
from utils.progress import listing, periodic, track
from utils.reading import decoding, tell_uncounted, teller
from utils.recorder import recordable, write_outcomes
from utils.seed import make_deterministic


class Flipped(nn.Module):
    """Test-time flip: one answer from an image and its mirror image. (B, 3, H, W) -> logits (B, C).

    ``mean`` is of ``logits``, or of ``probabilities``, whose logarithm is then the logits.
    """

    def __init__(self, model: nn.Module, mean: str):
        super().__init__()
        self.model, self.mean = model, mean

    def forward(self, images: Tensor) -> Tensor:
        both = self.model(images).float(), self.model(images.flip(3)).float()
        if self.mean == "logits":
            return (both[0] + both[1]) / 2
        return torch.logaddexp(*(F.log_softmax(logits, dim=1) for logits in both)) - math.log(2)


class Reordered(nn.Module):
    """A classifier whose outputs stand in another order of the classes: output i is the model's ``order[i]``."""

    def __init__(self, model: nn.Module, order: Sequence[int]):
        super().__init__()
        self.model = model
        self.register_buffer("order", torch.tensor(order), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).index_select(1, self.order)


def open_images(config: CfgNode, content: Any, labels: Labels, device: torch.device, logger: logging.Logger,
                classes: Sequence[str] | None = None) -> tuple[Any, LabelSet]:
    """(loaders of the validation images, what counts on them) for a file of weights; targets count ``classes``, else the file's own."""
    with listing(functools.partial(periodic, logger)):
        loaders = build_loaders(config, distributed.rank(), distributed.world_size(), splits=("val",),
                                classes=classes or _classes_of(content, labels), device=device, published=not checkpoint.is_own(content))
    loaders.tell(teller(logger))
    label_set = labels.on(loaders.val.dataset.folder, loaders.classes)
    for line in (*loaders.notices, *label_set.notices):
        logger.info(line)
    return loaders, label_set


def _classes_of(content: Any, labels: Labels) -> Any:
    """What ``build_loaders`` takes for the classes of a file of weights."""
    if checkpoint.is_own(content):
        return labels.naming(content["classes"], thousand=False)
    state = unwrap_state_dict(content, "weights")
    return labels.naming(None, thousand=any(t.ndim == 2 and t.shape[0] == 1000 for t in state.values()))


def judged_models(config: CfgNode, path: str, content: Any, classes: Sequence[str], device: torch.device) -> list[nn.Module]:
    """The models of a file, in evaluation order: where a run kept an average, it is what counts and comes last.

    Their outputs stand in the order of ``classes``; with TEST.FLIP they look at mirror images too.

    Raises:
        CheckpointError: the weights do not fit, or are not finite.
    """
    own = checkpoint.is_own(content)
    model = build_model(config, len(classes))
    check_input_size(model, config)
    states = [s for s in (content["model"], content["ema"]) if s] if own else [unwrap_state_dict(content, path)]
    models = [model, *(copy.deepcopy(model) for _ in states[1:])]
    for judged, state in zip(models, states, strict=True):
        check_finite(state, path)
        load_state(judged, state, config, path)
    names = content["classes"] if own else _published_names(classes)
    if names != list(classes):
        number = {name: i for i, name in enumerate(names)}
        models = [Reordered(judged, [number[name] for name in classes]) for judged in models]
    if config.TEST.FLIP != "none":
        models = [Flipped(judged, config.TEST.FLIP) for judged in models]
    for judged in models:
        compile_model(judged.to(device), config.COMPILE)
    return models


def _published_names(classes: Sequence[str]) -> list[str]:
    """The classes of a published classifier in its order: ImageNet's where ``classes`` are these, in whatever order."""
    imagenet = imagenet_classes()
    return imagenet if set(classes) == set(imagenet) else list(classes)


def evaluate_run(config: CfgNode, content: Any, device: torch.device, logger: logging.Logger) -> None:
    """Judge a checkpoint, or published weights, on the validation images; the training images are not touched."""
    labels = Labels(config)
    for key, path in (("TEST.PER_CLASS", config.TEST.PER_CLASS), ("TEST.PREDICTIONS", config.TEST.PREDICTIONS)):
        if path:
            require_place(os.path.expanduser(path), f"{key} is ")
    path, content = weights_to_judge(config, content, "--eval")
    precision, own = prepare(config, device, logger), checkpoint.is_own(content)
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
    for line in (*lines, *written, *(f"{whose} {other.line()}" for other in raw), last):
        logger.info(line)
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


def prepare(config: CfgNode, device: torch.device, logger: logging.Logger) -> Precision:
    """Precision and determinism of an evaluation."""
    precision = choose_precision(config, device)
    if precision.notice:
        logger.info(precision.notice)
    make_deterministic(device)
    require_compiler(device, config.COMPILE)
    return precision
