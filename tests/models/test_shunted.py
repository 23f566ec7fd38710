"""Shunted Transformer: the attention number by number, initial values."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from models import shunted


@torch.no_grad()
def test_initial_values():
    torch.manual_seed(0)
    model = timm.create_model("shunted_t")
    block = model.block3[1]
    assert block.attn.q.weight.std() == pytest.approx(0.02, rel=0.05) and not block.attn.q.bias.any()
    assert block.mlp.dwconv.dwconv.weight.std() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    assert block.attn.sr1.weight.std() == pytest.approx((2 / (4 * 256)) ** 0.5, rel=0.05) and not block.attn.sr1.bias.any()
    assert model.patch_embed1.conv[0].weight.std() == pytest.approx((2 / (49 * 64)) ** 0.5, rel=0.05)
    assert model.head.weight.std() == pytest.approx(0.02, rel=0.05) and not model.head.bias.any()
    model.reset_classifier(7)
    assert not model.head.bias.any()
    assert (block.norm1.eps, model.norm4.eps, block.attn.norm1.eps, model.patch_embed2.norm.eps) == (1e-6, 1e-6, 1e-5, 1e-5)


def slow_depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A depthwise 3x3 convolution with zero padding, pixel by pixel; (H, W, C) -> the same."""
    height, width, _ = x.shape
    out = conv.bias.repeat(height, width, 1)
    for i in range(height):
        for j in range(width):
            for a in range(3):
                for b in range(3):
                    if 0 <= i + a - 1 < height and 0 <= j + b - 1 < width:
                        out[i, j] += x[i + a - 1, j + b - 1] * conv.weight[:, 0, a, b]
    return out


def slow_heads(q: Tensor, k: Tensor, v: Tensor, width: int) -> Tensor:
    """Attention of (N, C) over (M, C), head by head and query by query."""
    out = torch.zeros_like(q)
    for start in range(0, q.shape[1], width):
        part = slice(start, start + width)
        for n in range(len(q)):
            weights = torch.stack([q[n, part] @ key[part] for key in k]) * width ** -0.5
            out[n, part] = weights.softmax(0) @ v[:, part]
    return out


def slow_shunted(attn: shunted.ShuntedAttention, x: Tensor) -> Tensor:
    """What ``ShuntedAttention`` computes for one sample (H, W, C); leftover rows and columns are not merged."""
    height, width, dim = x.shape
    q = (x.flatten(0, 1) @ attn.q.weight.T + attn.q.bias).chunk(2, dim=1)
    outputs = []
    for half, (merge, norm, kv, local) in enumerate([(attn.sr1, attn.norm1, attn.kv1, attn.local_conv1),
                                                     (attn.sr2, attn.norm2, attn.kv2, attn.local_conv2)]):
        rate = merge.stride[0]
        rows = []
        for i in range(0, height - rate + 1, rate):
            for j in range(0, width - rate + 1, rate):
                patch = x[i:i + rate, j:j + rate].permute(2, 0, 1).flatten()
                rows.append(merge.weight.flatten(1) @ patch + merge.bias)
        merged = norm(torch.stack(rows))
        merged = merged * 0.5 * (1 + torch.erf(merged / 2 ** 0.5))
        k, v = (merged @ kv.weight.T + kv.bias).chunk(2, dim=1)
        v = v.view(height // rate, width // rate, dim // 2)
        v = (v + slow_depthwise(local, v)).flatten(0, 1)
        outputs.append(slow_heads(q[half], k, v, dim // attn.num_heads))
    return (torch.cat(outputs, dim=1) @ attn.proj.weight.T + attn.proj.bias).view(height, width, dim)


def slow_plain(attn: shunted.PlainAttention, x: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    k, v = (flat @ attn.kv.weight.T + attn.kv.bias).chunk(2, dim=1)
    out = slow_heads(flat @ attn.q.weight.T + attn.q.bias, k, v, x.shape[2] // attn.num_heads)
    out = out + slow_depthwise(attn.local_conv, v.view(x.shape)).flatten(0, 1)
    return (out @ attn.proj.weight.T + attn.proj.bias).view(x.shape)


@pytest.mark.parametrize("rate", [4, 2, 1])
@torch.no_grad()
def test_attention_on_a_non_square_map(rate):
    torch.manual_seed(1)
    attn, slow = (shunted.ShuntedAttention(8, 4, rate), slow_shunted) if rate > 1 else (shunted.PlainAttention(8, 4), slow_plain)
    attn.double()
    for p in attn.parameters():
        p.copy_(torch.randn_like(p) * 0.5)
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)  # no multiple of the rates
    assert torch.allclose(attn(x), torch.stack([slow(attn, sample) for sample in x]), rtol=1e-9)
