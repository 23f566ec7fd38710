"""Exact evaluation: each image once, on any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.runtime import distributed
from utils.runtime.precision import Precision


@dataclass(frozen=True)
class Evaluation:
    """Counts over the whole evaluation set."""

    correct: int
    correct5: int
    total: int
    loss_sum: float

    @property
    def top1(self) -> float:
        return 100 * self.correct / max(1, self.total)

    @property
    def top5(self) -> float:
        return 100 * self.correct5 / max(1, self.total)

    @property
    def loss(self) -> float:
        return self.loss_sum / max(1, self.total)

    def line(self) -> str:
        return f"top1 {self.top1:.2f} top5 {self.top5:.2f} loss {self.loss:.4f} ({self.correct} of {self.total})"


@torch.inference_mode()
def evaluate(models: Sequence[nn.Module], loader: Collection[tuple[Tensor, Tensor]], device: torch.device,
             precision: Precision, poll: Callable[[], None] | None = None,
             record: Callable[[Tensor, Tensor], None] | None = None) -> list[Evaluation]:
    """Judge each of ``models`` in one pass over the images (raw and averaged weights share the decoding).

    Counts integers over every image once, on any number of ranks; rows with target -1 fill a batch and do not count. With
    fewer than five classes every image counts as right among the top five.

    Args:
        poll: called after each batch, equally often on every rank.
        record: called with each batch's ``(logits (B, C) float, targets (B,))`` of the last of ``models``, on the device, the rows
            that do not count (target -1) included; it must not wait for the device.
    """
    counts = torch.zeros(len(models), 3, dtype=torch.int64, device=device)
    loss_sums = torch.zeros(len(models), device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
    for model in models:
        model.eval()
    distributed.mark("evaluating")
    # A rank with fewer batches takes part in the others' exchanges all the same.
    polls = 0 if poll is None else max(distributed.gather_objects(len(loader)))
    for number, (images, targets) in enumerate(loader):
        distributed.mark(f"evaluating, batch {number}")
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        for which, model in enumerate(models):
            with precision.autocast():
                logits = model(images)
            logits = logits.float()
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
            counts[which] += torch.stack([hits[:, 0].sum(), hits.sum(), (targets >= 0).sum()])
            loss_sums[which] += F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
        if record is not None:
            record(logits, targets)
        if poll is not None:
            poll()
    for _ in range(polls - len(loader)):
        distributed.mark("evaluating, done with its own images")
        poll()
    distributed.all_reduce_sum(counts)
    distributed.all_reduce_sum(loss_sums)
    return [Evaluation(*row, loss_sum) for row, loss_sum in zip(counts.tolist(), loss_sums.tolist(), strict=True)]
