"""How much memory there is, and how much a piece of work takes."""

from __future__ import annotations

import contextlib
import errno
import gc
import re
from collections.abc import Callable, Iterator, Mapping

import psutil
import torch

from config import ProgramError
from utils.runtime import distributed, launcher
from utils.runtime.device import give_back_freed_memory, peak_memory_mib, synchronize

HEADROOM = 0.95  # share of the memory that a choice may fill: allocators lose some between blocks, and runs last longer than trials


class OutOfMemory(ProgramError):
    """Memory did not suffice for a step."""

    any_rank = True


def out_of_memory(error: Exception, remedy: str = "free some, or go where there is more") -> OutOfMemory | None:
    """The error of ours, which advises ``remedy``, for one that torch raised for lack of memory; None for any other error."""
    return OutOfMemory(f"out of memory; {remedy}") if is_out_of_memory(error) else None


# As torch, its libraries and its workers say it where they raise no error of their own for it.
_WORDS = (
    "not enough memory", "can't allocate memory", "cannot allocate memory", "bad_alloc", "caught memoryerror", "out of memory",
    "storage size calculation overflowed",
    "_alloc_failed", "_allocation_failed",  # cuBLAS, cuDNN, cuFFT, cuSOLVER, cuSPARSE; cuRAND: CUBLAS_STATUS_ALLOC_FAILED and the like
    # cuDNN's algorithms whose work space finds no room are passed over without a word; these are said when none is left.
    "unable to find an engine to execute this computation", "unable to find a valid cudnn algorithm",
    "mtlbuffer", "invalid buffer size")  # Apple's
_NVJPEG = re.compile(r"jpeg[^:]*: 5\b")  # torchvision tells nvJPEG's status by its number: NVJPEG_STATUS_ALLOCATOR_FAILURE
# What else the libraries say where they find no room for what they set up at first use, and what means something else where there is.
_WORDS_WHEN_FULL = ("_status_not_initialized", "_status_internal_error", "cufft_internal_error", "cudnn_status_not_supported")
_FULL = 512 << 20  # bytes left on a GPU, beyond what the libraries take


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory did not suffice: a GPU's or the machine's. A kernel that wants more of a multiprocessor's own
    memory than there is (Triton's OutOfResources) does not."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if not isinstance(error, RuntimeError) or isinstance(error, ProgramError):
        return False
    text = str(error).lower()
    return (any(words in text for words in _WORDS) or _NVJPEG.search(text) is not None
            or any(words in text for words in _WORDS_WHEN_FULL) and _gpu_is_full())


def _gpu_is_full() -> bool:
    with contextlib.suppress(RuntimeError):  # an error before has left the GPU unusable
        return torch.cuda.is_initialized() and torch.cuda.mem_get_info()[0] < _FULL
    return False


def available(device: torch.device, budget: int) -> int:
    """Bytes that this process may use on ``device``.

    Args:
        budget: PLAN.MEMORY: for each GPU, or on a CPU for all processes of the machine; 0 is all there is.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        there = free + torch.cuda.memory_reserved(device)  # what others take is not free
        return min(there, budget or total)
    if device.type == "mps":
        return budget or torch.mps.recommended_max_memory()
    return (budget or _host_bytes()) // (launcher.local_world_size() if distributed.world_size() > 1 else 1)


def _host_bytes() -> int:
    """Memory of this machine, or container (which psutil does not know of), that is free or this process's own."""
    host = psutil.virtual_memory()
    sizes = [host.available + psutil.Process().memory_info().rss, host.total]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError), open(path) as file:
            sizes.append(int(file.read()))
    return min(size for size in sizes if size > 0)


def _peak_since_reset() -> int:
    """Bytes of this process at their peak (Linux, which alone can reset it; psutil does not tell it); 0 elsewhere."""
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return 0


def peak(device: torch.device, cached: bool = True) -> int:
    """Most bytes taken since ``reset_peak``: by the GPU's allocator, or by this process.

    Args:
        cached: of a GPU, with what the allocator keeps for later and loses between its blocks, which is what must be there; without it,
            those of tensors alone.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) if cached else torch.cuda.max_memory_allocated(device)
    return (_peak_since_reset() if device.type == "cpu" else 0) or peak_memory_mib(device) << 20


def reset_peak(device: torch.device) -> None:
    """Let ``peak`` start again, where the system can."""
    gc.collect()
    give_back_freed_memory()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_of(work: Callable[[], None], device: torch.device) -> int | None:
    """Bytes taken at the peak of ``work``, what lay there before included; None when memory did not suffice."""
    reset_peak(device)
    try:
        work()
        synchronize(device)
        return peak(device)
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
    reset_peak(device)  # after the handler, in which the error and those that led to it still hold the tensors of their frames
    return None


def extrapolated(measured: Mapping[int, int | None], size: int) -> float:
    """Bytes that ``size`` images will take, by the line through the two largest sizes measured; 0 before there are two."""
    known = sorted((n, peak) for n, peak in measured.items() if peak is not None)[-2:]
    if len(known) < 2:
        return 0.0
    (a, first), (b, second) = known
    return second + max(0.0, (second - first) / (b - a)) * (size - b)


def of_workers() -> int:
    """Bytes that this process's children (the DataLoader workers) have for themselves."""
    total = 0
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it has just ended
            total += child.memory_full_info().uss
    return total


@contextlib.contextmanager
def limited_to(device: torch.device, budget: int) -> Iterator[None]:
    """Inside, a GPU's allocator gives no more than ``budget`` bytes, as a smaller GPU's would."""
    if device.type != "cuda" or not budget:
        yield
        return
    total = torch.cuda.mem_get_info(device)[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def format_size(size: float) -> str:
    """``1.2 GiB`` or ``350 MiB``."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
