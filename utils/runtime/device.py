"""Where and in which precision to compute."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import sys

import torch

from config import ConfigError


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that ``DEVICE`` names; ``auto`` takes CUDA, then MPS, then the CPU.

    Raises:
        ConfigError: the device is not there.
    """
    name = name.lower()
    mps = getattr(torch.backends, "mps", None)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if mps is not None and mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"DEVICE is {name!r}; choose auto, cpu, cuda, cuda:N or mps") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"DEVICE is {name!r}; choose auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"DEVICE is {name}, but torch finds no CUDA GPU here; use DEVICE cpu (or auto), "
                              "or install a torch built for this machine's driver")
        index = device.index if device.index is not None else local_rank
        if index >= torch.cuda.device_count():
            raise ConfigError(f"this process wants GPU {index}, but there are {torch.cuda.device_count()}; "
                              "start at most one process a GPU (torchrun --nproc_per_node)")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    if device.type == "mps" and (mps is None or not mps.is_available()):
        raise ConfigError("DEVICE is mps, but torch finds no Apple GPU here; use DEVICE cpu (or auto)")
    return device


def measure_convolutions(device: torch.device, one_size: bool) -> None:
    """Whether cuDNN times its kernels for every shape of convolution when that first comes, and keeps the fastest.

    Worth it where each step has the shapes of the last (``one_size``): seconds at the start, and what it chooses unmeasured is at its worst
    for convolutions such as a stem's, of few channels and a stride. With images of many sizes it would time them again and again. Two runs
    may choose two kernels, and so differ in rounding, as they may on a GPU in any case.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = one_size


def device_name(device: torch.device) -> str:
    """What computes, as its maker calls it: ``NVIDIA H200``, or ``cpu (x86_64, 8 threads)``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Have the allocator keep what large temporaries leave, instead of handing it back and zeroing new pages in every step.

    The step on a CPU is 3 to 20 % faster for it, the data pipeline 5 %. Does nothing, and says so, without glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS and musl lack it, Windows has no such handle
        return False
    # Older versions take no threshold above 32 MiB.
    kept = mallopt(_M_MMAP_THRESHOLD, 1 << 30) or mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    return bool(kept and mallopt(_M_TRIM_THRESHOLD, 2 ** 31 - 1))


def give_back_freed_memory() -> None:
    """Hand back what ``keep_freed_memory`` let the allocator keep; does nothing without glibc."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory_mib(device: torch.device) -> int:
    """Peak memory so far in MiB: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() >> 20
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> 20 if sys.platform == "darwin" else peak >> 10  # macOS counts bytes, Linux KiB


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
