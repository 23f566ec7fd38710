"""Operations in their fastest form: the same numbers and gradients as the plain one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from families import FAMILIES, tiny
from gradients import close, gradients, in_bf16
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from config import get_config
from models import build_model, cpu_bf16, ops


@pytest.mark.parametrize(("channels", "kernel"), [(12, 8), (4, 16), (8, 8), (3, 32), (16, 4), (24, 8), (48, 4)])
def test_convolutions_are_right_in_bf16(channels: int, kernel: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((2, channels, 40, 40), (8, channels, kernel, kernel), (8,)))

    for padding in (0, 1):
        def conv(*inputs: Tensor, padding: int = padding) -> Tensor:
            return cpu_bf16.conv2d(*inputs, stride=4, padding=padding)

        assert in_bf16(conv)(x, weight, bias).dtype == torch.bfloat16
        assert close(gradients(in_bf16(conv), x, weight, bias), gradients(conv, x, weight, bias), 0.02), padding


@pytest.mark.parametrize(("kernel", "stride", "width"), [(3, 2, 1), (7, 4, 3)])
def test_maps_narrower_than_the_stride_give_no_stray_gradients(kernel: int, stride: int, width: int) -> None:
    torch.manual_seed(0)
    conv = cpu_bf16.replace_layers(nn.Sequential(nn.Conv2d(32, 32, kernel, stride, kernel // 2)))
    for _ in range(3):
        left = [torch.full((2 ** power,), 3e38) for power in range(4, 20) for _ in range(2)]
        del left  # memory to be had again
        conv.zero_grad()
        in_bf16(conv)(torch.ones(2, 32, 3, width)).float().sum().backward()
        assert conv[0].weight.grad.abs().max() <= 2 * 3


@pytest.mark.parametrize(("rows", "shape"), [
    (6, (32, 16)), (6, (16, 16)),
    *((cpu_bf16.VERY_FEW_ROWS + 1, shape) for shape in ((32, 16), (16, 32), (16, 16))), (cpu_bf16.FEW_ROWS + 1, (16, 32))])
def test_linear_in_bf16_has_torchs_gradients(rows: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ours, torchs = cpu_bf16.Linear(*shape), nn.Linear(*shape)
    torchs.load_state_dict(ours.state_dict())
    x, gradient = torch.randn(1, rows, shape[0]), torch.randn(1, rows, shape[1])
    found = []
    for linear in (ours, torchs):
        x.requires_grad_().grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = linear(x)
        assert y.dtype == torch.bfloat16
        y.backward(gradient.bfloat16())
        found.append([y.detach().float(), x.grad, linear.weight.grad, linear.bias.grad])
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype == torch.float32 and (a - b).abs().max() < 0.01 * b.abs().max()
    assert torch.equal(found[0][0], found[1][0])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (8,), (1, 8), (5, 7, 8), (2, 3, 4, 8)])
@pytest.mark.parametrize("fused", [True, False])
def test_linears_take_what_torch_takes(shape: tuple[int, ...], fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x = cpu_bf16.Linear(8, 5), torch.randn(shape, requires_grad=True)
    if not fused:
        monkeypatch.setattr(cpu_bf16, "_has_fused_bias", lambda: False)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        with torch.no_grad():
            assert torch.equal(layer(x), y)
    plain = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert y.dtype == torch.bfloat16 and y.shape == plain.shape and torch.allclose(y.double(), plain, atol=0.02)
    y.sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, layer.weight.sum(0).expand(shape), atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):  # an activation may work in place, as that of SwinV2's position bias does
        y = F.relu(layer(x), inplace=True)
    x.grad = None
    y.sum().backward()
    assert torch.allclose(x.grad, (y > 0).float() @ layer.weight, atol=0.05)


def test_linears_write_their_bias_with_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpu_bf16._has_fused_bias():
        pytest.skip("this CPU has no bf16 of its own")
    monkeypatch.setattr(F, "linear", None)
    with torch.autocast("cpu", torch.bfloat16):
        cpu_bf16.replace_layers(nn.Sequential(nn.Linear(8, 5)))(torch.randn(2, 8))


class DriftOfSums(TorchDispatchMode):
    """Every operation with bf16 inputs again in fp64: those whose results are not what rounding explains."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong: dict[str, float] = {}
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, kwargs = func(*args, **(kwargs or {})), kwargs or {}
        parts = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        name = func.overloadpacket.__name__
        if not any(t.dtype == torch.bfloat16 for t in parts) or not name.startswith(
                ("convolution", "mm", "bmm", "addmm", "_softmax", "native_layer_norm", "native_batch_norm", "sum", "mean", "index_")):
            return result
        self.seen += 1
        again = func(*tree_map(self.exact, args), **tree_map(self.exact, kwargs))
        for of, (rounded, right) in enumerate(zip(tree_leaves(result), tree_leaves(again), strict=True)):
            # Rounding errors of a sum that comes to nothing are not errors: they are set against the terms.
            if isinstance(right, Tensor) and right.is_floating_point() and right.numel():
                terms = 1e-3 * max(float(t.double().norm()) for t in parts)
                error = (rounded.double() - right).norm() / right.norm().clamp(min=terms + 1e-20)
                if not error < 0.03:
                    self.wrong[f"{name}, output {of}, of {[tuple(t.shape) for t in parts]}"] = float(error)
        return result

    @staticmethod
    def exact(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.double()
        return torch.float64 if value in (torch.bfloat16, torch.float32) and isinstance(value, torch.dtype) else value


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_and_learns_right_in_bf16(family: str) -> None:
    """At 128 pixels, where sums go over thousands of rows: torch's own layer norm fails this."""
    model, images, drift = tiny(family, "DATA.IMG_SIZE", 128), torch.randn(4, 3, 128, 128), DriftOfSums()
    with drift:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model.train()(images)
        logits.float().square().sum().backward()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            model.eval()(images)
    assert drift.seen > 30 and drift.wrong == {}


@pytest.mark.parametrize(("weight", "bias"), [(True, True), (False, True), (True, False)])
def test_layer_norm_sums_its_gradients_in_fp32(weight: bool, bias: bool) -> None:
    torch.manual_seed(0)
    norm, x = cpu_bf16.LayerNorm(24), (torch.randn(5, 41, 43, 24) + torch.randn(5, 41, 43, 1)).bfloat16()
    torch.nn.init.normal_(norm.weight)
    norm.weight.requires_grad_(weight), norm.bias.requires_grad_(bias)
    inputs = [p for p in norm.parameters() if p.requires_grad]
    ours = gradients(lambda y, *_: norm(y), x.requires_grad_(), *inputs)
    plain = gradients(lambda y, *_: F.layer_norm(y.float(), (24,), norm.weight, norm.bias).bfloat16(), x, *inputs)
    assert close(ours, plain, 0.01) and [g.dtype for g in ours[2:]] == [torch.float32] * len(inputs)


def test_layer_norms_of_timm_are_ours() -> None:
    for name, kind, number in (("vit_tiny_patch16_224", cpu_bf16.LayerNorm, 25), ("convnext_atto", cpu_bf16.LayerNorm2d, 17)):
        model = build_model(get_config(None, ["MODEL.TYPE", "timm", "MODEL.NAME", name]), 5)
        assert sum(type(module) is kind for module in model.modules()) == number
        assert not any(type(module) in (nn.LayerNorm, timm.layers.LayerNorm, timm.layers.LayerNorm2d) for module in model.modules())
        torch.manual_seed(0)
        theirs = timm.create_model(name, num_classes=5)
        theirs.load_state_dict(model.state_dict())
        x = torch.randn(1, 3, 224, 224)
        assert torch.equal(model.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kernel", "stride", "size"), [
    (3, 1, (6, 9)), (3, 2, (6, 9)), (3, 2, (7, 4)), (5, 1, (6, 9)), (7, 1, (2, 5)), (5, 2, (6, 9))])
