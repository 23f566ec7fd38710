"""Layer norm on CUDA in one pass each way: normalised in fp32, converted to the type that is wanted, and laid out in groups.

torch's own (2.11 to 2.14) works a block of threads a row, which for 96 channels runs at a ninth of the memory's pace (H200: 1.25 ms for
(256, 56, 56, 96) in fp32, 0.14 would be the pace); under autocast a conversion follows, and in CrossFormer a copy into groups.

Here a call on n numbers in rows of C, of s bytes each, whose result has t bytes each, moves

* forward: n s read, n t + 8 n/C written (mean and reciprocal deviation, which are all that is kept beside the input);
* backward: n (s + t) + 8 n/C read, n s written, and sums of weight's and bias's gradients, at most 57 kB a multiprocessor for 1,024
  channels, written and read. They are added up in a fixed order, so results repeat to the bit;
* n s more read backward where a skip's gradient is added in the same pass, of 3 n s that an addition would move;
* n t more read and n s written forward, n t written backward, where what is normed is the residual's sum with a branch of t bytes.

For (256, 56, 56, 96) from fp32 to bf16 that is 469 MB and 777 MB, 0.12 and 0.19 ms at 4 TB/s; with skip and branch 931 MB and 1,239 MB,
in three launches where torch takes eight. Padding to whole groups, zeros, is written by the same pass. Triton compiles a
kernel for each number of channels, pair of types and form, 0.2 s each, kept on disk.

Both directions are operations of torch (``crossformer::layer_norm``, ``layer_norm_backward``), which fake tensors and dispatch modes see.
On a CPU this costs 14 us of the host, forward and backward together, in place of 33 by ``torch.library.custom_op``.

Shapes: B batch, H W map, C channels, G group size.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from models.gpu.kernels import Kernels, distance

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
        return layer_norm(x, self.weight, self.bias, self.eps, _result_type(self, x))[0]


def fuses(norm: nn.Module, x: Tensor) -> bool:
    """Whether ``norm(x)`` is computed by this file's operation; ``torch.compile`` makes as good a one of the plain form."""
    if not x.is_cuda or torch.compiler.is_compiling() or torch.jit.is_tracing() or not isinstance(norm, LayerNorm):
        return False
    if norm.weight is None or norm.bias is None or norm.normalized_shape != x.shape[-1:] or x.shape[-1] > MOST_CHANNELS:
        return False
    typed = x.dtype in _TYPES and norm.weight.dtype in _TYPES and (x.dtype == norm.weight.dtype or torch.is_autocast_enabled("cuda"))
    return typed and x.numel() >= LEAST_NUMBERS and KERNELS.available


def norm_and_skip(norm: LayerNorm, x: Tensor, group: int = 0, interval: int = 1) -> tuple[Tensor, Tensor]:
    """``norm(x)``, and ``x`` for the skip beside it, whose gradient is then added in the same pass.

    Args:
        norm: one that ``fuses`` with ``x``.
        x: (.., C), or for groups (B, H, W, C).
        group, interval: with a group size G the norm comes as (B * groups, G*G, C) in the order of ``group_attention.to_groups``, H and W
            padded with zeros (after the norm) to multiples of G * interval. 0 leaves all in place.
    """
    return layer_norm(x, norm.weight, norm.bias, norm.eps, _result_type(norm, x), group, interval)


