"""Signals before the program's own code takes them, while modules are imported, and after it has ended."""

from __future__ import annotations

import os
import signal
import sys

_EXIT_INTERRUPTED = 1


def hold() -> None:
    """Until ``release`` Ctrl-C ends the process with a sentence instead of a traceback, and SIGUSR1, which asks for a checkpoint,
    finds nothing to save yet instead of killing. Signals that are ignored (nohup) stay so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    if hasattr(signal, "SIGUSR1") and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, _nothing_yet)  # a function: programs that are started do not inherit it


def release() -> None:
    """From here on Ctrl-C is Python's ``KeyboardInterrupt``, which ``utils.cli.errors`` explains."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: object) -> None:
    if sys.stderr is not None:
        os.write(2, b"error: stopped by Ctrl-C; what was saved before is intact\n")
    os._exit(_EXIT_INTERRUPTED)


def _nothing_yet(*_: object) -> None:
    pass
