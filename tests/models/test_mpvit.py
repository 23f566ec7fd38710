"""MPViT: the attention number by number, shared encodings, initial values, the classifier's place."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from models import mpvit

SMALL = dict(embed_dims=(16, 24, 32), num_paths=(2, 1, 3), depths=(1, 2, 1), num_heads=(8, 8, 8), mlp_ratios=(2, 2, 2), num_classes=5)


def test_layers_of_a_path_share_their_encodings():
    state = mpvit.MPViT(**SMALL).state_dict()
    path = "mhca_stages.1.mhca_blks.0."
    for first, others in (("cpe.proj.bias", ["MHCA_layers.{}.cpe.proj.bias"]),
                          ("crpe.conv_list.2.weight", ["MHCA_layers.{}.crpe.conv_list.2.weight",
                                                       "MHCA_layers.{}.factoratt_crpe.crpe.conv_list.2.weight"])):
        for other in others:
            for layer in (0, 1):
                assert state[path + other.format(layer)].data_ptr() == state[path + first].data_ptr()
    paths = [state[f"mhca_stages.2.mhca_blks.{i}.cpe.proj.bias"].data_ptr() for i in range(3)]
    assert len(set(paths)) == 3


@torch.no_grad()
def test_initial_values():
    torch.manual_seed(0)
    model = timm.create_model("mpvit_tiny")
    encoder = model.mhca_stages[2].mhca_blks[1]
    attention = encoder.MHCA_layers[3].factoratt_crpe
    assert attention.qkv.weight.std() == pytest.approx(0.02, rel=0.03) and not attention.qkv.bias.any()
    assert model.cls_head["cls"].weight.std() == pytest.approx(0.02, rel=0.03) and not model.cls_head["cls"].bias.any()
    local = model.mhca_stages[2].InvRes
    # Depthwise ones are not divided by their groups.
    assert local.dwconv.weight.std() == pytest.approx((2 / (9 * 176)) ** 0.5, rel=0.1)
    assert local.conv1.conv.weight.std() == pytest.approx((2 / 176) ** 0.5, rel=0.03)
    assert model.stem[1].conv.weight.std() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.03)
    # torch's default of a depthwise convolution: uniform within 1/k.
    for conv, kernel in ((encoder.cpe.proj, 3), *zip(encoder.crpe.conv_list, (3, 5, 7), strict=True)):
        assert conv.kernel_size == (kernel, kernel)
        assert conv.weight.std() == pytest.approx(1 / kernel / 3 ** 0.5, rel=0.1) and conv.bias.abs().max() <= 1 / kernel
    norms = [m for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.BatchNorm2d))]
    assert all(m.weight.eq(1).all() and not m.bias.any() for m in norms)
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


@torch.no_grad()
def test_attention_pixel_by_pixel():
    torch.manual_seed(1)
    dim, heads, height, width = 16, 8, 3, 5
    attn = mpvit.FactorizedAttention(dim, heads, mpvit.RelativePositionEncoding(dim // heads, ((3, 2), (5, 3), (7, 3)))).double()
    x = torch.randn(height, width, dim, dtype=torch.float64)
    q, k, v = attn.qkv(x).view(height, width, 3, heads, dim // heads).unbind(2)
    kernels = [3] * 2 + [5] * 3 + [7] * 3
    firsts = [0, 0, 2, 2, 2, 5, 5, 5]  # first head of each head's convolution
    convs = [attn.crpe.conv_list[{3: 0, 5: 1, 7: 2}[kernel]] for kernel in kernels]
    out = torch.zeros(height, width, heads, dim // heads, dtype=torch.float64)
    for h in range(heads):
        weights = k[:, :, h].flatten(0, 1).softmax(0)
        context = weights.T @ v[:, :, h].flatten(0, 1)
        for i in range(height):
            for j in range(width):
                near = torch.zeros(dim // heads, dtype=torch.float64)
                for c in range(dim // heads):
                    channel, half = (h - firsts[h]) * (dim // heads) + c, kernels[h] // 2
                    near[c] = convs[h].bias[channel]
                    for a in range(max(0, i - half), min(height, i + half + 1)):
                        for b in range(max(0, j - half), min(width, j + half + 1)):
                            near[c] += convs[h].weight[channel, 0, a - i + half, b - j + half] * v[a, b, h, c]
                out[i, j, h] = (dim // heads) ** -0.5 * (q[i, j, h] @ context) + q[i, j, h] * near
    assert torch.allclose(attn(x[None])[0], attn.proj(out.flatten(2)), rtol=1e-10)


@torch.no_grad()
def test_the_classifier_keeps_its_place() -> None:
    model = mpvit.MPViT(**SMALL)
    model.reset_classifier(7, "avg")
    assert model.get_classifier() is model.cls_head["cls"]
    assert [name for name in model.state_dict() if "head" in name] == ["cls_head.cls.weight", "cls_head.cls.bias"]
    model.prune_intermediate_layers([1])
    model.reset_classifier(3, "avg")
    assert model(torch.randn(2, 3, 64, 96)).shape == (2, 3)
