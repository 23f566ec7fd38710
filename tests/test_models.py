"""The timm protocol, whole, for every name that importing ``models`` registers; on tensors without storage."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from timm.models._manipulate import group_with_matcher

import models
from config import get_config

WIDTHS = {
    "crossformer_tiny": [64, 128, 256, 512], "crossformer_small": [96, 192, 384, 768], "crossformer_base": [96, 192, 384, 768],
    "crossformer_large": [128, 256, 512, 1024], "crossformer_pp_small": [64, 128, 256, 512], "crossformer_pp_base": [96, 192, 384, 768],
    "crossformer_pp_large": [128, 256, 512, 1024], "crossformer_pp_huge": [128, 256, 512, 1024], "cvt_13": [64, 192, 384],
    "cvt_21": [64, 192, 384], "cvt_w24": [192, 768, 1024], "shunted_t": [64, 128, 256, 512], "shunted_s": [64, 128, 256, 512],
    "shunted_b": [64, 128, 256, 512], "mpvit_tiny": [96, 176, 216, 216], "mpvit_xsmall": [128, 192, 256, 256],
    "mpvit_small": [128, 216, 288, 288], "mpvit_base": [224, 368, 480, 480], "pvt_tiny": [64, 128, 320, 512],
    "pvt_small": [64, 128, 320, 512],
    "pvt_medium": [64, 128, 320, 512], "pvt_large": [64, 128, 320, 512], "galerkin_tiny": None, "galerkin_small": None,
    "galerkin_base": [128, 256, 512, 1024],
}


ONE_A_FAMILY = ["crossformer_tiny", "crossformer_pp_small", "cvt_13", "shunted_t", "mpvit_tiny", "pvt_tiny", "galerkin_tiny"]


def make(name: str, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs).eval()


def image(height: int = 224, width: int = 224, channels: int = 3) -> torch.Tensor:
    return torch.empty(2, channels, height, width, device="meta")


def test_names_are_registered_and_nobody_elses() -> None:
    assert all(timm.is_model(name) for name in WIDTHS)
    modules = {timm.model_entrypoint(name).__module__ for name in WIDTHS}
    assert modules == {"models.crossformer", "models.cvt", "models.shunted", "models.mpvit", "models.pvt", "models.galerkin"}
    assert timm.model_entrypoint("pvt_v2_b0").__module__ == "timm.models.pvt_v2"
    assert timm.model_entrypoint("swin_tiny_patch4_window7_224").__module__ == "timm.models.swin_transformer"


@pytest.mark.parametrize("name", WIDTHS)
def test_classifier_protocol(name: str) -> None:
    model = make(name, in_chans=1)
    side = model.default_cfg["input_size"][1]
    x = image(side, side, 1)
    assert model(x).shape == (2, 1000)
    features = model.forward_features(x)
    assert model.forward_head(features).shape == (2, 1000)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size) == (2, model.num_features)
    assert isinstance(model.get_classifier(), torch.nn.Linear) and model.get_classifier().out_features == 1000
    assert model.get_submodule(model.default_cfg["classifier"]) is model.get_classifier()
    first = model.default_cfg["first_conv"]
    convolution = model.get_submodule(first if isinstance(first, str) else first[0])
    assert isinstance(convolution, torch.nn.Conv2d) and convolution.in_channels == 1
    model.reset_classifier(7)
    assert model.forward_head(features).shape == (2, 7) and model.num_classes == 7
    model.reset_classifier(0)
    assert model.forward_head(features).shape == (2, model.num_features)
    model.reset_classifier(5, "")
    assert model.forward_head(features).ndim > 2 and model.forward_head(features).shape[-1] == 5
    assert set(model.no_weight_decay()) <= {n for n, _ in model.named_parameters()}
    model.set_grad_checkpointing(True)
    assert model.grad_checkpointing


@pytest.mark.parametrize("name", WIDTHS)
def test_features_of_any_size(name: str) -> None:
    backbone = make(name, features_only=True)
    channels, reductions = backbone.feature_info.channels(), backbone.feature_info.reduction()
    first = 2 if name == "galerkin_base" else 4
    assert reductions == [first * 2 ** i for i in range(len(channels))]
    if WIDTHS[name]:
        assert channels == WIDTHS[name]
    for height, width in ((200, 312), (800, 1333)) if name in ONE_A_FAMILY else ((200, 312),):
        maps = backbone(image(height, width))
        for y, channel, reduction in zip(maps, channels, reductions, strict=True):
            assert y.shape[:2] == (2, channel)
            for side, whole in zip(y.shape[2:], (height, width), strict=True):
                assert whole // reduction - 1 <= side <= whole // reduction + 1
    last = make(name, features_only=True, out_indices=(-1,))
    assert last.feature_info.channels() == channels[-1:] and last.feature_info.reduction() == reductions[-1:]


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_intermediates(name: str) -> None:
    model = make(name)
    side = model.default_cfg["input_size"][1]
    x = image(side, side)
    assert make(name, num_classes=0)(x).shape == (2, model.num_features)
    final, maps = model.forward_intermediates(x)
    assert final.shape == model.forward_features(x).shape and len(maps) == len(model.feature_info)
    assert [y.shape[1] for y in maps] == [info["num_chs"] for info in model.feature_info]
    only = model.forward_intermediates(x, indices=1, intermediates_only=True, norm=True, output_fmt="NHWC")
    assert len(only) == 1 and only[0].shape[-1] == model.feature_info[-1]["num_chs"]
    early = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    assert early[0].shape == maps[0].shape
    with pytest.raises(ValueError, match="NCHW or NHWC"):
        model.forward_intermediates(x, output_fmt="NLC")
    kept = model.prune_intermediate_layers([0, 1], prune_norm=True)
    assert list(kept) == [0, 1]
    assert [tuple(y.shape) for y in model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)] == [
        tuple(y.shape) for y in maps[:2]]


@pytest.mark.parametrize("name", WIDTHS)
def test_layers_are_ordered_for_layer_decay(name: str) -> None:
    model = make(name)
    depth = group_with_matcher(model.named_parameters(), model.group_matcher(), reverse=True)
    assert set(depth) == {n for n, _ in model.named_parameters()}
    classifier = model.default_cfg["classifier"]
    assert all(depth[n] == max(depth.values()) for n in depth if n.startswith(classifier + "."))
    first = model.default_cfg["first_conv"]
    first = first if isinstance(first, str) else first[0]
    assert all(depth[n] == 0 for n in depth if n.startswith(first + "."))
    assert len(set(depth.values())) > len(model.feature_info)


def test_the_page_on_adding_a_model_holds_a_whole_one(tmp_path, monkeypatch) -> None:
    """The file on the page, found in a folder of the package, is a classifier of the config and a backbone."""
    page = (Path(__file__).parent.parent / "docs" / "adding-a-model.md").read_text(encoding="utf-8")
    (tmp_path / "plainnet.py").write_text(page.partition("```python\n")[2].partition("```")[0], encoding="utf-8")
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    models.import_all()
    model = models.build_model(get_config(None, ["MODEL.TYPE", "timm", "MODEL.NAME", "plainnet", "DATA.IMG_SIZE", "64"]), 5)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 5)
    assert len(group_with_matcher(model.named_parameters(), model.group_matcher(), reverse=True)) == len(list(model.parameters()))
    maps = timm.create_model("plainnet", features_only=True)(torch.zeros(1, 3, 64, 64))
    assert [tuple(m.shape) for m in maps] == [(1, 32, 16, 16), (1, 64, 8, 8), (1, 128, 4, 4)]
