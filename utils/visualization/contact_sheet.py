"""A contact sheet: thumbnails with the likeliest class and its probability, drawn by Pillow alone."""

from __future__ import annotations

import logging
import os

from PIL import Image, ImageDraw, ImageFont, ImageOps

from data.errors import UnreadableImage
from data.layouts.input_paths import InputImages
from data.messages import NOTICE
from utils.inference.outputs import Prediction
from utils.runtime.files import write_atomically
from utils.visualization.drawing import length, write_line

_COLUMNS, _ROWS, _PAGES = 6, 8, 25
_SIDE, _GAP, _BAR = 200, 16, 5  # pixels: of a thumbnail's square, between tiles, of the bar of a probability
_CLASS_SIZE, _FILE_SIZE = 15, 12  # of the letters
_LABEL = _BAR + 6 + _CLASS_SIZE + 5 + _FILE_SIZE + 6
_PAPER, _MOUNT, _INK, _FAINT, _TRACK = "#ffffff", "#f1f2f4", "#1c1f23", "#6b7280", "#dfe3e8"
_SURE, _UNSURE, _WRONG = "#1f77b4", "#9db8cf", "#b3261e"


def pages_of(path: str) -> list[str]:
    """The files that a sheet at ``path`` may consist of."""
    root, suffix = os.path.splitext(path)
    return [path, *(f"{root}-{page}{suffix}" for page in range(2, _PAGES + 1))]


class Sheet:
    """Pages of thumbnails, a PNG each: FILE.png, FILE-2.png, ...; pages are written as they fill, 25 at most.

    Args:
        given: the images; those on the sheet are read once more.
    """

    def __init__(self, path: str, given: InputImages, logger: logging.Logger):
        self.path, self.given, self.logger = path, given, logger
        self.tiles: list[Image.Image] = []
        self.pages = 0

    def __enter__(self) -> Sheet:
        return self

    def add(self, prediction: Prediction) -> None:
        if self.pages == _PAGES:
            return
        self.tiles.append(self._tile(prediction))
        if len(self.tiles) == _COLUMNS * _ROWS:
            self._write()

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:
            return
        if self.tiles:
            self._write()
        shown = _PAGES * _COLUMNS * _ROWS
        if len(self.given) > shown:
            self.logger.log(NOTICE, f"the sheet shows the first {shown:,} of {len(self.given):,} images")

    def _write(self) -> None:
        columns = min(_COLUMNS, max(len(self.tiles), 1))
        rows = -(-len(self.tiles) // columns)
        across, down = _SIDE + _GAP, _SIDE + _LABEL + _GAP
        page = Image.new("RGB", (columns * across + _GAP, rows * down + _GAP), _PAPER)
        for place, tile in enumerate(self.tiles):
            page.paste(tile, (_GAP + place % columns * across, _GAP + place // columns * down))
        self.tiles, self.pages = [], self.pages + 1
        write_atomically(pages_of(self.path)[self.pages - 1], lambda file: page.save(file, "PNG"))

    def _tile(self, prediction: Prediction) -> Image.Image:
        tile = Image.new("RGB", (_SIDE, _SIDE + _LABEL), _PAPER)
        draw = ImageDraw.Draw(tile)
        draw.rectangle((0, 0, _SIDE - 1, _SIDE - 1), fill=_MOUNT)
        below = _SIDE + _BAR + 6
        thumbnail = None if prediction.fault else self._thumbnail(prediction)
        if thumbnail is None:
            draw.text((_SIDE // 2, _SIDE // 2), "unreadable", _FAINT, ImageFont.load_default(_CLASS_SIZE), anchor="mm")
            write_line(draw, (0, below), prediction.fault or "no longer readable", _CLASS_SIZE, _WRONG, _SIDE)
        else:
            tile.paste(thumbnail, ((_SIDE - thumbnail.width) // 2, (_SIDE - thumbnail.height) // 2))
            room = _SIDE
            if prediction.confidence is not None:
                draw.rectangle((0, _SIDE, _SIDE - 1, _SIDE + _BAR - 1), fill=_TRACK)
                if (filled := round(prediction.confidence * _SIDE)) > 0:
                    draw.rectangle((0, _SIDE, filled - 1, _SIDE + _BAR - 1), fill=_SURE if prediction.confidence >= 0.5 else _UNSURE)
                told = f"{100 * prediction.confidence:.0f} %"
                room = _SIDE - round(length(told, _CLASS_SIZE))
                write_line(draw, (room, below), told, _CLASS_SIZE, _INK, _SIDE)
            write_line(draw, (0, below), prediction.caption, _CLASS_SIZE, _INK, room - 8)
        name = os.path.basename(prediction.path) or prediction.path
        write_line(draw, (0, below + _CLASS_SIZE + 5), name, _FILE_SIZE, _FAINT, _SIDE)
        return tile

    def _thumbnail(self, prediction: Prediction) -> Image.Image | None:
        try:
            image = self.given.load(prediction.number)
        except UnreadableImage:  # it could be a moment ago
            return None
        width = image.width
        if prediction.draw is not None:  # as large as there is room, so that what is drawn can be told apart
            image = ImageOps.contain(image, (_SIDE, _SIDE), Image.Resampling.BICUBIC)
            return prediction.draw(image, image.width / width)
        image.thumbnail((_SIDE, _SIDE), reducing_gap=3.0)
        if _SIDE // max(image.size) >= 2:  # small images in whole multiples, their pixels sharp
            image = ImageOps.scale(image, _SIDE // max(image.size), Image.Resampling.NEAREST)
        return image
