"""PVT: parity with the official code's outputs, names and counts, position tables, the timm protocol, any input size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from models import pvt
from models.safe_load import CheckpointError
from models.weights import load_pretrained_file
from tests.recipe import PROBE_INPUT, check_names_and_counts, deterministic_input, deterministic_state, eps_probe, off

# Parameters, those with weight decay, state-dict keys, CRC-32 of all names and shapes in order.
FACTS = {
    "pvt_tiny": (13_229_288, 13_192_448, 161, 2687247362),
    "pvt_small": (24_485_864, 24_415_488, 301, 66960749),
    "pvt_medium": (44_208_104, 44_076_288, 517, 945418728),
    "pvt_large": (61_369_320, 61_181_184, 751, 4182208365),
}
SMALL = dict(embed_dims=(8, 16, 32), depths=(1, 2, 1), num_heads=(1, 2, 4), mlp_ratios=(2, 2, 2), sr_ratios=(4, 2, 1))


def small(**kwargs) -> pvt.PyramidVisionTransformer:
    torch.manual_seed(0)
    return pvt.PyramidVisionTransformer(**dict(dict(SMALL, img_size=64, num_classes=5, drop_path_rate=0.0), **kwargs))


def load(model: nn.Module, state: dict[str, np.ndarray]) -> None:
    model.load_state_dict({name: torch.from_numpy(x) for name, x in state.items()})


@torch.no_grad()
def test_outputs_are_the_official_ones():
    reference = np.load(Path(__file__).parent / "reference" / "pvt_tiny.npz")
    model = timm.create_model("pvt_tiny").eval()
    state = deterministic_state({name: x.shape for name, x in model.state_dict().items()})
    images = torch.from_numpy(deterministic_input(2, 3, 224, 224))
    load(model, state)
    final, stages = model.forward_intermediates(images, return_prefix_tokens=True, output_fmt="NHWC")
    assert off(model.forward_head(final), reference["logits"]) < 1e-5
    assert off(model.forward_head(final, pre_logits=True), reference["features"]) < 1e-5
    for i, y in enumerate(stages):
        y, prefix = y if i == 3 else (y, y[:, 0, :0])
        tokens = torch.cat([prefix, y.flatten(1, 2)], dim=1)  # the reference keeps the class token in the last stage
        assert tokens.shape == tuple(reference[f"stage{i}_shape"])
        assert off(torch.stack([tokens.mean(), tokens.std(correction=0)]), reference[f"stage{i}_mean_std"]) < 1e-5
        assert off(tokens[0, 0, :16], reference[f"stage{i}_first16"]) < 1e-5
        assert off(y[0, y.shape[1] // 2, y.shape[2] // 2, :16], reference[f"stage{i}_mid16"]) < 1e-5
    load(model, eps_probe(state))
    final = model.forward_features(images * PROBE_INPUT)
    assert off(model.forward_head(final), reference["probe_logits"]) < 1e-5
    assert off(model.forward_head(final, pre_logits=True), reference["probe_features"]) < 1e-5


@pytest.mark.parametrize("name", FACTS)
def test_names_and_counts(name):
    check_names_and_counts(name, *FACTS[name])


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


def test_drop_path_grows_over_all_blocks():
    with torch.device("meta"):
        model = timm.create_model("pvt_medium")
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for s in range(4) for b in getattr(model, f"block{s + 1}")]
    assert rates == pytest.approx([0.3 * i / 27 for i in range(28)])
    assert [pvt.VARIANTS[name]["drop_path_rate"] for name in FACTS] == [0.1, 0.1, 0.3, 0.3]


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
def test_a_file_of_another_size_gives_what_the_model_does_inside(tmp_path):
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
def test_published_form_of_weights(tmp_path):
    path, donor = tmp_path / "pvt.pth", timm.create_model("pvt_tiny", **dict(SMALL, img_size=64))
    torch.save(donor.state_dict(), path)
    model = timm.create_model("pvt_tiny", **dict(SMALL, img_size=64, in_chans=1, num_classes=9))
    report = load_pretrained_file(model, path, pvt.checkpoint_filter_fn)
    assert report.adapted == ["patch_embed1.proj.weight"] and len(report.replaced) == 2
    assert torch.equal(model.cls_token, donor.cls_token)
    torch.save(dict(donor.state_dict(), surplus=torch.zeros(1)), path)
    with pytest.raises(CheckpointError, match="surplus"):
        load_pretrained_file(model, path, pvt.checkpoint_filter_fn)


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
    assert torch.allclose(pvt.attend(q, k, v, 0.3, nn.Dropout(0.0)), fused, rtol=1e-10)


@torch.no_grad()
def test_height_and_width_are_not_mixed_up():
    model, turned, x = small().eval(), small().eval(), torch.randn(1, 3, 56, 104)
    state = {k: v.transpose(2, 3) if v.ndim == 4 else v for k, v in model.state_dict().items()}
    for s, prefix in ((0, 0), (1, 0), (2, 1)):
        table, side = state[f"pos_embed{s + 1}"], 16 // 2 ** s
        flipped = table[:, prefix:].view(1, side, side, -1).transpose(1, 2).flatten(1, 2)
        state[f"pos_embed{s + 1}"] = torch.cat([table[:, :prefix], flipped], dim=1)
    turned.load_state_dict(state)
    assert torch.allclose(model(x), turned(x.transpose(2, 3)), atol=1e-6)


@pytest.mark.parametrize("size", [(224, 224), (200, 312), (61, 94), (128, 128), (32, 32), (5, 9), (1, 1)])
@torch.no_grad()
def test_features_of_any_size(size):
    model = timm.create_model("pvt_tiny", features_only=True, **dict(SMALL, img_size=64)).eval()
    maps = model(torch.randn(1, 3, *size))
    assert model.feature_info.channels() == [8, 16, 32] and model.feature_info.reduction() == [4, 8, 16]
    sizes = [[max(1, side // stride) for side in size] for stride in (4, 8, 16)]
    assert [list(m.shape) for m in maps] == [[1, c, *s] for c, s in zip((8, 16, 32), sizes, strict=True)]
    assert all(torch.isfinite(m).all() for m in maps)


def test_features_only_holds_no_parameter_without_a_use():
    model = timm.create_model("pvt_tiny", features_only=True, out_indices=(0, 1), in_chans=5, **dict(SMALL, img_size=64))
    gone = ("block3", "embed3", "cls_token", "model.norm", "head")
    assert not any(part in name for name in model.state_dict() for part in gone)
    sum(m.sum() for m in model(torch.randn(2, 5, 48, 64))).backward()
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_timm_protocol():
    model, x = small().eval(), torch.randn(2, 3, 64, 96)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 1 + 4 * 6, 32)
    assert torch.equal(model.forward_head(tokens), model(x)) and model(x[:1]).shape == (1, 5)

    final, maps = model.forward_intermediates(x, indices=[0, 2], norm=True)
    assert torch.equal(final, tokens) and [m.shape for m in maps] == [(2, 8, 16, 24), (2, 32, 4, 6)]
    assert torch.allclose(maps[1].flatten(2).transpose(1, 2), tokens[:, 1:], atol=1e-6)
    (_, prefix), = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True, return_prefix_tokens=True)
    assert torch.allclose(prefix, tokens[:, :1], atol=1e-6)
    early, maps = model.forward_intermediates(x, indices=[1], stop_early=True, output_fmt="NHWC")
    assert torch.equal(early, maps[0]) and early.shape == (2, 8, 12, 16)
    with pytest.raises(ValueError, match="NCHW or NHWC"):
        model.forward_intermediates(x, output_fmt="NLC")

    model.reset_classifier(0)
    assert torch.equal(model(x), tokens[:, 0]) and isinstance(model.get_classifier(), nn.Identity)
    model.reset_classifier(0, "avg")
    assert torch.allclose(model(x), tokens[:, 1:].mean(1))
    model.reset_classifier(0, "")
    assert torch.equal(model(x), tokens)
    model.reset_classifier(7, "token")
    assert model(x).shape == (2, 7)
    with pytest.raises(ValueError, match="choose token, avg"):
        model.reset_classifier(7, "max")
    model.prune_intermediate_layers([1])
    model.reset_classifier(3, "avg")
    assert model(x).shape == (2, 3)


def test_gradients_and_checkpointing():
    plain, x = small(drop_path_rate=0.2), torch.randn(2, 3, 64, 96)
    saving = small(drop_path_rate=0.2)
    saving.set_grad_checkpointing()
    for model in (plain, saving):
        torch.manual_seed(1)
        model(x).square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) and a.grad.any() for a, b in zip(plain.parameters(), saving.parameters(), strict=True))


def test_layer_decay_groups():
    model = small()
    groups = group_with_matcher(model.named_parameters(), model.group_matcher(), reverse=True)
    order = ["pos_embed1", "block1.0.norm1.weight", "block2.0.norm1.weight", "block2.1.norm1.weight", "block3.0.norm1.weight",
             "head.weight"]
    assert [groups[name] for name in order] == list(range(6))
    assert groups["patch_embed1.proj.weight"] == 0 and groups["pos_embed2"] == groups["patch_embed2.norm.bias"] == 2
    assert groups["cls_token"] == groups["norm.weight"] == 4


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_compile_and_export(size):
    torch.compiler.reset()  # all families share one forward, whose compiled forms would add up
    model, x = small(depths=(1, 1, 1)).eval(), torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = model(x)
        assert torch.allclose(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected, atol=1e-5)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
        for batch in (1, 3):
            x = torch.randn(batch, 3, *size)
            assert torch.allclose(program.module()(x), model(x), atol=1e-6)


def test_numbers_of_a_config_node():
    model = pvt.build("my_pvt", dict(SMALL, num_classes=3, drop_path_rate=0.2), (64, 96))
    assert isinstance(model, pvt.PyramidVisionTransformer) and model.pos_embed1.shape[1] == 16 * 24
    assert pvt.build("pvt_tiny", dict(pvt.VARIANTS["pvt_tiny"], num_classes=4), (64, 64)).grids[3] == (2, 2)
    with pytest.raises(ValueError, match="num_heads has 2 entries for 3 stages"):
        small(num_heads=(1, 2))
    with pytest.raises(ValueError, match="width 8 cannot have 3 heads"):
        small(num_heads=(3, 2, 4))
    with pytest.raises(ValueError, match="must not reduce"):
        small(sr_ratios=(4, 2, 2))
