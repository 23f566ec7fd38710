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
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from config import PROGRAM_FOLDER
from models.weights import FORMAT_KEY, TRAILER_MAGIC, CheckpointError, check_finite, check_fits, read_file
from utils.about import output
from utils.distributed import gather_objects, restarts
from utils.ema import WeightAverage
from utils.files import file_limit, free_bytes, link_atomically, replace_file, write_atomically

FORMAT = 1
OVERHEAD = 1024  # bytes that a tensor takes in a file beside its numbers, at most
_JOB = ".job"
# What goes with checkpoints that are set aside: copied where the run goes on from an older one, moved where it begins anew.
_COPIED = ("metrics.jsonl", "metrics.csv", "steps.jsonl", "config.yaml", "sources.json", "predictions.npz", "report.html")
_MOVED = ("history.jsonl", "nonfinite.jsonl", "tensorboard", "tracker.json", "plots")
_NAME = re.compile(r"ckpt_(\d{8,})\.pth")


@dataclass
class TrainState:
    """All that changes in training; epoch and samples seen follow from the step and the global batch.

    Attributes:
        step: optimizer steps done.
        best: top-1, epoch and step of the best evaluation so far; empty before the first.
        loss_sums: per rank, the sum of the losses of the images seen in the current epoch, so that an epoch's mean
            loss comes out the same after a restart in its middle.
        loss_steps: steps of the current epoch that loss_sums holds.
        skipped: steps whose update was skipped because loss or gradients were not finite, and that are not forgiven yet.
        rollbacks: times the run went back to a checkpoint because of such steps.
        evaluated: the step after which an epoch was last brought to its end. A checkpoint at an epoch's last step that has
            not been evaluated yet starts with the evaluation.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: WeightAverage | None = None
    step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    loss_sums: list[float] = field(default_factory=list)
    skipped: int = 0
    loss_steps: int = 0
    rollbacks: int = 0
    evaluated: int = 0

    def state_dict(self, copy: bool = False) -> dict[str, Any]:
        """Plain data with its tensors on the CPU; with ``copy`` none of them shares memory with the state."""
        return dict(
            model=_on_cpu(self.model.state_dict(), copy),
            ema=_on_cpu(self.ema.module.state_dict(), copy) if self.ema is not None else {},
            optimizer=_on_cpu(self.optimizer.state_dict(), copy), optimizer_name=type(self.optimizer).__name__,
            scaler=self.scaler.state_dict(), step=self.step, best=dict(self.best), loss_sums=list(self.loss_sums),
            skipped=self.skipped, loss_steps=self.loss_steps, rollbacks=self.rollbacks, evaluated=self.evaluated)

    def size(self) -> int:
        """Bytes of a checkpoint, about: an optimizer that has not stepped yet is taken to keep two tensors a parameter."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        weights, kept = _tensor_bytes(self.model.state_dict()), _tensor_bytes(self.optimizer.state)
        return weights * (1 if self.ema is None else 2) + (kept or 2 * _tensor_bytes(parameters)) + (1 << 16)

    def load_state_dict(self, content: dict[str, Any], path: str) -> None:
        """Take over a checkpoint's state; raises ``CheckpointError`` naming what does not fit, before anything is changed."""
        check_fits(self.model, content["model"], path)
        check_finite(content["model"], path)
        averaged = content["ema"] or content["model"]  # an average switched on later starts from the weights
        if self.ema is not None:
            check_fits(self.ema.module, averaged, path)
        # torch checks only how many parameters a state is for; another optimizer's would be taken and fail later.
        saved, wanted = content.get("optimizer_name"), type(self.optimizer).__name__
        ours = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in self.optimizer.param_groups]
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
        self.skipped, self.rollbacks = content.get("skipped", 0), content.get("rollbacks", 0)
        # Older files lack these: they were written after the evaluation, and no step was skipped.
        self.evaluated = content.get("evaluated", self.step - self.step % content["steps_per_epoch"])
        self.loss_steps = content.get("loss_steps", self.step % content["steps_per_epoch"])


