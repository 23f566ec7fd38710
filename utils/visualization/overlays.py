"""What was found in an image, drawn on it: boxes with their classes, masks, maps of classes. By Pillow and numpy alone."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from utils.visualization.drawing import fitted, length, write_line

_OPACITY = 0.45  # of a mask
_GOLDEN = 0.618033988749895  # steps of the hue that stay apart however many there are


def colour_of(number: int) -> tuple[int, int, int]:
    """A colour for a class; those of neighbouring numbers differ most."""
    hue, saturation, value = (0.58 + number * _GOLDEN) % 1.0, (0.85, 0.6, 0.95)[number % 3], (0.95, 0.85, 0.7)[number // 3 % 3]
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


def palette() -> list[int]:
    """256 colours, red, green, blue each, as Pillow's ``putpalette`` takes them; black for the value 255 of pixels without a class."""
    return [part for number in range(255) for part in colour_of(number)] + [0, 0, 0]


def draw_objects(picture: Image.Image, boxes: np.ndarray, captions: Sequence[str], numbers: Sequence[int],
                 masks: Sequence[np.ndarray] | None = None) -> Image.Image:
    """A copy of ``picture`` with objects on it, the last ones below.

    Args:
        boxes: (n, 4) x0, y0, x1, y1 in the picture's pixels.
        captions: a few words on each; those that do not fit are left out.
        numbers: of the classes, which give the colours.
        masks: (h, w) bool of each, of any size; stretched over the picture.
    """
    picture = picture.convert("RGB")
    if masks is not None:
        pixels = np.asarray(picture).astype(np.float32)
        for mask, number in reversed(list(zip(masks, numbers, strict=True))):
            covered = _stretched(mask, picture.size)
            pixels[covered] += _OPACITY * (np.array(colour_of(number), np.float32) - pixels[covered])
        picture = Image.fromarray(pixels.round().astype(np.uint8))
    draw, width, size = ImageDraw.Draw(picture), 1 + min(picture.size) // 300, max(9, min(15, min(picture.size) // 25))
    for box, caption, number in reversed(list(zip(boxes.tolist(), captions, numbers, strict=True))):
        colour = colour_of(number)
        left, top = (max(0, round(side)) for side in box[:2])
        right, bottom = max(left, min(picture.width - 1, round(box[2]))), max(top, min(picture.height - 1, round(box[3])))
        draw.rectangle((left, top, right, bottom), outline=colour, width=width)
        _write_caption(draw, picture, caption, left, top, size, colour)
    return picture


def _write_caption(draw: ImageDraw.ImageDraw, picture: Image.Image, caption: str, left: int, top: int, size: int,
                   colour: tuple[int, int, int]) -> None:
    room = picture.width - left - 4
    if not caption or room < 2 * size or picture.height < 4 * size:
        return
    text, high = fitted(caption, size, room), size + 4
    at = max(0, top - high)
    ink = (0, 0, 0) if 0.3 * colour[0] + 0.6 * colour[1] + 0.1 * colour[2] > 140 else (255, 255, 255)
    draw.rectangle((left, at, left + round(length(text, size)) + 4, at + high), fill=colour)
    write_line(draw, (left + 2, at), text, size, ink, room)


def draw_map(picture: Image.Image, classes: np.ndarray, ignored: int = 255) -> Image.Image:
    """A copy of ``picture`` with a map of classes (h, w) uint8 over it, stretched; ``ignored`` pixels stay as they are."""
    numbers = np.asarray(Image.fromarray(classes).resize(picture.size, Image.Resampling.NEAREST))
    colours = np.array(palette(), np.float32).reshape(256, 3)
    pixels = np.asarray(picture.convert("RGB")).astype(np.float32)
    known = numbers != ignored
    pixels[known] += (_OPACITY + 0.15) * (colours[numbers[known]] - pixels[known])
    return Image.fromarray(pixels.round().astype(np.uint8))


def _stretched(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if mask.shape == (size[1], size[0]):
        return mask
    return np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)).astype(bool)
