"""The modes of the program, each assembled from the parts: train, evaluate, measure."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from torch import nn
from yacs.config import CfgNode

from config import (
    KEYS,
    ConfigError,
    config_for_another_command,
    config_from_text,
    get_config,
    lookup,
    of_the_command,
    with_values,
)
from data import build_loaders
from models import build_model, check_input_size, load_pretrained
from models.weights import CheckpointError, read_file
from utils import checkpoint, distributed, optim
from utils.batches import divisors, local_batch, recipe_batch, split_batch
from utils.board import require_tracker
from utils.checkpoint import CheckpointFolder, TrainState, program_digest
from utils.compile import compile_model, require_compiler
from utils.device import Precision, choose_precision
from utils.ema import build_average
from utils.engine import StepPlan
from utils.files import file_limit, free_bytes, lock_folder, remove_leftovers
from utils.fit import largest_micro_batch
from utils.freeze import freeze
from utils.logger import close_files, log_to_file
from utils.progress import listing, periodic
from utils.reading import teller
from utils.seed import make_deterministic, seed_initialisation
from utils.session import Session, best_line
from utils.signals import StopRequest
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
    if compared := _asked_value("COMPARE.FILES", asked, opts):
        return _resolve_each(cfg_file, opts, compared)
    resume = os.path.expanduser(_asked_value("MODEL.RESUME", asked, opts))
    return _resolve(asked, opts, resume, read_file(resume) if resume else None)


def _resolve(asked: CfgNode | None, opts: list[str], resume: str, content: Any) -> tuple[CfgNode, Any]:
    """``asked``: the config of the command's YAML file, if it names one."""
    if asked is not None:
        if content is not None and checkpoint.is_own(content) and not asked.DATA.DATA_PATH:
            asked = with_values(asked, {"DATA.DATA_PATH": content["data_path"]}, f"checkpoint {resume}")
        return asked, content
    if content is None:
        return get_config(None, opts), None
    if not checkpoint.is_own(content):
        raise ConfigError(f"{resume} holds weights without a config; add --cfg with the YAML file of its model")
    checkpoint.require_own(content, resume)
    return config_for_another_command(content["config"], content["data_path"], opts, resume), content


def _resolve_each(cfg_file: str | None, opts: list[str], files: Any) -> tuple[CfgNode, list[tuple[CfgNode, Any]]]:
    """(config of the first, [(config, content) of each]) of files to compare: each by its own config, bare weights by ``cfg_file``."""
    opts, found = [*opts, "COMPARE.FILES", files], []
    for path in map(os.path.expanduser, lookup(get_config(None, ["COMPARE.FILES", files]), "COMPARE.FILES")):
        content, own = read_file(path), [*opts, "MODEL.RESUME", path]
        asked = get_config(cfg_file, own) if cfg_file and not checkpoint.is_own(content) else None
        found.append(_resolve(asked, own, path, content))
    return found[0][0], found


def _asked_value(key: str, asked: CfgNode | None, opts: list[str]) -> Any:
    return lookup(asked, key) if asked is not None else _last_value(opts, key)


def _last_value(opts: list[str], key: str) -> Any:
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
    start, found = None, None
    files = CheckpointFolder(folder)
    if distributed.is_main() and (config.TRAIN.AUTO_RESUME or files.begun_by_this_job()):
        found = files.newest()
        for line in found[2] if found is not None else ():
            logger.info(line)
    # Rank 0 chooses: another machine may not see yet what was written a moment ago.
    if (shared := files.share(found)) is not None:
        start = Start("auto-resume", *shared)
    if start is None and config.MODEL.RESUME:
        start = Start("resume", config.MODEL.RESUME, checkpoint.require_own(resume_content, config.MODEL.RESUME))
    if start is None:
        start = Start("pretrained", os.path.expanduser(config.MODEL.PRETRAINED)) if config.MODEL.PRETRAINED else Start("scratch")
    steps = distributed.gather_objects((start.content or {}).get("step"))
    if any(step != steps[0] for step in steps):
        raise CheckpointError(f"the processes would start from different steps ({', '.join(map(str, steps))}, by rank); "
                              "put --output and what --resume names on a disk that all of them see")
    logger.info(f"start: {start.kind}{' ' + start.path if start.path else ''} (the first there is of: auto-resume from {folder}, "
                "--resume, --pretrained, scratch)")
    return start


