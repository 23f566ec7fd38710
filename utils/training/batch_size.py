"""``--fit``: the largest micro-batch that memory holds; found by real steps on synthetic images."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from yacs.config import CfgNode

from config import ConfigError, ProgramError, input_channels, with_values
from data.loading.workers import worker_count
from data.messages import NOTICE
from utils.checkpoints.state import TrainState
from utils.evaluation.setup import open_loaders
from utils.runtime import distributed, launcher, memory
from utils.runtime.compile import compile_model, compiled_part, forget_compiled, require_compiler
from utils.runtime.memory import format_size
from utils.runtime.precision import choose_precision
from utils.runtime.seed import make_deterministic
from utils.tasks.base import Task
from utils.training.assembly import assemble, build_initial_model
from utils.training.engine import Step, StepPlan, backward
from utils.training.resume import Start
from utils.training.step_graph import can_be_recorded


def recipe_batch(config: CfgNode, world_size: int) -> int:
    """Images a step over all processes that the recipe is for: TRAIN.GLOBAL_BATCH, or what batch, accumulation and processes give."""
    return config.TRAIN.GLOBAL_BATCH or config.DATA.BATCH_SIZE * config.TRAIN.ACCUMULATION_STEPS * world_size


def local_batch(wanted: int, whose: str, world_size: int) -> int:
    """Each process's part of a global batch.

    Raises:
        ConfigError: it cannot be shared evenly, with the numbers of processes that can.
    """
    if wanted % world_size:
        near = sorted(divisors(wanted), key=lambda n: abs(n - world_size))[:4]
        other = "start again with --pretrained" if whose == "the checkpoint's" else "state another with --global-batch"
        raise ConfigError(f"{whose} global batch of {wanted} cannot be shared by {world_size} processes; "
                          f"start {', '.join(map(str, sorted(near)))} processes, or {other}")
    return wanted // world_size


def divisors(number: int) -> list[int]:
    """All of them, rising."""
    return [n for n in range(1, number + 1) if number % n == 0]


def split_batch(config: CfgNode, local: int, micro: int, whose: str) -> CfgNode:
    """The config with a process's batch of ``local`` images in micro-batches of ``micro``, a divisor."""
    return with_values(config, {"DATA.BATCH_SIZE": micro, "TRAIN.ACCUMULATION_STEPS": local // micro},
                       f"derived from {whose} global batch")


STRETCH = 4  # on a CPU memory is not tried beyond: a process that takes too much is killed, so sizes grow by measured steps
BATCHES_AHEAD = 3  # that a DataLoader worker holds, the one it works on included


class DoesNotFit(ProgramError):
    """The run does not fit into memory or on the disk; the message says why."""


def largest_micro_batch(config: CfgNode, task: Task, local: int, num_classes: int, device: torch.device) -> tuple[int, str]:
    """(images of the largest micro-batch that fits on every process, a line on its memory).

    Args:
        local: images of a step on one process; the micro-batch divides it.
        num_classes: classes of the data.

    Raises:
        DoesNotFit: the smallest micro-batch does not fit.
    """
    least = task.least_images(config)
    sizes = [size for size in divisors(local) if size >= least]
    if not sizes:
        raise ConfigError(f"a process has {local} image a step, and TASK {config.TASK} trains on {least} or more; start fewer processes")

    def room() -> int:
        return int(memory.HEADROOM * memory.available(device, config.PLAN.MEMORY)) - _of_loading(config, task, local, device)

    most = room()
    with memory.limited_to(device, config.PLAN.MEMORY):
        found, measured = _try_sizes(Trial(config, task, local, num_classes, device), sizes, most, room)
    if compiled_part(config.COMPILE) != "off":
        forget_compiled()
    memory.reset_peak(device)  # gives back what the trial had
    found = min(distributed.gather_objects(found))
    if not found:
        raise DoesNotFit(f"a micro-batch of {'one image' if sizes[0] == 1 else f'{sizes[0]} images'} does not fit into "
                         f"{format_size(max(0, most))}; add --use-checkpoint, or take a "
                         "smaller model or --img-size")
    peak, beyond = measured.get(found), next((n for n in sizes if n > found), None)
    return found, (f"{format_size(peak)} of " if peak else "") + format_size(most) + " are taken at the peak" + (
        f", {beyond} images would not fit" if beyond is not None else "")


def _try_sizes(trial: Trial, sizes: Sequence[int], most: int, room: Callable[[], int]) -> tuple[int, dict[int, int | None]]:
    """(the largest of ``sizes`` that takes no more than ``most`` bytes, bytes of those tried).

    Args:
        room: ``most`` of this moment: on a GPU the libraries take memory of their own, beside the allocator, as they are first used.
    """
    measured: dict[int, int | None] = {}
    on_cpu = trial.plan.device.type == "cpu"

    def fits(micro: int) -> bool:
        measured[micro] = trial.peak(micro)
        return measured[micro] is not None and measured[micro] <= (most if on_cpu else min(most, room()))

    return search(sizes, fits, measured if on_cpu else None, most), measured


def search(sizes: Sequence[int], fits: Callable[[int], bool], measured: dict[int, int | None] | None, most: int) -> int:
    """The largest of ``sizes`` (rising) that fits, by as few trials as bisection needs; 0 if none does.

    Args:
        measured: where given, the bytes that earlier trials took: sizes are then tried from below, and none that a straight
            line through them puts beyond ``most``.
    """
    low, high = -1, len(sizes)
    while high - low > 1:
        at = high - 1 if measured is None and high == len(sizes) else (low + high) // 2
        if measured is not None:
            while at > low + 1 and (low < 0 or sizes[at] > STRETCH * sizes[low] or memory.extrapolated(measured, sizes[at]) > most):
                at -= 1
            if memory.extrapolated(measured, sizes[at]) > most:
                high = at
                continue
        if fits(sizes[at]):
            low = at
        else:
            high = at
    return sizes[low] if low >= 0 else 0


def _of_loading(config: CfgNode, task: Task, local: int, device: torch.device) -> int:
    """Bytes of the batches that DataLoader workers hold ready; a matter of the CPU's memory alone."""
    (height, width), channels = task.input_size(config), input_channels(config)
    if device.type != "cpu":
        return 0
    return worker_count(config.DATA.NUM_WORKERS, launcher.local_world_size()) * BATCHES_AHEAD * local * channels * height * width * 4


class Trial:
    """A model in training as a run has it, compiled where the run's is, for steps on synthetic images."""

    def __init__(self, config: CfgNode, task: Task, local: int, num_classes: int, device: torch.device):
        precision = choose_precision(config, device)
        make_deterministic(device)
        require_compiler(device, config.COMPILE)
        self.config, self.local, self.num_classes = config, local, num_classes
        model = build_initial_model(config, task, num_classes)
        transform, _ = task.taught(config, task.batch_transform(config, num_classes, rank=0), precision)
        self.state, self.plan = assemble(config, task, model, device, precision, images=local, transform=transform)
        compile_model(model, config.COMPILE)

    def peak(self, micro: int) -> int | None:
        """Bytes taken at the peak of training in micro-batches of ``micro`` images; None when memory did not suffice."""
        found = memory.peak_of(lambda: two_steps(self.state, self.plan, self.config, self.local, micro, self.num_classes), self.plan.device)
        if found is None and compiled_part(self.config.COMPILE) != "off":
            forget_compiled()  # it is for a size of no use, and may have been left half-made
        if found is None or self.plan.step is Step:
            return found
        # A recorded step (COMPILE graphs) keeps its memory while the model is evaluated.
        there, evaluated = (memory.peak_of(work, self.plan.device) for work in (lambda: None, lambda: self._evaluate(micro)))
        return None if evaluated is None or there is None else found + evaluated - there

    @torch.inference_mode()
    def _evaluate(self, micro: int) -> None:
        """The forward pass of one batch of an evaluation; uncompiled, which takes no less memory."""
        task, images = self.plan.task, self.config.TEST.BATCH_SIZE or micro
        batch = task.synthetic_batch(self.config, images, self.num_classes, self.plan.device, torch.Generator().manual_seed(0))
        if not can_be_recorded(batch, self.plan.device):
            return
        with torch.compiler.set_stance("force_eager"), self.plan.precision.autocast():
            task.forward(self.state.model.eval(), batch)


def two_steps(state: TrainState, plan: StepPlan, config: CfgNode, local: int, micro: int, num_classes: int) -> None:
    """Two optimizer steps of two micro-batches at most, while a whole batch and the next one lie ready: the memory of any other step.

    The batch is transformed as in training (mixup), and a GPU prepares the next one meanwhile (augmentation). With
    TRAIN.BACKGROUND_SAVE a copy of the state lies beside it, as while a checkpoint is written.
    """
    device, generator = plan.device, torch.Generator().manual_seed(0)
    batch = plan.task.synthetic_batch(config, local, num_classes, device, generator)
    part = dataclasses.replace(plan, micro_batch=micro, images=micro, world_size=1)
    state.model.train()
    for module in part.fixed:
        module.eval()
    parameters: list[nn.Parameter] = [p for p in state.model.parameters() if p.requires_grad]
    kept = state.state_dict(copy=True) if config.TRAIN.BACKGROUND_SAVE and device.type == "cpu" else None
    following, side = None, torch.cuda.Stream(device) if device.type == "cuda" else None
    try:
        for step in range(2):
            with contextlib.nullcontext() if side is None else torch.cuda.stream(side):  # whose memory no other stream takes over
                following = plan.task.next_images(config, local, device)
            mixed = plan.transform(batch, step)
            for micro_batch in plan.task.split(mixed, max(1, math.ceil(local / micro)))[:2]:
                backward(state.model, micro_batch, part, step)
            nn.utils.clip_grad_norm_(parameters, plan.clip)
            for parameter in parameters:  # the step is for its memory; weights stay what they are, but for their decay
                if parameter.grad is not None:
                    parameter.grad.zero_()
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            if state.ema is not None:
                state.ema.update(1)
    finally:
        state.optimizer.zero_grad(set_to_none=True)
        del kept, batch, following


def keep_global_batch(config: CfgNode, wanted: int, whose: str, world_size: int, logger: logging.Logger) -> CfgNode:
    """The config with batch and accumulation that give a global batch of ``wanted`` images on this many processes.

    Args:
        whose: of whom it is: ``the checkpoint's`` or ``the recipe's``.
    """
    micro = config.DATA.BATCH_SIZE
    if micro * config.TRAIN.ACCUMULATION_STEPS * world_size == wanted:
        return config
    local = local_batch(wanted, whose, world_size)
    micro = max(n for n in divisors(local) if n <= micro)
    logger.log(NOTICE, f"{whose} global batch of {wanted} is kept: {micro} images x {local // micro} accumulated x "
                f"{world_size} processes")
    return split_batch(config, local, micro, whose)


def fit_micro_batch(config: CfgNode, task: Task, start: Start, device: torch.device, world_size: int, logger: logging.Logger) -> CfgNode:
    """The config with the largest micro-batch that memory holds; the global batch is the checkpoint's, or the recipe's."""
    whose = "the recipe's" if start.content is None else "the checkpoint's"
    wanted = recipe_batch(config, world_size) if start.content is None else start.content["global_batch"]
    local = local_batch(wanted, whose, world_size)
    distributed.begin_phase("looking for the largest micro-batch")
    num_classes = config.MODEL.NUM_CLASSES or len((start.content or {}).get("classes", ()))
    if not num_classes or config.TRAIN.DISTILLATION.TEACHER:  # which is looked for by the classes
        num_classes = len(open_loaders(task, config, device, logger, splits=("train",)).classes)
    micro, line = largest_micro_batch(config, task, local, num_classes, device)
    logger.info(f"fit: {micro} images x {local // micro} accumulated x {world_size} processes = {wanted}, {whose} global batch, so that "
                f"learning rate and steps stay; {line}")
    return split_batch(config, local, micro, whose)
