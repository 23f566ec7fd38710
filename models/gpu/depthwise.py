"""Depthwise convolutions on CUDA in 16 bits, of maps with the channels last: each map read once, each result written once.

torch (2.11 to 2.14) sends a channels-last map to cuDNN, and any other in bfloat16 to kernels of its own, whose gradient of the weights
walks over all pixels once for each number of a kernel: 576 walks over 803,000 pixels for 3 x 3 on (256, 56, 56, 64). The kernels here
take that map's 103 MB in and 103 MB out at once, 0.05 ms at 4 TB/s, and their instructions no more than twice that, by what a compilation
for an H200 counts. They take the weights in fp32 and add up in it; the gradients repeat to the bit.

Both are operations of torch (``crossformer::depthwise``, ``depthwise_sums``), which fake tensors, dispatch modes and torch.compile see.

Shapes: B batch, H W map, C channels, K side of the kernel; maps are (B, H, W, C).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.gpu.kernels import Kernels, distance

_AFFORDED = 2 ** 29  # numbers of one sample: the kernels count them, and those that lie between, in 32 bits


def applies(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``depthwise`` is to compute a convolution of ``x`` in ``dtype``."""
    if not x.is_cuda or dtype.itemsize != 2 or torch.jit.is_tracing():
        return False
    return x.numel() > 0 and x.numel() // len(x) < _AFFORDED and _available()


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, skip: bool = False, reaches: Tensor | None = None) -> Tensor:
    """The convolution of (B, H, W, C) by ``weight`` (C, 1, K, K), K odd, padded by K/2, and its gradients.

    Args:
        skip: adds ``x``; for a stride of 1.
        reaches: (C,) in int32, how far from its middle each channel's kernel has other weights than 0; beyond, gradients can be anything.
    """
    return _Depthwise.apply(x, weight, bias, stride, skip, reaches)


def depthwise_branches(x: Tensor, weights: Sequence[Tensor], strides: Sequence[int]) -> tuple[Tensor, ...]:
    """``depthwise`` of one map by several kernels, without biases, whose gradients of the map are added up as they are written."""
    return _Branches.apply(x, *weights, tuple(strides))


