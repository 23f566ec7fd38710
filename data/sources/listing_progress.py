"""Whoever wants to know how far the listing of a large data set is can listen here; the listing itself says it nowhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

Listener = Callable[[str, int], None]
_listener: Listener | None = None


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside, ``listener`` is called with what is being listed and the files found in it so far."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


def tick(root: str, files: int) -> None:
    """``files`` have been found in ``root`` so far; to be called every hundred or so."""
    if _listener is not None:
        _listener(root, files)
