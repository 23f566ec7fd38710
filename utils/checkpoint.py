"""Checkpoints: everything a restart needs, as plain data, written whole or not at all, verified when read.

A file is a torch zip followed by a trailer of 8 magic bytes and the sha256 of what stands before it; ``torch.load`` opens it
as it is. Files have immutable step names; ``last.pth`` and ``best.pth`` are links that are replaced in one move, so that
a good checkpoint exists at every moment.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from models.weights import FORMAT_KEY, TRAILER_MAGIC, CheckpointError, check_finite, check_fits, read_file
from utils.ema import WeightAverage
from utils.files import link_atomically, write_atomically

FORMAT = 1
_NAME = re.compile(r"ckpt_(\d{8,})\.pth")


@dataclass
class TrainState:
    """All that changes in training; epoch and samples seen follow from the step and the global batch.

    Attributes:
        step: optimizer steps done.
        best: top-1, epoch and step of the best evaluation so far; empty before the first.
        loss_sums: per rank, the sum of the losses of the images seen in the current epoch, so that an epoch's mean
            loss comes out the same after a restart in its middle.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: WeightAverage | None = None
    step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    loss_sums: list[float] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return dict(
            model=_on_cpu(self.model.state_dict()), ema=_on_cpu(self.ema.module.state_dict()) if self.ema is not None else {},
            optimizer=_on_cpu(self.optimizer.state_dict()), optimizer_name=type(self.optimizer).__name__,
            scaler=self.scaler.state_dict(), step=self.step, best=dict(self.best), loss_sums=list(self.loss_sums))

    def load_state_dict(self, content: dict[str, Any], path: str) -> None:
        """Take over a checkpoint's state; raises ``CheckpointError`` naming what does not fit, before anything is changed."""
        check_fits(self.model, content["model"], path)
        check_finite(content["model"], path)
        averaged = content["ema"] or content["model"]  # an average switched on later starts from the weights
        if self.ema is not None:
            check_fits(self.ema.module, averaged, path)
        # torch checks only how many parameters a state is for; another optimizer's would be taken and fail later.
        saved, wanted = content.get("optimizer_name"), type(self.optimizer).__name__
        ours = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        try:
            if saved not in (None, wanted):
                raise ValueError(f"it was {saved}")
            self.optimizer.load_state_dict(content["optimizer"])
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: its optimizer state does not fit {wanted} ({error}); keep the optimizer and the "
                                  f"parameter groups of the run, or start anew with --pretrained {path}") from None
        for group, values in zip(self.optimizer.param_groups, ours, strict=True):
            group.update(values)  # the config's weight decay and betas hold, not the file's
        self.model.load_state_dict(content["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(averaged)
        if content["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(content["scaler"])
        self.step, self.best, self.loss_sums = content["step"], dict(content["best"]), list(content["loss_sums"])


def _on_cpu(value: Any) -> Any:
    """Nested plain data with its tensors on the CPU, so that a file opens on any machine; what is there is not copied."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {k: _on_cpu(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(v) for v in value)
    return value


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


def require_own(content: Any, path: str) -> dict[str, Any]:
    """``content`` of a file that must be a checkpoint of this program, in a format this version knows.

    Raises:
        CheckpointError: somebody else's file of bare weights, or of a newer format.
    """
    if not is_own(content):
        raise CheckpointError(f"{path}: holds weights but no training state; start from it with --pretrained {path}")
    if content[FORMAT_KEY] > FORMAT:
        raise CheckpointError(f"{path}: written by a newer version of this program (format {content[FORMAT_KEY]}); update it")
    return content


def is_own(content: Any) -> bool:
    """Whether a file's content is a checkpoint of this program."""
    return isinstance(content, dict) and isinstance(content.get(FORMAT_KEY), int)


class CheckpointFolder:
    """The checkpoints of a run."""

    def __init__(self, folder: str, keep: int = 2, protected: str = ""):
        """``protected``: a file never deleted: the one that --resume names, which the same command will want again."""
        self.folder, self.keep, self.protected = folder, keep, protected

    def steps(self) -> list[int]:
        """Steps of the checkpoints there are, newest first: by number, whatever the clock said."""
        names = os.listdir(self.folder) if os.path.isdir(self.folder) else []
        return sorted((int(match[1]) for match in map(_NAME.fullmatch, names) if match), reverse=True)

    def path(self, step: int) -> str:
        return os.path.join(self.folder, f"ckpt_{step:08d}.pth")

    def save(self, content: dict[str, Any], best: bool) -> str:
        """Write a checkpoint, point ``last.pth`` (and ``best.pth``) at it, and delete those no longer kept."""
        path = self.path(content["step"])
        write_checkpoint(path, content)
        if best:
            link_atomically(path, os.path.join(self.folder, "best.pth"))
        link_atomically(path, os.path.join(self.folder, "last.pth"))
        self._prune()
        return path

    def newest(self) -> tuple[str, dict[str, Any], list[str]] | None:
        """(path, content, lines about damaged ones passed over) of the newest good checkpoint; None where there are none.

        Raises:
            CheckpointError: there are checkpoints, but every one of them is damaged.
        """
        damage: list[str] = []
        for step in self.steps():
            path = self.path(step)
            try:
                content = require_own(read_file(path), path)
                check_finite(content["model"], path)
                return path, content, [f"warning: {line}; trying the one before" for line in damage]
            except CheckpointError as error:
                damage.append(str(error))
        if damage:
            raise CheckpointError(f"{self.folder}: none of its {len(damage)} checkpoints can be read ({damage[0]}); "
                                  "move them away, or use another --tag, to start anew")
        return None

    def relink(self, content: dict[str, Any]) -> None:
        """Point the links at the checkpoint that a run continues from: a kill may have come between it and them."""
        path = self.path(content["step"])
        link_atomically(path, os.path.join(self.folder, "last.pth"))
        if content["best"].get("step") == content["step"]:
            link_atomically(path, os.path.join(self.folder, "best.pth"))

    def set_aside(self, step: int) -> str | None:
        """Move checkpoints beyond ``step`` into a folder of their own; its path, or None when there are none.

        A run that begins anew in a used folder, or from an older checkpoint, would otherwise be taken for the one that
        left them. They are kept: nothing that was saved is lost.
        """
        later = [number for number in self.steps() if number > step]
        if not later:
            return None
        number = 1
        while os.path.exists(aside := os.path.join(self.folder, f"superseded-{number}")):
            number += 1
        os.makedirs(aside)
        for number in later:
            os.replace(self.path(number), os.path.join(aside, os.path.basename(self.path(number))))
        for link in (os.path.join(self.folder, name) for name in ("best.pth", "last.pth")):
            if os.path.islink(link) and not os.path.exists(link):
                os.unlink(link)
        return aside

    def _prune(self) -> None:
        if not self.keep:
            return
        wanted = [os.path.join(self.folder, name) for name in ("best.pth", "last.pth")] + [self.protected]
        kept = {os.path.realpath(path) for path in wanted if path}
        for step in self.steps()[self.keep:]:
            if os.path.realpath(self.path(step)) not in kept:
                with contextlib.suppress(OSError):
                    os.unlink(self.path(step))


def describe(config_text: str, classes: list[str], preprocessing: dict[str, Any], data_path: str, global_batch: int,
             steps_per_epoch: int) -> dict[str, Any]:
    """What a checkpoint says beside the state: enough to evaluate or continue it with no other file."""
    return {FORMAT_KEY: FORMAT, "config": config_text, "classes": list(classes), "preprocessing": preprocessing,
            "data_path": os.path.abspath(os.path.expanduser(data_path)), "global_batch": global_batch, "steps_per_epoch": steps_per_epoch,
            "versions": versions(), "git_commit": git_commit()}


def versions() -> dict[str, str]:
    """Versions of what computed the run."""
    import timm
    import torchvision
    return {"python": sys.version.split()[0],  # str: torch's own version is an object that no safe reader would take
            **{module.__name__: str(module.__version__) for module in (torch, torchvision, timm)}}


def git_commit() -> str:
    """The commit this program is at, or nothing outside a checkout."""
    try:
        here = os.path.dirname(os.path.abspath(__file__))
        done = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""
    except (OSError, subprocess.SubprocessError):
        return ""
