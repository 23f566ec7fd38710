"""The epochs of a run around the hot path: records, evaluation, checkpoints, stops, and steps that went wrong."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from torch import Tensor, nn
from yacs.config import CfgNode

from data import preprocessing
from models.safe_load import CheckpointError
from utils.checkpoints.background_saver import Saver
from utils.checkpoints.file_format import describe
from utils.checkpoints.folder import CheckpointFolder
from utils.checkpoints.state import TrainState
from utils.evaluation.data_messages import decoding, tell_uncounted
from utils.evaluation.loop import Evaluation, evaluate
from utils.evaluation.predictions_file import FILE as PREDICTIONS
from utils.evaluation.recorder import Recorder, recordable, write_outcomes
from utils.loggers.console import RESULT
from utils.loggers.metrics_files import EVIDENCE
from utils.loggers.progress import SLOW, Line, clock, periodic, track
from utils.loggers.run_log import Records
from utils.runtime import distributed
from utils.runtime.compile import compiled_graphs
from utils.runtime.device import device_name, peak_memory_mib
from utils.runtime.stop_signals import Stopped, StopRequest
from utils.training.engine import NumericError, Progress, StepPlan, train_one_epoch
from utils.training.nonfinite import FORGIVEN_AFTER, _shown, _stacked
from utils.training.step_log import _finite


class SaveError(RuntimeError):
    """The run ended, but its last checkpoint could not be written (exit status 1)."""


class Session:
    """A run from where ``state`` stands to its last epoch."""

    def __init__(self, config: CfgNode, files: CheckpointFolder, state: TrainState, plan: StepPlan, loaders: Any, global_batch: int,
                 stop: StopRequest, logger: logging.Logger, saved: bool = False):
        """``saved``: the folder holds a checkpoint of just this state."""
        self.config, self.files, self.state, self.plan, self.loaders, self.logger = config, files, state, plan, loaders, logger
        self.folder, self.stop, self.sampler = files.folder, stop, loaders.train.batch_sampler
        self.steps_per_epoch, self.total_steps = self.sampler.steps_per_epoch, self.sampler.total_steps
        self.main = distributed.is_main()
        self.description = describe(config.dump(), loaders.classes, preprocessing(config), config.DATA.DATA_PATH,
                                               global_batch, self.steps_per_epoch)
        self.saver = Saver(files, config.TRAIN.BACKGROUND_SAVE, state.best, logger)
        if self.main:
            self.records = Records(config, self.folder, state.step, state.evaluated, self._facts(), logger)
        self.begun = self.saved_at = time.perf_counter()
        self.first_step, self.saved_step, self.sound_step = state.step, state.step if saved else -1, -1
        self.loss = math.nan  # as in the last step line
        self.norm = math.nan  # of the gradients of the last step looked at
        self.window = (self.begun, state.step, 0.0, 0.0, 0)  # time, step, data seconds, loss sum and its steps at the last line
        self.said_at = self.begun  # when the last step line was written
        self.loader_failed, self.asked = False, False  # asked: for a save, in the middle of an evaluation

    # ------------------------------------------------------------------------------------------
    # The epochs
    # ------------------------------------------------------------------------------------------

    def train(self, model: nn.Module) -> None:
        """Train ``model``, which is ``state.model`` or that under DDP.

        Raises:
            Stopped: a signal asked for it; everything is saved.
            SaveError: training is done, its result could not be saved.
            NumericError: too many steps were not finite.
        """
        try:
            self._train(model)
        except Exception as error:
            with contextlib.suppress(Exception):
                self.saver.wait()  # what is being written is good, whatever else is not
            if self.main:
                what = "stopped" if isinstance(error, Stopped) else "failed"
                self.records.event(what, self.state.step, reason=str(error)[:300] or type(error).__name__)
            raise
        finally:
            if self.main:
                self.records.close()

    def _train(self, model: nn.Module) -> None:
        state, self.stop.training = self.state, True
        batches = self._watched(self.loaders.batches(state.step))
        epoch, within = divmod(state.step, self.steps_per_epoch)
        progress = Progress(self.plan.device, first_step=state.step)
        if within or state.evaluated != state.step:  # in the middle of an epoch, or between its last step and its end
            progress.loss_sum += self._restored_loss_sum()
            progress.counted = state.loss_steps
        if state.evaluated != state.step and not within:
            self.end_epoch(epoch, progress)
            progress = Progress(self.plan.device, first_step=state.step)
        for epoch in range(epoch, self.config.TRAIN.EPOCHS):  # noqa: B020
            self.window = (time.perf_counter(), state.step, 0.0, progress.loss_sum.item(), progress.counted)
            self.line = Line(self.steps_per_epoch, self._live_parts, state.step % self.steps_per_epoch)
            self.said_at = time.perf_counter()
            try:
                train_one_epoch(model, state, batches, (epoch + 1) * self.steps_per_epoch, self.plan, progress, self.after_step)
            except Exception:
                if self.loader_failed and distributed.world_size() == 1 and self.saved_step != state.step:
                    self.save(progress, best=False)  # the state is that of a whole step
                    self.saver.wait()
                    if not self.saver.failed:
                        self.logger.info(f"saved {self.files.path(state.step)}")
                raise
            self.line.close()
            self.end_epoch(epoch + 1, progress)
            if state.step < self.total_steps:
                stop, save, _ = self.stop.agreed()
                if stop:
                    self.leave(progress)
                if save and self.saved_step != state.step:
                    self.save(progress, best=False)
            progress = Progress(self.plan.device, first_step=state.step)
        self.logger.info(f"training images {decoding(self.loaders.train)}")
        self.saver.wait()
        if self.saver.failed:
            raise SaveError(f"training is done, but its last checkpoint was not saved: {self.saver.failed}; {self._newest()}")
        self.logger.info(f"finished {self.config.TRAIN.EPOCHS} epochs in {clock(time.perf_counter() - self.begun)}{best_line(state.best)}; "
                         f"checkpoints in {self.folder}", extra=RESULT)
        if self.main:
            self.records.finish(state.step, state.best)

    def _facts(self) -> dict[str, Any]:
        """Of this start, for the run's history; nothing that names the machine."""
        sources = dict(train=self.loaders.train, val=self.loaders.val)
        data = {name: dict(images=len(loader.dataset.folder), fingerprint=loader.dataset.folder.fingerprint()[:16])
                for name, loader in sources.items()}
        plan = self.plan
        return dict(flags=sys.argv[1:], versions=self.description["versions"], git_commit=self.description["git_commit"],
                    device=device_name(plan.device), precision=plan.precision.name, processes=plan.world_size,
                    global_batch=self.description["global_batch"], steps_per_epoch=self.steps_per_epoch, data=data)

    def _watched(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """``batches``, noting when it is the loader that failed: the state is then that of the last whole step."""
        try:
            if self.main and self.state.step == 0:
                images, targets = next(batches)
                self.records.first_batch(images, self.description["preprocessing"])
                yield images, targets
            yield from batches
        except Exception:
            self.loader_failed = True
            raise

    def after_step(self, state: TrainState, progress: Progress) -> None:
        if state.step == self.first_step + 1 and self.config.COMPILE != "off":
            self.logger.info(f"compiled {self.config.COMPILE}: {compiled_graphs()} graphs, the first step took "
                             f"{time.perf_counter() - progress.start - progress.data_seconds:.1f} s")
        within = state.step % self.steps_per_epoch  # 0 after the last step of an epoch
        last = within == 0
        line = within % self.config.PRINT_FREQ == 0 or last
        if line or self.plan.device.type == "cpu":
            self.inspect(progress)
        if self.main:
            self.saver.poll()
            self.line.at(within or self.steps_per_epoch)
            if line:
                self._log_line(progress, last)
            self.stop.look = time.perf_counter() - self.said_at > SLOW
            minutes = self.config.TRAIN.SAVE_EVERY_MINUTES
            if minutes and time.perf_counter() - self.saved_at > 60 * minutes:
                self.stop.save = True
        if last:
            return  # the epoch's end saves, and then looks whether to stop
        stop, save, look = self.stop.agreed()
        every = self.config.TRAIN.SAVE_EVERY_STEPS
        if look:
            self.inspect(progress)
            if self.main:
                self._log_line(progress)
        if stop:
            self.leave(progress)
        if save or (every and state.step % every == 0):
            self.save(progress, best=False)

    def end_epoch(self, epoch: int, progress: Progress) -> None:
        config, state, plan = self.config, self.state, self.plan
        seconds = time.perf_counter() - progress.start
        steps = state.step - progress.first_step
        loss_sum = distributed.all_reduce_sum(progress.loss_sum.clone()).item()
        final, every = state.step >= self.total_steps, config.TRAIN.SAVE_EVERY_STEPS
        row: dict[str, Any] = dict(
            epoch=epoch, step=state.step, train_loss=loss_sum / (progress.counted * plan.images) if progress.counted else None,
            top1=None, top5=None, val_loss=None, lr=plan.schedule.lr_at(state.step - 1),
            images_per_s=round(steps * plan.images / seconds, 2) if steps else None, seconds=round(seconds, 3))
        if progress.counted < self.steps_per_epoch:
            row["skipped_steps"] = self.steps_per_epoch - progress.counted
        due = final or epoch % config.SAVE_FREQ == 0 or bool(every and state.step % every == 0)
        best = False
        if epoch % config.TRAIN.EVAL_FREQ == 0 or final:
            if due and self.saved_step != state.step:
                self.save(progress, best=False)  # evaluation may take long, and what was trained stands
            result = self.evaluate(row, progress, final)
            state.best = distributed.gather_objects(self.saver.best_saved(state.best))[0]
            best = not state.best or result.top1 > state.best["top1"]
            if best:
                state.best = dict(top1=result.top1, epoch=epoch, step=state.step)
        if self.main:
            self.records.epoch(row)
            self.records.weights(epoch, state.step, state.model)
        state.evaluated = state.step
        progress.loss_sum.zero_()
        progress.counted = 0
        if best or due or self.asked:
            self.asked = False
            self.save(progress, best)

    def evaluate(self, row: dict[str, Any], progress: Progress, final: bool) -> Evaluation:
        """Judge raw and averaged weights; what comes last counts. Looks between batches whether to stop.

        The ``final`` evaluation leaves what became of every image in the run's folder.
        """
        state, plan, val = self.state, self.plan, self.loaders.val

        def poll() -> None:
            stop, save, _ = self.stop.agreed()
            self.asked |= save
            if stop:
                self.leave(progress)

        record = Recorder() if final and recordable(val) else None
        with contextlib.nullcontext() if state.ema is None else state.ema.on(plan.device) as average:
            models = [state.model] if average is None else [state.model, average]
            for model in models:
                distributed.broadcast_buffers(model)
            *raw, result = evaluate(models, track(val, len(val), "evaluating", self.logger), plan.device, plan.precision, poll, record)
        if record is not None:
            answers = record.answers(val)
            try:
                write_outcomes(answers, val, self.loaders.classes, os.path.join(self.folder, PREDICTIONS))
            except OSError as error:
                self.logger.warning(f"{self.folder}: {PREDICTIONS} cannot be written ({error.strerror})")
        tell_uncounted(val, result, self.logger)
        for other in raw:
            self.logger.info(f"raw {other.line()}")
            row.update(raw_top1=other.top1, raw_top5=other.top5, raw_val_loss=_finite(other.loss))
        self.logger.info(result.line(), extra=RESULT)
        row.update(top1=result.top1, top5=result.top5, val_loss=_finite(result.loss))
        return result

    # ------------------------------------------------------------------------------------------
    # Saving and stopping
    # ------------------------------------------------------------------------------------------

    def save(self, progress: Progress, best: bool) -> None:
        """Begin a checkpoint of the state as it is; never one of weights that are not finite."""
        self.inspect(progress)
        self.require_sound(progress)
        state = self.state
        state.loss_sums = distributed.gather_objects(progress.loss_sum.item())
        state.loss_steps = progress.counted
        if self.main:
            self.saver.save(state, self.description, best)
        self.saved_step, self.saved_at = state.step, time.perf_counter()

    def leave(self, progress: Progress) -> NoReturn:
        """Save unless that has just been done, and end the program once every rank is that far."""
        if self.saved_step != self.state.step:
            self.save(progress, best=False)
        self.saver.wait()
        # The exchange also keeps every rank here until rank 0 has written.
        names, failures = zip(*distributed.gather_objects((self.stop.name, self.saver.failed)), strict=True)
        name = next(filter(None, names), "a signal")
        if failures[0]:
            raise SaveError(f"stopped by {name}, but step {self.state.step} was not saved: {failures[0]}; {self._newest()}")
        command = "the same command" if self.config.TRAIN.AUTO_RESUME else "the same command without --restart"
        raise Stopped(f"stopped by {name}: saved {self.files.path(self.state.step)}; {command} continues from there")

    def _newest(self) -> str:
        steps = self.files.steps()
        return f"the newest checkpoint is {self.files.path(steps[0])}" if steps else f"{self.folder} holds no checkpoint"

    def _restored_loss_sum(self) -> float:
        sums = self.state.loss_sums
        if len(sums) == self.plan.world_size:
            return sums[self.plan.rank]
        return sum(sums) if self.main else 0.0  # another number of processes: only the total matters

    # ------------------------------------------------------------------------------------------
    # Numbers that are not finite
    # ------------------------------------------------------------------------------------------

    def inspect(self, progress: Progress) -> None:
        """Read the steps since the last look from the device, count those whose update was skipped, and act on them."""
        steps, progress.steps = progress.steps, []
        if not steps:
            return
        losses, norms = (_stacked(column).tolist() for column in ([s[1] for s in steps], [s[2] for s in steps]))
        self.norm = norms[-1]
        bad = [(step, loss, norm) for (step, *_), loss, norm in zip(steps, losses, norms, strict=True) if not math.isfinite(norm)]
        progress.counted += len(steps) - len(bad)
        if bad:
            self._skipped(bad, progress)
        self.state.skipped = max(0, self.state.skipped - sum((step + 1) % FORGIVEN_AFTER == 0 for step, *_ in steps))

    def _skipped(self, bad: list[tuple[int, float, float]], progress: Progress) -> None:
        """Evidence of the steps ``bad`` of (step, this rank's loss, gradient norm); beyond the budget, back to a good checkpoint."""
        budget, state = self.config.TRAIN.SKIP_BUDGET, self.state
        evidence = os.path.join(self.folder, EVIDENCE)
        losses = distributed.gather_objects([loss for _, loss, _ in bad])
        state.skipped += len(bad)
        if self.main:
            self._write_evidence(evidence, [self._describe_step(step, norm, [of_rank[i] for of_rank in losses])
                                            for i, (step, _, norm) in enumerate(bad)])
            for i, (step, _, norm) in enumerate(bad):
                self.logger.warning(f"step {step + 1} was skipped, its update would not be finite (loss "
                                 f"{sum(of_rank[i] for of_rank in losses) / self.plan.images:g}, gradient norm {norm:g}); its images are "
                                 f"listed in {evidence}")
        if state.skipped > budget:
            any_loss = any(not math.isfinite(loss) for of_rank in losses for loss in of_rank)
            self.recover(NumericError(
                f"{state.skipped} steps were not finite (the last: step {bad[-1][0] + 1}, in its "
                f"{'loss' if any_loss else 'gradients alone'}), more than the {budget} of TRAIN.SKIP_BUDGET; "
                f"{self._advice(any_loss)}; evidence in {evidence}"), progress)

    def _describe_step(self, step: int, norm: float, losses: list[float]) -> dict[str, Any]:
        source, plan = self.loaders.train.dataset.folder, self.plan
        keys = [self.sampler.keys(step, rank) for rank in range(plan.world_size)]
        parameters = {name: p for name, p in self.state.model.named_parameters() if not p.isfinite().all()}
        return dict(
            step=step + 1, epoch=1 + step // self.steps_per_epoch, loss_sum_by_rank=[_shown(loss) for loss in losses],
            gradient_norm=_shown(norm), lr=plan.schedule.lr_at(step), precision=plan.precision.name,
            loss_scale=plan.precision.scaler.get_scale() if plan.precision.scaler.is_enabled() else None,
            weights_not_finite=list(parameters)[:10], images_by_rank=[[source.path(index) for _, index, _ in of_rank] for of_rank in keys])

    def _write_evidence(self, path: str, rows: list[dict[str, Any]]) -> None:
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
        except OSError as error:
            self.logger.warning(f"{path}: cannot be written ({error.strerror})")

    def _advice(self, in_loss: bool) -> str:
        if self.plan.precision.name == "fp16":
            return "use --precision bf16 or fp32"
        return "lower TRAIN.BASE_LR or lengthen the warm-up" + ("" if in_loss else ", or lower TRAIN.CLIP_GRAD")

    def require_sound(self, progress: Progress) -> None:
        """Make sure that the weights are finite: others must not replace a good checkpoint. Back to that if they are not."""
        if self.sound_step == self.state.step:
            return
        tensors = [t for t in self.state.model.state_dict().values() if t.is_floating_point()]
        norm = distributed.all_reduce_sum(nn.utils.get_total_norm(tensors).double().cpu()).item()
        if not math.isfinite(norm):
            self.recover(NumericError(f"the weights are not finite after step {self.state.step}; {self._advice(True)}"), progress)
        self.sound_step = self.state.step

    def recover(self, error: NumericError, progress: Progress) -> None:
        """Go back to the newest good checkpoint and pass over the data since; raise ``error`` when that is not to be had.

        The steps between would only lead to the same place again: everything random in them is determined.
        """
        state, within = self.state, self.state.step - self.state.evaluated
        self.saver.wait()
        found = None
        if self.main and state.rollbacks < self.config.TRAIN.ROLLBACKS:
            with contextlib.suppress(CheckpointError):
                found = self.files.newest()
        shared = self.files.share(found)
        if shared is None:
            raise NumericError(f"{error}; {self._newest()}") from None
        path, content = shared
        kept = (state.step, state.rollbacks + 1, state.evaluated, state.best)
        state.load_state_dict(content, path)
        back = kept[0] - state.step
        if back < within:  # the same epoch: what it had seen then counts
            progress.loss_sum.zero_().add_(self._restored_loss_sum())
            progress.counted = state.loss_steps
        else:
            progress.loss_sum.zero_()
            progress.counted = 0
        state.skipped = 0
        state.step, state.rollbacks, state.evaluated, state.best = kept
        self.window = (time.perf_counter(), state.step, progress.data_seconds, progress.loss_sum.item(), progress.counted)
        self.logger.warning(f"{error}: back to {path}, passing over the {back} steps since (rollback {state.rollbacks} of "
                         f"{self.config.TRAIN.ROLLBACKS})")
        if self.main:
            self.records.event("rollback", state.step, to=kept[0] - back)

    # ------------------------------------------------------------------------------------------
    # What is said
    # ------------------------------------------------------------------------------------------

    def _log_line(self, progress: Progress, last: bool = False) -> None:
        """``last``: of an epoch; this one the terminal keeps, too."""
        state, plan = self.state, self.plan
        then, step, data_seconds, loss_sum, counted = self.window
        now, total = time.perf_counter(), progress.loss_sum.item()
        steps, seconds = state.step - step, now - then
        if not steps:
            return
        good = progress.counted - counted
        self.loss = loss = (total - loss_sum) / (good * self.sampler.local_images()) if good > 0 else math.nan
        within = (state.step - 1) % self.steps_per_epoch + 1
        pace = (now - self.begun) / (state.step - self.first_step)
        epoch = (state.step - 1) // self.steps_per_epoch + 1
        lr = plan.schedule.lr_at(state.step - 1)
        line = (
            f"epoch {epoch}/{self.config.TRAIN.EPOCHS} step {within}/{self.steps_per_epoch} lr {lr:.3e} "
            f"loss {loss:.4f} grad {self.norm:.3f} {steps * plan.images / seconds:.0f} images/s "
            f"data {100 * (progress.data_seconds - data_seconds) / seconds:.0f}% mem {peak_memory_mib(plan.device)} MiB "
            f"eta {clock(pace * (self.steps_per_epoch - within))} epoch, {clock(pace * (self.total_steps - state.step))} run")
        self.logger.info(line) if last else periodic(self.logger, line)
        self.said_at = now
        self.records.step(state.step, _finite(loss), _finite(self.norm), lr, steps * plan.images / seconds,
                          (progress.data_seconds - data_seconds) / seconds)
        self.window = (now, state.step, progress.data_seconds, total, progress.counted)

    def _live_parts(self, done: int, pace: float) -> tuple[str, list[str]]:
        """The live line: ``done`` steps of the epoch, ``pace`` steps a second. The loss is that of the last step line."""
        state, plan = self.state, self.plan
        step = max(0, state.step - 1)
        parts = [f"loss {self.loss:.4f}"] if math.isfinite(self.loss) else []
        if pace:
            parts += [f"{clock((self.total_steps - state.step) / pace)} left", f"{pace * plan.images:.0f} images/s",
                      f"{clock((self.steps_per_epoch - done) / pace)} in this epoch"]
        return (f"epoch {step // self.steps_per_epoch + 1}/{self.config.TRAIN.EPOCHS} step {done}/{self.steps_per_epoch}",
                [*parts, f"lr {plan.schedule.lr_at(step):.2e}"])


def best_line(best: dict[str, float]) -> str:
    """``, best top1 81.50 at epoch 290``, or nothing before the first evaluation."""
    return f", best top1 {best['top1']:.2f} at epoch {best['epoch']}" if best else ""
