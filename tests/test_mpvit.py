"""MPViT: parity with the official code's outputs, names and counts, the timm protocol, any input size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.models._manipulate import group_with_matcher
from torch import nn

from models import mpvit
from models.safe_load import CheckpointError
from models.weights import load_pretrained_file
from tests.recipe import PROBE_INPUT, check_names_and_counts, deterministic_input, deterministic_state, eps_probe, off

# Parameters, those with weight decay, state-dict keys, CRC-32 of all names and shapes in order.
FACTS = {
    "mpvit_tiny": (5_843_736, 5_793_352, 873, 68565881),
    "mpvit_xsmall": (10_573_448, 10_507_744, 873, 951713014),
    "mpvit_small": (22_892_400, 22_776_216, 1263, 383404056),
    "mpvit_base": (74_845_976, 74_619_888, 1419, 3719167743),
}
SMALL = dict(embed_dims=(16, 24, 32), num_paths=(2, 1, 3), depths=(1, 2, 1), num_heads=(8, 8, 8), mlp_ratios=(2, 2, 2))


def small(**kwargs) -> mpvit.MPViT:
    torch.manual_seed(0)
    return mpvit.MPViT(**dict(dict(SMALL, num_classes=5), **kwargs))


def meta(name: str) -> mpvit.MPViT:
    with torch.device("meta"):
        return timm.create_model(name)


def load(model: nn.Module, state: dict[str, np.ndarray]) -> None:
    """``state`` holds a shared tensor under its first name; loading it there fills the others."""
    left = model.load_state_dict({name: torch.from_numpy(x) for name, x in state.items()}, strict=False)
    own = {name for name, _ in model.named_parameters()} | {name for name, x in model.named_buffers() if x.is_floating_point()}
    assert not left.unexpected_keys and state.keys() == own


@torch.no_grad()
def test_outputs_are_the_official_ones():
    reference = np.load(Path(__file__).parent / "reference" / "mpvit_tiny.npz")
    model = timm.create_model("mpvit_tiny").eval()
    shapes = {name: x.shape for name, x in model.named_parameters()}
    shapes |= {name: x.shape for name, x in model.named_buffers() if x.is_floating_point()}
    state = deterministic_state(shapes)
    images = torch.from_numpy(deterministic_input(2, 3, 224, 224))
    load(model, state)
    final, stages = model.forward_intermediates(images)
    assert off(model.forward_head(final), reference["logits"]) < 1e-5
    assert off(model.forward_head(final, pre_logits=True), reference["features"]) < 1e-5
    for i, y in enumerate(stages):
        assert y.shape == tuple(reference[f"stage{i}_shape"])
        assert off(torch.stack([y.mean(), y.std(correction=0)]), reference[f"stage{i}_mean_std"]) < 1e-5
        assert off(y[0, :16, 0, 0], reference[f"stage{i}_first16"]) < 1e-5
        assert off(y[0, :16, y.shape[2] // 2, y.shape[3] // 2], reference[f"stage{i}_mid16"]) < 1e-5
    load(model, eps_probe(state))
    final = model.forward_features(images * PROBE_INPUT)
    assert off(model.forward_head(final), reference["probe_logits"]) < 1e-5
    assert off(model.forward_head(final, pre_logits=True), reference["probe_features"]) < 1e-5


@pytest.mark.parametrize("name", FACTS)
def test_names_and_counts(name):
    check_names_and_counts(name, *FACTS[name])


def test_layers_of_a_path_share_their_encodings():
    state = small().state_dict()
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


def test_drop_path_grows_over_layers_alike_in_every_path():
    model = meta("mpvit_base")
    for path in range(2):
        layers = [layer for stage in model.mhca_stages for layer in stage.mhca_blks[path].MHCA_layers]
        rates = [getattr(layer.drop_path, "drop_prob", 0.0) for layer in layers]
        assert rates == pytest.approx([0.3 * i / 14 for i in range(15)])
    for name, rate in (("mpvit_tiny", 0.0), ("mpvit_xsmall", 0.0), ("mpvit_small", 0.05)):
        assert getattr(meta(name).mhca_stages[3].mhca_blks[0].MHCA_layers[-1].drop_path, "drop_prob", 0.0) == pytest.approx(rate)


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
def test_height_and_width_are_not_mixed_up():
    model, turned, x = small().eval(), small().eval(), torch.randn(1, 3, 56, 104)
    turned.load_state_dict({k: v.transpose(2, 3) if v.ndim == 4 else v for k, v in model.state_dict().items()})
    assert torch.allclose(model(x), turned(x.transpose(2, 3)), atol=1e-6)


@pytest.mark.parametrize("size", [(224, 224), (200, 312), (61, 94), (32, 32), (5, 9), (1, 1)])
@torch.no_grad()
def test_features_of_any_size(size):
    model = timm.create_model("mpvit_tiny", features_only=True, **SMALL).eval()
    maps = model(torch.randn(1, 3, *size))
    assert model.feature_info.channels() == [24, 32, 32] and model.feature_info.reduction() == [4, 8, 16]
    sizes = [[-(-side // stride) for side in size] for stride in (4, 8, 16)]
    assert [list(m.shape) for m in maps] == [[1, c, *s] for c, s in zip((24, 32, 32), sizes, strict=True)]
    assert all(torch.isfinite(m).all() for m in maps)


def test_features_only_holds_no_parameter_without_a_use():
    model = timm.create_model("mpvit_tiny", features_only=True, out_indices=(0, 1), in_chans=5, **SMALL)
    assert not any(name.startswith(("model.mhca_stages.2", "model.patch_embed_stages.2", "model.cls_head"))
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
    assert torch.equal(y, final) and [m.shape for m in maps] == [(2, 24, 16, 24), (2, 32, 4, 6)]
    early, maps = model.forward_intermediates(x, indices=[1], stop_early=True, output_fmt="NHWC")
    assert torch.equal(early, maps[0]) and early.shape == (2, 8, 12, 32)
    assert len(model.forward_intermediates(x, indices=2, intermediates_only=True)) == 2

    model.reset_classifier(0)
    assert torch.equal(model(x), final.mean(dim=(1, 2))) and isinstance(model.get_classifier(), nn.Identity)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), final)
    model.reset_classifier(7, "avg")
    assert model(x).shape == (2, 7) and model.get_classifier() is model.cls_head["cls"]
    assert [name for name in model.state_dict() if "head" in name] == ["cls_head.cls.weight", "cls_head.cls.bias"]
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
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), saving.buffers(), strict=True))  # batches counted once


def test_layer_decay_groups():
    model = small()
    groups = group_with_matcher(model.named_parameters(), model.group_matcher(), reverse=True)
    path = "mhca_stages.{}.mhca_blks.0.MHCA_layers.{}.norm1.weight"
    order = ["stem.0.conv.weight", path.format(0, 0), path.format(1, 0), path.format(1, 1), path.format(2, 0),
             "cls_head.cls.weight"]
    assert [groups[name] for name in order] == list(range(6))
    assert groups["mhca_stages.1.aggregate.conv.weight"] == 3
    for name in ("patch_embed_stages.1.patch_embeds.0.patch_conv.bn.weight", "mhca_stages.1.mhca_blks.0.cpe.proj.weight",
                 "mhca_stages.1.InvRes.norm.weight"):
        assert groups[name] == 2


def test_compile_and_export():
    torch.compiler.reset()  # all families share one forward, whose compiled forms would add up
    model = small(embed_dims=(16, 24), num_paths=(2, 1), depths=(1, 1), num_heads=(8, 8), mlp_ratios=(2, 2)).eval()
    x = torch.randn(2, 3, 24, 40)
    with torch.no_grad():
        expected = model(x)
        assert torch.allclose(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected, atol=1e-6)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
        for batch in (1, 3):
            x = torch.randn(batch, 3, 24, 40)
            assert torch.allclose(program.module()(x), model(x), atol=1e-6)


def test_published_form_of_weights(tmp_path):
    path, donor = tmp_path / "checkpoint.pth", timm.create_model("mpvit_tiny", **dict(SMALL, num_classes=5))
    torch.save({"model": donor.state_dict(), "model_ema": {}, "epoch": 299}, path)
    model = timm.create_model("mpvit_tiny", **dict(SMALL, num_classes=9, in_chans=1))
    report = load_pretrained_file(model, path, mpvit.checkpoint_filter_fn)
    assert report.adapted == ["stem.0.conv.weight"] and len(report.replaced) == 2
    assert all("cls_head.cls" in line for line in report.replaced)
    for name, x in model.state_dict().items():
        assert name.startswith(("cls_head", "stem.0.conv")) or torch.equal(x, donor.state_dict()[name])
    torch.save(dict(donor.state_dict(), surplus=torch.zeros(1)), path)
    with pytest.raises(CheckpointError, match="surplus"):
        load_pretrained_file(small(), path, mpvit.checkpoint_filter_fn)


def test_numbers_of_a_config_node():
    model = mpvit.build("my_mpvit", dict(SMALL, num_classes=3, drop_path_rate=0.2), (64, 64))
    assert isinstance(model, mpvit.MPViT) and model.get_classifier().out_features == 3
    with pytest.raises(ValueError, match="num_paths has 2 entries for 3 stages"):
        small(num_paths=(2, 2))
    with pytest.raises(ValueError, match="width 20 cannot have 8 heads"):
        small(embed_dims=(20, 24, 32))
    with pytest.raises(ValueError, match="serves 8 heads of 4"):
        small(num_heads=(4, 8, 8))
    with pytest.raises(ValueError, match="odd kernel"):
        small(crpe_windows=((4, 8),))
