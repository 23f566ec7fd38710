"""What torch and oneDNN get wrong in bf16 on a CPU, done right; and linears, which they compute right but slowly.

tests/models/test_ops.py runs every operation of every family beside itself in fp64; what failed there is here.
A GPU computes all of it well, and so does the code that ``torch.compile`` makes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.gpu import layer_norm as gpu_norm
from models.gpu import linear as gpu_linear


def replace_layers(model: nn.Module) -> nn.Module:
    """Turn the layer norms, linears and doubtful convolutions of ``model`` into the classes below; names and weights stay."""
    for module in model.modules():
        kind = _REPLACEMENTS.get(type(module))
        if kind is not None and (kind is not Conv2d or onednn_may_fail(module.weight) or module.stride[1] > 1):
            module.__class__ = kind
    return model


def norms_for_products(model: nn.Module, names: Mapping[type[nn.Module], Sequence[str]]) -> nn.Module:
    """Turn the layer norms ``names[kind]`` of every module of that kind in timm's ``model`` into ``LayerNormForProducts``."""
    for module in model.modules():
        for name in names.get(type(module), ()):
            norm = getattr(module, name)
            if _REPLACEMENTS.get(type(norm)) is LayerNorm:
                norm.__class__ = LayerNormForProducts
    return model


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type that a product with ``x`` is computed in: autocast's, or without it its own."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # meta knows no autocast
        return x.dtype
    return torch.get_autocast_dtype(kind)


class LayerNorm(gpu_norm.LayerNorm):
    """``nn.LayerNorm`` whose gradients of weight and bias are right on a CPU in bf16 (``_LayerNormInBf16``). (.., C) -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        trains = x.dtype == torch.bfloat16 and x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if trains and self.elementwise_affine and len(self.normalized_shape) == 1:
            return _LayerNormInBf16.apply(x, self.weight, self.bias, self.eps)
        return super().forward(x)


class LayerNormForProducts(LayerNorm):
    """``LayerNorm`` whose result nothing but linears and convolutions read, in whose type it may come. (.., C) -> the same."""

    for_products = True


class LayerNorm2d(LayerNorm):
    """``LayerNorm`` over the channels of (B, C, H, W), in place of timm's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def sum_rows(x: Tensor) -> Tensor:
    """(n, p) -> (p,), as a product with ones, which in bf16 on a CPU is faster than a sum (1.5 to 2 times)."""
    return (x.new_ones(1, len(x)) @ x)[0]


class _LayerNormInBf16(torch.autograd.Function):
    """torch's layer norm, whose own gradient on a CPU sums those of weight and bias in bf16: over the 50,176 rows of 16 images'
    first stage they come out a quarter and four fifths wrong. Here products of matrices do, which add up in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        x = x.contiguous()
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        gradients, shape = torch.ops.aten.native_layer_norm_backward, x.shape[-1:]
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x, _, _ = gradients(grad, x, shape, mean, rstd, weight, bias, [True, False, False])
        if any(ctx.needs_input_grad[1:3]):
            # x minus its mean is exact to what rounding has left of x.
            centred = (torch.sub(x, mean.to(x.dtype)) * grad).flatten(0, -2)
            to_weight = (rstd.view(1, -1).to(x.dtype) @ centred)[0].to(weight.dtype)
            to_bias = None if bias is None else sum_rows(grad.flatten(0, -2)).to(bias.dtype)
        return to_x, to_weight, to_bias, None


class Linear(nn.Linear):
    """``nn.Linear`` as oneDNN is fastest on a CPU in bf16 (``_product``, ``_LinearInBf16``), as a GPU is in training
    (``models.gpu.linear``). (.., C) -> (.., C')."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b as ``Linear`` computes it. (.., C), (C', C), (C') -> (.., C')."""
    if gpu_linear.applies(x, weight, bias):
        return gpu_linear.linear(x, weight, bias, compute_dtype(x))
    in_bf16 = x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    if in_bf16 and x.ndim > 1 and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        with torch.autocast("cpu", enabled=False):
            product = _LinearInBf16.apply if torch.is_grad_enabled() else _product
            return product(x.bfloat16(), weight.bfloat16(), None if bias is None else bias.bfloat16())
    return F.linear(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in bf16 on a CPU. ``F.linear`` first fills what comes out with the bias and then adds the product to that; oneDNN adds
    the bias while it writes, which is up to twice as fast for wide outputs."""
    if bias is None or not _has_fused_bias() or not torch.backends.mkldnn.enabled:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@functools.cache
