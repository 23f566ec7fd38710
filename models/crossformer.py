"""CrossFormer and CrossFormer++.

Papers: "CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention" (ICLR 2022), "CrossFormer++:
A Versatile Vision Transformer Hinging on Cross-scale Attention" (TPAMI 2023).

What the model is made of: a cross-scale embedding (CEL) samples every token from patches of several sizes; long-short
distance attention (LSDA) alternates attention among neighbours (SDA) and among tokens a fixed interval apart (LDA); a
dynamic position bias (DPB), an MLP over offsets, makes the bias independent of the group size. CrossFormer++ adds
group sizes that grow with depth (PGS) and amplitude cooling layers (ACL).

Parameter names are those of the published files. Beyond the official code, which takes square sizes whose maps stay
even, any input works: the image is padded to whole tokens and a map of odd size by one row or column before merging.
Parity: tests/test_crossformer.py compares logits, features, stages and an epsilon probe with reference outputs.

Shapes: B batch, H W map, C channels, h heads, d head width, G group size, I interval, N = G*G tokens of a group.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.base import DropPath, HierarchicalModel, Mlp, add_branch, create, default_cfg, make_head, run_blocks
from models.cpu_bf16 import Linear, computed_in, convolve, sum_of_rows
from models.ops import DepthwiseConv2d, merge_patches

PADDED_KEY = -1e6  # added to the logits of padded keys


class CrossScaleEmbedding(nn.Module):
    """CEL on the image: convolutions of growing kernels at one stride, concatenated (CrossFormer, section 3.1).

    (B, 3, H, W) -> (B, H/4, W/4, C). Each kernel gets half the channels of the one before, the last as many as that one.
    """

    def __init__(self, dim: int, kernels: Sequence[int] = (4, 8, 16, 32), in_chans: int = 3, norm: bool = True):
        super().__init__()
        self.stride = kernels[0]
        self.projs = nn.ModuleList(
            nn.Conv2d(in_chans, width, kernel, stride=self.stride, padding=(kernel - self.stride) // 2)
            for kernel, width in zip(kernels, split_channels(dim, len(kernels)), strict=True))
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        pad_h, pad_w = ((self.stride - side % self.stride) % self.stride for side in x.shape[2:])
        if pad_h or pad_w:
            x = F.pad(x, (0, pad_w, 0, pad_h))
        # The gradient of a large kernel over three channels is slow; the forward pass alone gains nothing.
        sample = self.sample_blocks if self.training and self.stride % 2 == 0 else self.sample
        return self.norm(torch.cat(sample(x), dim=-1))

    def sample(self, x: Tensor) -> list[Tensor]:
        """Each kernel's tokens, (B, H/4, W/4, width)."""
        return [proj(x).permute(0, 2, 3, 1) for proj in self.projs]

    def sample_blocks(self, x: Tensor) -> list[Tensor]:
        """The same with the pixels of a 4x4 block as channels: a kernel of 4m pixels is one of m blocks at stride 1.

        A token's kernel begins half a block off the image's blocks if m is even, so the blocks do; for an odd m (the smallest
        kernel, one block) the kernel gets half a block of zeros around it.
        """
        x = x.to(computed_in(x))  # once, not in every convolution
        half = self.stride // 2
        blocks = to_blocks(F.pad(x, (half,) * 4), self.stride).permute(0, 3, 1, 2)
        tokens = []
        for proj in self.projs:
            across, rest = divmod(proj.kernel_size[0], self.stride)
            if rest:
                tokens.append(proj(x))
                continue
            kernel = proj.weight if across % 2 == 0 else F.pad(proj.weight, (half,) * 4)
            weight = to_blocks(kernel, self.stride).permute(0, 3, 1, 2)
            tokens.append(convolve(blocks, weight, proj.bias, padding=weight.shape[2] // 2 - 1))
        return [token.permute(0, 2, 3, 1) for token in tokens]


def to_blocks(x: Tensor, side: int) -> Tensor:
    """Space to depth: (B, C, H, W) -> (B, H/side, W/side, C*side*side), a block's pixels in the order channel, row, column."""
    wide = {8: torch.int64, 16: torch.complex128}.get(side * x.element_size())
    if wide is None or x.requires_grad or x.device.type == "mps" or torch.compiler.is_compiling():
        return x.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    # A block's row moved as one number: four times as fast.
    x, dtype = x.contiguous(), x.dtype
    return x.view(wide).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3).contiguous().view(dtype).flatten(3)


def split_channels(dim: int, parts: int) -> list[int]:
    """Output widths of the embedding's kernels, from the smallest kernel: D/2, D/4, ..., the last one twice."""
    widths = [dim // 2 ** (i + 1) for i in range(parts - 1)]
    return [*widths, dim - sum(widths)]


class PatchMerging(nn.Module):
    """CEL between stages: norm, then convolutions of stride 2, concatenated. (B, H, W, C) -> (B, H/2, W/2, 2C)."""

    def __init__(self, dim: int, kernels: Sequence[int] = (2, 4)):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.reductions = nn.ModuleList(
            nn.Conv2d(dim, width, kernel, stride=2, padding=(kernel - 2) // 2)
            for kernel, width in zip(kernels, split_channels(2 * dim, len(kernels)), strict=True))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        pad_h, pad_w = x.shape[1] % 2, x.shape[2] % 2
        if pad_h or pad_w:
            x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
        return torch.cat([self.merge(reduction, x) for reduction in self.reductions], dim=-1)

    @staticmethod
    def merge(conv: nn.Conv2d, x: Tensor) -> Tensor:
        if conv.kernel_size[0] == 2:
            return merge_patches(conv, x)
        return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DynamicPositionBias(nn.Module):
    """DPB: an MLP from the offset (dy, dx) to a bias per head (CrossFormer, section 3.2.2). ((2G-1)^2, 2) -> (.., h).

    ``residual`` adds skips around the two hidden layers, the paper's ablation; the published models have none.
    """

    def __init__(self, dim: int, num_heads: int, residual: bool = False):
        super().__init__()
        self.residual = residual
        self.pos_proj = nn.Linear(2, dim)
        self.pos1 = nn.Sequential(nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, dim))
        self.pos2 = nn.Sequential(nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, dim))
        self.pos3 = nn.Sequential(nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, num_heads))

    def forward(self, offsets: Tensor) -> Tensor:
        x = self.pos_proj(offsets)
        for layer in (self.pos1, self.pos2):
            x = x + layer(x) if self.residual else layer(x)
        return self.pos3(x)


