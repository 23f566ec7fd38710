"""The modes of the program, each assembled from the parts: train, evaluate, measure."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn
from yacs.config import CfgNode

from config import KEYS, ConfigError, config_from_text, get_config, lookup
from data import build_loaders, preprocessing
from models import build_model, check_input_size, load_pretrained, load_state
from models.weights import CheckpointError, check_finite, read_file, unwrap_state_dict
from utils import checkpoint, distributed, optim
from utils.checkpoint import CheckpointFolder, TrainState
from utils.device import Precision, choose_precision, peak_memory_mib
from utils.ema import WeightAverage
from utils.engine import Evaluation, Progress, StepPlan, evaluate, require_finite, train_one_epoch
from utils.files import lock_folder, remove_leftovers, replace_file
from utils.freeze import freeze
from utils.logger import close_files, log_to_file
from utils.metrics import MetricsLog, TensorBoard
from utils.seed import make_deterministic, seed_initialisation
from utils.signals import Stopped, StopRequest
from utils.throughput import measure

Log = logging.Logger


# --------------------------------------------------------------------------------------------------
# Config and starting point
# --------------------------------------------------------------------------------------------------

def resolve_config(cfg_file: str | None, opts: list[str]) -> tuple[CfgNode, Any]:
    """(config, content of the file that MODEL.RESUME names, or None).

    Without a YAML file the config is the checkpoint's own, its data path made absolute; ``opts`` win over both.
    """
    asked = get_config(cfg_file, opts) if cfg_file else None
    resume = os.path.expanduser(asked.MODEL.RESUME if asked is not None else _last_value(opts, "MODEL.RESUME"))
    content = read_file(resume) if resume else None
    if asked is not None:
        if content is not None and checkpoint.is_own(content) and not asked.DATA.DATA_PATH:
            asked = get_config(cfg_file, ["DATA.DATA_PATH", content["data_path"], *opts])
        return asked, content
    if content is None:
        return get_config(None, opts), None
    if not checkpoint.is_own(content):
        raise ConfigError(f"{resume} holds weights without a config; add --cfg with the YAML file of its model")
    checkpoint.require_own(content, resume)
    return config_from_text(content["config"], ["DATA.DATA_PATH", content["data_path"], *opts], resume), content


def _last_value(opts: list[str], key: str) -> str:
    values = [value for name, value in zip(opts[::2], opts[1::2], strict=False) if name == key]
    return values[-1] if values else ""


def run_folder(config: CfgNode) -> str:
    """OUTPUT/MODEL.NAME/TAG; a timm name may hold characters that a folder's must not."""
    name = config.MODEL.NAME.replace("/", "_").replace(":", "_").replace(os.sep, "_")
    return os.path.join(os.path.expanduser(config.OUTPUT or "output"), name, config.TAG)


@dataclass(frozen=True)
class Start:
    """Where training begins."""

    kind: str  # auto-resume, resume, pretrained or scratch
    path: str = ""
    content: Any = None


def choose_start(config: CfgNode, resume_content: Any, folder: str, logger: Log) -> Start:
    """By precedence: the run folder's own newest checkpoint, then --resume, then --pretrained, then fresh weights."""
    start = None
    if config.TRAIN.AUTO_RESUME:
        newest = CheckpointFolder(folder).newest()
        if newest is not None:
            path, content, lines = newest
            for line in lines:
                logger.info(line)
            start = Start("auto-resume", path, content)
    if start is None and config.MODEL.RESUME:
        start = Start("resume", config.MODEL.RESUME, checkpoint.require_own(resume_content, config.MODEL.RESUME))
    if start is None:
        start = Start("pretrained", os.path.expanduser(config.MODEL.PRETRAINED)) if config.MODEL.PRETRAINED else Start("scratch")
    chosen = distributed.gather_objects((start.kind, os.path.basename(start.path), (start.content or {}).get("step")))
    if any(other != chosen[0] for other in chosen):
        found = "; ".join(f"rank {number}: {kind} {path} step {step}" for number, (kind, path, step) in enumerate(chosen))
        raise CheckpointError(f"the processes would start from different places ({found}); put --output on a disk that all of them see")
    logger.info(f"start: {start.kind}{' ' + start.path if start.path else ''} (the first there is of: auto-resume from {folder}, "
                "--resume, --pretrained, scratch)")
    return start


