"""A finding of the doctor: what the report says about it, and the files that its repair moves or renames.

Findings hold positions of images, not text: a million of them take a few megabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.doctor.survey import Split, Survey

ERROR, WARNING, NOTE = SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True)
class Move:
    """A file to take out of the data (``to`` empty), or to rename to ``to``."""

    path: str
    to: str = ""


@dataclass
class Finding:
    """One thing found.

    Attributes:
        code: identifies the kind of finding, for scripts.
        title: a sentence without a full stop.
        count: number of items; ``item(i)`` describes one: its ``path`` or ``name``, and ``detail``.
        advice: what to do, or that nothing needs to be done.
        commands: flags or commands that repair it.
        moves: the files to take out or rename, of which the report makes a script.
    """

    code: str
    severity: str
    title: str
    count: int = 0
    item: Callable[[int], dict[str, Any]] = dict
    advice: str = ""
    commands: list[str] = field(default_factory=list)
    moves: Callable[[], Iterator[Move]] | None = None


class Images:
    """Some images of a survey, as items of a finding and as files to take out.

    Args:
        positions: (images,) positions in the splits' images one after the other.
        detail: describes an image, by its split and index.
    """

    def __init__(self, survey: Survey, positions: np.ndarray, detail: Callable[[Split, int], str] = lambda split, index: ""):
        self.positions, self.detail = np.asarray(positions, dtype=np.int64), detail
        self.splits = list(survey.splits.values())
        self.starts = np.cumsum([0, *(len(split.rows) for split in self.splits)])

    def place(self, position: int) -> tuple[Split, int]:
        at = int(np.searchsorted(self.starts, position, "right")) - 1
        return self.splits[at], int(position - self.starts[at])

    def item(self, i: int) -> dict[str, Any]:
        split, index = self.place(self.positions[i])
        return dict(path=split.source.path(index), split=split.name, detail=self.detail(split, index))

    def moves(self, target: Callable[[Split, int], str] = lambda split, index: "") -> Callable[[], Iterator[Move]] | None:
        if not any(self.place(p)[0].movable for p in self.positions[:1000]):
            return None

        def generate() -> Iterator[Move]:
            for position in self.positions.tolist():
                split, index = self.place(position)
                if split.movable:
                    yield Move(split.source.path(index), target(split, index))
        return generate

    def finding(self, code: str, severity: str, title: str, advice: str = "", commands: Sequence[str] = (), moves=None) -> Finding:
        return Finding(code, severity, title, len(self.positions), self.item, advice, list(commands), moves)


def many(count: int, noun: str = "image") -> str:
    """A number with its noun."""
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + ("es" if noun.endswith("s") else "s")
    return f"{count:,} {noun if count == 1 else plural}"


def all_rows(survey: Survey) -> np.ndarray:
    """The rows of all splits, one after the other."""
    rows = [split.rows for split in survey.splits.values()]
    return np.concatenate(rows) if rows else np.zeros(0)


def start_of(survey: Survey, name: str) -> int:
    """The position of a split's first image in ``all_rows``."""
    return len(survey.splits["train"].rows) if name == "val" and "train" in survey.splits else 0