def keep_global_batch(config: CfgNode, wanted: int, whose: str, world_size: int, logger: Log) -> CfgNode:
    """The config with batch and accumulation that give a global batch of ``wanted`` images on this many processes.

    Args:
        whose: of whom it is: ``the checkpoint's`` or ``the recipe's``.
    """
    micro = config.DATA.BATCH_SIZE
    if micro * config.TRAIN.ACCUMULATION_STEPS * world_size == wanted:
        return config
    local = local_batch(wanted, whose, world_size)
    micro = max(n for n in divisors(local) if n <= micro)
    logger.info(f"notice: {whose} global batch of {wanted} is kept: {micro} images x {local // micro} accumulated x "
                f"{world_size} processes")
    return split_batch(config, local, micro, whose)


def fit_micro_batch(config: CfgNode, start: Start, device: torch.device, world_size: int, logger: Log) -> CfgNode:
    """The config with the largest micro-batch that memory holds; the global batch is the checkpoint's, or the recipe's."""
    whose = "the recipe's" if start.content is None else "the checkpoint's"
    wanted = recipe_batch(config, world_size) if start.content is None else start.content["global_batch"]
    local = local_batch(wanted, whose, world_size)
    distributed.mark("looking for the largest micro-batch")
    outputs = config.MODEL.NUM_CLASSES or len((start.content or {}).get("classes", ()))
    if not outputs:
        with listing(functools.partial(periodic, logger)):
            outputs = len(build_loaders(config, distributed.rank(), world_size, splits=("train",), device=device).classes)
    micro, line = largest_micro_batch(config, local, outputs, device)
    logger.info(f"fit: {micro} images x {local // micro} accumulated x {world_size} processes = {wanted}, {whose} global batch, so that "
                f"learning rate and steps stay; {line}")
    return split_batch(config, local, micro, whose)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------

@dataclass
class Prepared:
    """A run before its first step; nothing has been written yet.

    Attributes:
        fixed: modules that stay in evaluation mode.
    """

    config: CfgNode
    folder: str
    start: Start
    device: torch.device
    precision: Precision
    loaders: Any
    global_batch: int
    state: TrainState
    fixed: list[nn.Module]

    @property
    def schedule(self) -> optim.Schedule:
        return optim.build_schedule(self.config, self.loaders.train.batch_sampler.steps_per_epoch, self.global_batch)

    def step_plan(self) -> StepPlan:
        config = self.config
        return StepPlan(self.schedule, optim.build_loss(config.MODEL.LABEL_SMOOTHING), self.loaders.mixup, self.precision, self.device,
                        config.DATA.BATCH_SIZE, self.loaders.train.batch_sampler.images_per_step, config.TRAIN.CLIP_GRAD or float("inf"),
                        config.SEED, distributed.rank(), distributed.world_size(), self.fixed)


def train_run(config: CfgNode, resume_content: Any, device: torch.device, logger: Log) -> None:
    """Train to the last epoch, from wherever the run stands. Nothing is written before everything has been checked."""
    with StopRequest() as stop:
        _train(config, resume_content, device, stop, logger)


