"""Curves elsewhere than in the run's folder's own files: TensorBoard, and the trackers trackio and wandb. A comfort, never a need."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from config import KEYS, lookup, of_the_command
from data.messages import NOTICE
from utils.loggers.console import plain
from utils.runtime.files import Appended

_GRID_IMAGES, _GRID_SIDE = 16, 128  # images of the grid, and its images' longer side in pixels at most
_POSITIVE = np.geomspace(1e-12, 1e20, 770).tolist()  # a tenth apart, as TensorBoard's own histograms have them
_EDGES = [*(-edge for edge in reversed(_POSITIVE)), 0.0, *_POSITIVE]


def first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:100] if text else type(error).__name__


class TensorBoard:
    """Event files for TensorBoard, or nothing at all where it is not installed.

    A resumed run's curves go on where the checkpoint stands: what had been drawn beyond it is hidden. The records are written here and
    now, and not by the thread of tensorboard's own writer: what finds the disk full follows once there is room.
    """

    def __init__(self, folder: str, step: int, logger: logging.Logger):
        self.file, self.logger = None, logger
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from torch.utils.tensorboard import summary
            self._event, self._summary = Event, summary
            folder = os.path.join(folder, "tensorboard")
            os.makedirs(folder, exist_ok=True)
            name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
            self.file = Appended(os.path.join(folder, name), logger.warning)
            self._add(Event(file_version="brain.Event:2"))
            if step:
                self._add(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
        except Exception as error:  # not installed, or its dependencies are broken
            self.file = None
            self.logger.log(NOTICE, f"no TensorBoard curves ({type(error).__name__}: {first_line(error)})")

    def _add(self, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter
        event.wall_time, record = time.time(), io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self.file.write(record.getvalue())

    @contextlib.contextmanager
    def _writing(self) -> Any:
        try:
            yield
        except Exception as error:
            self.file = None
            self.logger.warning(f"TensorBoard curves end here ({first_line(error)}); metrics.jsonl goes on")

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Add what is a number, by its name such as ``val/top1``."""
        with self._writing():
            for name, value in values.items():
                if self.file is not None and value is not None:
                    self._add(self._event(step=step, summary=self._summary.scalar(name, value)))

    def images(self, step: int, images: Tensor, mean: Tensor, std: Tensor) -> None:
        """A grid of the first of ``images`` (B, C, H, W), normalised, as the model is given them: three channels, or one."""
        with self._writing():
            if self.file is not None:
                from torchvision.utils import make_grid
                channels = 3 if images.shape[1] >= 3 else 1
                shown = images[:_GRID_IMAGES, :channels].detach().float().cpu()
                shown = shown * std[:channels].view(-1, 1, 1) + mean[:channels].view(-1, 1, 1)
                scale = _GRID_SIDE / max(shown.shape[-2:])
                if scale < 1:
                    shown = torch.nn.functional.interpolate(shown, scale_factor=scale, mode="bilinear", antialias=True)
                grid = make_grid(shown.clamp(0, 1), nrow=8)
                self._add(self._event(step=step, summary=self._summary.image("train/first_batch", grid, dataformats="CHW")))

    def histograms(self, step: int, model: nn.Module) -> None:
        """The distribution of every parameter."""
        with self._writing():
            if self.file is not None:
                for name, parameter in model.named_parameters():
                    values = parameter.detach().float().cpu()
                    self._add(self._event(step=step, summary=self._summary.histogram(f"weights/{name}", values, _EDGES)))

    def result(self, step: int, config: CfgNode, values: Mapping[str, float]) -> None:
        """The run's settings with what came of them, for TensorBoard's table of runs."""
        with self._writing():
            if self.file is not None:
                results = {f"result/{name}": value for name, value in values.items()}
                scalars = (self._summary.scalar(name, value) for name, value in results.items())
                for part in (*self._summary.hparams(settings(config), results), *scalars):
                    self._add(self._event(step=step, summary=part))

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def settings(config: CfgNode) -> dict[str, Any]:
    """The config flat: numbers, truths and texts by key; without what is not set and what one command alone asked for."""
    pairs = ((key, lookup(config, key)) for key, *_ in KEYS if key != "BASE" and not of_the_command(key))
    return {key: value if isinstance(value, (bool, int, float)) else plain(value) for key, value in pairs if value not in (None, "")}
