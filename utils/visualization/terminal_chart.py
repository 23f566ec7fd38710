"""A curve drawn in text."""

from __future__ import annotations

from collections.abc import Sequence

EIGHTHS = " ▁▂▃▄▅▆▇█"


def draw(values: Sequence[float], height: int, left: str, right: str, eighths: bool) -> list[str]:
    """Lines of a bar chart, a column a value, from 0 to the largest, which is named beside the top line.

    Args:
        values: not negative.
        height: lines.
        left, right: what stands below the first and the last column.
        eighths: whether the terminal has block characters; else columns are of ``#``.
    """
    top = max(values, default=0.0) or 1.0
    filled = [round(8 * height * value / top) for value in values]
    label = f"{top:.2e} "
    lines = []
    for row in reversed(range(height)):
        parts = [min(8, max(0, eighth - 8 * row)) for eighth in filled]
        columns = "".join(EIGHTHS[part] if eighths else "#" if part >= 4 else " " for part in parts)
        lines.append((label if row == height - 1 else " " * len(label)) + "|" + columns.rstrip())
    return [*lines, "0 ".rjust(len(label)) + "+" + "-" * len(values),
            " " * (len(label) + 1) + left + right.rjust(max(len(right) + 1, len(values) - len(left)))]
