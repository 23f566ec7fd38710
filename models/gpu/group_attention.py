"""Self-attention within groups of a map's tokens, on a GPU without laying out a group.

``group_attention`` is an operation of two forms: on CUDA the kernels of ``models.gpu.group_attention_kernels``, elsewhere (in tests) the
formula.
Against grouping tokens, ``F.scaled_dot_product_attention`` and ungrouping them, a block saves two permuting copies of the map forward and
two backward, the copy that puts the gradients of q, k and v together, and a bias gradient as large as all logits, with its sum; a map of
any size needs neither padding nor a bias for each group.

Shapes: B batch, H W map, C channels, h heads, D head width, G group size, I interval, N = G*G tokens of a group.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from models.cpu_bf16 import compute_dtype
from models.gpu.kernels import problem_of
from models.position_bias import relative_index

MOST_TOKENS = 64  # of a group whose logits fit into registers
WIDTHS = (16, 32, 64)  # of a head
# Programs for the 132 multiprocessors of an H100 or H200, which hold four a piece forward, three back (of 64 tokens; registers are their
# limit): forward four rounds; back a single one, since each program writes a gradient of the bias.
PROGRAMS = {"forward": 4 * 4 * 132, "backward": 3 * 132}


def to_groups(x: Tensor, group: int, interval: int) -> Tensor:
    """(B, H, W, C) -> (B*groups, G*G, C). Row = r*G*I + g*I + i: tokens of equal r and i form a group, ordered by g."""
    batch, height, width, dim = x.shape
    rows, columns = height // (group * interval), width // (group * interval)
    x = x.view(batch, rows, group, interval, columns, group, interval, dim)
    return x.permute(0, 1, 4, 3, 6, 2, 5, 7).reshape(-1, group * group, dim)


def from_groups(x: Tensor, batch: int, height: int, width: int, group: int, interval: int) -> Tensor:
    """The inverse of ``to_groups``."""
    rows, columns = height // (group * interval), width // (group * interval)
    x = x.view(batch, rows, columns, interval, interval, group, group, -1)
    return x.permute(0, 1, 5, 3, 2, 6, 4, 7).reshape(batch, height, width, -1)


def group_attention(qkv: Tensor, table: Tensor | None, heads: int, group: int, interval: int, scale: float, shift: int = 0) -> Tensor:
    """softmax(scale q k^T + bias) v among the tokens of each group; tokens beyond the map are no keys. (B, H, W, 3*h*D) -> (B, H, W, h*D).

    Args:
        table: the bias of every offset from key to query, ((2G-1)^2, h), in the order of ``relative_offsets``; or none.
        shift: Swin's, of windows against the map: what the map's ends leave lies together in a window, -100 added to the logits between
            its sides. It needs a table.
    """
    return _GroupAttention.apply(qkv, table, heads, group, interval, shift, scale)


def fits(x: Tensor, heads: int, group: int, drop: nn.Dropout) -> bool:
    """Whether ``group_attention`` is the form for projections of ``x`` (B, H, W, C): half precision on a GPU where its kernels run."""
    width = x.shape[-1] // heads
    if not x.is_cuda or group * group > MOST_TOKENS or width not in WIDTHS or (drop.training and drop.p):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    dtype = compute_dtype(x)
    # A fake tensor stands for one on a machine where all is well.
    return dtype in (torch.bfloat16, torch.float16) and (isinstance(x, FakeTensor) or kernels_work(x.device, dtype, group, width))


@functools.cache
def kernels_work(device: torch.device, dtype: torch.dtype, group: int, width: int) -> bool:
    """Whether the kernels compile there and give the formula's numbers, on a small map once a process; if not, a warning says why."""
    return not problem_of("attention within groups is computed", lambda: _difference(device, dtype, group, width))


def _difference(device: torch.device, dtype: torch.dtype, group: int, width: int) -> str:
    """What differs between the kernels and the formula; nothing if all is well."""
    generator, side = torch.Generator().manual_seed(0), 2 * group - 1
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        shapes = (3, 2 * group, side, 6 * width), (3, 2 * group, side, 2 * width)
        qkv, grad = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        table, sizes = torch.randn(side * side, 2, generator=generator).to(device), (2, group, 2, 1, width ** -0.5)
        ours = [_forward_on_cuda(qkv, table, *sizes), *_backward_on_cuda(grad, qkv, table, *sizes)]
        plain = [_forward(qkv.float(), table, *sizes), *_backward(grad.float(), qkv.float(), table, *sizes)]
        for name, a, b in zip(("output", "gradient of q, k and v", "gradient of the bias"), ours, plain, strict=True):
            error = float((a.float() - b).norm() / b.norm())
            if not error < 0.02:
                return f"the {name} is off by {100 * error:.1f} %"
    return ""


