"""Several processes, or one: the only module that knows torch.distributed.

Without a launcher, or where torch was built without it, everything here answers for rank 0 of 1 and does nothing else.
torch.distributed is imported when a group is really wanted, not before.
"""

from __future__ import annotations

import contextlib
import inspect
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from config import ConfigError, ProgramError
from utils.runtime import launcher
from utils.runtime.heartbeat import Heartbeat


class PeerLost(ProgramError):
    """The exchange between processes broke: another process of the job ended. An empty message: that one says why itself."""

    any_rank = True


@dataclass
class _Group:
    rank: int = 0
    world_size: int = 1
    active: bool = False
    heartbeat: Heartbeat | None = None


_group = _Group()


def _end_with_launcher() -> None:
    """A launcher that is killed takes its processes along: each gets SIGTERM, saves and stops (Linux)."""
    if sys.platform == "linux" and launcher.is_torchrun():
        with contextlib.suppress(OSError, AttributeError):
            import ctypes
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def init(device: torch.device, minutes: float = 20.0) -> None:
    """Join the launcher's group, if there is one; ``device`` is what this process computes on.

    Args:
        minutes: how long the job may stand still (DIST_TIMEOUT), waiting for the others at the start included.

    Raises:
        ConfigError: the environment is half set, torch lacks torch.distributed, or the address cannot be used.
    """
    global _group
    place = launcher.place()
    group = _Group(place.rank, place.world_size)
    _end_with_launcher()
    if group.world_size > 1:
        import torch.distributed as dist
        if not dist.is_available():
            raise ConfigError(f"WORLD_SIZE is {group.world_size}, but this torch is built without torch.distributed; "
                              "start without torchrun")
        if device.type == "cuda":
            if not dist.is_nccl_available():
                raise ConfigError("this torch has no NCCL, which several GPUs need; start one process, or use DEVICE cpu")
            if not launcher.knows_local_rank():
                raise ConfigError("WORLD_SIZE is set but LOCAL_RANK is not, so processes do not know their GPUs; start with torchrun")
            if device.index != place.local_rank:
                raise ConfigError(f"DEVICE is {device} for every process; with {group.world_size} of them use DEVICE cuda")
        wait = timedelta(minutes=minutes + 1)
        try:
            # torchrun's store outlives the processes it starts again, who would read the addresses of those before them (seen
            # with torch 2.15 and gloo): so each attempt has names of its own there.
            store = _launcher_store(wait) if launcher.has_torchruns_store() else None
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=wait, store=store,
                                    rank=group.rank, world_size=group.world_size)
        except (RuntimeError, ValueError, OSError) as error:
            address = "{}:{}".format(*launcher.address())
            if "address already in use" in str(error).lower() or "EADDRINUSE" in str(error):
                raise ConfigError(f"port {address} is in use by another program; use torchrun --standalone, "
                                  "or another --master-port") from None
            raise ConfigError(f"the processes did not find each other at {address} "
                              f"({str(error).splitlines()[0][:120]}); check MASTER_ADDR and MASTER_PORT") from None
        group.active = True
        signs = dist.PrefixStore("signs", _launcher_store(timedelta(seconds=20)))
        group.heartbeat = Heartbeat(signs, group.rank, group.world_size, 60 * minutes)
    _group = group


def _launcher_store(wait: timedelta) -> Any:
    """A new connection to the store at the master's address; what an earlier attempt of this job wrote is not seen."""
    import torch.distributed as dist
    store = dist.TCPStore(*launcher.address(), is_master=False, wait_for_workers=False, timeout=wait)
    return dist.PrefixStore(f"attempt {launcher.attempt()}", store)


def begin_phase(phase: str, step: int | None = None) -> None:
    """Note what this process begins to do, for the sentence of a job that hangs or breaks."""
    if _group.heartbeat is not None:
        _group.heartbeat.begin_phase(phase, step)


def current_place() -> str:
    """Where this process of several stands, such as ``rank 1, training, step 12``."""
    return f"rank {_group.rank}" + (f", {_group.heartbeat.current_place()}" if _group.heartbeat is not None else "")


def announce_failure(sentence: str) -> None:
    """Let the other processes know that this one ends, and that it says why itself."""
    if _group.heartbeat is not None:
        _group.heartbeat.announce_failure(sentence)


# Words of the exchanges' own errors, which torch raises as RuntimeErrors without a type of their own.
_BROKEN = ("gloo", "NCCL", "Connection reset", "Connection closed", "DistBackendError", "Broken pipe")


def peer_lost(error: Exception) -> PeerLost | None:
    """The error of ours for one that torch raised when an exchange broke; None for any other error."""
    if _group.world_size == 1 or not isinstance(error, RuntimeError) or not any(word in str(error) for word in _BROKEN):
        return None
    culprit = _group.heartbeat.broken_by() if _group.heartbeat is not None else None
    return PeerLost("another process of this job stopped; its own message says why" if culprit is None else culprit)


def rank() -> int:
    """This process's number among all."""
    return _group.rank


def world_size() -> int:
    """The number of processes."""
    return _group.world_size


def is_main() -> bool:
    """True on the process that speaks and writes."""
    return _group.rank == 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over all ranks, in place."""
    if _group.active:
        import torch.distributed as dist
        dist.all_reduce(tensor)
    return tensor


def gather_objects(value: Any) -> list[Any]:
    """Every rank's ``value``, on every rank, by rank."""
    if not _group.active:
        return [value]
    import torch.distributed as dist
    values: list[Any] = [None] * _group.world_size
    dist.all_gather_object(values, value)
    return values


def broadcast_buffers(model: nn.Module) -> None:
    """Give every rank rank 0's buffers (batch-norm statistics differ between ranks), before evaluation and saving."""
    if _group.active:
        import torch.distributed as dist
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def wrap(model: nn.Module, device: torch.device, accumulate: int = 1, compression: str = "off") -> nn.Module:
    """``model`` under DDP, or itself when alone. Gradients are views of the communication buckets.

    Buffers are not exchanged in training: batch-norm statistics are taken from rank 0 where they matter, in evaluation and saving
    (``broadcast_buffers``), all other buffers are constants.

    Args:
        accumulate: micro-batches a step; the graph is announced as static for one alone (torch's reducer breaks when the first
            backward pass is one without an exchange).
        compression: ``bf16`` sends gradients in half the bytes, ``off`` as they are.
    """
    if not _group.active:
        return model
    from torch.nn.parallel import DistributedDataParallel
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # the newer name and the older
    parallel = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None,
                                       gradient_as_bucket_view=True, static_graph=accumulate == 1, **{buffers: False})
    if compression == "bf16":
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
        parallel.register_comm_hook(None, bf16_compress_hook)
    return parallel


def no_sync(model: nn.Module, skip: bool) -> contextlib.AbstractContextManager[Any]:
    """Leave gradients unreduced while ``skip``: for all but the last micro-batch of a step."""
    return model.no_sync() if skip and hasattr(model, "no_sync") else contextlib.nullcontext()


def sync_batch_norm(model: nn.Module) -> nn.Module:
    """``model`` with batch norms that share statistics over all GPUs."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def stop_watching() -> None:
    """What follows is this process's own business: nobody waits for it, so that it may take its time."""
    if _group.heartbeat is not None:
        _group.heartbeat.stop()


def shutdown() -> None:
    """Leave the group after a run that ended well."""
    global _group
    if _group.active:
        import torch.distributed as dist
        if _group.heartbeat is not None:
            _group.heartbeat.stop()
        dist.destroy_process_group()
        _group = _Group()
