"""What a training step holds in memory: its peak, and the parts that must be there."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from utils.checkpoints.state import TrainState
from utils.tasks.base import Batch
from utils.training.engine import Step, StepPlan

_MARK = "the forward pass has ended"


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step.

    Attributes:
        weights: parameters and buffers, those of an average of weights on the same device included.
        gradients: of all parameters that are trained; there when activations are not any more.
        optimizer: its state.
        activations: what autograd keeps from the forward pass for the backward pass.
        peak: of all tensors on the device at one time; a library's own work space on a CPU is not among them.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int

    def line(self) -> str:
        mib = {part: value / 2**20 for part, value in dataclasses.asdict(self).items()}
        return (f"memory of a training step: peak {mib['peak']:.0f} MiB; weights {mib['weights']:.0f}, optimizer {mib['optimizer']:.0f}, "
                f"activations {mib['activations']:.0f}, gradients {mib['gradients']:.0f} MiB")


def measure_step(state: TrainState, plan: StepPlan, work: Callable[[StepPlan], None], resident: int) -> StepMemory | None:
    """The memory of one step on a CPU or a CUDA device; None on others, whose allocators cannot be asked.

    Args:
        work: does one step of the plan it is given; the optimizer's state is there already, gradients are not.
        resident: bytes of the step's images and targets.
    """
    weights = _bytes([*state.model.parameters(), *state.model.buffers()])
    if state.ema is not None and next(state.ema.module.parameters()).device == plan.device:
        weights *= 2
    optimizer = _bytes([t for kept in state.optimizer.state.values() for t in kept.values() if isinstance(t, Tensor)])
    gradients = _bytes([p for p in state.model.parameters() if p.requires_grad])
    measured = {"cpu": _on_cpu, "cuda": _on_cuda}.get(plan.device.type)
    if measured is None:
        return None
    activations, peak = measured(plan, work)
    return StepMemory(weights, gradients, optimizer, activations, weights + optimizer + resident + peak)


def _bytes(tensors: list[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _watched(plan: StepPlan, forward_done: Callable[[], None]) -> StepPlan:
    """``plan`` with a look at the memory where the loss is computed from the forward pass's result."""
    def loss(outputs: Any, batch: Batch) -> Tensor:
        forward_done()
        return plan.task.loss(outputs, batch)

    task = copy.copy(plan.task)
    task.loss = loss
    return dataclasses.replace(plan, task=task, step=Step)


def _on_cuda(plan: StepPlan, work: Callable[[StepPlan], None]) -> tuple[int, int]:
    """Bytes above those at the start: after the forward pass, and at the most."""
    torch.cuda.synchronize(plan.device)
    torch.cuda.reset_peak_memory_stats(plan.device)
    start, seen = torch.cuda.memory_allocated(plan.device), []
    work(_watched(plan, lambda: seen.append(torch.cuda.memory_allocated(plan.device))))
    torch.cuda.synchronize(plan.device)
    return seen[-1] - start, torch.cuda.max_memory_allocated(plan.device) - start


def _on_cpu(plan: StepPlan, work: Callable[[StepPlan], None]) -> tuple[int, int]:
    """As ``_on_cuda``, from the profiler's record of what the allocator gave and took."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells of every start and stop otherwise

    def mark() -> None:
        with record_function(_MARK):
            pass

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        work(_watched(plan, mark))
    events = profiler.profiler.kineto_results.events()
    marks = [event.start_ns() for event in events if event.name() == _MARK]
    held, activations, peak = 0, 0, 0
    for when, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        held += size
        peak = max(peak, held)
        if when <= marks[-1]:
            activations = held
    return activations, peak
