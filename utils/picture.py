"""Drawing with Pillow: text that fits its place, images out of tensors, PNG files."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from config import ConfigError
from utils.files import require_place, write_atomically

PAPER, INK, FAINT, LINE = (250, 250, 248), (28, 30, 33), (110, 114, 120), (205, 207, 210)


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, ``size`` pixels high."""
    return ImageFont.load_default(size)


def cut(text: str, width: float, face: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """``text``, or as much of its beginning as fits ``width`` pixels with an ellipsis."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    if face.getlength(text) <= width:
        return text
    fits, too_long = 0, len(text)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        fits, too_long = (middle, too_long) if face.getlength(text[:middle] + "...") <= width else (fits, middle)
    return text[:fits].rstrip() + "..."


def canvas(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty sheet and what draws on it."""
    image = Image.new("RGB", (width, height), PAPER)
    return image, ImageDraw.Draw(image)


def to_image(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """A normalised image (3, H, W) as it would look before the normalisation; what lies outside of 0 to 255 is clipped."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    levels = (pixels.detach().float().cpu() * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def magnification(height: int, width: int, wanted: int) -> int:
    """The whole number by which an image is enlarged so that its longer side comes to about ``wanted`` pixels, at least 1."""
    return max(1, round(wanted / max(height, width)))


def require_png(path: str, key: str) -> str:
    """``path`` with the home folder put in, when a PNG can be written there.

    Raises:
        ConfigError: it is no .png, or lies in no folder that can be written.
    """
    path = os.path.expanduser(path)
    if not path.lower().endswith(".png"):
        raise ConfigError(f"{key} is {path}; pictures are PNG, give a file that ends in .png")
    require_place(path, f"{key} is ")
    return path


def save(image: Image.Image, path: str) -> None:
    """Write a PNG, whole or not at all."""
    write_atomically(path, lambda file: image.save(file, format="PNG", optimize=True))
