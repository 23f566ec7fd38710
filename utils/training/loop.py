"""The epochs of a run around the hot path: records, evaluation, checkpoints and stops."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import nn
from yacs.config import CfgNode

from config import ProgramError
from utils.checkpoints.background_saver import Saver
from utils.checkpoints.file_format import describe
from utils.checkpoints.folder import CheckpointFolder
from utils.checkpoints.state import TrainState
from utils.evaluation.data_messages import decoding, tell_unreadable
from utils.evaluation.loop import evaluate
from utils.evaluation.metrics import Evaluation
from utils.loggers.console import RESULT
from utils.loggers.progress import clock, track
from utils.loggers.run_log import Records
from utils.runtime import distributed
from utils.runtime.compile import compiled_graphs, compiled_part
from utils.runtime.device import device_name
from utils.runtime.stop_signals import Stopped, StopRequest
from utils.tasks.base import Batch
from utils.training.engine import Progress, StepPlan, train_one_epoch
from utils.training.nonfinite import NonFiniteGuard
from utils.training.step_log import StepLog, finite_or_none


class SaveError(ProgramError):
    """The run ended, but its last checkpoint could not be written."""


@dataclass
class Run:
    """A run from where ``state`` stands to its last epoch: its parts, and what it must remember between steps.

    Attributes:
        description: what every checkpoint says beside the state.
        records: on rank 0 alone.
        saved_step, saved_at: of the last checkpoint; -1 where the folder holds none of just this state.
        save_asked: a signal asked for a checkpoint in the middle of an evaluation.
        cautioned: what is probably wrong with an evaluation's result has been said; once is enough.
        loader_failed: it was the data that ended training; the state is that of a whole step.
    """

    config: CfgNode
    state: TrainState
    plan: StepPlan
    loaders: Any
    files: CheckpointFolder
    stop: StopRequest
    logger: logging.Logger
    description: dict[str, Any]
    saver: Saver
    guard: NonFiniteGuard
    log: StepLog
    records: Records | None
    saved_step: int = -1
    saved_at: float = field(default_factory=time.perf_counter)
    save_asked: bool = False
    cautioned: bool = False
    loader_failed: bool = False

    @property
    def steps_per_epoch(self) -> int:
        return self.loaders.train.batch_sampler.steps_per_epoch

    @property
    def total_steps(self) -> int:
        return self.loaders.train.batch_sampler.total_steps

    @property
    def epochs(self) -> int:
        """Of the whole run; TRAIN.ITERATIONS may cut the last one short."""
        return self.loaders.train.batch_sampler.epochs


def open_run(config: CfgNode, state: TrainState, plan: StepPlan, loaders: Any, global_batch: int, files: CheckpointFolder,
             stop: StopRequest, logger: logging.Logger, saved: bool) -> Run:
    """A run in the folder of ``files``, which is open and locked.

    Args:
        saved: the folder holds a checkpoint of just this state.
    """
    sampler = loaders.train.batch_sampler
    description = describe(config.dump(), loaders.classes, plan.task.preprocessing(config), config.DATA.DATA_PATH, loaders.fingerprints(),
                           global_batch, sampler.steps_per_epoch)
    saver = Saver(files, config.TRAIN.BACKGROUND_SAVE, state.best, logger)
    records = Records(config, files.folder, state.step, state.evaluated, [metric.name for metric in plan.task.metrics],
                      _facts(plan, loaders, description), logger) if distributed.is_main() else None
    guard = NonFiniteGuard(state, plan, loaders.train, files, saver, config.TRAIN.SKIP_BUDGET, config.TRAIN.ROLLBACKS, logger)
    log = StepLog(state, plan, sampler.total_steps, sampler.steps_per_epoch, sampler.local_images(), records, logger)

    def rolled_back(progress: Progress, step: int) -> None:
        log.begin_window(progress)
        if records is not None:
            records.event("rollback", state.step, to=step)

    guard.on_rollback = rolled_back
    return Run(config, state, plan, loaders, files, stop, logger, description, saver, guard, log, records,
               saved_step=state.step if saved else -1)


def _facts(plan: StepPlan, loaders: Any, description: dict[str, Any]) -> dict[str, Any]:
    """Of this start, for the run's history; nothing that names the machine."""
    data = {split: dict(images=len(getattr(loaders, split).dataset.source), fingerprint=fingerprint[:16])
            for split, fingerprint in description["image_fingerprints"].items()}
    metrics = [dict(name=m.name, label=m.label, higher_is_better=m.higher_is_better, digits=m.digits) for m in plan.task.metrics]
    return dict(flags=sys.argv[1:], task=plan.task.name, metrics=metrics, best=plan.task.best.name,
                tie_break=plan.task.tie_break.name if plan.task.tie_break is not None else None, versions=description["versions"],
                git_commit=description["git_commit"], device=device_name(plan.device), precision=plan.precision.name,
                processes=plan.world_size, global_batch=description["global_batch"], steps_per_epoch=description["steps_per_epoch"],
                data=data)


