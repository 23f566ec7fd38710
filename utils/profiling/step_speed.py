"""Speed and memory of the model alone: forward pass and training step, without data loading."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from yacs.config import CfgNode

from utils.profiling.step_memory import measure_step
from utils.runtime.compile import compiled_graphs, compiled_part
from utils.runtime.device import synchronize
from utils.runtime.precision import Precision
from utils.tasks.base import Task
from utils.training.assembly import synthetic_step
from utils.training.engine import Progress, Step, StepPlan, train_one_epoch

ROUNDS, WARM_UP, BUDGET = 30, 3, 20.0  # rounds at most, steps not counted, seconds a measurement may take
STEPS = 20  # of a round on CUDA: waiting for the device after each would hide how far the host falls behind it, or add to every step


def measure(task: Task, config: CfgNode, device: torch.device, precision: Precision) -> Iterator[str]:
    """Yield a line on the forward pass, one on the training step, medians over the rounds, and one on the step's memory.

    The step is that of training (``engine.train_one_epoch``) with the recipe's mixup, optimizer and average of weights, on one
    micro-batch of synthetic images; with COMPILE graphs recorded and replayed, but for its memory.
    """
    said: list[str] = []
    state, plan, batch = synthetic_step(config, task, device, precision, say=said.append)
    model, size = state.model, config.DATA.BATCH_SIZE

    @torch.inference_mode()
    def forward() -> None:
        with precision.autocast():
            task.forward(model, batch)

    model.eval()
    clock = _Clock(device)
    for _ in range(clock.most):
        forward()
        if clock.enough():
            break
    yield f"throughput forward: {clock.line(size, precision)}"

    batches = itertools.repeat(batch)

    def train(plan: StepPlan, steps: int, after: Callable[[], None]) -> None:
        train_one_epoch(model, state, batches, state.step + steps, plan, Progress(device), lambda state, progress: after())

    clock = _Clock(device)
    with contextlib.suppress(_Enough):
        train(plan, clock.most, clock.check)
    yield f"throughput training: {clock.line(size, precision)}"
    if (compiled := compiled_part(config.COMPILE)) != "off":
        yield f"compiled {compiled}: {compiled_graphs()} graphs, the first training step took {clock.first:.1f} s"
    yield from said
    plan = dataclasses.replace(plan, step=Step)  # what was recorded gives its memory back
    memory = measure_step(state, plan, lambda watched: train(watched, 1, lambda: None), sum(part.nbytes for part in batch))
    if memory is not None:
        yield memory.line()


def multiply_adds(model: nn.Module, size: tuple[int, int], channels: int = 3) -> int:
    """Those of the forward pass of one image of ``size`` (height, width); leaves ``model`` in evaluation mode."""
    images = torch.zeros(1, channels, *size, device=next(model.parameters()).device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(images)
    return counter.get_total_flops() // 2


class _Enough(Exception):
    """The time for a measurement is up."""


class _Clock:
    """Seconds of a step, by rounds of one, or on CUDA of ``STEPS``, those of the first few steps left out.

    Attributes:
        first: seconds of the first step.
        most: steps that there are to be, unless there is no time for them.
    """

    def __init__(self, device: torch.device):
        self.device, self.times, self.steps, self.first = device, [], 0, 0.0
        self.round = STEPS if device.type == "cuda" else 1
        self.untimed = WARM_UP if self.round == 1 else 1 + self.round  # which has room for a recording
        self.most = self.untimed + ROUNDS * self.round
        synchronize(device)
        self.begun = self.last = time.perf_counter()

    def enough(self) -> bool:
        """Note the end of a step; whether there were enough of them for the time they take."""
        self.steps += 1
        if (self.steps - self.untimed) % self.round:
            return False
        synchronize(self.device)
        now = time.perf_counter()
        if self.steps == 1:
            self.first = now - self.begun
            self.begun = now  # compilation does not count
        if self.steps > self.untimed:
            self.times.append((now - self.last) / self.round)
        self.last = now
        return len(self.times) >= 3 and now - self.begun > BUDGET

    def check(self) -> None:
        """As ``enough``, by an exception."""
        if self.enough():
            raise _Enough

    def line(self, batch: int, precision: Precision) -> str:
        median = statistics.median(self.times)
        rounds = f"{len(self.times)}" + (f" rounds of {self.round}" if self.round > 1 else "")
        return (f"{batch / median:.1f} images/s (batch {batch}, {1000 * median:.1f} ms, median of {rounds}, "
                f"{precision.name} on {self.device})")
