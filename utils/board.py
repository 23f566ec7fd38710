"""Curves elsewhere than in the run's folder's own files: TensorBoard, and the trackers trackio and wandb. A comfort, never a need."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from config import KEYS, ConfigError, lookup, of_the_command
from utils.files import replace_file

Warn = Callable[[str], None]
IDENTITY = "tracker.json"
_GRID_IMAGES, _GRID_SIDE = 16, 128  # images of the grid, and its images' longer side in pixels at most


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:100] if text else type(error).__name__


class TensorBoard:
    """A writer for TensorBoard, or nothing at all where it is not installed or cannot write.

    A resumed run's curves go on where the checkpoint stands: what had been drawn beyond it is hidden.
    """

    def __init__(self, folder: str, step: int, warn: Warn = print):
        self.writer, self.warn = None, warn
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(os.path.join(folder, "tensorboard"), purge_step=step + 1 if step else None)
        except Exception as error:  # not installed, or its dependencies are broken
            self.warn(f"notice: no TensorBoard curves ({type(error).__name__}: {_first_line(error)})")

    @contextlib.contextmanager
    def _writing(self) -> Any:
        """Its writing thread passes on whatever befell it, whenever it is used next."""
        try:
            yield
        except Exception as error:
            self.writer = None
            self.warn(f"warning: TensorBoard curves end here ({_first_line(error)}); metrics.jsonl goes on")

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Add what is a number, by its name such as ``val/top1``."""
        with self._writing():
            for name, value in values.items():
                if self.writer is not None and value is not None:
                    self.writer.add_scalar(name, value, step)

    def images(self, step: int, images: Tensor, mean: Tensor, std: Tensor) -> None:
        """A grid of the first of ``images`` (B, 3, H, W), normalised, as the model is given them."""
        with self._writing():
            if self.writer is not None:
                from torchvision.utils import make_grid
                shown = images[:_GRID_IMAGES].detach().float().cpu() * std.view(3, 1, 1) + mean.view(3, 1, 1)
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


def require_tracker(name: str) -> None:
    """Make sure, before a run, that the package of the tracker ``name`` is there.

    Raises:
        ConfigError: it cannot be imported.
    """
    if name == "none":
        return
    try:
        importlib.import_module(name)
    except Exception as error:
        raise ConfigError(f"TRACKER is {name}, which cannot be imported ({_first_line(error)}); install it with pip install {name}, or "
                          "leave TRACKER none") from None


class Tracker:
    """A run in trackio or wandb, which are called alike; a run that is resumed goes on under the same identity.

    Whatever fails in it is told once and never stops the run.
    """

    def __init__(self, config: CfgNode, folder: str, warn: Warn = print):
        self.module, self.warn = None, warn  # the package, while a run is open there
        if config.TRACKER == "none":
            return
        self.name = config.TRACKER
        with self._sending():
            module, path = importlib.import_module(self.name), os.path.join(folder, IDENTITY)
            identity, known = _identity(config, path)
            options = dict(project=identity["project"], name=identity["name"], config=settings(config),
                           resume="allow" if known else "never")
            if self.name == "wandb":  # trackio knows a run by its name, and has a folder of its own
                options |= dict(id=identity["id"], dir=folder, resume="allow")
            module.init(**options)
            self.module = module
            if not known:
                replace_file(path, (json.dumps(identity) + "\n").encode())

    @contextlib.contextmanager
    def _sending(self) -> Any:
        try:
            yield
        except Exception as error:
            self.module = None
            self.warn(f"warning: {self.name} gets no more figures of this run ({_first_line(error)}); metrics.jsonl goes on")

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Send what is a number."""
        if self.module is not None:
            with self._sending():
                self.module.log({name: value for name, value in values.items() if value is not None}, step=step)

    def close(self) -> None:
        if self.module is not None:
            with self._sending():
                self.module.finish()
            self.module = None


def _identity(config: CfgNode, path: str) -> tuple[dict[str, str], bool]:
    """(tracker, project, name and id of this run, whether it is known there already)."""
    try:
        with open(path, encoding="utf-8") as file:
            identity = json.load(file)
        if identity["tracker"] == config.TRACKER and all(isinstance(identity[key], str) for key in ("project", "name", "id")):
            return identity, True
    except (OSError, ValueError, KeyError, TypeError):
        pass
    key = secrets.token_hex(4)
    project = config.TRACKER_PROJECT or config.MODEL.NAME.replace("/", "_").replace(":", "_")
    return dict(tracker=config.TRACKER, project=project, name=f"{config.TAG}-{key}", id=key), False