# --------------------------------------------------------------------------------------------------
# The epochs
# --------------------------------------------------------------------------------------------------

def train(run: Run, model: nn.Module) -> None:
    """Train ``model``, which is ``run.state.model`` or that under DDP, to the run's last epoch.

    Raises:
        Stopped: a signal asked for it; everything is saved.
        SaveError: training is done, its result could not be saved.
        NumericError: too many steps were not finite.
    """
    try:
        _train(run, model)
    except Exception as error:
        with contextlib.suppress(Exception):
            run.saver.wait()  # what is being written is good, whatever else is not
        if run.records is not None:
            what = "stopped" if isinstance(error, Stopped) else "failed"
            run.records.event(what, run.state.step, reason=str(error)[:300] or type(error).__name__)
        raise
    finally:
        run.guard.close()
        if run.records is not None:
            run.records.close()


def _train(run: Run, model: nn.Module) -> None:
    state, run.stop.training = run.state, True
    batches = _watched(run, run.loaders.batches(state.step))
    first_step = state.step
    epoch, within = divmod(state.step, run.steps_per_epoch)
    progress = Progress(run.plan.device, first_step=state.step)
    if within or state.evaluated != state.step:  # in the middle of an epoch, or between its last step and its end
        progress.loss_sum += state.own_loss_sum(run.plan.rank, run.plan.world_size)
        progress.counted = state.loss_steps
    if state.evaluated != state.step and not within:
        end_epoch(run, epoch, progress)
        progress = Progress(run.plan.device, first_step=state.step)
    over = run_out_of_patience(run.config, state.best, state.step, run.steps_per_epoch)
    for number in () if over else range(epoch + 1, run.epochs + 1):
        run.log.begin_epoch(progress)
        try:
            train_one_epoch(model, state, batches, min(number * run.steps_per_epoch, run.total_steps), run.plan, progress,
                            lambda state, progress: after_step(run, progress, first_step))
        except Exception:
            _save_whole_step(run, progress)
            raise
        run.log.end_epoch()
        end_epoch(run, number, progress)
        if state.step < run.total_steps:
            if run_out_of_patience(run.config, state.best, state.evaluated, run.steps_per_epoch):
                break
            stop, save_asked, _ = run.stop.agreed()
            if stop:
                leave(run, progress)
            if save_asked and run.saved_step != state.step:
                save(run, progress, best=False)
        progress = Progress(run.plan.device, first_step=state.step)
    run.logger.info(f"training images {decoding(run.loaders.train)}")
    run.saver.wait()
    if run.saver.failed:
        raise SaveError(f"training is done, but its last checkpoint was not saved: {run.saver.failed}; {run.files.newest_in_words()}")
    if state.step < run.total_steps:
        run.logger.info(_ended_early(run))
    done = f"{state.step} steps" if run.config.TRAIN.ITERATIONS else f"{state.step // run.steps_per_epoch} epochs"
    run.logger.info(f"finished {done} in {clock(time.perf_counter() - run.log.started)}"
                    f"{best_line(run.plan.task, state.best)}; checkpoints in {run.files.folder}", extra=RESULT)
    if run.records is not None:
        run.records.finish(state.step, state.best)


def run_out_of_patience(config: CfgNode, best: Mapping[str, float], step: int, steps_per_epoch: int, ahead: bool = False) -> bool:
    """Whether TRAIN.PATIENCE epochs up to ``step``, where an epoch was evaluated last, have brought nothing better than ``best``.

    A function of what a checkpoint holds alone: a run that is continued ends where it would have ended.

    Args:
        ahead: the evaluation at ``step`` is still to come; it is the last unless it is the best.
    """
    epoch, within = divmod(step, steps_per_epoch)
    looked = not within and epoch % config.TRAIN.EVAL_FREQ == 0
    return looked and 0 < config.TRAIN.PATIENCE <= epoch - best.get("epoch", 0) and (ahead or bool(best))


