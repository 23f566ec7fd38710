"""PVT: the attention number by number, position tables, the class token, initial values."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import pvt
from models.attention import attention
from models.safe_load import CheckpointError
from models.weights import load_pretrained_file

SMALL = dict(embed_dims=(8, 16, 32), depths=(1, 2, 1), num_heads=(1, 2, 4), mlp_ratios=(2, 2, 2), sr_ratios=(4, 2, 1))


@torch.no_grad()
def test_initial_values():
    torch.manual_seed(0)
    model = timm.create_model("pvt_tiny")
    attention = model.block2[1].attn
    for x in (attention.kv.weight, model.head.weight, model.pos_embed3, model.cls_token):
        assert x.std() == pytest.approx(0.02, rel=0.1)
    assert not any(m.bias.any() for m in model.modules() if isinstance(m, nn.Linear))
    # torch's default of a convolution: uniform within 1/sqrt(inputs), here 128 channels of 4x4.
    assert attention.sr.weight.std() == pytest.approx((128 * 16) ** -0.5 / 3 ** 0.5, rel=0.03) and attention.sr.bias.any()
    eps = {name: m.eps for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    assert all(e == (1e-5 if "patch_embed" in name or "attn" in name else 1e-6) for name, e in eps.items())


def line_weights(old: int, new: int) -> Tensor:
    """Bilinear resizing of one axis as a matrix (new, old): half-pixel centres, the border repeated."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        at = min(max((i + 0.5) * old / new - 0.5, 0), old - 1)
        low, share = int(at), at - int(at)
        matrix[i, low] += 1 - share
        matrix[i, min(low + 1, old - 1)] += share
    return matrix


def test_tables_are_resized_bilinearly_and_the_class_row_kept():
    table = torch.randn(1, 1 + 4 * 6, 3)
    resized = pvt.resize_table(table, (4, 6), (7, 5), prefix=1)
    grid = torch.einsum("ia,jb,abc->ijc", line_weights(4, 7), line_weights(6, 5), table[0, 1:].double().view(4, 6, 3))
    assert torch.equal(resized[:, 0], table[:, 0])
    assert torch.allclose(resized[0, 1:].double(), grid.reshape(35, 3), atol=1e-6)
    assert pvt.resize_table(table, (4, 6), (4, 6), prefix=1) is table


@torch.no_grad()
def test_a_file_of_another_size_gives_what_the_model_does_inside(tmp_path: Path) -> None:
    x, donor = torch.randn(2, 3, 96, 128), timm.create_model("pvt_tiny", **dict(SMALL, img_size=64)).eval()
    torch.save({"model": donor.state_dict(), "epoch": 299}, tmp_path / "pvt.pth")
    model = timm.create_model("pvt_tiny", **dict(SMALL, img_size=(96, 128))).eval()
    report = load_pretrained_file(model, tmp_path / "pvt.pth", pvt.checkpoint_filter_fn)
    assert report.adapted == ["pos_embed1", "pos_embed2", "pos_embed3"] and not report.replaced
    assert model.pos_embed1.shape == (1, 24 * 32, 8) and model.pos_embed3.shape == (1, 1 + 6 * 8, 32)
    assert torch.allclose(model(x), donor(x), atol=1e-6)
    torch.save(dict(donor.state_dict(), pos_embed1=torch.zeros(1, 250, 8)), tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match="pos_embed1"):
        load_pretrained_file(model, tmp_path / "odd.pth", pvt.checkpoint_filter_fn)


@torch.no_grad()
def test_attention_token_by_token():
    torch.manual_seed(1)
    attn, grid = pvt.Attention(8, 2, 2).double(), (5, 7)  # the last row and column are in no whole 2x2
    x = torch.randn(1, 35, 8, dtype=torch.float64)
    pixels, rows = x.view(5, 7, 8), []
    for i in range(2):
        for j in range(3):
            patch = pixels[2 * i:2 * i + 2, 2 * j:2 * j + 2]
            y = torch.einsum("abc,ocab->o", patch, attn.sr.weight) + attn.sr.bias
            y = (y - y.mean()) / (y.var(correction=0) + 1e-5).sqrt() * attn.norm.weight + attn.norm.bias
            rows.append(attn.kv(y))
    k, v = torch.stack(rows).split(8, dim=1)
    q, out = attn.q(x[0]), torch.zeros(35, 8, dtype=torch.float64)
    for part in (slice(0, 4), slice(4, 8)):
        out[:, part] = (q[:, part] @ k[:, part].T / 2).softmax(-1) @ v[:, part]  # sqrt of a head's 4
    assert torch.allclose(attn(x, grid)[0], attn.proj(out), rtol=1e-10)
    q, k, v = torch.randn(3, 2, 2, 6, 4, dtype=torch.float64)
    fused = F.scaled_dot_product_attention(q, k, v, scale=0.3)  # what runs on a GPU
    assert torch.allclose(attention(q, k, v, 0.3, nn.Dropout(0.0)), fused, rtol=1e-10)


@torch.no_grad()
def test_the_class_token_is_the_last_stages() -> None:
    model, x = pvt.PyramidVisionTransformer(**SMALL, img_size=64).eval(), torch.randn(2, 3, 64, 96)
    (_, token), = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True, return_prefix_tokens=True)
    assert torch.allclose(token, model.forward_features(x)[:, :1], atol=1e-6)
    model.prune_intermediate_layers([1])
    model.reset_classifier(3, "avg")
    assert model(x).shape == (2, 3) and "cls_token" not in model.state_dict()


def test_tables_are_made_for_the_image() -> None:
    assert pvt.build("my_pvt", SMALL, (64, 96)).pos_embed1.shape[1] == 16 * 24
    assert pvt.build("pvt_tiny", dict(pvt.VARIANTS["pvt_tiny"], num_classes=4), (64, 64)).grids[3] == (2, 2)
