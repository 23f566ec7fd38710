"""Predictions as they leave the program: lines on the console, a CSV table, JSON lines, arrays of features."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol, TextIO

import numpy as np
from PIL import Image
from torch import Tensor

from utils.loggers.console import plain, printable
from utils.runtime.files import csv_writer, open_atomically, write_atomically


@dataclass(frozen=True)
class Prediction:
    """What is told of an image.

    Attributes:
        number: its place among the images given.
        path: its name as it was given.
        fault: why it could not be read, else "", and the rest is empty.
        text: for people, on one line.
        cells: of a table, as many as the format has columns.
        record: for programs, plain data.
        caption, confidence: under a thumbnail: a few words, and a probability of 0 to 1 or None.
        found: the task's own answer, for outputs that only it has.
        draw: makes of a picture of the image, ``scale`` times as large as its file, one with what was found in it; None leaves it as it is.
    """

    number: int
    path: str
    fault: str = ""
    text: str = ""
    cells: Sequence[object] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    caption: str = ""
    confidence: float | None = None
    found: Any = None
    draw: Callable[[Image.Image, float], Image.Image] | None = None


class PredictionFormat(Protocol):
    """How a task tells a model's outputs.

    Attributes:
        columns: names of a table's columns.
        gives: those of PREDICT.COCO, PREDICT.PICTURES and PREDICT.MASKS that can be made of it.
    """

    columns: Sequence[str]
    gives: Sequence[str] = ()

    def tell(self, outputs: Any) -> list[dict[str, Any]]:
        """The fields of a ``Prediction`` from ``text`` on, for each image of a batch."""


class TopClasses:
    """The likeliest classes: ``tabby 93.1 %, tiger cat 4.2 %``, by logits (B, C).

    Args:
        classes: names, in the order of the outputs.
        descriptions: words for names that are WordNet's ids; "" for others.
        topk: classes an image, capped at those there are.
    """

    def __init__(self, classes: Sequence[str], descriptions: Sequence[str], topk: int):
        self.classes, self.descriptions, self.topk = classes, descriptions, min(topk, len(classes))
        self.described = any(descriptions)
        kinds = ("class", *(["description"] if self.described else []), "probability")
        self.columns = [f"{kind}_{rank}" for rank in range(1, self.topk + 1) for kind in kinds]

    def tell(self, outputs: Tensor) -> list[dict[str, Any]]:
        probabilities, numbers = outputs.float().softmax(dim=1).topk(self.topk, dim=1)
        return [self._of_image(list(zip(*row, strict=True))) for row in zip(numbers.tolist(), probabilities.tolist(), strict=True)]

    def _of_image(self, top: Sequence[tuple[int, float]]) -> dict[str, Any]:
        cells, record = [], []
        for number, share in top:
            words = self.descriptions[number]
            cells += [self.classes[number], *([words] if self.described else []), rounded(share)]
            record.append({"class": self.classes[number], **({"description": words} if words else {}), "number": number,
                           "probability": rounded(share)})
        return dict(text=", ".join(f"{plain(self._short_name(number))} {100 * share:.1f} %" for number, share in top), cells=cells,
                    record=dict(top=record), caption=self._short_name(top[0][0]), confidence=top[0][1])

    def _short_name(self, number: int) -> str:
        """A class for people: the first word of a WordNet id's description, else its name."""
        return self.descriptions[number].partition(",")[0] or self.classes[number]


class LabelsOverThreshold:
    """Every label whose probability reaches its threshold, likeliest first: ``red 93.1 %, green 81.0 %``, by logits (B, C).

    Args:
        classes: names, in the order of the outputs.
        thresholds: of each (C,).
    """

    def __init__(self, classes: Sequence[str], thresholds: np.ndarray):
        self.classes, self.thresholds = classes, thresholds
        self.columns = ["labels", *(f"probability_{name}" for name in classes)]

    def tell(self, outputs: Tensor) -> list[dict[str, Any]]:
        return [self._of_image(row) for row in outputs.float().sigmoid().tolist()]

    def _of_image(self, row: Sequence[float]) -> dict[str, Any]:
        given = sorted((i for i, share in enumerate(row) if share >= self.thresholds[i]), key=lambda i: -row[i])
        likeliest = max(range(len(row)), key=row.__getitem__)
        told = ", ".join(f"{plain(self.classes[i])} {100 * row[i]:.1f} %" for i in given)
        return dict(text=told or f"no label (likeliest {plain(self.classes[likeliest])} {100 * row[likeliest]:.1f} %)",
                    cells=["|".join(self.classes[i] for i in given), *map(rounded, row)],
                    record=dict(labels=[{"class": self.classes[i], "number": i, "probability": rounded(row[i])} for i in given]),
                    caption=", ".join(self.classes[i] for i in given) or "no label", confidence=row[given[0]] if given else None)


