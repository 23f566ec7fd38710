"""Checkpoints: everything a restart needs, as plain data, written whole or not at all, verified when read.

A file is a torch zip followed by a trailer of 8 magic bytes and the sha256 of what stands before it; ``torch.load`` opens it
as it is. Files have immutable step names; ``last.pth`` and ``best.pth`` are links that are replaced in one move, so that
a good checkpoint exists at every moment.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
from typing import Any

from data.messages import Caution
from models.safe_load import CheckpointError, read_file
from models.weights import check_finite
from utils.checkpoints.file_format import require_own, write_checkpoint
from utils.checkpoints.state import _tensor_bytes
from utils.runtime import launcher
from utils.runtime.distributed import gather_objects
from utils.runtime.files import file_limit, free_bytes, link_atomically, replace_file

_JOB = ".job"
# What goes with checkpoints that are set aside: copied where the run goes on from an older one, moved where it starts again.
_COPIED = ("metrics.jsonl", "metrics.csv", "steps.jsonl", "config.yaml", "sources.json", "predictions.npz", "mistakes.csv", "report.html")
_MOVED = ("history.jsonl", "nonfinite.jsonl", "tensorboard", "tracker.json", "plots")
_NAME = re.compile(r"ckpt_(\d{8,})\.pth")


def is_checkpoint(name: str) -> bool:
    """Whether a file of a run's folder is called as a checkpoint is."""
    return _NAME.fullmatch(name) is not None


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

    def newest_in_words(self) -> str:
        """For the end of a sentence that says what could not be saved."""
        steps = self.steps()
        return f"the newest checkpoint is {self.path(steps[0])}" if steps else f"{self.folder} holds no checkpoint"

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
                return path, content, [Caution(f"{line}; trying the one before") for line in damage]
            except CheckpointError as error:
                damage.append(str(error))
        if damage:
            raise CheckpointError(f"{self.folder}: none of its {len(damage)} checkpoints can be read ({damage[0]}); "
                                  "--restart starts again and moves them aside, another --tag leaves them")
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

        A run that starts again in a used folder (``step`` -1), or from an older checkpoint, would otherwise be taken for the
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
        replace_file(os.path.join(self.folder, _JOB), launcher.job().encode())

    def begun_by_this_job(self) -> bool:
        """Whether this is a later attempt of the job that has begun here: --restart was obeyed then."""
        try:
            with open(os.path.join(self.folder, _JOB), encoding="utf-8") as file:
                return launcher.restarts() > 0 and file.read() == launcher.job()
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


