"""How many DataLoader workers a process starts, what memory and files the system allows them, and how they end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal

from data.messages import Notice

MIN_SHARED_MEMORY = 1 << 20  # bytes; the locks of the workers lie there too
PREFETCH = 2  # batches that each worker holds ready
# Of a process, where their number is chosen. One core prepares 300 to 900 ImageNet crops a second for a GPU (scripts/bench_data.py, path
# device), so 32 of them feed 9,600 or more, which no model here trains at on one GPU: more would only take memory and time to start.
MOST_WORKERS = 32
_FILES_PER_WORKER, _OTHER_FILES = 24, 96  # open at a time


def kill_workers() -> None:
    """Kill DataLoader workers that are still there at exit: they ignore the signal that multiprocessing would send."""
    children = multiprocessing.active_children()
    if children and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each of them
    for child in children:
        child.kill()


def ignore_signals(_: int) -> None:
    """A worker's ``worker_init_fn``. Signals may reach the whole process group; the main process reacts, and still needs its workers."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def usable_cpus() -> int:
    """CPUs this process may use, by its affinity and its container's quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        if quota != "max":
            cpus = min(cpus, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return cpus


def worker_count(requested: int, local_world_size: int = 1) -> int:
    """DataLoader workers of this process: ``requested`` (DATA.NUM_WORKERS), or for -1 its share of the CPUs but one, which the process
    itself needs; of one or two CPUs all, since it mostly waits there, and ``MOST_WORKERS`` at most.

    Args:
        local_world_size: processes of the run on this machine, which share its CPUs.
    """
    if requested >= 0:
        return requested
    share = usable_cpus() // local_world_size
    return min(MOST_WORKERS, share - 1 if share > 2 else max(1, share))


def pipe_reason(batch_bytes: int, workers: int, local_world_size: int = 1) -> str:
    """Why batches must travel through pipes instead of shared memory, as a notice; "" where shared memory will do.

    Looks at /dev/shm (docker gives 64 MB) and at the limit of open files, which it raises as far as the hard limit first.

    Args:
        batch_bytes: size of a batch as a worker hands it over.
        workers: of this process.
        local_world_size: processes of the run on this machine, which share /dev/shm; each has a limit of files of its own.
    """
    if not workers:
        return ""
    of_all = workers * local_world_size
    free, needed = free_shared_memory(), batch_bytes * (PREFETCH + 1) * of_all
    if free is not None and free < needed:
        return Notice(f"/dev/shm has {free / 2**20:.1f} MiB free and {of_all} DataLoader workers may need {needed / 2**20:.1f} MiB; "
                      "batches go through pipes, which is slower (docker: --shm-size=8g, or fewer --num-workers)")
    limit = _raise_file_limit(needed := _OTHER_FILES + _FILES_PER_WORKER * workers)
    if limit < needed:
        return Notice(f"only {limit} files may be open at a time and {workers} DataLoader workers may need {needed}; batches go "
                      "through pipes, which is slower (ulimit -n 4096)")
    return ""


def free_shared_memory() -> int | None:
    """Bytes that can be written in /dev/shm, none where it is read-only; None where the system has none."""
    try:
        if os.path.isdir("/dev/shm") and not os.access("/dev/shm", os.W_OK):
            return 0
        status = os.statvfs("/dev/shm")
    except (OSError, AttributeError):
        return None
    return status.f_bavail * status.f_frsize


def _raise_file_limit(needed: int) -> int:
    """How many files this process may open, after raising the limit as far as is needed and allowed."""
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