def keep_global_batch(config: CfgNode, content: Any, world_size: int, logger: Log) -> CfgNode:
    """The config with batch and accumulation that give the checkpoint's global batch on this many processes."""
    wanted, micro = content["global_batch"], config.DATA.BATCH_SIZE
    if micro * config.TRAIN.ACCUMULATION_STEPS * world_size == wanted:
        return config
    if wanted % world_size:
        fitting = [n for n in range(1, wanted + 1) if wanted % n == 0]
        near = sorted(fitting, key=lambda n: abs(n - world_size))[:4]
        raise ConfigError(f"the checkpoint's global batch of {wanted} cannot be shared by {world_size} processes; "
                          f"start {', '.join(map(str, sorted(near)))} processes, or begin anew with --pretrained")
    local = wanted // world_size
    micro = max(n for n in range(1, min(micro, local) + 1) if local % n == 0)
    logger.info(f"notice: the checkpoint's global batch of {wanted} is kept: {micro} images x {local // micro} accumulated x "
                f"{world_size} processes")
    return config_from_text(config.dump(), ["DATA.BATCH_SIZE", micro, "TRAIN.ACCUMULATION_STEPS", local // micro])


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------

def train_run(config: CfgNode, resume_content: Any, device: torch.device, logger: Log) -> None:
    """Train to the last epoch, from wherever the run stands. Nothing is written before everything has been checked."""
    rank, world_size, folder = distributed.rank(), distributed.world_size(), run_folder(config)
    optim.check_optimizer(config)
    _require_writable(folder)
    start = choose_start(config, resume_content, folder, logger)
    if start.content is not None:
        config = keep_global_batch(config, start.content, world_size, logger)
    precision = choose_precision(config, device)
    make_deterministic(device)

    loaders = build_loaders(config, rank, world_size, device=device)
    sampler = loaders.train.batch_sampler
    global_batch = config.DATA.BATCH_SIZE * config.TRAIN.ACCUMULATION_STEPS * world_size
    steps_per_epoch, total_steps = sampler.steps_per_epoch, sampler.total_steps
    for line in (*loaders.notices, *optim.apex_notices(config), precision.notice):
        if line:
            logger.info(line)
    if start.content is None:
        _require_steps(config, len(loaders.train.dataset.folder), world_size)
    else:
        _check_same_data(start, loaders.classes, steps_per_epoch)
        for line in _changes(start.content["config"], config):
            logger.info(f"notice: {line} since {start.path} was written")
        if start.content["step"] >= total_steps:
            if start.kind == "auto-resume" and distributed.is_main():
                CheckpointFolder(folder).relink(start.content)
            logger.info(f"finished already: {start.path} is at step {start.content['step']} of {total_steps}"
                        f"{_best(start.content['best'])}; raise --epochs to go on, or choose another --tag for a new run")
            return

    seed_initialisation(config.SEED)
    model = build_model(config, len(loaders.classes))
    check_input_size(model, config)
    if start.kind == "pretrained":
        logger.info(load_pretrained(model, start.path, config).summary(start.path))
    if config.TRAIN.SYNC_BN and world_size > 1:
        if device.type == "cuda":
            model = distributed.sync_batch_norm(model)
        else:
            logger.info("notice: SyncBN needs GPUs; batch norm stays each process's own")
    fixed = freeze(model, config)
    model.to(device)
    ema = WeightAverage(model, config.TRAIN.EMA_DECAY, config.TRAIN.EMA_WARMUP) if config.TRAIN.EMA_DECAY else None
    state = TrainState(model, optim.build_optimizer(config, model), precision.scaler, ema)
    if start.content is not None:
        state.load_state_dict(start.content, start.path)
        logger.info(f"resumed {start.path} at step {state.step}")

    with _open_run_folder(folder, logger):
        files = CheckpointFolder(folder, config.TRAIN.KEEP_CHECKPOINTS, config.MODEL.RESUME)
        if distributed.is_main():
            if (aside := files.set_aside(state.step)) is not None:
                logger.info(f"notice: checkpoints of an earlier run beyond step {state.step} are moved to {aside}")
            if start.kind == "auto-resume":
                files.relink(start.content)
        start = Start(start.kind, start.path)  # a gigabyte that is no longer needed
        schedule = optim.build_schedule(config, steps_per_epoch, global_batch)
        _introduce(config, device, precision, model, loaders, steps_per_epoch, global_batch, schedule, logger)
        plan = StepPlan(schedule, optim.build_loss(config.MODEL.LABEL_SMOOTHING), loaders.mixup, precision, device,
                        config.DATA.BATCH_SIZE, sampler.images_per_step, config.TRAIN.CLIP_GRAD or float("inf"), config.SEED, rank,
                        world_size, fixed)
        session = _Session(config, files, state, plan, loaders, steps_per_epoch, total_steps, global_batch, logger)
        with session.stop, contextlib.closing(loaders):
            session.train(distributed.wrap(model, device))


class _Session:
    """The epochs of a run: training, evaluation, records and checkpoints around the hot path."""

    def __init__(self, config: CfgNode, files: CheckpointFolder, state: TrainState, plan: StepPlan, loaders: Any, steps_per_epoch: int,
                 total_steps: int, global_batch: int, logger: Log):
        self.config, self.files, self.state, self.plan, self.loaders, self.logger = config, files, state, plan, loaders, logger
        self.folder, self.stop = files.folder, StopRequest()
        self.steps_per_epoch, self.total_steps = steps_per_epoch, total_steps
        self.main = distributed.is_main()
        self.description = checkpoint.describe(config.dump(), loaders.classes, preprocessing(config), config.DATA.DATA_PATH,
                                               global_batch, steps_per_epoch)
        if self.main:
            replace_file(os.path.join(self.folder, "config.yaml"), config.dump().encode())
            self.metrics, self.board = MetricsLog(self.folder, state.step), TensorBoard(self.folder, state.step)
        self.begun, self.first_step, self.saved_step = time.perf_counter(), state.step, -1
        self.window = (self.begun, state.step, 0.0, 0.0)  # time, step, data seconds and loss sum at the last line

    def train(self, model: nn.Module) -> None:
        config, state = self.config, self.state
        batches = self.loaders.batches(state.step)
        for epoch in range(state.step // self.steps_per_epoch, config.TRAIN.EPOCHS):
            progress = Progress(self.plan.device, first_step=state.step)
            if state.step % self.steps_per_epoch:
                progress.loss_sum += self._restored_loss_sum()
            self.window = (time.perf_counter(), state.step, 0.0, progress.loss_sum.item())
            train_one_epoch(model, state, batches, (epoch + 1) * self.steps_per_epoch, self.plan, progress, self.after_step)
            self.end_epoch(epoch + 1, progress)
            if state.step < self.total_steps and self.stop.agreed()[0]:
                self.leave(progress)
        if self.main:
            self.board.close()
        self.logger.info(f"training images {self.loaders.train.dataset.pipeline.summary()}")
        self.logger.info(f"finished {config.TRAIN.EPOCHS} epochs in {_clock(time.perf_counter() - self.begun)}{_best(state.best)}; "
                         f"checkpoints in {self.folder}")

    def after_step(self, state: TrainState, progress: Progress) -> None:
        within = state.step % self.steps_per_epoch  # 0 after the last step of an epoch
        last = within == 0
        if self.main and (within % self.config.PRINT_FREQ == 0 or last):
            self._log_line(progress)
        if last:
            return  # the epoch's end saves, and then looks whether to stop
        stop, save = self.stop.agreed()
        every = self.config.TRAIN.SAVE_EVERY_STEPS
        if stop:
            self.leave(progress)
        if save or (every and state.step % every == 0):
            self.save(progress, best=False)

    def leave(self, progress: Progress) -> NoReturn:
        """Save unless that has just been done, and end the program once every rank is that far."""
        if self.saved_step != self.state.step:
            self.save(progress, best=False)
        # The exchange also keeps every rank here until rank 0 has written.
        names = [name for name in distributed.gather_objects(self.stop.name) if name]
        raise Stopped(f"stopped by {names[0] if names else 'a signal'}: saved {self.files.path(self.state.step)}; "
                      "the same command continues from there")

    def end_epoch(self, epoch: int, progress: Progress) -> None:
        config, state, plan = self.config, self.state, self.plan
        seconds = time.perf_counter() - progress.start
        steps = state.step - progress.first_step
        images = self.steps_per_epoch * plan.images
        train_loss = require_finite(distributed.all_reduce_sum(progress.loss_sum.clone()).item() / images,
                                    f"the training loss of epoch {epoch}")
        self.require_sound()
        final = state.step >= self.total_steps
        row: dict[str, Any] = dict(
            epoch=epoch, step=state.step, train_loss=train_loss, top1=None, top5=None, val_loss=None,
            lr=plan.schedule.lr_at(state.step - 1), images_per_s=round(steps * plan.images / seconds, 2), seconds=round(seconds, 3))
        best = False
        if epoch % config.TRAIN.EVAL_FREQ == 0 or final:
            result = self.evaluate(row)
            require_finite(result.loss, f"the validation loss of epoch {epoch}")
            best = not state.best or result.top1 > state.best["top1"]
            if best:
                state.best = dict(top1=result.top1, epoch=epoch, step=state.step)
        if self.main:
            self.metrics.write(row)
            self.board.scalars(state.step, train__loss=train_loss, train__lr=row["lr"], train__images_per_s=row["images_per_s"],
                               **{f"val__{k}": row[k] for k in ("top1", "top5", "val_loss") if row[k] is not None})
        progress.loss_sum.zero_()
        every = config.TRAIN.SAVE_EVERY_STEPS
        if best or final or epoch % config.SAVE_FREQ == 0 or (every and state.step % every == 0):
            self.save(progress, best)

    def evaluate(self, row: dict[str, Any]) -> Evaluation:
        state, plan = self.state, self.plan
        models = [state.model] if state.ema is None else [state.model, state.ema.module]
        for model in models:
            distributed.broadcast_buffers(model)
        *raw, result = evaluate(models, self.loaders.val, plan.device, plan.precision)
        for other in raw:
            self.logger.info(f"raw {other.line()}")
            row.update(raw_top1=other.top1, raw_top5=other.top5, raw_val_loss=other.loss)
        self.logger.info(result.line())
        row.update(top1=result.top1, top5=result.top5, val_loss=result.loss)
        return result

    def require_sound(self) -> None:
        """Raise ``NumericError`` when a weight is no longer finite: such a state must not replace a good checkpoint."""
        tensors = [t for t in self.state.model.state_dict().values() if t.is_floating_point()]
        require_finite(nn.utils.get_total_norm(tensors).item(), f"the norm of the weights after step {self.state.step}")

    def save(self, progress: Progress, best: bool) -> None:
        self.state.loss_sums = distributed.gather_objects(progress.loss_sum.item())
        require_finite(sum(self.state.loss_sums), f"the training loss before step {self.state.step}")
        self.require_sound()
        if self.main:
            self.files.save({**self.description, **self.state.state_dict()}, best)
        self.saved_step = self.state.step

    def _restored_loss_sum(self) -> float:
        sums = self.state.loss_sums
        if len(sums) == self.plan.world_size:
            return sums[self.plan.rank]
        return sum(sums) if self.main else 0.0  # another number of processes: only the total matters

    def _log_line(self, progress: Progress) -> None:
        state, plan = self.state, self.plan
        then, step, data_seconds, loss_sum = self.window
        now, total = time.perf_counter(), progress.loss_sum.item()
        steps, seconds = state.step - step, now - then
        if not steps:
            return
        local = self.loaders.train.batch_sampler.local_images()
        loss = require_finite((total - loss_sum) / (steps * local), f"the training loss in steps {step + 1} to {state.step}")
        norm = float(progress.grad_norm)
        within = (state.step - 1) % self.steps_per_epoch + 1
        pace = (now - self.begun) / (state.step - self.first_step)
        epoch = (state.step - 1) // self.steps_per_epoch + 1
        self.logger.info(
            f"epoch {epoch}/{self.config.TRAIN.EPOCHS} step {within}/{self.steps_per_epoch} lr {plan.schedule.lr_at(state.step - 1):.3e} "
            f"loss {loss:.4f} grad {norm:.3f} {steps * plan.images / seconds:.0f} images/s "
            f"data {100 * (progress.data_seconds - data_seconds) / seconds:.0f}% mem {peak_memory_mib(plan.device)} MiB "
            f"eta {_clock(pace * (self.steps_per_epoch - within))} epoch, {_clock(pace * (self.total_steps - state.step))} run")
        self.board.scalars(state.step, step__loss=loss, step__grad_norm=norm, step__lr=plan.schedule.lr_at(state.step - 1))
        self.window = (now, state.step, progress.data_seconds, total)


def _require_writable(folder: str) -> None:
    """Raise ``ConfigError`` when the folder cannot be made or written; makes nothing."""
    there = os.path.abspath(folder)
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there):
        raise ConfigError(f"{folder}: cannot be written ({there} is no folder); choose another --output or --tag")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder}: cannot be written (no permission in {there}); choose another --output")


@contextlib.contextmanager
def _open_run_folder(folder: str, logger: Log) -> Iterator[None]:
    """The run's folder, made, locked against a second run in it, its log open; rank 0's business alone."""
    if not distributed.is_main():
        yield
        return
    try:
        os.makedirs(folder, exist_ok=True)
        lock = lock_folder(folder)
        remove_leftovers(folder)
    except BlockingIOError:
        raise ConfigError(f"{folder}: another run is writing here; wait for it, stop it, or choose another --tag") from None
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror}); choose another --output or --tag") from None
    log_to_file(logger, os.path.join(folder, "log.txt"))
    logger.info(f"run {folder}, begun {time.strftime('%Y-%m-%d %H:%M:%S')}")
    try:
        yield
    finally:
        close_files(logger)
        lock.close()