def _has_fused_bias() -> bool:
    """Whether there is the operation that ``torch.compile`` itself calls, on a CPU that it asks for."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _LinearInBf16(torch.autograd.Function):
    """x W^T + b. Backward, the weights' gradient G^T X is a product of two transposed matrices, for which oneDNN reorders both; with
    few rows it pays to lay out the narrower one first (1.2 to 1.9 times as fast)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = _product(x, weight, bias)
        # Of more than two dimensions oneDNN's is a view, which no activation may change in place (SwinV2's position bias does).
        return torch.ops.aten._unsafe_view(y, y.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows, grads = x.flatten(0, -2), grad.flatten(0, -2)
        to_x = grad @ weight if ctx.needs_input_grad[0] else None
        to_weight = _transposed_product(grads, rows) if ctx.needs_input_grad[1] else None
        to_bias = sum_rows(grads) if ctx.needs_input_grad[2] else None
        return to_x, to_weight, to_bias


FEW_ROWS, VERY_FEW_ROWS = 4096, 1024


def _transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b of (n, p) and (n, q)."""
    if len(a) <= VERY_FEW_ROWS:  # what comes out is as large: better not transposed itself
        return a.t().contiguous() @ b
    if len(a) > FEW_ROWS or a.shape[1] == b.shape[1]:
        return a.t() @ b
    if a.shape[1] < b.shape[1]:
        return a.t().contiguous() @ b
    return (b.t().contiguous() @ a).t().contiguous()  # in bf16, before autograd does it in fp32


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` by ``conv2d``."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros":
            return super()._conv_forward(x, weight, bias)
        return conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int | Sequence[int] = 1, *args: Any, **kwargs: Any) -> Tensor:
    """``F.conv2d`` of the same arguments, on a CPU in bf16 computed in fp32 where ``onednn_may_fail``, and for maps narrower than the
    stride: there oneDNN adds memory that nobody has written to the gradient of the weight."""
    dtype = compute_dtype(x)
    if x.device.type != "cpu" or dtype != torch.bfloat16 or not (
            onednn_may_fail(weight) or x.shape[-1] < (stride if isinstance(stride, int) else stride[-1])):
        return F.conv2d(x, weight, bias, stride, *args, **kwargs)
    with torch.autocast("cpu", enabled=False):
        return F.conv2d(x.float(), weight.float(), None if bias is None else bias.float(), stride, *args, **kwargs).to(dtype)


def onednn_may_fail(weight: Tensor) -> bool:
    """Whether oneDNN 3.13 may give wrong numbers for a convolution by ``weight`` (C', C, k, k).

    With AMX it does, or even writes where it must not, for some even C below 32 and k of 4 and more: 12 channels under a
    kernel of 8 or 4 under one of 16 at any stride, 16 or 24 in patches of 4. No report of it is known; this is what a scan over
    channels, kernels, strides, paddings and sizes found, taken a little wider.
    """
    return weight.shape[1] < 32 and weight.shape[1] % 2 == 0 and weight.shape[3] >= 4


_REPLACEMENTS = {nn.LayerNorm: LayerNorm, timm.layers.LayerNorm: LayerNorm, timm.layers.LayerNorm2d: LayerNorm2d, nn.Conv2d: Conv2d,
           nn.Linear: Linear}
