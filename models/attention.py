"""Softmax attention in the form that is fastest on the device and in the precision at hand, the result being the same.

Shapes: B batch, N queries, M keys, h heads, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.cpu_bf16 import sum_rows

FEW_TOKENS = 32  # below, torch's bf16 softmax and its gradient on a CPU go number by number
MANY_KEYS = 512  # from here on the fused attention is no slower in any form, and holds no N*M logits
# CUDA's grids take no more in their second and third dimension. Beyond, flash attention fails to launch; torch 2.14's memory-efficient
# kernel splits the batch by itself, but then fails at the gradient of a bias and with dropout.
MAX_CUDA_BATCH = 65_535


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, drop: nn.Dropout) -> Tensor:
    """softmax(scale q k^T) v without a bias, for queries (B, h, N, d) and keys, values (B, h, M, d); (B, h, N, d).

    The fused form wins everywhere but in bf16 training on a CPU, where its backward takes 3 to 8 times as long as products.
    """
    if q.device.type != "cpu" or q.dtype == torch.float32 or k.shape[2] >= MANY_KEYS or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, dropout_p=drop.p if drop.training else 0.0, scale=scale)
    # The scale goes to the keys, which reduced maps make fewer than the queries.
    return drop((q @ (k * scale).transpose(-2, -1)).softmax(dim=-1)) @ v


def biased_self_attention(qkv: Tensor, bias: Tensor | None, scale: float, drop: nn.Dropout) -> Tensor:
    """softmax(scale q k^T + bias) v for queries, keys and values side by side, (B, N, 3, h, d); (B, N, h*d).

    Args:
        bias: (h, N, N), (B, h, N, N) or none.
    """
    if bias is not None:
        # In fp16 the padding's -1e6 would be -inf, and a group of nothing but padding NaN.
        bias = (bias.clamp(min=-3e4) if qkv.dtype == torch.float16 else bias).to(qkv.dtype)
    rate = drop.p if drop.training else 0.0
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    few = qkv.shape[1] < FEW_TOKENS and qkv.dtype == torch.bfloat16
    if qkv.device.type == "cpu" and torch.is_grad_enabled() and qkv.dtype == torch.bfloat16 and not (traced or rate):
        return _BiasedSelfAttentionInBf16.apply(qkv, bias, scale)
    # Taken apart along its own axis, the gradient is put together in one copy.
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    if qkv.is_cuda:
        y = cuda_attention(q, k, v, bias, scale, rate)
    elif torch.is_grad_enabled() or traced or few:
        # On a CPU the fused kernel is slower than this once the bias needs a gradient.
        logits = q @ k.transpose(-2, -1)
        logits = logits * scale if bias is None else torch.add(bias, logits, alpha=scale)
        y = drop(softmax(logits)) @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias if bias is None or bias.ndim == 4 else bias[None], scale=scale)
    return y.transpose(1, 2).flatten(2)


def cuda_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, rate: float) -> Tensor:
    """By CUDA's fused kernels, (B, h, N, d) each, in parts of at most ``MAX_CUDA_BATCH``. cuDNN's with a bias has given wrong results and
    is left out (pytorch issues 191612, 196678).

    Args:
        bias: (h, N, N), (B, h, N, N) or none.
        rate: dropout of the attention's weights.
    """
    parts = -(-len(q) // MAX_CUDA_BATCH)
    if parts > 1:
        biases = bias.chunk(parts) if bias is not None and bias.ndim == 4 else [bias] * parts
        whole = zip(q.chunk(parts), k.chunk(parts), v.chunk(parts), biases, strict=True)
        return torch.cat([cuda_attention(*part, scale, rate) for part in whole])
    if bias is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=rate, scale=scale)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias if bias.ndim == 4 else bias[None], dropout_p=rate, scale=scale)


def softmax(logits: Tensor) -> Tensor:
    """Over the last axis, in fp32 where torch's bf16 form is slower (1.2 to 2.3 times up to 49 tokens, 0.6 times at 196)."""
    if logits.dtype == torch.bfloat16 and logits.shape[-1] < 4 * FEW_TOKENS and not torch.compiler.is_compiling():
        return logits.float().softmax(dim=-1).to(logits.dtype)
    return logits.softmax(dim=-1)


class _BiasedSelfAttentionInBf16(torch.autograd.Function):
    """``biased_self_attention`` on a CPU, in training. Its own gradient saves a pass over the logits for the scale, which goes into
    the products, three copies of q, k and v, and the softmax's gradient in bf16, which for few tokens takes 6 times as long as in
    fp32."""

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
            to_bias = sum_rows(to_bias.flatten(1)).view(heads, tokens, tokens)
        return to_qkv.permute(1, 3, 0, 2, 4).contiguous(), to_bias, None


def _softmax_gradient(grad: Tensor, weights: Tensor) -> Tensor:
    """The gradient of the logits from that of the weights, (B*h, N, N)."""
    if weights.shape[-1] >= FEW_TOKENS:
        return torch.ops.aten._softmax_backward_data(grad, weights, -1, weights.dtype)
    return torch.ops.aten._softmax_backward_data(grad.float(), weights.float(), -1, torch.float32).to(weights.dtype)
