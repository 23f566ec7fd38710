"""How many processes may read data."""

from __future__ import annotations

import os

from yacs.config import CfgNode


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
