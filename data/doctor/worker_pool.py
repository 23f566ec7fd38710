"""Processes that read every image of some sources; what kills one of them is named, and the others go on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import numpy as np

from data.doctor.image_record import LETHAL, ROW, SEEN, UNREADABLE, examine
from data.errors import DataError
from data.sources.base import Source

_CHUNK = 32  # images a message
_IDLE_DEATHS = 8  # processes that may die while reading nothing before that is an error


class Task(NamedTuple):
    """Images ``start`` to ``stop`` of a source; ``tries`` processes have died of it."""

    source: int
    start: int
    stop: int
    tries: int = 0


class Member:
    """One process: what it does, and what it is reading."""

    def __init__(self, number: int, process: Any, pipe: Connection):
        self.number, self.process, self.pipe = number, process, pipe
        self.task: Task | None = None
        self.at, self.since = -1, 0.0


class Crew:
    """Reads sources with ``count`` processes.

    Attributes:
        rows: a table (``data.examine.ROW``) for each source.
        reasons: for each source why an image cannot be read, by its number.
    """

    def __init__(self, sources: Sequence[Source], count: int, timeout: float):
        self.sources, self.count, self.timeout = sources, count, timeout
        self.rows = [np.zeros(len(source), dtype=ROW) for source in sources]
        self.reasons: list[dict[int, str]] = [{} for _ in sources]
        self._tasks = deque(Task(number, start, min(start + _CHUNK, len(source)))
                            for number, source in enumerate(sources) for start in range(0, len(source), _CHUNK))
        # fork shares the list of files; elsewhere it is sent. macOS's own libraries do not survive a fork.
        fork = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
        self._context = multiprocessing.get_context("fork" if fork else "spawn")
        self._reading = self._context.RawArray("q", max(1, count))
        self._members: dict[int, Member] = {}
        self._idle_deaths = 0

    def run(self, progress: Callable[[int], None]) -> None:
        """Read everything; ``progress`` hears now and then how many images have been read.

        Raises:
            DataError: processes die as soon as they start.
        """
        done = 0
        try:
            while self._tasks or any(member.task for member in self._members.values()):
                self._employ()
                pipes = {member.pipe: member for member in self._members.values()}
                for ready in wait(list(pipes), timeout=0.5):
                    done += self._hear(pipes[ready])
                self._watch()
                progress(done)
        finally:
            for member in self._members.values():
                member.process.kill()
            for member in self._members.values():
                member.process.join()
                member.pipe.close()

    def _employ(self) -> None:
        """Start processes while there is work for more, and give each that is free its next task."""
        for number in range(self.count):
            if not self._tasks:
                return
            if number not in self._members:
                here, there = self._context.Pipe()
                others = [member.pipe for member in self._members.values()] + [here]
                inherited = others if self._context.get_start_method() == "fork" else []
                process = self._context.Process(target=_work, args=(self.sources, there, self._reading, number, os.getpid(), inherited),
                                                daemon=True)
                self._reading[number] = -1
                process.start()
                there.close()
                self._members[number] = Member(number, process, here)
            member = self._members[number]
            if member.task is None:
                member.task, member.at, member.since = self._tasks.popleft(), -1, time.monotonic()
                try:
                    member.pipe.send(member.task)
                except OSError:
                    self._bury(member, "")

    def _hear(self, member: Member) -> int:
        """Take what a process has read, or its death; how many images that settles."""
        try:
            rows, reasons = member.pipe.recv()
        except (EOFError, OSError):
            return self._bury(member, "")
        task, member.task = member.task, None
        self.rows[task.source][task.start:task.stop] = np.frombuffer(rows, dtype=ROW)
        self.reasons[task.source].update(reasons)
        return task.stop - task.start

    def _watch(self) -> None:
        """End a process that has been reading one image for too long."""
        now = time.monotonic()
        for member in list(self._members.values()):
            at = self._reading[member.number]
            if at != member.at or member.task is None:
                member.at, member.since = at, now
            elif self.timeout and now - member.since > self.timeout:
                member.process.kill()
                self._bury(member, f"no answer for {self.timeout:g} s (DATA.TIMEOUT)")

    def _bury(self, member: Member, why: str) -> int:
        """A process is gone: its images go back on the list, the one that it was reading with a mark against it."""
        member.process.join()
        member.pipe.close()
        del self._members[member.number]
        task, victim, code = member.task, self._reading[member.number], member.process.exitcode
        if task is None:
            return 0
        if not task.start <= victim < task.stop:  # between two images, or before the first
            self._idle_deaths += 1
            if self._idle_deaths > _IDLE_DEATHS:
                raise DataError(f"the processes that read images die ({_cause(code)}); free memory, or use fewer with --num-workers 1")
            self._tasks.appendleft(task)
            return 0
        for start, stop in ((task.start, victim), (victim + 1, task.stop)):
            if start < stop:
                self._tasks.appendleft(Task(task.source, start, stop))
        if not why and not task.tries:  # a killer may have meant another process's memory: once more, alone
            self._tasks.append(Task(task.source, victim, victim + 1, 1))
            return 0
        self.rows[task.source]["flags"][victim] = SEEN | UNREADABLE | LETHAL
        self.reasons[task.source][victim] = why or f"the process that read it died twice ({_cause(code)})"
        return 1


def _cause(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in [s.value for s in signal.Signals] else f"signal {-code}"
        return f"{name}{', out of memory?' if name == 'SIGKILL' else ''}"
    return f"exit status {code}"


def _work(sources: Sequence[Source], pipe: Connection, reading: Any, number: int, parent: int, inherited: Sequence[Connection]) -> None:
    """A process's life: tasks in, rows out; ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in inherited:
        other.close()
    try:
        while True:
            while not pipe.poll(2.0):
                if os.getppid() != parent:
                    return
            task = pipe.recv()
            rows = np.zeros(task.stop - task.start, dtype=ROW)
            reasons = {}
            for index in range(task.start, task.stop):
                reading[number] = index
                if reason := examine(sources[task.source], index, rows[index - task.start]):
                    reasons[index] = reason
            reading[number] = -1
            pipe.send((rows.tobytes(), reasons))
    except (EOFError, OSError):
        pass
