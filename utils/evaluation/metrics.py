"""Metrics: a row each, its name, how it is told, and for those that are sums over samples how they are computed."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils.runtime import distributed


@dataclass(frozen=True)
class Metric:
    """A figure of an evaluation.

    Attributes:
        name: column of metrics.jsonl and metrics.csv.
        label: its name in the line that is printed and in reports.
        higher_is_better: the direction in which a later evaluation counts as the better one.
        digits: decimals that are shown.
    """

    name: str
    label: str
    higher_is_better: bool = True
    digits: int = 2

    def shown(self, value: float) -> str:
        return f"{self.label} {value:.{self.digits}f}"

    def better(self, value: float, than: float | None) -> bool:
        """Whether ``value`` beats ``than``; anything beats None, and a number beats what is none."""
        if than is None or math.isnan(than):
            return True
        return value > than if self.higher_is_better else value < than


@dataclass(frozen=True, kw_only=True)
class SumMetric(Metric):
    """A metric that follows from sums over samples, and so is the same for every batch size and number of processes.

    Attributes:
        sums: from outputs and targets of a batch to what is added up over all batches and ranks: integers (exact) or floats (added in
            double precision), on the device, without waiting for it. Rows that only fill a batch must not add anything.
        value: the figure that follows from the sums, on the CPU.
        add: makes one of two batches' sums; another than addition for what has to be kept sample by sample.
    """

    sums: Callable[[Any, Any], Tensor]
    value: Callable[[Tensor], float]
    add: Callable[[Tensor, Tensor], Tensor] = operator.add


@dataclass(frozen=True)
class Evaluation:
    """The figures of a whole evaluation.

    Attributes:
        values: by the metrics' names, in the task's order.
        samples: how many were counted.
        line: what is printed.
        caution: a sentence on what is probably wrong, or "".
    """

    values: Mapping[str, float]
    samples: int
    line: str
    caution: str = ""


class SumEvaluator:
    """Evaluates ``SumMetric`` rows: ``update`` with every batch, then ``result``, the same on every rank.

    Args:
        count: the samples of a batch that count, from its targets, as an integer on the device.
        detail: what stands behind the metrics in the printed line, from the evaluation's values and samples.
        shown: whether a metric stands in that line, from the metric and all metrics' sums by name; by default all do.
        caution: the evaluation's, from all metrics' sums by name.
    """

    def __init__(self, metrics: Sequence[SumMetric], device: torch.device, count: Callable[[Any], Tensor],
                 detail: Callable[[Mapping[str, float], int], str] = lambda values, samples: f"({samples})",
                 shown: Callable[[SumMetric, Mapping[str, Tensor]], bool] = lambda metric, sums: True,
                 caution: Callable[[Mapping[str, Tensor]], str] = lambda sums: ""):
        self.metrics, self.device, self.count, self.detail, self.shown, self.caution = metrics, device, count, detail, shown, caution
        self.samples = torch.zeros((), dtype=torch.int64, device=device)
        self.sums: dict[str, Tensor] = {}

    def update(self, outputs: Any, targets: Any) -> None:
        self.samples += self.count(targets)
        for metric in self.metrics:
            sums = metric.sums(outputs, targets)
            if sums.is_floating_point() and sums.device.type != "mps":  # which has no double precision
                sums = sums.double()
            self.sums[metric.name] = metric.add(self.sums[metric.name], sums) if metric.name in self.sums else sums

    def result(self) -> Evaluation:
        """The figures over all ranks; every rank must ask."""
        samples = int(distributed.all_reduce_sum(self.samples))
        # A rank without images has no sums of its own, but takes part in the exchange.
        parts = distributed.gather_objects({name: sums.cpu() for name, sums in self.sums.items()})
        found = {metric.name: [part[metric.name] for part in parts if metric.name in part] for metric in self.metrics}
        sums = {metric.name: functools.reduce(metric.add, found[metric.name]) for metric in self.metrics if found[metric.name]}
        values = {metric.name: metric.value(sums[metric.name]) if metric.name in sums else math.nan for metric in self.metrics}
        told = [metric for metric in self.metrics if metric.name in sums and self.shown(metric, sums)]
        return Evaluation(values, samples, line(told, values, self.detail(values, samples)), self.caution(sums) if sums else "")


def line(metrics: Sequence[Metric], values: Mapping[str, float], detail: str) -> str:
    """``top1 86.94 top5 99.17 loss 0.8316 (313 of 360)``."""
    return " ".join([*(metric.shown(values[metric.name]) for metric in metrics), detail])
