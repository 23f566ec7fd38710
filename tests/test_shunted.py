"""Shunted Transformer: parity with the official code's outputs, names and counts, the timm protocol, any input size."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from models import shunted
from models.base import default_cfg
from models.safe_load import CheckpointError
from models.weights import load_pretrained_file
from tests.recipe import PROBE_INPUT, check_names_and_counts, deterministic_input, deterministic_state, eps_probe, off

# Parameters, those with weight decay, state-dict keys, CRC-32 of all names and shapes in order.
FACTS = {
    "shunted_t": (11_553_576, 11_503_616, 260, 2279737056),
    "shunted_s": (22_401_256, 22_291_776, 596, 2512447469),
    "shunted_b": (39_614_376, 39_419_776, 1010, 2387830873),
}
SMALL = dict(embed_dims=(8, 16, 32, 64), depths=(1, 2, 1, 1), num_heads=(2, 4, 4, 8), num_conv=1)


def small(**kwargs) -> shunted.ShuntedTransformer:
    torch.manual_seed(0)
    return shunted.ShuntedTransformer(**dict(dict(SMALL, num_classes=5, drop_path_rate=0.0), **kwargs))


def load(model: nn.Module, state: dict[str, np.ndarray]) -> None:
    left = model.load_state_dict({name: torch.from_numpy(x) for name, x in state.items()}, strict=False)
    assert not left.unexpected_keys and all(name.endswith("num_batches_tracked") for name in left.missing_keys)


@torch.no_grad()
def test_outputs_are_the_official_ones():
    reference = np.load(Path(__file__).parent / "reference" / "shunted_t.npz")
    model = timm.create_model("shunted_t").eval()
    state = deterministic_state({name: x.shape for name, x in model.state_dict().items() if x.is_floating_point()})
    images = torch.from_numpy(deterministic_input(2, 3, 224, 224))
    load(model, state)
    final, stages = model.forward_intermediates(images, output_fmt="NHWC")
    assert off(model.forward_head(final), reference["logits"]) < 1e-5
    assert off(model.forward_head(final, pre_logits=True), reference["features"]) < 1e-5
    for i, y in enumerate(stages):
        assert y.flatten(1, 2).shape == tuple(reference[f"stage{i}_shape"])
        assert off(torch.stack([y.mean(), y.std(correction=0)]), reference[f"stage{i}_mean_std"]) < 1e-5
        assert off(y[0, 0, 0, :16], reference[f"stage{i}_first16"]) < 1e-5
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
    model = timm.create_model("shunted_t")
    block = model.block3[1]
    assert block.attn.q.weight.std() == pytest.approx(0.02, rel=0.05) and not block.attn.q.bias.any()
    assert block.mlp.dwconv.dwconv.weight.std() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    assert block.attn.sr1.weight.std() == pytest.approx((2 / (4 * 256)) ** 0.5, rel=0.05) and not block.attn.sr1.bias.any()
    assert model.patch_embed1.conv[0].weight.std() == pytest.approx((2 / (49 * 64)) ** 0.5, rel=0.05)
    assert model.head.weight.std() == pytest.approx(0.02, rel=0.05) and not model.head.bias.any()
    assert (block.norm1.eps, model.norm4.eps, block.attn.norm1.eps, model.patch_embed2.norm.eps) == (1e-6, 1e-6, 1e-5, 1e-5)


def test_drop_path_grows_over_all_blocks():
    with torch.device("meta"):
        model = timm.create_model("shunted_b")
    rates = [getattr(block.drop_path, "drop_prob", 0) for stage in model.stage_modules() for block in stage]
    assert rates == pytest.approx([0.3 * i / 32 for i in range(33)])


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


@torch.no_grad()
def test_height_and_width_are_not_mixed_up():
    model, turned, x = small().eval(), small().eval(), torch.randn(1, 3, 72, 104)
    turned.load_state_dict({k: v.transpose(2, 3) if v.ndim == 4 else v for k, v in model.state_dict().items()})
    assert torch.allclose(model(x), turned(x.transpose(2, 3)), atol=1e-5)


@pytest.mark.parametrize("size", [(224, 224), (200, 312), (61, 94), (32, 32), (17, 9), (1, 1)])
@torch.no_grad()
def test_features_of_any_size(size):
    model = timm.create_model("shunted_t", features_only=True, **SMALL).eval()
    maps = model(torch.randn(1, 3, *size))
    assert model.feature_info.channels() == [8, 16, 32, 64] and model.feature_info.reduction() == [4, 8, 16, 32]
    first = [max(1, (side + 1) // 4) for side in size]  # the official convolutions: 7x7 of stride 2, padded, then 2x2
    halves = [[-(-side // 2 ** i) for side in first] for i in range(4)]
    assert [list(m.shape) for m in maps] == [[1, c, *s] for c, s in zip((8, 16, 32, 64), halves, strict=True)]
    assert all(torch.isfinite(m).all() for m in maps)


def test_features_only_holds_no_parameter_without_a_use():
    model = timm.create_model("shunted_t", features_only=True, out_indices=(0, 2), in_chans=5, **SMALL)
    later = tuple(f"model.{name}" for name in ("patch_embed4", "block4", "norm4", "head"))
    assert not any(name.startswith(later) for name in model.state_dict())
    sum(m.square().sum() for m in model(torch.randn(2, 5, 64, 96))).backward()
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_timm_protocol():
    model, x = small().eval(), torch.randn(2, 3, 64, 96)
    final = model.forward_features(x)
    assert final.shape == (2, 2, 3, 64)
    assert torch.equal(model.forward_head(final), model(x)) and model(x[:1]).shape == (1, 5)
    assert torch.allclose(model(x[:1]), model(x)[:1], atol=1e-6)

    again, maps = model.forward_intermediates(x, indices=[0, 3])
    assert torch.equal(again, final) and [m.shape for m in maps] == [(2, 8, 16, 24), (2, 64, 2, 3)]
    assert torch.equal(maps[1].permute(0, 2, 3, 1), final)
    early, maps = model.forward_intermediates(x, indices=[1], stop_early=True, output_fmt="NHWC")
    assert early.shape == maps[0].shape == (2, 8, 12, 16)
    assert len(model.forward_intermediates(x, indices=2, norm=True, intermediates_only=True)) == 2

    model.reset_classifier(0)
    assert torch.allclose(model(x), final.mean((1, 2))) and isinstance(model.get_classifier(), nn.Identity)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), final)
    model.reset_classifier(7, "avg")
    assert model(x).shape == (2, 7) and not model.head.bias.any()
    with pytest.raises(ValueError, match="choose avg"):
        model.reset_classifier(7, "token")


def test_gradients_and_checkpointing():
    model, x = small(), torch.randn(2, 3, 64, 96)
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(g.any() and torch.equal(g, gradients[1][name]) for name, g in gradients[0].items())


def test_layer_decay_groups():
    model = small()
    groups = group_with_matcher(model.named_parameters(), model.group_matcher(), reverse=True)
    order = ["patch_embed1.conv.0.weight", "block1.0.norm1.weight", "block2.0.norm1.weight", "block2.1.norm1.weight",
             "block3.0.norm1.weight", "block4.0.norm1.weight", "head.weight"]
    assert [groups[name] for name in order] == list(range(7))
    assert groups["patch_embed2.proj.weight"] == 2 and groups["norm2.weight"] == 3 and groups["norm4.weight"] == 5


def test_compile_and_export():
    model, x = small(depths=(1, 1, 1, 1), num_conv=0).eval(), torch.randn(2, 3, 48, 80)
    with torch.no_grad():
        expected = model(x)
        assert torch.allclose(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected, atol=1e-6)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
        for batch in (1, 3):
            x = torch.randn(batch, 3, 48, 80)
            assert torch.allclose(program.module()(x), model(x), atol=1e-6)


def test_published_form_of_weights(tmp_path):
    path, donor = tmp_path / "checkpoint.pth", small()
    torch.save({"model": donor.state_dict(), "epoch": 299, "args": argparse.Namespace(model="shunted_t")}, path)
    model = small(in_chans=1)
    model.reset_classifier(9)
    model.default_cfg = model.pretrained_cfg = default_cfg()
    report = load_pretrained_file(model, path, shunted.checkpoint_filter_fn)
    assert report.adapted == ["patch_embed1.conv.0.weight"] and len(report.replaced) == 2
    assert torch.equal(model.block4[0].attn.kv.weight, donor.block4[0].attn.kv.weight)
    torch.save(dict(donor.state_dict(), surplus=torch.zeros(1)), path)
    with pytest.raises(CheckpointError, match="surplus"):
        load_pretrained_file(small(), path, shunted.checkpoint_filter_fn)


def test_numbers_of_a_config_node():
    model = shunted.build("my_shunted", dict(SMALL, num_classes=3, drop_path_rate=0.2), (64, 64))
    assert isinstance(model, shunted.ShuntedTransformer) and model.head.out_features == 3
    model = shunted.build("shunted_t", dict(shunted.VARIANTS["shunted_t"], depths=(1, 1, 1, 1), num_classes=4), (224, 224))
    assert model.num_classes == 4 and len(model.block3) == 1
    with pytest.raises(ValueError, match="num_heads has 2 entries for 4 stages"):
        shunted.ShuntedTransformer(num_heads=(1, 2))
    with pytest.raises(ValueError, match="cannot merge at rate 3"):
        shunted.ShuntedTransformer(sr_ratios=(8, 4, 3, 1))
