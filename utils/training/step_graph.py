"""A training step recorded once and replayed: the host gives a GPU a few graphs a step in place of a thousand launches (COMPILE graphs).

Forward and backward pass of a micro-batch are one graph, which the other micro-batches replay, and the update is another. Outside them are
the batch's way to the device and its mixing, the seeds, the learning rate, the sums for the log, and the average of weights.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from data.messages import Message, Notice
from utils.checkpoints.state import TrainState
from utils.optim.optimizer import skips_on_device
from utils.runtime.compile import records_steps
from utils.runtime.cuda_graph import CudaRecorder
from utils.tasks.base import Batch
from utils.training.engine import Step, StepPlan

WARM_UP = 3  # steps before the recording: compilation, the choice of kernels, the optimizer's state, and what is kept for later steps

T = TypeVar("T")
Say = Callable[[str], None]


class Recorder(Protocol):
    """As ``utils.runtime.cuda_graph.CudaRecorder``."""

    def rehearse(self, work: Callable[[], T]) -> tuple[T, str]: ...

    def record(self, work: Callable[[], T]) -> tuple[Callable[[], Any], T]: ...


def choose_step(how: str, device: torch.device, world_size: int, say: Say) -> Callable[[nn.Module, TrainState, StepPlan], Step]:
    """What makes the runner of a run's steps (``StepPlan.step``): ``Step``, or where COMPILE, ``how``, asks for graphs one that records.

    Args:
        say: takes the line on what was recorded, or a notice where that cannot be.
    """
    if not records_steps(how):
        return Step
    if device.type != "cuda" or world_size > 1:
        say(Notice(f"steps are not recorded (COMPILE {how}): that is for one process on a CUDA GPU"))
        return Step
    return Graphs(say)


class Graphs:
    """Makes the recorded step of a model, and keeps it: a run's epochs share the recording."""

    def __init__(self, say: Say, recorder: Callable[[torch.device], Recorder] = CudaRecorder):
        self.say, self.recorder = say, recorder
        self._made: GraphedStep | None = None

    def __call__(self, model: nn.Module, state: TrainState, plan: StepPlan) -> Step:
        made = self._made
        if made is None or made.model is not model or made.state is not state or made.plan is not plan:
            self._made = None  # its memory first
            self._made = GraphedStep(model, state, plan, self.recorder, self.say)
        return self._made


