"""Classification: its loss."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def build_loss(smoothing: float) -> Callable[[Tensor, Tensor], Tensor]:
    """``(logits (B, K), targets) -> sum over the samples``; mixed targets (B, K) come smoothed already."""
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        soft = targets.is_floating_point()
        return F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=0.0 if soft else smoothing)
    return loss
