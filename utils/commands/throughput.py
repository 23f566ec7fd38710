"""--throughput: speed and memory of a model on synthetic images."""

from __future__ import annotations

import logging
from typing import Any

import torch
from yacs.config import CfgNode

from utils.loggers.console import tell
from utils.optim import optimizer as optim
from utils.profiling.step_speed import measure
from utils.runtime.compile import require_compiler
from utils.runtime.precision import choose_precision
from utils.tasks.build import build_task


def measure_throughput(config: CfgNode, content: Any, device: torch.device, logger: logging.Logger) -> None:
    """Images per second of the forward pass and of a training step, on synthetic images."""
    precision = choose_precision(config, device)
    tell(logger, (precision.notice, *optim.apex_notices(config)))
    require_compiler(device, config.COMPILE)
    for line in measure(build_task(config), config, device, precision):
        tell(logger, [line])
