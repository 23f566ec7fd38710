"""Faults put into a real run: a module that Python imports at the start of each process breaks one thing at one moment."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT, environment
from warm_start import Process

# BREAK names what breaks, BREAK_AFTER how many calls are left alone, BREAK_RANK the rank (none: every process), BREAK_HOW what
# happens: an error, a NaN, a wait in which the process can be killed or a slow call (both leave a file to say that it has begun).
_SITE = '''
import os, sys, time
_what = os.environ.get("BREAK", "")
if _what and os.environ.get("BREAK_RANK", os.environ.get("RANK")) == os.environ.get("RANK"):
    sys.path.insert(0, {root!r})
    _calls = 0

    def _broken(function):
        def call(*args, **kwargs):
            global _calls
            _calls += 1
            how, after = os.environ.get("BREAK_HOW", "error"), int(os.environ.get("BREAK_AFTER", 0))
            if _calls <= after:
                return function(*args, **kwargs)
            if how == "error":
                raise ValueError("injected")
            if how == "nan":
                times = int(os.environ.get("BREAK_TIMES", 1))
                return function(*args, **kwargs) * (float("nan") if _calls <= after + times else 1)
            if _calls == after + 1:
                open({sign!r}, "w").close()
                time.sleep(600 if how == "wait" else 1.5)
            return function(*args, **kwargs)
        return call

    if _what == "loader":
        import data.transforms.pipeline as place
        place.Decoder.open = _broken(place.Decoder.open)
    elif _what == "index":
        import data.build as place
        place.detect_layout = _broken(place.detect_layout)
    elif _what == "loss":
        import torch.nn.functional as place
        place.cross_entropy = _broken(place.cross_entropy)
    elif _what == "loss_of_color":
        import torch.nn.functional as place
        place.mse_loss = _broken(place.mse_loss)
    elif _what == "evaluation":
        from utils.evaluation.metrics import SumEvaluator
        SumEvaluator.update = _broken(SumEvaluator.update)
    elif _what == "save":
        import utils.checkpoints.folder as place
        place.write_checkpoint = _broken(place.write_checkpoint)
    else:  # fsync, replace, ... of the system
        setattr(os, _what, _broken(getattr(os, _what)))
'''


def fault(folder: Path, what: str, **details: object) -> dict[str, str]:
    """Environment variables that break ``what`` in a process started with them; ``waiting(folder)`` appears when it waits."""
    place = folder / "fault"
    place.mkdir(exist_ok=True)
    (place / "sitecustomize.py").write_text(_SITE.format(root=str(ROOT), sign=str(waiting(folder))))
    return {"PYTHONPATH": str(place), "BREAK": what, **{f"BREAK_{name.upper()}": str(value) for name, value in details.items()}}


def waiting(folder: Path) -> Path:
    """The file that a process of ``fault(..., how="wait")`` leaves when it has come to the place."""
    return folder / "waiting"


def start(*arguments: object, cwd: Path, launcher: tuple[str, ...] = (), **env: str) -> subprocess.Popen[str] | Process:
    """The program in a process group of its own, with ``launcher`` arguments of Python before it."""
    words = [str(argument) for argument in arguments]
    if not launcher:
        return Process(words, cwd, environment(**env), start_new_session=True)
    return subprocess.Popen([sys.executable, *launcher, str(ROOT / "main.py"), *words], cwd=cwd, env=environment(**env), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def pair(*arguments: object, cwd: Path, second: tuple[object, ...] | None = None, names: dict[str, str] | None = None,
         **env: str) -> list[subprocess.Popen[str]]:
    """Two ranks without a launcher that would end one when the other fails; ``second``: other arguments of rank 1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    given = names or dict(RANK="RANK", WORLD_SIZE="WORLD_SIZE", MASTER_ADDR="MASTER_ADDR")
    return [start(*(arguments if rank == 0 or second is None else second), cwd=cwd, MASTER_PORT=port, CUDA_VISIBLE_DEVICES="",
                  **{given["RANK"]: str(rank), given["WORLD_SIZE"]: "2", given["MASTER_ADDR"]: "127.0.0.1"}, **env) for rank in (0, 1)]


def ends(processes: list[subprocess.Popen[str]], seconds: float = 60) -> list[tuple[int, str, str]]:
    """(status, output, errors) of each; one that is still there after ``seconds`` is killed and fails the test."""
    deadline = time.time() + seconds
    results = []
    for process in processes:
        try:
            out, err = process.communicate(timeout=max(1, deadline - time.time()))
        except subprocess.TimeoutExpired:
            for other in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(other.pid, signal.SIGKILL)
            raise AssertionError(f"still running after {seconds} s") from None
        results.append((process.returncode, out, err))
    return results


def wait_for(path: Path, words: str = "", seconds: float = 60) -> None:
    """Until ``path`` is there and holds ``words``."""
    deadline = time.time() + seconds
    while time.time() < deadline:
        if path.exists() and (not words or words in path.read_text()):
            return
        time.sleep(0.02)
    raise AssertionError(f"no {words!r} in {path}")
