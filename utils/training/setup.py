"""Everything up to the first training step, checked."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from config import ConfigError
from data import build_loaders
from data.messages import NOTICE
from data.transforms.mixup import build_mixup
from models import build_model, check_input_size, load_pretrained
from utils.checkpoints.folder import CheckpointFolder
from utils.checkpoints.run_folder import _require_writable, run_folder
from utils.checkpoints.state import TrainState
from utils.evaluation.data_messages import teller
from utils.loggers.console import tell
from utils.loggers.progress import listing, periodic
from utils.loggers.trackers import require_tracker
from utils.optim import optimizer as optim
from utils.optim.ema import build_average
from utils.optim.freeze import freeze
from utils.optim.lr_schedule import Schedule, build_schedule, lr_scale
from utils.optim.optimizer import build_optimizer
from utils.runtime import distributed
from utils.runtime.compile import compile_model, require_compiler
from utils.runtime.precision import Precision, choose_precision
from utils.runtime.seed import make_deterministic, seed_initialisation
from utils.tasks.classification import build_loss
from utils.training.batch_size import fit_micro_batch, keep_global_batch, recipe_batch
from utils.training.engine import StepPlan
from utils.training.loop import best_line
from utils.training.rank_check import require_agreement
from utils.training.resume import Start, _check_same_data, accept_changes, choose_start

# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------

@dataclass
class Prepared:
    """A run before its first step; nothing has been written yet.

    Attributes:
        fixed: modules that stay in evaluation mode.
    """

    config: CfgNode
    folder: str
    start: Start
    device: torch.device
    precision: Precision
    loaders: Any
    global_batch: int
    state: TrainState
    fixed: list[nn.Module]

    @property
    def schedule(self) -> Schedule:
        return build_schedule(self.config, self.loaders.train.batch_sampler.steps_per_epoch, self.global_batch)

    def step_plan(self) -> StepPlan:
        config = self.config
        return StepPlan(self.schedule, build_loss(config.MODEL.LABEL_SMOOTHING), self.loaders.mixup, self.precision, self.device,
                        config.DATA.BATCH_SIZE, self.loaders.train.batch_sampler.images_per_step, config.TRAIN.CLIP_GRAD or float("inf"),
                        config.SEED, distributed.rank(), distributed.world_size(), self.fixed)


def prepare(config: CfgNode, resume_content: Any, device: torch.device, logger: logging.Logger, dry: bool = False) -> Prepared | None:
    """Everything up to the first step, checked; None where the run is finished already.

    Args:
        dry: whether no run shall follow; the run's folder is then not even touched.
    """
    rank, world_size, folder = distributed.rank(), distributed.world_size(), run_folder(config)
    optim.check_optimizer(config)
    if distributed.is_main():
        require_tracker(config.TRACKER)
    _require_writable(folder, dry)
    distributed.mark("choosing where to start")
    start = choose_start(config, resume_content, folder, logger)
    if config.PLAN.FIT:
        config = fit_micro_batch(config, start, device, world_size, logger)
    if start.content is not None:
        if config.TRAIN.GLOBAL_BATCH not in (0, start.content["global_batch"]):
            logger.log(NOTICE, f"TRAIN.GLOBAL_BATCH is {config.TRAIN.GLOBAL_BATCH}, but {start.path} has a global batch of "
                        f"{start.content['global_batch']}, which is kept; another one needs a run of its own (--pretrained)")
        config = keep_global_batch(config, start.content["global_batch"], "the checkpoint's", world_size, logger)
    precision = choose_precision(config, device)
    make_deterministic(device)
    require_compiler(device, config.COMPILE)

    distributed.mark("indexing the images")
    with listing(functools.partial(periodic, logger)):
        loaders = build_loaders(config, rank, world_size, device=device)
    loaders.tell(teller(logger))
    sampler = loaders.train.batch_sampler
    global_batch = config.DATA.BATCH_SIZE * config.TRAIN.ACCUMULATION_STEPS * world_size
    steps_per_epoch, total_steps = sampler.steps_per_epoch, sampler.total_steps
    tell(logger, (*loaders.notices, *optim.apex_notices(config), precision.notice))
    require_agreement(config, loaders)
    if start.content is None:
        _require_steps(config, len(loaders.train.dataset.folder), world_size)
        if global_batch != recipe_batch(config, world_size):
            logger.log(NOTICE, f"the recipe's global batch is {config.TRAIN.GLOBAL_BATCH}, this one {global_batch}; the learning rate "
                        "follows it, results may not; --fit keeps the recipe's")
    else:
        _check_same_data(start, loaders.classes, steps_per_epoch)
        if start.content["step"] >= total_steps and start.content.get("evaluated", total_steps) >= total_steps:
            if start.kind == "auto-resume" and distributed.is_main() and not dry:
                CheckpointFolder(folder).relink(start.content)
            logger.info(f"finished already: {start.path} is at step {start.content['step']} of {total_steps}"
                        f"{best_line(start.content['best'])}; raise --epochs to go on, or choose another --tag for a new run")
            return None

    distributed.mark("building the model")
    seed_initialisation(config.SEED)
    model = build_model(config, len(loaders.classes))
    check_input_size(model, config)
    if start.kind == "pretrained":
        logger.info(load_pretrained(model, start.path, config).summary(start.path))
    if config.TRAIN.SYNC_BN and world_size > 1:
        if device.type == "cuda":
            model = distributed.sync_batch_norm(model)
        else:
            logger.log(NOTICE, "SyncBN needs GPUs; batch norm stays each process's own")
    fixed = freeze(model, config)
    model.to(device)
    state = TrainState(model, optim.build_optimizer(config, model), precision.scaler, build_average(config, model))
    if start.content is not None:
        state.load_state_dict(start.content, start.path)
        accept_changes(start, config, logger)
    compile_model(model, config.COMPILE)
    if state.ema is not None:
        compile_model(state.ema.module, config.COMPILE, like=model)
    return Prepared(config, folder, start, device, precision, loaders, global_batch, state, fixed)


def _require_steps(config: CfgNode, images: int, world_size: int) -> None:
    micro, accumulate = config.DATA.BATCH_SIZE, config.TRAIN.ACCUMULATION_STEPS
    micro_batches = -(-images // (micro * world_size))
    if accumulate > 1 and accumulate > micro_batches:
        raise ConfigError(f"TRAIN.ACCUMULATION_STEPS is {accumulate}, longer than an epoch: {images} images make {micro_batches} "
                          f"micro-batches of {micro} x {world_size}; accumulate at most {micro_batches}"
                          + (f", which is --global-batch {micro * world_size * micro_batches}" if config.PLAN.FIT else ""))


def _introduce(config: CfgNode, device: torch.device, precision: Precision, model: nn.Module, loaders: Any, steps_per_epoch: int,
               global_batch: int, schedule: Schedule, logger: logging.Logger) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    part = f" ({trained / 1e6:.2f} M of them trained)" if trained < parameters else ""
    logger.info(f"model {config.MODEL.NAME}: {parameters / 1e6:.2f} M parameters{part}, {len(loaders.classes)} classes, "
                f"on {device} in {precision.name}, torch {torch.__version__}")
    val = len(loaders.val.dataset.folder) or "an unknown number of"
    logger.info(f"data {config.DATA.DATA_PATH} ({loaders.layout}): {len(loaders.train.dataset.folder)} training and {val} validation "
                f"images, {steps_per_epoch} steps an epoch, {loaders.train.num_workers} workers; "
                f"{loaders.train.dataset.pipeline.description()}")
    logger.info(f"global batch {global_batch} = {config.DATA.BATCH_SIZE} images x {config.TRAIN.ACCUMULATION_STEPS} accumulated x "
                f"{distributed.world_size()} processes; learning rate {config.TRAIN.BASE_LR:g} x {lr_scale(config, global_batch):g} "
                f"= {schedule.base:g}, from {schedule.warmup:g} over {schedule.warmup_steps} steps, to {schedule.floor:g}")


def prepare_step(model: nn.Module, config: CfgNode, device: torch.device, precision: Precision,
                 classes: int | None = None) -> tuple[TrainState, StepPlan]:
    """What training by the config's recipe needs beside images, for ``model`` on ``device``, which is compiled if the config says so.

    ``classes``: outputs of the model; None takes ``MODEL.NUM_CLASSES``, or 1000 where that is 0.
    """
    train, batch = config.TRAIN, config.DATA.BATCH_SIZE
    state = TrainState(model, build_optimizer(config, model), precision.scaler, build_average(config, model))
    compile_model(model, config.COMPILE)
    plan = StepPlan(build_schedule(config, 1, batch), build_loss(config.MODEL.LABEL_SMOOTHING),
                    build_mixup(config, classes or config.MODEL.NUM_CLASSES or 1000, 0), precision, device, batch, batch,
                    train.CLIP_GRAD or float("inf"), config.SEED, 0, 1)
    return state, plan
