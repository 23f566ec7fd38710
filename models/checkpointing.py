"""Activation checkpointing: activations computed again in the backward pass instead of kept, by block or by stage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, *context: Any, unit: str) -> Tensor:
    """``x`` through the blocks of a stage, each called with ``context`` too.

    Args:
        unit: what the backward pass computes again: each ``block``, whose input alone is kept until then, the whole ``stage``, or
            nothing ("", see ``HierarchicalModel.recomputed``).
    """
    members = list(blocks)
    if not unit:
        return _sequentially(members, x, *context)
    for part in [members] if unit == "stage" else [[block] for block in members]:
        # A graph of the whole model notes the statistics in its forward pass alone, and takes no such context.
        once = {} if torch.compiler.is_compiling() else dict(context_fn=partial(_contexts, part))
        x = checkpoint(partial(_sequentially, part), x, *context, use_reentrant=False, **once)
    return x


def _sequentially(blocks: Sequence[nn.Module], x: Tensor, *context: Any) -> Tensor:
    for block in blocks:
        x = block(x, *context)
    return x


def _contexts(blocks: Sequence[nn.Module]) -> tuple[Any, Any]:
    """Those of the forward pass and of its repetition."""
    return contextlib.nullcontext(), _frozen_statistics(blocks)


@contextlib.contextmanager
def _frozen_statistics(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Batch norms of ``blocks`` come out with the running statistics they had: they have counted the batch already."""
    norms = [module for block in blocks for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        yield
    finally:
        for buffer, values in before:
            buffer.data.copy_(values)  # .data: autograd would take it for a change of what it has saved
