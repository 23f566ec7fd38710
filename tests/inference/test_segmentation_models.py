"""Several views of an image for a semantic model: equal to the plain model where there is one view, exact where that can be known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from config import get_config
from utils.inference.segmentation_models import SegmentationViews, fitted, mirrored, segmentation_model, starts


class Pointwise(nn.Module):
    """Logits of a pixel from its colour alone; keeps what it saw."""

    stride = 8

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = nn.Conv2d(3, 4, 1), []
        self.layer.weight.data *= 5

    def forward(self, images: Tensor, sizes: Tensor) -> Tensor:
        assert images.shape[2] % self.stride == images.shape[3] % self.stride == 0
        self.seen.append((tuple(images.shape[2:]), sizes.tolist()))
        return self.layer(images)


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    """Two images of 30 x 40 and 32 x 21 in 32 x 40."""
    torch.manual_seed(0)
    sizes, images = torch.tensor([[30, 40], [32, 21]]), torch.zeros(2, 3, 32, 40)
    for image, (height, width) in zip(images, sizes.tolist(), strict=True):
        image[:, :height, :width] = torch.rand(3, height, width)
    return images, sizes


def own(logits: Tensor, sizes: Tensor) -> list[Tensor]:
    return [one[:, :height, :width] for one, (height, width) in zip(logits, sizes.tolist(), strict=True)]


def close(found: Tensor, expected: Tensor, sizes: Tensor) -> bool:
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(own(found, sizes), own(expected, sizes), strict=True))


@torch.no_grad()
def test_one_view_is_the_plain_model_and_a_config_without_wishes_gives_the_model_itself(images) -> None:
    model = Pointwise()
    assert segmentation_model(get_config(None, ["TASK", "semantic"]), model) is model
    plain = model(*images)
    assert torch.equal(SegmentationViews(model)(*images), plain)
    assert torch.equal(SegmentationViews(model, window=(32, 40))(*images), plain)
    assert torch.equal(SegmentationViews(model, window=(99, 99))(*images), plain)
    wanted = segmentation_model(get_config(None, ["TASK", "semantic", "TEST.SCALES", "[0.5, 1.0]", "TEST.FLIP", "logits",
                                                  "TEST.SLIDE", "[24, 16]"]), model)
    assert (wanted.scales, wanted.flip, wanted.window, wanted.stride) == ((0.5, 1.0), "logits", (24, 16), 8)
    assert segmentation_model(get_config(None, ["TASK", "semantic", "TEST.SLIDE", "64"]), model).window == (64, 64)


@torch.no_grad()
@pytest.mark.parametrize("window", [(24, 16), (8, 8), (13, 11)])
def test_windows_cover_every_pixel_and_their_mean_is_the_whole_where_pixels_stand_alone(images, window) -> None:
    model = Pointwise()
    assert torch.allclose(SegmentationViews(model, window=window)(*images), model(*images), atol=1e-5)
    assert max(size[0] for size, _ in model.seen[:-1]) <= 24 and len(model.seen) > 4
    for length, side in ((40, 16), (40, 40), (7, 16), (41, 3)):
        begun = starts(length, side)
        covered = {pixel for start in begun for pixel in range(start, min(length, start + side))}
        assert covered == set(range(length)) and begun[-1] + side == max(length, side) and begun == sorted(set(begun))


class Smoothing(Pointwise):
    """A pixel's logits hang on its neighbours, with another weight to either side."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 5, padding=2)


@torch.no_grad()
@pytest.mark.parametrize("mean", ["logits", "probabilities"])
def test_a_mirrored_view_is_laid_back_onto_the_image(images, mean: str) -> None:
    model, (pixels, sizes) = Smoothing(), images
    found = SegmentationViews(model, flip=mean)(pixels, sizes)
    for number, (height, width) in enumerate(sizes.tolist()):  # alone, mirrored by hand
        alone = torch.zeros(1, 3, 32, 40)
        alone[0, :, :height, :width] = pixels[number, :, :height, :width].flip(2)
        both = [model(pixels, sizes)[number, :, :height, :width], model(alone, sizes)[0, :, :height, :width].flip(2)]
        expected = sum(both) / 2 if mean == "logits" else (sum(one.softmax(0) for one in both) / 2).log()
        assert torch.allclose(found[number, :, :height, :width], expected, atol=1e-5)
    assert torch.equal(mirrored(mirrored(pixels, sizes), sizes), pixels)


@torch.no_grad()
def test_scales_resize_an_image_within_its_own_pixels_and_do_not_hang_on_its_neighbours(images) -> None:
    model, (pixels, sizes) = Smoothing(), images
    views = SegmentationViews(model, (0.5, 1.0, 1.75), "probabilities")
    together = views(pixels, sizes)
    assert [seen for seen, _ in model.seen] == [(16, 24)] * 2 + [(32, 40)] * 2 + [(56, 72)] * 2
    assert model.seen[0][1] == [[15, 20], [16, 10]] and model.seen[-1][1] == [[52, 70], [56, 37]]
    for number in range(2):
        assert close(views(pixels[number:number + 1], sizes[number:number + 1]), together[number:number + 1], sizes[number:number + 1])
    assert torch.allclose(own(together, sizes)[0].exp().sum(0), torch.ones(30, 40), atol=1e-5)
    model.layer.weight.data.zero_()  # constant logits stay so at every scale, up to the borders
    flat = own(SegmentationViews(model, (0.5, 2.0), "logits")(pixels, sizes), sizes)
    assert all(torch.allclose(one, model.layer.bias[:, None, None].expand_as(one), atol=1e-6) for one in flat)
    assert torch.equal(fitted(pixels, sizes, sizes, (32, 40)), pixels)