class PositionTable(nn.Module):
    """Swin's relative position bias, an ablation: a learned row per offset of a group of ``group_size``."""

    def __init__(self, group_size: int, num_heads: int):
        super().__init__()
        self.group_size = group_size
        self.table = nn.Parameter(torch.empty((2 * group_size - 1) ** 2, num_heads))
        trunc_normal_(self.table, std=0.02)

    def forward(self, offsets: Tensor) -> Tensor:
        """Offsets of a group no larger than the table's; (.., h)."""
        offsets = offsets.long() + self.group_size - 1
        return self.table.index_select(0, offsets[:, 0] * (2 * self.group_size - 1) + offsets[:, 1])


POSITIONS = ("dpb", "dpb_residual", "table", "none")


def relative_offsets(group: int, device: torch.device) -> Tensor:
    """All offsets between two tokens of a group, ((2G-1)^2, 2), dy major, from -(G-1) to G-1."""
    line = torch.arange(1 - group, group, device=device, dtype=torch.float32)
    return torch.stack(torch.meshgrid(line, line, indexing="ij"), dim=-1).reshape(-1, 2)


def relative_index(group: int, device: torch.device) -> Tensor:
    """Row in ``relative_offsets`` of query position minus key position, flat (N*N,), query major."""
    line = torch.arange(group, device=device)
    place = (line[:, None] * (2 * group - 1) + line).flatten()
    return (place[:, None] + (2 * group * (group - 1) - place)).flatten()


