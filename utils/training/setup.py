"""Everything up to the first training step, checked."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from yacs.config import CfgNode

from config import ConfigError, with_values, without_effect
from data import Loaders
from data.messages import NOTICE
from models import load_pretrained
from utils.checkpoints.file_format import task_state, with_found
from utils.checkpoints.folder import CheckpointFolder
from utils.checkpoints.run_folder import require_writable, run_folder
from utils.checkpoints.state import TrainState
from utils.evaluation.setup import open_loaders
from utils.loggers.console import tell
from utils.loggers.trackers import require_tracker
from utils.optim import optimizer as optim
from utils.optim.lr_schedule import lr_scale
from utils.runtime import distributed
from utils.runtime.compile import compile_model, require_compiler
from utils.runtime.precision import choose_precision
from utils.runtime.seed import make_deterministic
from utils.tasks.build import build_task
from utils.training.assembly import assemble, build_initial_model, nominal_global_batch
from utils.training.batch_size import fit_micro_batch, keep_global_batch, recipe_batch
from utils.training.engine import StepPlan
from utils.training.loop import best_line, run_out_of_patience
from utils.training.rank_check import require_agreement
from utils.training.resume import Start, accept_changes, check_same_data, choose_start, new_run

MOST_OF_THE_START = 0.01  # share of the initial weights in an average at the end, without a warning


@dataclass
class Prepared:
    """A run before its first step; nothing has been written yet."""

    config: CfgNode
    folder: str
    start: Start
    device: torch.device
    loaders: Loaders
    global_batch: int
    state: TrainState
    plan: StepPlan


def prepare(config: CfgNode, resume_content: Any, device: torch.device, logger: logging.Logger, dry: bool = False) -> Prepared | None:
    """Everything up to the first step, checked; None where the run is finished already.

    Args:
        dry: whether no run shall follow; the run's folder is then not even touched.
    """
    rank, world_size, folder = distributed.rank(), distributed.world_size(), run_folder(config)
    task = build_task(config)
    optim.check_optimizer(config)
    if unused := without_effect(config):
        logger.log(NOTICE, f"left out, since TASK is {config.TASK}: {', '.join(unused)}")
    if distributed.is_main():
        require_tracker(config.TRACKER)
    require_writable(folder, dry)
    distributed.begin_phase("choosing where to start")
    start = choose_start(config, resume_content, folder, logger)
    config = with_found(config, start.content, start.path)
    if config.PLAN.FIT:
        config = fit_micro_batch(config, task, start, device, world_size, logger)
    if start.content is not None:
        if config.TRAIN.GLOBAL_BATCH not in (0, start.content["global_batch"]):
            logger.log(NOTICE, f"TRAIN.GLOBAL_BATCH is {config.TRAIN.GLOBAL_BATCH}, but {start.path} has a global batch of "
                        f"{start.content['global_batch']}, which is kept; another one needs a run of its own (--pretrained)")
        config = keep_global_batch(config, start.content["global_batch"], "the checkpoint's", world_size, logger)
    precision = choose_precision(config, device)
    make_deterministic(device)
    require_compiler(device, config.COMPILE)

    distributed.begin_phase("indexing the images")
    loaders = open_loaders(task, config, device, logger)
    config = with_values(config, loaders.found, "found in the data") if loaders.found else config
    sampler = loaders.train.batch_sampler
    global_batch = nominal_global_batch(config, world_size)
    steps_per_epoch, total_steps = sampler.steps_per_epoch, sampler.total_steps
    tell(logger, (*optim.apex_notices(config), precision.notice))
    require_agreement(config, loaders)
    if start.content is None:
        _require_steps(config, len(loaders.train.dataset.source), world_size)
        if global_batch != recipe_batch(config, world_size):
            logger.log(NOTICE, f"the recipe's global batch is {config.TRAIN.GLOBAL_BATCH}, this one {global_batch}; the learning rate "
                        "follows it, results may not; --fit keeps the recipe's")
    else:
        check_same_data(start, config, loaders, logger)
        step, evaluated = start.content["step"], start.content.get("evaluated", start.content["step"])
        early = run_out_of_patience(config, start.content["best"], step, steps_per_epoch)
        more = "--iterations" if config.TRAIN.ITERATIONS else "--epochs"
        if (step >= total_steps or early) and evaluated >= min(step, total_steps):
            accept_changes(start, config, logger, beyond=step > total_steps)
            if start.kind == "auto-resume" and distributed.is_main() and not dry:
                CheckpointFolder(folder).relink(start.content)
            logger.info(f"finished already: {start.path} is at step {step} of {total_steps}"
                        f"{best_line(task, start.content['best'])}; raise {'TRAIN.PATIENCE' if early else more} to go on, or "
                        f"{new_run(start)}")
            return None

    _require_end_of_warm_up(config, steps_per_epoch, total_steps)
    distributed.begin_phase("building the model")
    model = build_initial_model(config, task, len(loaders.classes))
    if start.kind == "pretrained":
        logger.info(load_pretrained(model, start.path, config).summary(start.path))
    if config.TRAIN.SYNC_BN and world_size > 1:
        if device.type == "cuda":
            model = distributed.sync_batch_norm(model)
        else:
            logger.log(NOTICE, "SyncBN needs GPUs; batch norm stays each process's own")
    transform, told = task.taught(config, task.batch_transform(config, len(loaders.classes), rank), precision)
    tell(logger, told)
    state, plan = assemble(config, task, model, device, precision, images=sampler.images_per_step, transform=transform,
                           steps_per_epoch=steps_per_epoch, rank=rank, world_size=world_size, say=lambda line: tell(logger, [line]))
    if start.content is not None:
        state.load_state_dict(start.content, start.path)  # first: what cannot fit is not a change to accept
        task.load_state_dict(task_state(start.content))
        accept_changes(start, config, logger)
    compile_model(model, config.COMPILE)
    if state.ema is not None:
        compile_model(state.ema.module, config.COMPILE, like=model)
    return Prepared(config, folder, start, device, loaders, global_batch, state, plan)


def _require_steps(config: CfgNode, images: int, world_size: int) -> None:
    micro, accumulate = config.DATA.BATCH_SIZE, config.TRAIN.ACCUMULATION_STEPS
    micro_batches = -(-images // (micro * world_size))
    if accumulate > 1 and accumulate > micro_batches:
        raise ConfigError(f"TRAIN.ACCUMULATION_STEPS is {accumulate}, longer than an epoch: {images} images make {micro_batches} "
                          f"micro-batches of {micro} x {world_size}; accumulate at most {micro_batches}"
                          + (f", which is --global-batch {micro * world_size * micro_batches}" if config.PLAN.FIT else ""))


def _require_end_of_warm_up(config: CfgNode, steps_per_epoch: int, total_steps: int) -> None:
    """As the config's own check, where the warm-up counts in other units than the run."""
    train = config.TRAIN
    key, steps = "WARMUP_STEPS" if train.WARMUP_STEPS else "WARMUP_EPOCHS", train.WARMUP_STEPS or train.WARMUP_EPOCHS * steps_per_epoch
    if steps >= total_steps and (train.WARMUP_STEPS or train.ITERATIONS):
        raise ConfigError(f"TRAIN.{key} is {train[key]:g}, a warm-up of {steps:g} steps, but the run has {total_steps}; lower it, or train "
                          "for longer")


