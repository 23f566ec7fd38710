"""What a run records of itself beside log and checkpoints: figures, events, sources of its config, curves, the report at its end."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from config import history, of_the_run
from utils.loggers.metrics_files import CONFIG, EVENTS, SOURCES, STEPS, JsonLines, MetricsLog
from utils.loggers.tensorboard import TensorBoard
from utils.loggers.trackers import Tracker
from utils.runtime.files import replace_file


class Records:
    """The records of a run in ``folder``, kept by rank 0 alone; none of them stops a run that is under way.

    On resume, figures beyond the checkpoint's step are cut off, so that every step has one; events are all kept.
    """

    def __init__(self, config: CfgNode, folder: str, step: int, evaluated: int, metrics: Sequence[str], facts: dict[str, Any],
                 logger: logging.Logger):
        """
        Args:
            step: where training stands.
            evaluated: the step after which an epoch was last brought to its end.
            metrics: names of what an evaluation gives.
            facts: of this start, as plain data: versions, device, data.
        """
        self.config, self.folder, self.metric_names, self.logger = config, folder, metrics, logger
        replace_file(os.path.join(folder, CONFIG), of_the_run(config).dump().encode())
        self._guarded(lambda: replace_file(os.path.join(folder, SOURCES), (json.dumps(history(config)) + "\n").encode()))
        self.metrics = MetricsLog(folder, evaluated, logger)
        self.steps = JsonLines(os.path.join(folder, STEPS), step, logger, sync=False)
        self.events = JsonLines(os.path.join(folder, EVENTS), float("inf"), logger)
        self._sent = [log.last["step"] if log.last is not None else -1 for log in (self.steps, self.metrics.lines)]
        before = self.steps.last or {}
        self.event("start", step, **facts, again=max(0, before.get("step", 0) - step) if step else 0, before=before.get("time"))
        self.board = TensorBoard(folder, step, logger)
        self.tracker = Tracker(config, folder, logger)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            self.logger.warning(f"{error.filename or self.folder}: cannot be written ({error.strerror})")

    def event(self, what: str, step: int, **facts: Any) -> None:
        """Note what happened to the run: start, rollback, finished, stopped, failed."""
        self.events.write(dict(event=what, step=step, time=round(time.time(), 3), **facts))

    def step(self, step: int, loss: float | None, grad_norm: float | None, lr: float, images_per_s: float, data_share: float) -> None:
        """The figures of a line of the log: means since the line before."""
        self.steps.write(dict(step=step, loss=loss, grad_norm=grad_norm, lr=lr, images_per_s=round(images_per_s, 2),
                              data_share=round(data_share, 4), time=round(time.time(), 3)))
        values = {"step/loss": loss, "step/grad_norm": grad_norm, "step/lr": lr, "step/images_per_s": images_per_s,
                  "step/data_share": data_share}
        self._draw(step, values, self._sent[0])

    def epoch(self, row: dict[str, Any]) -> None:
        """The figures of an epoch."""
        self.metrics.write(row)
        train, val = ("train_loss", "lr", "images_per_s"), (*self.metric_names, *(f"raw_{name}" for name in self.metric_names))
        values = {f"train/{key}": row[key] for key in train} | {f"val/{key}": row[key] for key in val if key in row}
        self._draw(row["step"], values, self._sent[1])

    def _draw(self, step: int, values: dict[str, float | None], sent: int) -> None:
        self.board.scalars(step, values)
        if step > sent:  # a tracker cannot take back what a run does again after a kill
            self.tracker.scalars(step, values)

    def first_batch(self, images: Tensor, preprocessing: dict[str, Any]) -> None:
        self.board.images(0, images, *(torch.tensor(preprocessing[key]) for key in ("mean", "std")))

    def weights(self, epoch: int, step: int, model: nn.Module) -> None:
        """Histograms of the weights, when they are due."""
        every = self.config.TRAIN.TENSORBOARD_HISTOGRAMS
        if every and epoch % every == 0:
            self.board.histograms(step, model)

    def finish(self, step: int, best: dict[str, float]) -> None:
        """The run has trained to its end."""
        self.event("finished", step)
        if best:
            self.board.result(step, self.config, {name: value for name, value in best.items() if name != "step"})

    def close(self) -> None:
        for file in (self.metrics, self.steps, self.events):
            file.close()
        self.board.close()
        self.tracker.close()
