"""What is said of training: the line every PRINT_FREQ steps, and the live line of a terminal."""

from __future__ import annotations

import logging
import math
import time

from utils.checkpoints.state import TrainState
from utils.loggers.progress import SLOW, LiveLine, clock, log_periodic
from utils.loggers.run_log import Records
from utils.runtime.device import peak_memory_mib
from utils.training.engine import Progress, StepPlan


class StepLog:
    """The lines of a run's steps; rank 0's business.

    Args:
        total_steps, steps_per_epoch: of the whole run.
        local_images: images of a step on this process.
        records: where the figures of each line go.

    Attributes:
        started: when this start of the run began to train.
    """

    def __init__(self, state: TrainState, plan: StepPlan, total_steps: int, steps_per_epoch: int, local_images: int,
                 records: Records | None, logger: logging.Logger):
        self.state, self.plan, self.total_steps, self.steps_per_epoch = state, plan, total_steps, steps_per_epoch
        self.epochs, self.local_images = -(-total_steps // steps_per_epoch), local_images
        self.records, self.logger = records, logger
        self.started = self._said_at = time.perf_counter()
        self._first_step = state.step
        self._loss = math.nan  # as in the last line
        self._live: LiveLine | None = None

    def begin_epoch(self, progress: Progress) -> None:
        self._live = LiveLine(self._steps_of(self.state.step), self._live_parts, self.state.step % self.steps_per_epoch)
        self._said_at = time.perf_counter()
        self.begin_window(progress)

    def _steps_of(self, step: int) -> int:
        """Steps of the epoch that ``step``, from 0, lies in; the last one may be shorter."""
        return min(self.steps_per_epoch, self.total_steps - step // self.steps_per_epoch * self.steps_per_epoch)

    def begin_window(self, progress: Progress) -> None:
        """The next line's figures are means from here on."""
        self._window = (time.perf_counter(), self.state.step, progress.data_wait.seconds(), progress.loss_sum.item(), progress.counted)

    def end_epoch(self) -> None:
        if self._live is not None:
            self._live.close()

    def at(self, step_in_epoch: int) -> None:
        """Move the live line."""
        if self._live is not None:
            self._live.update(step_in_epoch)

    def is_silent(self) -> bool:
        """Whether so much time has passed since the last line that one is due, whatever PRINT_FREQ says."""
        return time.perf_counter() - self._said_at > SLOW

    def write(self, progress: Progress, norm: float, last: bool = False) -> None:
        """Say and record the means since the last line.

        Args:
            norm: of the gradients of the last step.
            last: the line is an epoch's last, which the terminal keeps, too.
        """
        state, plan = self.state, self.plan
        then, step, waited_then, loss_sum, counted = self._window
        now, total, waited = time.perf_counter(), progress.loss_sum.item(), progress.data_wait.seconds()
        steps, seconds = state.step - step, now - then
        if not steps:
            return
        good = progress.counted - counted
        self._loss = loss = (total - loss_sum) / (good * self.local_images) if good > 0 else math.nan
        within = (state.step - 1) % self.steps_per_epoch + 1
        pace = (now - self.started) / (state.step - self._first_step)
        epoch, steps_of_epoch = (state.step - 1) // self.steps_per_epoch + 1, self._steps_of(state.step - 1)
        lr, speed, waiting = plan.schedule.lr_at(state.step - 1), steps * plan.images / seconds, (waited - waited_then) / seconds
        line = (f"epoch {epoch}/{self.epochs} step {within}/{steps_of_epoch} lr {lr:.3e} loss {loss:.4f} grad {norm:.3f} "
                f"{speed:.0f} images/s data {100 * waiting:.0f}% mem {peak_memory_mib(plan.device)} MiB "
                f"eta {clock(pace * (steps_of_epoch - within))} epoch, {clock(pace * (self.total_steps - state.step))} run")
        self.logger.info(line) if last else log_periodic(self.logger, line)
        self._said_at = now
        if self.records is not None:
            self.records.step(state.step, finite_or_none(loss), finite_or_none(norm), lr, speed, waiting)
        self._window = (now, state.step, waited, total, progress.counted)

    def _live_parts(self, done: int, pace: float) -> tuple[str, list[str]]:
        """The live line after ``done`` steps of the epoch, at ``pace`` steps a second. The loss is that of the last line."""
        step = max(0, self.state.step - 1)
        steps_of_epoch = self._steps_of(step)
        parts, deciding = [f"loss {self._loss:.4f}"] if math.isfinite(self._loss) else [], self.plan.task.best
        if deciding.name in self.state.best:
            parts.append(f"best {deciding.shown(self.state.best[deciding.name])}")
        if pace:
            parts += [f"{clock((self.total_steps - self.state.step) / pace)} left", f"{pace * self.plan.images:.0f} images/s",
                      f"{clock((steps_of_epoch - done) / pace)} in this epoch"]
        return (f"epoch {step // self.steps_per_epoch + 1}/{self.epochs} step {done}/{steps_of_epoch}",
                [*parts, f"lr {self.plan.schedule.lr_at(step):.2e}"])


def finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
