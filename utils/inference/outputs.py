"""Predictions as they leave the program: lines on the console, a CSV table, JSON lines, arrays of features."""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, TextIO

import numpy as np
from torch import Tensor

from utils.inference.trained_model import Trained
from utils.loggers.console import plain, printable
from utils.runtime.files import open_atomically, write_atomically


@dataclass(frozen=True)
class Prediction:
    """What is told of an image.

    Attributes:
        number: its place among the images given.
        path: its name as it was given.
        top: (class number, probability), likeliest first; empty where it could not be read.
        fault: why it could not be read, else "".
    """

    number: int
    path: str
    top: list[tuple[int, float]]
    fault: str


def short_name(trained: Trained, number: int) -> str:
    """A class for people: the first word of a WordNet id's description, else its name."""
    return trained.descriptions[number].partition(",")[0] or trained.classes[number]


class Console:
    """A line an image: ``photos/a.jpg: tabby 93.1 %, tiger cat 4.2 %``. Images that could not be read are told elsewhere."""

    def __init__(self, logger: logging.Logger, trained: Trained):
        self.logger, self.trained = logger, trained

    def add(self, prediction: Prediction) -> None:
        if not prediction.fault:
            told = ", ".join(f"{plain(short_name(self.trained, number))} {100 * share:.1f} %" for number, share in prediction.top)
            self.logger.info(f"{plain(prediction.path)}: {told}")


@contextlib.contextmanager
def text_file(path: str) -> Iterator[TextIO]:
    """A text file that appears whole, in UTF-8; bytes of names that are none are written out."""
    with open_atomically(path) as file:
        yield codecs.getwriter("utf-8")(file, errors="backslashreplace")


class CsvTable:
    """A row an image: path, class_1, probability_1, ..., error; with description_1, ... where class names are WordNet's ids."""

    def __init__(self, file: TextIO, trained: Trained, topk: int):
        self.trained, self.topk = trained, min(topk, len(trained.classes))
        self.described = any(trained.descriptions)
        self.rows = csv.writer(file, lineterminator="\n")
        kinds = ("class", *(["description"] if self.described else []), "probability")
        self.rows.writerow(["path", *(f"{kind}_{rank}" for rank in range(1, self.topk + 1) for kind in kinds), "error"])

    def add(self, prediction: Prediction) -> None:
        cells: list[object] = [prediction.path]
        for number, share in prediction.top:
            words = [self.trained.descriptions[number]] if self.described else []
            cells += [self.trained.classes[number], *words, rounded(share)]
        cells += [""] * ((2 + self.described) * (self.topk - len(prediction.top)))
        self.rows.writerow([*cells, prediction.fault])


class JsonLines:
    """A line an image: ``{"path": ..., "top": [{"class": ..., "number": ..., "probability": ...}, ...]}``, or with an "error"."""

    def __init__(self, file: TextIO, trained: Trained, topk: int):
        self.file, self.trained = file, trained

    def add(self, prediction: Prediction) -> None:
        names, words = self.trained.classes, self.trained.descriptions
        found = dict(path=prediction.path)
        if prediction.fault:
            found["error"] = prediction.fault
        else:
            found["top"] = [{"class": names[number], **({"description": words[number]} if words[number] else {}), "number": number,
                             "probability": rounded(share)} for number, share in prediction.top]
        self.file.write(json.dumps(found) + "\n")


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
            listing = os.path.splitext(self.path)[0] + ".paths.json"
            write_atomically(listing, lambda file: file.write(json.dumps(self.paths, indent=0).encode()))

    def _header(self) -> bytes:
        shape = (len(self.paths), self.width)
        if self.path.endswith(".npy"):
            head, text = b"\x93NUMPY\x01\x00", f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
            room = self._HEADER - len(head) - 2
            return head + room.to_bytes(2, "little") + text.ljust(room - 1).encode() + b"\n"
        room = self._HEADER - 8
        text = json.dumps({"features": dict(dtype="F32", shape=shape, data_offsets=[0, 4 * math.prod(shape)])})
        return room.to_bytes(8, "little") + text.ljust(room).encode()