def _require_steps(config: CfgNode, images: int, world_size: int) -> None:
    micro, accumulate = config.DATA.BATCH_SIZE, config.TRAIN.ACCUMULATION_STEPS
    micro_batches = -(-images // (micro * world_size))
    if accumulate > 1 and accumulate > micro_batches:
        raise ConfigError(f"TRAIN.ACCUMULATION_STEPS is {accumulate}, longer than an epoch: {images} images make {micro_batches} "
                          f"micro-batches of {micro} x {world_size}; accumulate at most {micro_batches}")


# Keys that say where, how fast and how loud, not what is learned.
_HARMLESS = ("BASE", "OUTPUT", "TAG", "DEVICE", "SAVE_FREQ", "PRINT_FREQ", "EVAL_MODE", "THROUGHPUT_MODE", "LOCAL_RANK", "DATA.DATA_PATH",
             "DATA.DATASET", "DATA.NUM_WORKERS", "DATA.PIN_MEMORY", "DATA.ZIP_MODE", "DATA.CACHE_MODE", "DATA.BATCH_SIZE",
             "MODEL.PRETRAINED", "MODEL.RESUME", "MODEL.NUM_CLASSES", "TRAIN.ACCUMULATION_STEPS", "TRAIN.USE_CHECKPOINT",
             "TRAIN.AUTO_RESUME", "TRAIN.SAVE_EVERY_STEPS", "TRAIN.KEEP_CHECKPOINTS", "TRAIN.EVAL_FREQ", "TEST.BATCH_SIZE")


def _changes(then: str, config: CfgNode) -> list[str]:
    """Lines such as ``TRAIN.BASE_LR changed from 0.1 to 0.2``: what differs from the config of a checkpoint."""
    try:
        old = config_from_text(then)
    except ConfigError:
        return ["the config is of another version"]
    pairs = [(key, lookup(old, key), lookup(config, key)) for key, *_ in KEYS if key not in _HARMLESS]
    return [f"{key} changed from {before} to {now}" for key, before, now in pairs if before != now]


def _check_same_data(start: Start, classes: list[str], steps_per_epoch: int) -> None:
    then = start.content["classes"]
    if then != classes:
        raise CheckpointError(f"{start.path}: was trained on {len(then)} classes ({', '.join(then[:3])}, ...), the data has "
                              f"{len(classes)} ({', '.join(classes[:3])}, ...); to fine-tune on other classes, "
                              f"use --pretrained {start.path}")
    if start.content["steps_per_epoch"] != steps_per_epoch:
        raise CheckpointError(f"{start.path}: its epochs had {start.content['steps_per_epoch']} steps, with this data they have "
                              f"{steps_per_epoch}; the training images are others, use --pretrained {start.path} to start from it")


def _introduce(config: CfgNode, device: torch.device, precision: Precision, model: nn.Module, loaders: Any, steps_per_epoch: int,
               global_batch: int, schedule: optim.Schedule, logger: Log) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    part = f" ({trained / 1e6:.2f} M of them trained)" if trained < parameters else ""
    logger.info(f"model {config.MODEL.NAME}: {parameters / 1e6:.2f} M parameters{part}, {len(loaders.classes)} classes, "
                f"on {device} in {precision.name}, torch {torch.__version__}")
    val = len(loaders.val.dataset.folder)
    logger.info(f"data {config.DATA.DATA_PATH}: {len(loaders.train.dataset.folder)} training and {val} validation images, "
                f"{steps_per_epoch} steps an epoch, {loaders.train.num_workers} workers; {loaders.train.dataset.pipeline.description()}")
    logger.info(f"global batch {global_batch} = {config.DATA.BATCH_SIZE} images x {config.TRAIN.ACCUMULATION_STEPS} accumulated x "
                f"{distributed.world_size()} processes; learning rate {config.TRAIN.BASE_LR:g} x {optim.lr_scale(config, global_batch):g} "
                f"= {schedule.base:g}, from {schedule.warmup:g} over {schedule.warmup_steps} steps, to {schedule.floor:g}")


def _best(best: dict[str, float]) -> str:
    return f", best top1 {best['top1']:.2f} at epoch {best['epoch']}" if best else ""


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(max(0, seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


# --------------------------------------------------------------------------------------------------
# Evaluation and throughput
# --------------------------------------------------------------------------------------------------

def evaluate_run(config: CfgNode, content: Any, device: torch.device, logger: Log) -> None:
    """Judge a checkpoint, or published weights, on the validation folder; the training folder is not touched."""
    path, content = _weights_to_judge(config, content)
    precision = choose_precision(config, device)
    if precision.notice:
        logger.info(precision.notice)
    make_deterministic(device)
    own = checkpoint.is_own(content)
    loaders = build_loaders(config, distributed.rank(), distributed.world_size(), splits=("val",),
                            classes=content["classes"] if own else None, device=device, published=not own)
    for line in loaders.notices:
        logger.info(line)
    model = build_model(config, len(loaders.classes))
    check_input_size(model, config)
    logger.info(f"evaluating {path}" + (f" (step {content['step']})" if own else "") + f" on {config.DATA.DATA_PATH}, "
                f"{len(loaders.val.dataset.folder)} images, {len(loaders.classes)} classes")
    # Where a run kept an average, it is what counts; the raw weights are judged beside it.
    states = [s for s in (content["model"], content["ema"]) if s] if own else [unwrap_state_dict(content, path)]
    models = [model, *(copy.deepcopy(model) for _ in states[1:])]
    for judged, state in zip(models, states, strict=True):
        check_finite(state, path)
        load_state(judged, state, config, path)
        judged.to(device)
    with contextlib.closing(loaders):
        *raw, result = evaluate(models, loaders.val, device, precision)
    logger.info(f"images {loaders.val.dataset.pipeline.summary()}")
    for other in raw:
        logger.info(f"raw {other.line()}")
    logger.info(result.line())


def _weights_to_judge(config: CfgNode, content: Any) -> tuple[str, Any]:
    """(path, content): --resume, else the run folder's best, else --pretrained."""
    if content is not None:
        return config.MODEL.RESUME, content
    best = os.path.join(run_folder(config), "best.pth")
    path = best if os.path.exists(best) else config.MODEL.PRETRAINED
    if not path:
        raise ConfigError(f"--eval needs weights: give --resume FILE (there is no {best})")
    return path, read_file(path)


def measure_throughput(config: CfgNode, device: torch.device, logger: Log) -> None:
    """Images per second of the forward pass and of a training step, on made-up images."""
    precision = choose_precision(config, device)
    for line in (precision.notice, *optim.apex_notices(config)):
        if line:
            logger.info(line)
    seed_initialisation(config.SEED)
    model = build_model(config)
    check_input_size(model, config)
    for line in measure(model.to(device), config, device, precision):
        logger.info(line)
