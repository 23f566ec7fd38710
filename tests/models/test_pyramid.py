"""A classifier's body as a backbone: its maps, its names, what is frozen, and models that are none."""

from __future__ import annotations

import pytest
import timm
import torch
from families import FAMILIES
from torch import nn

from config import ConfigError, get_config
from models import build_model
from models.build_dense import build_pyramid
from models.pyramid import Pyramid


def config_of(family: str, *opts: object):
    words = FAMILIES[family].split()
    node = [x for key, value in zip(words[::2], words[1::2], strict=True) for x in (f"MODEL.{family.upper()}.{key}", value)]
    return get_config(None, ["MODEL.TYPE", family, "MODEL.NAME", "tiny", "DATA.IMG_SIZE", "32", "MODEL.DROP_PATH_RATE", "0.2",
                             *node, *map(str, opts)])


def timm_config(name: str, *opts: object):
    return get_config(None, ["MODEL.TYPE", "timm", "MODEL.NAME", name, *map(str, opts)])


@pytest.mark.parametrize("family", FAMILIES)
def test_one_model_gives_a_map_a_stride_of_images_of_any_size(family: str) -> None:
    pyramid = build_pyramid(config_of(family)).eval()
    assert pyramid.strides == [4, 8]
    for batch, height, width in ((1, 32, 32), (2, 40, 72), (1, 96, 56)):
        maps = pyramid(torch.randn(batch, 3, height, width))
        assert [tuple(x.shape) for x in maps] == [(batch, c, height // r, width // r)
                                                  for c, r in zip(pyramid.channels, pyramid.strides, strict=True)]
        assert all(x.isfinite().all() for x in maps)
    with pytest.raises(ValueError, match="44 x 32"):
        pyramid(torch.randn(1, 3, 44, 32))


def test_galerkin_with_patches_of_two_has_strides_2_to_16() -> None:
    with torch.device("meta"):
        pyramid = build_pyramid(get_config(None, ["MODEL.TYPE", "galerkin", "MODEL.NAME", "galerkin_base"]))
        assert pyramid.strides == [2, 4, 8, 16]
        assert [tuple(x.shape[2:]) for x in pyramid(torch.empty(1, 3, 48, 80))] == [(24, 40), (12, 20), (6, 10), (3, 5)]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_holds_the_classifier_under_its_own_names_without_head_and_norm(family: str) -> None:
    classifier, pyramid = build_model(config_of(family), 5).state_dict(), build_pyramid(config_of(family))
    own = {name.removeprefix("model.") for name in pyramid.state_dict()}
    left = {name for name in classifier if name not in own}
    assert own <= set(classifier) and left and all(name.startswith(("norm", "head", "cls_head")) for name in left)
    pyramid.model.load_state_dict({name: tensor for name, tensor in classifier.items() if name in own})


@pytest.mark.parametrize(("name", "channels"), [("swin_tiny_patch4_window7_224", [96, 192, 384, 768]), ("resnet18", [64, 128, 256, 512]),
                                                ("swinv2_tiny_window8_256", [96, 192, 384, 768]), ("efficientnet_b0", [24, 40, 112, 320])])
def test_models_of_timm_give_the_four_coarsest_strides(name: str, channels: list[int]) -> None:
    with torch.device("meta"):
        pyramid = build_pyramid(timm_config(name))
        assert (pyramid.strides, pyramid.channels) == ([4, 8, 16, 32], channels)
        assert [tuple(x.shape[2:]) for x in pyramid(torch.empty(1, 3, 128, 352))] == [(32, 88), (16, 44), (8, 22), (4, 11)]


def test_the_windows_of_a_swin_shift_in_every_stage() -> None:
    with torch.device("meta"):
        pyramid = build_pyramid(get_config(None, ["MODEL.TYPE", "swin", "MODEL.NAME", "swin_tiny"]))
    assert [stage.blocks[1].shift_size for stage in pyramid.model.layers] == [(3, 3)] * 4


def test_maps_of_one_stride_are_told_by_it() -> None:
    """volo's later stages share a stride: the last of them is taken."""
    with torch.device("meta"):
        assert Pyramid(timm.create_model("volo_d1_224", num_classes=0)).indices == [0, 3]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "crossvit_9_240", "volo_d1_224"])
def test_a_model_without_a_hierarchy_or_of_one_size_is_refused(name: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=name):
        build_pyramid(timm_config(name))


def test_each_map_has_a_norm_of_its_own_where_it_is_wanted() -> None:
    pyramid = build_pyramid(config_of("swin", "MODEL.DENSE.OUT_NORM", True)).eval()
    assert [name for name in pyramid.state_dict() if name.startswith("norms.")] == [
        f"norms.{i}.{kind}" for i in range(2) for kind in ("weight", "bias")]
    for x in pyramid(3 * torch.randn(1, 3, 32, 32)):
        assert x.mean(1).abs().max() < 1e-4 and (x.std(1, unbiased=False) - 1).abs().max() < 1e-2


@pytest.mark.parametrize("stages", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_stages_get_no_gradient_and_drop_nothing(family: str, stages: int) -> None:
    pyramid = build_pyramid(config_of(family, "MODEL.DENSE.FROZEN_STAGES", stages)).train()
    first, second = pyramid(torch.randn(2, 3, 32, 32))
    sum(x.square().mean() for x in (first, second)).backward()
    trained = {name.removeprefix("model.") for name, p in pyramid.named_parameters() if p.requires_grad}
    assert all((p.grad is not None) == p.requires_grad for p in pyramid.parameters())
    assert trained and (len(trained) < len(list(pyramid.parameters()))) == (stages > 0)
    assert first.requires_grad == (stages < 2) and second.requires_grad
    assert all(not module.training for module in pyramid.frozen) and pyramid.training
    dropped = {module.training for name, module in pyramid.named_modules() if type(module).__name__ == "DropPath"}
    assert True in dropped
    if stages == 2:
        x = torch.randn(16, 3, 32, 32)
        assert torch.equal(pyramid(x)[0], pyramid(x)[0]) and not torch.equal(pyramid(x)[1], pyramid(x)[1])


def test_more_frozen_stages_than_there_are_are_refused() -> None:
    with pytest.raises(ConfigError, match="FROZEN_STAGES"):
        build_pyramid(config_of("swin", "MODEL.DENSE.FROZEN_STAGES", 3))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_exemptions_from_decay_are_the_classifiers(family: str) -> None:
    pyramid = build_pyramid(config_of(family, "MODEL.DENSE.OUT_NORM", True))
    layers = timm.models.group_parameters(pyramid, pyramid.group_matcher(), reverse=True)
    own = timm.models.group_parameters(pyramid.model, pyramid.model.group_matcher(), reverse=True)
    assert {name.removeprefix("model."): layer for name, layer in layers.items() if name.startswith("model.")} == own
    assert {layer for name, layer in layers.items() if name.startswith("norms.")} == {max(own.values()) + 1}
    assert pyramid.no_weight_decay() == {f"model.{name}" for name in pyramid.model.no_weight_decay()}


def test_a_model_that_gives_its_last_map_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="forward_intermediates"):
        Pyramid(nn.Conv2d(3, 8, 4))
