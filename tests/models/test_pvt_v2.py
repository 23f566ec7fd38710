"""PVTv2 (timm's model): the published names, numbers from the config, any input size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recipe import published_state
from torch import nn

from models import pvt_v2
from models.safe_load import CheckpointError
from models.weights import load_pretrained_file

SMALL = dict(embed_dims=[8, 16, 32], depths=[1, 1, 2], num_heads=[1, 2, 4], mlp_ratios=[2, 2, 2], sr_ratios=[4, 2, 1])


def build(name: str = "pvt_v2_small", size: tuple[int, int] = (224, 224), **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return pvt_v2.build(name, dict(pvt_v2.VARIANTS.get(name, SMALL), **kwargs), size)


@torch.no_grad()
def test_initial_values():
    model = build("pvt_v2_b1")
    block = model.stages[1].blocks[1]
    for linear in (block.attn.kv, model.head):
        assert linear.weight.std() == pytest.approx(0.02, rel=0.03)
    assert block.mlp.dwconv.weight.std() == pytest.approx((2 / 9) ** 0.5, rel=0.03)  # here divided by the groups
    assert block.attn.sr.weight.std() == pytest.approx((2 / (16 * 128)) ** 0.5, rel=0.03)
    assert not any(m.bias.any() for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))


@pytest.mark.parametrize("size", [(224, 224), (200, 312), (61, 94), (32, 32)])
@torch.no_grad()
def test_features_of_any_size(size):
    model = build("pvt_v2_b0", features_only=True).eval()
    maps = model(torch.randn(1, 3, *size))
    assert model.feature_info.channels() == [32, 64, 160, 256] and model.feature_info.reduction() == [4, 8, 16, 32]
    assert [list(m.shape[2:]) for m in maps] == [[-(-side // stride) for side in size] for stride in (4, 8, 16, 32)]
    assert all(torch.isfinite(m).all() for m in maps)


@pytest.mark.parametrize("name", pvt_v2.VARIANTS)
def test_published_names_are_timms_in_order(name: str) -> None:
    with torch.device("meta"):
        model = build(name)
    own, published = model.state_dict(), published_state(model, "pvt_v2")
    assert list(pvt_v2.checkpoint_filter_fn(published, model)) == list(pvt_v2.checkpoint_filter_fn(own, model)) == list(own)


def test_published_form_of_weights(tmp_path: Path) -> None:
    path, donor = tmp_path / "pvt_v2.pth", build(num_classes=5)
    torch.save({"model": published_state(donor, "pvt_v2"), "epoch": 299}, path)
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