def prepare(config: CfgNode, resume_content: Any, device: torch.device, logger: Log, dry: bool = False) -> Prepared | None:
    """Everything up to the first step, checked; None where the run is finished already.

    Args:
        dry: whether no run shall follow; the run's folder is then not even touched.
    """
    rank, world_size, folder = distributed.rank(), distributed.world_size(), run_folder(config)
    optim.check_optimizer(config)
    if distributed.is_main():
        require_tracker(config.TRACKER)
    _require_writable(folder, dry)
    distributed.mark("choosing where to start")
    start = choose_start(config, resume_content, folder, logger)
    if config.PLAN.FIT:
        config = fit_micro_batch(config, start, device, world_size, logger)
    if start.content is not None:
        if config.TRAIN.GLOBAL_BATCH not in (0, start.content["global_batch"]):
            logger.info(f"notice: TRAIN.GLOBAL_BATCH is {config.TRAIN.GLOBAL_BATCH}, but {start.path} has a global batch of "
                        f"{start.content['global_batch']}, which is kept; another one needs a run of its own (--pretrained)")
        config = keep_global_batch(config, start.content["global_batch"], "the checkpoint's", world_size, logger)
    precision = choose_precision(config, device)
    make_deterministic(device)
    require_compiler(device, config.COMPILE)

    distributed.mark("indexing the images")
    with listing(functools.partial(periodic, logger)):
        loaders = build_loaders(config, rank, world_size, device=device)
    loaders.tell(teller(logger))
    sampler = loaders.train.batch_sampler
    global_batch = config.DATA.BATCH_SIZE * config.TRAIN.ACCUMULATION_STEPS * world_size
    steps_per_epoch, total_steps = sampler.steps_per_epoch, sampler.total_steps
    for line in (*loaders.notices, *optim.apex_notices(config), precision.notice):
        if line:
            logger.info(line)
    require_agreement(config, loaders)
    if start.content is None:
        _require_steps(config, len(loaders.train.dataset.folder), world_size)
        if global_batch != recipe_batch(config, world_size):
            logger.info(f"notice: the recipe's global batch is {config.TRAIN.GLOBAL_BATCH}, this one {global_batch}; the learning rate "
                        "follows it, results may not; --fit keeps the recipe's")
    else:
        _check_same_data(start, loaders.classes, steps_per_epoch)
        if start.content["step"] >= total_steps and start.content.get("evaluated", total_steps) >= total_steps:
            if start.kind == "auto-resume" and distributed.is_main() and not dry:
                CheckpointFolder(folder).relink(start.content)
            logger.info(f"finished already: {start.path} is at step {start.content['step']} of {total_steps}"
                        f"{best_line(start.content['best'])}; raise --epochs to go on, or choose another --tag for a new run")
            return None

    distributed.mark("building the model")
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
    state = TrainState(model, optim.build_optimizer(config, model), precision.scaler, build_average(config, model))
    if start.content is not None:
        state.load_state_dict(start.content, start.path)
        accept_changes(start, config, logger)
    compile_model(model, config.COMPILE)
    if state.ema is not None:
        compile_model(state.ema.module, config.COMPILE, like=model)
    return Prepared(config, folder, start, device, precision, loaders, global_batch, state, fixed)


def _train(config: CfgNode, resume_content: Any, device: torch.device, stop: StopRequest, logger: Log) -> None:
    ready = prepare(config, resume_content, device, logger)
    if ready is None:
        return
    config, folder, start, loaders, state = ready.config, ready.folder, ready.start, ready.loaders, ready.state
    require_room(config, folder, state.size(), logger)
    if start.content is not None:
        logger.info(f"resumed {start.path} at step {state.step}")

    distributed.mark("opening the run's folder")
    with _open_run_folder(folder, logger):
        files = CheckpointFolder(folder, config.TRAIN.KEEP_CHECKPOINTS, os.path.expanduser(config.MODEL.RESUME),
                                 config.TRAIN.CHECKPOINT_BUDGET)
        here = start.content is not None and files.holds(start.path)
        if distributed.is_main():
            if (aside := files.set_aside(state.step if here else -1)) is not None:
                logger.info(f"notice: what an earlier run left here{f' beyond step {state.step}' if here else ''} is moved to {aside}")
            files.note_job()
            if here:
                files.relink(start.content)
            if not os.path.exists(os.path.join(folder, "best.pth")):
                state.best = {}  # its weights lie elsewhere, if anywhere: the best of this folder is still to come
        if start.content is not None:
            start.content.clear()  # a gigabyte that is no longer needed
        plan = ready.step_plan()
        _introduce(config, device, ready.precision, state.model, loaders, loaders.train.batch_sampler.steps_per_epoch, ready.global_batch,
                   plan.schedule, logger)
        session = Session(config, files, state, plan, loaders, ready.global_batch, stop, logger, saved=here)
        with contextlib.closing(loaders):
            session.train(distributed.wrap(state.model, device, config.TRAIN.ACCUMULATION_STEPS, config.TRAIN.GRAD_COMPRESSION))


def _require_writable(folder: str, dry: bool) -> None:
    """Raise ``ConfigError`` when the folder cannot be made or written, or, unless ``dry``, another run is in it; makes nothing."""
    there = os.path.abspath(folder)
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there):
        raise ConfigError(f"{folder}: cannot be written ({there} is no folder); choose another --output or --tag")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder}: cannot be written (no permission in {there}); choose another --output")
    if distributed.is_main() and not dry and os.path.exists(os.path.join(folder, ".lock")):
        _lock(folder).close()


