"""Drawing with Pillow: images out of tensors, PNG files, text that fits its place."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from config import ConfigError
from utils.loggers.console import plain
from utils.runtime.files import write_atomically

PAPER, INK, FAINT, LINE = (250, 250, 248), (28, 30, 33), (110, 114, 120), (205, 207, 210)


def canvas(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty sheet and what draws on it."""
    image = Image.new("RGB", (width, height), PAPER)
    return image, ImageDraw.Draw(image)


def to_image(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """A normalised image (C, H, W) as it would look before the normalisation; what lies outside of 0 to 255 is clipped.

    Of three channels or more the first three are shown, else the first as grey.
    """
    shown = 3 if len(pixels) >= 3 else 1
    pixels, (mean, std) = pixels[:shown], (torch.tensor(values[:shown])[:, None, None] for values in (mean, std))
    levels = (pixels.detach().float().cpu() * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(levels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def magnification(height: int, width: int, wanted: int) -> int:
    """The whole number by which an image is enlarged so that its longer side comes to about ``wanted`` pixels, at least 1."""
    return max(1, round(wanted / max(height, width)))


def require_png(path: str, key: str) -> str:
    """``path`` with the home folder put in.

    Raises:
        ConfigError: it is no .png.
    """
    path = os.path.expanduser(path)
    if not path.lower().endswith(".png"):
        raise ConfigError(f"{key} is {path}; pictures are PNG, give a file that ends in .png")
    return path


def save(image: Image.Image, path: str) -> None:
    """Write a PNG, whole or not at all."""
    write_atomically(path, lambda file: image.save(file, format="PNG", optimize=True))


# --------------------------------------------------------------------------------------------------
# Text in whatever fonts there are
# --------------------------------------------------------------------------------------------------

# After Pillow's own font, in this order, those that hold other scripts.
_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc",
          "DroidSansFallbackFull.ttf", "ipagp.ttf", "NanumGothic.ttf", "Arial Unicode.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc",
          "msyh.ttc", "YuGothM.ttc", "malgun.ttf", "arialuni.ttf", "segoeui.ttf")

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def write_line(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, colour: str | tuple[int, int, int],
               width: float) -> None:
    """``text`` on one line, ``at`` its top left, in at most ``width`` pixels, dots in its middle for what is left out."""
    x, baseline = at[0], at[1] + size
    for font, part in _runs(fitted(drawable(text), size, width), size):
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
    """``text`` on one line, with what is not printable, and letters that no font here has, written out, such as ``\\u732b``."""
    fonts = _fonts(12)
    return "".join(c if any(_has(font, c) for font in fonts) else c.encode("unicode_escape").decode() for c in plain(text))


def _cut(text: str, kept: int) -> str:
    end = kept // 3
    return text[:kept - end] + "..." + (text[len(text) - end:] if end else "")


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