def test_depthwise_convolution(kernel, stride, size, dtype, skip):
    if skip and stride > 1:
        return
    torch.manual_seed(0)
    conv, x = ops.DepthwiseConv2d(10, kernel, stride, skip=skip), torch.randn(2, 10, *size, requires_grad=True)
    inputs = (x, *conv.parameters())

    def ours(x: Tensor, *_: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
            return conv(x)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.conv2d(x, weight, bias, stride, kernel // 2, groups=10)
        return (x + y if skip else y).to(dtype)

    assert ours(x).dtype == dtype
    assert close(gradients(ours, *inputs), gradients(plain, *inputs), 1e-5 if dtype == torch.float32 else 0.03)
    with torch.no_grad():
        assert torch.allclose(conv(x), plain(*inputs).float(), atol=1e-6 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1)])
def test_large_depthwise_maps_in_slices_of_channels(monkeypatch, kernel, stride):
    monkeypatch.setattr(ops, "LARGE_MAP", 100)
    monkeypatch.setattr(ops, "_FEW_CHANNELS", 4)
    test_depthwise_convolution(kernel, stride, (6, 9), torch.bfloat16, stride == 1)


@pytest.mark.parametrize("size", [(4, 6), (5, 6), (6, 7)])  # whole patches, and a row or a column left over
def test_merged_patches(size):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(5, 7, 2, stride=2), torch.randn(2, *size, 5, requires_grad=True)
    inputs = (x, *conv.parameters())
    plain = gradients(lambda x, *_: conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), *inputs)
    assert close(gradients(lambda x, *_: ops.merge_patches(conv, x), *inputs), plain, 1e-5)
    with torch.no_grad():
        assert close([ops.merge_patches(conv, x)], plain[:1], 1e-5)


def test_batch_norm_in_the_convolution():
    torch.manual_seed(0)
    conv, norm, x = nn.Conv2d(4, 6, 3, 2, 1, groups=2, bias=False), nn.BatchNorm2d(6), torch.randn(3, 4, 7, 8, requires_grad=True)
    for p in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        p.data.uniform_(0.5, 1.5)
    inputs = (x, *conv.parameters(), *norm.parameters())
    for training in (False, True, False):  # the last time with other statistics than the first
        norm.train(training)
        plain = gradients(lambda x, *_: norm(conv(x)), *inputs)
        if training:
            norm.running_mean.mul_(0.9)
        assert close(gradients(lambda x, *_: ops.conv_norm(conv, norm, x), *inputs), plain, 1e-5)


def test_one_graph_for_training():
    """A model's own gradients pass torch.compile without a break and keep their values."""
    torch.manual_seed(0)
    net = nn.Sequential(ops.DepthwiseConv2d(8, 3, 2, bias=False), ops.DepthwiseConv2d(8, 5, skip=True))
    x = torch.randn(2, 8, 6, 6, requires_grad=True)

    def run(f: Callable[[Tensor], Tensor]) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return gradients(lambda x, *_: f(x), x, *net.parameters())

    assert close(run(torch.compile(net, fullgraph=True, backend="aot_eager")), run(net), 0.03)
