"""Layer norm on CUDA in one pass each way: normalised in fp32, converted to the type that is wanted, and laid out in groups.

torch's own (2.11 to 2.14) works a block of threads a row, which for 96 channels runs at a ninth of the memory's pace (H200: 1.25 ms for
(256, 56, 56, 96) in fp32, 0.14 would be the pace); under autocast a conversion follows, and in CrossFormer a copy into groups.

Here a call on n numbers in rows of C, of s bytes each, whose result has t bytes each, moves

* forward: n s read, n t + 8 n/C written (mean and reciprocal deviation, which are all that is kept beside the input);
* backward: n (s + t) + 8 n/C read, n s written, and sums of weight's and bias's gradients, at most 57 kB a multiprocessor for 1,024
  channels, written and read. They are added up in a fixed order, so results repeat to the bit.

For (256, 56, 56, 96) from fp32 to bf16 that is 469 MB and 777 MB, 0.12 and 0.19 ms at 4 TB/s. Padding to whole groups, zeros, is written
by the same pass. Triton compiles a kernel for each number of channels and pair of types, 0.2 s each, kept on disk.

Both directions are operations of torch (``crossformer::layer_norm``, ``layer_norm_backward``), which fake tensors and dispatch modes see.
This costs 7 us of the host forward and backward together in place of 33 by ``torch.library.custom_op``.

Shapes: B batch, H W map, C channels, G group size.
"""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

