"""A pool of processes that read every image of some sources; an image that kills a process is found, and the others are read."""

from __future__ import annotations

import mmap
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

from data.doctor.image_record import FATAL, ROW, SEEN, UNREADABLE, inspect_image
from data.errors import DataError
from data.sources.base import Source

_CHUNK = 32  # images a task
_MAX_IDLE_DEATHS = 8  # processes that may die between images before that is an error


class Task(NamedTuple):
    """Images ``start`` to ``stop`` of a source; ``deaths`` processes have died while reading them."""

    source: int
    start: int
    stop: int
    deaths: int = 0


class Worker:
    """One process and its task; it has been reading image ``index`` since ``since`` (``time.monotonic``)."""

    def __init__(self, number: int, process: Any, pipe: Connection):
        self.number, self.process, self.pipe = number, process, pipe
        self.task: Task | None = None
        self.index, self.since = -1, 0.0


class WorkerPool:
    """Reads sources with ``count`` processes.

    Args:
        timeout: seconds that reading one image may take; 0 sets no limit.

    Attributes:
        rows: for each source (images,) of ``image_record.ROW``.
        reasons: for each source why images cannot be read, by their index.
    """

    def __init__(self, sources: Sequence[Source], count: int, timeout: float):
        self.sources, self.count, self.timeout = sources, count, timeout
        self.rows = [np.zeros(len(source), dtype=ROW) for source in sources]
        self.reasons: list[dict[int, str]] = [{} for _ in sources]
        self._tasks = deque(Task(number, start, min(start + _CHUNK, len(source)))
                            for number, source in enumerate(sources) for start in range(0, len(source), _CHUNK))
        # Forked processes share the list of files; spawned ones are sent it. macOS's own libraries do not survive a fork.
        fork = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
        self._context = multiprocessing.get_context("fork" if fork else "spawn")
        # Shared as it is by forked processes, without a file in /dev/shm, which may be read-only.
        self._reading: Any = memoryview(mmap.mmap(-1, 8 * max(1, count))).cast("q") if fork else self._context.RawArray("q", max(1, count))
        self._workers: dict[int, Worker] = {}
        self._idle_deaths = 0

    def run(self, progress: Callable[[int], None]) -> None:
        """Read everything; ``progress`` is called now and then with the number of images read.

        Raises:
            DataError: processes keep dying without reading an image.
        """
        done = 0
        try:
            while self._tasks or any(worker.task for worker in self._workers.values()):
                self._assign_tasks()
                pipes = {worker.pipe: worker for worker in self._workers.values()}
                for ready in wait(list(pipes), timeout=0.5):
                    done += self._receive(pipes[ready])
                self._end_hung_workers()
                progress(done)
        finally:
            for worker in self._workers.values():
                worker.process.kill()
            for worker in self._workers.values():
                worker.process.join()
                worker.pipe.close()

    def _assign_tasks(self) -> None:
        """Start processes as long as there are tasks for them, and give each idle one its next task."""
        for number in range(self.count):
            if not self._tasks:
                return
            if number not in self._workers:
                here, there = self._context.Pipe()
                others = [worker.pipe for worker in self._workers.values()] + [here]
                inherited = others if self._context.get_start_method() == "fork" else []
                arguments = (self.sources, there, self._reading, number, os.getpid(), inherited)
                process = self._context.Process(target=_worker_main, args=arguments, daemon=True)
                self._reading[number] = -1
                process.start()
                there.close()
                self._workers[number] = Worker(number, process, here)
            worker = self._workers[number]
            if worker.task is None:
                worker.task, worker.index, worker.since = self._tasks.popleft(), -1, time.monotonic()
                try:
                    worker.pipe.send(worker.task)
                except OSError:
                    self._remove_dead(worker, "")

    def _receive(self, worker: Worker) -> int:
        """Take what a process has read, or notice its death; returns the number of images that are done."""
        try:
            rows, reasons = worker.pipe.recv()
        except (EOFError, OSError):
            return self._remove_dead(worker, "")
        task, worker.task = worker.task, None
        self.rows[task.source][task.start:task.stop] = np.frombuffer(rows, dtype=ROW)
        self.reasons[task.source].update(reasons)
        return task.stop - task.start

    def _end_hung_workers(self) -> None:
        """Kill processes that have been reading one image for too long."""
        now = time.monotonic()
        for worker in list(self._workers.values()):
            index = self._reading[worker.number]
            if index != worker.index or worker.task is None:
                worker.index, worker.since = index, now
            elif self.timeout and now - worker.since > self.timeout:
                worker.process.kill()
                self._remove_dead(worker, f"no answer for {self.timeout:g} s (DATA.TIMEOUT)")

    def _remove_dead(self, worker: Worker, why: str) -> int:
        """Put a dead process's images back on the list, the one that it was reading as a task of its own; returns the number of images
        that are done: 1 where that one has been given up."""
        worker.process.join()
        worker.pipe.close()
        del self._workers[worker.number]
        task, image, code = worker.task, self._reading[worker.number], worker.process.exitcode
        if task is None:
            return 0
        if not task.start <= image < task.stop:  # between two images, or before the first
            self._idle_deaths += 1
            if self._idle_deaths > _MAX_IDLE_DEATHS:
                raise DataError(f"the processes that read images die ({_cause(code)}); free memory, or use fewer with --num-workers 1")
            self._tasks.appendleft(task)
            return 0
        for start, stop in ((task.start, image), (image + 1, task.stop)):
            if start < stop:
                self._tasks.appendleft(Task(task.source, start, stop))
        if not why and not task.deaths:  # it may have been killed for another process's memory: try once more, alone
            self._tasks.append(Task(task.source, image, image + 1, 1))
            return 0
        self.rows[task.source]["flags"][image] = SEEN | UNREADABLE | FATAL
        self.reasons[task.source][image] = why or f"the process that read it died twice ({_cause(code)})"
        return 1


def _cause(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in [s.value for s in signal.Signals] else f"signal {-code}"
        return f"{name}{', out of memory?' if name == 'SIGKILL' else ''}"
    return f"exit status {code}"


def _worker_main(sources: Sequence[Source], pipe: Connection, reading: Any, number: int, parent: int,
                 inherited: Sequence[Connection]) -> None:
    """What a process runs: receives tasks, sends rows; ends with its parent."""
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
                if reason := inspect_image(sources[task.source], index, rows[index - task.start]):
                    reasons[index] = reason
            reading[number] = -1
            pipe.send((rows.tobytes(), reasons))
    except (EOFError, OSError):
        pass
