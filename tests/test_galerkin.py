"""Galerkin: the attention against the official code's outputs, the pyramid around it, the timm protocol, any size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models._manipulate import group_with_matcher
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from models import galerkin
from models.galerkin import galerkin_attention
from models.weights import load_pretrained_file
from tests.recipe import deterministic_state

REFERENCE = np.load(Path(__file__).parent / "reference" / "galerkin_attention.npz")
SMALL = dict(embed_dim=8, depths=(1, 2, 1), num_heads=(2, 4, 4))


def small(**kwargs) -> galerkin.GalerkinTransformer:
    torch.manual_seed(0)
    return galerkin.GalerkinTransformer(**dict(dict(SMALL, num_classes=5, drop_path_rate=0.0), **kwargs))


def array(name: str) -> Tensor:
    return torch.from_numpy(REFERENCE[name])


def head_norms(heads: int, dim: int) -> list[Tensor]:
    """Scale and shift of the keys' norms, then of the values', a row a head."""
    state = deterministic_state({f"norm_{tag}.{head}.{kind}": (dim,) for tag in "KV" for head in range(heads)
                                 for kind in ("weight", "bias")})
    return [torch.stack([torch.from_numpy(state[f"norm_{tag}.{head}.{kind}"]) for head in range(heads)])
            for tag in "KV" for kind in ("weight", "bias")]


def off(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).abs().max() / reference.abs().max())


@pytest.mark.parametrize(("case", "heads", "dim"), [("fn_a", 4, 8), ("fn_c", 2, 5)])
def test_function_is_the_official_one(case, heads, dim):
    q, k, v = (array(f"{case}_{name}") for name in "qkv")
    norms = head_norms(heads, dim)
    out, product = galerkin_attention(q, k, v, *norms, return_product=True)
    assert off(out, array(f"{case}_out")) < 1e-5 and off(product, array(f"{case}_p")) < 1e-5
    assert off(galerkin_attention(q, k, v, *norms, eps=1e-7), array(f"{case}_out_eps1e-7")) < 1e-5
    assert off(galerkin_attention(q, k, v), array(f"{case}_out_nonorm")) < 1e-5
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
    assert off(out, array(f"{case}_out")) < 1e-5


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


@pytest.mark.parametrize(("name", "parameters", "keys"), [
    ("galerkin_tiny", 26_121_736, 185), ("galerkin_small", 45_659_656, 353), ("galerkin_base", 63_405_928, 269)])
def test_names_and_counts(name, parameters, keys):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters and len(model.state_dict()) == keys
    plain, decay = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    assert all(p.ndim == 1 for p in plain["params"]) and all(p.ndim > 1 for p in decay["params"])
    kwargs = galerkin.VARIANTS[name]
    assert model.feature_info[0]["reduction"] == kwargs["patch_size"]
    assert [stage.blocks[0].attn.num_heads for stage in model.layers] == list(kwargs["num_heads"])
    assert [stage.blocks[0].attn.qkv.in_features for stage in model.layers] == [kwargs["embed_dim"] * 2 ** s for s in range(4)]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx([kwargs["drop_path_rate"] * i / (len(rates) - 1) for i in range(len(rates))])
    for module in (model.default_cfg["classifier"], model.default_cfg["first_conv"]):
        assert isinstance(model.get_submodule(module), (nn.Linear, nn.Conv2d))


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


@pytest.mark.parametrize("positions", [False, True])
@torch.no_grad()
def test_height_and_width_are_not_mixed_up(positions):
    kwargs = dict(embed_dim=8, depths=(1,), num_heads=(2,), positions=positions)
    model, turned, x = small(**kwargs).eval(), small(**kwargs).eval(), torch.randn(1, 3, 56, 104)
    state = {k: v.transpose(2, 3) if v.ndim == 4 else v for k, v in model.state_dict().items()}
    if positions:  # a head's first two numbers are the row and the column
        columns = torch.arange(12).view(2, 6)[:, [1, 0, 2, 3, 4, 5]].flatten()
        state["layers.0.blocks.0.attn.proj.weight"] = state["layers.0.blocks.0.attn.proj.weight"][:, columns]
    turned.load_state_dict(state)
    assert torch.allclose(model(x), turned(x.transpose(2, 3)), atol=1e-6)


@pytest.mark.parametrize("patch", [4, 2])
@pytest.mark.parametrize("size", [(64, 64), (200, 312), (61, 94), (32, 32), (5, 9), (1, 1)])
@torch.no_grad()
def test_features_of_any_size(size, patch):
    model = timm.create_model("galerkin_tiny", features_only=True, patch_size=patch, **SMALL).eval()
    maps = model(torch.randn(1, 3, *size))
    strides = [patch, 2 * patch, 4 * patch]
    assert model.feature_info.channels() == [8, 16, 32] and model.feature_info.reduction() == strides
    sizes = [[-(-side // stride) for side in size] for stride in strides]
    assert [list(m.shape) for m in maps] == [[1, c, *s] for c, s in zip((8, 16, 32), sizes, strict=True)]
    assert all(torch.isfinite(m).all() for m in maps)


def test_features_only_holds_no_parameter_without_a_use():
    model = timm.create_model("galerkin_tiny", features_only=True, out_indices=(0, 1), in_chans=5, **SMALL)
    assert not any(name.startswith(("model.layers.2", "model.layers.1.downsample", "model.norm", "model.head"))
                   for name in model.state_dict())
    sum(m.sum() for m in model(torch.randn(2, 5, 48, 64))).backward()
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_timm_protocol():
    model, x = small().eval(), torch.randn(2, 3, 64, 96)
    final = model.forward_features(x)
    assert final.shape == (2, 4, 6, 32)
    assert torch.equal(model.forward_head(final), model(x)) and model(x[:1]).shape == (1, 5)
    y, maps = model.forward_intermediates(x, indices=[0, 2], norm=True)
    assert torch.equal(y, final) and torch.equal(maps[1], final.permute(0, 3, 1, 2)) and maps[0].shape == (2, 8, 16, 24)
    early, maps = model.forward_intermediates(x, indices=[1], stop_early=True, output_fmt="NHWC")
    assert torch.equal(early, maps[0]) and early.shape == (2, 8, 12, 16)
    model.reset_classifier(0)
    assert torch.equal(model(x), final.mean(dim=(1, 2)))
    model.reset_classifier(0, "")
    assert torch.equal(model(x), final)
    model.reset_classifier(7, "avg")
    assert model(x).shape == (2, 7)


@pytest.mark.parametrize("positions", [False, True])
def test_gradients_and_checkpointing(positions):
    plain, x = small(drop_path_rate=0.2, positions=positions), torch.randn(2, 3, 64, 96)
    saving = small(drop_path_rate=0.2, positions=positions)
    saving.set_grad_checkpointing()
    for model in (plain, saving):
        torch.manual_seed(1)
        model(x).square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) and a.grad.any() for a, b in zip(plain.parameters(), saving.parameters(), strict=True))


def test_layer_decay_groups():
    groups = group_with_matcher(small().named_parameters(), small().group_matcher(), reverse=True)
    order = ["patch_embed.proj.weight", "layers.0.blocks.0.norm1.weight", "layers.1.blocks.0.attn.norm_k.weight",
             "layers.1.blocks.1.norm1.weight", "layers.2.blocks.0.norm1.weight", "head.weight"]
    assert [groups[name] for name in order] == list(range(6)) and groups["norm.weight"] == 4


def test_compile_and_export():
    torch.compiler.reset()  # all families share one forward, whose compiled forms would add up
    model, x = small(depths=(1, 1, 1), positions=True).eval(), torch.randn(2, 3, 27, 40)
    with torch.no_grad():
        expected = model(x)
        assert torch.allclose(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected, atol=1e-6)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
        for batch in (1, 3):
            x = torch.randn(batch, 3, 27, 40)
            assert torch.allclose(program.module()(x), model(x), atol=1e-6)


def test_own_weights_with_another_classifier(tmp_path):
    donor = timm.create_model("galerkin_tiny", **dict(SMALL, num_classes=5))
    torch.save({"model": donor.state_dict()}, tmp_path / "weights.pth")
    model = timm.create_model("galerkin_tiny", **dict(SMALL, num_classes=9, in_chans=1))
    report = load_pretrained_file(model, tmp_path / "weights.pth", galerkin.checkpoint_filter_fn)
    assert report.adapted == ["patch_embed.proj.weight"] and len(report.replaced) == 2
    assert torch.equal(model.layers[1].blocks[1].attn.qkv.weight, donor.layers[1].blocks[1].attn.qkv.weight)


def test_numbers_of_a_config_node():
    model = galerkin.build("my_galerkin", dict(SMALL, num_classes=3, patch_size=2, out_proj=True), (64, 64))
    assert isinstance(model.layers[0].blocks[0].attn.proj, nn.Linear) and model.feature_info[0]["reduction"] == 2
    assert galerkin.build("galerkin_base", dict(galerkin.VARIANTS["galerkin_base"], **SMALL), (64, 64)).head.in_features == 32
    with pytest.raises(ValueError, match="num_heads has 2 entries for 3 stages"):
        small(num_heads=(1, 2))
    with pytest.raises(ValueError, match="width 8 .* cannot have 8 heads"):
        small(num_heads=(8, 4, 4))
    with pytest.raises(ValueError, match="set out_proj"):
        galerkin.GalerkinAttention(8, 2, position_dim=2)
