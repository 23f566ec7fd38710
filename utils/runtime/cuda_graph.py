"""CUDA graphs: what was launched on a GPU once is launched again as a whole, at the cost of one launch."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all recordings there. On it libraries have what they need for it from the rehearsals, and autograd's nodes, which
    remember the stream of the forward pass, know no other.
    """
    return torch.cuda.Stream(device)


class CudaRecorder:
    """Records work on a CUDA device as graphs, which share their memory and so must be replayed one after the other, as recorded.

    A replay repeats the launches alone, with the numbers that they were given: what changes from one to the next must stand in tensors that
    stay where they are. Random numbers go by the seed and offset that the device's default generator has at the replay. Results are
    overwritten by the next replay.
    """

    def __init__(self, device: torch.device):
        self.device, self.stream, self.pool = device, _stream(device), torch.cuda.graph_pool_handle()

    def rehearse(self, work: Callable[[], T]) -> tuple[T, str]:
        """(what ``work`` gives, what in it waits for the device and so cannot be recorded, or nothing). The work is done."""
        current, mode = torch.cuda.current_stream(self.device), torch.cuda.get_sync_debug_mode()
        self.stream.wait_stream(current)
        with warnings.catch_warnings(record=True) as told, torch.cuda.stream(self.stream):
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = work()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        current.wait_stream(self.stream)
        waits = [line for line in told if "synchronizing CUDA operation" in str(line.message)]
        for line in told:
            if line not in waits and "Synchronization debug mode" not in str(line.message):
                warnings.warn_explicit(line.message, line.category, line.filename, line.lineno)
        return result, f"{os.path.basename(waits[0].filename)}, line {waits[0].lineno}, waits for the GPU" if waits else ""

    def record(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """(what replays ``work``, its result, in the memory where each replay puts it). The work is not done; the host's part never is.

        Raises:
            RuntimeError: it cannot be recorded, or memory does not suffice.
        """
        gc.collect()  # nothing dead may keep memory, or nodes of autograd, that the recording would come upon
        graph, current, drawn = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device), torch.default_generator.get_state()
        try:
            # thread_local: the loader's thread may go on pinning memory.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                result = work()
        except BaseException:
            self._clean_up(current)
            raise
        if not torch.equal(drawn, torch.default_generator.get_state()):
            raise RuntimeError("it draws random numbers on the host")
        return graph.replay, result

    def _clean_up(self, current: torch.cuda.Stream) -> None:
        """Leave the recording, where torch, which found it broken, did not: its stream, its memory and its way to random numbers."""
        torch.cuda.set_stream(current)
        index = self.device.index or 0
        with contextlib.suppress(RuntimeError, AttributeError, TypeError):
            torch._C._cuda_endAllocateToPool(index, self.pool)  # raises where torch has done both
            torch._C._cuda_releasePool(index, self.pool)
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())
