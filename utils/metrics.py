"""The run's figures: metrics.jsonl, a line an epoch, and TensorBoard's curves when it is installed."""

from __future__ import annotations

import json
import os
from typing import Any

from utils.files import replace_file


class MetricsLog:
    """Appends a JSON line an epoch; on resume, lines after the checkpoint's step are cut off."""

    def __init__(self, folder: str, step: int):
        self.path = os.path.join(folder, "metrics.jsonl")
        if os.path.exists(self.path):
            with open(self.path, encoding="utf-8") as file:
                lines = file.read().splitlines()
            kept = [line for line in lines if _step_of(line) <= step]
            if kept != lines:
                replace_file(self.path, "".join(line + "\n" for line in kept).encode())

    def write(self, row: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut off by a kill


class TensorBoard:
    """Scalars for TensorBoard, or nothing at all where it is not installed or cannot write."""

    def __init__(self, folder: str, step: int):
        self.writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(os.path.join(folder, "tensorboard"), purge_step=step + 1 if step else None)
        except Exception:  # not installed, or its dependencies are broken: curves are a comfort, not a need
            self.writer = None

    def scalars(self, step: int, **values: float) -> None:
        if self.writer is None:
            return
        try:
            for name, value in values.items():
                self.writer.add_scalar(name.replace("__", "/"), value, step)
        except OSError:
            self.writer = None  # disk full; metrics.jsonl is the record

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
