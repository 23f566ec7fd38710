"""Triton kernels of ``models.gpu.linear``, imported only where they run.

A program adds up a stretch of rows, 128 columns wide, in fp32, and writes one row; torch adds up those, at most some 1,000 and always the
same ones. The programs that fit into a multiprocessor hold 40 KB and more under way; the memory's pace takes 25 KB (4.8 TB/s, 132 of
them, 0.7 us).
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: on a CPU, for tests
_COLUMNS = 128  # of a program, 256 bytes of a row
_ROWS, _GELU_ROWS = 32, 16  # of a program at a time: 16 to 32 numbers a thread
_PROGRAMS = 1056  # eight for each multiprocessor of an H200
_LEAST_STEPS = 4  # of a program: each writes sums of its own
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # of the normal distribution: 1 / sqrt(2 pi)


@triton.jit(do_not_specialize=["rows", "stretch"])
def _column_sums_kernel(x, sums, rows, columns, stride, stretch, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    first = tl.program_id(1).to(tl.int64) * stretch
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < columns)[None, :]
    count = tl.minimum(rows - first, stretch).to(tl.int32)
    x += first * stride
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        numbers = tl.load(x + row[:, None] * stride + column[None, :], mask=(row < count)[:, None] & inside, other=0.0)
        total += numbers.to(tl.float32)
    tl.store(sums + tl.program_id(1) * columns + column, tl.sum(total, 0), mask=column < columns)


@triton.jit(do_not_specialize=["rows", "stretch"])
def _gelu_backward_kernel(grad, x, to_x, sums, rows, columns, stretch, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    first = tl.program_id(1).to(tl.int64) * stretch
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < columns)[None, :]
    count = tl.minimum(rows - first, stretch).to(tl.int32)
    grad, x, to_x = grad + first * columns, x + first * columns, to_x + first * columns
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        place = row[:, None] * columns + column[None, :]
        mask = (row < count)[:, None] & inside
        numbers = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
        to_y = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
        share = 0.5 + 0.5 * tl.erf(numbers * _SQRT_HALF)
        result = to_y * (share + numbers * tl.exp(-0.5 * numbers * numbers) * _DENSITY_AT_0)
        tl.store(to_x + place, result, mask=mask)
        total += result
    tl.store(sums + tl.program_id(1) * columns + column, tl.sum(total, 0), mask=column < columns)


def column_sums(x: Tensor) -> Tensor:
    """Sums (m, C) in fp32 of stretches of rows of (n, C), whose columns lie side by side in memory."""
    return _launch(_column_sums_kernel, _ROWS, x, [x], [x.stride(0)])


def gelu_backward_sums(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of GELU's input ``x`` (n, C), given that of its output, and its sums over stretches of rows, (m, C) in fp32."""
    grad, x = grad.contiguous(), x.contiguous()
    to_x = torch.empty_like(x)
    return to_x, _launch(_gelu_backward_kernel, _GELU_ROWS, x, [grad, x, to_x], [])


def _launch(kernel: Any, tile: int, x: Tensor, tensors: list[Tensor], strides: list[int]) -> Tensor:
    rows, columns = x.shape
    across = triton.cdiv(columns, _COLUMNS)
    programs = max(1, min(_PROGRAMS // across, triton.cdiv(rows, tile * _LEAST_STEPS)))
    stretch = triton.cdiv(triton.cdiv(rows, programs), tile) * tile
    programs = triton.cdiv(rows, stretch)
    sums = x.new_empty(programs, columns, dtype=torch.float32)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        kernel[(across, programs)](*tensors, sums, rows, columns, *strides, stretch, ROWS=tile, COLUMNS=_COLUMNS, num_warps=4)
    return sums
