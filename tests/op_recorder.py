"""A stand-in for CUDA graphs on a CPU: it notes the operations of a piece of work and repeats them in the same memory, without Python.

As on a GPU, a number that the host passes stays what it was, what the host reads is refused, and results lie where they lay.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

T = TypeVar("T")
WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique", "bincount")


class OpRecorder:
    """As ``utils.runtime.cuda_graph.CudaRecorder``, on a CPU."""

    recordings = 0  # of all, since a test set it to 0
    replays = 0

    def __init__(self, device: torch.device):
        assert device.type == "cpu"

    def rehearse(self, work: Callable[[], T]) -> tuple[T, str]:
        with _Notes(execute=False) as notes:
            return work(), notes.refused

    def record(self, work: Callable[[], T]) -> tuple[Callable[[], Any], T]:
        OpRecorder.recordings += 1
        state = torch.get_rng_state()
        notes = _Notes(execute=True)
        try:
            with notes:
                result = work()
        finally:
            notes.undo()
            torch.set_rng_state(state)
        if notes.refused:
            raise RuntimeError(notes.refused)
        for leaf in tree_leaves(result):  # as if nothing had been computed yet
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                leaf.fill_(torch.nan)
        return notes.replay, result


class _Notes(TorchDispatchMode):
    """The operations inside, their arguments and the places of their results."""

    def __init__(self, execute: bool):
        super().__init__()
        self.noted: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        self.before: list[tuple[Tensor, Tensor]] = []
        self.own: dict[int, torch.UntypedStorage] = {}
        self.keeps, self.refused = execute, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        index = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in WAITS or any(isinstance(i, Tensor) and i.dtype == torch.bool for i in index):
            self.refused = self.refused or f"{name} waits for the device"
        if self.keeps:
            self._keep_what_is_written(func, args, kwargs)
        result = func(*args, **kwargs)
        if not self.keeps or name in ("_local_scalar_dense",):
            return result
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        new = [t.detach() for t in outputs if t.untyped_storage().data_ptr() not in known or t.numel() == 0]
        for tensor in new:
            self.own[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        if len(new) == len(outputs) or func._schema.is_mutable:  # a view needs no work
            self.noted.append((func, *tree_map_only(Tensor, _same_place, (args, kwargs)), new))
        return result

    def _keep_what_is_written(self, func, args, kwargs) -> None:
        """Values of tensors from before the recording that an operation changes in place, to be put back: recording does no work."""
        arguments = func._schema.arguments
        given = [*zip(arguments, args, strict=False), *((a, kwargs[a.name]) for a in arguments if a.name in kwargs)]
        for argument, value in given:
            # Batch norms' running statistics are written although their schema does not say so.
            if argument.alias_info is not None and argument.alias_info.is_write or argument.name in ("running_mean", "running_var"):
                for tensor in tree_leaves(value):
                    if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.own:
                        self.before.append((tensor.detach(), tensor.detach().clone()))

    def undo(self) -> None:
        with torch.no_grad():
            for tensor, values in reversed(self.before):
                tensor.copy_(values)

    @torch.no_grad()
    def replay(self) -> None:
        OpRecorder.replays += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of out= that has a size
            for func, args, kwargs, places in self.noted:
                results = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
                for place, result in zip(places, results, strict=False):
                    if place.data_ptr() != result.data_ptr():
                        place.copy_(result)


def _same_place(tensor: Tensor) -> Tensor:
    """The argument without its history, but the very memory."""
    return tensor.detach()
