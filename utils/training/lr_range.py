"""A learning-rate range test: training steps at rising rates, until the loss runs away.

Smith, "Cyclical Learning Rates for Training Neural Networks" (WACV 2017).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from utils.checkpoints.state import TrainState
from utils.runtime import distributed
from utils.tasks.base import Batch
from utils.training.engine import NumericError, Progress, StepPlan, train_one_epoch

SMOOTHING = 0.9  # share of the mean of the losses before that a step keeps
RUNAWAY = 3.0  # times the distance from the start down to the lowest mean, above the start, at which the test ends
FIRST = 10  # steps by which a mean says something


@dataclass(frozen=True)
class Sweep:
    """Rates that rise evenly in their logarithm, from ``low`` at step ``first`` to ``high``, ``steps`` of them; a schedule."""

    low: float
    high: float
    steps: int
    first: int = 0

    def lr_at(self, step: int) -> float:
        return self.low * (self.high / self.low) ** ((step - self.first) / max(1, self.steps - 1))


@dataclass
class RangeTest:
    """What a sweep found: a rate and a loss a step, the mean of the losses so far, and the rate to train with, None where none stands out.

    Attributes:
        ran_away: the loss did, so that the test ended before its last rate.
    """

    rates: list[float]
    losses: list[float]
    means: list[float]
    suggested: float | None
    ran_away: bool


class _Enough(Exception):
    """The loss has run away."""


def run_sweep(model: nn.Module, state: TrainState, batches: Iterator[Batch], plan: StepPlan, sweep: Sweep) -> RangeTest:
    """Train ``model`` over the rates of ``sweep``, by the steps that a run would have; the weights are spoilt."""
    rates: list[float] = []
    losses: list[float] = []

    def look(state: TrainState, progress: Progress) -> None:
        step, loss, norm = progress.steps.pop()
        mean = float(distributed.all_reduce_sum(loss.detach().clone())) / plan.images
        if not (math.isfinite(mean) and bool(norm.isfinite())):
            raise _Enough
        rates.append(sweep.lr_at(step))
        losses.append(mean)
        means = smoothed(losses)
        if len(losses) > FIRST and means[-1] > means[0] + RUNAWAY * max(means[0] - min(means), 0.05 * abs(means[0])):
            raise _Enough

    ran_away = False
    try:
        train_one_epoch(model, state, batches, sweep.first + sweep.steps, dataclasses.replace(plan, schedule=sweep),
                        Progress(plan.device, first_step=state.step), look)
    except (_Enough, NumericError):
        ran_away = True
    means = smoothed(losses)
    return RangeTest(rates, losses, means, suggestion(rates, means), ran_away)


def smoothed(losses: Sequence[float]) -> list[float]:
    """The running mean of the losses, its start corrected as Adam's is."""
    means, mean = [], 0.0
    for number, loss in enumerate(losses, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        means.append(mean / (1 - SMOOTHING ** number))
    return means


def suggestion(rates: Sequence[float], means: Sequence[float]) -> float | None:
    """The rate at which the smoothed loss falls fastest by the logarithm of the rate, before its lowest point; None if it never falls."""
    lowest = min(range(len(means)), key=means.__getitem__, default=0)
    if lowest < FIRST:
        return None
    wide = max(1, len(means) // 20)  # steps on either side that a slope is taken over
    places = range(wide, lowest)
    slopes = {at: (means[min(at + wide, len(means) - 1)] - means[at - wide]) for at in places}
    steepest = min(slopes, key=slopes.__getitem__, default=None)
    return rates[steepest] if steepest is not None and slopes[steepest] < 0 else None
