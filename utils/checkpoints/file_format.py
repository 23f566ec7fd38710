"""The checkpoint file: a torch zip with a digest behind it, written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable
from typing import Any, BinaryIO

import torch
from torch import Tensor
from yacs.config import CfgNode

from config import FOUND_IN_DATA, ConfigError, config_from_text, input_channels, lookup, with_values
from models.safe_load import FORMAT_KEY, TRAILER_MAGIC, CheckpointError
from utils.runtime.files import write_atomically
from utils.runtime.provenance import git_commit, versions

FORMAT = 1


class _Hashing:
    """A file that digests what passes through it."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def write_checkpoint(path: str, content: dict[str, Any]) -> None:
    """Write ``content`` with its digest under ``path``, atomically.

    Raises:
        OSError: the disk is full or the folder is gone; nothing is left behind, older files are untouched.
    """
    def write(file: BinaryIO) -> None:
        hashing = _Hashing(file)
        try:
            torch.save(content, hashing)
        except RuntimeError:  # torch's zip writer reports a full disk so
            raise OSError(errno.ENOSPC, "cannot be written, the disk may be full", path) from None
        file.write(TRAILER_MAGIC + hashing.digest.digest())
    try:
        write_atomically(path, write)
    except OSError as error:
        error.filename = path  # what the user knows, not the temporary name
        raise


# What every checkpoint of ours has had, and of what kind; what a run is continued by, which exports and averages leave out.
_MODEL: dict[str, type] = dict(config=str, classes=list, data_path=str, step=int, model=dict, ema=dict, best=dict)
_TRAINING: dict[str, type] = dict(global_batch=int, steps_per_epoch=int, optimizer=dict, scaler=dict, loss_sums=list)


def require_own(content: Any, path: str) -> dict[str, Any]:
    """``content`` of a file that must be a checkpoint of this program, in a format this version knows.

    Raises:
        CheckpointError: somebody else's file of bare weights, of a newer format, or with a part missing or of another kind.
    """
    if not is_own(content):
        raise CheckpointError(f"{path}: holds weights but no training state; start from it with --pretrained {path}")
    if content[FORMAT_KEY] > FORMAT:
        raise CheckpointError(f"{path}: written by a newer version of this program (format {content[FORMAT_KEY]}); update it")
    parts = _MODEL | (_TRAINING if any(name in content for name in _TRAINING) else {})
    missing = [name for name in parts if name not in content]
    wrong = [name for name, kind in parts.items() if name in content and not isinstance(content[name], kind)]
    wrong += [name for name, least in (("step", 0), ("global_batch", 1), ("steps_per_epoch", 1))
              if name in parts and name not in (*missing, *wrong) and content[name] < least]
    if not missing and not wrong:
        wrong = _wrong_within(content)
    if missing or wrong:
        raise CheckpointError(f"{path}: is no whole checkpoint of this program: " + "; ".join(
            f"{what} {', '.join(names)}" for what, names in (("it lacks", missing), ("it has an impossible", wrong)) if names)
            + "; use another one")
    return content


def _wrong_within(content: dict[str, Any]) -> list[str]:
    """Parts of which an entry is of another kind than it must be."""
    def numbers(values: Iterable[Any]) -> bool:
        return all(isinstance(value, (int, float)) for value in values)
    sound = dict(classes=all(isinstance(name, str) for name in content["classes"]), best=numbers(content["best"].values()),
                 loss_sums=numbers(content.get("loss_sums", ())), model=bool(content["model"]))
    for part in ("model", "ema"):
        sound[part] = sound.get(part, True) and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in content[part].items())
    return [part for part, good in sound.items() if not good]


def require_training_state(content: Any, path: str) -> dict[str, Any]:
    """``require_own`` of a checkpoint that a run can be continued from: it is no export and no average of checkpoints."""
    if is_own(content) and "optimizer" not in content:
        raise CheckpointError(f"{path}: holds a trained model but no training state; start from it with --pretrained {path}")
    return require_own(content, path)


def is_own(content: Any) -> bool:
    """Whether a file's content is a checkpoint of this program."""
    return isinstance(content, dict) and isinstance(content.get(FORMAT_KEY), int)


def task_of(content: dict[str, Any]) -> str:
    """The value of TASK that a checkpoint of ours was trained with."""
    try:
        task = config_from_text(content["config"]).TASK
    except ConfigError:  # of another version
        task = "auto"
    return "classification" if task == "auto" else task


def task_state(content: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint of ours keeps of its task (``Task.state_dict``); empty where it keeps nothing."""
    state = content.get("task")
    return state if isinstance(state, dict) else {}


def with_found(config: CfgNode, content: Any, path: str) -> CfgNode:
    """``config`` with what the run of a checkpoint found in its data (``config.FOUND_IN_DATA``), and the channels of its images, where the
    config leaves them open."""
    try:
        saved = config_from_text(content["config"]) if is_own(content) else config
        found = {key: lookup(saved, key) for key in FOUND_IN_DATA if lookup(config, key) is None and lookup(saved, key) is not None}
        if config.MODEL.IN_CHANS is None and input_channels(config) == 3 != input_channels(saved):
            found["MODEL.IN_CHANS"] = input_channels(saved)
        return with_values(config, found, f"checkpoint {path}") if found else config
    except ConfigError:  # another version's, or it does not fit; whoever needs the rest of it says so
        return config


def describe(config_text: str, classes: list[str], preprocessing: dict[str, Any], data_path: str, fingerprints: dict[str, str],
             global_batch: int, steps_per_epoch: int) -> dict[str, Any]:
    """What a checkpoint says beside the state: enough to evaluate or continue it with no other file.

    Args:
        fingerprints: of each split's images.
    """
    return {FORMAT_KEY: FORMAT, "config": config_text, "classes": list(classes), "preprocessing": preprocessing,
            "data_path": data_path if "://" in data_path else os.path.abspath(os.path.expanduser(data_path)),
            "image_fingerprints": fingerprints, "global_batch": global_batch, "steps_per_epoch": steps_per_epoch,
            "versions": versions(), "git_commit": git_commit()}
