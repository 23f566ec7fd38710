"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from yacs.config import CfgNode


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a pure function of the step.

    Attributes:
        base, warmup, floor: peak, first and last rate, already scaled to the global batch.
        warmup_steps, total_steps: lengths in optimizer steps.
        prefix: the decay starts when the warm-up ends (Swin); else it is a function of the absolute step, already partly
            decayed at the end of the warm-up (CrossFormer).
        milestones: for step and multistep, the steps at which the rate is multiplied by ``factor``, rising.
        power: for poly, of the share of the decay's steps that is still to come.
    """

    name: str
    base: float
    warmup: float
    floor: float
    warmup_steps: int
    total_steps: int
    prefix: bool = True
    milestones: Sequence[int] = ()
    factor: float = 0.1
    power: float = 1.0

    def lr_at(self, step: int) -> float:
        """Rate of the update number ``step`` (from 0)."""
        if step < self.warmup_steps:
            return self.warmup + (self.base - self.warmup) * step / self.warmup_steps
        if self.name in ("step", "multistep"):
            return self.base * self.factor ** bisect_right(self.milestones, step)
        shift = self.warmup_steps if self.prefix else 0
        done = min(1.0, (step - shift) / max(1, self.total_steps - shift))
        if self.name == "linear":
            return self.floor + (self.base - self.floor) * (1 - done)
        if self.name == "poly":
            return self.floor + (self.base - self.floor) * (1 - done) ** self.power
        return self.floor + (self.base - self.floor) * 0.5 * (1 + math.cos(math.pi * done))


def lr_scale(config: CfgNode, global_batch: int) -> float:
    """Linear scaling: the config's rates are for ``TRAIN.LR_BATCH`` images a step."""
    return global_batch / config.TRAIN.LR_BATCH if config.TRAIN.LR_BATCH else 1.0


def build_schedule(config: CfgNode, steps_per_epoch: int, global_batch: int) -> Schedule:
    """The schedule of ``TRAIN.LR_SCHEDULER`` in optimizer steps, its rates scaled to the global batch."""
    train, plan, scale = config.TRAIN, config.TRAIN.LR_SCHEDULER, lr_scale(config, global_batch)
    total = train.ITERATIONS or train.EPOCHS * steps_per_epoch
    milestones: Sequence[int] = ()
    if plan.NAME == "step":
        every = max(1, round(plan.DECAY_EPOCHS * steps_per_epoch))
        milestones = range(every, total, every)
    elif plan.NAME == "multistep":
        milestones = sorted(round(when * (1 if train.ITERATIONS else steps_per_epoch)) for when in plan.MULTISTEPS)
    return Schedule(plan.NAME, train.BASE_LR * scale, train.WARMUP_LR * scale, train.MIN_LR * scale,
                    train.WARMUP_STEPS or round(train.WARMUP_EPOCHS * steps_per_epoch), total, plan.WARMUP_PREFIX, milestones,
                    plan.DECAY_RATE if plan.NAME == "step" else plan.GAMMA, plan.POWER)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the rate of this step, times the factor of its layer or part."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
