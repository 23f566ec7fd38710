"""What counts as a lack of memory, and what is counted of it; CUDA's functions have stand-ins."""

from __future__ import annotations

import errno
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from config import ConfigError
from utils.runtime import memory
from utils.runtime.foreign_errors import translated
from utils.runtime.memory import OutOfMemory, is_out_of_memory

CUDA = torch.device("cuda")
LACKING = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.81 GiB"),
    MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory"),
    *map(RuntimeError, (
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "cuFFT error: CUFFT_ALLOC_FAILED",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        "FIND was unable to find an engine to execute this computation after trying 7 plans.",
        "GET was unable to find an engine to execute this computation", "Unable to find a valid cuDNN algorithm to run convolution",
        "Error while decoding JPEG images: Failed to create nvjpeg decoder state: 5", "Failed to decode jpeg stream: 5",
        "NCCL error in: ProcessGroupNCCL.cpp, unhandled cuda error. Last error: Cuda failure 2 'out of memory'",
        "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.", "std::bad_alloc",
        "MPS backend out of memory (MPS allocated: 5.00 GB, other allocations: 1 GB, max allowed: 6.80 GB).",
        "Failed to allocate private MTLBuffer for size 9", "Invalid buffer size: 24.00 GB",
        "backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB"))]
OTHER = [
    ValueError("out of memory"), ConfigError("out of memory"), OSError(errno.ENOENT, "no such file"),
    *map(RuntimeError, (
        "out of resource: shared memory, Required: 262144, Hardware limit: 232448. Reducing block sizes or `num_stages` may help.",
        "Failed to decode jpeg stream: 4", "Failed to parse jpeg stream: 15", "CUDA error: an illegal memory access was encountered",
        "The size of tensor a (65536) must match the size of tensor b (65535) at non-singleton dimension 1",
        "expected scalar type Float but found BFloat16", "CUDA error: device-side assert triggered"))]
WHEN_FULL = [RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
             RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED")]


@pytest.mark.parametrize("error", LACKING, ids=lambda error: str(error)[:40])
def test_every_form_of_out_of_memory_is_known(error: Exception) -> None:
    assert is_out_of_memory(error) and isinstance(translated(error), OutOfMemory)


@pytest.mark.parametrize("error", OTHER, ids=lambda error: str(error)[:40])
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("error", WHEN_FULL, ids=lambda error: str(error)[:40])
def test_what_libraries_say_on_a_full_gpu_counts_only_there(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_out_of_memory(error)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for free, expected in ((3 << 30, False), (100 << 20, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_, free=free: (free, 80 << 30))
        assert is_out_of_memory(error) == expected

    def unusable(*_: object) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "mem_get_info", unusable)
    assert not is_out_of_memory(error)


class Gpu:
    """CUDA's allocator: what tensors take, what is kept for later, and what was the most of both."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, total: int = 100, outside: int = 10):
        self.allocated = self.reserved = self.most_allocated = self.most_reserved = 0
        self.total, self.outside, self.emptied = total, outside, 0
        functions = dict(
            max_memory_reserved=lambda *_: self.most_reserved, max_memory_allocated=lambda *_: self.most_allocated,
            memory_reserved=lambda *_: self.reserved, empty_cache=self.empty_cache, reset_peak_memory_stats=self.reset,
            synchronize=lambda *_: None, mem_get_info=lambda *_: (self.total - self.outside - self.reserved, self.total))
        for name, function in functions.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def take(self, size: int, lost: int = 0) -> None:
        """For tensors, of which the allocator loses ``lost`` between its blocks."""
        if self.reserved + size + lost > self.total - self.outside:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.allocated += size
        self.reserved += size + lost
        self.most_allocated, self.most_reserved = max(self.most_allocated, self.allocated), max(self.most_reserved, self.reserved)

    def free(self) -> None:
        self.allocated = 0

    def empty_cache(self) -> None:
        self.emptied += 1
        if not self.allocated:
            self.reserved = 0

    def reset(self, *_: object) -> None:
        self.most_allocated, self.most_reserved = self.allocated, self.reserved


def test_on_a_gpu_reserved_memory_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)

    def work() -> None:
        gpu.take(50, lost=20)
        gpu.free()

    assert memory.peak_of(work, CUDA) == 70 == memory.peak(CUDA)
    assert memory.peak(CUDA, cached=False) == 50
    assert memory.peak_of(work, CUDA) == 70  # what an earlier piece of work left is given back first
    assert memory.available(CUDA, 0) == 90 and memory.available(CUDA, 60) == 60


def test_a_size_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors of all frames, those of the errors that led to it too, are gone before the cache is emptied."""
    gpu, held = Gpu(monkeypatch), []

    def hold() -> torch.Tensor:
        tensor = torch.ones(1)
        held.append(weakref.ref(tensor))
        return tensor

    def inner() -> None:
        tensor = hold()
        gpu.take(1000)
        del tensor

    def work() -> None:
        tensor = hold()
        try:
            inner()
        except RuntimeError as error:
            raise RuntimeError(f"backend raised: {error}") from error
        del tensor

    alive: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(sum(ref() is not None for ref in held)))
    gc.disable()
    try:
        assert memory.peak_of(work, CUDA) is None
    finally:
        gc.enable()
    assert len(held) == 2 and alive == [0, 0]
    with pytest.raises(ValueError, match="other"):
        memory.peak_of(lambda: (_ for _ in ()).throw(ValueError("other")), CUDA)


def test_fit_on_a_gpu_counts_what_libraries_take_beside_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    from utils.training.batch_size import _try_sizes
    gpu = Gpu(monkeypatch, total=1000, outside=100)
    tried: list[int] = []

    def peak(micro: int) -> int | None:
        def work() -> None:
            tried.append(micro)
            gpu.outside = 300  # handles, kernels
            gpu.take(micro, lost=10)
            gpu.free()
        return memory.peak_of(work, CUDA)

    trial = SimpleNamespace(plan=SimpleNamespace(device=CUDA), peak=peak)
    sizes = [100, 200, 400, 600, 685, 800, 1600]

    def room() -> int:
        return int(0.98 * memory.available(CUDA, 0))

    found, measured = _try_sizes(trial, sizes, room(), room)
    assert found == 600 and measured[600] == 610 and measured[1600] is None and 685 in tried  # 695 of 700: more than may be filled