class _TableInPairs(torch.autograd.Function):
    """A table ((2G-1)^2, h) of offsets as the bias (h, N, N) of pairs of tokens, in ``dtype``; the gradient, in the table's own type,
    as products with zeros and ones, axis by axis: with large groups twice as fast as adding row by row."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, group: int, dtype: torch.dtype) -> Tensor:
        ctx.group, ctx.dtype = group, table.dtype
        pairs = table.to(dtype).index_select(0, relative_index(group, table.device))
        return pairs.unflatten(0, (group * group, -1)).permute(2, 0, 1).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        group = ctx.group
        line, offsets = torch.arange(group, device=grad.device), torch.arange(1 - group, group, device=grad.device)
        which = ((line[:, None] - line).view(-1, 1) == offsets).to(ctx.dtype)  # (N, 2G-1)
        # (h, y, x, y', x') to (h, y - y', x - x')
        pairs = grad.to(ctx.dtype).unflatten(2, (group, group)).unflatten(1, (group, group)).transpose(2, 3)
        sums = which.t() @ (pairs.reshape(-1, group * group) @ which).unflatten(0, (len(grad), -1))
        return sums.flatten(1).t(), None, None


class Attention(nn.Module):
    """Multi-head self-attention within groups, with a position bias (``POSITIONS``). (B*groups, N, C) -> the same."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, qk_scale: float | None = None,
                 attn_drop: float = 0.0, proj_drop: float = 0.0, position: str = "dpb", group_size: int = 7):
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self._kept: tuple[Any, Tensor, Tensor] | None = None  # see kept_bias
        self.pos: nn.Module | None = None
        if position == "table":
            self.pos = PositionTable(group_size, num_heads)
        elif position != "none":
            self.pos = DynamicPositionBias(dim // 16, num_heads, residual=position == "dpb_residual")
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def train(self, mode: bool = True) -> Attention:
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__, _kept=None)  # neither copied nor pickled

    def kept_bias(self, group: int, device: torch.device) -> Tensor | None:
        """``position_bias``, computed once for as long as evaluation goes on, the weights stay and the group is the same.

        Weights are compared by identity and version, and on a CPU by value: what is written to ``.data`` leaves no trace in the
        version. (On a GPU that would be a synchronisation; there ``train()`` or ``eval()`` must come between.)
        """
        if self.pos is None or self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.position_bias(group, device)
        weights = list(self.pos.parameters())
        if any(type(w.data) is not Tensor or w.is_inference() or w.is_meta for w in weights):  # traced, or without versions
            return self.position_bias(group, device)
        key = (group, device, computed_in(weights[0]), [(w.data_ptr(), w.dtype, w._version) for w in weights])
        values = torch.cat([w.flatten() for w in weights]) if device.type == "cpu" else torch.empty(0)  # two empty ones are equal
        if self._kept is None or self._kept[0] != key or not torch.equal(self._kept[1], values):
            self._kept = (key, values, self.position_bias(group, device))
        return self._kept[2]

    def position_bias(self, group: int, device: torch.device) -> Tensor | None:
        """(h, N, N), or nothing without a position bias"""
        if self.pos is None:
            return None
        # Without autocast: of so few numbers the conversions would take most of the time.
        with contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False):
            table = self.pos(relative_offsets(group, device).to(next(self.pos.parameters()).dtype))
        if device.type == "cpu" and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            return _TableInPairs.apply(table, group, computed_in(table))
        tokens, index = group * group, relative_index(group, device).view(group * group, -1)
        if device.type == "cuda":  # its fused kernel copies a bias whose rows do not begin at multiples of 8
            index = F.pad(index, (0, (8 - tokens % 8) % 8))
        # index_select: the backward of table[index] is not repeatable on two threads.
        bias = table.index_select(0, index.flatten()).unflatten(0, index.shape)
        # Contiguous: CUDA's fused kernels take no bias whose keys do not lie side by side. Converted while whole, it stays aligned, and
        # what is kept is not converted again.
        return bias.permute(2, 0, 1).contiguous().to(computed_in(bias))[..., :tokens]

    def forward(self, x: Tensor, group: int, mask: Tensor | None = None) -> Tensor:
        """``mask``: (groups, 1, 1, N), added to the logits of the keys."""
        batch, tokens, _ = x.shape
        bias = self.kept_bias(group, x.device)
        if mask is not None:
            bias = mask.expand(-1, self.num_heads, tokens, -1) if bias is None else bias + mask
            bias = bias.repeat(batch // mask.shape[0], 1, 1, 1)
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1)
        return self.proj_drop(self.proj(attend(qkv, bias, self.scale, self.attn_drop)))


