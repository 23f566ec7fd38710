"""PVTv2 (timm's model): parity with the official code's outputs, the published names, numbers from the config."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from models import pvt_v2
from models.safe_load import CheckpointError
from models.weights import load_pretrained_file
from tests.recipe import PROBE_INPUT, deterministic_input, deterministic_state, eps_probe, off

# Parameters, those with weight decay, state-dict keys, CRC-32 of all official names and shapes in order.
FACTS = {
    "pvt_v2_b0": (3_666_760, 3_642_720, 178, 2557064458),
    "pvt_v2_b1": (14_009_000, 13_961_920, 178, 233554867),
    "pvt_v2_b2": (25_362_856, 25_272_512, 334, 1755673009),
    "pvt_v2_b2_li": (22_553_512, 22_458_560, 346, 3296624478),
    "pvt_v2_b3": (45_238_696, 45_071_552, 574, 2677649786),
    "pvt_v2_b4": (62_556_072, 62_316_992, 834, 1267476938),
    "pvt_v2_b5": (81_956_008, 81_648_576, 1054, 3431210572),
}
SMALL = dict(embed_dims=[8, 16, 32], depths=[1, 1, 2], num_heads=[1, 2, 4], mlp_ratios=[2, 2, 2], sr_ratios=[4, 2, 1])


def build(name: str = "pvt_v2_small", size: tuple[int, int] = (224, 224), **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return pvt_v2.build(name, dict(pvt_v2.VARIANTS.get(name, SMALL), **kwargs), size)


def official(name: str) -> str:
    """timm's name of a tensor to the published one."""
    name = re.sub(r"^patch_embed\.", "patch_embed1.", name)
    name = re.sub(r"^stages\.(\d+)\.downsample\.", lambda m: f"patch_embed{int(m[1]) + 1}.", name)
    name = re.sub(r"^stages\.(\d+)\.blocks\.", lambda m: f"block{int(m[1]) + 1}.", name)
    name = re.sub(r"^stages\.(\d+)\.norm\.", lambda m: f"norm{int(m[1]) + 1}.", name)
    return name.replace(".dwconv.", ".dwconv.dwconv.")


@torch.no_grad()
def test_outputs_are_the_official_ones():
    reference = np.load(Path(__file__).parent / "reference" / "pvt_v2_b1.npz")
    model = build("pvt_v2_b1").eval()
    state = deterministic_state({official(name): x.shape for name, x in model.state_dict().items()})
    images = torch.from_numpy(deterministic_input(2, 3, 224, 224))

    def load(state: dict[str, np.ndarray]) -> None:
        model.load_state_dict(pvt_v2.checkpoint_filter_fn({name: torch.from_numpy(x) for name, x in state.items()}, model))

    load(state)
    final, stages = model.forward_intermediates(images)
    assert off(model.forward_head(final), reference["logits"]) < 1e-5
    assert off(model.forward_head(final, pre_logits=True), reference["features"]) < 1e-5
    for i, y in enumerate(stages):
        assert y.flatten(2).transpose(1, 2).shape == tuple(reference[f"stage{i}_shape"])
        # The means are nearly 0: measured against the deviation.
        assert off(torch.stack([y.mean(), y.std(correction=0)]), reference[f"stage{i}_mean_std"]) < 1e-5
        assert off(y[0, :16, 0, 0], reference[f"stage{i}_first16"]) < 1e-5
        assert off(y[0, :16, y.shape[2] // 2, y.shape[3] // 2], reference[f"stage{i}_mid16"]) < 1e-5
    load(eps_probe(state))
    final = model.forward_features(images * PROBE_INPUT)
    assert off(model.forward_head(final), reference["probe_logits"]) < 1e-5
    assert off(model.forward_head(final, pre_logits=True), reference["probe_features"]) < 1e-5


@pytest.mark.parametrize("name", FACTS)
def test_names_and_counts(name):
    parameters, decayed, keys, digest = FACTS[name]
    with torch.device("meta"):
        model = build(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    own = model.state_dict()
    published = {official(key): x for key, x in own.items()}
    assert len(published) == keys
    assert zlib.crc32("".join(f"{key} {list(x.shape)}\n" for key, x in published.items()).encode()) == digest
    assert list(pvt_v2.checkpoint_filter_fn(published, model)) == list(own)
    assert list(pvt_v2.checkpoint_filter_fn(own, model)) == list(own)
    plain, decay = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    assert plain["weight_decay"] == 0 and sum(p.numel() for p in plain["params"]) == parameters - decayed
    assert sum(p.numel() for p in decay["params"]) == decayed
    for module in (model.default_cfg["classifier"], model.default_cfg["first_conv"]):
        assert isinstance(model.get_submodule(module), (nn.Linear, nn.Conv2d))


@torch.no_grad()
def test_initial_values():
    model = build("pvt_v2_b1")
    block = model.stages[1].blocks[1]
    for linear in (block.attn.kv, model.head):
        assert linear.weight.std() == pytest.approx(0.02, rel=0.03)
    assert block.mlp.dwconv.weight.std() == pytest.approx((2 / 9) ** 0.5, rel=0.03)  # here divided by the groups
    assert block.attn.sr.weight.std() == pytest.approx((2 / (16 * 128)) ** 0.5, rel=0.03)
    assert not any(m.bias.any() for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))


def test_drop_path_grows_over_all_blocks():
    with torch.device("meta"):
        model = build("pvt_v2_b3")
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for stage in model.stages for b in stage.blocks]
    assert rates == pytest.approx([0.3 * i / 27 for i in range(28)])
    assert [pvt_v2.VARIANTS[name]["drop_path_rate"] for name in FACTS] == [0.1] * 4 + [0.3] * 3


@pytest.mark.parametrize("size", [(224, 224), (200, 312), (61, 94), (32, 32)])
@torch.no_grad()
def test_features_of_any_size(size):
    model = build("pvt_v2_b0", features_only=True).eval()
    maps = model(torch.randn(1, 3, *size))
    assert model.feature_info.channels() == [32, 64, 160, 256] and model.feature_info.reduction() == [4, 8, 16, 32]
    assert [list(m.shape[2:]) for m in maps] == [[-(-side // stride) for side in size] for stride in (4, 8, 16, 32)]
    assert all(torch.isfinite(m).all() for m in maps)


def test_published_form_of_weights(tmp_path):
    path, donor = tmp_path / "pvt_v2.pth", build(num_classes=5)
    torch.save({"model": {official(name): x for name, x in donor.state_dict().items()}, "epoch": 299}, path)
    model = build(num_classes=9, in_chans=1)
    report = load_pretrained_file(model, path, pvt_v2.checkpoint_filter_fn)
    assert report.adapted == ["patch_embed.proj.weight"] and len(report.replaced) == 2
    assert torch.equal(model.stages[2].blocks[1].mlp.dwconv.weight, donor.stages[2].blocks[1].mlp.dwconv.weight)
    torch.save(dict(donor.state_dict(), surplus=torch.zeros(1)), path)
    with pytest.raises(CheckpointError, match="surplus"):
        load_pretrained_file(model, path, pvt_v2.checkpoint_filter_fn)


@pytest.mark.parametrize("linear", [False, True])
def test_numbers_of_a_config_node(linear):
    model = build("my_pvt", linear=linear, num_classes=3, drop_path_rate=0.2)
    assert len(model.stages) == 3 and model.head.out_features == 3
    model(torch.randn(2, 3, 64, 96)).square().sum().backward()
    assert all(p.grad.any() for p in model.parameters())
    with pytest.raises(ValueError, match="num_heads has 2 entries for 3 stages"):
        build(num_heads=[1, 2])
