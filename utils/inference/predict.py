"""Predictions of images, batch by batch, with what could not be read."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from config import ConfigError
from data.layouts.input_paths import GivenImages
from data.loading.loader import ImageLoader
from utils.inference.outputs import Prediction
from utils.runtime.precision import Precision


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