def _ended_early(run: Run) -> str:
    """Why a run ended before its last epoch, and where that left its learning rate."""
    config, plan, state, schedule = run.config, run.plan, run.state, run.plan.schedule
    epochs = state.step // run.steps_per_epoch
    shorter = f"--iterations {state.step}" if config.TRAIN.ITERATIONS else f"--epochs {epochs}"
    return (f"ended early, after epoch {epochs} of {run.epochs}: {config.TRAIN.PATIENCE} epochs (TRAIN.PATIENCE) without a better "
            f"{plan.task.best.label} than at epoch {state.best['epoch']}; the learning rate was still {schedule.lr_at(state.step - 1):.3g} "
            f"of {schedule.base:.3g}, and its schedule ends at {schedule.lr_at(schedule.total_steps - 1):.3g}: a run of its own with "
            f"{shorter} comes down to that")


def _watched(run: Run, batches: Iterator[Batch]) -> Iterator[Batch]:
    """``batches``, noting when it is the loader that failed."""
    try:
        if run.records is not None and run.state.step == 0:
            batch = next(batches)
            run.records.first_batch(run.plan.task.images(batch), run.description["preprocessing"])
            yield batch
        yield from batches
    except Exception:
        run.loader_failed = True
        raise


def _save_whole_step(run: Run, progress: Progress) -> None:
    """After an error of the data alone, save what has been trained, unless other ranks would have to take part."""
    if not run.loader_failed or run.plan.world_size > 1 or run.saved_step == run.state.step:
        return
    save(run, progress, best=False)
    run.saver.wait()
    if not run.saver.failed:
        run.logger.info(f"saved {run.files.path(run.state.step)}")


def after_step(run: Run, progress: Progress, first_step: int) -> None:
    """What happens between two steps: a line, a look at what was skipped, a save, a stop.

    Args:
        first_step: the step that this start of the run began with.
    """
    config, state, stop = run.config, run.state, run.stop
    if state.step == first_step + 1 and (compiled := compiled_part(config.COMPILE)) != "off":
        run.logger.info(f"compiled {compiled}: {compiled_graphs()} graphs, the first step took "
                        f"{time.perf_counter() - progress.start - progress.data_wait.seconds():.1f} s")
    within = state.step % run.steps_per_epoch  # 0 after the last step of a whole epoch
    last = within == 0 or state.step >= run.total_steps
    line_due = within % config.PRINT_FREQ == 0 or last
    if line_due or run.plan.device.type == "cpu":
        run.guard.inspect(progress)
    if distributed.is_main():
        run.saver.poll()
        run.log.at(within or run.steps_per_epoch)
        if line_due:
            run.log.write(progress, run.guard.norm, last)
        stop.log_due = run.log.is_silent()
        minutes = config.TRAIN.SAVE_EVERY_MINUTES
        if minutes and time.perf_counter() - run.saved_at > 60 * minutes:
            stop.save = True
    if last:
        return  # the epoch's end saves, and then looks whether to stop
    stop_asked, save_asked, look = stop.agreed()
    if look:
        run.guard.inspect(progress)
        if distributed.is_main():
            run.log.write(progress, run.guard.norm)
    if stop_asked:
        leave(run, progress)
    every = config.TRAIN.SAVE_EVERY_STEPS
    if save_asked or (every and state.step % every == 0):
        save(run, progress, best=False)