def attend(qkv: Tensor, bias: Tensor | None, scale: float, drop: nn.Dropout) -> Tensor:
    """softmax(scale q k^T + bias) v for (B, N, 3, h, d), by the form that is fastest where the tensors are; (B, N, h*d).

    ``bias``: (h, N, N), (B, h, N, N) or none.
    """
    if bias is not None:
        # In fp16 the padding's -1e6 would be -inf, and a group of nothing but padding NaN.
        bias = (bias.clamp(min=-3e4) if qkv.dtype == torch.float16 else bias).to(qkv.dtype)
    rate = drop.p if drop.training else 0.0
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    few = qkv.shape[1] < FEW_TOKENS and qkv.dtype == torch.bfloat16
    if qkv.device.type == "cpu" and torch.is_grad_enabled() and qkv.dtype == torch.bfloat16 and not (traced or rate):
        return _AttentionInBf16.apply(qkv, bias, scale)
    # Taken apart along its own axis, the gradient is put together in one copy.
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    if qkv.is_cuda:
        y = fused(q, k, v, bias, scale, rate)
    elif torch.is_grad_enabled() or traced or few:
        # On a CPU the fused kernel is slower than this once the bias needs a gradient.
        logits = q @ k.transpose(-2, -1)
        logits = logits * scale if bias is None else torch.add(bias, logits, alpha=scale)
        y = drop(softmax(logits)) @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias if bias is None or bias.ndim == 4 else bias[None], scale=scale)
    return y.transpose(1, 2).flatten(2)


def fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, rate: float) -> Tensor:
    """CUDA's kernels. Of those that take a bias, cuDNN's has given wrong results and is left out (pytorch issues 191612, 196678)."""
    if bias is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=rate, scale=scale)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias if bias.ndim == 4 else bias[None], dropout_p=rate, scale=scale)


FEW_TOKENS = 32  # below, torch's bf16 softmax and its gradient on a CPU go number by number


def softmax(logits: Tensor) -> Tensor:
    """Over the last axis, in fp32 where torch's bf16 form is slower (1.2 to 2.3 times up to 49 tokens, 0.6 times at 196)."""
    if logits.dtype == torch.bfloat16 and logits.shape[-1] < 4 * FEW_TOKENS and not torch.compiler.is_compiling():
        return logits.float().softmax(dim=-1).to(logits.dtype)
    return logits.softmax(dim=-1)


