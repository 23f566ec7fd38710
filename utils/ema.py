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
        # Gathered once: walking the modules takes longer than averaging them. Tensors change in place only.
        self._ours, self._theirs = _tensors(self.module), _tensors(model)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the model's weights after update number ``step`` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        (ours, counts), (theirs, their_counts) = self._ours, self._theirs
        torch._foreach_lerp_(ours, theirs, 1 - decay)
        if counts:
            torch._foreach_copy_(counts, their_counts)


def _tensors(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and buffers, each once: those that are averaged, and integers."""
    tensors = [*(p.data for p in model.parameters()), *model.buffers()]
    return [t for t in tensors if t.is_floating_point()], [t for t in tensors if not t.is_floating_point()]
