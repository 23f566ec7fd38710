"""How far the work is: one live line on a terminal, plain lines now and then everywhere else; never both, rank 0 alone.

The live line goes to standard error, so that it stays on the terminal when the output is sent to a file. tqdm draws it; what
stands in it and when plain lines are due is decided here.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from data.sources.listing_progress import listening
from utils.runtime import launcher

FIRST, SLOW = 10.0, 60.0  # seconds until the first plain line of a piece of work, and between the next ones
PATIENCE = 1.0  # seconds that listing files may take without a word
BAR = 8  # columns that the bar has at least where there is one
NARROW = 60  # columns below which the numbers need the bar's room

Compose = Callable[[int, float], tuple[str, Sequence[str]]]


class _Drawn(tqdm):
    """A line of one's own wording: what it begins with, the bar, then what fits, in order of importance."""

    monitor_interval = 0  # no thread beside the work: DataLoader workers are forked

    def __init__(self, total: int | None, start: int, compose: Compose):
        self.compose, self.begun_at = compose, start
        super().__init__(total=total, initial=start, file=sys.stderr, leave=False, mininterval=0.1, miniters=1, ncols=80, nrows=24)

    def __str__(self) -> str:
        done = self.n - self.begun_at
        elapsed = self.format_dict["elapsed"]
        pace = self.format_dict["rate"] or (done / elapsed if elapsed else 0.0)
        head, parts = self.compose(self.n, pace)
        columns = _columns(self.fp) - 3  # a ^C that the terminal writes behind it must not begin a new line
        room = columns - len(head) - (BAR + 2 if self.total and columns >= NARROW else 0)
        tail, gap = "", " " if columns < NARROW else "  "
        for part in parts:
            if len(tail) + len(gap) + len(part) > room:
                break
            tail += gap + part
        if columns < NARROW or not self.total:
            return (head + tail)[:columns]
        shape = f"{_literal(head)} |{{bar}}|{_literal(tail)}"
        return self.format_meter(self.n, self.total, self.format_dict["elapsed"], ncols=columns, ascii=self.ascii, bar_format=shape)

    def clear(self, *arguments: Any, **options: Any) -> None:
        super().clear(*arguments, **options)
        if not self.disable:
            self.fp.write("\x1b[K")  # what the terminal itself wrote behind the line, such as ^C


_Drawn.set_lock(threading.RLock())  # tqdm's own would take a semaphore of the system's