class _Branches(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights_and_strides: Any) -> tuple[Tensor, ...]:
        *weights, strides = weights_and_strides
        x, taps = dense(x), [taps_of(weight) for weight in weights]
        ctx.save_for_backward(x, *taps)
        ctx.strides, ctx.weights = strides, [weight.dtype for weight in weights]
        return tuple(convolve(x, t, None, None, stride) for t, stride in zip(taps, strides, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *taps = ctx.saved_tensors
        to_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        before, to_weights = None, []
        rows = zip(map(dense, grads), taps, ctx.strides, ctx.weights, ctx.needs_input_grad[1:-1], strict=True)
        for grad, t, stride, dtype, wanted in rows:
            if to_x is not None:
                torch.ops.crossformer.depthwise(to_x, grad, t, None, before, None, stride, True)
                before = to_x
            to_weights.append(weight_gradient(x, grad, len(t), stride, False, None, dtype)[0] if wanted else None)
        return to_x, *to_weights, None


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, skip: bool, reaches: Tensor | None) -> Tensor:
        x, taps = dense(x), taps_of(weight)
        ctx.save_for_backward(x, taps, reaches)
        ctx.stride, ctx.skip, ctx.weight = stride, skip, weight.dtype
        return convolve(x, taps, bias, x if skip else None, stride, reaches)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, taps, reaches = ctx.saved_tensors
        grad, to_x, to_weight, to_bias = dense(grad), None, None, None
        if ctx.needs_input_grad[0]:
            to_x = torch.empty_like(x)
            torch.ops.crossformer.depthwise(to_x, grad, taps, None, grad if ctx.skip else None, reaches, ctx.stride, True)
        if ctx.needs_input_grad[1]:
            to_weight, to_bias = weight_gradient(x, grad, len(taps), ctx.stride, ctx.needs_input_grad[2], reaches, ctx.weight)
        elif ctx.needs_input_grad[2]:
            to_bias = grad.sum((0, 1, 2), dtype=taps.dtype).to(ctx.weight)
        return to_x, to_weight, to_bias, None, None, None


def dense(x: Tensor) -> Tensor:
    """(B, H, W, C) as the kernels can read it, which may be a slice of channels."""
    return x if x.stride(3) == 1 and x.stride(1) == x.shape[2] * x.stride(2) else x.contiguous()


def taps_of(weight: Tensor) -> Tensor:
    """(C, 1, K, K) -> (K*K, C), in fp32 at least."""
    return weight.flatten(1).t().to(torch.promote_types(weight.dtype, torch.float32), memory_format=torch.contiguous_format).contiguous()


def convolve(x: Tensor, taps: Tensor, bias: Tensor | None, addend: Tensor | None, stride: int = 1, reaches: Tensor | None = None) -> Tensor:
    """``depthwise`` without gradients, by ``taps_of`` its weight, plus ``addend``."""
    batch, height, width, channels = x.shape
    out = x.new_empty(batch, -(-height // stride), -(-width // stride), channels)
    torch.ops.crossformer.depthwise(out, x, taps, bias, addend, reaches, stride, False)
    return out


def weight_gradient(x: Tensor, grad: Tensor, taps: int, stride: int, has_bias: bool, reaches: Tensor | None, dtype: torch.dtype,
                    ) -> tuple[Tensor, Tensor | None]:
    """Of weight (C, 1, K, K) and bias (C,), from the input and the output's gradient; ``taps`` is K*K."""
    kernel = round(taps ** 0.5)
    sums, weights = torch.ops.crossformer.depthwise_sums(x, grad, reaches, kernel, stride, has_bias).to(dtype), x.shape[3] * taps
    return sums[:weights].view(-1, 1, kernel, kernel), sums[weights:] if has_bias else None


def _convolve(out: Tensor, x: Tensor, taps: Tensor, bias: Tensor | None, addend: Tensor | None, reaches: Tensor | None, stride: int,
              transposed: bool) -> None:
    """Writes ``out``: the convolution of ``x``, or (``transposed``) the gradient of the input that ``x`` is the output's gradient of."""
    KERNELS.compute(
        x.device, lambda kernels: kernels.convolve(out, dense(x), taps, bias, None if addend is None else dense(addend), reaches, stride,
                                                   transposed),
        lambda: _convolve_plainly(out, x, taps, bias, addend, stride, transposed))


def _convolve_plainly(out: Tensor, x: Tensor, taps: Tensor, bias: Tensor | None, addend: Tensor | None, stride: int, transposed: bool,
                      ) -> None:
    weight = _weight_of(taps, x)
    if transposed:
        gradients = torch.ops.aten.convolution_backward
        y, _, _ = gradients(x.permute(0, 3, 1, 2), out.permute(0, 3, 1, 2), weight, None, *_geometry(weight, stride), [True, False, False])
    else:
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, None if bias is None else bias.to(x.dtype), stride, weight.shape[2] // 2,
                     groups=weight.shape[0])
    y = y.permute(0, 2, 3, 1)
    out.copy_(y if addend is None else y + addend)


def _sums(x: Tensor, grad: Tensor, reaches: Tensor | None, kernel: int, stride: int, has_bias: bool) -> Tensor:
    """The gradients of weight and bias behind one another, (C * K * K + C,) or without the last C, in fp32 at least."""
    return KERNELS.compute(x.device, lambda kernels: kernels.weight_sums(dense(x), dense(grad), reaches, kernel, stride, has_bias),
                           lambda: _sums_plainly(x, grad, kernel, stride, has_bias))


def _sums_plainly(x: Tensor, grad: Tensor, kernel: int, stride: int, has_bias: bool) -> Tensor:
    channels = x.shape[3]
    weight = x.new_empty(channels, 1, kernel, kernel)
    _, to_weight, to_bias = torch.ops.aten.convolution_backward(
        grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight, [channels], *_geometry(weight, stride), [False, True, has_bias])
    return torch.cat([to_weight.flatten(), *([to_bias] if has_bias else [])]).to(torch.promote_types(x.dtype, torch.float32))


def _weight_of(taps: Tensor, x: Tensor) -> Tensor:
    kernel = round(len(taps) ** 0.5)
    return taps.t().reshape(-1, 1, kernel, kernel).to(x.dtype)


def _geometry(weight: Tensor, stride: int) -> tuple[Any, ...]:
    """Stride, padding, dilation, transposition, its padding and groups, as torch's gradients take them."""
    return [stride] * 2, [weight.shape[2] // 2] * 2, [1, 1], False, [0, 0], weight.shape[0]


_library = torch.library.Library("crossformer", "FRAGMENT")
_library.define("depthwise(Tensor(a!) out, Tensor x, Tensor taps, Tensor? bias, Tensor? addend, Tensor? reaches, int stride,"
                " bool transposed) -> ()", tags=torch.Tag.needs_exact_strides)
_library.define("depthwise_sums(Tensor x, Tensor grad, Tensor? reaches, int kernel, int stride, bool has_bias) -> Tensor",
                tags=torch.Tag.needs_exact_strides)
_library.impl("depthwise", _convolve, "CompositeExplicitAutograd")
_library.impl("depthwise", lambda *_: None, "Meta")
_library.impl("depthwise_sums", _sums, "CompositeExplicitAutograd")
_library.impl("depthwise_sums", lambda x, grad, reaches, kernel, stride, has_bias: x.new_empty(
    x.shape[3] * (kernel ** 2 + has_bias), dtype=torch.promote_types(x.dtype, torch.float32)), "Meta")


@torch.compiler.assume_constant_result
def _available() -> bool:
    return KERNELS.available


def _difference(device: torch.device) -> str:
    """Of the kernels from torch's convolutions in fp32, for ``KERNELS``."""
    kernels, generator, errors = KERNELS.module, torch.Generator().manual_seed(0), []
    for side, stride in ((3, 1), (3, 2), (7, 1)):
        size = (2, -(-5 // stride), -(-6 // stride), 24)
        x, grad = (torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in ((2, 5, 6, 24), size))
        taps, bias = torch.randn(side * side, 24, generator=generator).to(device), torch.randn(24, generator=generator).to(device)
        for given, like, transposed in ((x, grad, False), (grad, x, True)):
            ours, plain = torch.empty_like(like), torch.empty_like(like, dtype=torch.float32)
            added = None if transposed else bias
            kernels.convolve(ours, given, taps, added, None, None, stride, transposed)
            _convolve_plainly(plain, given.float(), taps, added, None, stride, transposed)
            errors.append(distance(ours, plain))
        plain = _sums_plainly(x.float(), grad.float(), side, stride, True)
        errors.append(distance(kernels.weight_sums(x, grad, None, side, stride, True), plain))
    return "" if all(error < 0.01 for error in errors) else f"depthwise convolutions are off by {max(errors):.2g}"


KERNELS = Kernels("depthwise_kernels", "depthwise convolutions are computed", _difference)
