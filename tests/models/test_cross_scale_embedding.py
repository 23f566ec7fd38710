"""CrossFormer's cross-scale embedding: what its kernels see, and its form in blocks of pixels."""

from __future__ import annotations

import pytest
import torch
from gradients import close, gradients, in_bf16
from torch import Tensor, nn

from models import cpu_bf16
from models.cross_scale_embedding import CrossScaleEmbedding
from models.ops import join_squares, space_to_depth, windows


@torch.no_grad()
def test_embedding_kernels_see_the_same_centre() -> None:
    """Each kernel of the cross-scale embedding is centred on the token's own patch."""
    embedding = CrossScaleEmbedding(32, norm=False)
    for p in embedding.parameters():
        nn.init.ones_(p) if p.ndim > 1 else nn.init.zeros_(p)
    image = torch.zeros(1, 3, 64, 64)
    image[..., 33, 33] = 1  # inside patch (8, 8)
    reached = embedding(image)[0, ..., [0, 16, 24, 28]] > 0
    for scale, reach in enumerate((0, 1, 2, 4)):
        ys = reached[..., scale].nonzero()[:, 0]
        assert ys.min() >= 8 - reach and ys.max() <= 8 + reach and bool(reached[8, 8, scale])


@pytest.mark.parametrize("kernels", [(4, 8, 16, 32), (4,), (4, 12, 16), (4, 8, 10), (2, 4)])
@pytest.mark.parametrize("image_needs_gradient", [False, True])
def test_embedding_in_blocks_is_the_convolutions(kernels: tuple[int, ...], image_needs_gradient: bool) -> None:
    torch.manual_seed(0)
    embedding = CrossScaleEmbedding(32, kernels, norm=False).double()
    x = torch.randn(2, 3, 45, 38, dtype=torch.float64, requires_grad=image_needs_gradient)
    found = []
    for training in (True, False):
        embedding.train(training)
        y = embedding(x)
        inputs = [*embedding.parameters(), *([x] if image_needs_gradient else [])]
        found.append([y, *torch.autograd.grad((y * torch.arange(y.numel()).view_as(y).cos()).sum(), inputs)])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kernels", [(4, 8, 16, 32), (4, 8, 10), (2, 4), (4, 16, 8), (3, 5, 9)])
@pytest.mark.parametrize("channels", [1, 3, 13])
@pytest.mark.parametrize("image_needs_gradient", [False, True])
def test_embedding_by_products_is_the_convolutions(kernels: tuple[int, ...], channels: int, image_needs_gradient: bool) -> None:
    torch.manual_seed(0)
    embedding = CrossScaleEmbedding(32, kernels, channels, norm=False).double().eval()
    x = torch.randn(2, channels, 45, 38, dtype=torch.float64, requires_grad=image_needs_gradient)
    inputs = [*embedding.parameters(), *([x] if image_needs_gradient else [])]
    plain, ours = (gradients(lambda *_, f=f: f(x), *inputs) for f in (embedding, embedding.sample_by_products))
    assert all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(plain, ours, strict=True))


