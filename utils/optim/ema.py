"""A running average of the weights."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from yacs.config import CfgNode


class WeightAverage:
    """Exponential moving average of a model's parameters and buffers, as a model of its own (``module``).

    timm's ModelEmaV3 walks the state dict, where a tensor that modules share stands under several names (MPViT's position
    encodings) and is then averaged once a name; here each tensor is averaged once.

    Args:
        decay: share of the old average that a step keeps.
        warmup: let the decay grow as (1 + step) / (10 + step), so that a short run forgets its beginning.
        device: where the average lies; None is the model's.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = False, device: torch.device | str | None = None):
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        if device is not None:
            self.module.to(device)
        self.decay, self.warmup = decay, warmup
        # Gathered once: walking the modules takes longer than averaging them. Tensors change in place only.
        self._ours, self._theirs = _tensors(self.module), _tensors(model)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the model's weights after update number ``step`` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        (ours, counts), (theirs, their_counts) = self._ours, self._theirs
        if ours and ours[0].device != theirs[0].device:
            theirs = [tensor.to(ours[0].device) for tensor in theirs]  # waits for the device
        torch._foreach_lerp_(ours, theirs, 1 - decay)
        if counts:
            torch._foreach_copy_(counts, their_counts)

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[nn.Module]:
        """The average on ``device`` for a while, to be evaluated there."""
        home = next(self.module.parameters()).device
        if home == device:
            yield self.module
            return
        try:
            yield self.module.to(device)
        finally:
            self.module.to(home)
            self._ours = _tensors(self.module)


def build_average(config: CfgNode, model: nn.Module) -> WeightAverage | None:
    """The average of ``model``'s weights that the config asks for, if it does."""
    train = config.TRAIN
    if not train.EMA_DECAY:
        return None
    return WeightAverage(model, train.EMA_DECAY, train.EMA_WARMUP, "cpu" if train.EMA_DEVICE == "cpu" else None)


def _tensors(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and buffers, each once: those that are averaged, and integers."""
    tensors = [*(p.data for p in model.parameters()), *model.buffers()]
    return [t for t in tensors if t.is_floating_point()], [t for t in tensors if not t.is_floating_point()]
