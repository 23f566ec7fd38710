"""A contact sheet: thumbnails with the likeliest class and its probability, drawn by Pillow alone."""

from __future__ import annotations

import functools
import itertools
import logging
import os

from PIL import Image, ImageDraw, ImageFont, ImageOps

from data.errors import UnreadableImage
from data.given import GivenImages
from utils.files import write_atomically
from utils.inference import Trained
from utils.logger import plain
from utils.predictions import Prediction, short_name

_COLUMNS, _ROWS, _PAGES = 6, 8, 25
_SIDE, _GAP, _BAR = 200, 16, 5  # pixels: of a thumbnail's square, between tiles, of the bar of a probability
_CLASS_SIZE, _FILE_SIZE = 15, 12  # of the letters
_LABEL = _BAR + 6 + _CLASS_SIZE + 5 + _FILE_SIZE + 6
_PAPER, _MOUNT, _INK, _FAINT, _TRACK = "#ffffff", "#f1f2f4", "#1c1f23", "#6b7280", "#dfe3e8"
_SURE, _UNSURE, _WRONG = "#1f77b4", "#9db8cf", "#b3261e"

# After Pillow's own font, in this order, those that hold other scripts.
_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc",
          "DroidSansFallbackFull.ttf", "ipagp.ttf", "NanumGothic.ttf", "Arial Unicode.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc",
          "msyh.ttc", "YuGothM.ttc", "malgun.ttf", "arialuni.ttf", "segoeui.ttf")


class Sheet:
    """Pages of thumbnails, a PNG each: FILE.png, FILE-2.png, ...; pages are written as they fill, 25 at most.

    Args:
        given: the images; those on the sheet are read once more.
    """

    def __init__(self, path: str, given: GivenImages, trained: Trained, logger: logging.Logger):
        self.path, self.given, self.trained, self.logger = path, given, trained, logger
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
            self.logger.info(f"notice: the sheet shows the first {shown:,} of {len(self.given):,} images")

    def _write(self) -> None:
        columns = min(_COLUMNS, max(len(self.tiles), 1))
        rows = -(-len(self.tiles) // columns)
        across, down = _SIDE + _GAP, _SIDE + _LABEL + _GAP
        page = Image.new("RGB", (columns * across + _GAP, rows * down + _GAP), _PAPER)
        for place, tile in enumerate(self.tiles):
            page.paste(tile, (_GAP + place % columns * across, _GAP + place // columns * down))
        self.tiles, self.pages = [], self.pages + 1
        root, suffix = os.path.splitext(self.path)
        path = self.path if self.pages == 1 else f"{root}-{self.pages}{suffix}"
        write_atomically(path, lambda file: page.save(file, "PNG"))

    def _tile(self, prediction: Prediction) -> Image.Image:
        tile = Image.new("RGB", (_SIDE, _SIDE + _LABEL), _PAPER)
        draw = ImageDraw.Draw(tile)
        draw.rectangle((0, 0, _SIDE - 1, _SIDE - 1), fill=_MOUNT)
        below = _SIDE + _BAR + 6
        thumbnail = None if prediction.fault else self._thumbnail(prediction.number)
        if thumbnail is None:
            _centred(draw, "unreadable", _CLASS_SIZE, _FAINT)
            write_line(draw, (0, below), prediction.fault or "no longer readable", _CLASS_SIZE, _WRONG, _SIDE)
        else:
            tile.paste(thumbnail, ((_SIDE - thumbnail.width) // 2, (_SIDE - thumbnail.height) // 2))
            number, share = prediction.top[0]
            draw.rectangle((0, _SIDE, _SIDE - 1, _SIDE + _BAR - 1), fill=_TRACK)
            if (filled := round(share * _SIDE)) > 0:
                draw.rectangle((0, _SIDE, filled - 1, _SIDE + _BAR - 1), fill=_SURE if share >= 0.5 else _UNSURE)
            told = f"{100 * share:.0f} %"
            room = _SIDE - round(length(told, _CLASS_SIZE))
            write_line(draw, (room, below), told, _CLASS_SIZE, _INK, _SIDE)
            write_line(draw, (0, below), short_name(self.trained, number), _CLASS_SIZE, _INK, room - 8)
        name = os.path.basename(prediction.path) or prediction.path
        write_line(draw, (0, below + _CLASS_SIZE + 5), name, _FILE_SIZE, _FAINT, _SIDE)
        return tile

    def _thumbnail(self, number: int) -> Image.Image | None:
        try:
            image = self.given.load(number)
        except UnreadableImage:  # it could be a moment ago
            return None
        image.thumbnail((_SIDE, _SIDE), reducing_gap=3.0)
        if _SIDE // max(image.size) >= 2:  # small images in whole multiples, their pixels sharp
            image = ImageOps.scale(image, _SIDE // max(image.size), Image.Resampling.NEAREST)
        return image


# --------------------------------------------------------------------------------------------------
# Text in whatever fonts there are
# --------------------------------------------------------------------------------------------------

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def write_line(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, colour: str, width: int) -> None:
    """``text`` on one line, ``at`` its top left, in at most ``width`` pixels, dots in its middle for what is left out."""
    x, baseline = at[0], at[1] + size
    for font, part in _runs(fitted(drawable(plain(text)), size, width), size):
        draw.text((x, baseline), part, colour, font, anchor="ls")
        x += font.getlength(part)


def fitted(text: str, size: int, width: float) -> str:
    """``text``, or as much of its beginning and end as ``width`` pixels hold, dots between them."""
    longest = 1000
    if len(text) <= longest and length(text, size) <= width:
        return text
    low, high = 0, min(len(text), longest) - 1
    while low < high:  # the most letters that fit
        kept = (low + high + 1) // 2
        low, high = (kept, high) if length(_cut(text, kept), size) <= width else (low, kept - 1)
    return _cut(text, low)


def length(text: str, size: int) -> float:
    """Pixels that a line takes."""
    return sum(font.getlength(part) for font, part in _runs(text, size))


def drawable(text: str) -> str:
    """``text`` with letters that no font here has written out, such as ``\\u732b``."""
    fonts = _fonts(_FILE_SIZE)
    return "".join(c if any(_has(font, c) for font in fonts) else c.encode("unicode_escape").decode() for c in text)


def _cut(text: str, kept: int) -> str:
    end = kept // 3
    return text[:kept - end] + "..." + (text[len(text) - end:] if end else "")


def _centred(draw: ImageDraw.ImageDraw, text: str, size: int, colour: str) -> None:
    draw.text((_SIDE // 2, _SIDE // 2), text, colour, _fonts(size)[0], anchor="mm")


def _runs(text: str, size: int) -> list[tuple[Font, str]]:
    """The text in one font where one has all of it, else each stretch in the first font that has its letters."""
    fonts = _fonts(size)
    whole = next((font for font in fonts if all(_has(font, letter) for letter in text)), None)
    if whole is not None:
        return [(whole, text)]
    stretches = itertools.groupby(text, lambda letter: next((font for font in fonts if _has(font, letter)), fonts[0]))
    return [(font, "".join(letters)) for font, letters in stretches]


@functools.cache
def _fonts(size: int) -> list[Font]:
    found: list[Font] = [ImageFont.load_default(size)]
    for name in _FONTS:
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:
            continue
    return found


@functools.lru_cache(1 << 14)
def _has(font: Font, letter: str) -> bool:
    """Whether the letter is drawn otherwise than one that no font has."""
    if letter == " ":
        return True
    return bytes(font.getmask(letter)) not in (bytes(font.getmask("\U0010fffd")), b"")
