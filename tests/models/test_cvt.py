"""CvT: the attention number by number, initial values."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from models import cvt


@torch.no_grad()
def test_initial_values():
    torch.manual_seed(0)
    model = timm.create_model("cvt_13")
    attention = model.stage2.blocks[3].attn
    assert attention.proj_q.weight.std() == pytest.approx(0.02, rel=0.05) and not attention.proj_q.bias.any()
    assert model.stage2.cls_token.std() == pytest.approx(0.02, rel=0.2)
    # torch's default of a convolution of 9 inputs: uniform within 1/3.
    assert attention.conv_proj_k.conv.weight.std() == pytest.approx(1 / 3 / 3 ** 0.5, rel=0.05)
    assert model.head.weight.std() == pytest.approx(0.02, rel=0.05)
    for width in (10, 20):  # the classifier's bias alone keeps torch's default, also in a fresh one
        bound = 384 ** -0.5
        assert model.head.bias.std() == pytest.approx(bound / 3 ** 0.5, rel=0.4) and model.head.bias.abs().max() <= bound
        model.reset_classifier(width)
        assert model.head.bias.shape == (width,)


def slow_attention(attn: cvt.Attention, x: Tensor, size: tuple[int, int]) -> Tensor:
    """What ``Attention`` computes for one sample (N, C), pixel by pixel and pair by pair."""
    (height, width), dim, heads = size, x.shape[1], attn.num_heads
    token, pixels = (x[:1], x[1:]) if attn.class_token else (x[:0], x)
    pixels = pixels.view(height, width, dim)

    def project(branch: nn.Sequential, linear: nn.Linear) -> Tensor:
        stride, rows = branch.conv.stride[0], []
        for i in range(0, height, stride):
            for j in range(0, width, stride):
                total = torch.zeros(dim, dtype=x.dtype)
                for a in range(3):
                    for b in range(3):
                        if 0 <= i + a - 1 < height and 0 <= j + b - 1 < width:
                            total += pixels[i + a - 1, j + b - 1] * branch.conv.weight[:, 0, a, b]
                rows.append((total - branch.bn.running_mean) / (branch.bn.running_var + branch.bn.eps).sqrt()
                            * branch.bn.weight + branch.bn.bias)
        return torch.cat([token, torch.stack(rows)]) @ linear.weight.T + linear.bias

    q = project(attn.conv_proj_q, attn.proj_q)
    k = project(attn.conv_proj_k, attn.proj_k)
    v = project(attn.conv_proj_v, attn.proj_v)
    width = dim // heads
    out = torch.zeros_like(q)
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        for n in range(len(q)):
            weights = torch.stack([q[n, part] @ key[part] for key in k]) * dim ** -0.5
            out[n, part] = weights.softmax(0) @ v[:, part]
    return out @ attn.proj.weight.T + attn.proj.bias


@pytest.mark.parametrize("class_token", [False, True])
@torch.no_grad()
def test_attention_on_a_non_square_map_of_odd_sides(class_token):
    torch.manual_seed(1)
    attn = cvt.Attention(8, 2, class_token=class_token).double().eval()
    for p in [*attn.parameters(), *(b for n, b in attn.named_buffers() if "running" in n)]:
        p.copy_(torch.rand_like(p) + 0.1)
    x = torch.randn(2, 15 + class_token, 8, dtype=torch.float64)
    expected = torch.stack([slow_attention(attn, sample, (3, 5)) for sample in x])
    assert torch.allclose(attn(x, (3, 5)), expected, rtol=1e-10)
