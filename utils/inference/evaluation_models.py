"""Models as they are evaluated: mirrored, reordered to a label set, of published files."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from data.sources.classes import imagenet_classes
from models import load_state
from models.weights import check_finite, unwrap_state_dict
from utils.checkpoints.file_format import is_own, task_state
from utils.inference.trained_model import chosen_state
from utils.runtime.compile import compile_model

if TYPE_CHECKING:
    from utils.tasks.base import Task


class Flipped(nn.Module):
    """Test-time flip: one prediction from an image and its mirror image. (B, 3, H, W) -> logits (B, C).

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


def arranged(model: nn.Module, names: Sequence[str], classes: Sequence[str], flip: str) -> nn.Module:
    """``model``, whose outputs are ``names``, with outputs in the order of ``classes``, flipped as TEST.FLIP says."""
    if list(names) != list(classes):
        number = {name: i for i, name in enumerate(names)}
        model = Reordered(model, [number[name] for name in classes])
    return model if flip == "none" else Flipped(model, flip)


def evaluation_models(task: Task, config: CfgNode, path: str, content: Any, classes: Sequence[str],
                      device: torch.device) -> list[nn.Module]:
    """The models of a file, in evaluation order: where a run kept an average, it is what counts and comes last.

    Args:
        classes: of the data, in the order that its targets count.

    Raises:
        CheckpointError: the weights do not fit, or are not finite.
    """
    own = is_own(content)
    task.load_state_dict(task_state(content) if own else {})
    model = task.build_model(config, len(classes))
    task.check_input_size(model, config)
    states = [chosen_state(config, content, path)[0]] if own else [unwrap_state_dict(content, path)]
    if own and config.TEST.WEIGHTS == "auto" and content["ema"]:
        states.insert(0, content["model"])
    models = [model, *(copy.deepcopy(model) for _ in states[1:])]
    for evaluated, state in zip(models, states, strict=True):
        check_finite(state, path)
        load_state(evaluated, state, config, path)
    names = content["classes"] if own else _published_names(classes)
    models = [task.evaluated_model(config, evaluated, names, classes) for evaluated in models]
    for evaluated in models:
        compile_model(evaluated.to(device), config.COMPILE)
    return models


def _published_names(classes: Sequence[str]) -> list[str]:
    """The classes of a published classifier in its order: ImageNet's where ``classes`` are these, in whatever order."""
    imagenet = imagenet_classes()
    return imagenet if set(classes) == set(imagenet) else list(classes)
