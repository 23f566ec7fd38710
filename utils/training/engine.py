"""The hot path: a range of training steps, and exact evaluation. One screen each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from config import ProgramError
from models.gpu import linear as gpu_linear
from utils.checkpoints.state import TrainState
from utils.optim.lr_schedule import Schedule, set_lr
from utils.optim.optimizer import skips_on_device
from utils.runtime import distributed
from utils.runtime.precision import Precision
from utils.runtime.seed import seed_micro_batch
from utils.tasks.base import Batch, Task
from utils.training.data_wait import DataWait, DeviceDataWait, data_wait


class NumericError(ProgramError, ArithmeticError):
    """Loss, gradients or weights are no longer finite numbers, beyond what may be skipped."""

    exit_status = 4


SMALLEST_SCALE = 1.0  # fp16 gradients that overflow unscaled are not a matter of the scale


@dataclass(frozen=True)
class StepPlan:
    """What every step does alike: values, decided before training (``utils.training.assembly`` makes it).

    Attributes:
        transform: what happens to a step's batch on the device, from the batch and the step's number (mixup).
        micro_batch: samples of one forward and backward pass.
        images: samples of a step over all ranks; each weighs 1/images.
        clip: largest gradient norm, infinite for none.
        seed, rank: with the step they seed dropout and drop path.
        fixed: modules that stay in evaluation mode (``utils.optim.freeze``).
        step: makes what runs the steps of a model, from the model as it is called, its state and this plan; as it stands ``Step``.
    """

    task: Task
    schedule: Schedule
    transform: Callable[[Batch, int], Batch]
    precision: Precision
    device: torch.device
    micro_batch: int
    images: int
    clip: float
    seed: int
    rank: int = 0
    world_size: int = 1
    fixed: Sequence[nn.Module] = ()
    step: Callable[[nn.Module, TrainState, StepPlan], Step] = field(default_factory=lambda: Step)

    @property
    def micro_batches(self) -> int:
        """Of a step: the same number on every rank, also where a short batch gives one rank a sample more."""
        return max(1, math.ceil(math.ceil(self.images / self.world_size) / self.micro_batch))


@dataclass
class Progress:
    """Running figures of an epoch, kept on the device until a line is logged.

    Attributes:
        loss_sum: sum of the losses of this rank's images, those of skipped steps left out.
        steps: (step, loss sum, gradient norm) of the steps nobody has looked at yet.
        counted: steps of the epoch, of those looked at, that loss_sum holds.
        data_wait: the time in which the device had nothing to do for want of data.
    """

    device: torch.device
    loss_sum: Tensor = field(init=False)
    steps: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    counted: int = 0
    data_wait: DataWait | DeviceDataWait = field(init=False)
    start: float = field(default_factory=time.perf_counter)
    first_step: int = 0

    def __post_init__(self) -> None:
        # double where the device has it: an epoch's sum is then the same however often it is read
        self.loss_sum = torch.zeros((), device=self.device, dtype=torch.float32 if self.device.type == "mps" else torch.float64)
        self.data_wait = data_wait(self.device)

    def add(self, step: int, loss: Tensor, norm: Tensor) -> None:
        self.loss_sum += torch.where(norm.isfinite(), loss, 0)
        self.steps.append((step, loss, norm))


class RunningStatistics:
    """The means and variances of batch norms: the forward pass of a step moves them before anybody knows whether it is sound."""

    def __init__(self, model: nn.Module):
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        self.live = [buffer.view(-1) for norm in norms for buffer in norm.buffers(recurse=False) if buffer.is_floating_point()]
        self.sizes = [len(buffer) for buffer in self.live]
        self.kept = torch.cat(self.live) if self.live else torch.empty(0)

    def keep(self) -> None:
        if self.live:
            torch.cat(self.live, out=self.kept)

    def restore(self, where: Tensor) -> None:
        """Take back what has happened since ``keep`` if ``where``, a flag on the device, says so; nobody waits for it."""
        if self.live:
            torch._foreach_copy_(self.live, list(torch.where(where, self.kept, torch.cat(self.live)).split(self.sizes)))


class Step:
    """The work of a training step after its batch has come and its learning rate is set.

    What a GPU computes in it stands in ``forward_backward`` and ``update``, which ``utils.training.step_graph`` records and replays.

    Args:
        model: what is called: ``state.model``, possibly under DDP.
    """

    def __init__(self, model: nn.Module, state: TrainState, plan: StepPlan):
        self.model, self.state, self.plan = model, state, plan
        self.statistics = RunningStatistics(state.model)
        self.parameters = [p for p in state.model.parameters() if p.requires_grad]

    def run(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum of the losses of this rank's samples, norm of the gradients), after forward, backward and update; no gradients are left."""
        self.statistics.keep()
        while True:
            loss = backward(self.model, batch, self.plan, self.state.step, self.forward_backward)
            norm, again = self.update(loss)
            self.state.optimizer.zero_grad(set_to_none=True)
            if not again:
                return loss, norm

    def forward_backward(self, model: nn.Module, part: Batch, plan: StepPlan, micro: int) -> Tensor:
        """As the function of that name."""
        return forward_backward(model, part, plan, micro)

    def update(self, loss: Tensor) -> tuple[Tensor, bool]:
        """As the function of that name; the statistics of batch norms are taken back where that leaves the step out."""
        norm, again = update(self.state, self.parameters, self.plan, loss)
        self.statistics.restore(~norm.isfinite())
        return norm, again


