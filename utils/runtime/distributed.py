"""Several processes, or one: the only module that knows torch.distributed.

Without a launcher, or where torch was built without it, everything here answers for rank 0 of 1 and does nothing else.
torch.distributed is imported when a group is really wanted, not before.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from config import ConfigError
from utils.runtime.heartbeat import Heartbeat


@dataclass
class _Group:
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    active: bool = False
    heartbeat: Heartbeat | None = None


_group = _Group()


def _launched() -> _Group:
    """The place the launcher's environment gives this process.

    Raises:
        ConfigError: the environment is set by halves.
    """
    _take_over_slurm()
    names = ("RANK", "WORLD_SIZE")
    given = {name: os.environ[name] for name in names if os.environ.get(name, "") != ""}
    if not given:
        return _Group()
    try:
        numbers = {name: int(value) for name, value in given.items()}
        local_rank = int(os.environ.get("LOCAL_RANK") or 0)
    except ValueError:
        raise ConfigError(f"the launcher's variables are no numbers ({', '.join(f'{k}={v}' for k, v in given.items())}); "
                          "start with torchrun, or unset them to run as one process") from None
    missing = [name for name in names if name not in given]
    if numbers.get("WORLD_SIZE", 0) != 1 or missing:
        missing += [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)] if not missing else []
    if missing:
        raise ConfigError(f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} set but {' and '.join(missing)} "
                          f"{'is' if len(missing) == 1 else 'are'} not; start with torchrun --nproc_per_node N main.py ..., "
                          f"or unset {' and '.join(given)} to run as one process")
    rank, world_size = numbers["RANK"], numbers["WORLD_SIZE"]
    if not 0 <= rank < world_size:
        raise ConfigError(f"RANK is {rank} and WORLD_SIZE {world_size}; a rank lies below the number of processes")
    return _Group(rank, world_size, local_rank)


def _take_over_slurm() -> None:
    """Give ``srun python main.py`` the variables that torchrun would set; an interactive or batch shell has no step of tasks."""
    tasks, env = os.environ.get("SLURM_STEP_NUM_TASKS", "1"), os.environ
    if "RANK" in env or "WORLD_SIZE" in env or not tasks.isdigit() or int(tasks) < 2 or "SLURM_PROCID" not in env:
        return
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], tasks
    env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
    env.setdefault("LOCAL_WORLD_SIZE", env.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0])
    if address := env.get("SLURM_LAUNCH_NODE_IPADDR"):
        env.setdefault("MASTER_ADDR", address)
    if (job := env.get("SLURM_JOB_ID", "")).isdigit():
        env.setdefault("MASTER_PORT", str(20000 + int(job) % 20000))


def _end_with_launcher() -> None:
    """A launcher that is killed takes its processes along: each gets SIGTERM, saves and stops (Linux)."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
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
    group = _launched()
    _end_with_launcher()
    if group.world_size > 1:
        import torch.distributed as dist
        if not dist.is_available():
            raise ConfigError(f"WORLD_SIZE is {group.world_size}, but this torch is built without torch.distributed; "
                              "start without torchrun")
        if device.type == "cuda":
            if not dist.is_nccl_available():
                raise ConfigError("this torch has no NCCL, which several GPUs need; start one process, or use DEVICE cpu")
            if not os.environ.get("LOCAL_RANK"):
                raise ConfigError("WORLD_SIZE is set but LOCAL_RANK is not, so processes do not know their GPUs; start with torchrun")
            if device.index != group.local_rank:
                raise ConfigError(f"DEVICE is {device} for every process; with {group.world_size} of them use DEVICE cuda")
        wait = timedelta(minutes=minutes + 1)
        try:
            # torchrun's store outlives the processes it starts anew, who would read the addresses of those before them (seen
            # with torch 2.15 and gloo): so each attempt has names of its own there.
            store = _launcher_store(wait) if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else None
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=wait, store=store,
                                    rank=group.rank, world_size=group.world_size)
        except (RuntimeError, ValueError, OSError) as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
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
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False, timeout=wait)
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def mark(phase: str, step: int | None = None) -> None:
    """Note what this process begins to do, for the sentence of a job that hangs or breaks."""
    if _group.heartbeat is not None:
        _group.heartbeat.mark(phase, step)


def place() -> str:
    """Where this process of several stands, such as ``rank 1, training, step 12``."""
    return f"rank {_group.rank}" + (f", {_group.heartbeat.place()}" if _group.heartbeat is not None else "")


def announce_failure(sentence: str) -> None:
    """Let the other processes know that this one ends, and that it says why itself."""
    if _group.heartbeat is not None:
        _group.heartbeat.announce_failure(sentence)


def blame() -> str | None:
    """After a broken exchange: the sentence on the process that broke it; empty when another process says it, None if unknown."""
    return _group.heartbeat.blame() if _group.heartbeat is not None else None


def rank() -> int:
    """This process's number among all."""
    return _group.rank


def world_size() -> int:
    """The number of processes."""
    return _group.world_size


def local_rank() -> int:
    """This process's number on its machine: the GPU it takes. Valid before ``init``."""
    _take_over_slurm()
    value = os.environ.get("LOCAL_RANK", "0")
    return int(value) if value.isdigit() else 0


def restarts() -> int:
    """Times that torchrun or Slurm has started this job anew by itself."""
    counts = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return sum(int(count) for count in counts if count.isdigit())


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
