"""Galerkin: the attention against the official code's outputs, the pyramid around it, initial values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from recipe import deterministic_state, relative_error
from torch import Tensor, nn

from models import galerkin
from models.galerkin import galerkin_attention

REFERENCE = np.load(Path(__file__).parent.parent / "reference" / "galerkin_attention.npz")


def array(name: str) -> Tensor:
    return torch.from_numpy(REFERENCE[name])


def head_norms(heads: int, dim: int) -> list[Tensor]:
    """Scale and shift of the keys' norms, then of the values', a row a head."""
    state = deterministic_state({f"norm_{tag}.{head}.{kind}": (dim,) for tag in "KV" for head in range(heads)
                                 for kind in ("weight", "bias")})
    return [torch.stack([torch.from_numpy(state[f"norm_{tag}.{head}.{kind}"]) for head in range(heads)])
            for tag in "KV" for kind in ("weight", "bias")]


@pytest.mark.parametrize(("case", "heads", "dim"), [("fn_a", 4, 8), ("fn_c", 2, 5)])
def test_function_is_the_official_one(case, heads, dim):
    q, k, v = (array(f"{case}_{name}") for name in "qkv")
    norms = head_norms(heads, dim)
    out, product = galerkin_attention(q, k, v, *norms, return_product=True)
    assert relative_error(out, array(f"{case}_out")) < 1e-5 and relative_error(product, array(f"{case}_p")) < 1e-5
    assert relative_error(galerkin_attention(q, k, v, *norms, eps=1e-7), array(f"{case}_out_eps1e-7")) < 1e-5
    assert relative_error(galerkin_attention(q, k, v), array(f"{case}_out_nonorm")) < 1e-5
    assert torch.equal(galerkin_attention(q, k, v, *(x.flatten() for x in norms)), out)


@pytest.mark.parametrize(("case", "position_dim"), [("m1", 0), ("m3", 2)])
@torch.no_grad()
def test_module_is_the_official_one(case, position_dim):
    attn = galerkin.GalerkinAttention(32, 4, out_proj=bool(position_dim), position_dim=position_dim).eval()
    shapes = {f"linears.{i}.{kind}": (32, 32)[:ndim] for i in range(3) for kind, ndim in (("weight", 2), ("bias", 1))}
    state = {name: torch.from_numpy(x) for name, x in deterministic_state(
        dict(shapes, **{"fc.weight": (32, 40), "fc.bias": (32,)})).items()}
    attn.qkv.weight.copy_(torch.cat([state[f"linears.{i}.weight"] for i in range(3)]))
    attn.qkv.bias.copy_(torch.cat([state[f"linears.{i}.bias"] for i in range(3)]))
    for parameter, x in zip((attn.norm_k.weight, attn.norm_k.bias, attn.norm_v.weight, attn.norm_v.bias), head_norms(4, 8),
                            strict=True):
        parameter.copy_(x.flatten())
    if position_dim:
        attn.proj.weight.copy_(state["fc.weight"])
        attn.proj.bias.copy_(state["fc.bias"])
        assert torch.allclose(array("m3_pos"), galerkin.unit_grid(7, 7, torch.device("cpu")))
    out = attn(array(f"{case}_x"), array(f"{case}_pos") if position_dim else None)
    assert relative_error(out, array(f"{case}_out")) < 1e-5


def test_function_number_by_number():
    """Small keys, at which eps matters, and other coordinates than a grid's."""
    torch.manual_seed(0)
    heads, tokens, dim, eps = 2, 5, 3, 1e-3
    q, k, v = torch.randn(3, 1, heads, tokens, dim, dtype=torch.float64) * 0.05
    positions = torch.rand(1, tokens, 2, dtype=torch.float64)
    kw, kb, vw, vb = torch.randn(4, heads, dim, dtype=torch.float64)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return (x - x.mean()) / (((x - x.mean()) ** 2).mean() + eps).sqrt() * weight + bias

    out = galerkin_attention(q, k, v, kw, kb, vw, vb, eps, positions)
    assert out.shape == (1, heads, tokens, dim + 2)
    for h in range(heads):
        product = torch.zeros(dim + 2, dim + 2, dtype=torch.float64)
        for n in range(tokens):
            key = torch.cat([positions[0, n], norm(k[0, h, n], kw[h], kb[h])])
            value = torch.cat([positions[0, n], norm(v[0, h, n], vw[h], vb[h])])
            product += key[:, None] * value[None, :] / tokens
        for n in range(tokens):
            assert torch.allclose(out[0, h, n], torch.cat([positions[0, n], q[0, h, n]]) @ product, rtol=1e-10)


def test_product_drops_out_in_training_only():
    attn, x = galerkin.GalerkinAttention(16, 2, attn_drop=0.5), torch.randn(1, 6, 16)
    assert not torch.equal(attn(x), attn(x))
    attn.eval()
    assert torch.equal(attn(x), attn(x))


def test_sixteen_bit_floats_do_not_overflow():
    x = torch.ones(1, 1, 200_000, 2, dtype=torch.float16)  # the plain sum over the tokens is beyond 65504
    assert torch.allclose(galerkin_attention(x, x, x).float(), torch.full((1, 1, 200_000, 2), 2.0), rtol=0.01)


@torch.no_grad()
def test_initial_values():
    torch.manual_seed(0)
    model = timm.create_model("galerkin_tiny")
    attn = model.layers[2].blocks[3].attn
    for weight in attn.qkv.weight.split(384):
        rest = weight - 0.01 * torch.eye(384)
        assert rest.abs().max() <= 0.01 * (6 / 768) ** 0.5 * 1.0001 and rest.std() == pytest.approx(0.01 * 384 ** -0.5, rel=0.03)
    assert not attn.qkv.bias.any() and attn.norm_k.weight.eq(1).all() and not attn.norm_v.bias.any()
    for linear in (model.layers[1].blocks[0].mlp.fc2, model.layers[0].downsample.reduction, model.head):
        assert linear.weight.std() == pytest.approx(0.02, rel=0.03)


@torch.no_grad()
def test_merging_is_swins():
    merging, x = galerkin.PatchMerging(3), torch.randn(1, 4, 6, 3)
    corners = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], dim=-1)
    assert torch.allclose(merging(x), merging.reduction(merging.norm(corners)))
    padded = F.pad(x[:, :3, :5], (0, 0, 0, 1, 0, 1))
    assert torch.equal(merging(x[:, :3, :5]), merging(padded))


@pytest.mark.parametrize("name", galerkin.VARIANTS)
def test_heads_of_the_variants(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert [stage.blocks[0].attn.num_heads for stage in model.layers] == list(galerkin.VARIANTS[name]["num_heads"])


def test_positions_need_an_output_projection() -> None:
    assert isinstance(galerkin.GalerkinTransformer(out_proj=True).layers[0].blocks[0].attn.proj, nn.Linear)
    with pytest.raises(ValueError, match="set out_proj"):
        galerkin.GalerkinAttention(8, 2, position_dim=2)