def _literal(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _columns(stream: Any) -> int:
    """Columns of the terminal that ``stream`` writes to; COLUMNS goes before."""
    fallback = (80, 24)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        fallback = os.get_terminal_size(stream.fileno())
    given = os.environ.get("COLUMNS", "")
    return int(given) if given.isdigit() and int(given) > 0 else fallback[0] or 80


def _can_be_live() -> bool:
    stream = sys.stderr
    return (launcher.rank() == 0 and os.environ.get("TERM", "") not in ("dumb", "unknown") and stream is not None
            and not stream.closed and stream.isatty())


class LiveLine:
    """The live line of a piece of work, from its making to ``close``; where there is no terminal it does nothing.

    Args:
        total: units of the whole, or None where nobody knows.
        compose: from the units done and the units a second to the line's beginning and its further parts, the most
            important first; asked only when the line is drawn, ten times a second at most.
        start: units done already.
    """

    def __init__(self, total: int | None, compose: Compose, start: int = 0):
        self._drawn: _Drawn | None = None
        clear_live_line()  # one at a time
        if _can_be_live():
            _show_warnings_above()
            self._drawn = _Drawn(total or None, start, compose)

    def update(self, done: int) -> None:
        """``done`` units are done."""
        if self._drawn is not None:
            with contextlib.suppress(OSError, ValueError):
                self._drawn.update(done - self._drawn.n)

    def close(self) -> None:
        """Take the line away; what comes next begins at the left."""
        if self._drawn is not None:
            _close(self._drawn)
            self._drawn = None


def _close(drawn: _Drawn) -> None:
    with contextlib.suppress(OSError, ValueError):
        drawn.clear()
        drawn.close()


def _all_drawn() -> list[_Drawn]:
    return [drawn for drawn in list(getattr(_Drawn, "_instances", ())) if isinstance(drawn, _Drawn) and not drawn.disable]


def clear_live_line() -> None:
    """Take away whatever live line there is, whoever made it."""
    for drawn in _all_drawn():
        _close(drawn)


def is_live() -> bool:
    """Whether a live line stands on the terminal now."""
    return bool(_all_drawn())


@contextlib.contextmanager
def live_line_hidden() -> Iterator[None]:
    """The live line is away while other lines are written, and comes back below them."""
    with _Drawn.external_write_mode(file=sys.stderr):
        yield


def _show_warnings_above() -> None:
    """Let Python's warnings, which go to standard error, be lines of their own."""
    show = warnings.showwarning
    if getattr(show, "aside", False):
        return

    def shown(*arguments: Any, **options: Any) -> None:
        with live_line_hidden():
            show(*arguments, **options)

    shown.aside = True
    warnings.showwarning = shown


def log_periodic(logger: logging.Logger, text: str) -> None:
    """Log a line of many alike, which the live line makes needless on a terminal; log.txt has it all the same."""
    logger.info(text, extra={"periodic": True})


class ProgressLines:
    """How far a piece of work is, from its making to ``close``: a live line, else plain lines, the first after ten seconds.

    Args:
        total: units there will be; None or 0 where nobody knows.
        what: what is being done, such as ``evaluating``.
        unit: what is counted, in the plural.
        say: takes a plain line.
        start: units done already.
    """

    def __init__(self, total: int | None, what: str, unit: str, say: Callable[[str], None] | None, start: int = 0):
        self.total, self.what, self.unit, self.say, self.start = total, what, unit, say, start
        self.begun = self.said = time.monotonic()
        self.pause = FIRST
        self.line = LiveLine(total, self._compose, start)

    def update(self, done: int) -> None:
        self.line.update(done)
        now = time.monotonic()
        if now - self.said >= self.pause and self.say is not None:
            self.said, self.pause = now, SLOW
            head, parts = self._compose(done, (done - self.start) / max(1e-9, now - self.begun))
            self.say(", ".join((f"{self.what}: {done:,} of {self.total:,} {self.unit}" if self.total else head, *parts)))

    def close(self) -> None:
        self.line.close()

    def _compose(self, done: int, pace: float) -> tuple[str, list[str]]:
        head = f"{self.what} {done:,}/{self.total:,}" if self.total else f"{self.what}: {done:,} {self.unit}"
        left = [f"{clock((self.total - done) / pace)} left"] if self.total and pace else []
        return head, [*left, f"{_pace(pace)} {self.unit}/s"] if pace else []


class Tracked:
    """An iterable that shows how far it has been read; see ``track``."""

    def __init__(self, iterable: Iterable[Any], total: int | None, what: str, logger: logging.Logger | None, unit: str):
        self.iterable, self.total, self.what, self.unit = iterable, total, what, unit
        self.say = None if logger is None else functools.partial(log_periodic, logger)

    def __len__(self) -> int:
        return self.total or 0

    def __iter__(self) -> Iterator[Any]:
        with contextlib.closing(ProgressLines(self.total, self.what, self.unit, self.say)) as shown:
            for done, item in enumerate(self.iterable, 1):
                yield item
                shown.update(done)


def track(iterable: Iterable[Any], total: int | None, what: str, logger: logging.Logger | None, unit: str = "batches") -> Tracked:
    """``iterable``, shown as it is read: a live line on a terminal, else a line through ``logger`` after ten seconds and then each minute.

    Args:
        total, what, unit: as of ``ProgressLines``.
    """
    return Tracked(iterable, total, what, logger, unit)


@contextlib.contextmanager
def listing_shown(say: Callable[[str], None]) -> Iterator[None]:
    """Inside, the listing of folders and archives shows how far it is; ``say`` takes plain lines."""
    shown: ProgressLines | None = None
    begun = time.monotonic()

    def heard(root: str, files: int) -> None:
        nonlocal shown
        if time.monotonic() - begun < PATIENCE:
            return
        if shown is None or shown.what != f"listing {root}":
            before, shown = shown, ProgressLines(None, f"listing {root}", "files", say, files)
            if before is not None:  # one of many short ones: the plain lines are due for all of them together
                shown.said, shown.pause = before.said, before.pause
        shown.update(files)

    try:
        with listening(heard):
            yield
    finally:
        if shown is not None:
            shown.close()


def _pace(pace: float) -> str:
    return f"{pace:,.0f}" if pace >= 100 else f"{pace:.3g}"


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, seconds = divmod(int(max(0, seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
