"""``build_task``: the task that a config asks for."""

from __future__ import annotations

import difflib
import importlib

from yacs.config import CfgNode

from config import ConfigError
from utils.tasks.base import Task

# A row a task: its name as TASK has it, and where its class lies.
TASKS = {
    "classification": ("utils.tasks.classification", "Classification"),
    "multilabel": ("utils.tasks.multilabel", "Multilabel"),
    "simmim": ("utils.tasks.simmim", "MaskedImages"),
    "detection": ("utils.tasks.detection", "Detection"),
    "instance": ("utils.tasks.detection", "Instance"),
    "semantic": ("utils.tasks.semantic", "Semantic"),
    "mask": ("utils.tasks.mask", "Mask"),
}


def build_task(config: CfgNode) -> Task:
    """The task of the key TASK.

    Raises:
        ConfigError: no such task, or a key that does not go with it.
    """
    task = "classification" if config.TASK == "auto" else config.TASK  # auto: no data have said otherwise
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=1)
        raise ConfigError(f"TASK is {task!r}; choose from {', '.join(TASKS)}" + (f" (did you mean {near[0]}?)" if near else ""))
    module, name = TASKS[task]
    return getattr(importlib.import_module(module), name)(config)
