"""How many DataLoader workers there are, what the system allows them, and how they end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal

from yacs.config import CfgNode

from data.messages import Notice


def _end_workers() -> None:
    """At exit, end loading processes that nothing has shut down: they ignore the signal that multiprocessing would send."""
    children = multiprocessing.active_children()
    if children and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each of them
    for child in children:
        child.kill()


def _quiet_worker(_: int) -> None:
    """Signals may reach the whole process group; the main process decides, and still needs its workers for it."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def usable_cpus() -> int:
    """CPUs this process may use: its affinity, and the quota of its container."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        if quota != "max":
            cpus = min(cpus, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return cpus


def worker_count(config: CfgNode) -> int:
    """Loading processes of this process: the config's number, or its share of the CPUs, 8 at most."""
    if config.DATA.NUM_WORKERS >= 0:
        return config.DATA.NUM_WORKERS
    here = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, min(8, usable_cpus() // max(1, int(here) if here.isdigit() else 1)))


LEAST_SHARED_MEMORY = 1 << 20  # bytes; the locks of loading processes lie there too
_PREFETCH = 2  # batches each worker holds ready
_FILES_OF_A_WORKER, _FILES_BESIDES = 24, 96


def needs_pipe(batch_bytes: int, workers: int) -> str:
    """Why batches must travel through pipes instead of shared memory, as a line for the user; "" where they need not.

    Looks at /dev/shm (docker gives 64 MB) and at the limit of open files, which it raises to the hard limit first.

    Args:
        batch_bytes: of a batch, as the workers hand it over.
        workers: of this process and of its neighbours on the machine.
    """
    if not workers:
        return ""
    free, needed = free_shared_memory(), batch_bytes * (_PREFETCH + 1) * workers
    if free is not None and free < needed:
        return (Notice(f"/dev/shm has {free / 2**20:.1f} MiB free and {workers} loading processes may need {needed / 2**20:.1f} MiB; "
                "batches go through pipes, which is slower (docker: --shm-size=8g, or fewer --num-workers)"))
    limit = _raise_file_limit(needed := _FILES_BESIDES + _FILES_OF_A_WORKER * workers)
    if limit < needed:
        return (Notice(f"only {limit} files may be open at a time and {workers} loading processes may need {needed}; batches go "
                "through pipes, which is slower (ulimit -n 4096)"))
    return ""


def free_shared_memory() -> int | None:
    """Bytes free in /dev/shm; None where there is none to look at."""
    try:
        found = os.statvfs("/dev/shm")
    except (OSError, AttributeError):
        return None
    return found.f_bavail * found.f_frsize


def _raise_file_limit(needed: int) -> int:
    """The number of files this process may open, raised as far as is needed and allowed."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return needed
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < needed:
        wanted = needed if hard == unlimited else min(hard, needed)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return needed if soft == unlimited else soft
