"""Speed and memory of the model alone: forward pass and training step, without data loading."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from yacs.config import CfgNode

from config import image_size
from utils.profiling.step_memory import measure_step
from utils.runtime.compile import compiled_graphs
from utils.runtime.device import synchronize
from utils.runtime.precision import Precision
from utils.training.engine import Progress, StepPlan, train_one_epoch
from utils.training.setup import prepare_step

ROUNDS, WARM_UP, BUDGET = 30, 3, 20.0  # rounds at most, rounds not counted, seconds a measurement may take


def measure(model: nn.Module, config: CfgNode, device: torch.device, precision: Precision) -> Iterator[str]:
    """Yield a line on the forward pass, one on the training step, medians over the rounds, and one on the step's memory.

    The step is that of training (``engine.train_one_epoch``) with the recipe's mixup, optimizer and average of weights, on one
    micro-batch of made-up images.
    """
    images, targets = made_up_batch(config, device)
    batch = len(images)
    state, plan = prepare_step(model, config, device, precision)

    @torch.inference_mode()
    def forward() -> None:
        with precision.autocast():
            model(images)

    model.eval()
    clock = _Clock(device)
    for _ in range(ROUNDS + WARM_UP):
        forward()
        if clock.enough():
            break
    yield f"throughput forward: {clock.line(batch, precision)}"

    batches = itertools.repeat((images, targets))

    def train(plan: StepPlan, steps: int, after: Callable[[], None]) -> None:
        train_one_epoch(model, state, batches, state.step + steps, plan, Progress(device), lambda state, progress: after())

    clock = _Clock(device)
    with contextlib.suppress(_Enough):
        train(plan, ROUNDS + WARM_UP, clock.check)
    yield f"throughput training: {clock.line(batch, precision)}"
    if config.COMPILE != "off":
        yield f"compiled {config.COMPILE}: {compiled_graphs()} graphs, the first training step took {clock.first:.1f} s"
    memory = measure_step(state, plan, lambda watched: train(watched, 1, lambda: None), images.nbytes + targets.nbytes)
    if memory is not None:
        yield memory.line()


def multiply_adds(model: nn.Module, size: tuple[int, int]) -> int:
    """Those of the forward pass of one image of ``size`` (height, width); leaves ``model`` in evaluation mode."""
    images = torch.zeros(1, 3, *size, device=next(model.parameters()).device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(images)
    return counter.get_total_flops() // 2


def made_up_batch(config: CfgNode, device: torch.device) -> tuple[Tensor, Tensor]:
    """Noise (B, 3, H, W) and classes (B,) in the config's sizes, on ``device``."""
    generator, batch = torch.Generator().manual_seed(config.SEED), config.DATA.BATCH_SIZE
    images = torch.randn(batch, 3, *image_size(config), generator=generator)
    targets = torch.randint(config.MODEL.NUM_CLASSES or 1000, (batch,), generator=generator)
    return images.to(device), targets.to(device)


class _Enough(Exception):
    """The time for a measurement is up."""


class _Clock:
    """Times of rounds, the first few left out."""

    def __init__(self, device: torch.device):
        self.device, self.times, self.rounds, self.first = device, [], 0, 0.0
        synchronize(device)
        self.begun = self.last = time.perf_counter()

    def enough(self) -> bool:
        """Note the end of a round; whether there were enough of them for the time they take."""
        synchronize(self.device)
        now = time.perf_counter()
        self.rounds += 1
        if self.rounds == 1:
            self.first = now - self.begun
            self.begun = now  # compilation does not count
        if self.rounds > WARM_UP:
            self.times.append(now - self.last)
        self.last = now
        return len(self.times) >= 3 and now - self.begun > BUDGET

    def check(self) -> None:
        """As ``enough``, by an exception."""
        if self.enough():
            raise _Enough

    def line(self, batch: int, precision: Precision) -> str:
        median = statistics.median(self.times)
        return (f"{batch / median:.1f} images/s (batch {batch}, {1000 * median:.1f} ms, median of {len(self.times)}, "
                f"{precision.name} on {self.device})")
