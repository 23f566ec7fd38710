"""UPerNet: its counts against the paper's table, its losses by hand, its answers at the size of the image."""

from __future__ import annotations

import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from families import tiny

from config import ConfigError
from models.pyramid import Pyramid
from models.semantic import semantic_loss
from models.upernet import UPerNet


def small(family: str = "crossformer", *opts: object, auxiliary: float = 0.4) -> UPerNet:
    return UPerNet(Pyramid(tiny(family, *opts)), classes=5, width=16, auxiliary=auxiliary)


def batch(size: int = 32) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    maps = torch.randint(0, 5, (2, size, size), generator=generator, dtype=torch.uint8)
    maps[0, :, 20:] = 255
    return torch.randn(2, 3, size, size, generator=generator), [dict(map=one) for one in maps]


@pytest.mark.parametrize("name, count", [
    ("crossformer_small", 62_308_022), ("crossformer_base", 83_622_182), ("crossformer_large", 125_478_836),
    ("swin_tiny_patch4_window7_224", 59_938_982)])
def test_parameters_are_those_of_the_published_models(name: str, count: int) -> None:
    with torch.device("meta"):
        model = UPerNet(Pyramid(timm.create_model(name, num_classes=0)), 150)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model.stride == 32 and all(key.startswith(("backbone.model.", "head.", "auxiliary_head.")) for key in model.state_dict())


def test_logits_are_at_the_images_size() -> None:
    images, _ = batch(40)
    for model, stride in ((small(), 8), (small("galerkin", "MODEL.GALERKIN.PATCH_SIZE", 2), 4)):
        assert model.stride == stride
        with torch.no_grad():
            assert model.eval()(images).shape == (2, 5, 40, 40)


def test_a_tenth_of_the_channels_is_dropped_before_the_classifiers() -> None:
    model = small()
    images, targets = batch()
    for head in (model.head, model.auxiliary_head):
        seen: list[torch.Tensor] = []
        head.classifier[-1].register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        head.classifier[0].register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        for _ in range(8):
            model.train()(images, None, targets)
        before, after = torch.stack(seen[::2]), torch.stack(seen[1::2])
        kept = torch.isclose(after, before / 0.9).all(dim=(3, 4))
        assert ((after == 0).all(dim=(3, 4)) | kept).all() and 0.8 < kept.float().mean() < 0.97


def test_losses_are_means_over_images_that_add_up() -> None:
    model = small()
    images, targets = batch()
    torch.manual_seed(0)
    losses = model.train()(images, None, targets)
    assert set(losses) == {"loss_semantic", "loss_auxiliary"} and all(value.isfinite() and value > 0 for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())

    logits, maps = torch.randn(2, 5, 8, 8), torch.stack([target["map"] for target in targets]).long()
    by_hand = [F.cross_entropy(F.interpolate(logits[i:i + 1], (32, 32), mode="bilinear"), maps[i:i + 1], ignore_index=255) for i in (0, 1)]
    assert torch.isclose(semantic_loss(logits, maps), sum(by_hand) / 2)
    assert torch.isclose(semantic_loss(logits[:1], maps[:1]), by_hand[0])


def test_pixels_that_are_all_ignored_give_zero() -> None:
    logits = torch.randn(2, 5, 8, 8, requires_grad=True)
    loss = semantic_loss(logits, torch.full((2, 32, 32), 255))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


def test_no_auxiliary_head_at_weight_zero() -> None:
    model = small(auxiliary=0.0)
    images, targets = batch()
    assert set(model.train()(images, None, targets)) == {"loss_semantic"} and not any("auxiliary" in key for key in model.state_dict())


def test_what_cannot_be_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    images, targets = batch()
    with pytest.raises(ConfigError, match="BATCH_SIZE"):
        small().train()(images[:1], None, targets[:1])
    with pytest.raises(ConfigError, match="MODEL.DENSE.WIDTH"):
        UPerNet(Pyramid(tiny("swin")), 5, width=15)
    monkeypatch.setitem(sys.modules, "transformers.models.upernet.modeling_upernet", None)
    with pytest.raises(ConfigError, match="requirements-extras.txt"):
        small()
