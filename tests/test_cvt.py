"""CvT: parity with the official code's outputs, names and counts, the timm protocol, any input size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from models import cvt
from models.base import default_cfg
from models.safe_load import CheckpointError
from models.weights import load_pretrained_file
from tests.recipe import PROBE_INPUT, check_names_and_counts, deterministic_input, deterministic_state, eps_probe, off

# Parameters, those with weight decay, state-dict keys, CRC-32 of all names and shapes in order.
FACTS = {
    "cvt_13": (19_997_480, 19_911_936, 459, 1392252638),
    "cvt_21": (31_622_696, 31_486_080, 731, 2535526880),
    "cvt_w24": (277_196_392, 276_760_768, 833, 550629001),
}
SMALL = dict(embed_dims=(8, 16, 32), depths=(1, 2, 3), num_heads=(1, 2, 4))


def small(**kwargs) -> cvt.CvT:
    torch.manual_seed(0)
    return cvt.CvT(**dict(dict(SMALL, num_classes=5, drop_path_rate=0.0), **kwargs))


def load(model: nn.Module, state: dict[str, np.ndarray]) -> None:
    left = model.load_state_dict({name: torch.from_numpy(x) for name, x in state.items()}, strict=False)
    assert not left.unexpected_keys and all(name.endswith("num_batches_tracked") for name in left.missing_keys)


@torch.no_grad()
def test_outputs_are_the_official_ones():
    reference = np.load(Path(__file__).parent / "reference" / "cvt_13.npz")
    model = timm.create_model("cvt_13").eval()
    state = deterministic_state({name: x.shape for name, x in model.state_dict().items() if x.is_floating_point()})
    images = torch.from_numpy(deterministic_input(2, 3, 224, 224))
    load(model, state)
    tokens, stages = model.forward_intermediates(images, output_fmt="NHWC")
    assert off(model.forward_head(tokens), reference["logits"]) < 1e-5
    assert off(model.forward_head(tokens, pre_logits=True), reference["features"]) < 1e-5
    for i, y in enumerate(stages):
        assert y.permute(0, 3, 1, 2).shape == tuple(reference[f"stage{i}_shape"])
        assert off(torch.stack([y.mean(), y.std(correction=0)]), reference[f"stage{i}_mean_std"]) < 1e-5
        assert off(y[0, 0, 0, :16], reference[f"stage{i}_first16"]) < 1e-5
        assert off(y[0, y.shape[1] // 2, y.shape[2] // 2, :16], reference[f"stage{i}_mid16"]) < 1e-5
    load(model, eps_probe(state))
    tokens = model.forward_features(images * PROBE_INPUT)
    assert off(model.forward_head(tokens), reference["probe_logits"]) < 1e-5
    assert off(model.forward_head(tokens, pre_logits=True), reference["probe_features"]) < 1e-5


@pytest.mark.parametrize("name", FACTS)
def test_names_and_counts(name):
    check_names_and_counts(name, *FACTS[name])


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


def test_drop_path_grows_within_the_last_stage_only():
    with torch.device("meta"):
        model = timm.create_model("cvt_w24")
    assert [getattr(b.drop_path, "drop_prob", 0) for b in [*model.stage0.blocks, *model.stage1.blocks]] == [0] * 4
    rates = [getattr(b.drop_path, "drop_prob", 0) for b in model.stage2.blocks]
    assert rates == pytest.approx([0.3 * i / 19 for i in range(20)])


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


@torch.no_grad()
def test_height_and_width_are_not_mixed_up():
    model, turned, x = small().eval(), small().eval(), torch.randn(1, 3, 56, 104)
    turned.load_state_dict({k: v.transpose(2, 3) if v.ndim == 4 else v for k, v in model.state_dict().items()})
    assert torch.allclose(model(x), turned(x.transpose(2, 3)), atol=1e-5)


@pytest.mark.parametrize("size", [(224, 224), (200, 312), (61, 94), (32, 32), (5, 9), (1, 1)])
@torch.no_grad()
def test_features_of_any_size(size):
    model = timm.create_model("cvt_13", features_only=True, **SMALL).eval()
    maps = model(torch.randn(1, 3, *size))
    assert model.feature_info.channels() == [8, 16, 32] and model.feature_info.reduction() == [4, 8, 16]
    first = [max(1, (side - 3) // 4 + 1) for side in size]  # the official 7x7 convolution, stride 4, padding 2
    halves = [first, [-(-s // 2) for s in first], [-(-s // 4) for s in first]]
    assert [list(m.shape) for m in maps] == [[1, c, *s] for c, s in zip((8, 16, 32), halves, strict=True)]
    assert all(torch.isfinite(m).all() for m in maps)


def test_features_only_holds_no_parameter_without_a_use():
    model = timm.create_model("cvt_13", features_only=True, out_indices=(0, 1), in_chans=5, **SMALL)
    assert not any(name.startswith(("model.stage2", "model.norm", "model.head")) for name in model.state_dict())
    sum(m.sum() for m in model(torch.randn(2, 5, 48, 64))).backward()
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_timm_protocol():
    model, x = small().eval(), torch.randn(2, 3, 64, 96)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 1 + 4 * 6, 32)
    assert torch.equal(model.forward_head(tokens), model(x)) and model(x[:1]).shape == (1, 5)
    assert torch.allclose(model(x[:1]), model(x)[:1], atol=1e-6)

    final, maps = model.forward_intermediates(x, indices=[0, 2], norm=True)
    assert torch.equal(final, tokens) and [m.shape for m in maps] == [(2, 8, 16, 24), (2, 32, 4, 6)]
    assert torch.allclose(maps[1].flatten(2).transpose(1, 2), tokens[:, 1:], atol=1e-6)
    early, maps = model.forward_intermediates(x, indices=[1], stop_early=True, output_fmt="NHWC")
    assert early.shape == (2, 8 * 12, 16) and maps[0].shape == (2, 8, 12, 16)
    assert len(model.forward_intermediates(x, indices=2, intermediates_only=True)) == 2
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


def test_gradients_and_checkpointing():
    model, x = small(), torch.randn(2, 3, 64, 96)
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    still = [name for name, g in gradients[0].items() if not g.any()]
    # Only the class token leaves the last block, so the queries of its pixels are never used.
    assert still and all(name.startswith("stage2.blocks.2.attn.conv_proj_q.") for name in still)


def test_layer_decay_groups():
    model = small()
    groups = group_with_matcher(model.named_parameters(), model.group_matcher(), reverse=True)
    order = ["stage0.patch_embed.proj.weight", "stage0.blocks.0.norm1.weight", "stage1.blocks.0.norm1.weight",
             "stage1.blocks.1.norm1.weight", "stage2.blocks.0.norm1.weight", "stage2.blocks.1.norm1.weight",
             "stage2.blocks.2.norm1.weight", "head.weight"]
    assert [groups[name] for name in order] == list(range(8))
    assert groups["stage2.cls_token"] == groups["stage2.patch_embed.proj.weight"] == 4 and groups["norm.weight"] == 6


def test_compile_and_export():
    model, x = small(depths=(1, 1, 1)).eval(), torch.randn(2, 3, 48, 80)
    with torch.no_grad():
        expected = model(x)
        assert torch.allclose(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected, atol=1e-6)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
        for batch in (1, 3):
            x = torch.randn(batch, 3, 48, 80)
            assert torch.allclose(program.module()(x), model(x), atol=1e-6)


def test_published_form_of_weights(tmp_path):
    path, donor = tmp_path / "checkpoint.pth", small()
    torch.save({"epoch": 300, "model": "cls_cvt", "state_dict": donor.state_dict(), "perf": 81.6}, path)
    model = small(in_chans=1)
    model.reset_classifier(9)
    model.default_cfg = model.pretrained_cfg = default_cfg()
    report = load_pretrained_file(model, path, cvt.checkpoint_filter_fn)
    assert report.adapted == ["stage0.patch_embed.proj.weight"] and len(report.replaced) == 2
    assert torch.equal(model.stage2.cls_token, donor.stage2.cls_token)
    torch.save(dict(donor.state_dict(), surplus=torch.zeros(1)), path)
    with pytest.raises(CheckpointError, match="surplus"):
        load_pretrained_file(small(), path, cvt.checkpoint_filter_fn)


def test_numbers_of_a_config_node():
    model = cvt.build("my_cvt", dict(SMALL, num_classes=3, drop_path_rate=0.2), (64, 64))
    assert isinstance(model, cvt.CvT) and model.head.out_features == 3
    assert cvt.build("cvt_13", dict(cvt.VARIANTS["cvt_13"], depths=(1, 1, 1), num_classes=4), (224, 224)).num_classes == 4
    with pytest.raises(ValueError, match="num_heads has 2 entries for 3 stages"):
        cvt.CvT(num_heads=(1, 2))
    with pytest.raises(ValueError, match="width 64 cannot have 5 heads"):
        cvt.CvT(num_heads=(5, 3, 6))
