"""Batches from loading processes to the device, and what these processes suffer: bad images, hangs, too little shared memory."""

from __future__ import annotations

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
from data.loading import device_prefetch as stream
from data.loading.corrupt_images import Failure
from data.loading.dataset import Batch, EvalImages, TrainImages
from data.loading.workers import _PREFETCH
from data.messages import Caution


def _as_it_is(batch: Batch) -> Batch:
    """The collation of batches that come whole from the images."""
    return batch


def _to_tensor(part: Tensor | np.ndarray) -> Tensor:
    return torch.from_numpy(part) if isinstance(part, np.ndarray) else part


class _Deaths:
    """A loading process that dies is an error where the next batch is waited for, and nowhere else.

    torch raises it wherever the main process happens to be, which may be the middle of an update or of writing a file.
    """

    def __init__(self) -> None:
        self.waiting, self.pending, self.check = False, False, None

    def take_over(self) -> None:
        """Put this before torch's handler, which is set when an iterator is made."""
        if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGCHLD)
            if callable(handler) and handler != self.noted:
                self.check = handler
                signal.signal(signal.SIGCHLD, self.noted)

    def noted(self, number: int, frame: Any) -> None:
        if self.waiting:
            self.check(number, frame)
        self.pending = True

    def __enter__(self) -> None:
        self.waiting = True
        if self.pending:
            self.pending = False
            self.check(signal.SIGCHLD, None)

    def __exit__(self, *_: object) -> None:
        self.waiting = False


_deaths = _Deaths()


class ImageLoader:
    """A ``DataLoader`` whose batches arrive finished, and which keeps account of the images that could not be read.

    It yields ``(images (B, 3, H, W) float, targets (B,))`` on ``device``.

    Attributes:
        failures: each bad image once, in the order in which they were met by this process.
        met: images of the last pass that were bad, by this process's count.
        decoded: images of the last pass decoded by the fast decoder, and by Pillow, by this process's count.
        report: called with a line for each bad image; None: nobody is told.
    """

    def __init__(self, dataset: TrainImages | EvalImages, workers: int, timeout: float, device: torch.device, pin_memory: bool,
                 budget: int | None = None, **options: Any):
        self.failures: list[Failure] = []
        self.report: Callable[[str], None] | None = None
        self.budget, self.timeout, self.device, self.met, self.decoded = budget, timeout, device, 0, (0, 0)
        self._named: set[int] = set()
        self._iterator: Any = None
        # Forked workers start in milliseconds and share the index; torch and timm are not imported again.
        context = "fork" if workers and sys.platform.startswith("linux") else None
        self._loader = DataLoader(dataset, collate_fn=_as_it_is, num_workers=workers, timeout=timeout if workers else 0,
                                  prefetch_factor=_PREFETCH if workers else None, multiprocessing_context=context,
                                  pin_memory=pin_memory and device.type == "cuda", **options)

    @property
    def dataset(self) -> TrainImages | EvalImages:
        return self._loader.dataset

    @property
    def batch_sampler(self) -> Any:
        return self._loader.batch_sampler

    @property
    def pipe(self) -> bool:
        return self.dataset.pipe

    @property
    def num_workers(self) -> int:
        return self._loader.num_workers

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._iterator, self.met, self.decoded = iter(self._loader), 0, (0, 0)
        if self.num_workers:
            _deaths.take_over()
        return stream.finished(self._batches(self._iterator), self.dataset.pipeline.finish, self.device)

    def _batches(self, iterator: Iterator[Batch]) -> Iterator[tuple[Tensor, ...]]:
        while True:
            try:
                with _deaths:
                    parts, failures, (fast, odd) = next(iterator)
            except StopIteration:
                return
            except DataError as error:  # torch puts the traceback of a worker before the sentence
                raise type(error)(str(error).rpartition(f"{type(error).__name__}: ")[2].strip()) from None
            except (ConnectionError, EOFError):  # killed while it handed a batch over
                raise WorkerDied from None
            except RuntimeError as error:  # torch has no types for these
                if "timed out after" in str(error):
                    raise self._hung() from None
                if "DataLoader worker" in str(error):
                    raise WorkerDied from None
                raise
            if failures:
                self._account(failures)
            self.decoded = self.decoded[0] + fast, self.decoded[1] + odd
            yield tuple(_to_tensor(part) for part in parts)

    def _account(self, failures: list[Failure]) -> None:
        for failure in failures:
            self.met += 1
            if failure.index in self._named:
                continue
            self._named.add(failure.index)
            self.failures.append(failure)
            if self.budget is not None and len(self.failures) > self.budget:
                named = "; ".join(f"{f.path}: not a readable image ({f.reason})" for f in self.failures[:10])
                more = f" and {len(self.failures) - 10} more" if len(self.failures) > 10 else ""
                raise DataError(f"{named}{more}: {len(self.failures)} unreadable images are more than DATA.CORRUPT_BUDGET allows "
                                f"({self.budget}); repair or remove them, or raise it")
            if self.report is not None:
                instead = "another of its class stands in for it" if self.budget is not None else "it is not counted"
                self.report(Caution(f"{failure.path}: not a readable image ({failure.reason}); {instead}"))

    def _hung(self) -> DataError:
        busy = [self.dataset.folder.path(i) for i in self.dataset.guard.reading.tolist() if i >= 0]
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each process that is killed
        for process in getattr(self._iterator, "_workers", ()):
            process.kill()  # they would be waited for
        at = f"being read at that moment: {', '.join(busy[:10])}" if busy else "no file was being read at that moment"
        return DataError(f"no batch came for {self.timeout:g} seconds (DATA.TIMEOUT); {at}; look at the disk or the share that holds it, "
                         "or raise DATA.TIMEOUT")

    def close(self) -> None:
        """End the loading processes now; left to the garbage collector they end after a time-out each."""
        shutdown = getattr(self._iterator, "_shutdown_workers", None)  # torch offers no public way
        if shutdown is not None:
            shutdown()
