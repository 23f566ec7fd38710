"""Linears and the MLP in training on a GPU in 16 bits: gradients of weights and biases in fp32, sums of rows at the memory's pace.

torch's gradient of a linear under autocast is two products, a sum over the rows for the bias, and two conversions of what they give to
fp32. Measured on an H200 in crossformer_small at batch 256, the 59 sums take 4.5 ms of an 88 ms step: they read 6.6 GB, which is 1.7 ms at
4 TB/s. Here

* the product that is the weight's gradient writes fp32, so nothing is rounded to 16 bits nor converted;
* a kernel adds up rows at the memory's pace, in fp32 and in a fixed order (``column_sums``);
* in an MLP the first linear's sums come from the kernel that computes GELU's gradient, which has the numbers at hand: 2.9 GB less to read.

A linear is two launches shorter, an MLP five, for no more time of the host: on a CPU with tensors of 64 numbers, forward and backward, a
linear takes 32 us either way, an MLP 80 us in place of 115 us. ``torch.compile`` makes as good kernels of the plain form. A training step
converts the weights and biases of all linears together (``converting_at_once``), 2 launches in place of 102 in crossformer_small.

The two sums are operations of torch (``crossformer::column_sums``, ``gelu_backward_sums``), which fake tensors and dispatch modes see.

Shapes: n rows, C and C' channels.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.gpu.kernels import Kernels, distance

LEAST_NUMBERS = 2 ** 20  # below, a kernel takes no longer than the host to launch it, and torch's own launches are the shortest


def applies(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether ``linear`` and ``mlp`` are to compute these weights and biases on ``x``: in training on a GPU in 16 bits."""
    if not x.is_cuda or x.ndim < 2 or not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    # Frozen parameters leave less to compute, and to keep.
    return dtype.itemsize == 2 and all(p is not None and p.requires_grad for p in parameters)


