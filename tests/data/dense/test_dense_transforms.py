"""Images and what they show change together."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from fake_source import COLOURS, Rectangles, config_for, loaders_of
from torch import Tensor
from torchvision import tv_tensors

from data.dense.base import IGNORED
from data.dense.bit_masks import boxes_around, chosen, fitted, nearest, packed, unpacked
from data.dense.packing import beyond
from data.dense.transforms import EvalTransform, TrainTransform, padded_size, paste, resized_size

SIZES = [(60, 80), (80, 60), (60, 80), (48, 96), (60, 80), (80, 60), (70, 70), (60, 80), (90, 50), (60, 80)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Rectangles:
    return Rectangles(tmp_path_factory.mktemp("rectangles"), SIZES)


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Rectangles:
    return Rectangles(tmp_path_factory.mktemp("maps"), SIZES, "maps")


def bytes_of(images: Tensor) -> Tensor:
    """(B, 3, H, W) in 0 to 255 of normalised ones."""
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return 255 * (images * std + mean)


def coloured(pixels: Tensor, labels: Tensor) -> Tensor:
    """Share of (H, W, 3) pixels that have the colour of their (H, W) class, of those that have a class."""
    wanted = torch.tensor(COLOURS, dtype=torch.float32)[labels.clamp(max=1).long()]
    return ((pixels - wanted).abs().amax(dim=-1) < 60)[labels != IGNORED].float().mean()


def sample_of(height: int, width: int, boxes: list[list[int]], labels: list[int]) -> dict:
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    return dict(image=tv_tensors.Image(torch.randint(256, (3, height, width), dtype=torch.uint8)), labels=torch.tensor(labels),
                boxes=tv_tensors.BoundingBoxes(torch.tensor(boxes, dtype=torch.float32), format="XYXY", canvas_size=(height, width)),
                masks=functools.partial(chosen, masks))


@pytest.mark.parametrize("opts", [
    (), ("DATA.DENSE.SHORT_SIDE", "[40, 64, 100]"), ("DATA.DENSE.CROP", 48, "DATA.DENSE.SCALE", "[0.5, 2]"),
    ("DATA.DENSE.DETR_CROPS", True),
    ("DATA.DENSE.COPY_PASTE", 1.0, "DATA.DENSE.CROP", 64), ("AUG.VFLIP", 0.5)])
def test_masks_boxes_and_labels_stay_with_their_pixels(source: Rectangles, opts: tuple) -> None:
    found = 0
    for epoch in range(2):
        for batch in list(loaders_of("instance", source, None, "DATA.DENSE.ASPECT_GROUPS", False, *opts).batches(2 * epoch))[:2]:
            for image, shown, (height, width) in zip(bytes_of(batch.images), batch.objects(), batch.sizes.tolist(), strict=True):
                for mask, box, label in zip(shown["masks"], shown["boxes"], shown["labels"], strict=True):
                    classes = torch.where(mask, label, IGNORED)
                    assert mask.sum() < 20 or coloured(image.permute(1, 2, 0), classes) > 0.8
                    left, top, right, bottom = box.tolist()
                    assert 0 <= left <= right - 1 and 0 <= top <= bottom - 1 and right <= width and bottom <= height
                    assert (boxes_around(packed(mask[None]))[0] - box).abs().max() <= 1
                    found += 1
    assert found > 12


@pytest.mark.parametrize("opts", [("DATA.DENSE.CROP", 48, "DATA.DENSE.SCALE", "[0.5, 2]"), ("DATA.DENSE.SHORT_SIDE", "[40, 100]")])
def test_maps_stay_with_their_pixels(maps: Rectangles, opts: tuple) -> None:
    batch = next(loaders_of("semantic", maps, None, *opts).batches())
    for image, shown, (height, width) in zip(bytes_of(batch.images), batch.maps, batch.sizes.tolist(), strict=True):
        assert (shown[height:] == IGNORED).all() and (shown[:, width:] == IGNORED).all()
        assert (shown == IGNORED).all() or coloured(image.permute(1, 2, 0), shown) > 0.8
    # a mask for each class of the same maps
    other = next(loaders_of("mask", maps, None, *opts).batches())
    assert torch.equal(other.images, batch.images) and not len(other.maps)
    for shown, parts in zip(batch.maps, other.objects(), strict=True):
        assert parts["labels"].tolist() == [label for label in (0, 1) if (shown == label).any()]
        assert all(torch.equal(mask, shown == label) for mask, label in zip(parts["masks"], parts["labels"], strict=True))


def test_sizes_of_evaluation_and_padding() -> None:
    assert resized_size(480, 640, 800, 1333) == (800, 1067) and resized_size(300, 900, 800, 1333) == (444, 1333)
    assert padded_size(800, 1067, 32) == (800, 1088) and padded_size(64, 64, 16) == (64, 64)
    transform = EvalTransform(config_for("detection", "DATA.DENSE.SHORT_SIDE", "[480, 800]", "DATA.DENSE.LONG_SIDE", 1333))
    assert transform(torch.zeros(3, 48, 64, dtype=torch.uint8)).shape == (3, 800, 1067)


def test_masks_are_resized_by_the_pixel_below_each_centre() -> None:
    assert nearest(4, 2).tolist() == [1, 3] and nearest(2, 4).tolist() == [0, 0, 1, 1] and nearest(9, 9).tolist() == list(range(9))
    assert (nearest(71, 51) == 70 - nearest(71, 51).flip(0)).all()  # mirrored, it is the mirror of the resized
    masks = torch.from_numpy(np.random.RandomState(0).randint(0, 2, (3, 17, 21)).astype(np.uint8))
    rows, columns = nearest(17, 40).flip(0)[3:30], nearest(21, 13)[2:]
    bits = chosen(masks, rows, columns)
    assert bits.shape == (3, 27, 2) and torch.equal(unpacked(bits, 11), masks[:, rows][:, :, columns].bool())
    assert torch.equal(bits, packed(masks[:, rows][:, :, columns]))
    for height, width in ((5, 3), (30, 11), (9, 40)):
        whole = torch.zeros(3, 50, 50, dtype=torch.bool)
        whole[:, :27, :11] = unpacked(bits, 11)
        assert torch.equal(fitted(bits, height, width), packed(whole[:, :height, :width]))


def test_what_a_crop_leaves_nothing_of_is_dropped_with_its_label_and_mask() -> None:
    transform = TrainTransform(config_for("instance", "DATA.DENSE.CROP", "[10, 20]", "AUG.HFLIP", 0, "DATA.DENSE.LONG_SIDE", 9999))
    sample = sample_of(64, 64, [[0, 0, 30, 64], [30, 0, 64, 64], [2, 2, 3, 3]], [0, 1, 1])
    for seed in range(20):
        torch.manual_seed(seed)
        found = transform.finish(transform.place(sample))
        assert len(found["boxes"]) == len(found["labels"]) == len(found["masks"]) and found["image"].shape == (3, 10, 20)
        assert torch.equal(boxes_around(found["masks"]), found["boxes"].as_subclass(Tensor)) and found["masks"].flatten(1).any(1).all()


def test_degenerate_boxes_without_masks_are_dropped() -> None:
    transform = TrainTransform(config_for("detection", "AUG.HFLIP", 0))
    sample = sample_of(64, 64, [[0, 0, 30, 64], [5, 5, 5, 9], [60, 60, 70, 90]], [0, 1, 1])
    del sample["masks"]
    found = transform.finish(transform.place(sample))
    assert found["labels"].tolist() == [0, 1] and found["boxes"].tolist() == [[0, 0, 30, 64], [60, 60, 64, 64]]


def test_a_crop_is_drawn_anew_where_one_class_has_too_much_of_it() -> None:
    shown = torch.zeros(64, 64, dtype=torch.uint8)
    shown[:, 40:] = 1
    sample, shares = dict(image=tv_tensors.Image(torch.zeros(3, 64, 64, dtype=torch.uint8)), map=shown), {}
    for most in (1.0, 0.75):
        transform = TrainTransform(config_for("semantic", "DATA.DENSE.CROP", 24, "DATA.DENSE.CROP_CATEGORY", most))
        shares[most] = []
        for seed in range(60):
            torch.manual_seed(seed)
            part = transform.place(sample)["map"]
            shares[most].append(max((part == 0).float().mean().item(), (part == 1).float().mean().item()))
    assert np.mean(np.array(shares[1.0]) > 0.75) > 0.5 and np.mean(np.array(shares[0.75]) > 0.75) < 0.1


def test_pasted_objects_hide_what_lies_below() -> None:
    torch.manual_seed(1)
    below, above = sample_of(40, 40, [[0, 0, 20, 20], [20, 20, 40, 40]], [0, 0]), sample_of(30, 50, [[10, 10, 30, 30]] * 8, [1] * 8)
    found = paste(*(sample | dict(masks=sample["masks"](*map(torch.arange, sample["image"].shape[1:]))) for sample in (below, above)))
    found["masks"] = unpacked(found["masks"], 40)
    assert 2 < len(found["labels"]) < 10 and found["labels"].tolist()[:2] == [0, 0] and found["labels"][2:].eq(1).all()
    assert torch.equal(found["image"][:, 10:30, 10:30], above["image"][:, 10:30, 10:30])
    assert torch.equal(found["image"][:, 30:], below["image"][:, 30:])
    assert found["masks"][:2, 10:30, 10:30].sum() == 0 and found["masks"][0].sum() == 300
    assert found["masks"][2:].flatten(1).sum(dim=1).eq(400).all()


def test_colours_change_and_nothing_else(source: Rectangles) -> None:
    plain, odd = (next(loaders_of("instance", source, None, "DATA.DENSE.PHOTOMETRIC", on).batches()) for on in (False, True))
    assert torch.equal(plain.boxes, odd.boxes) and torch.equal(plain.masks, odd.masks) and not torch.equal(plain.images, odd.images)


def test_padding_is_found_all_at_once_as_on_a_gpu() -> None:
    sizes = torch.tensor([[5, 7], [8, 3], [8, 9], [0, 9]])
    there = torch.ones(4, 2, 8, 9, dtype=torch.bool)
    for image, (height, width) in zip(there, sizes.tolist(), strict=True):
        image[:, :height, :width] = False
    assert torch.equal(beyond(sizes, 8, 9).expand(-1, 2, -1, -1), there)
