"""JPEGs decoded by a GPU: NVIDIA's nvJPEG, as torchvision has it. Its pixels differ from those of libjpeg by some levels where colour is
stored at half the size, since it interpolates colour in another way."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from config import ConfigError
from data.decoding import jpeg


def decode(files: Sequence[Tensor], device: torch.device) -> list[Tensor | None]:
    """The pixels (3, H, W) uint8 of each file, whose bytes are (n,) uint8 on the host; None for one that is not decoded.

    Waits until they are there. On a CPU it is libjpeg that decodes.
    """
    try:
        return list(_decode(files, device))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # torchvision decodes all of them or none
        return [None] if len(files) == 1 else [found for file in files for found in decode([file], device)]


def require(device: torch.device) -> None:
    """Make sure that JPEGs can be decoded on ``device``.

    Raises:
        ConfigError: it is no CUDA device, or torchvision lacks nvJPEG.
    """
    if device.type != "cuda":
        raise ConfigError(f"DATA.DECODER nvjpeg decodes on a CUDA GPU, and this is {device.type}; set it to auto")
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    try:
        _decode([torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)], device)
    except (ImportError, RuntimeError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise ConfigError(f"DATA.DECODER is nvjpeg, which torchvision does not have here ({reason}); set it to auto") from None


def _decode(files: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    if jpeg.decode_jpeg is None:
        raise ImportError("it decodes no JPEGs")
    return jpeg.decode_jpeg(list(files), jpeg.ImageReadMode.RGB, device)
