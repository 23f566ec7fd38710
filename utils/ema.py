"""A running average of the weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average of a model's parameters and buffers, as a model of its own (``module``).

    timm's ModelEmaV3 walks the state dict, where a tensor that modules share stands under several names (MPViT's position
    encodings) and is then averaged once a name; here each tensor is averaged once.

    Args:
        decay: share of the old average that a step keeps.
        warmup: let the decay grow as (1 + step) / (10 + step), so that a short run forgets its beginning.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = False):
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.warmup = decay, warmup

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after update number ``step`` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        averaged = [(ours, theirs) for ours, theirs in pairs if ours.is_floating_point()]
        torch._foreach_lerp_([ours for ours, _ in averaged], [theirs for _, theirs in averaged], 1 - decay)
        for ours, theirs in pairs:
            if not ours.is_floating_point():
                ours.copy_(theirs)


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters, then buffers, each once."""
    return [*(p.data for p in model.parameters()), *model.buffers()]
