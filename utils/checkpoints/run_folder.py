"""The folder of a run: its place, its lock, and room for its checkpoints."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Iterator

from filelock import FileLock
from yacs.config import CfgNode

from config import ConfigError
from utils.checkpoints.folder import CheckpointFolder, is_checkpoint
from utils.loggers.console import close_files, log_to_file
from utils.loggers.metrics_files import LOG, RECORDS
from utils.runtime import distributed
from utils.runtime.files import file_limit, free_bytes, lock_folder, remove_leftovers


def run_folder(config: CfgNode) -> str:
    """OUTPUT/MODEL.NAME/TAG; a timm name may hold characters that a folder's must not."""
    name = config.MODEL.NAME.replace("/", "_").replace(":", "_").replace(os.sep, "_")
    return os.path.join(os.path.expanduser(config.OUTPUT or "output"), name, config.TAG)


def require_writable(folder: str, dry: bool) -> None:
    """Raise ``ConfigError`` when the folder cannot be made or written, holds other things under the names of a run's files, or, unless
    ``dry``, another run is in it; makes nothing."""
    there = os.path.abspath(folder)
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there):
        raise ConfigError(f"{folder}: cannot be written ({there} is no folder); choose another --output or --tag")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder}: cannot be written (no permission in {there}); choose another --output")
    if there == os.path.abspath(folder):
        _require_kinds(folder)
    if distributed.is_main() and not dry and os.path.exists(os.path.join(folder, ".lock")):
        _lock(folder).release()


def _lock(folder: str) -> FileLock:
    try:
        return lock_folder(folder)
    except BlockingIOError as error:
        raise ConfigError(f"{folder}: another run is writing here ({error.filename or 'process unknown'}); "
                          "wait for it, stop it, or choose another --tag") from None


def require_room(config: CfgNode, folder: str, size: int, epochs: int, logger: logging.Logger) -> None:
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
    wanted = checkpoints_kept(config, epochs) * size
    if free < min(wanted, budget or wanted) and not CheckpointFolder(folder).steps():
        logger.warning(f"{folder}: {free >> 20} MiB are free, the run's checkpoints will take {wanted >> 20} MiB; older ones are "
                    "deleted to make room")


def checkpoints_kept(config: CfgNode, epochs: int) -> int:
    """Checkpoints that a run's folder holds at a time: the newest, the best, the one being written; or those of all epochs."""
    if config.TRAIN.KEEP_CHECKPOINTS:
        return config.TRAIN.KEEP_CHECKPOINTS + 2
    return 1 + math.ceil(epochs / config.SAVE_FREQ)


_FOLDERS = ("tensorboard", "plots")
_FILES = (*RECORDS, "best.pth", "last.pth", "predictions.npz", "report.html", "tracker.json", ".job", ".lock", ".lock-holder")


def _require_kinds(folder: str) -> None:
    """Raise ``ConfigError`` where a pipe, a device or a folder has the name of a file of the run, or a file that of a folder."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        wanted = "folder" if name in _FOLDERS else "file" if name in _FILES or is_checkpoint(name) else ""
        if wanted and os.path.exists(path) and not (os.path.isdir if wanted == "folder" else os.path.isfile)(path):
            raise ConfigError(f"{path}: is no {wanted}, and the run keeps one under that name; move it away, or choose another --tag")


@contextlib.contextmanager
def open_run_folder(folder: str, logger: logging.Logger) -> Iterator[None]:
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
    log_to_file(logger, os.path.join(folder, LOG))
    logger.info(f"run {folder}, begun {time.strftime('%Y-%m-%d %H:%M:%S')}")
    try:
        yield
    finally:
        close_files(logger)
        lock.release()