def _lock(folder: str) -> TextIO:
    try:
        return lock_folder(folder)
    except BlockingIOError as error:
        raise ConfigError(f"{folder}: another run is writing here ({error.filename or 'process unknown'}); "
                          "wait for it, stop it, or choose another --tag") from None


def require_room(config: CfgNode, folder: str, size: int, logger: Log) -> None:
    """Look, before the run, whether the disk and the budget hold its checkpoints of ``size`` bytes.

    Raises:
        ConfigError: not even one fits, or the budget cannot hold the best, the newest and the one being written.
    """
    budget, free = config.TRAIN.CHECKPOINT_BUDGET, min(free_bytes(folder), file_limit())
    if budget and budget < 3 * size:
        raise ConfigError(f"TRAIN.CHECKPOINT_BUDGET is {budget >> 20} MiB; a checkpoint takes {size / 2**20:.1f} MiB and there are three "
                          f"at a time (the best, the newest, the one being written), so give at least {-(-3 * size >> 20)}MiB")
    if free < size:
        raise ConfigError(f"{folder}: a checkpoint takes {size / 2**20:.1f} MiB, but only {free / 2**20:.1f} MiB can be written there; "
                          "free some space, or choose another --output")
    wanted = checkpoints_kept(config) * size
    if free < min(wanted, budget or wanted) and not CheckpointFolder(folder).steps():
        logger.info(f"warning: {folder}: {free >> 20} MiB are free, the run's checkpoints will take {wanted >> 20} MiB; older ones are "
                    "deleted to make room")


def checkpoints_kept(config: CfgNode) -> int:
    """Checkpoints that a run's folder holds at a time: the newest, the best, the one being written; or those of all epochs."""
    if config.TRAIN.KEEP_CHECKPOINTS:
        return config.TRAIN.KEEP_CHECKPOINTS + 2
    return 1 + math.ceil(config.TRAIN.EPOCHS / config.SAVE_FREQ)


def require_agreement(config: CfgNode, loaders: Any) -> None:
    """Make sure that all processes were given the same config, images and program; each would silently train something else.

    Raises:
        ConfigError: naming what differs, and on which rank.
    """
    if distributed.world_size() == 1:
        return
    sources = {"training images": loaders.train, "validation images": loaders.val}
    own = {f"{what} ({len(loader.dataset.folder)})": loader.dataset.folder.fingerprint() for what, loader in sources.items()}
    own |= {f"config key {key}": str(lookup(config, key)) for key, *_ in KEYS if key not in _PER_PROCESS}
    own |= {"class names": "\n".join(loaders.classes), "program": program_digest()}
    own |= {f"version of {name}": version for name, version in checkpoint.versions().items()}
    facts = distributed.gather_objects(own)
    for rank, theirs in enumerate(facts):
        for what in sorted(facts[0].keys() | theirs.keys()):
            if facts[0].get(what) != theirs.get(what):
                shown = " and ".join(str(fact.get(what, "another number"))[:80].replace("\n", ", ") for fact in (facts[0], theirs))
                raise ConfigError(f"rank {rank} does not have rank 0's {what} ({shown}); give every process the same command, "
                                  "the same files and the same installation")


_PER_PROCESS = ("DEVICE", "LOCAL_RANK", "OUTPUT", "DATA.NUM_WORKERS", "DATA.DATA_PATH")


@contextlib.contextmanager
def _open_run_folder(folder: str, logger: Log) -> Iterator[None]:
    """The run's folder, made, locked against a second run in it, its log open; rank 0's business alone."""
    if not distributed.is_main():
        yield
        return
    try:
        os.makedirs(folder, exist_ok=True)
        lock = _lock(folder)
        remove_leftovers(folder)
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
                          f"micro-batches of {micro} x {world_size}; accumulate at most {micro_batches}"
                          + (f", which is --global-batch {micro * world_size * micro_batches}" if config.PLAN.FIT else ""))


