"""Experiment trackers: trackio and wandb, which are called alike."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import secrets
from collections.abc import Mapping
from typing import Any

from yacs.config import CfgNode

from config import ConfigError
from utils.loggers.tensorboard import first_line, settings
from utils.runtime.files import replace_file

IDENTITY = "tracker.json"


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
        raise ConfigError(f"TRACKER is {name}, which cannot be imported ({first_line(error)}); install it with pip install {name}, or "
                          "leave TRACKER none") from None


class Tracker:
    """A run in trackio or wandb, which are called alike; a run that is resumed goes on under the same identity.

    Whatever fails in it is told once and never stops the run.
    """

    def __init__(self, config: CfgNode, folder: str, logger: logging.Logger):
        self.module, self.logger = None, logger  # the package, while a run is open there
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
            self.logger.warning(f"{self.name} gets no more figures of this run ({first_line(error)}); metrics.jsonl goes on")

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