class GraphedStep(Step):
    """Steps as they are while warming up and for batches of another shape; a recording for all others.

    What has put other tensors in the place of those that a recording knows (an optimizer that took over a checkpoint) has it made anew.
    """

    def __init__(self, model: nn.Module, state: TrainState, plan: StepPlan, recorder: Callable[[torch.device], Recorder], say: Say):
        super().__init__(model, state, plan)
        self.recorder, self.say = recorder, say
        self._rehearsal: _Rehearsal | None = _Rehearsal(model, state, plan, recorder(plan.device))
        self._recording: _Recording | None = None
        self._layout: Any = None
        self._off = False

    def run(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if not self._off and not can_be_recorded(batch, self.plan.device):
            self._give_up(f"batches of TASK {self.plan.task.name} have no one shape")
        if self._off:
            return super().run(batch)
        if self._rehearsal is not None:
            return self._rehearse(self._rehearsal, batch)
        if self._recording is not None and self._recording.is_stale():
            self._recording = None
        alike = _layout([batch]) == self._layout
        if alike and self._recording is None:
            self._record(batch)
        return self._recording.run(batch) if alike and self._recording is not None else super().run(batch)

    def _rehearse(self, rehearsal: _Rehearsal, batch: Batch) -> tuple[Tensor, Tensor]:
        result = rehearsal.run(batch)
        if rehearsal.steps == WARM_UP:
            self._rehearsal, self._layout = None, _layout([batch])
            if rehearsal.obstacle:
                self._give_up(rehearsal.obstacle)
        return result

    def _record(self, batch: Batch) -> None:
        begun = time.perf_counter()
        try:
            self._recording = _Recording(self.model, self.state, self.plan, batch, self.recorder(self.plan.device))
        except RuntimeError as error:
            error.__traceback__ = None  # it holds memory of the recording
            self.state.optimizer.zero_grad(set_to_none=True)
            self._give_up((str(error).splitlines() or [type(error).__name__])[0][:200])
        else:
            graphs, apart = self._recording.graphs, "" if decides_on_device(self.state) else "; the update, which asks the host, is apart"
            self.say(Message(f"recorded a training step as {graphs} CUDA graphs in {time.perf_counter() - begun:.1f} s{apart}"))

    def _give_up(self, reason: str) -> None:
        self._off, self._recording, self._rehearsal = True, None, None
        self.say(Notice(f"steps are not recorded (COMPILE graphs): {reason}"))


class _Rehearsal(Step):
    """A step as it is, the parts that will be recorded being looked at."""

    def __init__(self, model: nn.Module, state: TrainState, plan: StepPlan, recorder: Recorder):
        super().__init__(model, state, plan)
        self.recorder, self.steps, self.obstacle = recorder, 0, ""

    def run(self, batch: Batch) -> tuple[Tensor, Tensor]:
        self.steps, self.obstacle = self.steps + 1, ""
        return super().run(batch)

    def forward_backward(self, model: nn.Module, part: Batch, plan: StepPlan, micro: int) -> Tensor:
        return self._rehearsed(partial(super().forward_backward, model, part, plan, micro))

    def update(self, loss: Tensor) -> tuple[Tensor, bool]:
        work = partial(super().update, loss)
        return self._rehearsed(work) if decides_on_device(self.state) else work()

    def _rehearsed(self, work: Callable[[], T]) -> T:
        result, obstacle = self.recorder.rehearse(work)
        self.obstacle = self.obstacle or obstacle
        return result


class _Recording(Step):
    """A step of recorded parts, for batches in the shape of ``batch``; making it does no step.

    Attributes:
        graphs: how many were recorded.

    Raises:
        RuntimeError: it cannot be recorded.
    """

    def __init__(self, model: nn.Module, state: TrainState, plan: StepPlan, batch: Batch, recorder: Recorder):
        super().__init__(model, state, plan)
        parts, optimizer = plan.task.split(batch, plan.micro_batches), state.optimizer
        if any(_layout([part]) != _layout(parts[:1]) for part in parts):
            raise RuntimeError(f"a step's {len(batch[0])} samples make no {len(parts)} micro-batches of one size")
        self.inputs = tuple(tensor.clone() for tensor in parts[0])
        forward_backward = super().forward_backward
        # Without gradients before it, the first micro-batch writes them where it finds room, there and in every replay; the others add.
        optimizer.zero_grad(set_to_none=True)
        self._passes = [recorder.record(partial(forward_backward, model, self.inputs, plan, micro)) for micro in range(min(2, len(parts)))]
        self._gradients = [p.grad for p in self.parameters]
        self._rates = torch.tensor(_rates(optimizer), device=plan.device)
        self._update = None
        if decides_on_device(state):
            with _rates_on_device(optimizer, self._rates):
                self._update = recorder.record(partial(super().update, self._passes[0][1]))
        optimizer.zero_grad(set_to_none=True)
        self._optimizer_state = optimizer.state
        self.graphs = len(self._passes) + (self._update is not None)

    def is_stale(self) -> bool:
        """Whether the optimizer has taken over another state, whose tensors are not those that were recorded."""
        return self.state.optimizer.state is not self._optimizer_state

    def run(self, batch: Batch) -> tuple[Tensor, Tensor]:
        pinned = self.plan.device.type == "cuda"  # so that nobody waits for the copy
        self._rates.copy_(torch.tensor(_rates(self.state.optimizer), pin_memory=pinned), non_blocking=True)
        loss, norm = super().run(batch)
        return loss, norm.clone()  # the next step writes over it, and it may be looked at later

    def forward_backward(self, model: nn.Module, part: Batch, plan: StepPlan, micro: int) -> Tensor:
        for place, tensor in zip(self.inputs, part, strict=True):
            place.copy_(tensor, non_blocking=True)
        replay, loss = self._passes[min(micro, 1)]
        replay()
        return loss

    def update(self, loss: Tensor) -> tuple[Tensor, bool]:
        if self._update is None:
            for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
                parameter.grad = gradient
            return super().update(loss)
        replay, result = self._update
        replay()
        return result


def can_be_recorded(batch: Batch, device: torch.device) -> bool:
    """Whether all that a step knows of ``batch`` lies in tensors on the device: not so those of dense tasks, which have a class of their
    own and sizes that the host reads.
    """
    return type(batch) is tuple and all(isinstance(part, Tensor) and part.device.type == device.type for part in batch)


def decides_on_device(state: TrainState) -> bool:
    """Whether an update leaves a step that is not finite out without asking the host."""
    return skips_on_device(state.optimizer) and not state.scaler.is_enabled()


def _layout(batches: list[Batch]) -> list[Any]:
    return [(tensor.shape, tensor.dtype) for batch in batches for tensor in batch]


def _rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


@contextlib.contextmanager
def _rates_on_device(optimizer: torch.optim.Optimizer, rates: Tensor) -> Iterator[None]:
    """Inside, the groups' learning rates are ``rates`` (groups,); outside they stay numbers, as a checkpoint has them."""
    kept = [(group["lr"], group.get("capturable")) for group in optimizer.param_groups]
    try:
        for group, rate in zip(optimizer.param_groups, rates.unbind(), strict=True):
            group["lr"] = rate
            if "capturable" in group:
                group["capturable"] = True  # Adam asks for it; its counts of steps are on the device anyway when fused
        yield
    finally:
        for group, (rate, capturable) in zip(optimizer.param_groups, kept, strict=True):
            group["lr"] = rate
            if capturable is not None:
                group["capturable"] = capturable
