"""What an evaluation begins with: loaders, model and label set."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from yacs.config import CfgNode

from data import build_loaders
from models.weights import unwrap_state_dict
from utils.checkpoints.file_format import is_own
from utils.evaluation.data_messages import teller
from utils.evaluation.label_sets import Labels, LabelSet
from utils.loggers.console import tell
from utils.loggers.progress import listing, periodic
from utils.runtime import distributed
from utils.runtime.compile import require_compiler
from utils.runtime.precision import Precision, choose_precision
from utils.runtime.seed import make_deterministic


def open_images(config: CfgNode, content: Any, labels: Labels, device: torch.device, logger: logging.Logger,
                classes: Sequence[str] | None = None) -> tuple[Any, LabelSet]:
    """(loaders of the validation images, what counts on them) for a file of weights; targets count ``classes``, else the file's own."""
    with listing(functools.partial(periodic, logger)):
        loaders = build_loaders(config, distributed.rank(), distributed.world_size(), splits=("val",),
                                classes=classes or _classes_of(content, labels), device=device, published=not is_own(content))
    loaders.tell(teller(logger))
    label_set = labels.on(loaders.val.dataset.folder, loaders.classes)
    tell(logger, (*loaders.notices, *label_set.notices))
    return loaders, label_set


def _classes_of(content: Any, labels: Labels) -> Any:
    """What ``build_loaders`` takes for the classes of a file of weights."""
    if is_own(content):
        return labels.naming(content["classes"], thousand=False)
    state = unwrap_state_dict(content, "weights")
    return labels.naming(None, thousand=any(t.ndim == 2 and t.shape[0] == 1000 for t in state.values()))


def prepare(config: CfgNode, device: torch.device, logger: logging.Logger) -> Precision:
    """Precision and determinism of an evaluation."""
    precision = choose_precision(config, device)
    tell(logger, [precision.notice])
    make_deterministic(device)
    require_compiler(device, config.COMPILE)
    return precision
