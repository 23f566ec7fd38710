"""A model with all that trains it: the one place where a step is put together, for training, --plan, --fit and --throughput."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from yacs.config import CfgNode

from utils.checkpoints.state import TrainState
from utils.optim.ema import build_average
from utils.optim.freeze import freeze
from utils.optim.lr_schedule import build_schedule
from utils.optim.optimizer import build_optimizer
from utils.runtime.compile import compile_model
from utils.runtime.device import measure_convolutions
from utils.runtime.precision import Precision
from utils.runtime.seed import seed_initialisation
from utils.tasks.base import Batch, Task
from utils.training.engine import StepPlan
from utils.training.step_graph import Say, choose_step


def build_initial_model(config: CfgNode, task: Task, num_classes: int | None) -> nn.Module:
    """The task's model on the CPU, its weights a function of SEED alone.

    Raises:
        ConfigError: the model cannot be built, or does not take images of DATA.IMG_SIZE.
    """
    seed_initialisation(config.SEED)
    model = task.build_model(config, num_classes)
    task.check_input_size(model, config)
    return model


def nominal_global_batch(config: CfgNode, world_size: int) -> int:
    """Samples of a step over all processes, as batch size and accumulation say; a small data set may have fewer."""
    return config.DATA.BATCH_SIZE * config.TRAIN.ACCUMULATION_STEPS * world_size


def assemble(config: CfgNode, task: Task, model: nn.Module, device: torch.device, precision: Precision, *, images: int,
             transform: Callable[[Batch, int], Batch], steps_per_epoch: int = 1, rank: int = 0, world_size: int = 1,
             say: Say = lambda line: None) -> tuple[TrainState, StepPlan]:
    """``model`` on ``device`` with its optimizer and average of weights, and the plan of its steps; frozen where the config says so.

    Args:
        images: samples of a step over all ranks.
        transform: as of ``StepPlan``.
        say: takes what is to tell of the steps' recording (COMPILE graphs).
    """
    fixed = freeze(model, config)
    measure_convolutions(device, task.one_size)
    model.to(device)
    state = TrainState(model, build_optimizer(config, model), precision.scaler, build_average(config, model))
    global_batch = min(images, nominal_global_batch(config, world_size))  # a rate is for the images that there are
    plan = StepPlan(
        task=task, schedule=build_schedule(config, steps_per_epoch, global_batch), transform=transform,
        precision=precision, device=device, micro_batch=config.DATA.BATCH_SIZE, images=images,
        clip=config.TRAIN.CLIP_GRAD or float("inf"), seed=config.SEED, rank=rank, world_size=world_size, fixed=fixed,
        step=choose_step(config.COMPILE, device, world_size, say))
    return state, plan


def synthetic_step(config: CfgNode, task: Task, device: torch.device, precision: Precision, num_classes: int | None = None,
                   model: nn.Module | None = None, say: Say = lambda line: None) -> tuple[TrainState, StepPlan, Batch]:
    """(state, plan, batch) of training by the config's recipe on one synthetic micro-batch, by this process alone; COMPILE is obeyed.

    Args:
        num_classes: None takes MODEL.NUM_CLASSES, or where that is 0 the task's usual number.
        model: None builds the config's.
        say: as of ``assemble``.
    """
    classes, images = num_classes or config.MODEL.NUM_CLASSES or task.usual_classes, config.DATA.BATCH_SIZE
    model = build_initial_model(config, task, num_classes) if model is None else model
    state, plan = assemble(config, task, model, device, precision, images=images, say=say,
                           transform=task.batch_transform(config, classes, rank=0))
    compile_model(model, config.COMPILE)
    return state, plan, task.synthetic_batch(config, images, classes, device, torch.Generator().manual_seed(config.SEED))