LEAST_NUMBERS = 2 ** 20  # below, a kernel takes no longer than the host to launch it, and torch's own launch is the shortest
MOST_CHANNELS = 4096
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` by this file's operation where ``fuses`` says so. (.., C) -> the same.

    Attributes:
        for_products: nothing but products (linears, convolutions) read the result: under CUDA's autocast it comes in their type, rounded
            once, as autocast itself would round it.
    """

    for_products = False

    def forward(self, x: Tensor) -> Tensor:
        if not fuses(self, x):
            return super().forward(x)
        return layer_norm(x, self.weight, self.bias, self.eps, _result_type(self, x))


def fuses(norm: nn.Module, x: Tensor) -> bool:
    """Whether ``norm(x)`` is computed by this file's operation; ``torch.compile`` makes as good a one of the plain form."""
    if not x.is_cuda or torch.compiler.is_compiling() or torch.jit.is_tracing() or not isinstance(norm, LayerNorm):
        return False
    if norm.weight is None or norm.bias is None or norm.normalized_shape != x.shape[-1:] or x.shape[-1] > MOST_CHANNELS:
        return False
    typed = x.dtype in _TYPES and norm.weight.dtype in _TYPES and (x.dtype == norm.weight.dtype or torch.is_autocast_enabled("cuda"))
    return typed and x.numel() >= LEAST_NUMBERS and not _failed and _kernels() is not None


def fuses_groups(norm: nn.Module, x: Tensor) -> bool:
    """Whether ``norm_in_groups`` may stand for ``norm(x)``: not where a hook waits for the map."""
    return fuses(norm, x) and not norm._forward_hooks


def norm_in_groups(norm: LayerNorm, x: Tensor, group: int, interval: int) -> Tensor:
    """``norm(x)`` in groups, see ``layer_norm``."""
    return layer_norm(x, norm.weight, norm.bias, norm.eps, _result_type(norm, x), group, interval)


def _result_type(norm: LayerNorm, x: Tensor) -> torch.dtype:
    if not torch.is_autocast_enabled("cuda"):
        return x.dtype
    return torch.get_autocast_dtype("cuda") if norm.for_products else torch.float32


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, group: int = 0, interval: int = 1) -> Tensor:
    """Layer norm over the last axis, in ``dtype``; computed in fp32, gradients of weight and bias summed in fp32.

    Args:
        x: (.., C), or for groups (B, H, W, C).
        weight, bias: (C,).
        group, interval: with a group size G the result is (B * groups, G*G, C) as ``models.group_attention.to_groups`` orders it, H and W
            padded with zeros (after the norm) to multiples of G * interval. 0 leaves all in place.
    """
    x = x.contiguous()
    if torch.is_grad_enabled():
        return _LayerNorm.apply(x, weight, bias, eps, dtype, group, interval)
    return _operation(x, weight, bias, eps, dtype, group, interval)[0]


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, group: int, interval: int) -> Tensor:
        y, mean, rstd = _operation(x, weight, bias, eps, dtype, group, interval)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups = group, interval
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        to_x, sums = _backward_operation(grad.contiguous(), x, weight, mean, rstd, *ctx.groups)
        to_weight, to_bias = sums.to(weight.dtype).unbind(0)
        return to_x, to_weight, to_bias, None, None, None, None


def _allocate(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, group: int, interval: int,
              ) -> tuple[Tensor, Tensor, Tensor]:
    """What the operation returns, not yet filled: the result, and mean and reciprocal deviation of every row in ``x``'s order."""
    shape = x.shape
    if group:
        batch, height, width, channels = shape
        shape = (batch * math.prod(_whole(side, group * interval) // group for side in (height, width)), group * group, channels)
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=wide), x.new_empty(x.shape[:-1], dtype=wide)


def _allocate_backward(grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, group: int, interval: int,
                       ) -> tuple[Tensor, Tensor]:
    """The gradient of ``x``, not yet filled, and of weight and bias (2, C)."""
    return torch.empty_like(x), mean.new_empty(2, x.shape[-1])


def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, group: int, interval: int,
             ) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = _allocate(x, weight, bias, eps, dtype, group, interval)
    places = _places_of(x, group, interval)
    if (kernels := _kernels_for(x)) is not None:
        try:
            kernels.forward(x, weight, bias, places, y, mean, rstd, eps)
            return y, mean, rstd
        except Exception as error:  # Triton compiles at the first call, and raises what its tools do
            _give_up(error)
    result, mean, rstd = torch.native_layer_norm(x.to(mean.dtype), x.shape[-1:], weight.to(mean.dtype), bias.to(mean.dtype), eps)
    if places is None:
        return y.copy_(result.view(y.shape)), mean.squeeze(-1), rstd.squeeze(-1)
    by_image = y.zero_().view(len(x), -1, x.shape[-1])
    by_image[:, places[:x.shape[1] * x.shape[2]]] = result.flatten(1, 2).to(dtype)
    return y, mean.squeeze(-1), rstd.squeeze(-1)


def _backward(grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, group: int, interval: int) -> tuple[Tensor, Tensor]:
    places = _places_of(x, group, interval)
    if (kernels := _kernels_for(x)) is not None:
        to_x = torch.empty_like(x)
        try:
            return to_x, kernels.backward(grad, x, weight, mean, rstd, places, to_x).sum(0)
        except Exception as error:
            _give_up(error)
    if places is not None:
        grad = grad.view(len(x), -1, x.shape[-1])[:, places[:x.shape[1] * x.shape[2]]]
    grad, wide, weight = grad.reshape(x.shape).to(mean.dtype), x.to(mean.dtype), weight.to(mean.dtype)
    to_x, *sums = torch.ops.aten.native_layer_norm_backward(
        grad, wide, x.shape[-1:], mean.unsqueeze(-1), rstd.unsqueeze(-1), weight, weight, [True, True, True])
    return to_x.to(x.dtype), torch.stack(sums)


_library = torch.library.Library("crossformer", "FRAGMENT")
_library.define("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType dtype, int group, int interval)"
                " -> (Tensor, Tensor, Tensor)")
_library.define("layer_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor rstd, int group, int interval)"
                " -> (Tensor, Tensor)")
_library.impl("layer_norm", _forward, "CompositeExplicitAutograd")
_library.impl("layer_norm", _allocate, "Meta")
_library.impl("layer_norm_backward", _backward, "CompositeExplicitAutograd")
_library.impl("layer_norm_backward", _allocate_backward, "Meta")
_operation, _backward_operation = torch.ops.crossformer.layer_norm.default, torch.ops.crossformer.layer_norm_backward.default


def _whole(side: int, span: int) -> int:
    return -(-side // span) * span


def _places_of(x: Tensor, group: int, interval: int) -> Tensor | None:
    """``group_places`` for the map ``x``; none where the rows stay in order."""
    if not group or interval == 1 and x.shape[2] == group and x.shape[1] % group == 0:
        return None
    key = *x.shape[1:3], group, interval, x.device
    places = _PLACES.get(key)
    if places is None:
        places = group_places(*key)
        if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):  # what is captured has no values before the graph's first run
            _PLACES[key] = places
    return places


_PLACES: dict[tuple[Any, ...], Tensor] = {}


def group_places(height: int, width: int, group: int, interval: int, device: torch.device) -> Tensor:
    """Where each pixel of a map lies among the padded map's groups, (padded H * padded W,) in int32; the padding's places come last."""
    def parts(side: int) -> tuple[Tensor, Tensor, Tensor]:
        n = torch.arange(_whole(side, group * interval), device=device)
        return n // (group * interval), n // interval % group, n % interval
    with torch.inference_mode(False):
        (row, in_row, far_row), (column, in_column, far_column) = parts(height), parts(width)
        columns = _whole(width, group * interval) // (group * interval)
        number = ((row[:, None] * columns + column) * interval + far_row[:, None]) * interval + far_column
        places = number * group * group + in_row[:, None] * group + in_column
        return torch.cat([places[:height, :width].flatten(), places[:height, width:].flatten(), places[height:].flatten()]).int()


@functools.cache
def _kernels() -> ModuleType | None:
    """The module of kernels, or none without Triton."""
    try:
        return importlib.import_module("models.fused_norm_kernels")
    except Exception:  # not only ImportError: a Triton that does not fit its torch raises others
        return None


def _kernels_for(x: Tensor) -> ModuleType | None:
    """On a CPU only Triton's interpreter runs them."""
    kernels = None if _failed else _kernels()
    return kernels if kernels is not None and (x.is_cuda or kernels.INTERPRETED) else None


_failed: list[str] = []


def _give_up(error: Exception) -> None:
    """The plain form from here on, with one notice."""
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    _failed.append(str(error))
    warnings.warn(f"Triton fails here ({type(error).__name__}: {str(error)[:160]}); torch's own layer norm is taken, which is slower",
                  stacklevel=2)
