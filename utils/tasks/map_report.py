"""What --eval says of maps of classes and of segments: the figures of each class, and the files of figures and of maps."""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from torch import Tensor
from yacs.config import CfgNode

from data import Loaders
from data.dense.base import DenseSource
from data.dense.batch import DenseBatch
from utils.evaluation.dense_figures import MapFigures, class_quality
from utils.evaluation.map_metrics import MAP_METRICS, MapEvaluation
from utils.evaluation.metrics import Evaluation
from utils.evaluation.panoptic_metrics import PanopticEvaluation
from utils.evaluation.predictions_file import names_of
from utils.inference.found import Panoptic
from utils.loggers.console import plain
from utils.runtime import distributed
from utils.runtime.files import csv_writer, replace_file, write_atomically
from utils.tasks.base import EvaluationReport, Task
from utils.tasks.detection_report import require_ending
from utils.visualization.overlays import palette

_MOST_CLASSES = 40  # that are told a line each


class _PictureReport(EvaluationReport):
    """TEST.PREDICTIONS is a ZIP file with a PNG an image, named as it is, TEST.PER_CLASS a table."""

    head: str  # above ``class_lines``
    loaders: Loaders
    evaluation: Any

    def __init__(self, task: Task, config: CfgNode):
        super().__init__(task)
        self.config, self._pictures = config, {}
        require_ending(config, ".zip", "the maps are PNG files in one archive")

    @property
    def source(self) -> DenseSource:
        return self.loaders.val.dataset.source

    def begin(self, loaders: Loaders) -> list[str]:
        self.loaders = loaders
        return []

    def record(self, outputs: Sequence[Any], batch: DenseBatch) -> None:
        if self.config.TEST.PREDICTIONS:
            self._pictures |= {number: self.picture(output) for number, output in zip(batch.numbers.tolist(), outputs, strict=True)
                               if number >= 0}

    def lines(self, result: Any, raw: Sequence[Evaluation]) -> list[str]:
        self.evaluation = result
        self._pictures = {number: png for part in distributed.gather_objects(self._pictures) for number, png in part.items()}
        rows = list(self.class_lines())
        if len(rows) > _MOST_CLASSES:
            rows = [*[row for _, row in sorted(rows, key=lambda row: (math.isnan(row[0]), row[0]))][:_MOST_CLASSES // 2],
                    f"(the weakest of {len(rows)} classes; --per-class FILE.csv has them all)"]
        else:
            rows = [row for _, row in rows]
        return [*([self.head] if rows else []), *rows, *self.other_lines(), *(f"raw {other.line}" for other in raw), result.line]

    def write(self) -> list[str]:
        lines, test = [], self.config.TEST
        if test.PREDICTIONS:
            write_atomically(os.path.expanduser(test.PREDICTIONS), self._archive)
            lines.append(f"map of each image: {test.PREDICTIONS}")
        if test.PER_CLASS:
            replace_file(os.path.expanduser(test.PER_CLASS), self.class_table().encode("utf-8", "backslashreplace"))
            lines.append(f"figures of each class: {test.PER_CLASS}")
        return lines

    def _archive(self, file: BinaryIO) -> None:
        numbers = sorted(self._pictures)
        names = dict(zip(numbers, inside(names_of(self.source, numbers)), strict=True))
        with zipfile.ZipFile(file, "w") as archive:
            for number in numbers:
                archive.writestr(names[number], self.png(number))
            for name, content in self.extras(names):
                archive.writestr(name, content)

    def png(self, number: int) -> bytes:
        return self._pictures[number]

    def extras(self, names: dict[int, str]) -> Iterator[tuple[str, bytes]]:
        """Files beside the pictures, (name, content)."""
        yield from ()

    def picture(self, output: Any) -> Any:
        """What is kept of an image, to be sent to other processes."""
        raise NotImplementedError

    def class_lines(self) -> Iterator[tuple[float, str]]:
        """(the figure by which classes are ordered, the line) of each class."""
        raise NotImplementedError

    def other_lines(self) -> list[str]:
        """Figures over all classes that the last line leaves out."""
        raise NotImplementedError

    def class_table(self) -> str:
        """The CSV table."""
        raise NotImplementedError


class MapReport(_PictureReport):
    """The PNGs have a palette, and each pixel the value that the data's own masks have for its class."""

    head = "   IoU  accuracy        pixels  class"
    evaluation: MapEvaluation

    def picture(self, output: Tensor) -> bytes:
        values = np.asarray(self.source.category_ids, dtype=np.int64)
        numbers = output.cpu().numpy()
        return png_of(values[numbers].astype(np.uint8 if values.max() < 256 else np.uint16))

    def class_lines(self) -> Iterator[tuple[float, str]]:
        figures = MapFigures(self.evaluation.counts)
        rows = zip(map(plain, self.loaders.classes), figures.iou, figures.accuracy, figures.pixels, strict=True)
        for name, iou, accuracy, pixels in rows:
            yield iou, f"{_percent(iou)}    {_percent(accuracy)}  {pixels:>12,}  {name}"

    def other_lines(self) -> list[str]:
        return [metric.shown(self.evaluation.values[metric.name]) for metric in MAP_METRICS if metric.label not in self.evaluation.line]

    def class_table(self) -> str:
        return MapFigures(self.evaluation.counts).csv(self.loaders.classes)


class PanopticReport(_PictureReport):
    """The archive is as COCO has panoptic results: ``panoptic.json`` and PNGs whose pixels are numbers of segments, R + 256 G + 65536 B."""

    head = "    PQ      SQ      RQ  class"
    evaluation: PanopticEvaluation

    def picture(self, output: Panoptic) -> tuple[bytes, list[int]]:
        numbers = output.segments[..., None] >> np.array([0, 8, 16]) & 255
        return png_of(numbers.astype(np.uint8)), output.labels.tolist()

    def png(self, number: int) -> bytes:
        return self._pictures[number][0]

    def extras(self, names: dict[int, str]) -> Iterator[tuple[str, bytes]]:
        ids = self.source.category_ids
        rows = [dict(image_id=int(self.source.image_ids[number]), file_name=name, segments_info=[
            dict(id=i + 1, category_id=int(ids[label])) for i, label in enumerate(self._pictures[number][1])])
            for number, name in names.items()]
        yield "panoptic.json", json.dumps(dict(annotations=rows)).encode()

    def class_lines(self) -> Iterator[tuple[float, str]]:
        for name, (pq, sq, rq) in zip(map(plain, self.loaders.classes), class_quality(self.evaluation.sums), strict=True):
            yield pq, f"{_percent(pq)}  {_percent(sq)}  {_percent(rq)}  {name}"

    def other_lines(self) -> list[str]:
        values = self.evaluation.values
        return ["  ".join(_percent(values[f"{figure}_{group}"] / 100) for figure in ("pq", "sq", "rq")) + f"  all {group}"
                for group in ("things", "stuff")]

    def class_table(self) -> str:
        text = io.StringIO()
        writer = csv_writer(text)
        writer.writerow(["class", "thing", "pq", "sq", "rq", "matched", "extra", "missed"])
        for name, thing, figures, sums in zip(self.loaders.classes, self.source.things, class_quality(self.evaluation.sums),
                                              self.evaluation.sums, strict=True):
            writer.writerow([name, int(thing), *("" if math.isnan(figure) else f"{figure:.6f}" for figure in figures),
                             *sums[1:].astype(np.int64)])
        return text.getvalue()


def _percent(share: float) -> str:
    return "     -" if math.isnan(share) else f"{100 * share:6.2f}"


def png_of(pixels: np.ndarray) -> bytes:
    """A PNG of ``pixels`` (H, W) uint8, with the colours of classes, or uint16, or (H, W, 3)."""
    file, image = io.BytesIO(), Image.fromarray(pixels)
    if image.mode == "L":
        image.putpalette(palette())
    image.save(file, "PNG")
    return file.getvalue()


def inside(names: Sequence[str]) -> list[str]:
    """Names of PNGs within an archive for images of these ``names``, each another one, none of which leads out of it."""
    taken: set[str] = set()
    made = []
    for name in names:
        parts = [part for part in os.path.splitext(name)[0].replace("\\", "/").replace("::", "/").split("/") if part not in ("", ".", "..")]
        own = stem = "/".join(parts) or "image"
        while own in taken:
            own = f"{stem}-{len(taken) + 1}"
        taken.add(own)
        made.append(f"{own}.png")
    return made
