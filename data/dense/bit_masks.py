"""Masks of eight pixels a byte: (n, H, ceil(W / 8)) uint8, the leftmost pixel in the lowest bit, zeros beyond the width.

What has no values between pixels is not resized, cropped and flipped step by step: rows and columns of the original are chosen, once.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def nearest(length: int, wanted: int) -> Tensor:
    """(wanted,) int64: of ``length`` pixels in a row that below the centre of each of ``wanted``."""
    return ((2 * torch.arange(wanted) + 1) * length).div(2 * wanted, rounding_mode="floor")


def chosen(masks: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Packed rows and columns of masks (n, H, W) of 0 and 1, quickest where these lie column by column in memory."""
    by_column, packed = masks.transpose(1, 2), masks.new_zeros(len(masks), -(-len(columns) // 8), masks.shape[1])
    for bit in range(8):
        these = columns[bit::8]
        packed[:, :len(these)] |= by_column.index_select(1, these) << bit
    return packed.transpose(1, 2).contiguous().index_select(1, rows)


def packed(masks: Tensor) -> Tensor:
    """Of masks (n, H, W) of 0 and 1, or bool."""
    return torch.from_numpy(np.packbits(masks.numpy(), axis=-1, bitorder="little"))


def unpacked(bits: Tensor, width: int) -> Tensor:
    """(n, H, width) bool."""
    if bits.device.type == "cpu":  # ten times as fast
        return torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1, count=width, bitorder="little").view(np.bool_))
    single = 1 << torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (bits[..., None] & single).ne(0).flatten(-2)[..., :width]


def fitted(bits: Tensor, height: int, width: int) -> Tensor:
    """Cut to a size, or filled up with zeros."""
    found = bits.new_zeros(len(bits), height, -(-width // 8))
    rows, number = min(height, bits.shape[1]), min(found.shape[2], bits.shape[2])
    found[:, :rows, :number] = bits[:, :rows, :number]
    if width % 8:
        found[..., -1] &= (1 << width % 8) - 1
    return found


def boxes_around(bits: Tensor) -> Tensor:
    """(n, 4) float32: x0, y0, x1, y1, the edges of what is set; zeros for a mask without."""
    array = bits.numpy()
    rows = array.any(axis=2)
    columns = np.unpackbits(np.bitwise_or.reduce(array, axis=1), axis=-1, bitorder="little")
    boxes = np.zeros((len(array), 4), dtype=np.float32)
    for first, used in enumerate((columns, rows)):
        if used.size:
            boxes[:, first] = used.argmax(axis=1)
            boxes[:, first + 2] = np.where(used.any(axis=1), used.shape[1] - used[:, ::-1].argmax(axis=1), 0)
    return torch.from_numpy(boxes)