def test_embedding_by_products_compiled_and_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    embedding, x = CrossScaleEmbedding(32, in_chans=4), torch.randn(2, 4, 45, 38)
    plain = gradients(lambda *_: embedding(x), *embedding.parameters())
    monkeypatch.setattr(CrossScaleEmbedding, "pays_as_products", lambda *_: True)
    compiled = torch.compile(embedding, fullgraph=True, backend="aot_eager")
    for run in (embedding, compiled):
        assert close(gradients(lambda *_, f=run: f(x), *embedding.parameters()), plain, 1e-4)
        halves = in_bf16(run)
        assert close(gradients(lambda *_, f=halves: f(x), *embedding.parameters()), plain, 0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("pays", [True, False])
def test_embedding_on_cuda_in_bf16(train: bool, pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    embedding, x = CrossScaleEmbedding(32).train(train), torch.randn(2, 3, 45, 38)
    plain = gradients(lambda *_: embedding(x), *embedding.parameters())
    embedding, x = embedding.cuda(), x.cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert embedding.pays_as_products(x)
        monkeypatch.setattr(CrossScaleEmbedding, "pays_as_products", lambda *_: pays)
        ours = gradients(lambda *_: embedding(x), *embedding.parameters())
    assert close([o.cpu() for o in ours], plain, 0.05)


def test_only_a_16_bit_gpu_pays_for_products() -> None:
    assert not CrossScaleEmbedding(32).pays_as_products(torch.randn(1, 3, 32, 32).bfloat16())


@pytest.mark.parametrize("kernels", [(2, 4, 8, 16), (4, 8, 16, 32)])
@pytest.mark.parametrize("channels", [3, 4])
def test_the_embedding_is_right_in_bf16(kernels: tuple[int, ...], channels: int) -> None:
    torch.manual_seed(0)
    embed, x = cpu_bf16.replace_layers(CrossScaleEmbedding(32, kernels, channels)), torch.randn(2, channels, 32, 32)
    weights = tuple(embed.parameters())
    for mode in (True, False):
        embed.train(mode)
        plain, ours = (gradients(lambda *_, f=f: f(x), *weights) for f in (embed, in_bf16(embed)))
        assert close(ours, plain, 0.05), mode


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_space_to_depth_by_rows(dtype: torch.dtype) -> None:
    x = torch.arange(2 * 3 * 8 * 12).view(2, 3, 8, 12).to(dtype)
    expected = space_to_depth(x.clone().requires_grad_(), 4)
    assert torch.equal(space_to_depth(x, 4), expected)
    assert torch.equal(space_to_depth(x.to(memory_format=torch.channels_last), 4), expected)
    assert torch.equal(expected[1, 1, 2], x[1, :, 4:8, 8:12].flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows_by_several_pixels_at_once(dtype: torch.dtype) -> None:
    x = torch.arange(2 * 3 * 20 * 28).view(2, 3, 20, 28).to(dtype)
    found = windows(x, 12, 8, 4)
    assert torch.equal(found, windows(x.clone().requires_grad_(), 12, 8, 4)) and found.shape == (2, 2, 3, 3 * 12 * 12)
    assert torch.equal(found[1, 1, 2], x[1, :, 8:20, 16:28].flatten())
    for left, top in ((4, 3), (5, 4)):  # parts of an image, the second not on whole units
        part = x[:, :, top:top + 12, left:left + 20]
        assert torch.equal(windows(part, 12, 8, 4), windows(part.contiguous(), 12, 8, 4))


@pytest.mark.parametrize("widths", [(8, 16), (4, 8), (3, 5)])
def test_squares_joined_by_several_channels_at_once(widths: tuple[int, int]) -> None:
    """In bf16 the first move 8 channels at once, the second 4, the last one."""
    maps = [torch.randn(2, 8 // side, 4 // side, side * side * width).bfloat16().requires_grad_()
            for side, width in zip((2, 4), widths, strict=True)]
    joined = join_squares(maps, (2, 4))
    assert joined.shape == (2, 8, 4, sum(widths))
    assert torch.equal(joined[1, 5, 2, :widths[0]], maps[0][1, 2, 1, 2 * widths[0]:3 * widths[0]])  # row 1, column 0 of its square
    assert torch.equal(joined[1, 5, 2, widths[0]:], maps[1][1, 1, 0, 6 * widths[1]:7 * widths[1]])  # row 1, column 2
    pull = torch.randn(joined.shape).bfloat16()
    expected = gradients_of_compiled(maps, pull)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(joined, maps, pull), expected, strict=True))


def gradients_of_compiled(maps: list[Tensor], pull: Tensor) -> tuple[Tensor, ...]:
    """By the form that ``torch.compile`` sees."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        return torch.autograd.grad(join_squares(maps, (2, 4)), maps, pull)
