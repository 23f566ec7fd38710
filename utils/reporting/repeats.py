"""Runs of one recipe that differ in their fold (DATA.FOLD) or seed alone: mean and spread of their results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from config import KEY, RECIPE
from utils.reporting.run_reader import ReportedMetric, Run

_VARIED = ("DATA.FOLD", "SEED")


@dataclass
class Figure:
    """A metric over runs: in the best epoch of each, or in the last.

    Attributes:
        spread: the standard deviation over the runs (n - 1).
    """

    name: str
    metric: ReportedMetric
    values: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        return statistics.stdev(self.values)

    def line(self) -> str:
        """Such as ``best top-1: mean 81.20 %, standard deviation 1.13 % (80.10 % to 82.90 %)``."""
        shown = self.metric.shown
        return (f"{self.name}: mean {shown(self.mean)}, standard deviation {shown(self.spread)} "
                f"({shown(min(self.values))} to {shown(max(self.values))})")


@dataclass
class Repeats:
    """Runs of one recipe.

    Attributes:
        title: what they are, such as ``5 folds``.
        figures: those that all of them have.
        problems: why the figures may not be those of the whole cross-validation.
    """

    title: str
    figures: list[Figure]
    problems: list[str] = field(default_factory=list)


def repeats(runs: Sequence[Run]) -> list[Repeats]:
    """The groups of two or more runs of one recipe that differ in nothing but fold and seed."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.config:
            groups.setdefault(_recipe(run), []).append(run)
    return [_of(group) for group in groups.values() if len({_varied(run) for run in group}) > 1]


def _recipe(run: Run) -> str:
    """What the runs of a group have in common: the recipe, what decides, and the number of folds."""
    config = {key: value for key, value in run.config.items() if key in KEY and KEY[key].scope == RECIPE and key not in _VARIED}
    return repr((sorted(config.items()), run.task, run.deciding, _fold(run).partition("/")[2]))


def _fold(run: Run) -> str:
    return str(run.config.get("DATA.FOLD", ""))


def _varied(run: Run) -> tuple[str, Any]:
    return _fold(run), run.config.get("SEED")


def _of(runs: Sequence[Run]) -> Repeats:
    folds = sorted({_fold(run) for run in runs} - {""})
    kinds = [f"{len(folds)} folds" if len(folds) > 1 else "", f"{len(seeds)} seeds" if len(seeds := {_varied(run)[1] for run in runs}) > 1
             else ""]
    metrics, figures = runs[0].telling_metrics, []
    for when, rows in (("best", [run.best or {} for run in runs]), ("last", [run.evaluated[-1] if run.best else {} for run in runs])):
        for metric in metrics:
            values = [row.get(metric.name) for row in rows]
            if all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
                figures.append(Figure(f"{when} {metric.label}", metric, list(map(float, values))))
    return Repeats(f"{len(runs)} runs of {' and '.join(filter(None, kinds))}", figures, _problems(runs, folds))


def _problems(runs: Sequence[Run], folds: Sequence[str]) -> list[str]:
    problems = []
    count = folds[0].partition("/")[2] if folds else ""
    if count.isdecimal() and (missing := [f"{k}/{count}" for k in range(1, int(count) + 1) if f"{k}/{count}" not in folds]):
        problems.append(f"{'fold' if len(missing) == 1 else 'folds'} {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    seen: dict[tuple[str, Any], Run] = {}
    for run in runs:
        done, planned, unit = run.length
        if done != planned and not run.ended:
            problems.append(f"{run.name} has {done} of {planned} {unit}")
        if (first := seen.setdefault(_varied(run), run)) is not run:
            problems.append(f"{first.name} and {run.name} are of the same fold and seed")
    return problems
