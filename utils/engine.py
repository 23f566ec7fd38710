"""The hot path: a range of training steps, and exact evaluation. One screen each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import distributed
from utils.checkpoint import TrainState
from utils.device import Precision
from utils.optim import Schedule, set_lr
from utils.seed import seed_micro_batch


class NumericError(ArithmeticError):
    """The loss is no longer a finite number (exit status 4)."""


@dataclass(frozen=True)
class StepPlan:
    """What every step does alike: values, decided before training.

    Attributes:
        micro_batch: images of one forward and backward pass.
        images: images of a step over all ranks; each weighs 1/images.
        clip: largest gradient norm, infinite for none.
        seed, rank: with the step they seed dropout and drop path.
        fixed: modules that stay in evaluation mode (``utils.freeze``).
    """

    schedule: Schedule
    criterion: Callable[[Tensor, Tensor], Tensor]
    mixup: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
    precision: Precision
    device: torch.device
    micro_batch: int
    images: int
    clip: float
    seed: int
    rank: int
    world_size: int
    fixed: Sequence[nn.Module] = ()


@dataclass
class Progress:
    """Running figures of an epoch, kept on the device until a line is logged."""

    device: torch.device
    loss_sum: Tensor = field(init=False)
    grad_norm: Tensor | None = None
    data_seconds: float = 0.0
    start: float = field(default_factory=time.perf_counter)
    first_step: int = 0

    def __post_init__(self) -> None:
        # double where the device has it: an epoch's sum is then the same however often it is read
        self.loss_sum = torch.zeros((), device=self.device, dtype=torch.float32 if self.device.type == "mps" else torch.float64)

    def loss(self) -> float:
        """The sum so far, read from the device."""
        return self.loss_sum.item()


def train_one_epoch(model: nn.Module, state: TrainState, batches: Iterator[tuple[Tensor, Tensor]], until: int, plan: StepPlan,
                    progress: Progress, after_step: Callable[[TrainState, Progress], None]) -> None:
    """Run the steps from ``state.step`` to ``until``.

    Args:
        model: what is called: ``state.model``, possibly under DDP.
        batches: the stream of local batches, one a step, ``(images (B, 3, H, W), targets (B,))``.
        after_step: called after every step; the only place that logs, reads the device or saves.
    """
    model.train()
    for module in plan.fixed:
        module.eval()
    parameters = [p for p in state.model.parameters() if p.requires_grad]
    foreach = plan.device.type in ("cpu", "cuda")  # one kernel over all tensors instead of one each
    while state.step < until:
        waited = time.perf_counter()
        images, targets = next(batches)
        progress.data_seconds += time.perf_counter() - waited
        images, targets = images.to(plan.device, non_blocking=True), targets.to(plan.device, non_blocking=True)
        images, targets = plan.mixup(images, targets, state.step)
        set_lr(state.optimizer, plan.schedule.lr_at(state.step))
        progress.loss_sum += backward(model, images, targets, plan, state.step)
        plan.precision.scaler.unscale_(state.optimizer)
        progress.grad_norm = nn.utils.clip_grad_norm_(parameters, plan.clip, foreach=foreach)
        plan.precision.scaler.step(state.optimizer)
        plan.precision.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        if state.ema is not None:
            state.ema.update(state.model, state.step)
        after_step(state, progress)


def backward(model: nn.Module, images: Tensor, targets: Tensor, plan: StepPlan, step: int) -> Tensor:
    """Gradients of a step's mean loss, micro-batch by micro-batch; the sum of the losses of this rank's images."""
    total = torch.zeros((), device=plan.device)
    # The same number on every rank, also where a short batch gives one rank an image more.
    number = max(1, math.ceil(math.ceil(plan.images / plan.world_size) / plan.micro_batch))
    micro_batches = list(zip(images.tensor_split(number), targets.tensor_split(number), strict=True))
    for micro, (x, y) in enumerate(micro_batches):
        seed_micro_batch(plan.seed, step, micro, plan.rank, plan.device)
        with distributed.no_sync(model, skip=micro < number - 1):
            with plan.precision.autocast():
                logits = model(x)
            loss = plan.criterion(logits, y)
            # DDP averages over ranks, so a sample weighs world/images here and 1/images in the end.
            plan.precision.scaler.scale(loss * (plan.world_size / plan.images)).backward()
        total += loss.detach()
    return total


@dataclass(frozen=True)
class Evaluation:
    """Counts over the whole evaluation set."""

    correct: int
    correct5: int
    total: int
    loss_sum: float

    @property
    def top1(self) -> float:
        return 100 * self.correct / max(1, self.total)

    @property
    def top5(self) -> float:
        return 100 * self.correct5 / max(1, self.total)

    @property
    def loss(self) -> float:
        return self.loss_sum / max(1, self.total)

    def line(self) -> str:
        return f"top1 {self.top1:.2f} top5 {self.top5:.2f} loss {self.loss:.4f} ({self.correct} of {self.total})"


@torch.inference_mode()
def evaluate(models: Sequence[nn.Module], loader: Iterable[tuple[Tensor, Tensor]], device: torch.device,
             precision: Precision) -> list[Evaluation]:
    """Judge each of ``models`` in one pass over the images (raw and averaged weights share the decoding).

    Counts integers over every image once, on any number of ranks; rows with target -1 fill a batch and do not count. With
    fewer than five classes every image counts as right among the top five.
    """
    counts = torch.zeros(len(models), 3, dtype=torch.int64, device=device)
    loss_sums = torch.zeros(len(models), device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
    for model in models:
        model.eval()
    for images, targets in loader:
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        for number, model in enumerate(models):
            with precision.autocast():
                logits = model(images)
            logits = logits.float()
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
            counts[number] += torch.stack([hits[:, 0].sum(), hits.sum(), (targets >= 0).sum()])
            loss_sums[number] += F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    distributed.all_reduce_sum(counts)
    distributed.all_reduce_sum(loss_sums)
    return [Evaluation(*row, loss_sum) for row, loss_sum in zip(counts.tolist(), loss_sums.tolist(), strict=True)]


def require_finite(value: float, what: str) -> float:
    """``value``, or ``NumericError`` when it is NaN or infinite."""
    if not math.isfinite(value):
        raise NumericError(f"{what} is {value}; lower TRAIN.BASE_LR, lengthen the warm-up, or use PRECISION bf16 or fp32")
    return value
