"""Saves checkpoints while training goes on."""

from __future__ import annotations

import logging
import threading
from typing import Any

from utils.checkpoints.folder import CheckpointFolder
from utils.checkpoints.state import TrainState


class Saver:
    """Saves one checkpoint after the other, in the background where asked; never two at once.

    A save that fails (disk full) does not end training: a warning is logged, and ``failed`` says why until one succeeds.
    """

    def __init__(self, files: CheckpointFolder, background: bool, best: dict[str, float], logger: logging.Logger):
        self.files, self.background, self.logger = files, background, logger
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
            self.logger.warning(f"the checkpoint of step {content['step']} was not saved: {self.failed}; training goes on, what was "
                      "saved before is intact")
        else:
            raise error
