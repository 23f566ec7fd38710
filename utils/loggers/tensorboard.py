"""Curves elsewhere than in the run's folder's own files: TensorBoard, and the trackers trackio and wandb. A comfort, never a need."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from config import KEYS, lookup, of_the_command
from data.messages import NOTICE

_GRID_IMAGES, _GRID_SIDE = 16, 128  # images of the grid, and its images' longer side in pixels at most


def first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:100] if text else type(error).__name__


class TensorBoard:
    """A writer for TensorBoard, or nothing at all where it is not installed or cannot write.

    A resumed run's curves go on where the checkpoint stands: what had been drawn beyond it is hidden.
    """

    def __init__(self, folder: str, step: int, logger: logging.Logger):
        self.writer, self.logger = None, logger
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(os.path.join(folder, "tensorboard"), purge_step=step + 1 if step else None)
        except Exception as error:  # not installed, or its dependencies are broken
            self.logger.log(NOTICE, f"no TensorBoard curves ({type(error).__name__}: {first_line(error)})")

    @contextlib.contextmanager
    def _writing(self) -> Any:
        """Its writing thread passes on whatever befell it, whenever it is used next."""
        try:
            yield
        except Exception as error:
            self.writer = None
            self.logger.warning(f"TensorBoard curves end here ({first_line(error)}); metrics.jsonl goes on")

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Add what is a number, by its name such as ``val/top1``."""
        with self._writing():
            for name, value in values.items():
                if self.writer is not None and value is not None:
                    self.writer.add_scalar(name, value, step)

    def images(self, step: int, images: Tensor, mean: Tensor, std: Tensor) -> None:
        """A grid of the first of ``images`` (B, C, H, W), normalised, as the model is given them: three channels, or one."""
        with self._writing():
            if self.writer is not None:
                from torchvision.utils import make_grid
                channels = 3 if images.shape[1] >= 3 else 1
                shown = images[:_GRID_IMAGES, :channels].detach().float().cpu()
                shown = shown * std[:channels].view(-1, 1, 1) + mean[:channels].view(-1, 1, 1)
                scale = _GRID_SIDE / max(shown.shape[-2:])
                if scale < 1:
                    shown = torch.nn.functional.interpolate(shown, scale_factor=scale, mode="bilinear", antialias=True)
                self.writer.add_image("train/first_batch", make_grid(shown.clamp(0, 1), nrow=8), step)

    def histograms(self, step: int, model: nn.Module) -> None:
        """The distribution of every parameter."""
        with self._writing():
            if self.writer is not None:
                for name, parameter in model.named_parameters():
                    self.writer.add_histogram(f"weights/{name}", parameter.detach().float().cpu(), step)

    def result(self, step: int, config: CfgNode, values: Mapping[str, float]) -> None:
        """The run's settings with what came of them, for TensorBoard's table of runs."""
        with self._writing():
            if self.writer is not None:
                self.writer.add_hparams(settings(config), {f"result/{name}": value for name, value in values.items()}, run_name=".",
                                        global_step=step)

    def close(self) -> None:
        with self._writing():
            if self.writer is not None:
                self.writer.close()


def settings(config: CfgNode) -> dict[str, Any]:
    """The config flat: numbers, truths and texts by key; without what is not set and what one command alone asked for."""
    pairs = ((key, lookup(config, key)) for key, *_ in KEYS if key != "BASE" and not of_the_command(key))
    return {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in pairs if value not in (None, "")}
