"""Mask2Former: its counts, its losses against transformers' own, what padding and micro-batches do to them, and its answers."""

from __future__ import annotations

import sys

import pytest
import timm
import torch
from families import tiny
from torch import Tensor

from config import ConfigError
from models.mask2former import Mask2Former
from models.mask2former_loss import mask_losses, masks_of
from models.pyramid import Pyramid

THREE_STAGES = ("MODEL.GALERKIN.DEPTHS", "[1,1,1]", "MODEL.GALERKIN.NUM_HEADS", "[1,2,2]", "MODEL.DROP_PATH_RATE", "0.0")


def small(*opts: object, queries: int = 12) -> Mask2Former:
    torch.manual_seed(0)
    return Mask2Former(Pyramid(tiny("galerkin", *THREE_STAGES, *opts)), classes=3, queries=queries, width=32)


def batch(size: int = 32) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Two images: one of three objects, one of a single one."""
    generator = torch.Generator().manual_seed(1)
    masks = torch.zeros(4, size, size, dtype=torch.bool)
    for i, mask in enumerate(masks):
        mask[4 * i:4 * i + 10, 3 * i:3 * i + 12] = True
    targets = [dict(labels=torch.tensor([0, 2, 1]), masks=masks[:3]), dict(labels=torch.tensor([1]), masks=masks[3:])]
    return torch.randn(2, 3, size, size, generator=generator), targets


def outputs(layers: int = 2, images: int = 2) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return ([torch.randn(images, 12, 4, generator=generator) for _ in range(layers)],
            [torch.randn(images, 12, 8, 8, generator=generator) for _ in range(layers)])


@pytest.fixture
def library() -> object:
    return pytest.importorskip("transformers.models.mask2former.modeling_mask2former")


@pytest.fixture
def same_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same points for every mask and layer, so that only their number and not their order tells."""
    def rand(*shape: int, **_: object) -> Tensor:
        return real(1, *shape[1:], generator=torch.Generator().manual_seed(shape[1])).expand(*shape).clone()
    real = torch.rand
    monkeypatch.setattr(torch, "rand", rand)


@pytest.mark.parametrize("name, classes, count, strides", [
    ("crossformer_small", 80, 49_787_803, [4, 8, 16, 32]), ("crossformer_base", 80, 71_101_963, [4, 8, 16, 32]),
    ("swin_tiny_patch4_window7_224", 80, 47_418_763, [4, 8, 16, 32]), ("galerkin_base", 9, 82_384_458, [2, 4, 8, 16])])
def test_parameters_are_those_of_the_published_shape(name: str, classes: int, count: int, strides: list[int]) -> None:
    with torch.device("meta"):
        model = Mask2Former(Pyramid(timm.create_model(name, num_classes=0)), classes)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model.backbone.strides == strides and model.stride == strides[-1]
    assert any(key.startswith("backbone.model.") for key in model.state_dict())
    kept = {"transformer.queries_embedder.weight", "transformer.queries_features.weight", "transformer.level_embed.weight"}
    assert kept <= model.no_weight_decay() <= dict(model.named_parameters()).keys()


def test_losses_are_transformers_own(library: object, same_points: None) -> None:
    classes, masks = outputs()
    _, targets = batch()
    arguments = library.Mask2FormerConfig(num_labels=3, num_queries=12, train_num_points=256)  # a quarter of 32 x 32
    theirs = library.Mask2FormerLoss(arguments, {})(
        masks[-1], classes[-1], [target["masks"].float() for target in targets], [target["labels"] for target in targets],
        [dict(masks_queries_logits=masks[0], class_queries_logits=classes[0])])
    ours = mask_losses(library, classes, masks, None, targets)
    for name, key, weight in (("loss_class", "cross_entropy", 2), ("loss_mask", "mask", 5), ("loss_dice", "dice", 5)):
        torch.testing.assert_close(ours[name], weight * (theirs[f"loss_{key}"] + theirs[f"loss_{key}_0"]))


def test_losses_of_micro_batches_add_up_by_the_steps_mean(library: object, same_points: None) -> None:
    classes, masks = outputs()
    _, targets = batch()
    whole = mask_losses(library, classes, masks, None, targets, masks_per_image=2.0)
    assert whole == mask_losses(library, classes, masks, None, targets)  # which is these images' own
    parts = [mask_losses(library, [x[i:i + 1] for x in classes], [x[i:i + 1] for x in masks], None, targets[i:i + 1], 2.0) for i in (0, 1)]
    for name in whole:
        torch.testing.assert_close(2 * whole[name], parts[0][name] + parts[1][name])


def test_padding_does_not_count(library: object) -> None:
    classes, masks = outputs()
    _, targets = batch()
    sizes = torch.tensor([[32, 16], [20, 32]])
    losses = []
    for value in (0.0, 50.0):
        for image, (height, width) in enumerate(sizes):
            for layer in masks:
                layer[image, :, height // 4 + 1:] = value  # a pixel of the map is interpolated with its neighbour
                layer[image, :, :, width // 4 + 1:] = value
        torch.manual_seed(0)
        losses.append(mask_losses(library, classes, masks, sizes, targets))
    assert losses[0] == losses[1]
    torch.manual_seed(0)
    assert mask_losses(library, classes, masks, None, targets) != losses[1]


def test_a_map_gives_one_mask_a_class() -> None:
    index = torch.full((4, 6), 255, dtype=torch.uint8)
    index[:2], index[3, 5] = 7, 2
    labels, masks = masks_of(dict(map=index))
    assert labels.tolist() == [2, 7] and masks.sum(dim=(1, 2)).tolist() == [1, 12]


def test_answers_and_gradients() -> None:
    model = small("MODEL.GALERKIN.PATCH_SIZE", 2)
    images, targets = batch()
    with torch.inference_mode():
        found = model.eval()(images)
    assert found["class_logits"].shape == (2, 12, 4) and found["mask_logits"].shape == (2, 12, 16, 16) and model.stride == 8
    empty = dict(labels=torch.zeros(0, dtype=torch.long), masks=torch.zeros(0, 32, 32, dtype=torch.bool))
    many = dict(labels=torch.zeros(15, dtype=torch.long), masks=torch.ones(15, 32, 32, dtype=torch.bool))  # more than queries
    for shown in (targets, [empty, empty], [targets[0], empty], [many, empty], [dict(map=torch.zeros(32, 32, dtype=torch.uint8))] * 2):
        losses = model.train()(images, torch.tensor([[32, 32], [24, 30]]), shown)
        assert set(losses) == {"loss_class", "loss_mask", "loss_dice"} and all(loss.isfinite() for loss in losses.values())
        model.zero_grad()
        sum(losses.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())  # none unused, as DDP needs it


def test_autocast_leaves_the_losses_in_float32() -> None:
    images, targets = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = small().train()(images, None, targets)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


def test_a_seed_repeats_every_bit() -> None:
    model, (images, targets) = small(), batch()
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        model.zero_grad()
        sum(model.train()(images, None, targets).values()).backward()
        results.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_cannot_be_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="MODEL.NAME"):
        Mask2Former(Pyramid(tiny("galerkin")), 3)
    with pytest.raises(ConfigError, match="MODEL.DENSE.WIDTH"):
        Mask2Former(Pyramid(tiny("galerkin", *THREE_STAGES)), 3, width=48)
    monkeypatch.setitem(sys.modules, "transformers.models.mask2former.modeling_mask2former", None)
    with pytest.raises(ConfigError, match="requirements-extras.txt"):
        small()
