"""Progress of listing a large data set, for whoever has asked for it; the listing itself prints nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

Listener = Callable[[str, int], None]
_listener: Listener | None = None


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within it, ``listener`` is called with what is being listed and the number of files found so far."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


def tick(root: str, files: int) -> None:
    """Report that ``files`` files of ``root`` have been found so far; call it every hundred files or so."""
    if _listener is not None:
        _listener(root, files)
