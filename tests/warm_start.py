"""Processes of ``main.py`` that need not import torch, timm and the like first: two thirds of what a small run takes.

A server has imported these and nothing of the program, has run no operation and started no thread; ``Process`` has it fork one. From
there on all is as ``python main.py`` does it: environment, arguments, working folder, session, ``sitecustomize`` (by which
tests/faults.py breaks things), ``__main__``, the interpreter's end; it has a pid of its own and can be stopped and killed.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

MAIN = Path(__file__).parent.parent / "main.py"


class Process:
    """As ``subprocess.Popen`` with pipes for text, as far as the tests use it."""

    def __init__(self, arguments: list[str], cwd: Path, env: dict[str, str], start_new_session: bool = False, script: Path = MAIN):
        self.args, self.returncode = [str(script), *arguments], None
        pipes = [os.pipe() for _ in range(2)]
        self.stdout, self.stderr = (open(ours, encoding="utf-8") for ours, _ in pipes)  # noqa: SIM115 (open until they are read)
        request = dict(args=self.args, cwd=str(cwd), env=env, session=start_new_session)
        self.pid: int = _ask(request, [theirs for _, theirs in pipes])
        for _, theirs in pipes:
            os.close(theirs)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask(dict(poll=self.pid))
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (timeout or float("inf"))
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What is still to be read of both streams, when the process and all that hold them have ended."""
        said = ["", ""]

        def read(number: int, stream: TextIO) -> None:
            with stream:
                said[number] = stream.read()

        deadline = time.monotonic() + (timeout or float("inf"))
        readers = [threading.Thread(target=read, args=part, daemon=True) for part in enumerate((self.stdout, self.stderr))]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(None if timeout is None else max(0.0, deadline - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(None if timeout is None else max(0.1, deadline - time.monotonic()))
        return said[0], said[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(arguments: list[str], cwd: Path, env: dict[str, str], timeout: float, script: Path = MAIN) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run``, with the output as text."""
    process = Process(arguments, cwd, env, script=script)
    try:
        out, err = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


# --------------------------------------------------------------------------------------------------
# The server
# --------------------------------------------------------------------------------------------------

@functools.cache
def _server() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
        server = subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], env=environment, pass_fds=[theirs.fileno()],
                                  stdin=subprocess.DEVNULL)
    atexit.register(server.kill)
    return ours


def _ask(request: dict[str, object], descriptors: list[int] = ()) -> int | None:
    socket.send_fds(_server(), [json.dumps(request).encode()], list(descriptors))
    return json.loads(_server().recv(1 << 20))


def _serve(connection: socket.socket) -> list[str] | None:
    """Answer until the test process ends; in a forked child, its script and arguments."""
    while True:
        text, descriptors, *_ = socket.recv_fds(connection, 1 << 20, 2)
        if not text:
            return None
        request = json.loads(text)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif (answer := os.fork()) == 0:
            connection.close()
            _become(request, descriptors)
            return request["args"]
        for descriptor in descriptors:
            os.close(descriptor)
        connection.send(json.dumps(answer).encode())


def _become(request: dict[str, object], descriptors: list[int]) -> None:
    """Everything but the arguments that distinguishes a fresh process."""
    if request["session"]:
        os.setsid()
    for number, descriptor in zip((1, 2), descriptors, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.path[0] = os.path.dirname(request["args"][0])
    for folder in filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep)):
        sys.path.insert(1, folder)
        if (site := Path(folder, "sitecustomize.py")).exists():
            exec(compile(site.read_text(), str(site), "exec"), {"__name__": "sitecustomize"})


if __name__ == "__main__":
    for module in ("timm.data", "torch.optim", "torch._dynamo", "torch.utils.tensorboard", "torchvision", "matplotlib.figure", "jinja2",
                   "scipy.stats"):
        importlib.import_module(module)
    gc.freeze()  # else the forked process would look through these objects, and so copy their memory

    given = _serve(socket.socket(fileno=int(sys.argv[1])))
    if given is not None:
        sys.argv = given
        runpy.run_path(given[0], run_name="__main__")
