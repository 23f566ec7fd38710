"""Steps whose loss or gradients are not finite: evidence, budget and rollback."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FORGIVEN_AFTER = 100  # steps after which one that was skipped no longer counts


def _stacked(scalars: list[Tensor]) -> Tensor:
    """Scalars of a device as one tensor on the CPU, read in one go."""
    return torch.stack([scalar.float() for scalar in scalars]).cpu()


def _shown(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
