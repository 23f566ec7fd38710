"""Outputs and gradients of two forms of the same function, compared."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def gradients(f: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The output of ``f``, and the gradients of its inputs for a fixed gradient of the output."""
    y = f(*inputs)
    pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
    return [y.detach(), *torch.autograd.grad(y, inputs, pull)]


def close(ours: list[Tensor], plain: list[Tensor], limit: float) -> bool:
    return all(a.shape == b.shape and float((a.float() - b.float()).abs().max() / b.float().abs().max()) < limit
               for a, b in zip(ours, plain, strict=True))


def in_bf16(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return f(*inputs)
    return run
