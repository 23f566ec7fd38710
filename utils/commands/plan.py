"""``--plan``: a dry run of everything, and what the real one will take: memory, time and disk. Writes nothing into OUTPUT."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
from yacs.config import CfgNode

from config import ConfigError, input_channels
from data.messages import Notice
from models.safe_load import read_file
from utils.checkpoints.file_format import describe, write_checkpoint
from utils.checkpoints.run_folder import checkpoints_kept, require_room
from utils.loggers.console import tell
from utils.loggers.progress import clock
from utils.profiling.run_speed import Speed, measure
from utils.profiling.step_speed import multiply_adds
from utils.runtime import distributed, memory
from utils.runtime.files import free_bytes
from utils.runtime.memory import format_size
from utils.runtime.stop_signals import StopRequest
from utils.training.batch_size import DoesNotFit, two_steps
from utils.training.setup import Prepared, prepare
from utils.visualization import terminal_chart as curve

CURVE = (60, 6)  # columns and lines


def plan_run(config: CfgNode, content: Any, device: torch.device, logger: logging.Logger) -> int:
    """Say what the run would take; 0 if it fits, 1 if it does not."""
    scratch = os.path.expanduser(config.PLAN.SCRATCH)
    if scratch and not (os.path.isdir(scratch) and os.access(scratch, os.W_OK | os.X_OK)):
        raise ConfigError(f"PLAN.SCRATCH is {scratch}; name a folder that is there and can be written")
    try:
        with StopRequest(), memory.limited_to(device, config.PLAN.MEMORY):
            ready = prepare(config, content, device, logger, dry=True)
            if ready is not None:
                with contextlib.closing(ready.loaders):
                    _plan(ready, logger)
    except DoesNotFit as error:
        logger.info(f"fits: no ({error})")
        return 1
    logger.info("fits: yes")
    return 0


def _plan(ready: Prepared, logger: logging.Logger) -> None:
    """Print a line on each thing as it becomes known.

    Raises:
        DoesNotFit: memory or disk do not suffice.
    """
    config, start, state = ready.config, ready.start, ready.state
    sampler, world = ready.loaders.train.batch_sampler, distributed.world_size()
    per_epoch, total = sampler.steps_per_epoch, sampler.total_steps
    logger.info(_model_line(ready))
    logger.info(f"batch: {ready.global_batch} images = {config.DATA.BATCH_SIZE} x {config.TRAIN.ACCUMULATION_STEPS} accumulated x {world} "
                f"processes, {per_epoch} steps an epoch")
    logger.info(f"steps: continues {start.path} after step {state.step} of {total}" if start.content is not None else
                f"steps: from the first of {total}" + (f", with the weights of {start.path}" if start.path else ""))
    for line in _curve_lines(ready):
        logger.info(line)
    _require_disk(ready, logger)
    _require_memory(ready)
    speed = measure(ready, logger)
    _say_speed(ready, speed, logger)
    save = _try_save(ready, per_epoch, logger)
    _require_used_memory(ready, logger)
    _say_time(ready, speed, save, logger)


# --------------------------------------------------------------------------------------------------
# What is known without a step
# --------------------------------------------------------------------------------------------------

def _model_line(ready: Prepared) -> str:
    model, (height, width) = ready.state.model, ready.plan.task.input_size(ready.config)
    with torch.compiler.set_stance("force_eager"):
        gmacs = multiply_adds(model, (height, width), input_channels(ready.config)) / 1e9
    parameters = sum(p.numel() for p in model.parameters())
    return (f"model: {ready.config.MODEL.NAME}, {parameters / 1e6:.2f} M parameters, {gmacs:.3g} GMACs an image "
            f"of {height} x {width}, on {ready.device} in {ready.plan.precision.name}")


def _curve_lines(ready: Prepared) -> list[str]:
    schedule, columns = ready.plan.schedule, CURVE[0]
    total = max(1, schedule.total_steps)
    # the last step in each column, so that the end is the end
    values = [schedule.lr_at(min(total - 1, max(0, round((i + 1) * total / columns) - 1))) for i in range(columns)]
    encoding = getattr(sys.stdout, "encoding", None) or ""
    lines = curve.draw(values, CURVE[1], "step 0", str(total), "utf" in encoding.lower())
    return [f"learning rate: {schedule.warmup:.2e} rising to {schedule.base:.2e} over {schedule.warmup_steps} steps, {schedule.name} to "
            f"{schedule.lr_at(total - 1):.2e}", *(f"  {line}" for line in lines)]


def _require_disk(ready: Prepared, logger: logging.Logger) -> None:
    config, size, epochs = ready.config, ready.state.size(), ready.loaders.train.batch_sampler.epochs
    number = checkpoints_kept(config, epochs)
    wanted = min(number * size, config.TRAIN.CHECKPOINT_BUDGET or number * size)
    logger.info(f"disk: a checkpoint takes {format_size(size)}, the {number} that the run keeps at a time {format_size(wanted)}; "
                f"{format_size(free_bytes(ready.folder))} are free")
    try:
        require_room(config, ready.folder, size, epochs, logger)
    except ConfigError as error:
        raise DoesNotFit(str(error)) from None


# --------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------

def _require_memory(ready: Prepared) -> None:
    """Two steps of this process alone on synthetic images: whoever lacks memory here would leave the others waiting in an exchange."""
    config, sampler = ready.config, ready.loaders.train.batch_sampler
    local, num_classes = sampler.local_images(), len(ready.loaders.classes)
    most = memory.available(ready.device, config.PLAN.MEMORY)
    sizes = [config.DATA.BATCH_SIZE]
    if ready.device.type == "cpu":  # a process that takes too much is killed: small ones foretell what the whole takes
        least, whole = min(ready.plan.task.least_images(config), config.DATA.BATCH_SIZE), config.DATA.BATCH_SIZE
        sizes = sorted({max(least, whole // 8), max(least, whole // 4), whole})
    peak: int | None = 0
    measured: dict[int, int] = {}
    for micro in sizes:
        if len(measured) == 2 and (foretold := memory.extrapolated(measured, micro)) > 1.1 * most:
            peak = int(foretold)
            break
        peak = memory.peak_of(lambda micro=micro: two_steps(ready.state, ready.plan, config, local, micro, num_classes), ready.device)
        if peak is None or peak > most:
            break
        measured[micro] = peak
    memory.reset_peak(ready.device)
    peaks = distributed.gather_objects((peak, most))
    for rank, (taken, allowed) in enumerate(peaks):
        if taken is None or taken > allowed:
            where = f" on rank {rank}" if len(peaks) > 1 else ""
            raise DoesNotFit(f"memory: a micro-batch of {config.DATA.BATCH_SIZE} images takes "
                           f"{'' if taken is None else format_size(taken) + ', '}more than {format_size(allowed)}{where}; --fit "
                           "finds one that fits and keeps the global batch")


def _require_used_memory(ready: Prepared, logger: logging.Logger) -> None:
    """What the real steps, the evaluation and the save took, DataLoader workers included."""
    own, has_workers = memory.peak(ready.device), ready.device.type == "cpu" and ready.loaders.train.num_workers > 0
    workers = memory.of_workers() if has_workers else 0
    most = memory.available(ready.device, ready.config.PLAN.MEMORY)
    every = distributed.gather_objects((own, workers, most))
    own, workers, most = max(every, key=lambda used: (used[0] + used[1]) / used[2])
    logger.info(f"memory: {format_size(own)} at the peak"
                + (f" and {format_size(workers)} in {ready.loaders.train.num_workers} DataLoader workers" if workers else "")
                + f", of {format_size(most)}" + (" a process" if len(every) > 1 else ""))
    if own + workers > most:
        raise DoesNotFit(f"memory: {format_size(own + workers)} are more than {format_size(most)}; --fit finds a micro-batch that fits "
                         "and keeps the global batch, fewer --num-workers take less")


def _say_speed(ready: Prepared, speed: Speed, logger: logging.Logger) -> None:
    images, workers = ready.loaders.train.batch_sampler.images_per_step, ready.loaders.train.num_workers
    step, batch, both = (images / seconds for seconds in (speed.step, speed.batch, speed.both))
    logger.info(f"speed: {step:.0f} images/s of the step alone ({1000 * speed.step:.0f} ms), {batch:.0f} images/s of the loader alone "
                f"({workers} DataLoader workers), {both:.0f} images/s of both together")
    if speed.batch > speed.step:
        logger.info(f"bound: by the data, {speed.batch / speed.step:.1f} times; more --num-workers or CPUs, smaller files "
                    "(scripts/resize_dataset.py) or a faster disk help, a faster device does not")
    else:
        logger.info(f"bound: by the computation; the loader could feed {speed.step / speed.batch:.1f} times as much")


# --------------------------------------------------------------------------------------------------
# Saving, and the whole
# --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Save:
    """Seconds: of copying the state, of writing it, of reading and taking it over."""

    copy: float
    write: float
    read: float


def _try_save(ready: Prepared, per_epoch: int, logger: logging.Logger) -> Save:
    """Write a checkpoint to a folder of its own, read it back, take it over, remove it: rank 0's business."""
    distributed.begin_phase("planning: saving")
    save, line = Save(0.0, 0.0, 0.0), ""
    if distributed.is_main():
        try:
            save, line = _save_and_load(ready, per_epoch)
        except OSError as error:  # the disk of the run itself has been looked at
            line = Notice(f"no save was tried: {error.filename or 'the scratch folder'} cannot be written ({error.strerror or error}); "
                          "name another folder with --opts PLAN.SCRATCH")
    tell(logger, [line])
    return distributed.gather_objects(save)[0]


