"""Triton kernels of the dynamic position bias: its MLP for all offsets in one launch forward and one back. Called by
``models.fused_position_bias``.

A program takes ROWS offsets through all layers, in fp32; what backward needs is computed again.

Shapes: M = (2G-1)^2 offsets, d width of the MLP, h heads, of which the tiles have WIDTH and HEADS, powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

WIDTH, HEADS = tl.constexpr(64), tl.constexpr(32)  # one size for all stages: each would be compiled by itself
ROWS = tl.constexpr(16)  # of more, ptxas takes long and spills registers
PRECISION = tl.constexpr("ieee")
EPSILON = tl.constexpr(1e-5)
_SIZES = ["size", "group", "dim", "heads"]


@triton.jit
def _first(weight, bias, group, dim):
    """The first linear, of the program's offsets, (ROWS, WIDTH)."""
    row, i, side = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH), 2 * group - 1
    y, x = (row // side - group + 1).to(tl.float32), (row % side - group + 1).to(tl.float32)
    for_y, for_x = tl.load(weight + 2 * i, mask=i < dim, other=0.0), tl.load(weight + 2 * i + 1, mask=i < dim, other=0.0)
    return y[:, None] * for_y[None, :] + x[:, None] * for_x[None, :] + tl.load(bias + i, mask=i < dim, other=0.0)[None, :], y, x


@triton.jit
def _hidden(x, scale, shift, dim):
    """Layer norm and ReLU of (ROWS, WIDTH); with it, the normalised input and what it was divided by."""
    i = tl.arange(0, WIDTH)
    centred = tl.where(i[None, :] < dim, x - (tl.sum(x, axis=1) / dim)[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / dim + EPSILON)
    normal = centred * inverse[:, None]
    scale, shift = tl.load(scale + i, mask=i < dim, other=0.0), tl.load(shift + i, mask=i < dim, other=0.0)
    return tl.maximum(normal * scale[None, :] + shift[None, :], 0.0), normal, inverse


@triton.jit
def _layer(x, scale, shift, weight, bias, dim, out, OUT: tl.constexpr):
    """Norm, ReLU, linear: (ROWS, WIDTH) -> (ROWS, OUT), of which ``out`` columns count."""
    i, o = tl.arange(0, WIDTH), tl.arange(0, OUT)
    transposed = tl.load(weight + o[None, :] * dim + i[:, None], mask=(i[:, None] < dim) & (o[None, :] < out), other=0.0)
    y = _hidden(x, scale, shift, dim)[0]
    return tl.dot(y, transposed, input_precision=PRECISION) + tl.load(bias + o, mask=o < out, other=0.0)[None, :]


@triton.jit
def _layer_backward(grad, x, scale, shift, weight, part, dim, out, OUT: tl.constexpr):
    """The gradient of ``_layer``'s input; those of its weights are written to ``part``, in the order of its arguments."""
    i, o = tl.arange(0, WIDTH), tl.arange(0, OUT)
    y, normal, inverse = _hidden(x, scale, shift, dim)
    at, inside = o[:, None] * dim + i[None, :], (o[:, None] < out) & (i[None, :] < dim)
    tl.store(part + 2 * dim + at, tl.dot(tl.trans(grad), y, input_precision=PRECISION), mask=inside)
    tl.store(part + 2 * dim + out * dim + o, tl.sum(grad, axis=0), mask=o < out)
    to_y = tl.dot(grad, tl.load(weight + at, mask=inside, other=0.0), input_precision=PRECISION)
    to_y = tl.where(y > 0.0, to_y, 0.0)
    tl.store(part + i, tl.sum(to_y * normal, axis=0), mask=i < dim)
    tl.store(part + dim + i, tl.sum(to_y, axis=0), mask=i < dim)
    to_normal = to_y * tl.load(scale + i, mask=i < dim, other=0.0)[None, :]
    centred = to_normal - (tl.sum(to_normal, axis=1) / dim)[:, None] - normal * (tl.sum(to_normal * normal, axis=1) / dim)[:, None]
    return tl.where(i[None, :] < dim, centred * inverse[:, None], 0.0)


@triton.jit(do_not_specialize=_SIZES[1:])
def forward(weight, bias, scale1, shift1, weight1, bias1, scale2, shift2, weight2, bias2, scale3, shift3, weight3, bias3, table,
            group, dim, heads, RESIDUAL: tl.constexpr):
    """The biases of all offsets, (M, h)."""
    x, _, _ = _first(weight, bias, group, dim)
    y = _layer(x, scale1, shift1, weight1, bias1, dim, dim, WIDTH)
    x = x + y if RESIDUAL else y
    y = _layer(x, scale2, shift2, weight2, bias2, dim, dim, WIDTH)
    x = x + y if RESIDUAL else y
    y = _layer(x, scale3, shift3, weight3, bias3, dim, heads, HEADS)
    row, o, side = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, HEADS), 2 * group - 1
    tl.store(table + row[:, None] * heads + o[None, :], y, mask=(row[:, None] < side * side) & (o[None, :] < heads))


@triton.jit(do_not_specialize=_SIZES)
def backward(grad, weight, bias, scale1, shift1, weight1, bias1, scale2, shift2, weight2, bias2, scale3, shift3, weight3, bias3, parts,
             size, group, dim, heads, RESIDUAL: tl.constexpr):
    """The gradients of the weights one behind the other, in parts to be summed, (programs, size)."""
    x0, y, x = _first(weight, bias, group, dim)
    x1 = _layer(x0, scale1, shift1, weight1, bias1, dim, dim, WIDTH)
    x1 = x0 + x1 if RESIDUAL else x1
    x2 = _layer(x1, scale2, shift2, weight2, bias2, dim, dim, WIDTH)
    x2 = x1 + x2 if RESIDUAL else x2
    row, i, o, side = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, HEADS), 2 * group - 1
    inside = (row[:, None] < side * side) & (o[None, :] < heads)
    to_table = tl.load(grad + row[:, None] * heads + o[None, :], mask=inside, other=0.0)
    part, layer = parts + tl.program_id(0) * size, dim * dim + 3 * dim
    to_x2 = _layer_backward(to_table, x2, scale3, shift3, weight3, part + 3 * dim + 2 * layer, dim, heads, HEADS)
    to_x1 = _layer_backward(to_x2, x1, scale2, shift2, weight2, part + 3 * dim + layer, dim, dim, WIDTH)
    to_x1 = to_x1 + to_x2 if RESIDUAL else to_x1
    to_x0 = _layer_backward(to_x1, x0, scale1, shift1, weight1, part + 3 * dim, dim, dim, WIDTH)
    to_x0 = to_x0 + to_x1 if RESIDUAL else to_x0
    tl.store(part + 2 * i, tl.sum(to_x0 * y[:, None], axis=0), mask=i < dim)
    tl.store(part + 2 * i + 1, tl.sum(to_x0 * x[:, None], axis=0), mask=i < dim)
    tl.store(part + 2 * dim + i, tl.sum(to_x0, axis=0), mask=i < dim)
