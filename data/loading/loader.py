"""Batches from DataLoader workers to the device; images that could not be read, and workers that hang or die."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.errors import DataError, WorkerDied
from data.loading.corrupt_images import Failure
from data.loading.dataset import Batch, BatchedImages
from data.loading.device_prefetch import to_device
from data.loading.workers import PREFETCH
from data.messages import Caution


def _no_collation(batch: Batch) -> Batch:
    """The dataset returns whole batches."""
    return batch


def _to_tensor(part: Tensor | np.ndarray) -> Tensor:
    return torch.from_numpy(part) if isinstance(part, np.ndarray) else part


class _WorkerDeaths:
    """Within it, where the next batch is waited for, a dead DataLoader worker is an error, and nowhere else.

    torch raises it wherever the main process happens to be, which may be the middle of an update or of writing a file.
    """

    def __init__(self) -> None:
        self.waiting, self.pending, self.torch_handler = False, False, None

    def take_over(self) -> None:
        """Replace torch's signal handler, which is set when an iterator is made, by one that calls it only while waiting."""
        if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGCHLD)
            if callable(handler) and handler != self.on_signal:
                self.torch_handler = handler
                signal.signal(signal.SIGCHLD, self.on_signal)

    def on_signal(self, number: int, frame: Any) -> None:
        if self.waiting and _in_a_finalizer(frame):
            # What is raised there is printed and lost, and the wait for a batch that never comes would go on.
            timer = threading.Timer(0.05, os.kill, (os.getpid(), number))
            timer.daemon = True
            timer.start()
            return
        if self.waiting:
            self.torch_handler(number, frame)
        self.pending = True

    def __enter__(self) -> None:
        self.waiting = True
        if self.pending:
            self.pending = False
            self.torch_handler(signal.SIGCHLD, None)

    def __exit__(self, *_: object) -> None:
        self.waiting = False


def _in_a_finalizer(frame: Any) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


_worker_deaths = _WorkerDeaths()


class ImageLoader:
    """A ``DataLoader`` whose batches arrive on the device, normalised, and which counts the images that could not be read.

    It yields what ``dataset.move`` makes of a worker's batch: ``(images (B, 3, H, W) float, targets (B,))`` on ``device`` in
    classification, ``data.dense.batch.DenseBatch`` in dense tasks.

    Args:
        budget: unreadable images that training goes on with; None (evaluation) sets no limit.
        options: of ``torch.utils.data.DataLoader``.

    Attributes:
        failures: each unreadable image of this process once, in the order in which they were read.
        unreadable: how many images of the last pass of this process could not be read.
        decoded: how many images of the last pass of this process the fast decoder, Pillow and, where it is asked, the device decoded.
        report: called with a message for each unreadable image, unless None.
    """

    def __init__(self, dataset: BatchedImages, workers: int, timeout: float, device: torch.device, pin_memory: bool,
                 budget: int | None = None, **options: Any):
        self.failures: list[Failure] = []
        self.report: Callable[[str], None] | None = None
        self.budget, self.timeout, self.device, self.unreadable = budget, timeout, device, 0
        self.decoded: tuple[int, ...] = (0, 0)
        self._reported: set[int] = set()
        self._iterator: Any = None
        # Forked workers start in milliseconds and share the index; torch and timm are not imported again.
        context = "fork" if workers and sys.platform.startswith("linux") else None
        self._loader = DataLoader(dataset, collate_fn=_no_collation, num_workers=workers, timeout=timeout if workers else 0,
                                  prefetch_factor=PREFETCH if workers else None, multiprocessing_context=context,
                                  pin_memory=pin_memory and device.type == "cuda", **options)

    @property
    def dataset(self) -> BatchedImages:
        return self._loader.dataset

    @property
    def batch_sampler(self) -> Any:
        return self._loader.batch_sampler

    @property
    def num_workers(self) -> int:
        return self._loader.num_workers

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        self._iterator, self.unreadable, self.decoded = iter(self._loader), 0, (0, 0)
        if self.num_workers:
            _worker_deaths.take_over()
        return to_device(self.dataset.ahead(self._batches(self._iterator), self.device, self._count), self.dataset.move, self.device)

    def _batches(self, iterator: Iterator[Batch]) -> Iterator[tuple[Any, ...]]:
        while True:
            try:
                with _worker_deaths:
                    parts, failures, decoded = next(iterator)
            except StopIteration:
                return
            except DataError as error:  # torch puts the traceback of a worker before the sentence
                raise type(error)(str(error).rpartition(f"{type(error).__name__}: ")[2].strip()) from None
            except (ConnectionError, EOFError):  # killed while it handed a batch over
                raise WorkerDied from None
            except RuntimeError as error:  # torch has no types for these
                if "timed out after" in str(error):
                    raise self._timeout_error() from None
                if "DataLoader worker" in str(error):
                    raise WorkerDied from None
                raise
            self._count(failures, decoded)
            yield tuple(_to_tensor(part) for part in parts)

    def _count(self, failures: list[Failure], decoded: tuple[int, ...]) -> None:
        self.decoded = tuple(map(sum, itertools.zip_longest(self.decoded, decoded, fillvalue=0)))
        for failure in failures:
            self.unreadable += 1
            if failure.index in self._reported:
                continue
            self._reported.add(failure.index)
            self.failures.append(failure)
            if self.budget is not None and len(self.failures) > self.budget:
                names = "; ".join(f"{f.path}: not a readable image ({f.reason})" for f in self.failures[:10])
                more = f" and {len(self.failures) - 10} more" if len(self.failures) > 10 else ""
                raise DataError(f"{names}{more}: {len(self.failures)} unreadable images are more than DATA.CORRUPT_BUDGET allows "
                                f"({self.budget}); repair or remove them, or raise it")
            if self.report is not None:
                instead = "another image replaces it" if self.budget is not None else "it is not counted"
                self.report(Caution(f"{failure.path}: not a readable image ({failure.reason}); {instead}"))

    def _timeout_error(self) -> DataError:
        busy = [self.dataset.source.path(i) for i in self.dataset.corrupt_policy.reading.tolist() if i >= 0]
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each process that is killed
        for process in getattr(self._iterator, "_workers", ()):
            process.kill()  # they would be waited for
        at = f"being read at that moment: {', '.join(busy[:10])}" if busy else "no file was being read at that moment"
        return DataError(f"no batch came for {self.timeout:g} seconds (DATA.TIMEOUT); {at}; check the disk or network share that holds "
                         "it, or raise DATA.TIMEOUT")

    def close(self) -> None:
        """End the workers now; left to the garbage collector they end after a time-out each."""
        shutdown = getattr(self._iterator, "_shutdown_workers", None)  # torch has no public method for it
        if shutdown is not None:
            shutdown()
