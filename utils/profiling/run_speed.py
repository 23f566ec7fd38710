"""Measures the speed of training steps, loading and evaluation as a run would have them."""

from __future__ import annotations

import contextlib
import itertools
import logging
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from utils.evaluation.loop import evaluate
from utils.loggers.progress import track
from utils.runtime import distributed
from utils.runtime.device import synchronize
from utils.tasks.base import Batch
from utils.training.engine import Progress, train_one_epoch
from utils.training.setup import Prepared

WARM_UP, FEWEST, MOST = 2, 2, 40  # steps not timed; timed steps, at least and at most
RECORDING = 2  # more steps not timed on CUDA, whose fourth step may be recorded


@dataclass(frozen=True)
class Speed:
    """Seconds, the slowest process's: of a step on a batch that lies ready, of a batch from the loader alone, of a step with the
    loader at work, and of an evaluation."""

    step: float
    batch: float
    both: float
    evaluation: float | None


def measure(ready: Prepared, logger: logging.Logger) -> Speed:
    """The speeds of the run, through the real loader, loop and evaluation; the run's state is left at the step where it was."""
    state, loaders, seconds = ready.state, ready.loaders, ready.config.PLAN.SECONDS
    model, first = distributed.wrap(
        state.model, ready.device, ready.config.TRAIN.ACCUMULATION_STEPS, ready.config.TRAIN.GRAD_COMPRESSION), state.step
    batches = _endless(loaders, first)
    one = next(batches)
    distributed.begin_phase("planning: steps")
    ready_batches = itertools.repeat(one)
    on_cuda = ready.device.type == "cuda"
    trial = _timed_steps(model, ready, ready_batches, WARM_UP + RECORDING * on_cuda, waits=True)[-1]
    step = statistics.median(_timed_steps(model, ready, ready_batches, _agreed(seconds / trial), waits=not on_cuda))
    distributed.begin_phase("planning: loading")
    batch = _loading_seconds(batches, loaders.train.num_workers, ready.device, seconds / 2)
    workers = loaders.train.num_workers
    distributed.begin_phase("planning: steps with loading")
    number = max(_agreed(2 * seconds / max(step, batch)), _agreed(2 * workers))
    both = statistics.mean(_timed_steps(model, ready, batches, number, waits=not on_cuda))
    distributed.begin_phase("planning: evaluation")
    evaluation = _evaluation_seconds(ready, logger)
    every = distributed.gather_objects((step, batch, both, evaluation or 0.0))
    step, batch, both, longest = (max(column) for column in zip(*every, strict=True))
    return Speed(step, batch, max(both, step, batch), longest or None)


def _agreed(number: float) -> int:
    """A number of steps that is the same on every rank, within bounds."""
    return min(MOST, max(FEWEST, int(distributed.gather_objects(number)[0])))


def _endless(loaders: Any, start: int) -> Iterator[Batch]:
    while True:
        yield from loaders.batches(start)
        start = 0


def _timed_steps(model: nn.Module, ready: Prepared, batches: Iterable[Batch], number: int, waits: bool) -> list[float]:
    """Seconds of each of ``number`` steps through the real loop; the run's step count stays.

    Args:
        waits: for the device after each of them; else at the end alone, as a run does, and the mean is the one number.
    """
    state, times, first = ready.state, [], ready.state.step
    then = time.perf_counter()

    def after_step(*_: Any) -> None:
        nonlocal then
        if not waits and state.step < first + number:
            return
        synchronize(ready.device)
        now = time.perf_counter()
        times.append((now - then) / (1 if waits else number))
        then = now

    train_one_epoch(model, state, iter(batches), first + number, ready.plan, Progress(ready.device), after_step)
    state.step = first
    return times


def _loading_seconds(batches: Iterator[Any], workers: int, device: torch.device, least: float) -> float:
    """Seconds of a batch when nothing else is done: over whole rounds of the DataLoader workers, which finish together at first."""
    for _ in range(1 + 3 * workers):  # what they had ready
        next(batches)
    begun, number = time.perf_counter(), 0
    while number < MOST:
        next(batches)
        number += 1
        if number % max(1, workers) == 0 and time.perf_counter() - begun > least:
            break
    synchronize(device)
    return (time.perf_counter() - begun) / number


def _evaluation_seconds(ready: Prepared, logger: logging.Logger) -> float | None:
    """Seconds of a whole evaluation, from a few batches of it; None where their number is unknown."""
    loader, state = ready.loaders.val, ready.state
    taken = min(len(loader) or 1, 1 + max(1, ready.loaders.val.num_workers))
    arrived: list[float] = []

    def timed() -> Iterator[Any]:
        for item in itertools.islice(loader, taken):
            arrived.append(time.perf_counter())
            yield item

    begun = time.perf_counter()
    with contextlib.nullcontext() if state.ema is None else state.ema.on(ready.device) as average:
        models = [state.model] if average is None else [state.model, average]
        evaluate(ready.plan.task, models, track(timed(), taken, "evaluating", logger), ready.device, ready.plan.precision)
        synchronize(ready.device)
    ended = time.perf_counter()
    # the first batch is computed before the second is asked for, so the stretch from its arrival holds as many passes as batches
    each = (ended - arrived[0]) / len(arrived)
    return (arrived[0] - begun) + each * len(loader) if len(loader) else None