def linear(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """x W^T + b in ``dtype``. (.., C), (C', C), (C') -> (.., C')."""
    return _Linear.apply(x, weight, bias, dtype)


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, dtype: torch.dtype) -> Tensor:
    """GELU(x W1^T + b1) W2^T + b2 in ``dtype``. (.., C) -> (.., C')."""
    return _Mlp.apply(x, weight1, bias1, weight2, bias2, dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.wide, x, narrow = weight.dtype, x.to(dtype), _converted(weight, dtype)
        ctx.save_for_backward(x, narrow)
        return _whole(F.linear(x, narrow, _converted(bias, dtype)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = _rows(grad)
        to_x = (rows @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        return to_x, _product(rows.t(), _rows(x), ctx.wide), torch.ops.crossformer.column_sums(rows), None


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.wide = weight1.dtype
        x, first, second = x.to(dtype), _converted(weight1, dtype), _converted(weight2, dtype)
        hidden = F.linear(x, first, _converted(bias1, dtype))
        active = F.gelu(hidden)
        ctx.save_for_backward(x, first, hidden, active, second)
        return _whole(F.linear(active, second, _converted(bias2, dtype)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, first, hidden, active, second = ctx.saved_tensors
        rows = _rows(grad)
        to_weight2, to_bias2 = _product(rows.t(), _rows(active), ctx.wide), torch.ops.crossformer.column_sums(rows)
        to_hidden, to_bias1 = torch.ops.crossformer.gelu_backward_sums(rows @ second, _rows(hidden))
        to_x = (to_hidden @ first).view(x.shape) if ctx.needs_input_grad[0] else None
        return to_x, _product(to_hidden.t(), _rows(x), ctx.wide), to_bias1, to_weight2, to_bias2, None


def _whole(x: Tensor) -> Tensor:
    """``x``, no longer a view in autograd's eyes: what a function of ours gives must be free to be changed in place (ReLU)."""
    return torch.ops.aten._unsafe_view(x, x.shape)


@contextlib.contextmanager
def converting_at_once(model: nn.Module) -> Iterator[None]:
    """Within, a forward pass of ``model``: the weights and biases that its linears asked for in the pass before are converted to
    autocast's type by one launch for up to 64, in place of one for each."""
    asked = _asked.setdefault(model, {}) if torch.is_autocast_enabled("cuda") else None
    _passes.append(_Pass(asked, {} if not asked else _convert([p for p in asked if p.requires_grad], torch.get_autocast_dtype("cuda"))))
    try:
        yield
    finally:
        _passes.pop()


class _Pass(NamedTuple):
    asked: dict[Tensor, None] | None
    ready: dict[Tensor, Tensor]


_asked: WeakKeyDictionary[nn.Module, dict[Tensor, None]] = WeakKeyDictionary()
_passes: list[_Pass] = []
_ALIGNMENT = 128  # numbers, 256 bytes: what a product's kernel may count on for a tensor of its own


@torch.no_grad()
def _convert(parameters: Sequence[Tensor], dtype: torch.dtype) -> dict[Tensor, Tensor]:
    """Each parameter in ``dtype``, all in one piece of memory."""
    if not parameters:
        return {}
    places = [0, *itertools.accumulate(-(-p.numel() // _ALIGNMENT) * _ALIGNMENT for p in parameters)]
    memory = parameters[0].new_empty(places.pop(), dtype=dtype)
    narrow = [memory.as_strided(p.shape, p.stride(), place) for p, place in zip(parameters, places, strict=True)]
    torch._foreach_copy_(narrow, parameters)
    return dict(zip(parameters, narrow, strict=True))


def _converted(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    if parameter.dtype != dtype and _passes and _passes[-1].asked is not None:
        ready = _passes[-1].ready.get(parameter)
        if ready is not None:
            return ready
        if parameter.is_leaf:
            _passes[-1].asked[parameter] = None
    return parameter.to(dtype)


def _rows(x: Tensor) -> Tensor:
    """(.., C) -> (n, C), the channels side by side in memory."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """A B of matrices in 16 bits, added up in fp32 and written so if ``dtype`` is fp32, which torch can on CUDA alone."""
    if a.is_cuda and dtype == torch.float32 and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return a @ b


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _column_sums(x: Tensor) -> Tensor:
    """(n, C) -> (C), in fp32 at least."""
    def plain() -> Tensor:
        return x.sum(0, dtype=_wide(x.dtype))
    return KERNELS.compute(x.device, lambda kernels: kernels.column_sums(x).sum(0), plain) if _pays(x) else plain()


def _gelu_backward_sums(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of GELU's input ``x`` (n, C) for that of what it gives, and the sum of its rows (C), in fp32 at least."""
    def plain() -> tuple[Tensor, Tensor]:
        to_x = torch.ops.aten.gelu_backward(grad, x)
        return to_x, _column_sums(to_x)

    def ours(kernels: ModuleType) -> tuple[Tensor, Tensor]:
        to_x, sums = kernels.gelu_backward_sums(grad, x)
        return to_x, sums.sum(0)
    return KERNELS.compute(x.device, ours, plain) if _pays(x) else plain()


def _pays(x: Tensor) -> bool:
    """Whether torch's own kernels are not as good."""
    return x.dtype in (torch.bfloat16, torch.float16) and (not x.is_cuda or x.numel() >= LEAST_NUMBERS)


def _difference(device: torch.device) -> str:
    """Of the kernels from the formulas in fp64, for ``KERNELS``."""
    kernels, generator = KERNELS.module, torch.Generator().manual_seed(0)
    x, grad = (torch.randn(300, 140, generator=generator).to(device, torch.bfloat16) for _ in range(2))
    to_x = torch.ops.aten.gelu_backward(grad.double(), x.double())
    ours, sums = kernels.gelu_backward_sums(grad, x)
    errors = (distance(kernels.column_sums(x).sum(0), x.double().sum(0)), distance(ours, to_x), distance(sums.sum(0), to_x.sum(0)))
    return "" if max(errors) < 0.01 else f"sums and GELU's gradient are off by {errors}"


KERNELS = Kernels("linear_kernels", "biases' gradients are computed", _difference)
_library = torch.library.Library("crossformer", "FRAGMENT")
_library.define("column_sums(Tensor x) -> Tensor")
_library.define("gelu_backward_sums(Tensor grad, Tensor x) -> (Tensor, Tensor)")
_library.impl("column_sums", _column_sums, "CompositeExplicitAutograd")
_library.impl("column_sums", lambda x: x.new_empty(x.shape[1], dtype=_wide(x.dtype)), "Meta")
_library.impl("gelu_backward_sums", _gelu_backward_sums, "CompositeExplicitAutograd")
_library.impl("gelu_backward_sums", lambda grad, x: (torch.empty_like(x), x.new_empty(x.shape[1], dtype=_wide(x.dtype))), "Meta")