def end_epoch(run: Run, epoch: int, progress: Progress) -> None:
    """Evaluate and save as often as the config says, and record the epoch."""
    config, state, plan = run.config, run.state, run.plan
    seconds, steps = time.perf_counter() - progress.start, state.step - progress.first_step
    loss_sum = distributed.all_reduce_sum(progress.loss_sum.clone()).item()
    final, every = state.step >= run.total_steps, config.TRAIN.SAVE_EVERY_STEPS
    row: dict[str, Any] = dict(
        epoch=epoch, step=state.step, train_loss=loss_sum / (progress.counted * plan.images) if progress.counted else None,
        **{metric.name: None for metric in plan.task.metrics}, lr=plan.schedule.lr_at(state.step - 1),
        images_per_s=round(steps * plan.images / seconds, 2) if steps else None, seconds=round(seconds, 3))
    trained = state.step - max(state.evaluated, (epoch - 1) * run.steps_per_epoch)  # of this epoch, since it was last evaluated
    if progress.counted < trained:
        row["skipped_steps"] = trained - progress.counted
    due = final or epoch % config.SAVE_FREQ == 0 or bool(every and state.step % every == 0)
    best = False
    if epoch % config.TRAIN.EVAL_FREQ == 0 or final:
        if due and run.saved_step != state.step:
            save(run, progress, best=False)  # evaluation may take long, and what was trained stands
        last = final or run_out_of_patience(config, state.best, state.step, run.steps_per_epoch, ahead=True)
        values, task = evaluate_epoch(run, row, progress, last).values, plan.task
        state.best = distributed.gather_objects(run.saver.best_saved(state.best))[0]
        best = task.beats(values, state.best)
        if best:
            decided_by = [metric.name for metric in (task.best, task.tie_break) if metric is not None]
            state.best = {name: values[name] for name in decided_by} | {"epoch": epoch, "step": state.step}
    if run.records is not None:
        run.records.epoch(row)
        run.records.weights(epoch, state.step, state.model)
    state.evaluated = state.step
    progress.loss_sum.zero_()
    progress.counted = 0
    if best or due or run.save_asked or run_out_of_patience(config, state.best, state.step, run.steps_per_epoch):
        run.save_asked = False
        save(run, progress, best)


def evaluate_epoch(run: Run, row: dict[str, Any], progress: Progress, final: bool) -> Evaluation:
    """Evaluate raw and averaged weights, into ``row`` too; what comes last counts. Looks between batches whether to stop.

    The ``final`` evaluation leaves the predictions of every image in the run's folder, where the task keeps any.
    """
    state, plan, val, logger = run.state, run.plan, run.loaders.val, run.logger

    def poll() -> None:
        stop, save_asked, _ = run.stop.agreed()
        run.save_asked |= save_asked
        if stop:
            leave(run, progress)

    record = plan.task.prediction_log(run.loaders) if final else None
    with contextlib.nullcontext() if state.ema is None else state.ema.on(plan.device) as average:
        models = [state.model] if average is None else [state.model, average]
        for model in models:
            distributed.broadcast_buffers(model)
        *raw, result = evaluate(plan.task, models, track(val, len(val), "evaluating", logger), plan.device, plan.precision, poll, record)
    if record is not None:
        try:
            record.write(run.files.folder)
        except OSError as error:
            logger.warning(f"{error.filename or run.files.folder}: cannot be written ({error.strerror})")
    tell_unreadable(val, result, logger)
    for other in raw:
        logger.info(f"raw {other.line}")
        row.update({f"raw_{name}": finite_or_none(value) for name, value in other.values.items()})
    if result.caution and not run.cautioned:
        run.cautioned = True
        logger.warning(result.caution)
    logger.info(result.line, extra=RESULT)
    row.update({name: finite_or_none(value) for name, value in result.values.items()})
    return result


# --------------------------------------------------------------------------------------------------
# Saving and stopping
# --------------------------------------------------------------------------------------------------

def save(run: Run, progress: Progress, best: bool) -> None:
    """Begin a checkpoint of the state as it is; never one of weights that are not finite."""
    run.guard.inspect(progress)
    run.guard.require_finite_weights(progress)
    state = run.state
    state.loss_sums = distributed.gather_objects(progress.loss_sum.item())
    state.loss_steps = progress.counted
    if distributed.is_main():
        run.saver.save(state, {**run.description, "task": run.plan.task.state_dict()}, best)
    run.saved_step, run.saved_at = state.step, time.perf_counter()


def leave(run: Run, progress: Progress) -> NoReturn:
    """Save unless that has just been done, and end the program once every rank is that far."""
    if run.saved_step != run.state.step:
        save(run, progress, best=False)
    run.saver.wait()
    # The exchange also keeps every rank here until rank 0 has written.
    names, failures = zip(*distributed.gather_objects((run.stop.name, run.saver.failed)), strict=True)
    name = next(filter(None, names), "a signal")
    if failures[0]:
        raise SaveError(f"stopped by {name}, but step {run.state.step} was not saved: {failures[0]}; {run.files.newest_in_words()}")
    command = "the same command" if run.config.TRAIN.AUTO_RESUME else "the same command without --restart"
    raise Stopped(f"stopped by {name}: saved {run.files.path(run.state.step)}; {command} continues from there")


def best_line(task: Any, best: dict[str, float]) -> str:
    """``, best top1 81.50 at epoch 290``, or nothing before the first evaluation."""
    return f", best {task.best.shown(best[task.best.name])} at epoch {best['epoch']}" if task.best.name in best else ""
