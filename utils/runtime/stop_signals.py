"""Stopping when asked: a checkpoint first, then the exit."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch

from config import ProgramError
from utils.runtime import distributed


class Stopped(ProgramError):
    """Training ended because a signal asked for it, with nothing lost: the same command continues."""

    exit_status = 75


@contextlib.contextmanager
def exit_from_within() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP end the program from within, with the shell's status for them, so that half a file is removed.

    Not in a job of several processes, where one may be waiting for the others, nor for signals that are ignored (nohup).
    """
    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    alone = distributed.world_size() == 1 and threading.current_thread() is threading.main_thread()
    taken = [number for number in numbers if alone and signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


class StopRequest:
    """Context in which SIGTERM, SIGINT and SIGHUP only set a flag, and SIGUSR1 asks for a checkpoint.

    A second SIGINT ends the program at once. The flags are agreed between ranks at every step, so that all of them
    save after the same one; the exchange is of three numbers on the CPU and does not wait for a GPU.

    Attributes:
        log_due: whether this rank wants all of them to read the last steps' losses, for a line.
        training: while False there is nothing to save yet, and a signal ends the program where it stands.
    """

    def __init__(self) -> None:
        self.name, self.save, self.log_due, self.training = "", False, False, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
                if hasattr(signal, name):
                    number = getattr(signal, name)
                    self._before[number] = signal.signal(number, self._noted)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # A process of several that fails is sent SIGTERM by its launcher before it has said why.
        ending = kind is not None and distributed.world_size() > 1
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if ending else handler)

    def _noted(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == "SIGUSR1":
            self.save = True
            return
        if name == "SIGINT" and self.name == "SIGINT":
            raise KeyboardInterrupt
        self.name = name
        if not self.training:
            raise Stopped(f"stopped by {name} before the first step; the same command starts again from where the run stands")

    def agreed(self) -> tuple[bool, bool, bool]:
        """(stop, save, log_due), the same on every rank; requests to save and to log are thereby taken."""
        flags = [bool(self.name), self.save, self.log_due]
        self.save = self.log_due = False  # before the exchange: one that comes while it waits is for the next
        if distributed.world_size() > 1:
            flags = distributed.all_reduce_sum(torch.tensor(flags, dtype=torch.int64)).bool().tolist()
        return flags[0], flags[1], flags[2]