def add_and_norm(norm: LayerNorm, x: Tensor, branch: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The norm of ``x + factor * branch``, and that sum.

    Args:
        norm: one that ``fuses`` with ``x``, which ``adds`` the branch.
        x, branch: (B, .., C).
        factor: numbers of the samples, B of them in fp32, without gradient; or none for 1.
    """
    return layer_norm(x, norm.weight, norm.bias, norm.eps, _result_type(norm, x), branch=branch, factor=factor)


def adds(x: Tensor, branch: Tensor) -> bool:
    """Whether ``branch`` may be added to ``x`` within the operation."""
    return branch.shape == x.shape and branch.dtype in _TYPES and torch.promote_types(x.dtype, branch.dtype) == x.dtype


def _result_type(norm: LayerNorm, x: Tensor) -> torch.dtype:
    if not torch.is_autocast_enabled("cuda"):
        return x.dtype
    return torch.get_autocast_dtype("cuda") if norm.for_products else torch.float32


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, group: int = 0, interval: int = 1,
               branch: Tensor | None = None, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Layer norm over the last axis of ``x`` or of ``x + factor * branch``, in ``dtype``, and what was normed.

    All is computed in fp32, and the gradients of weight and bias are summed in it. Arguments as of ``norm_and_skip``, ``add_and_norm``.
    """
    x, branch = x.contiguous(), None if branch is None else branch.contiguous()
    if torch.is_grad_enabled():
        return _LayerNorm.apply(x, weight, bias, branch, factor, eps, dtype, group, interval)
    y, total, _, _ = _operation(x, branch, factor, weight, bias, eps, dtype, group, interval)
    return y, x if branch is None else total


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, branch: Tensor | None, factor: Tensor | None, eps: float,
                dtype: torch.dtype, group: int, interval: int) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        y, total, mean, rstd = _operation(x, branch, factor, weight, bias, eps, dtype, group, interval)
        total = x if branch is None else total
        ctx.save_for_backward(total, factor, weight, mean, rstd)
        ctx.branch_type = None if branch is None else branch.dtype
        ctx.groups, ctx.result = (group, interval), (y.shape, dtype)
        return y, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, skip: Tensor | None) -> tuple[Tensor | None, ...]:
        total, factor, weight, mean, rstd = ctx.saved_tensors
        grad = total.new_zeros(ctx.result[0], dtype=ctx.result[1]) if grad is None else grad.contiguous()
        skip = None if skip is None else skip.contiguous()
        to_x, to_branch, sums = _backward_operation(grad, skip, total, factor, weight, mean, rstd, ctx.branch_type, *ctx.groups)
        to_weight, to_bias = sums.to(weight.dtype).unbind(0)
        return to_x, to_weight, to_bias, None if ctx.branch_type is None else to_branch, None, None, None, None, None


# The two operations. Where there is no branch, they return no numbers for what belongs to it.


