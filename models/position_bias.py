"""Relative position biases of attention within square groups of tokens: CrossFormer's and, as its ablation, Swin's.

Shapes: G side of a group, N = G*G its tokens, h heads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from models.cpu_bf16 import compute_dtype
from models.gpu import position_bias as gpu_position_bias

POSITIONS = ("dpb", "dpb_residual", "table", "none")


class RelativePositionBias(nn.Module):
    """A bias for every pair of tokens of a group and every head, looked up by the offset from key to query.

    A subclass's ``forward`` takes the offsets (dy, dx) of a group, (M, 2), and gives their biases, (M, h).
    """

    def __init__(self) -> None:
        super().__init__()
        self._cached: tuple[Any, Tensor, Tensor] | None = None  # see cached_bias
        self._pairs: dict[Any, tuple[Tensor, Tensor]] = {}  # see pairs

    def train(self, mode: bool = True) -> RelativePositionBias:
        self._cached = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__, _cached=None, _pairs={})  # neither copied nor pickled

    def cached_bias(self, group: int, device: torch.device) -> Tensor:
        """``bias``, computed once for as long as evaluation goes on, the weights stay and the group is the same."""
        return self._cached_result(self.bias, group, device)

    def cached_table(self, group: int, device: torch.device) -> Tensor:
        """The biases of ``relative_offsets``, ((2G-1)^2, h) in the weights' type, computed once like ``cached_bias``."""
        return self._cached_result(self.by_offset, group, device)

    def _cached_result(self, function: Callable[[int, torch.device], Tensor], group: int, device: torch.device) -> Tensor:
        # Weights are compared by identity and version, and on a CPU by value: what is written to .data leaves no trace in the version.
        # (On a GPU that would be a synchronisation; there train() or eval() must come between.)
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return function(group, device)
        weights = list(self.parameters())
        if any(type(w.data) is not Tensor or w.is_inference() or w.is_meta for w in weights):  # traced, or without versions
            return function(group, device)
        key = (function.__name__, group, device, compute_dtype(weights[0]), [(w.data_ptr(), w.dtype, w._version) for w in weights])
        values = torch.cat([w.flatten() for w in weights]) if device.type == "cpu" else torch.empty(0)  # two empty ones are equal
        if self._cached is None or self._cached[0] != key or not torch.equal(self._cached[1], values):
            self._cached = (key, values, function(group, device))
        return self._cached[2]

    def by_offset(self, group: int, device: torch.device) -> Tensor:
        """``cached_table``, computed."""
        with self._own_type(device):
            return self(self.pairs(group, device, next(self.parameters()))[0]).contiguous()

    @staticmethod
    def _own_type(device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Without autocast: of so few numbers the conversions would take most of the time."""
        return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)

    def bias(self, group: int, device: torch.device) -> Tensor:
        """(h, N, N), queries before keys, in the type that products are computed in."""
        weight = next(self.parameters())
        plain = device.type == "cpu" and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        offsets, index = (relative_offsets(group, device).to(weight.dtype), None) if plain else self.pairs(group, device, weight)
        with self._own_type(device):
            table = self(offsets)
        if index is None:
            return _BiasOfPairs.apply(table, group, compute_dtype(table))
        # index_select: the backward of table[index] is not repeatable on two threads.
        bias = table.index_select(0, index.flatten()).unflatten(0, index.shape)
        # Contiguous: CUDA's fused kernels take no bias whose keys do not lie side by side. Converted while whole, it stays aligned, and
        # what is cached is not converted again.
        return bias.permute(2, 0, 1).contiguous().to(compute_dtype(bias))[..., :group * group]

    def pairs(self, group: int, device: torch.device, weight: Tensor) -> tuple[Tensor, Tensor]:
        """``relative_offsets`` in the type of ``weight``, and which of them each pair of tokens has, (N, N); on CUDA with rows filled up
        to a multiple of 8, since its fused kernel copies a bias whose rows do not begin at such. Made once: on a GPU it is 14 launches.
        """
        key = (group, device, weight.dtype, getattr(weight, "fake_mode", None))  # a fake tensor belongs to its mode
        kept = not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        if kept and key in self._pairs:
            return self._pairs[key]
        with torch.inference_mode(False) if kept else contextlib.nullcontext():  # training must be able to use it
            index = relative_index(group, device).view(group * group, -1)
            if device.type == "cuda":
                index = F.pad(index, (0, -len(index) % 8))
            made = relative_offsets(group, device).to(weight.dtype), index
        if kept:
            self._pairs[key] = made
        return made


class DynamicPositionBias(RelativePositionBias):
    """DPB: an MLP from the offset (dy, dx) to a bias per head (CrossFormer, section 3.2.2). (M, 2) -> (M, h).

    ``residual`` adds skips around the two hidden layers, the paper's ablation; the published models have none.
    """

    def __init__(self, dim: int, num_heads: int, residual: bool = False):
        super().__init__()
        self.residual = residual
        self.pos_proj = nn.Linear(2, dim)
        self.pos1 = nn.Sequential(nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, dim))
        self.pos2 = nn.Sequential(nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, dim))
        self.pos3 = nn.Sequential(nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, num_heads))

    def by_offset(self, group: int, device: torch.device) -> Tensor:
        weights = list(self.parameters())
        if not gpu_position_bias.fits(weights):
            return super().by_offset(group, device)
        return gpu_position_bias.position_bias(weights, group, self.residual)

    def forward(self, offsets: Tensor) -> Tensor:
        x = self.pos_proj(offsets)
        for layer in (self.pos1, self.pos2):
            x = x + layer(x) if self.residual else layer(x)
        return self.pos3(x)


class PositionTable(RelativePositionBias):
    """Swin's relative position bias: a learned row per offset of a group of ``group_size``. (M, 2) -> (M, h)."""

    def __init__(self, group_size: int, num_heads: int):
        super().__init__()
        self.group_size = group_size
        self.table = nn.Parameter(torch.empty((2 * group_size - 1) ** 2, num_heads))
        trunc_normal_(self.table, std=0.02)

    def forward(self, offsets: Tensor) -> Tensor:
        """``offsets``: of a group no larger than the table's."""
        offsets = offsets.long() + self.group_size - 1
        return self.table.index_select(0, offsets[:, 0] * (2 * self.group_size - 1) + offsets[:, 1])


def relative_offsets(group: int, device: torch.device) -> Tensor:
    """All offsets between two tokens of a group, ((2G-1)^2, 2), dy major, from -(G-1) to G-1."""
    line = torch.arange(1 - group, group, device=device, dtype=torch.float32)
    return torch.stack(torch.meshgrid(line, line, indexing="ij"), dim=-1).reshape(-1, 2)


def relative_index(group: int, device: torch.device) -> Tensor:
    """Row in ``relative_offsets`` of query position minus key position, flat (N*N,), query major."""
    line = torch.arange(group, device=device)
    place = (line[:, None] * (2 * group - 1) + line).flatten()
    return (place[:, None] + (2 * group * (group - 1) - place)).flatten()


class _BiasOfPairs(torch.autograd.Function):
    """A table ((2G-1)^2, h) of offsets as the bias (h, N, N) of pairs of tokens, in ``dtype``; the gradient, in the table's own type,
    as products with zeros and ones, axis by axis: with large groups twice as fast as adding row by row."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, group: int, dtype: torch.dtype) -> Tensor:
        ctx.group, ctx.dtype = group, table.dtype
        pairs = table.to(dtype).index_select(0, relative_index(group, table.device))
        return pairs.unflatten(0, (group * group, -1)).permute(2, 0, 1).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        group = ctx.group
        line, offsets = torch.arange(group, device=grad.device), torch.arange(1 - group, group, device=grad.device)
        which = ((line[:, None] - line).view(-1, 1) == offsets).to(ctx.dtype)  # (N, 2G-1)
        # (h, y, x, y', x') to (h, y - y', x - x')
        pairs = grad.to(ctx.dtype).unflatten(2, (group, group)).unflatten(1, (group, group)).transpose(2, 3)
        sums = which.t() @ (pairs.reshape(-1, group * group) @ which).unflatten(0, (len(grad), -1))
        return sums.flatten(1).t(), None, None
