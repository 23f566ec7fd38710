"""Operations in their fastest form: the same numbers and gradients as the plain one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import ops


def gradients(f: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The output of ``f``, and the gradients of its inputs for a fixed gradient of the output."""
    y = f(*inputs)
    pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, inputs, pull)]


def close(ours: list[Tensor], plain: list[Tensor], limit: float) -> bool:
    return all(a.shape == b.shape and float((a.float() - b.float()).abs().max() / b.float().abs().max()) < limit
               for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kernel", "stride", "size"), [
    (3, 1, (6, 9)), (3, 2, (6, 9)), (3, 2, (7, 4)), (5, 1, (6, 9)), (7, 1, (2, 5)), (5, 2, (6, 9))])
def test_depthwise_convolution(kernel, stride, size, dtype, skip):
    if skip and stride > 1:
        return
    torch.manual_seed(0)
    conv, x = ops.DepthwiseConv2d(10, kernel, stride, skip=skip), torch.randn(2, 10, *size, requires_grad=True)
    given = (x, *conv.parameters())

    def ours(x: Tensor, *_: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
            return conv(x)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.conv2d(x, weight, bias, stride, kernel // 2, groups=10)
        return (x + y if skip else y).to(dtype)

    assert ours(x).dtype == dtype
    assert close(gradients(ours, *given), gradients(plain, *given), 1e-5 if dtype == torch.float32 else 0.03)
    with torch.no_grad():
        assert torch.allclose(conv(x), plain(*given).float(), atol=1e-6 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1)])
def test_large_depthwise_maps_in_slices_of_channels(monkeypatch, kernel, stride):
    monkeypatch.setattr(ops, "LARGE_MAP", 100)
    monkeypatch.setattr(ops, "_FEW_CHANNELS", 4)
    test_depthwise_convolution(kernel, stride, (6, 9), torch.bfloat16, stride == 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, dtype=dtype, requires_grad=True) for n in (9, 5, 5))

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q.float() @ k.float().transpose(-2, -1) * 0.3).softmax(-1) @ v.float()).to(dtype)

    drop = nn.Dropout(0.5).eval()
    limit = 1e-5 if dtype == torch.float32 else 0.03
    assert close(gradients(lambda *t: ops.attend(*t, 0.3, drop), q, k, v), gradients(plain, q, k, v), limit)
    with torch.no_grad():
        assert close([ops.attend(q, k, v, 0.3, drop)], [plain(q, k, v)], limit)
    assert not torch.allclose(ops.attend(q, k, v, 0.3, drop.train()), plain(q, k, v), atol=0.1)


@pytest.mark.parametrize("size", [(4, 6), (5, 6), (6, 7)])  # whole patches, and a row or a column left over
def test_merged_patches(size):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(5, 7, 2, stride=2), torch.randn(2, *size, 5, requires_grad=True)
    given = (x, *conv.parameters())
    plain = gradients(lambda x, *_: conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), *given)
    assert close(gradients(lambda x, *_: ops.merge_patches(conv, x), *given), plain, 1e-5)
    with torch.no_grad():
        assert close([ops.merge_patches(conv, x)], plain[:1], 1e-5)


def test_batch_norm_in_the_convolution():
    torch.manual_seed(0)
    conv, norm, x = nn.Conv2d(4, 6, 3, 2, 1, groups=2, bias=False), nn.BatchNorm2d(6), torch.randn(3, 4, 7, 8, requires_grad=True)
    for p in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        p.data.uniform_(0.5, 1.5)
    given = (x, *conv.parameters(), *norm.parameters())
    for training in (False, True, False):  # the last time with other statistics than the first
        norm.train(training)
        plain = gradients(lambda x, *_: norm(conv(x)), *given)
        if training:
            norm.running_mean.mul_(0.9)
        assert close(gradients(lambda x, *_: ops.conv_norm(conv, norm, x), *given), plain, 1e-5)


def test_one_graph_for_training():
    """A model's own gradients pass torch.compile without a break and keep their values."""
    torch.manual_seed(0)
    net = nn.Sequential(ops.DepthwiseConv2d(8, 3, 2, bias=False), ops.DepthwiseConv2d(8, 5, skip=True))
    x = torch.randn(2, 8, 6, 6, requires_grad=True)

    def run(f: Callable[[Tensor], Tensor]) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return gradients(lambda x, *_: f(x), x, *net.parameters())

    assert close(run(torch.compile(net, fullgraph=True, backend="aot_eager")), run(net), 0.03)