class Console:
    """A line an image: ``photos/a.jpg: tabby 93.1 %, tiger cat 4.2 %``. Images that could not be read are told elsewhere."""

    def __init__(self, logger: logging.Logger):
        self.logger = logger

    def add(self, prediction: Prediction) -> None:
        if not prediction.fault:
            self.logger.info(f"{plain(prediction.path)}: {prediction.text}")


@contextlib.contextmanager
def text_file(path: str) -> Iterator[TextIO]:
    """A text file that appears whole, in UTF-8; bytes of names that are none are written out."""
    with open_atomically(path) as file:
        yield codecs.getwriter("utf-8")(file, errors="backslashreplace")


class CsvTable:
    """A row an image: path, the format's columns (class_1, probability_1, ...), error."""

    def __init__(self, file: TextIO, form: PredictionFormat):
        self.columns, self.rows = form.columns, csv_writer(file)
        self.rows.writerow(["path", *self.columns, "error"])

    def add(self, prediction: Prediction) -> None:
        self.rows.writerow([prediction.path, *(prediction.cells or [""] * len(self.columns)), prediction.fault])


class JsonLines:
    """A line an image: ``{"path": ..., "top": [{"class": ..., "number": ..., "probability": ...}, ...]}``, or with an "error"."""

    def __init__(self, file: TextIO, form: PredictionFormat):
        self.file = file

    def add(self, prediction: Prediction) -> None:
        found = dict(error=prediction.fault) if prediction.fault else prediction.record
        self.file.write(json.dumps(dict(path=prediction.path, **found)) + "\n")


def rounded(share: float) -> float:
    """A probability to six digits, what single precision holds."""
    return float(f"{share:.6g}")


class _StandardOutput(io.TextIOBase):
    """Standard output for data: as it is into a pipe or a file, harmless on a terminal; a closed pipe ends the program."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()

    def write(self, text: str) -> int:
        try:
            sys.stdout.write(printable(text) if self.terminal else text)
            sys.stdout.flush()
        except BrokenPipeError:
            # Python flushes standard output at exit and would complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise
        return len(text)


def standard_output() -> TextIO:
    """Standard output as a file of data."""
    return _StandardOutput()


def listing_of(features: str) -> str:
    """The file with the images' paths beside a file of features."""
    return os.path.splitext(features)[0] + ".paths.json"


class Features:
    """Vectors to FILE.npy or FILE.safetensors as they come, one a row, none kept; the images' paths to FILE.paths.json.

    The file begins with a block of fixed size for its header, which is filled in when the number of rows is known. In
    safetensors the array is called ``features``.
    """

    _HEADER = 256  # bytes, a multiple of 64 as numpy wants it

    def __init__(self, path: str):
        self.path, self.paths, self.width = path, [], 0

    def __enter__(self) -> Features:
        self._stack = contextlib.ExitStack()
        self._file: BinaryIO = self._stack.enter_context(open_atomically(self.path))
        self._file.write(bytes(self._HEADER))
        return self

    def add(self, paths: Sequence[str], vectors: Tensor) -> None:
        """``vectors`` (len(paths), C), float32."""
        self.width = vectors[0].numel() if len(vectors) else self.width
        self.paths += paths
        self._file.write(np.ascontiguousarray(vectors.flatten(1).numpy(), dtype="<f4").tobytes())

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._file.seek(0)
            self._file.write(self._header())
        if not self._stack.__exit__(*error) and error[0] is None:
            write_atomically(listing_of(self.path), lambda file: file.write(json.dumps(self.paths, indent=0).encode()))

    def _header(self) -> bytes:
        shape = (len(self.paths), self.width)
        if self.path.endswith(".npy"):
            head, text = b"\x93NUMPY\x01\x00", f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
            room = self._HEADER - len(head) - 2
            return head + room.to_bytes(2, "little") + text.ljust(room - 1).encode() + b"\n"
        room = self._HEADER - 8
        text = json.dumps({"features": dict(dtype="F32", shape=shape, data_offsets=[0, 4 * math.prod(shape)])})
        return room.to_bytes(8, "little") + text.ljust(room).encode()
