"""The metrics of classification: a function or two and a row each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.evaluation.metrics import SumMetric


def counted(targets: Tensor) -> Tensor:
    """How many of a batch's targets (B,) count; -1 does not."""
    return (targets >= 0).sum()


def _hits(k: int) -> Callable[[Tensor, Tensor], Tensor]:
    """(images whose class is among the ``k`` largest logits, images counted), for ``k`` up to 5; with fewer classes all are right."""
    def sums(logits: Tensor, targets: Tensor) -> Tensor:
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # of five for every k: among equals the order must be the same
        return torch.stack([(best[:, :k] == targets[:, None]).sum(), counted(targets)])
    return sums


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    loss = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    return torch.stack([loss, counted(targets).to(loss.dtype)])


def _ratio(scale: float) -> Callable[[Tensor], float]:
    def value(sums: Tensor) -> float:
        part, whole = sums.tolist()
        return scale * part / max(1, whole)
    return value


METRICS = (
    SumMetric("top1", "top1", sums=_hits(1), value=_ratio(100)),
    SumMetric("top5", "top5", sums=_hits(5), value=_ratio(100)),
    SumMetric("val_loss", "loss", higher_is_better=False, digits=4, sums=_loss, value=_ratio(1)),
)


def detail(values: Mapping[str, float], samples: int) -> str:
    """``(313 of 360)``: images answered rightly, of all."""
    return f"({round(values['top1'] * samples / 100)} of {samples})"
