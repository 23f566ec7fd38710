"""What the program says: to the console, with colour where it is a terminal, and to log.txt without."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable
from typing import TextIO

from termcolor import colored

from data.messages import NOTICE
from utils.loggers import progress
from utils.runtime.files import Appended, append_whole

QUICK = 1.0  # seconds between two lines of many alike, at least; log.txt has them all

RESULT = {"colour": "green"}  # ``extra`` of a line that says what has been reached
_LEVELS = {NOTICE: ("notice", "cyan"), logging.WARNING: ("warning", "yellow"), logging.ERROR: ("error", "red")}


class _Lines(logging.Formatter):
    """The name of a line's level before it, but for what is merely said. A message is one line, whatever the names in it hold."""

    def format(self, record: logging.LogRecord) -> str:
        name, _ = _LEVELS.get(record.levelno, ("", ""))
        return (f"{name}: " if name else "") + plain(record.getMessage())


class _Console(logging.Handler):
    """Lines to standard output, or where that is a command's data to standard error; a closed pipe silences it and nothing else."""

    def __init__(self, to_error: bool) -> None:
        super().__init__()
        self.setFormatter(_Lines())
        self.closed, self.said, self.to_error = False, 0.0, to_error
        self.colour = self.stream is not None and self.stream.isatty() and "NO_COLOR" not in os.environ

    @property
    def stream(self) -> TextIO | None:
        return sys.stderr if self.to_error else sys.stdout

    def emit(self, record: logging.LogRecord) -> None:
        if self.closed or self.is_redundant(record):
            return
        line = self.format(record)
        _, tint = _LEVELS.get(record.levelno, ("", getattr(record, "colour", "")))
        if self.colour and tint:
            line = colored(line, tint)
        try:
            with progress.live_line_hidden():
                self.write(line)
        except (OSError, ValueError, AttributeError):
            self.closed = True
            # Python flushes its streams at exit and would complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2 if self.to_error else 1)

    def is_redundant(self, record: logging.LogRecord) -> bool:
        """Whether the live line on this very terminal says the same, or a line of its kind was written a moment ago."""
        if not getattr(record, "periodic", False):
            return False
        if record.created - self.said < QUICK or (progress.is_live() and self.stream is not None and self.stream.isatty()):
            return True
        self.said = record.created
        return False

    def write(self, line: str) -> None:
        try:
            print(line, file=self.stream, flush=True)
        except UnicodeEncodeError:  # a terminal without UTF-8
            print(line.encode("ascii", "backslashreplace").decode(), file=self.stream, flush=True)


def printable(text: str, kept: str = "\n\t") -> str:
    """``text`` with the control characters that file and class names may hold written out, but for ``kept``: they must not steer a
    terminal."""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def plain(text: object) -> str:
    """``text`` on one line, with what is not printable written out: the door that every line of the program goes through.

    What a file or class name holds can then neither begin a line of its own, nor steer a terminal, nor be more than UTF-8 can hold.
    """
    return printable(str(text), kept="")


def tell(logger: logging.Logger, lines: Iterable[str]) -> None:
    """Log lines that were collected, each at its own level (``data.messages``); empty ones are passed over."""
    for line in filter(None, lines):
        logger.log(getattr(line, "level", logging.INFO), line)


def create_logger(speaks: bool, to_error: bool = False) -> logging.Logger:
    """The program's logger; silent unless ``speaks`` (rank 0), on standard error with ``to_error``."""
    logger = logging.getLogger("trainer")
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO)
    logger.addHandler(_Console(to_error) if speaks else logging.NullHandler())
    if speaks:
        logger.addHandler(_EarlyLines())
    return logger


class _EarlyLines(logging.Handler):
    """Keeps the first lines until there is a file for them: a mistake must leave no run folder behind."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class _LogFile(logging.Handler):
    """Lines to a file; a full disk must not stop training: the console hears of it, and the lines follow once there is room."""

    def __init__(self, path: str) -> None:
        super().__init__()
        append_whole(path, b"")
        self.file = Appended(path, logging.getLogger("trainer").warning)
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            if file.read() not in (b"", b"\n"):
                self.file.write(b"\n")  # after half a line that a kill left

    def emit(self, record: logging.LogRecord) -> None:
        self.file.write((self.format(record) + "\n").encode())

    def close(self) -> None:
        self.file.close()
        super().close()


def log_to_file(logger: logging.Logger, path: str) -> None:
    """Append every line to ``path`` as well, those said already first."""
    handler = _LogFile(path)
    handler.setFormatter(_Lines())
    for kept in [h for h in logger.handlers if isinstance(h, _EarlyLines)]:
        for record in kept.records:
            handler.handle(record)
        logger.removeHandler(kept)
    logger.addHandler(handler)


def close_files(logger: logging.Logger) -> None:
    """Close what ``log_to_file`` opened."""
    for handler in [h for h in logger.handlers if isinstance(h, _LogFile)]:
        handler.close()
        logger.removeHandler(handler)
