"""--throughput: speed and memory of a model on synthetic images."""

from __future__ import annotations

import logging
from typing import Any

import torch
from yacs.config import CfgNode

from models import build_model, check_input_size
from utils.loggers.console import tell
from utils.optim import optimizer as optim
from utils.profiling.step_speed import measure
from utils.runtime.compile import require_compiler
from utils.runtime.precision import choose_precision
from utils.runtime.seed import seed_initialisation


def measure_throughput(config: CfgNode, content: Any, device: torch.device, logger: logging.Logger) -> None:
    """Images per second of the forward pass and of a training step, on made-up images."""
    precision = choose_precision(config, device)
    tell(logger, (precision.notice, *optim.apex_notices(config)))
    require_compiler(device, config.COMPILE)
    seed_initialisation(config.SEED)
    model = build_model(config)
    check_input_size(model, config)
    for line in measure(model.to(device), config, device, precision):
        logger.info(line)
