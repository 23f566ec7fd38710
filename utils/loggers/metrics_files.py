"""The run's figures in its folder: lines of JSON an epoch, a log line and an event, and the epochs' as CSV."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections.abc import Callable
from typing import Any

from utils.runtime.files import Appended, append_whole, read_json, read_record, replace_file

LOGGER = logging.getLogger("trainer")

# What lies in a run's folder beside checkpoints and log.
CONFIG, SOURCES = "config.yaml", "sources.json"
EPOCHS, TABLE, STEPS, EVENTS, EVIDENCE = "metrics.jsonl", "metrics.csv", "steps.jsonl", "history.jsonl", "nonfinite.jsonl"
LOG = "log.txt"
RECORDS = (CONFIG, SOURCES, EPOCHS, TABLE, STEPS, EVENTS, EVIDENCE, LOG)


class JsonLines:
    """Appends a line of JSON a row. On resume, lines beyond the step of the checkpoint are cut off, and half a line that a kill left.

    Lines that cannot be written now (disk full) are kept and written with the next, or when it is closed.

    Attributes:
        last: the last row that the file held when it was opened, cut off or not.
    """

    def __init__(self, path: str, step: float, logger: logging.Logger = LOGGER, sync: bool = True):
        """``sync``: every line reaches the disk before ``write`` returns."""
        self.path, self._file = path, Appended(path, logger.warning, sync)
        text = read_record(path)
        found = [(row, line) for line in text.splitlines() if (row := _row(line)) is not None]
        kept = "".join(line + "\n" for row, line in found if row["step"] <= step)
        self.last = found[-1][0] if found else None
        if kept != text:
            replace_file(path, kept.encode())

    def write(self, row: dict[str, Any]) -> None:
        self._file.write((json.dumps(row, allow_nan=False) + "\n").encode())

    def close(self) -> None:
        self._file.close()


class MetricsLog:
    """``metrics.jsonl``, a line an epoch, and the same rows in ``metrics.csv``, whose columns grow as needed."""

    def __init__(self, folder: str, step: int, logger: logging.Logger = LOGGER):
        self.lines, self.logger = JsonLines(os.path.join(folder, EPOCHS), step, logger), logger
        self.table, self.rows = os.path.join(folder, TABLE), read_rows(self.lines.path)
        self._columns: list[str] = []  # of the file as it stands; none: it must be written again
        self._behind = False

    def write(self, row: dict[str, Any]) -> None:
        self.lines.write(row)
        self.rows.append(row)
        try:
            if self._columns and row.keys() <= set(self._columns):
                append_whole(self.table, _csv(self._columns, [row]).encode())
            else:
                self._write_table()
            self._behind = False
        except OSError:  # metrics.jsonl has told it; the next row, or ``close``, writes the table again
            self._columns, self._behind = [], True

    def _write_table(self) -> None:
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        replace_file(self.table, (_csv(columns, [dict(zip(columns, columns, strict=True))]) + _csv(columns, self.rows)).encode())
        self._columns = columns

    def close(self) -> None:
        self.lines.close()
        if self._behind:
            try:
                self._write_table()
            except OSError as error:
                self.logger.warning(f"{self.table}: cannot be written ({error.strerror}); {EPOCHS} has the same rows")


def read_rows(path: str) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, each with a number ``step``; what is no such row is passed over."""
    return [row for row in map(_row, read_record(path).splitlines()) if row is not None]


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = read_json(line)
    except ValueError:  # cut off by a kill
        return None
    if not isinstance(row, dict) or not _is_number(row.get("step")) or row["step"] < 0:
        return None
    return {key: value for key, value in row.items() if value is None or _KINDS.get(key, _is_anything)(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_anything(_: Any) -> bool:
    return True


# What the entries of a row are, where they are read by name; one of another kind is as good as none.
_KINDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("epoch", "seconds", "skipped_steps", "images_per_s", "data_share", "loss", "train_loss", "val_loss", "grad_norm", "lr",
                     "again", "to"), _is_number),
    **dict.fromkeys(("time", "before"), lambda value: _is_number(value) and 0 <= value < 1e11),  # seconds until the year 5138
    **dict.fromkeys(("event", "task", "best", "tie_break", "git_commit", "device", "precision", "reason"), _is_text),
    "steps_per_epoch": lambda value: _is_number(value) and value > 0,
    "flags": lambda value: isinstance(value, list), "metrics": lambda value: isinstance(value, list),
    "versions": lambda value: isinstance(value, dict), "data": lambda value: isinstance(value, dict)}


def _csv(columns: list[str], rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writerows({key: value for key, value in row.items() if value is not None} for row in rows)
    return text.getvalue()
