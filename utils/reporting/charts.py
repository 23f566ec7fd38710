"""The curves of one run or several, as data: what plots.py draws. Imports neither torch nor matplotlib."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.reporting.run_reader import ReportedMetric, Run

_POINTS = 400  # of a line at most; more steps share one


@dataclass
class Line:
    """A curve: its values ``ys`` (None: there is none) over ``xs``, rising; ``color`` by number, ``dots`` marks every point."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    color: int = 0
    dashed: bool = False
    dots: bool = False

    def thinned(self) -> np.ndarray:
        """(x, mean, least, largest) of groups of neighbors, float64 (points, 4), at least one; what is not finite is left out."""
        points = np.array([(x, np.nan if y is None else y) for x, y in zip(self.xs, self.ys, strict=True)], dtype=np.float64)
        points = points[np.isfinite(points).all(axis=1)]
        groups = np.array_split(points, min(len(points), _POINTS))
        return np.array([(part[-1, 0], part[:, 1].mean(), part[:, 1].min(), part[:, 1].max()) for part in groups])


@dataclass(frozen=True)
class Chart:
    """Lines over one pair of axes, x from 0 on; ``name`` of its file, ``marks`` of (x, what happened there)."""

    name: str
    title: str
    x_label: str
    y_label: str
    lines: list[Line]
    marks: list[tuple[float, str]]


def letters(runs: Sequence[Run]) -> list[str]:
    """What runs are called beside each other: ``A``, ``B``; a single one needs no name."""
    return [""] if len(runs) == 1 else [chr(ord("A") + number) if number < 26 else f"run {number + 1}" for number in range(len(runs))]


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Loss, the deciding metric, others that belong together, learning rate, gradient norm, throughput, data wait: where there are figures.

    Over steps; over epochs where runs have epochs of different lengths.
    """
    lengths = [epoch_length(run) for run in runs]
    by_epoch = len(set(lengths)) > 1 and all(lengths)
    divisors = [length if by_epoch else 1 for length in lengths]
    x_label = "epoch" if by_epoch else "step"
    metrics = dict.fromkeys(run.deciding for run in runs)
    groups = [_of_group(*group, alone=len(runs) == 1) for group in _GROUPS
              if len(runs) == 1 or group[0] in _COMPARED and group[2][0] not in {metric.name for metric in metrics}]
    made = [_chart(runs, divisors, x_label, *what) for what in (("loss", "Loss", "loss", _losses), *map(_of_metric, metrics), *groups,
                                                                *_CHARTS)]
    return [chart for chart in made if any(y is not None for line in chart.lines for y in line.ys)]


def epoch_length(run: Run) -> int | None:
    """Steps of an epoch, or None where nothing tells."""
    told = [start["steps_per_epoch"] for start in run.starts if isinstance(start.get("steps_per_epoch"), int)]
    return told[-1] if told else next((row["step"] // row["epoch"] for row in run.rows if row.get("epoch")), None)


def marks(run: Run, letter: str = "") -> list[tuple[float, str]]:
    """(step, sentence) of the restarts and rollbacks."""
    found = []
    for event in run.events:
        if event.get("event") == "start" and event["step"] > 0:
            again = f", {event['again']} steps done again" if event.get("again") else ""
            found.append((event["step"], f"{letter} restarted at step {event['step']}{again}".strip()))
        elif event.get("event") == "rollback":
            found.append((event["step"], f"{letter} went back to the weights of step {event.get('to', '?')}".strip()))
    return found


# (label, rows, key, factor) of each of a chart's curves
Series = list[tuple[str, list[dict[str, Any]], str, float]]


def _one(key: str, factor: float = 1.0) -> Callable[[Run], Series]:
    """A single curve, over the lines of the log where there are any."""
    return lambda run: [("", run.steps or run.rows, key, factor)]


def _losses(run: Run) -> Series:
    train = ("train", run.steps, "loss", 1.0) if run.steps else ("train", run.rows, "train_loss", 1.0)
    return [train, ("validation", run.rows, "val_loss", 1.0)]


def _of_metric(metric: ReportedMetric) -> tuple[str, str, str, Callable[[Run], Series]]:
    """The chart of a metric of evaluation."""
    def series(run: Run) -> Series:
        if not any(f"raw_{metric.name}" in row for row in run.rows):
            return [(metric.label, run.rows, metric.name, 1.0)]
        return [("averaged weights", run.rows, metric.name, 1.0), ("raw weights", run.rows, f"raw_{metric.name}", 1.0)]
    y_label = f"{metric.label} ({metric.unit.strip()})" if metric.unit else metric.label
    if metric.name == "top1":
        return "accuracy", "Accuracy on validation", y_label, series
    return re.sub(r"\W+", "_", f"val_{metric.name}"), f"Validation {metric.label}", y_label, series


# Metrics of dense tasks that belong together: (name, title, metrics), the first one telling most.
_GROUPS = [
    *((f"val_{kind}_{name}", f"Validation {kind} AP{title}", [f"{kind}_{metric}" for metric in metrics])
      for kind in ("box", "mask") for name, title, metrics in (
          ("overlaps", "", ("ap", "ap50", "ap75")), ("sizes", " by size", ("ap_small", "ap_medium", "ap_large")))),
    ("val_maps", "Validation of maps", ["miou", "mean_accuracy", "pixel_accuracy"]),
    ("val_panoptic", "Validation of segments", ["pq", "sq", "rq", "pq_things", "pq_stuff"]),
]
_COMPARED = ("val_box_overlaps", "val_mask_overlaps")  # of several runs the first metric is drawn, unless it decides


def _of_group(name: str, title: str, metrics: Sequence[str], alone: bool) -> tuple[str, str, str, Callable[[Run], Series]]:
    """The chart of a group; of several runs it has the first metric alone."""
    def series(run: Run) -> Series:
        labels = {metric.name: metric.label for metric in run.metrics}
        return [(labels[metric], run.rows, metric, 1.0) for metric in metrics[:None if alone else 1] if metric in labels]
    return name, title, "%", series


_CHARTS = [
    ("lr", "Learning rate", "", _one("lr")),
    ("grad_norm", "Gradient norm before clipping", "norm", _one("grad_norm")),
    ("throughput", "Throughput", "images/s", _one("images_per_s")),
    ("data_wait", "Time spent waiting for data", "share (%)", _one("data_share", 100.0)),
]


def _chart(runs: Sequence[Run], divisors: Sequence[float], x_label: str, name: str, title: str, y_label: str,
           series: Callable[[Run], Series]) -> Chart:
    lines, marked = [], []
    for number, (run, letter, divisor) in enumerate(zip(runs, letters(runs), divisors, strict=True)):
        for place, (label, rows, key, factor) in enumerate(series(run)):
            ys = [row[key] * factor if isinstance(row.get(key), (int, float)) and math.isfinite(row[key]) else None for row in rows]
            lines.append(Line(f"{letter} {label}".strip(), [row["step"] / divisor for row in rows], ys, number if letter else place,
                              dashed=bool(letter) and place > 0, dots=rows is run.rows and len(rows) <= 120))
        marked += [(step / divisor, sentence) for step, sentence in marks(run, letter)]
    return Chart(name, title, x_label, y_label, [line for line in lines if any(y is not None for y in line.ys)], marked)
