"""``--version`` and ``--env``: what this program runs on, for a bug report. Imports no torch.

No names of people, machines or folders are told.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shutil
import sys
from importlib import metadata

import psutil

from config import PROGRAM_FOLDER
from data.loading.workers import usable_cpus
from utils.runtime.provenance import output

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "Pillow", "yacs", "PyYAML", "safetensors", "simplejpeg", "opencv-python-headless",
             "datasets", "webdataset", "onnx", "onnxscript", "onnxruntime", "tensorboard", "scikit-learn")
_SETTINGS = re.compile(r"(OMP|MKL|NCCL|GLOO|CUDA|PYTORCH|TORCH|SLURM_(NNODES|NTASKS|GPUS)|WORLD_SIZE|LOCAL_WORLD_SIZE|LC_ALL|LANG$)")
_HARMLESS = re.compile(r"[\w.,:+\-]{1,60}")


def version_text(_: argparse.ArgumentParser, __: object) -> str:
    """One line a program: this one, Python, torch with its CUDA, torchvision and timm."""
    cuda = torch_cuda()
    return "\n".join([
        f"trainer {commit() or 'of no known commit'}",
        f"Python {platform.python_version()}",
        f"torch {version('torch')} ({f'CUDA {cuda}' if cuda else 'no CUDA'})",
        f"torchvision {version('torchvision')}",
        f"timm {version('timm')}"])


def environment_text(_: argparse.ArgumentParser, __: object) -> str:
    """A block to paste into a bug report."""
    names = {name: version(name) for name in _PACKAGES}
    cuda = torch_cuda()
    lines = [("program", commit() or "of no known commit"),
             ("system", f"{platform.system()} {platform.release()} {platform.machine()}{_distribution()}"),
             ("Python", f"{platform.python_version()} ({platform.python_implementation()})"),
             ("packages", ", ".join(f"{name} {found}" for name, found in names.items() if found != "not installed")),
             ("not installed", ", ".join(name for name, found in names.items() if found == "not installed") or "-"),
             ("torch's CUDA", cuda or "none"),
             ("GPUs", "; ".join(gpus()) or "none seen by nvidia-smi"),
             ("CPU", f"{_cpu()}, {os.cpu_count()} logical, {usable_cpus()} usable here"),
             ("memory", _memory()),
             ("settings", ", ".join(f"{name}={value}" for name, value in sorted(os.environ.items())
                                    if _SETTINGS.match(name) and _HARMLESS.fullmatch(value)) or "-")]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def version(package: str) -> str:
    """A package's version by its metadata, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def torch_cuda() -> str:
    """The CUDA (or ROCm) that torch was built with, read from its version file; empty for none."""
    found = importlib.util.find_spec("torch")
    try:
        with open(os.path.join(os.path.dirname(found.origin), "version.py"), encoding="utf-8") as file:
            text = file.read()
    except (OSError, AttributeError, TypeError):
        return ""
    for key, name in (("cuda", ""), ("hip", "ROCm ")):
        if built := re.search(rf"^{key}\b[^=]*= *'([^']+)'", text, re.M):
            return name + built[1]
    return ""


def commit() -> str:
    """The commit this program is at, with a plus when files differ from it; empty outside a checkout."""
    name = output("git", "-C", PROGRAM_FOLDER, "rev-parse", "--short=12", "HEAD")
    changed = output("git", "-C", PROGRAM_FOLDER, "status", "--porcelain", "--untracked-files=no") if name else ""
    return f"commit {name}{', with changes' if changed else ''}" if name else ""


def gpus() -> list[str]:
    """Name, memory and driver of each NVIDIA GPU."""
    if shutil.which("nvidia-smi") is None:
        return []
    table = output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return [line.strip() for line in table.splitlines() if line.count(",") == 2]


def _distribution() -> str:
    try:
        return f", {platform.freedesktop_os_release()['PRETTY_NAME']}"
    except (OSError, KeyError, AttributeError):
        return ""


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or "unknown"


def _memory() -> str:
    """Main memory, the container's limit, and shared memory."""
    parts = [f"{psutil.virtual_memory().total / 2**30:.1f} GiB"]
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            limit = file.read().strip()
        if limit.isdigit():
            parts.append(f"{int(limit) / 2**30:.1f} GiB allowed to this container")
    except OSError:
        pass
    if sys.platform.startswith("linux") and os.path.isdir("/dev/shm"):
        parts.append(f"{shutil.disk_usage('/dev/shm').free / 2**30:.1f} GiB free in /dev/shm")
    return ", ".join(parts)
