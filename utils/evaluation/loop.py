"""Exact evaluation: each image once, on any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from utils.evaluation.metrics import Evaluation
from utils.runtime import distributed
from utils.runtime.precision import Precision

if TYPE_CHECKING:
    from utils.tasks.base import Task


@torch.inference_mode()
def evaluate(task: Task, models: Sequence[nn.Module], loader: Collection[Any], device: torch.device, precision: Precision,
             poll: Callable[[], None] | None = None, record: Callable[[Any, Any], None] | None = None) -> list[Evaluation]:
    """Evaluate each of ``models`` in one pass over the images (raw and averaged weights share the decoding).

    Every image counts once, on any number of ranks; the result is the same on each of them.

    Args:
        poll: called after each batch, equally often on every rank.
        record: called with ``(outputs, batch)`` of each batch and the last of ``models``, on the device, the rows that only fill the
            batch included; it must not wait for the device.
    """
    evaluators = [task.evaluator(device) for _ in models]
    for model in models:
        model.eval()
    distributed.begin_phase("evaluating")
    # A rank with fewer batches takes part in the others' exchanges all the same.
    polls = 0 if poll is None else max(distributed.gather_objects(len(loader)))
    for number, batch in enumerate(loader):
        distributed.begin_phase(f"evaluating, batch {number}")
        batch = task.to_device(batch, device)
        for model, evaluator in zip(models, evaluators, strict=True):
            with precision.autocast():
                outputs = task.forward(model, batch)
            evaluator.update(outputs, task.targets(batch))
        if record is not None:
            record(outputs, batch)
        if poll is not None:
            poll()
    for _ in range(polls - len(loader)):
        distributed.begin_phase("evaluating, done with its own images")
        poll()
    return [evaluator.result() for evaluator in evaluators]