class _GroupAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, table: Tensor | None, *sizes: Any) -> Tensor:
        ctx.save_for_backward(qkv, table)
        ctx.sizes = sizes
        return torch.ops.cross_scale.group_attention(qkv, table, *sizes)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, table = ctx.saved_tensors
        to_qkv, to_table = torch.ops.cross_scale.group_attention_backward(grad.contiguous(), qkv, table, *ctx.sizes)
        return to_qkv, None if table is None else to_table.to(table.dtype), *[None] * len(ctx.sizes)


# The formula


def _parts(maps: Tensor, count: int, heads: int, group: int, interval: int, shift: int) -> tuple[Tensor, ...]:
    """``count`` maps side by side in (B, H, W, count*h*D), each as (B*groups, h, N, D), with zeros beyond."""
    pad = (0, 0, 0, -maps.shape[2] % (group * interval), 0, -maps.shape[1] % (group * interval))
    maps = F.pad(maps.roll((-shift, -shift), (1, 2)), pad)
    return to_groups(maps, group, interval).unflatten(2, (count, heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def _whole(x: Tensor, like: Tensor, group: int, interval: int, shift: int) -> Tensor:
    """(B*groups, N, C) -> (B, H, W, C) as wide and high as ``like``."""
    batch, height, width, _ = like.shape
    span = group * interval
    x = from_groups(x, batch, height + -height % span, width + -width % span, group, interval)
    return x[:, :height, :width].roll((shift, shift), (1, 2)).contiguous()


def _weights(q: Tensor, k: Tensor, table: Tensor | None, like: Tensor, group: int, interval: int, shift: int, scale: float) -> Tensor:
    """(B*groups, h, N, N), for the tokens of maps as wide and high as ``like``."""
    logits = q @ k.transpose(-2, -1) * scale
    if table is not None:
        logits = logits + table.index_select(0, relative_index(group, table.device)).view(group ** 2, group ** 2, -1).permute(2, 0, 1)
    # 1 to 4 by the part of the map that a token comes from, 0 beyond it.
    below, right = (torch.arange(size, device=like.device) < shift for size in like.shape[1:3])
    part = (1 + 2 * below[:, None].to(like.dtype) + right.to(like.dtype)).expand(len(like), -1, -1)[..., None]
    part, = _parts(part, 1, 1, group, interval, shift)
    logits = logits - 100.0 * (part != part.transpose(-2, -1)) if shift else logits
    return logits.masked_fill((part == 0).transpose(-2, -1), -1e30).softmax(-1)


def _forward(qkv: Tensor, table: Tensor | None, heads: int, group: int, interval: int, shift: int, scale: float) -> Tensor:
    q, k, v = _parts(qkv, 3, heads, group, interval, shift)
    weights = _weights(q, k, table, qkv, group, interval, shift, scale)
    return _whole((weights @ v).transpose(1, 2).flatten(2), qkv, group, interval, shift)


def _backward(grad: Tensor, qkv: Tensor, table: Tensor | None, heads: int, group: int, interval: int, shift: int,
              scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = _parts(qkv, 3, heads, group, interval, shift)
    grad, = _parts(grad, 1, heads, group, interval, shift)
    weights = _weights(q, k, table, qkv, group, interval, shift, scale)
    to_weights = grad @ v.transpose(-2, -1)
    to_logits = weights * (to_weights - (weights * to_weights).sum(-1, keepdim=True))
    to_qkv = torch.stack([to_logits @ k * scale, to_logits.transpose(-2, -1) @ q * scale, weights.transpose(-2, -1) @ grad])
    to_table = _sum_by_offset(to_logits.sum(0), group) if table is not None else qkv.new_empty(0)
    return _whole(to_qkv.permute(1, 3, 0, 2, 4).flatten(2), qkv, group, interval, shift), to_table


def _sum_by_offset(to_bias: Tensor, group: int) -> Tensor:
    """(h, N, N) -> ((2G-1)^2, h), as a product with zeros and ones, which is the same in every run."""
    which = _offset_of_pairs(group, to_bias.device, to_bias.dtype)
    return torch.mm(which, to_bias.flatten(1).t(), out=to_bias.new_empty(len(which), len(to_bias)))  # with ``out`` autocast stays away


@functools.cache  # never let go: a recorded step (COMPILE graphs) reads it where it lies
def _offset_of_pairs(group: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """1 where a pair of tokens has an offset, ((2G-1)^2, N*N)."""
    with torch.inference_mode(False):
        return F.one_hot(relative_index(group, device), (2 * group - 1) ** 2).t().to(dtype).contiguous()


# The kernels


def _launch(kernel: str, inputs: tuple[Tensor, ...], table: Tensor | None, results: tuple[Tensor, ...], qkv: Tensor, heads: int,
            group: int, interval: int, shift: int, scale: float) -> None:
    from models.gpu import group_attention_kernels  # only where there is a GPU: Triton takes a second to import

    batch, height, width, channels = qkv.shape
    dim, block = channels // (3 * heads), _block(group)
    options = dict(num_warps=block // 16, num_stages=2)
    if kernel == "backward" and block == 64 and dim <= 32:
        options["maxnreg"] = 168  # three programs a multiprocessor instead of two, for 132 bytes of spilled registers
    with torch.cuda.device(qkv.device if qkv.is_cuda else -1):
        getattr(group_attention_kernels, kernel)[_grid(kernel, qkv, heads, group, interval)](
            *inputs, table, *results, batch, -(-width // (group * interval)), height, width, heads, group, interval, shift, scale,
            DIM=dim, BLOCK=block, BIASED=table is not None, PRECISION="ieee", **options)


def _block(group: int) -> int:
    """Rows of a tile: the next power of two above the tokens of a group."""
    return max(16, 1 << (group * group - 1).bit_length())


def _grid(kernel: str, qkv: Tensor, heads: int, group: int, interval: int) -> tuple[int, int]:
    """Heads of groups of a map, and programs that share its samples."""
    batch, height, width, _ = qkv.shape
    span = group * interval
    groups = -(-height // span) * -(-width // span) * interval ** 2
    programs = PROGRAMS[kernel] * MOST_TOKENS // _block(group)
    return heads * groups, min(batch, max(1, programs // (heads * groups)))


def _forward_on_cuda(qkv: Tensor, table: Tensor | None, heads: int, group: int, interval: int, shift: int, scale: float) -> Tensor:
    qkv, out = qkv.contiguous(), _like_forward(qkv, table, heads, group, interval, shift, scale)
    _launch("forward", (qkv,), table, (out,), qkv, heads, group, interval, shift, scale)
    return out


def _backward_on_cuda(grad: Tensor, qkv: Tensor, table: Tensor | None, heads: int, group: int, interval: int, shift: int,
                      scale: float) -> tuple[Tensor, Tensor]:
    qkv, (first, second) = qkv.contiguous(), _grid("backward", qkv, heads, group, interval)
    parts = 0 if table is None else first // heads * second
    to_qkv, to_bias = torch.empty_like(qkv), qkv.new_empty(parts, heads, group ** 2, group ** 2, dtype=torch.float32)
    _launch("backward", (grad, qkv), table, (to_qkv, to_bias), qkv, heads, group, interval, shift, scale)
    return to_qkv, _sum_by_offset(to_bias.sum(0), group) if parts else to_bias


def _like_forward(qkv: Tensor, table: Tensor | None, heads: int, group: int, interval: int, shift: int, scale: float) -> Tensor:
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)


def _like_backward(grad: Tensor, qkv: Tensor, table: Tensor | None, heads: int, group: int, interval: int, shift: int,
                   scale: float) -> tuple[Tensor, Tensor]:
    shape = (0,) if table is None else table.shape
    return torch.empty_like(qkv), qkv.new_empty(shape, dtype=torch.float32)


_LIBRARY = torch.library.Library("cross_scale", "DEF")
for _name, _signature, _forms in (
        ("group_attention", "(Tensor qkv, Tensor? table, int heads, int group, int interval, int shift, float scale) -> Tensor",
         (_forward, _forward_on_cuda, _like_forward)),
        ("group_attention_backward",
         "(Tensor grad, Tensor qkv, Tensor? table, int heads, int group, int interval, int shift, float scale) -> (Tensor, Tensor)",
         (_backward, _backward_on_cuda, _like_backward))):
    _LIBRARY.define(_name + _signature)
    for _key, _form in zip(("CPU", "CUDA", "Meta"), _forms, strict=True):
        _LIBRARY.impl(_name, _form, _key)
