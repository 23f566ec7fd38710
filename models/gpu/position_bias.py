"""CrossFormer's dynamic position bias on a GPU in one launch forward and two back, by the kernels of ``models.gpu.position_bias_kernels``.

Layer by layer it is 10 launches forward and 20 back, a third of all that a training step of CrossFormer-S launches, of a few numbers each.

Shapes: M = (2G-1)^2 offsets, h heads, d width of the MLP.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from models.gpu.kernels import problem_of

WIDEST, MOST_HEADS, ROWS = 64, 32, 16  # the tiles of the kernels


def fits(weights: list[Tensor]) -> bool:
    """Whether ``position_bias`` takes these: fp32 on a GPU where its kernels run, and not within a graph of torch.compile."""
    first, last = weights[0], weights[-2]
    if not first.is_cuda or first.dtype != torch.float32 or len(first) > WIDEST or len(last) > MOST_HEADS:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return isinstance(first, FakeTensor) or kernels_work(first.device)  # a fake one stands for one where all is well


def position_bias(weights: list[Tensor], group: int, residual: bool) -> Tensor:
    """The biases of ``relative_offsets`` of a group, (M, h).

    Args:
        weights: of the first linear and of three times norm and linear, weight and bias each, as ``DynamicPositionBias`` has them.
        residual: whether there are skips around the two hidden layers.
    """
    return _PositionBias.apply(*weights, group, residual)


class _PositionBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *weights, group, residual = inputs
        ctx.save_for_backward(*weights)
        ctx.sizes = group, residual
        return torch.ops.cross_scale_bias.position_bias(weights, group, residual)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights = ctx.saved_tensors
        flat = torch.ops.cross_scale_bias.position_bias_backward(grad.contiguous(), weights, *ctx.sizes)
        parts = flat.split([w.numel() for w in weights])
        return *(part.view_as(w) for part, w in zip(parts, weights, strict=True)), None, None


@functools.cache
def kernels_work(device: torch.device) -> bool:
    """Whether the kernels compile there and give the layers' numbers, once a process; if not, a warning says why."""
    def difference() -> str:
        error = _error(device)
        return "" if error < 1e-3 else f"they are off by {100 * error:.2g} %"
    return not problem_of("the position bias is computed", difference)


def _error(device: torch.device, group: int = 7, dim: int = 24, heads: int = 12) -> float:
    """The greatest relative error of bias and gradients on random weights."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(dim, 2), (dim,), *((dim,), (dim,), (dim, dim), (dim,)) * 2, (dim,), (dim,), (heads, dim), (heads,)]
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        weights = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
        exact = [w.double().requires_grad_() for w in weights]
        plain = layer_by_layer(exact, group, True)
        grad = torch.randn(plain.shape, generator=generator).to(device)
        gradients = torch.autograd.grad(plain, exact, grad.double())
        ours = [_forward(weights, group, True), *_backward(grad, weights, group, True).split([w.numel() for w in weights])]
        pairs = [(ours[0], plain), *zip(ours[1:], gradients, strict=True)]
        scale = max(float(b.norm()) for b in gradients)  # that of the last norm's bias may be all rounding
        return max(float((a.double().flatten() - b.flatten()).norm() / max(float(b.norm()), 1e-3 * scale)) for a, b in pairs)


def layer_by_layer(weights: list[Tensor], group: int, residual: bool) -> Tensor:
    """``position_bias`` by torch's layers."""
    line = torch.arange(1 - group, group, device=weights[0].device, dtype=weights[0].dtype)
    x = F.linear(torch.cartesian_prod(line, line), *weights[:2])
    for first in (2, 6, 10):
        scale, shift, weight, bias = weights[first:first + 4]
        y = F.linear(F.layer_norm(x, x.shape[-1:], scale, shift).relu(), weight, bias)
        x = x + y if residual and first < 10 else y
    return x


def _forward(weights: list[Tensor], group: int, residual: bool) -> Tensor:
    from models.gpu import position_bias_kernels as kernels  # only where there is a GPU: Triton takes a second to import

    table = _like_forward(weights, group, residual)
    with torch.cuda.device(table.device if table.is_cuda else -1):
        kernels.forward[(-(-len(table) // ROWS),)](
            *(w.contiguous() for w in weights), table, group, len(weights[0]), len(weights[-1]), RESIDUAL=residual, num_warps=8)
    return table


def _backward(grad: Tensor, weights: list[Tensor], group: int, residual: bool) -> Tensor:
    from models.gpu import position_bias_kernels as kernels

    parts = grad.new_empty(-(-len(grad) // ROWS), sum(w.numel() for w in weights))
    with torch.cuda.device(grad.device if grad.is_cuda else -1):
        kernels.backward[(len(parts),)](
            grad, *(w.contiguous() for w in weights), parts, parts.shape[1], group, len(weights[0]), len(weights[-1]), RESIDUAL=residual,
            num_warps=8)
    return parts.sum(0)


def _like_forward(weights: list[Tensor], group: int, residual: bool) -> Tensor:
    return weights[0].new_empty((2 * group - 1) ** 2, len(weights[-1]))


def _like_backward(grad: Tensor, weights: list[Tensor], group: int, residual: bool) -> Tensor:
    return grad.new_empty(sum(w.numel() for w in weights))


_LIBRARY = torch.library.Library("cross_scale_bias", "DEF")
_LIBRARY.define("position_bias(Tensor[] weights, int group, bool residual) -> Tensor")
_LIBRARY.define("position_bias_backward(Tensor grad, Tensor[] weights, int group, bool residual) -> Tensor")
for _key, _forms in dict(CUDA=(_forward, _backward), Meta=(_like_forward, _like_backward)).items():
    _LIBRARY.impl("position_bias", _forms[0], _key)
    _LIBRARY.impl("position_bias_backward", _forms[1], _key)
