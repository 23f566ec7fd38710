"""Reading many files at once before a run, where one that hangs must not hang the program."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
THREADS = 4


class Hang(Exception):
    """Nothing came for too long.

    Attributes:
        busy: the items that were being worked on.
    """

    def __init__(self, busy: Sequence[int]):
        super().__init__(busy)
        self.busy = busy


def in_threads(work: Callable[[int], T], items: Sequence[int], timeout: float, threads: int = THREADS) -> list[T]:
    """``work`` of every item, in their order.

    Args:
        timeout: seconds for which no item may end; 0 waits for ever. Threads that hang then are left behind, and end with the process.

    Raises:
        Hang: none ended for so long.
        Exception: the first that ``work`` raised.
    """
    waiting, done = iter(list(enumerate(items))), queue.SimpleQueue()
    lock, busy, found = threading.Lock(), set(), {}

    def run() -> None:
        while True:
            with lock:
                place, item = next(waiting, (-1, -1))
                if place < 0:
                    return
                busy.add(item)
            try:
                done.put((place, item, work(item), None))
            except Exception as error:
                done.put((place, item, None, error))

    for _ in range(min(threads, len(items))):
        threading.Thread(target=run, daemon=True).start()
    while len(found) < len(items):
        try:
            place, item, result, error = done.get(timeout=timeout or None)
        except queue.Empty:
            raise Hang(sorted(busy)) from None
        if error is not None:
            raise error
        busy.discard(item)
        found[place] = result
    return [found[place] for place in range(len(items))]