class _AttentionInBf16(torch.autograd.Function):
    """``attend`` on a CPU, in training. Its own gradient saves a pass over the logits for the scale, which goes into the products,
    three copies of q, k and v, and the softmax's gradient in bf16, which for few tokens takes 6 times as long as in fp32."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        batch, tokens, _, heads, dim = qkv.shape
        qkv = qkv.permute(2, 0, 3, 1, 4).contiguous()
        q, k, v = qkv.flatten(1, 2)
        logits = qkv.new_empty(batch, heads, tokens, tokens)
        if bias is not None:
            logits.copy_(bias)
        logits.view(-1, tokens, tokens).baddbmm_(q, k.transpose(1, 2), beta=float(bias is not None), alpha=scale)
        weights = softmax(logits)
        ctx.save_for_backward(qkv, weights)
        ctx.scale, ctx.bias_ndim = scale, 0 if bias is None else bias.ndim
        y = weights.flatten(0, 1) @ v
        return y.view(batch, heads, tokens, dim).transpose(1, 2).flatten(2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        qkv, weights = ctx.saved_tensors
        _, batch, heads, tokens, _ = qkv.shape
        grad = grad.unflatten(2, (heads, -1)).transpose(1, 2).flatten(0, 1)
        (q, k, v), flat = qkv.flatten(1, 2), weights.flatten(0, 1)
        to_qkv = torch.empty_like(qkv)
        to_q, to_k, to_v = to_qkv.flatten(1, 2)
        torch.bmm(flat.transpose(1, 2), grad, out=to_v)
        to_logits = _softmax_gradient(grad @ v.transpose(1, 2), flat)
        nothing = grad.new_zeros(1, 1, 1)
        torch.baddbmm(nothing, to_logits, k, beta=0, alpha=ctx.scale, out=to_q)
        torch.baddbmm(nothing, to_logits.transpose(1, 2), q, beta=0, alpha=ctx.scale, out=to_k)
        to_bias = to_logits.view_as(weights) if ctx.bias_ndim and ctx.needs_input_grad[1] else None
        if to_bias is not None and ctx.bias_ndim == 3:
            to_bias = sum_of_rows(to_bias.flatten(1)).view(heads, tokens, tokens)
        return to_qkv.permute(1, 3, 0, 2, 4).contiguous(), to_bias, None


def _softmax_gradient(grad: Tensor, weights: Tensor) -> Tensor:
    """Of the logits, given that of the weights."""
    if weights.shape[-1] >= FEW_TOKENS:
        return torch.ops.aten._softmax_backward_data(grad, weights, -1, weights.dtype)
    return torch.ops.aten._softmax_backward_data(grad.float(), weights.float(), -1, torch.float32).to(weights.dtype)


class Block(nn.Module):
    """LSDA block: attention in groups, MLP, and in CrossFormer++ possibly an ACL. (B, H, W, C) -> the same.

    ``interval`` 1 is SDA, groups of neighbours; above 1 LDA, members that far apart. A map no larger than the group in
    one direction is one SDA group of that size.
    """

    def __init__(self, dim: int, num_heads: int, group_size: int, interval: int = 1, mlp_ratio: float = 4.0,
                 qkv_bias: bool = True, qk_scale: float | None = None, drop: float = 0.0, attn_drop: float = 0.0,
                 drop_path: float = 0.0, acl: bool = False, mask_padding: bool = True, position: str = "dpb"):
        super().__init__()
        self.group_size, self.interval, self.mask_padding = group_size, interval, mask_padding
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop, position, group_size)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        # Amplitude cooling (CrossFormer++, section 3.4): it replaces the residual stream, there is no skip around it.
        self.ex_conv = DepthwiseConv2d(dim) if acl else None
        self.ex_ln = nn.LayerNorm(dim) if acl else None

    def forward(self, x: Tensor) -> Tensor:
        x = add_branch(x, self.attend_groups(self.norm1(x)), self.drop_path)
        x = add_branch(x, self.mlp(self.norm2(x)), self.drop_path)
        if self.ex_conv is not None:
            x = self.ex_ln(self.ex_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return x

    def attend_groups(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        group, interval = self.group_size, self.interval
        if min(height, width) <= group:
            group, interval = min(height, width), 1
        span = group * interval
        pad_h, pad_w = (span - height % span) % span, (span - width % span) % span
        mask = None
        if pad_h or pad_w:
            # Zeros after the norm: the keys and values of padding are the projection's biases.
            x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
            if self.mask_padding:
                real = torch.zeros(1, height, width, 1, device=x.device)
                mask = F.pad(real, (0, 0, 0, pad_w, 0, pad_h), value=PADDED_KEY)
                mask = to_groups(mask, group, interval).view(-1, 1, 1, group * group)
        groups = self.attn(to_groups(x, group, interval), group, mask)
        x = from_groups(groups, batch, height + pad_h, width + pad_w, group, interval)
        return x[:, :height, :width] if pad_h or pad_w else x


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


class Stage(nn.Module):
    """Blocks, and the merging that leads to the next stage."""

    def __init__(self, blocks: Sequence[Block], downsample: PatchMerging | None):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        if downsample is not None:
            self.downsample = downsample


GROUP_TYPES = ("constant", "linear", "linear_div", "alter", "7_14")


def group_size_of(rule: str, nominal: int, block: int, total: int, stage: int, index: int, base: int, size: int) -> int:
    """Group size of a block under CrossFormer++'s rules for PGS (section 3.3).

    Args:
        rule: one of ``GROUP_TYPES``; constant is what the published models use.
        nominal: the stage's own group size.
        block, total: number of the block in the network, and of all blocks.
        stage, index: stage, and number of the block in it.
        base, size: side of the first stage's map, and of this stage's.
    """
    if rule == "constant":
        return nominal
    if rule == "7_14":
        return nominal // 2 if stage == 2 and index < 4 else nominal
    share = 4 / base + block * (1 - 4 / base) / total
    wanted = share * size
    if rule == "linear":
        return max(4, math.ceil(wanted))
    group = math.ceil(wanted)
    if wanted > size // 2:
        whole = (wanted > 3 * size / 4 or stage != 2) if rule == "linear_div" else (block % 2 == 1 or stage != 2)
        group = size if whole else size // 2
    return max(4, group)


class CrossFormer(HierarchicalModel):
    """CrossFormer / CrossFormer++ classifier and backbone.

    Args:
        img_size: side(s) in pixels that the group-size rules other than ``constant`` are laid out for; the model takes
            any size.
        group_size, interval: per stage. An odd block of a stage is LDA with that interval, an even one SDA.
        use_acl: amplitude cooling after blocks i with (i + 1) % 3 == 0, but for a stage's last block.
        mask_padding: keep attention from padded keys.
        attention: ``lsda`` alternates SDA and LDA; ``sda`` and ``lda`` use one of them alone (the paper's ablation).
        position: ``dpb``, ``dpb_residual``, ``table`` (Swin's relative bias) or ``none``.
        ape: a learned absolute position embedding of ``img_size`` on the tokens, resized for other sizes. With
            ``position="none"`` it is the paper's ablation with absolute positions.
        drop_path_rate: rate of the last block; it grows linearly over all blocks.
    """

    def __init__(self, img_size: int | tuple[int, int] = 224, in_chans: int = 3, num_classes: int = 1000,
                 global_pool: str = "avg", embed_dim: int = 64, depths: Sequence[int] = (1, 1, 8, 6),
                 num_heads: Sequence[int] = (2, 4, 8, 16), group_size: Sequence[int] = (7, 7, 7, 7),
                 interval: Sequence[int] = (8, 4, 2, 1), patch_size: Sequence[int] = (4, 8, 16, 32),
                 merge_size: Sequence[Sequence[int]] = ((2, 4), (2, 4), (2, 4)),
                 mlp_ratio: float | Sequence[float] = 4.0, qkv_bias: bool = True, qk_scale: float | None = None,
                 patch_norm: bool = True, group_type: str = "constant", use_acl: bool = False, mask_padding: bool = True,
                 attention: str = "lsda", position: str = "dpb", ape: bool = False, drop_rate: float = 0.0, attn_drop_rate: float = 0.0,
                 drop_path_rate: float = 0.1):
        super().__init__()
        stages = len(depths)
        for name, value in (("num_heads", num_heads), ("group_size", group_size), ("interval", interval)):
            if len(value) != stages:
                raise ValueError(f"{name} has {len(value)} entries for {stages} stages (depths {list(depths)})")
        if len(merge_size) < stages - 1:
            raise ValueError(f"merge_size has {len(merge_size)} entries; {stages} stages need {stages - 1}")
        for name, value, choices in (("group_type", group_type, GROUP_TYPES), ("position", position, POSITIONS),
                                     ("attention", attention, ("lsda", "sda", "lda"))):
            if value not in choices:
                raise ValueError(f"{name} is {value!r}; choose from {', '.join(choices)}")
        widths = [embed_dim * 2 ** i for i in range(stages)]
        for width, heads in zip(widths, num_heads, strict=True):
            if width % heads or width < 16:
                raise ValueError(f"a stage of width {width} (from embed_dim {embed_dim}) cannot have {heads} heads; "
                                 "the width must be a multiple of the heads and at least 16")
        ratios = [float(mlp_ratio)] * stages if isinstance(mlp_ratio, (int, float)) else list(mlp_ratio)
        stride = patch_size[0]
        self.init_protocol(num_classes, in_chans, global_pool, 0.0, widths, [stride * 2 ** i for i in range(stages)],
                           [f"layers.{i}" for i in range(stages)])
        self.patch_embed = CrossScaleEmbedding(embed_dim, patch_size, in_chans, patch_norm)
        self.absolute_pos_embed = None
        if ape:
            height, width = img_size if isinstance(img_size, (tuple, list)) else (img_size, img_size)
            self.absolute_pos_embed = nn.Parameter(torch.empty(1, -(-height // stride), -(-width // stride), embed_dim))
            trunc_normal_(self.absolute_pos_embed, std=0.02)
        self.pos_drop = nn.Dropout(drop_rate)
        side = min(img_size) if isinstance(img_size, (tuple, list)) else img_size
        base = max(1, side // stride)
        rates = calculate_drop_path_rates(drop_path_rate, sum(depths))
        self.layers = nn.ModuleList()
        block = 0
        for s, depth in enumerate(depths):
            blocks = []
            for i in range(depth):
                group = group_size_of(group_type, group_size[s], block, sum(depths), s, i, base, max(1, base // 2 ** s))
                far = attention == "lda" or (attention == "lsda" and i % 2 == 1)
                blocks.append(Block(
                    widths[s], num_heads[s], group, interval[s] if far else 1, ratios[s], qkv_bias, qk_scale, drop_rate,
                    attn_drop_rate, rates[block], use_acl and (i + 1) % 3 == 0 and i < depth - 1, mask_padding, position))
                block += 1
            self.layers.append(Stage(blocks, PatchMerging(widths[s], merge_size[s]) if s < stages - 1 else None))
        self.norm = nn.LayerNorm(widths[-1])
        self.head = make_head(widths[-1], num_classes)
        self.apply(init_weights)

    def stage_modules(self) -> nn.ModuleList:
        return self.layers

    def drop_after_stage(self, index: int) -> None:
        if hasattr(self.layers[index], "downsample"):
            del self.layers[index].downsample

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        tables = {name for name, _ in self.named_parameters() if name.endswith("attn.pos.table")}
        return tables | ({"absolute_pos_embed"} if self.absolute_pos_embed is not None else set())

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(
            stem=r"^patch_embed|^absolute_pos_embed",
            blocks=r"^layers\.(\d+)" if coarse else [
                (r"^layers\.(\d+)\.downsample", (0,)), (r"^layers\.(\d+)\.\w+\.(\d+)", None), (r"^norm", (99999,))])

    def forward_stages(self, x: Tensor, last: int) -> list[Tensor]:
        """(B, 3, H, W) -> outputs of stages 0..last, (B, H/4, W/4, C) first, each before its merging."""
        x = self.patch_embed(x)
        if self.absolute_pos_embed is not None:
            x = x + self.absolute_positions(x.shape[1], x.shape[2])
        x = self.pos_drop(x)
        outputs: list[Tensor] = []
        for index, stage in enumerate(self.layers[:last + 1]):
            if index:
                x = self.layers[index - 1].downsample(x)
            x = run_blocks(stage.blocks, x, unit=self.recomputed)
            outputs.append(x)
        return outputs


    def absolute_positions(self, height: int, width: int) -> Tensor:
        """The absolute embedding for a map of that size, (1, H, W, C)."""
        embed = self.absolute_pos_embed
        if embed.shape[1:3] == (height, width):
            return embed
        return F.interpolate(embed.permute(0, 3, 1, 2), (height, width), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)


def init_weights(module: nn.Module) -> None:
    """Linears normal(0, 0.02), biases 0; norms 1 and 0; convolutions keep torch's default."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Leave out the derived buffers that the repository's older branch saved in every block."""
    derived = (".attn.biases", ".attn.relative_position_index")
    return {name: tensor for name, tensor in state.items() if not name.endswith(derived)}


_V1 = dict(group_size=(7, 7, 7, 7), interval=(8, 4, 2, 1))
_PP = dict(group_size=(4, 4, 14, 7), interval=(4, 2, 1, 1), use_acl=True)

VARIANTS: dict[str, dict[str, Any]] = {
    "crossformer_tiny": dict(_V1, embed_dim=64, depths=(1, 1, 8, 6), num_heads=(2, 4, 8, 16), drop_path_rate=0.1),
    "crossformer_small": dict(_V1, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.2),
    "crossformer_base": dict(_V1, embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.3),
    "crossformer_large": dict(_V1, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.5),
    "crossformer_pp_small": dict(_PP, embed_dim=64, depths=(2, 2, 18, 2), num_heads=(2, 4, 8, 16), drop_path_rate=0.2),
    "crossformer_pp_base": dict(_PP, embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.3),
    "crossformer_pp_large": dict(_PP, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.5),
    "crossformer_pp_huge": dict(_PP, embed_dim=128, depths=(6, 6, 18, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.5),
}

# The family's config node: its keys and the arguments they set; keys that take one value only; what a label must give.
NODE_KEYS = {"EMBED_DIM": "embed_dim", "DEPTHS": "depths", "NUM_HEADS": "num_heads", "GROUP_SIZE": "group_size",
             "INTERVAL": "interval", "PATCH_SIZE": "patch_size", "MERGE_SIZE": "merge_size", "MLP_RATIO": "mlp_ratio",
             "IN_CHANS": "in_chans", "QKV_BIAS": "qkv_bias", "QK_SCALE": "qk_scale", "PATCH_NORM": "patch_norm",
             "GROUP_TYPE": "group_type", "USE_ACL": "use_acl", "NO_MASK": "no_mask",
             "ATTENTION": "attention", "POSITION": "position", "APE": "ape"}
ONLY = {"USE_CPE": False, "PAD_TYPE": 0, "ADAPT_INTER": False}
REQUIRED = ("EMBED_DIM", "DEPTHS", "NUM_HEADS")


def arguments(kwargs: dict[str, Any], img_size: tuple[int, int]) -> dict[str, Any]:
    """The model's arguments for a config node's numbers."""
    kwargs = dict(kwargs, img_size=img_size)
    if isinstance(kwargs.get("patch_size"), int):
        kwargs["patch_size"] = (kwargs["patch_size"],)
    if "no_mask" in kwargs:
        kwargs["mask_padding"] = not kwargs.pop("no_mask")
    return kwargs


def build(name: str, kwargs: dict[str, Any], img_size: tuple[int, int]) -> CrossFormer:
    """The model of a variant's or a config node's numbers, laid out for images of ``img_size`` (height, width)."""
    kwargs = arguments(kwargs, img_size)
    if name in VARIANTS:
        return timm.create_model(name, **kwargs)
    return create(CrossFormer, name, False, kwargs, checkpoint_filter_fn, pretrained_cfg=default_cfg())


default_cfgs = generate_default_cfgs({
    name: default_cfg(first_conv=tuple(f"patch_embed.projs.{i}" for i in range(4))) for name in VARIANTS})


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    return create(CrossFormer, variant, pretrained, VARIANTS[variant], checkpoint_filter_fn, **kwargs)


@register_model
def crossformer_tiny(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer-T: 27.8 M parameters, 2.9 GMACs at 224."""
    return _create("crossformer_tiny", pretrained, **kwargs)


@register_model
def crossformer_small(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer-S: 30.7 M parameters, 4.9 GMACs at 224."""
    return _create("crossformer_small", pretrained, **kwargs)


@register_model
def crossformer_base(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer-B: 52.0 M parameters, 9.2 GMACs at 224."""
    return _create("crossformer_base", pretrained, **kwargs)


@register_model
def crossformer_large(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer-L: 92.0 M parameters, 16.1 GMACs at 224."""
    return _create("crossformer_large", pretrained, **kwargs)


@register_model
def crossformer_pp_small(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer++-S: 23.3 M parameters, 4.4 GMACs at 224."""
    return _create("crossformer_pp_small", pretrained, **kwargs)


@register_model
def crossformer_pp_base(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer++-B: 52.0 M parameters, 9.6 GMACs at 224."""
    return _create("crossformer_pp_base", pretrained, **kwargs)


@register_model
def crossformer_pp_large(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer++-L: 92.0 M parameters, 16.7 GMACs at 224."""
    return _create("crossformer_pp_large", pretrained, **kwargs)


@register_model
def crossformer_pp_huge(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer++-H: 96.0 M parameters, 22.0 GMACs at 224."""
    return _create("crossformer_pp_huge", pretrained, **kwargs)
