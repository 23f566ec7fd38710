"""Factorised attention with convolutional relative position encoding (CoaT, ICCV 2021), and its form for a GPU.

What MPViT attends by: softmax over the tokens of the keys, then two products of the size of a head. No N x N matrix arises, so there is no
fused kernel to prefer.

Shapes: B batch, N tokens = H*W, C channels, h heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import cuda_depthwise
from models.cpu_bf16 import Linear
from models.ops import DepthwiseConv2d


class RelativePositionEncoding(nn.Module):
    """CRPE's part on the values: depthwise convolutions, a kernel for each group of heads. (B, H, W, C) -> the same."""

    def __init__(self, head_dim: int, windows: Sequence[Sequence[int]]):
        super().__init__()
        self.head_dim = head_dim
        self.kernels, self.widths = [kernel for kernel, _ in windows], [heads * head_dim for _, heads in windows]
        self.conv_list = nn.ModuleList(
            DepthwiseConv2d(width, kernel)
            for (kernel, _), width in zip(windows, self.widths, strict=True))
        self._constants: dict[Any, tuple[Tensor, Tensor]] = {}  # see joined

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__, _constants={})  # neither copied nor pickled

    def forward(self, v: Tensor) -> Tensor:
        parts = v.permute(0, 3, 1, 2).split(self.widths, dim=1)
        return torch.cat([conv(part) for conv, part in zip(self.conv_list, parts, strict=True)], dim=1).permute(0, 2, 3, 1)

    def joined(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All as one convolution, kernels filled up with zeros to the widest: what ``attention_on_cuda`` takes beside the queries, keys
        and values."""
        weight = torch.cat([F.pad(conv.weight, ((max(self.kernels) - kernel) // 2,) * 4)
                            for conv, kernel in zip(self.conv_list, self.kernels, strict=True)])
        key = device, torch.promote_types(weight.dtype, torch.float32)
        if torch.compiler.is_compiling():
            constants = self._make_constants(*key)
        elif (constants := self._constants.get(key)) is None:
            with torch.inference_mode(False):  # training may follow, and save them for its gradients
                constants = self._make_constants(*key)
            # What is captured has no values before the graph's first run.
            if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
                self._constants[key] = constants
        return weight, torch.cat([conv.bias for conv in self.conv_list]), *constants

    def _make_constants(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        reaches = [kernel // 2 for kernel, width in zip(self.kernels, self.widths, strict=True) for _ in range(width)]
        mask = head_mask(len(reaches), len(reaches) // self.head_dim, self.head_dim ** -0.5, device, dtype)
        return torch.tensor(reaches, dtype=torch.int32).to(device), mask


class FactorizedAttention(nn.Module):
    """Factorised attention with CRPE (CoaT). (B, H, W, C) -> the same."""

    def __init__(self, dim: int, num_heads: int, crpe: RelativePositionEncoding, qkv_bias: bool = True, proj_drop: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.crpe = crpe

    def forward(self, x: Tensor, joined: tuple[Tensor, ...] | None = None) -> Tensor:
        """``joined``: of ``RelativePositionEncoding``, for the form for a GPU."""
        qkv = self.qkv(x)
        if joined is not None:
            return self.proj_drop(self.proj(attention_on_cuda(qkv, *joined)))
        q, k, v = qkv.chunk(3, dim=-1)
        y = factorized_attention(q, k, v, self.num_heads, self.scale)
        # The relative term is not scaled.
        return self.proj_drop(self.proj(y + q * self.crpe(v)))


def factorized_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> Tensor:
    """scale q (softmax(k)^T v) in each head for (B, H, W, C), the softmax over the tokens, the queries as they are."""
    shape = q.shape
    # The softmax before the heads part: side by side in memory lie more numbers then.
    weights = k.flatten(1, 2).softmax(dim=1).to(v.dtype)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q.flatten(1, 2), weights, v.flatten(1, 2)))
    return (q @ ((k.transpose(-2, -1) @ v) * scale)).transpose(1, 2).reshape(shape)


def attention_on_cuda(qkv: Tensor, weight: Tensor, bias: Tensor, reaches: Tensor, mask: Tensor) -> Tensor:
    """``factorized_attention`` of queries, keys and values side by side plus q times the encoding of v, (B, H, W, 3C) -> (B, H, W, C).

    By heads it is products of d x d results, d being 8 to 36 in MPViT and 27 in most layers, a width whose rows begin at odd addresses, and
    so cuBLAS has no kernel for tensor cores; and copies that sort the heads. Here one product of all channels by all channels is followed
    by zeros outside the heads: h times the multiplications, an eighth of what the layer's linears have, and no copy. Softmax in 16 bits
    (torch's adds up in fp32) reads and writes half as much, and its gradient needs no pass over the tokens: the sum that it subtracts,
    of weights times their gradients, is that of the d x d results times theirs.

    Args:
        weight, bias: the encoding's depthwise convolution, (C, 1, K, K) and (C,).
        reaches: as of ``models.cuda_depthwise.depthwise``.
        mask: ``head_mask``.
    """
    if not torch.compiler.is_compiling():
        return _FactorizedAttention.apply(qkv, weight, bias, reaches, mask)
    q, k, v = qkv.chunk(3, dim=3)
    encoding = cuda_depthwise.depthwise(v, weight, bias, reaches=reaches)
    context = (k.flatten(1, 2).softmax(dim=1).to(v.dtype).transpose(1, 2) @ v.flatten(1, 2)) * mask
    return q * encoding + (q.flatten(1, 2) @ context.to(q.dtype)).view_as(encoding)


class _FactorizedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, weight: Tensor, bias: Tensor, reaches: Tensor, mask: Tensor) -> Tensor:
        qkv, taps = qkv.contiguous(), cuda_depthwise.taps_of(weight)
        q, k, v = qkv.flatten(1, 2).chunk(3, dim=2)
        with torch.autocast(qkv.device.type, enabled=False):
            weights = k.softmax(dim=1)
            context = (weights.transpose(1, 2) @ v).mul_(mask)
            encoding = cuda_depthwise.convolve(qkv.chunk(3, dim=3)[2], taps, bias, None, reaches=reaches).flatten(1, 2)
            y = (q * encoding).baddbmm_(q, context)
        ctx.save_for_backward(qkv, weights, context, encoding, taps, reaches, mask)
        ctx.weight = weight.dtype
        return y.unflatten(1, qkv.shape[1:3])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, weights, context, encoding, taps, reaches, mask = ctx.saved_tensors
        to_qkv, grad = torch.empty_like(qkv), grad.flatten(1, 2)
        q, k, v = qkv.flatten(1, 2).chunk(3, dim=2)
        to_q, to_k, to_v = to_qkv.flatten(1, 2).chunk(3, dim=2)
        torch.mul(grad, encoding, out=to_q).baddbmm_(grad, context.transpose(1, 2))

        to_context = q.transpose(1, 2) @ grad
        subtracted = (to_context * context).sum(dim=2, dtype=taps.dtype).to(k.dtype)
        to_context.mul_(mask)
        to_weights = torch.baddbmm(subtracted[:, None], v, to_context.transpose(1, 2), beta=-1)
        torch.mul(weights, to_weights, out=to_k)

        torch.bmm(weights, to_context, out=to_v)
        to_encoding, maps, to_maps = (grad * q).view_as(qkv[..., :grad.shape[2]]), qkv.chunk(3, dim=3)[2], to_qkv.chunk(3, dim=3)[2]
        torch.ops.crossformer.depthwise(to_maps, to_encoding, taps, None, to_maps, reaches, 1, True)
        to_weight, to_bias = cuda_depthwise.weight_gradient(maps, to_encoding, len(taps), 1, True, reaches, ctx.weight)
        return to_qkv, to_weight, to_bias, None, None


def head_mask(channels: int, heads: int, scale: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(C, C): the scale where two channels belong to one head, else 0."""
    head = torch.arange(channels, device=device) // (channels // heads)
    return (head[:, None] == head).to(dtype) * scale
