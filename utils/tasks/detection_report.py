"""What --eval says of detections: COCO's figures of each kind, the weakest classes, and the files of figures and of detections."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import BinaryIO

import numpy as np
from yacs.config import CfgNode

from config import ConfigError
from data import Loaders
from utils.evaluation.dense_predictions_file import OVERLAPS, SIZES, Curves
from utils.evaluation.detection_metrics import DetectionEvaluation, coco_json_rows, table
from utils.evaluation.metrics import Evaluation
from utils.loggers.console import plain
from utils.runtime.files import csv_writer, replace_file, write_atomically
from utils.tasks.base import EvaluationReport, Task

_WEAKEST = 5


class DetectionReport(EvaluationReport):
    """TEST.PREDICTIONS is a JSON file of COCO's results, TEST.PER_CLASS a table of AP and AR."""

    loaders: Loaders
    evaluation: DetectionEvaluation

    def __init__(self, task: Task, config: CfgNode):
        super().__init__(task)
        self.config = config
        require_ending(config, ".json", "objects are written in COCO's form of results")

    def begin(self, loaders: Loaders) -> list[str]:
        self.loaders = loaders
        return []

    def lines(self, result: DetectionEvaluation, raw: Sequence[Evaluation]) -> list[str]:
        self.evaluation, classes = result, self.loaders.classes
        lines = table(result.values, list(result.curves)) if result.curves else []
        for kind, curves in result.curves.items():
            ap = curves.ap[:, 0]
            order = [int(i) for i in np.argsort(ap, kind="stable") if not math.isnan(ap[i])][:_WEAKEST]
            if len(classes) > 1 and order:
                lines.append(f"lowest {kind} AP: " + "; ".join(
                    f"{plain(classes[i])}: {100 * ap[i]:.2f} ({_objects(int(curves.objects[i, 0]))})" for i in order))
        if len(classes) > _WEAKEST and result.curves and not self.config.TEST.PER_CLASS:
            lines.append(f"figures of all {len(classes)} classes: --per-class FILE.csv")
        return [*lines, *(f"raw {other.line}" for other in raw), result.line]

    def write(self) -> list[str]:
        lines, test = [], self.config.TEST
        if test.PREDICTIONS:
            def rows(file: BinaryIO) -> None:
                lead = b"[\n"
                for row in coco_json_rows(self.evaluation.found, self.loaders.val.dataset.source):
                    file.write(lead + json.dumps(row).encode())
                    lead = b",\n"
                file.write(b"\n]\n" if lead != b"[\n" else b"[]\n")
            write_atomically(os.path.expanduser(test.PREDICTIONS), rows)
            lines.append(f"detections in COCO's form of results: {test.PREDICTIONS}")
        if test.PER_CLASS:
            text = class_table(self.evaluation.curves, self.loaders.classes)
            replace_file(os.path.expanduser(test.PER_CLASS), text.encode("utf-8", "backslashreplace"))
            lines.append(f"figures of each class: {test.PER_CLASS}")
        return lines


def _objects(count: int) -> str:
    return f"{count:,} object{'s' * (count != 1)}"


def require_ending(config: CfgNode, ending: str, why: str) -> None:
    """Raise ``ConfigError`` where TEST.PREDICTIONS names a file of another kind."""
    if config.TEST.PREDICTIONS and not config.TEST.PREDICTIONS.lower().endswith(ending):
        raise ConfigError(f"TEST.PREDICTIONS is {config.TEST.PREDICTIONS}; {why}: give a file that ends in {ending}")


def class_table(curves: Mapping[str, Curves], names: Sequence[str]) -> str:
    """A CSV table, a line a class: its objects, detections, and of each kind AP, AP50, AP75, by size, and AR; empty where there is none."""
    text, first = io.StringIO(), next(iter(curves.values()))
    writer = csv_writer(text)
    columns = ("ap", "ap50", "ap75", *(f"ap_{size}" for size in SIZES[1:]), "ar", *(f"ar_{size}" for size in SIZES[1:]))
    writer.writerow(["class", "objects", *(f"objects_{size}" for size in SIZES[1:]), "found",
                     *(f"{kind}_{column}" for kind in curves for column in columns)])
    at = {overlap: i for i, overlap in enumerate(round(100 * overlap) for overlap in OVERLAPS)}
    for i, name in enumerate(names):
        cells: list[float] = []
        for one in curves.values():
            cells += [one.ap[i, 0], one.precision[at[50], :, i].mean(), one.precision[at[75], :, i].mean(), *one.ap[i, 1:], *one.ar[i]]
        writer.writerow([name, *first.objects[i], first.found[i], *("" if math.isnan(cell) else f"{cell:.6f}" for cell in cells)])
    return text.getvalue()