# Keys that say where, how fast, how loud and how safely, not what is learned.
_HARMLESS = ("BASE", "OUTPUT", "TAG", "DEVICE", "COMPILE", "SAVE_FREQ", "PRINT_FREQ", "DIST_TIMEOUT",
             "DATA.DATA_PATH", "DATA.DATASET", "DATA.NUM_WORKERS", "DATA.PIN_MEMORY", "DATA.ZIP_MODE", "DATA.CACHE_MODE",
             "DATA.TIMEOUT", "DATA.READ_PATIENCE", "DATA.INDEX_CACHE", "DATA.CORRUPT_BUDGET",
             "DATA.BATCH_SIZE", "MODEL.PRETRAINED", "MODEL.RESUME", "MODEL.NUM_CLASSES", "TRAIN.ACCUMULATION_STEPS",
             "TRAIN.USE_CHECKPOINT", "TRAIN.CHECKPOINT_UNIT", "TRAIN.EMA_DEVICE", "TRAIN.SAVE_EVERY_STEPS", "TRAIN.SAVE_EVERY_MINUTES",
             "TRAIN.BACKGROUND_SAVE", "TRAIN.KEEP_CHECKPOINTS", "TRAIN.CHECKPOINT_BUDGET", "TRAIN.SKIP_BUDGET",
             "TRAIN.ROLLBACKS", "TRAIN.EVAL_FREQ", "TRAIN.REPORT", "TRAIN.TENSORBOARD_HISTOGRAMS", "TRACKER", "TRACKER_PROJECT",
             "TRAIN.GLOBAL_BATCH", "TEST.BATCH_SIZE")


def accept_changes(start: Start, config: CfgNode, logger: Log) -> None:
    """Compare the recipe with that of the checkpoint a run continues from.

    More epochs are taken as they are, the rule being said; any other change must be meant.

    Raises:
        ConfigError: the recipe differs and TRAIN.ACCEPT_CHANGES is not set.
    """
    try:
        old = config_from_text(start.content["config"])
    except ConfigError:
        logger.info(f"notice: {start.path} was written with a config of another version; it is not compared")
        return
    pairs = [(key, lookup(old, key), lookup(config, key)) for key, *_ in KEYS if key not in _HARMLESS and not of_the_command(key)]
    changes = {key: f"{key} changed from {before} to {now}" for key, before, now in pairs if before != now}
    if (epochs := changes.pop("TRAIN.EPOCHS", None)) is not None:
        logger.info(f"notice: {epochs} since {start.path} was written; from its step on the learning rate follows the longer or "
                    "shorter schedule")
    if changes and not config.TRAIN.ACCEPT_CHANGES:
        raise ConfigError(f"the recipe is not that of {start.path}: {'; '.join(changes.values())}; go on with it by --accept-changes, "
                          "or begin anew under another --tag")
    for line in changes.values():
        logger.info(f"notice: {line} since {start.path} was written")


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
    val = len(loaders.val.dataset.folder) or "an unknown number of"
    logger.info(f"data {config.DATA.DATA_PATH} ({loaders.layout}): {len(loaders.train.dataset.folder)} training and {val} validation "
                f"images, {steps_per_epoch} steps an epoch, {loaders.train.num_workers} workers; "
                f"{loaders.train.dataset.pipeline.description()}")
    logger.info(f"global batch {global_batch} = {config.DATA.BATCH_SIZE} images x {config.TRAIN.ACCUMULATION_STEPS} accumulated x "
                f"{distributed.world_size()} processes; learning rate {config.TRAIN.BASE_LR:g} x {optim.lr_scale(config, global_batch):g} "
                f"= {schedule.base:g}, from {schedule.warmup:g} over {schedule.warmup_steps} steps, to {schedule.floor:g}")


# --------------------------------------------------------------------------------------------------
# Throughput, and what evaluation begins with
# --------------------------------------------------------------------------------------------------

def weights_to_judge(config: CfgNode, content: Any, command: str) -> tuple[str, Any]:
    """(path, content) for ``command``: --resume, else the run folder's best, else --pretrained."""
    if content is not None:
        return config.MODEL.RESUME, content
    best = os.path.join(run_folder(config), "best.pth")
    path = best if os.path.exists(best) else config.MODEL.PRETRAINED
    if not path:
        raise ConfigError(f"{command} needs weights: give --resume FILE (there is no {best})")
    return path, read_file(path)


def measure_throughput(config: CfgNode, content: Any, device: torch.device, logger: Log) -> None:
    """Images per second of the forward pass and of a training step, on made-up images."""
    precision = choose_precision(config, device)
    for line in (precision.notice, *optim.apex_notices(config)):
        if line:
            logger.info(line)
    require_compiler(device, config.COMPILE)
    seed_initialisation(config.SEED)
    model = build_model(config)
    check_input_size(model, config)
    for line in measure(model.to(device), config, device, precision):
        logger.info(line)