def _allocate(x: Tensor, branch: Tensor | None, factor: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype,
              group: int, interval: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Norm, sum, and mean and reciprocal deviation of every row in ``x``'s order; not yet filled."""
    shape = x.shape
    if group:
        batch, height, width, channels = shape
        shape = (batch * math.prod(_whole(side, group * interval) // group for side in (height, width)), group * group, channels)
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.new_empty(0) if branch is None else torch.empty_like(x)
    return x.new_empty(shape, dtype=dtype), total, x.new_empty(x.shape[:-1], dtype=wide), x.new_empty(x.shape[:-1], dtype=wide)


def _allocate_backward(grad: Tensor, skip: Tensor | None, x: Tensor, factor: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor,
                       branch_type: torch.dtype | None, group: int, interval: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, of the branch, and of weight and bias (2, C); not yet filled."""
    to_branch = x.new_empty(0) if branch_type is None else torch.empty_like(x, dtype=branch_type)
    return torch.empty_like(x), to_branch, mean.new_empty(2, x.shape[-1])


def _forward(x: Tensor, branch: Tensor | None, factor: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype,
             group: int, interval: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = x, branch, factor, weight, bias, eps, dtype, group, interval
    return KERNELS.compute(x.device, lambda kernels: _by_kernels(kernels, *given), lambda: _plainly(*given))


def _by_kernels(kernels: ModuleType, x: Tensor, branch: Tensor | None, factor: Tensor | None, weight: Tensor, bias: Tensor, eps: float,
                dtype: torch.dtype, group: int, interval: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, total, mean, rstd = _allocate(x, branch, factor, weight, bias, eps, dtype, group, interval)
    places = _places_of(x, group, interval)
    kernels.forward(x, branch, factor, weight, bias, places, y, None if branch is None else total, mean, rstd, eps)
    return y, total, mean, rstd


def _plainly(x: Tensor, branch: Tensor | None, factor: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype,
             group: int, interval: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, total, mean, rstd = _allocate(x, branch, factor, weight, bias, eps, dtype, group, interval)
    places, wide = _places_of(x, group, interval), x.to(mean.dtype)
    if branch is not None:
        wide = total.copy_(wide + _by_sample(branch.to(mean.dtype), factor)).to(mean.dtype)
    result, mean, rstd = torch.native_layer_norm(wide, x.shape[-1:], weight.to(mean.dtype), bias.to(mean.dtype), eps)
    if places is None:
        y.copy_(result.view(y.shape))
    else:
        y.zero_().view(len(x), -1, x.shape[-1])[:, places[:x.shape[1] * x.shape[2]]] = result.flatten(1, 2).to(dtype)
    return y, total, mean.squeeze(-1), rstd.squeeze(-1)


def _backward(grad: Tensor, skip: Tensor | None, x: Tensor, factor: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor,
              branch_type: torch.dtype | None, group: int, interval: int) -> tuple[Tensor, Tensor, Tensor]:
    given = grad, skip, x, factor, weight, mean, rstd, branch_type, group, interval
    return KERNELS.compute(x.device, lambda kernels: _backward_by_kernels(kernels, *given), lambda: _backward_plainly(*given))


def _backward_by_kernels(kernels: ModuleType, grad: Tensor, skip: Tensor | None, x: Tensor, factor: Tensor | None, weight: Tensor,
                         mean: Tensor, rstd: Tensor, branch_type: torch.dtype | None, group: int, interval: int,
                         ) -> tuple[Tensor, Tensor, Tensor]:
    to_x, to_branch, _ = _allocate_backward(grad, skip, x, factor, weight, mean, rstd, branch_type, group, interval)
    sums = kernels.backward(grad, skip, x, factor, weight, mean, rstd, _places_of(x, group, interval), to_x,
                            None if branch_type is None else to_branch)
    return to_x, to_branch, sums.sum(0)


def _backward_plainly(grad: Tensor, skip: Tensor | None, x: Tensor, factor: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor,
                      branch_type: torch.dtype | None, group: int, interval: int) -> tuple[Tensor, Tensor, Tensor]:
    places = _places_of(x, group, interval)
    if places is not None:
        grad = grad.view(len(x), -1, x.shape[-1])[:, places[:x.shape[1] * x.shape[2]]]
    grad, wide, weight = grad.reshape(x.shape).to(mean.dtype), x.to(mean.dtype), weight.to(mean.dtype)
    to_x, *sums = torch.ops.aten.native_layer_norm_backward(
        grad, wide, x.shape[-1:], mean.unsqueeze(-1), rstd.unsqueeze(-1), weight, weight, [True, True, True])
    to_x = to_x if skip is None else to_x + skip
    to_branch = x.new_empty(0) if branch_type is None else _by_sample(to_x, factor).to(branch_type)
    return to_x.to(x.dtype), to_branch, torch.stack(sums)


def _by_sample(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor.view(-1, *(1,) * (x.ndim - 1))


_library = torch.library.Library("crossformer", "FRAGMENT")
_library.define("layer_norm(Tensor x, Tensor? branch, Tensor? factor, Tensor weight, Tensor bias, float eps, ScalarType dtype, int group, "
                "int interval) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define("layer_norm_backward(Tensor grad, Tensor? skip, Tensor x, Tensor? factor, Tensor weight, Tensor mean, Tensor rstd, "
                "ScalarType? branch_type, int group, int interval) -> (Tensor, Tensor, Tensor)")
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


def _difference(device: torch.device) -> str:
    """Of the kernels from torch's operations, for ``KERNELS``: with a branch and a skip, and padded into groups."""
    generator = torch.Generator().manual_seed(0)
    x, branch, skip, norm = (torch.randn(shape, generator=generator).to(device) for shape in ((3, 6, 7, 96),) * 3 + ((2, 96),))
    grad, factor = torch.randn(3 * 4 * 16, 96, generator=generator).to(device, torch.bfloat16), torch.tensor([0.0, 1.0, 2.0]).to(device)
    errors = []
    for group, added in ((4, None), (0, branch.bfloat16())):
        given = x, added, None if added is None else factor, *norm.unbind(), 1e-5, torch.bfloat16, group, 1
        plain, ours = _plainly(*given), _by_kernels(KERNELS.module, *given)
        total = x if added is None else plain[1]
        given = (grad[:plain[0].numel() // 96].view(plain[0].shape), skip, total, given[2], norm[0], *plain[2:],
                 None if added is None else added.dtype, group, 1)
        pairs = zip((*ours, *_backward_by_kernels(KERNELS.module, *given)), (*plain, *_backward_plainly(*given)), strict=True)
        errors += [distance(a, b) for a, b in pairs if b.numel()]
    return "" if all(error < 0.01 for error in errors) else f"the layer norm is off by {max(errors):.2g}"


KERNELS = Kernels("layer_norm_kernels", "layer norms are computed", _difference)
