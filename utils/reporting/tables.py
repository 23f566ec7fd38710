"""What the page's tables are made of. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MOST_ROWS = 1000  # of a table of classes


@dataclass
class Table:
    """Rows of texts, under ``head``; columns ``numeric`` are set right. A cell may be (what to sort by, text)."""

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    numeric: Sequence[int] = ()
    sortable: bool = False


def percent(share: float) -> tuple[float, str]:
    """A cell with a share between 0 and 1, which may be nan."""
    return (-1.0, "–") if math.isnan(share) else (round(share, 6), f"{100 * share:.1f}")


def count(number: float) -> tuple[float, str]:
    """A cell with a whole number."""
    return (float(number), f"{number:,.0f}")