def _save_and_load(ready: Prepared, per_epoch: int) -> tuple[Save, str]:
    config, state = ready.config, ready.state
    described = describe(config.dump(), ready.loaders.classes, ready.plan.task.preprocessing(config), config.DATA.DATA_PATH, {},
                         ready.global_batch, per_epoch)
    with tempfile.TemporaryDirectory(prefix="plan-", dir=os.path.expanduser(config.PLAN.SCRATCH) or None) as scratch:
        path, times = os.path.join(scratch, "ckpt_00000000.pth"), [time.perf_counter()]
        content = {**described, **state.state_dict(copy=config.TRAIN.BACKGROUND_SAVE)}
        times.append(time.perf_counter())
        write_checkpoint(path, content)
        del content
        times.append(time.perf_counter())
        state.load_state_dict(read_file(path), path)
        times.append(time.perf_counter())
        size = os.path.getsize(path)
    copy, write, read = (later - before for before, later in itertools.pairwise(times))
    beside = " beside the training" if config.TRAIN.BACKGROUND_SAVE else ""
    return Save(copy, write, read), (f"checkpoint: {format_size(size)} copied in {copy:.1f} s, written in {write:.1f} s{beside}, read and "
                                     f"taken over in {read:.1f} s")


def _say_time(ready: Prepared, speed: Speed, save: Save, logger: logging.Logger) -> None:
    config, sampler = ready.config, ready.loaders.train.batch_sampler
    training, evaluation = sampler.steps_per_epoch * speed.both, speed.evaluation or 0.0
    # An epoch that saves does so before its evaluation and after it; what is written beside the work delays only the next save.
    saving = 2 * (save.copy + save.write)
    if config.TRAIN.BACKGROUND_SAVE:
        saving = 2 * save.copy + max(0.0, save.write - evaluation) + max(0.0, save.write - training)
    saving /= config.SAVE_FREQ
    if config.TRAIN.SAVE_EVERY_STEPS:
        saving += sampler.steps_per_epoch / config.TRAIN.SAVE_EVERY_STEPS * (save.copy if config.TRAIN.BACKGROUND_SAVE else saving / 2)
    epoch = training + evaluation / config.TRAIN.EVAL_FREQ + saving
    epochs = (sampler.total_steps - ready.state.step) / sampler.steps_per_epoch
    evaluation = f"{_seconds(evaluation / config.TRAIN.EVAL_FREQ)} evaluation" if speed.evaluation is not None else \
        "an evaluation of unknown length"
    logger.info(f"epoch: {clock(epoch)} = {_seconds(training)} training + {evaluation} + {_seconds(saving)} saving")
    hours, unit = epoch * epochs * distributed.world_size() / 3600, "GPU" if ready.device.type == "cuda" else "process"
    logger.info(f"run: {clock(epoch * epochs)} for {epochs:.4g} epochs, {hours:.3g} {unit} hours")


def _seconds(seconds: float) -> str:
    return clock(seconds) if seconds >= 60 else f"{seconds:.1f} s"
