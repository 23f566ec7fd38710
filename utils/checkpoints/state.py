"""All that changes in training, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.safe_load import CheckpointError
from models.weights import check_finite, check_fits
from utils.optim.ema import WeightAverage

OVERHEAD = 1024  # bytes that a tensor takes in a file beside its numbers, at most


@dataclass
class TrainState:
    """All that changes in training; epoch and samples seen follow from the step and the global batch.

    Attributes:
        step: optimizer steps done.
        best: the best evaluation so far: the value of the task's metric under its name, epoch and step; empty before the first.
        loss_sums: per rank, the sum of the losses of the images seen in the current epoch, so that an epoch's mean
            loss comes out the same after a restart in its middle.
        loss_steps: steps of the current epoch that loss_sums holds.
        skipped: steps whose update was skipped because loss or gradients were not finite, and that are not forgiven yet.
        rollbacks: times the run went back to a checkpoint because of such steps.
        evaluated: the step after which an epoch was last brought to its end. A checkpoint at an epoch's last step that has
            not been evaluated yet starts with the evaluation.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: WeightAverage | None = None
    step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    loss_sums: list[float] = field(default_factory=list)
    skipped: int = 0
    loss_steps: int = 0
    rollbacks: int = 0
    evaluated: int = 0

    def state_dict(self, copy: bool = False) -> dict[str, Any]:
        """Plain data with its tensors on the CPU; with ``copy`` none of them shares memory with the state."""
        return dict(
            model=_on_cpu(self.model.state_dict(), copy),
            ema=_on_cpu(self.ema.module.state_dict(), copy) if self.ema is not None else {},
            optimizer=_on_cpu(self.optimizer.state_dict(), copy), optimizer_name=type(self.optimizer).__name__,
            scaler=self.scaler.state_dict(), step=self.step, best=dict(self.best), loss_sums=list(self.loss_sums),
            skipped=self.skipped, loss_steps=self.loss_steps, rollbacks=self.rollbacks, evaluated=self.evaluated)

    def size(self) -> int:
        """Bytes of a checkpoint, about: an optimizer that has not stepped yet is taken to keep two tensors a parameter."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        weights, kept = _tensor_bytes(self.model.state_dict()), _tensor_bytes(self.optimizer.state)
        return weights * (1 if self.ema is None else 2) + (kept or 2 * _tensor_bytes(parameters)) + (1 << 16)

    def own_loss_sum(self, rank: int, world_size: int) -> float:
        """This rank's part of ``loss_sums``; with another number of processes than wrote them only the total matters."""
        if len(self.loss_sums) == world_size:
            return self.loss_sums[rank]
        return sum(self.loss_sums) if rank == 0 else 0.0

    def load_state_dict(self, content: dict[str, Any], path: str) -> None:
        """Take over a checkpoint's state; raises ``CheckpointError`` naming what does not fit, before anything is changed."""
        check_fits(self.model, content["model"], path)
        check_finite(content["model"], path)
        averaged = content["ema"] or content["model"]  # an average switched on later starts from the weights
        if self.ema is not None:
            check_fits(self.ema.module, averaged, path)
        # torch checks only how many parameters a state is for; another optimizer's would be taken and fail later.
        saved, wanted = content.get("optimizer_name"), type(self.optimizer).__name__
        # The config's weight decay and betas hold, not the file's; and torch puts a state's count of steps where the form of the
        # optimizer that its groups name (fused) wants it, which another device may not have.
        ours = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in self.optimizer.param_groups]
        try:
            if saved not in (None, wanted):
                raise ValueError(f"it was {saved}")
            kept = content["optimizer"]
            if len(groups := kept["param_groups"]) == len(ours):  # else torch says so
                kept = {**kept, "param_groups": [{**theirs, **values} for theirs, values in zip(groups, ours, strict=True)]}
            self.optimizer.load_state_dict(kept)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: its optimizer state does not fit {wanted} ({error}); keep the optimizer and the "
                                  f"parameter groups of the run, or start a new run with another --tag and --pretrained {path}") from None
        self.model.load_state_dict(content["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(averaged)
        if content["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(content["scaler"])
        self.step, self.best, self.loss_sums = content["step"], dict(content["best"]), list(content["loss_sums"])
        self.skipped, self.rollbacks = content.get("skipped", 0), content.get("rollbacks", 0)
        # Older files lack these: they were written after the evaluation, and no step was skipped.
        self.evaluated = content.get("evaluated", self.step - self.step % content["steps_per_epoch"])
        self.loss_steps = content.get("loss_steps", self.step % content["steps_per_epoch"])


def _on_cpu(value: Any, copy: bool) -> Any:
    """Nested plain data with its tensors on the CPU, so that a file opens on any machine."""
    if isinstance(value, Tensor):
        return value.detach().clone() if copy and value.device.type == "cpu" else value.detach().cpu()
    if isinstance(value, dict):
        return {k: _on_cpu(v, copy) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(v, copy) for v in value)
    return value


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size() + OVERHEAD
    if isinstance(value, dict):
        return sum(map(_tensor_bytes, value.values()))
    return sum(map(_tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0
