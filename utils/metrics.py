"""The run's figures: metrics.jsonl, a line an epoch, and TensorBoard's curves when it is installed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from utils.files import replace_file


class MetricsLog:
    """Appends a JSON line an epoch; on resume, lines after the last epoch that the checkpoint ended are cut off.

    Lines that cannot be written now (disk full) are kept and written with the next.
    """

    def __init__(self, folder: str, step: int, warn: Callable[[str], None] = print):
        self.path, self.warn = os.path.join(folder, "metrics.jsonl"), warn
        self._waiting = ""
        if os.path.exists(self.path):
            with open(self.path, encoding="utf-8", errors="replace") as file:
                lines = file.read().splitlines()
            kept = [line for line in lines if _step_of(line) <= step]
            if kept != lines:
                replace_file(self.path, "".join(line + "\n" for line in kept).encode())

    def write(self, row: dict[str, Any]) -> None:
        self._waiting += json.dumps(row, allow_nan=False) + "\n"
        try:
            size = os.path.getsize(self.path) if os.path.exists(self.path) else 0
            with open(self.path, "a", encoding="utf-8") as file:
                try:
                    file.write(self._waiting)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(self.path, size)  # no half line
                    raise
        except OSError as error:
            self.warn(f"warning: {self.path}: cannot be written ({error.strerror}); its lines are kept for later")
        else:
            self._waiting = ""


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut off by a kill


class TensorBoard:
    """Scalars for TensorBoard, or nothing at all where it is not installed or cannot write."""

    def __init__(self, folder: str, step: int, warn: Callable[[str], None] = print):
        self.writer, self.warn = None, warn
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(os.path.join(folder, "tensorboard"), purge_step=step + 1 if step else None)
        except Exception as error:  # not installed, or its dependencies are broken: curves are a comfort, not a need
            self.warn(f"notice: no TensorBoard curves ({type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''})")

    def scalars(self, step: int, **values: float | None) -> None:
        """Add what is a number; a double underscore in a name stands for a slash."""
        try:
            for name, value in values.items():
                if self.writer is not None and value is not None:
                    self.writer.add_scalar(name.replace("__", "/"), value, step)
        except Exception as error:  # its writing thread passes on whatever befell it
            self._stop(error)

    def close(self) -> None:
        try:
            if self.writer is not None:
                self.writer.close()
        except Exception as error:
            self._stop(error)

    def _stop(self, error: Exception) -> None:
        self.writer = None
        self.warn(f"warning: TensorBoard curves end here ({str(error).splitlines()[0][:100] if str(error) else type(error).__name__}); "
                  "metrics.jsonl goes on")
