"""What is wrong with the annotations of a data set: counted, named with a few examples, and told; nothing is left out silently."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from data.dense.base import Fault
from data.messages import Caution

FAULT = "fault"  # the code of notices that the doctor reports as findings of its own
_EXAMPLES = 3
LEFT_OUT = "left out"


class FaultBook:
    """Collects faults of one split.

    Args:
        where: the file or folder of the annotations, for messages.
    """

    def __init__(self, where: str):
        self.where = where
        self._found: dict[str, Fault] = {}

    def add(self, kind: str, remedy: str, examples: Iterable[str], count: int | None = None) -> None:
        """Count a fault.

        Args:
            examples: what it was found in, the first of it or all.
            count: how often it was found; None: as often as there are examples.
        """
        examples = list(examples)
        count = len(examples) if count is None else count
        if count:
            fault = self._found.setdefault(kind, Fault(kind, 0, [], remedy))
            fault.count += count
            fault.examples += examples[:_EXAMPLES - len(fault.examples)]

    def add_where(self, kind: str, remedy: str, mask: np.ndarray, name: Callable[[int], str]) -> None:
        """Count a fault of everything that ``mask`` (n,) bool marks; ``name`` describes one by its position."""
        found = np.flatnonzero(mask)
        self.add(kind, remedy, [name(int(i)) for i in found[:_EXAMPLES]], len(found))

    @property
    def faults(self) -> list[Fault]:
        """The faults, each kind once."""
        return list(self._found.values())

    def notices(self) -> list[Caution]:
        """The faults as messages."""
        return [Caution(f"{self.where}: {sentence(fault)}", FAULT) for fault in self.faults]


def sentence(fault: Fault) -> str:
    """A fault in words, without the file that has it."""
    more = ", ..." if fault.count > len(fault.examples) else ""
    times = "once" if fault.count == 1 else f"{fault.count:,} times"
    return f"{fault.kind} {times} ({', '.join(fault.examples)}{more}); {fault.remedy}"
