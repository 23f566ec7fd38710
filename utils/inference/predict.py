"""Predictions of images, batch by batch, with what could not be read."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from config import DENSE_TASKS, ConfigError
from data.layouts.input_paths import InputImages
from data.loading.loader import ImageLoader
from utils.inference.outputs import Prediction, PredictionFormat
from utils.runtime.precision import Precision

if TYPE_CHECKING:
    from utils.tasks.base import Task


@torch.inference_mode()
def predictions_of(task: Task, model: nn.Module, form: PredictionFormat, loader: ImageLoader, device: torch.device, precision: Precision,
                   with_features: bool = False) -> Iterator[tuple[list[Prediction], Tensor | None]]:
    """The predictions of each batch in the order given; with the features (images that were read, C) if asked for.

    Args:
        loader: the task's, of ``InputImages``.
    """
    given, done = loader.dataset.source, 0
    faults = _Faults(loader, given)
    model.eval()
    for batch in loader:
        batch = task.to_device(batch, device)
        numbers = task.numbers(batch)
        with precision.autocast():
            inner = model.forward_features(task.images(batch)) if with_features else None
            outputs = model.forward_head(inner) if with_features else task.forward(model, batch)
            vectors = model.forward_head(inner, pre_logits=True) if with_features else None
        read, told = numbers >= 0, form.tell(outputs)
        # What fills the last batch up stands at its end.
        places = range(done, min(done + len(numbers), len(given)))
        done += len(numbers)
        predictions = [Prediction(index, given.path(index), **(fields if readable else dict(fault=faults.of(index))))
                       for index, readable, fields in zip(places, read.tolist(), told, strict=False)]
        yield predictions, vectors.float().cpu()[read] if with_features else None


class _Faults:
    """Why images could not be read, by their numbers."""

    def __init__(self, loader: ImageLoader, given: InputImages):
        self.loader, self.given, self.known, self.looked_at = loader, given, {}, 0

    def of(self, index: int) -> str:
        if index in self.given.errors:
            return self.given.errors[index]
        for failure in self.loader.failures[self.looked_at:]:
            self.known[failure.index] = failure.reason
        self.looked_at = len(self.loader.failures)
        return f"not a readable image ({self.known[index]})"


def require_features(model: nn.Module, config: CfgNode) -> None:
    if config.TASK in DENSE_TASKS:
        raise ConfigError(f"--features: a model of TASK {config.TASK} has maps of an image, and no vector of it; leave --features out")
    head = getattr(model, "forward_head", None)
    if head is None or not hasattr(model, "forward_features") or "pre_logits" not in inspect.signature(head).parameters:
        raise ConfigError(f"--features: {config.MODEL.NAME} does not give its features before the classifier; leave --features out")
