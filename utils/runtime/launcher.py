"""What torchrun, Slurm or mpirun told this process of its place in a job: the only reader of the launcher's variables. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from config import ConfigError


@dataclass(frozen=True)
class Place:
    """A process's place among those of its job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def place() -> Place:
    """This process's place; alone where no launcher started it.

    Raises:
        ConfigError: the environment is set by halves.
    """
    _take_over_slurm()
    names = ("RANK", "WORLD_SIZE")
    given = {name: os.environ[name] for name in names if os.environ.get(name, "") != ""}
    if not given:
        return Place()
    try:
        numbers = {name: int(value) for name, value in given.items()}
        local = int(os.environ.get("LOCAL_RANK") or 0)
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
    return Place(rank, world_size, local)


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


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else default


def rank() -> int:
    """As the launcher says, without a check; 0 without one."""
    return _number("RANK", 0)


def local_rank() -> int:
    """This process's number on its machine: the GPU it takes."""
    _take_over_slurm()
    return _number("LOCAL_RANK", 0)


def knows_local_rank() -> bool:
    return bool(os.environ.get("LOCAL_RANK"))


def local_world_size() -> int:
    """Processes of this job on this machine."""
    return max(1, _number("LOCAL_WORLD_SIZE", 1))


def of_several() -> bool:
    """Whether this is one process of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def restarts() -> int:
    """Times that torchrun or Slurm has started this job again by itself."""
    return sum(_number(name, 0) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def attempt() -> int:
    """Number of torchrun's present attempt, from 0."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0)


def job() -> str:
    """What tells this job from others; empty without a launcher."""
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID") or ""


def is_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def has_torchruns_store() -> bool:
    """Whether torchrun's own process keeps the job's store, at ``address``."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def address() -> tuple[str, int]:
    """Host and port at which the processes of the job meet."""
    return os.environ.get("MASTER_ADDR", ""), _number("MASTER_PORT", 0)