def _on_cpu(value: Any, copy: bool) -> Any:
    """Nested plain data with its tensors on the CPU, so that a file opens on any machine."""
    if isinstance(value, Tensor):
        return value.detach().clone() if copy and value.device.type == "cpu" else value.detach().cpu()
    if isinstance(value, dict):
        return {k: _on_cpu(v, copy) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(v, copy) for v in value)
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

    def __init__(self, folder: str, keep: int = 2, protected: str = "", budget: int = 0):
        """
        Args:
            keep: newest ones kept beside the best; 0 keeps all.
            protected: a file never deleted: the one that --resume names, which the same command will want again.
            budget: bytes that the checkpoints may take together, one that is being written included; 0 is no limit.
        """
        self.folder, self.keep, self.protected, self.budget = folder, keep, protected, budget

    def steps(self) -> list[int]:
        """Steps of the checkpoints there are, newest first: by number, whatever the clock said."""
        names = os.listdir(self.folder) if os.path.isdir(self.folder) else []
        return sorted((int(match[1]) for match in map(_NAME.fullmatch, names) if match), reverse=True)

    def path(self, step: int) -> str:
        return os.path.join(self.folder, f"ckpt_{step:08d}.pth")

    def save(self, content: dict[str, Any], best: bool) -> str:
        """Write a checkpoint, point ``last.pth`` (and ``best.pth``) at it, and delete those no longer kept.

        Raises:
            OSError: no room, even without those that may go; what was saved before is untouched.
        """
        path = self.path(content["step"])
        os.makedirs(self.folder, exist_ok=True)  # somebody may have deleted it
        self._make_room(path, _tensor_bytes(content))
        write_checkpoint(path, content)
        if best:
            link_atomically(path, os.path.join(self.folder, "best.pth"))
        link_atomically(path, os.path.join(self.folder, "last.pth"))
        older = {self.path(step) for step in self.steps()[self.keep:]} if self.keep else set()
        for old in older.intersection(self._disposable()):
            self._delete(old)
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
                                  "--restart begins anew and moves them aside, another --tag leaves them")
        return None

    def share(self, found: tuple[str, dict[str, Any], list[str]] | None) -> tuple[str, dict[str, Any]] | None:
        """(path, content) of what rank 0 has ``found``, on every rank, which reads it itself; None when rank 0 found nothing.

        Raises:
            CheckpointError: another rank does not see the file, or finds it damaged.
        """
        name = gather_objects(os.path.basename(found[0]) if found is not None else "")[0]
        if not name:
            return None
        path = os.path.join(self.folder, name)
        return path, found[1] if found is not None else self.read_patiently(path)

    def read_patiently(self, path: str, seconds: float = 30) -> dict[str, Any]:
        """A checkpoint that another machine has just seen; a shared disk may show it here a little later.

        Raises:
            CheckpointError: it does not appear, or is damaged.
        """
        deadline = time.monotonic() + seconds
        while not os.path.exists(path):
            if time.monotonic() > deadline:
                raise CheckpointError(f"{path}: rank 0 continues from it, but it is not here; put --output on a disk that all "
                                      "processes see")
            time.sleep(0.5)
        return require_own(read_file(path), path)

    def holds(self, path: str) -> bool:
        """Whether ``path`` (a link too) is one of these checkpoints."""
        return os.path.realpath(path) in {os.path.realpath(self.path(step)) for step in self.steps()}

    def relink(self, content: dict[str, Any]) -> None:
        """Point the links at what a run continues from: a kill may have come between it and them."""
        path = self.path(content["step"])
        link_atomically(path, os.path.join(self.folder, "last.pth"))
        best = self.path(content["best"].get("step", -1))
        if os.path.exists(best):
            link_atomically(best, os.path.join(self.folder, "best.pth"))

    def set_aside(self, step: int) -> str | None:
        """Move checkpoints beyond ``step`` into a folder of their own; its path, or None when there are none.

        A run that begins anew in a used folder (``step`` -1), or from an older checkpoint, would otherwise be taken for the
        one that left them. They are kept, with that run's records: nothing that was saved is lost.
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
        for name in (*_COPIED, *_MOVED):
            path = os.path.join(self.folder, name)
            if step < 0 and os.path.exists(path):
                os.replace(path, os.path.join(aside, name))
            elif name in _COPIED and os.path.exists(path):
                shutil.copy(path, aside)
        for link in (os.path.join(self.folder, name) for name in ("best.pth", "last.pth")):
            if os.path.islink(link) and not os.path.exists(link):
                os.unlink(link)
        return aside

    def note_job(self) -> None:
        """Remember which job of a launcher has begun here, for when that starts its processes again."""
        replace_file(os.path.join(self.folder, _JOB), _job().encode())

    def begun_by_this_job(self) -> bool:
        """Whether this is a later attempt of the job that has begun here: --restart was obeyed then."""
        try:
            with open(os.path.join(self.folder, _JOB), encoding="utf-8") as file:
                return restarts() > 0 and file.read() == _job()
        except OSError:
            return False

    def _disposable(self) -> list[str]:
        """Checkpoints that may be deleted, oldest first: not the newest, not the best, not what --resume names."""
        wanted = [os.path.join(self.folder, name) for name in ("best.pth", "last.pth")] + [self.protected]
        kept = {os.path.realpath(path) for path in wanted if path}
        paths = [self.path(step) for step in reversed(self.steps()[1:])]
        return [path for path in paths if os.path.realpath(path) not in kept]

    def _delete(self, path: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(path)

    def _make_room(self, path: str, size: int) -> None:
        """Delete older checkpoints, of those that may go, until ``size`` bytes more fit; none if that would not suffice."""
        there = os.path.getsize(path) if os.path.exists(path) else 0  # replaced when the new one is whole
        disposable = [(old, os.path.getsize(old)) for old in self._disposable()]
        most = sum(size for _, size in disposable)
        taken, free = sum(os.path.getsize(self.path(step)) for step in self.steps()) - there, free_bytes(self.folder)
        over, lacking = (taken + size - self.budget if self.budget else 0), size - free
        if size > file_limit() or lacking > most:
            raise OSError(errno.ENOSPC, f"no room on the disk ({min(free, file_limit()) >> 20} MiB free, {size >> 20} MiB needed)", path)
        if over > most and taken:
            raise OSError(errno.ENOSPC, f"TRAIN.CHECKPOINT_BUDGET leaves no room for it ({taken >> 20} of {self.budget >> 20} MiB "
                                        "taken)", path)
        while max(over, lacking) > 0 and disposable:
            old, gone = disposable.pop(0)
            self._delete(old)
            over, before, lacking = over - gone, lacking, size - free_bytes(self.folder)
            if over <= 0 and lacking >= before:
                break  # the disk does not give back what is deleted (yet): no more is given for nothing


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size() + OVERHEAD
    if isinstance(value, dict):
        return sum(map(_tensor_bytes, value.values()))
    return sum(map(_tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0


class Saver:
    """Saves one checkpoint after the other, in the background where asked; never two at once.

    A save that fails (disk full) does not end training: ``warn`` is called, and ``failed`` says why until one succeeds.
    """

    def __init__(self, files: CheckpointFolder, background: bool, best: dict[str, float], warn: Callable[[str], None]):
        self.files, self.background, self.warn = files, background, warn
        self.failed, self._saved_best, self._lost_best = "", dict(best), False
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._content: dict[str, Any] = {}
        self._best = False

    def save(self, state: TrainState, description: dict[str, Any], best: bool) -> None:
        """Begin to write ``state``; done at once without a background. Waits for the save before."""
        self.wait()
        self._content, self._best = {**description, **state.state_dict(copy=self.background)}, best
        if self._lost_best and not best:
            self._content["best"] = dict(self._saved_best)  # the file of the best is the one before
        self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self._thread.start()
        if not self.background:
            self.wait()

    def _write(self) -> None:
        try:
            self.files.save(self._content, self._best)
        except Exception as error:  # told by ``wait`` in the main thread
            self._error = error

    def poll(self) -> None:
        """Look after a save that has ended meanwhile; never waits."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def best_saved(self, best: dict[str, float]) -> dict[str, float]:
        """``best``, or the best before it when its weights could not be saved."""
        self.poll()
        return dict(self._saved_best) if self._lost_best else best

    def wait(self) -> None:
        """Until nothing is being written any more."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread, error, self._error = None, self._error, None
        content, self._content = self._content, {}
        if error is None:
            self.failed = ""
            if self._best:
                self._saved_best, self._lost_best = dict(content["best"]), False
        elif isinstance(error, OSError):
            self._lost_best |= self._best
            self.failed = f"{error.filename or self.files.folder}: {error.strerror or error}"
            self.warn(f"warning: the checkpoint of step {content['step']} was not saved: {self.failed}; training goes on, what was "
                      "saved before is intact")
        else:
            raise error


def _job() -> str:
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID") or ""


def describe(config_text: str, classes: list[str], preprocessing: dict[str, Any], data_path: str, global_batch: int,
             steps_per_epoch: int) -> dict[str, Any]:
    """What a checkpoint says beside the state: enough to evaluate or continue it with no other file."""
    return {FORMAT_KEY: FORMAT, "config": config_text, "classes": list(classes), "preprocessing": preprocessing,
            "data_path": data_path if "://" in data_path else os.path.abspath(os.path.expanduser(data_path)),
            "global_batch": global_batch, "steps_per_epoch": steps_per_epoch,
            "versions": versions(), "git_commit": git_commit()}


def versions() -> dict[str, str]:
    """Versions of what computed the run."""
    import timm
    import torchvision
    return {"python": sys.version.split()[0],  # str: torch's own version is an object that no safe reader would take
            **{module.__name__: str(module.__version__) for module in (torch, torchvision, timm)}}


def program_digest(root: str = PROGRAM_FOLDER) -> str:
    """Digest of this program's own source files, their places included, in the folders of ``root`` and all below them."""
    digest = hashlib.sha256()
    rooms = [path for folder in ("models", "data", "utils") for path in (Path(root) / folder).rglob("*.py")]
    for path in sorted([*Path(root).glob("*.py"), *rooms]):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def git_commit() -> str:
    """The commit this program is at, or nothing outside a checkout."""
    return output("git", "-C", PROGRAM_FOLDER, "rev-parse", "HEAD")