def introduce(ready: Prepared, logger: logging.Logger) -> None:
    """Say what is trained on what, and at which rate."""
    config, loaders, plan, model = ready.config, ready.loaders, ready.plan, ready.state.model
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    part = f" ({trained / 1e6:.2f} M of them trained)" if trained < parameters else ""
    logger.info(f"model {config.MODEL.NAME}: {parameters / 1e6:.2f} M parameters{part}, {len(loaders.classes)} classes, "
                f"on {ready.device} in {plan.precision.name}, torch {torch.__version__}")
    val, schedule = len(loaders.val.dataset.source) or "an unknown number of", plan.schedule
    logger.info(f"data {config.DATA.DATA_PATH} ({loaders.layout}): {len(loaders.train.dataset.source)} training and {val} validation "
                f"images, {loaders.train.batch_sampler.steps_per_epoch} steps an epoch, {loaders.train.num_workers} workers; "
                f"{loaders.train.dataset.pipeline.description()}")
    short = f", of which the data fills {plan.images}" if plan.images < ready.global_batch else ""
    logger.info(f"global batch {ready.global_batch} = {config.DATA.BATCH_SIZE} images x {config.TRAIN.ACCUMULATION_STEPS} accumulated x "
                f"{plan.world_size} processes{short}; learning rate {config.TRAIN.BASE_LR:g} x {lr_scale(config, plan.images):g} "
                f"= {schedule.base:g}, from {schedule.warmup:g} over {schedule.warmup_steps} steps, to {schedule.floor:g}")
    tell(logger, optim.layer_rates(ready.state.optimizer, model, schedule.base))
    if config.TRAIN.PATIENCE:
        logger.info(f"ends early after {config.TRAIN.PATIENCE} epochs without a better {plan.task.best.label} (TRAIN.PATIENCE); the "
                    f"schedule of the learning rate stays that of {loaders.train.batch_sampler.total_steps} steps")
    _warn_of_a_long_average(config, loaders.train.batch_sampler.total_steps, logger)


def _warn_of_a_long_average(config: CfgNode, steps: int, logger: logging.Logger) -> None:
    """Say so where the averaged weights, which count as the run's result, would be those of its beginning."""
    decay = config.TRAIN.EMA_DECAY
    if decay and not config.TRAIN.EMA_WARMUP and decay ** steps > MOST_OF_THE_START:
        fitting = math.floor(1e4 * MOST_OF_THE_START ** (1 / steps)) / 1e4
        logger.warning(f"TRAIN.EMA_DECAY {decay:g} is long for {steps} steps: {100 * decay ** steps:.0f} % of the averaged weights, which "
                       f"are what is evaluated, will be the initial ones; TRAIN.EMA_DECAY {fitting:g} fits, or TRAIN.EMA_WARMUP True")
