"""Triton kernels of attention within groups of a map's tokens, read and written where they lie. Called by ``models.gpu.group_attention``.

A program takes one head of one group, in every so manieth sample, and holds the group's N x N logits in registers. So nothing but the map
itself is read and written, no group is laid out, and the gradient of the position bias is summed up before it is written.
Tokens beyond the map are no keys and give no output. A map may be shifted up and to the left, its ends meeting, as Swin's is.

Shapes: B batch, H W map, h heads, D head width, G group size, I interval, N = G*G tokens of a group, BLOCK >= N a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

_SIZES = ["batch", "columns", "height", "width", "heads", "group", "interval", "shift"]


@triton.jit
def _tokens(columns, height, width, heads, group, interval, shift, BLOCK: tl.constexpr):
    """Where in its map each token of the program's group lies, (BLOCK, 1), whether it does, and on which side of the seam where a
    shifted map's ends meet, (BLOCK,)."""
    number = tl.program_id(0) // heads
    # Of groups in turn, tokens lie side by side.
    j, i = number % interval, number // (interval * columns) % interval
    c, r = number // interval % columns, number // (interval * columns * interval)
    t = tl.arange(0, BLOCK)
    y, x = (r * group + t // group) * interval + i, (c * group + t % group) * interval + j
    real = (t < group * group) & (y < height) & (x < width)
    below, right = (y + shift >= height).to(tl.int32), (x + shift >= width).to(tl.int32)
    y, x = y + shift - below * height, x + shift - right * width
    return (y * width + x)[:, None], real, 2 * below + right


@triton.jit
def _bias(table, side_of_seam, head, heads, group, shift, BLOCK: tl.constexpr):
    """The bias of every pair of tokens, (BLOCK, BLOCK), by the offset from key to query; across a seam Swin's -100 is added."""
    t, side = tl.arange(0, BLOCK), 2 * group - 1
    y, x = (t // group)[:, None] - (t // group)[None, :], (t % group)[:, None] - (t % group)[None, :]
    inside = t < group * group
    row = (y + group - 1) * side + x + group - 1
    bias = tl.load(table + row * heads + head, mask=inside[:, None] & inside[None, :], other=0.0).to(tl.float32)
    return bias - tl.where((side_of_seam[:, None] != side_of_seam[None, :]) & (shift > 0), 100.0, 0.0)


@triton.jit
def _weights(q, k, bias, real, scale, BIASED: tl.constexpr, PRECISION: tl.constexpr):
    """exp(logits - their greatest), (BLOCK, BLOCK) in fp32, and the sums that make them weights, (BLOCK,)."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if BIASED:
        logits += bias
    logits = tl.where(real[None, :], logits, -1e30)  # with -inf a group of nothing but padding would be NaN
    weights = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return weights, tl.sum(weights, axis=1)


@triton.jit(do_not_specialize=_SIZES)
def forward(qkv, table, out, batch, columns, height, width, heads, group, interval, shift, scale,
            DIM: tl.constexpr, BLOCK: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr):
    """(B, H, W, 3*h*D), ((2G-1)^2, h) -> (B, H, W, h*D). Grid: heads of groups of a map, then programs that share the samples."""
    head, channels = tl.program_id(0) % heads, heads * DIM
    token, real, seam = _tokens(columns, height, width, heads, group, interval, shift, BLOCK)
    at = token * channels + head * DIM + tl.arange(0, DIM)[None, :]
    q_at = at + token * (2 * channels)
    mask, map_size = real[:, None], (height * width * channels).to(tl.int64)
    bias = _bias(table, seam, head, heads, group, shift, BLOCK) if BIASED else 0.0
    for sample in range(tl.program_id(1), batch, tl.num_programs(1)):
        start = sample * map_size
        q = tl.load(qkv + 3 * start + q_at, mask=mask, other=0.0)
        k = tl.load(qkv + 3 * start + q_at + channels, mask=mask, other=0.0)
        v = tl.load(qkv + 3 * start + q_at + 2 * channels, mask=mask, other=0.0)
        weights, sums = _weights(q, k, bias, real, scale, BIASED, PRECISION)
        y = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION) / sums[:, None]
        tl.store(out + start + at, y.to(v.dtype), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def backward(grad, qkv, table, to_qkv, to_bias, batch, columns, height, width, heads, group, interval, shift, scale,
             DIM: tl.constexpr, BLOCK: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr):
    """Gradients of the projections and, in fp32 and in parts, of the bias of every pair, (groups of a map * programs, h, N, N)."""
    head, channels = tl.program_id(0) % heads, heads * DIM
    token, real, seam = _tokens(columns, height, width, heads, group, interval, shift, BLOCK)
    at = token * channels + head * DIM + tl.arange(0, DIM)[None, :]
    q_at = at + token * (2 * channels)
    mask, map_size = real[:, None], (height * width * channels).to(tl.int64)
    bias = _bias(table, seam, head, heads, group, shift, BLOCK) if BIASED else 0.0
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for sample in range(tl.program_id(1), batch, tl.num_programs(1)):
        start = sample * map_size
        q = tl.load(qkv + 3 * start + q_at, mask=mask, other=0.0)
        k = tl.load(qkv + 3 * start + q_at + channels, mask=mask, other=0.0)
        v = tl.load(qkv + 3 * start + q_at + 2 * channels, mask=mask, other=0.0)
        to_y = tl.load(grad + start + at, mask=mask, other=0.0)
        weights, sums = _weights(q, k, bias, real, scale, BIASED, PRECISION)
        weights = weights / sums[:, None]
        to_v = tl.dot(tl.trans(weights.to(v.dtype)), to_y, input_precision=PRECISION)
        tl.store(to_qkv + 3 * start + q_at + 2 * channels, to_v.to(v.dtype), mask=mask)
        to_weights = tl.dot(to_y, tl.trans(v), input_precision=PRECISION)
        to_logits = weights * (to_weights - tl.sum(weights * to_weights, axis=1)[:, None])
        if BIASED:
            total += to_logits
        to_logits = to_logits.to(v.dtype)
        to_q = tl.dot(to_logits, k, input_precision=PRECISION) * scale
        tl.store(to_qkv + 3 * start + q_at, to_q.to(v.dtype), mask=mask)
        to_k = tl.dot(tl.trans(to_logits), q, input_precision=PRECISION) * scale
        tl.store(to_qkv + 3 * start + q_at + channels, to_k.to(v.dtype), mask=mask)
    if BIASED:
        t, tokens = tl.arange(0, BLOCK), group * group
        part = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * (tokens * tokens)
        tl.store(to_bias + part + t[:, None] * tokens + t[None, :], total, mask=(t[:, None] < tokens) & (t[None, :] < tokens))
