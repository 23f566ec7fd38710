"""A global batch as micro-batches x accumulation x processes."""

from __future__ import annotations

from yacs.config import CfgNode

from config import ConfigError, with_values


def recipe_batch(config: CfgNode, world_size: int) -> int:
    """Images a step over all processes that the recipe is for: TRAIN.GLOBAL_BATCH, or what batch, accumulation and processes give."""
    return config.TRAIN.GLOBAL_BATCH or config.DATA.BATCH_SIZE * config.TRAIN.ACCUMULATION_STEPS * world_size


def local_batch(wanted: int, whose: str, world_size: int) -> int:
    """Each process's part of a global batch.

    Raises:
        ConfigError: it cannot be shared evenly, with the numbers of processes that can.
    """
    if wanted % world_size:
        near = sorted(divisors(wanted), key=lambda n: abs(n - world_size))[:4]
        other = "begin anew with --pretrained" if whose == "the checkpoint's" else "state another with --global-batch"
        raise ConfigError(f"{whose} global batch of {wanted} cannot be shared by {world_size} processes; "
                          f"start {', '.join(map(str, sorted(near)))} processes, or {other}")
    return wanted // world_size


def divisors(number: int) -> list[int]:
    """All of them, rising."""
    return [n for n in range(1, number + 1) if number % n == 0]


def split_batch(config: CfgNode, local: int, micro: int, whose: str) -> CfgNode:
    """The config with a process's batch of ``local`` images in micro-batches of ``micro``, a divisor."""
    return with_values(config, {"DATA.BATCH_SIZE": micro, "TRAIN.ACCUMULATION_STEPS": local // micro},
                       f"derived from {whose} global batch")