def train_one_epoch(model: nn.Module, state: TrainState, batches: Iterator[Batch], until: int, plan: StepPlan,
                    progress: Progress, after_step: Callable[[TrainState, Progress], None]) -> None:
    """Run the steps from ``state.step`` to ``until``.

    A step whose loss or gradient is not finite on any rank leaves weights, optimizer and batch-norm statistics as they were.

    Args:
        model: what is called: ``state.model``, possibly under DDP.
        batches: the stream of local batches, one a step, as the task's loaders yield them.
        after_step: called after every step; the only place that logs, reads the device or saves.

    Raises:
        NumericError: gradients in fp16 overflow at every loss scale.
    """
    model.train()
    for module in plan.fixed:
        module.eval()
    step = plan.step(model, state, plan)
    while state.step < until:
        distributed.begin_phase("waiting for data", state.step)
        with progress.data_wait:
            batch = next(batches)
        distributed.begin_phase("training", state.step)
        batch = plan.transform(plan.task.to_device(batch, plan.device), state.step)
        set_lr(state.optimizer, plan.schedule.lr_at(state.step))
        loss, norm = step.run(batch)
        progress.add(state.step, loss, norm)
        state.step += 1
        if state.ema is not None:
            state.ema.update(state.step)
        after_step(state, progress)


def update(state: TrainState, parameters: Sequence[nn.Parameter], plan: StepPlan, loss: Tensor) -> tuple[Tensor, bool]:
    """Clip and apply the gradients if they are finite: (their norm before, whether fp16 overflowed and the step must be done again).

    A non-finite loss has made the gradients of every rank NaN (``backward``), so the norm, the same on all ranks, decides alone.
    torch's fused optimizers (AdamW, Adam, SGD, Adagrad) are told so on the device. The others, and the scaling of fp16, decide on
    the host, which waits for the device once a step: to undo their update there would take a copy of weights and optimizer.
    """
    scaler, optimizer = plan.precision.scaler, state.optimizer
    scaler.unscale_(optimizer)
    foreach = plan.device.type in ("cpu", "cuda")  # one kernel over all tensors instead of one each
    norm = nn.utils.clip_grad_norm_(parameters, plan.clip, foreach=foreach)
    if scaler.is_enabled():
        return norm, _update_scaled(scaler, optimizer, norm, loss)
    if skips_on_device(optimizer):
        optimizer.grad_scale, optimizer.found_inf = None, (~norm.isfinite()).float()
        optimizer.step()
        optimizer.found_inf = None
    elif norm.isfinite():
        optimizer.step()
    return norm, False


def _update_scaled(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, norm: Tensor, loss: Tensor) -> bool:
    """The update in fp16: True when the gradients overflowed, and the same step is to be done again at the lower scale now set.

    The schedule and the data so stay where they are. A loss that is itself not finite is no matter of the scale.
    """
    scale = scaler.get_scale()
    if norm.isfinite():
        scaler.step(optimizer)
        scaler.update()
        return False
    if distributed.all_reduce_sum((~loss.isfinite()).float()):
        scaler.update(scale)
        return False
    if scale <= SMALLEST_SCALE:
        raise NumericError(f"the gradients overflow in fp16 at every loss scale down to {scale:g}; use --precision bf16 (or fp32)")
    scaler.update()
    if scaler.get_scale() >= scale:  # every gradient was finite, their norm was not
        scaler.update(scale * scaler.get_backoff_factor())
    return True


def forward_backward(model: nn.Module, part: Batch, plan: StepPlan, micro: int = 0) -> Tensor:
    """Add the gradients of micro-batch number ``micro`` to those that there are; the sum of the losses of its samples."""
    with plan.precision.autocast(), gpu_linear.converting_at_once(model):
        outputs = plan.task.forward(model, part)
    loss = plan.task.loss(outputs, part)
    # DDP averages over ranks, so a sample weighs world/images here and 1/images in the end. The second term is 0, and
    # NaN where the loss is not finite: the gradients of every rank then say so, and all skip the step alike.
    weight = plan.world_size / plan.images + 0.0 * loss.detach()
    plan.precision.scaler.scale(loss * weight).backward()
    return loss.detach()


def backward(model: nn.Module, batch: Batch, plan: StepPlan, step: int,
             one: Callable[[nn.Module, Batch, StepPlan, int], Tensor] = forward_backward) -> Tensor:
    """Gradients of a step's mean loss, micro-batch by micro-batch; the sum of the losses of this rank's samples.

    Args:
        one: what is done with each: ``forward_backward``, or a recording of it.
    """
    total = torch.zeros((), device=plan.device)
    number = plan.micro_batches
    plan.task.begin_step(batch, plan.world_size)
    for micro, part in enumerate(plan.task.split(batch, number)):
        seed_micro_batch(plan.seed, step, micro, plan.rank, plan.device)
        with distributed.no_sync(model, skip=micro < number - 1):
            total += one(model, part, plan, micro)
    return total
