"""Steps and weights that are not finite: evidence, the budget of steps that may be skipped, and the way back to a good checkpoint."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models.safe_load import CheckpointError
from utils.checkpoints.background_saver import Saver
from utils.checkpoints.folder import CheckpointFolder
from utils.checkpoints.state import TrainState
from utils.loggers.metrics_files import EVIDENCE
from utils.runtime import distributed
from utils.runtime.files import Appended
from utils.training.engine import NumericError, Progress, StepPlan

FORGIVEN_AFTER = 100  # steps after which one that was skipped no longer counts


class NonFiniteGuard:
    """Reads what the steps did from the device, counts those that were skipped, and recovers when there are too many.

    Args:
        train_loader: where the images of a bad step are looked up.
        skip_budget: skipped steps to go on with (TRAIN.SKIP_BUDGET).
        rollbacks: times a run may go back to a checkpoint (TRAIN.ROLLBACKS).

    Attributes:
        norm: of the gradients of the last step that was read; NaN before the first.
        on_rollback: called after the state went back to a checkpoint, with the epoch's progress and the step it went back to.
    """

    def __init__(self, state: TrainState, plan: StepPlan, train_loader: Any, files: CheckpointFolder, saver: Saver, skip_budget: int,
                 rollbacks: int, logger: logging.Logger):
        self.state, self.plan, self.loader, self.files, self.saver, self.logger = state, plan, train_loader, files, saver, logger
        self.skip_budget, self.rollbacks = skip_budget, rollbacks
        self.norm = math.nan
        self.on_rollback: Callable[[Progress, int], None] = lambda progress, step: None
        self._evidence = os.path.join(files.folder, EVIDENCE)
        self._evidence_file = Appended(self._evidence, logger.warning)
        self._finite_at = -1  # the step whose weights were last seen to be finite

    def close(self) -> None:
        self._evidence_file.close()

    def inspect(self, progress: Progress) -> None:
        """Read the steps since the last look, count those whose update was skipped, and act on them.

        Raises:
            NumericError: more were skipped than the budget allows, and there is no way back.
        """
        steps, progress.steps = progress.steps, []
        if not steps:
            return
        losses, norms = (_to_cpu(column).tolist() for column in ([s[1] for s in steps], [s[2] for s in steps]))
        self.norm = norms[-1]
        bad = [(step, loss, norm) for (step, *_), loss, norm in zip(steps, losses, norms, strict=True) if not math.isfinite(norm)]
        progress.counted += len(steps) - len(bad)
        if bad:
            self._skipped(bad, progress)
        self.state.skipped = max(0, self.state.skipped - sum((step + 1) % FORGIVEN_AFTER == 0 for step, *_ in steps))

    def require_finite_weights(self, progress: Progress) -> None:
        """Make sure that the weights are finite: others must not replace a good checkpoint. Back to that if they are not.

        Raises:
            NumericError: there is no way back.
        """
        if self._finite_at == self.state.step:
            return
        tensors = [t for t in self.state.model.state_dict().values() if t.is_floating_point()]
        norm = distributed.all_reduce_sum(nn.utils.get_total_norm(tensors).double().cpu()).item()
        if not math.isfinite(norm):
            self._recover(NumericError(f"the weights are not finite after step {self.state.step}; {self._advice(True)}"), progress)
        self._finite_at = self.state.step

    def _skipped(self, bad: list[tuple[int, float, float]], progress: Progress) -> None:
        """Evidence of the steps ``bad`` of (step, this rank's loss, gradient norm); beyond the budget, back to a good checkpoint."""
        state = self.state
        losses = distributed.gather_objects([loss for _, loss, _ in bad])
        state.skipped += len(bad)
        if distributed.is_main():
            rows = [self._describe(step, norm, [of_rank[i] for of_rank in losses]) for i, (step, _, norm) in enumerate(bad)]
            self._evidence_file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode())
            for i, (step, _, norm) in enumerate(bad):
                self.logger.warning(f"step {step + 1} was skipped, its update would not be finite (loss "
                                    f"{sum(of_rank[i] for of_rank in losses) / self.plan.images:g}, gradient norm {norm:g}); its images "
                                    f"are listed in {self._evidence}")
        if state.skipped > self.skip_budget:
            any_loss = any(not math.isfinite(loss) for of_rank in losses for loss in of_rank)
            self._recover(NumericError(
                f"{state.skipped} steps were not finite (the last: step {bad[-1][0] + 1}, in its "
                f"{'loss' if any_loss else 'gradients alone'}), more than the {self.skip_budget} of TRAIN.SKIP_BUDGET; "
                f"{self._advice(any_loss)}; evidence in {self._evidence}"), progress)

    def _describe(self, step: int, norm: float, losses: list[float]) -> dict[str, Any]:
        source, sampler, plan = self.loader.dataset.source, self.loader.batch_sampler, self.plan
        keys = [sampler.keys(step, rank) for rank in range(plan.world_size)]
        return dict(
            step=step + 1, epoch=1 + step // sampler.steps_per_epoch, loss_sum_by_rank=[_json_number(loss) for loss in losses],
            gradient_norm=_json_number(norm), lr=plan.schedule.lr_at(step), precision=plan.precision.name,
            loss_scale=plan.precision.scaler.get_scale() if plan.precision.scaler.is_enabled() else None,
            weights_not_finite=[name for name, p in self.state.model.named_parameters() if not p.isfinite().all()][:10],
            images_by_rank=[[source.path(index) for _, index, _ in of_rank] for of_rank in keys])

    def _advice(self, in_loss: bool) -> str:
        if self.plan.precision.name == "fp16":
            return "use --precision bf16 or fp32"
        return "lower TRAIN.BASE_LR or lengthen the warm-up" + ("" if in_loss else ", or lower TRAIN.CLIP_GRAD")

    def _recover(self, error: NumericError, progress: Progress) -> None:
        """Go back to the newest good checkpoint and pass over the data since; raise ``error`` where there is none.

        The steps between would only lead to the same place again: everything random in them is determined.
        """
        state, within = self.state, self.state.step - self.state.evaluated
        self.saver.wait()
        found = None
        if distributed.is_main() and state.rollbacks < self.rollbacks:
            with contextlib.suppress(CheckpointError):
                found = self.files.newest()
        shared = self.files.share(found)
        if shared is None:
            raise NumericError(f"{error}; {self.files.newest_in_words()}") from None
        path, content = shared
        kept = (state.step, state.rollbacks + 1, state.evaluated, state.best)
        state.load_state_dict(content, path)
        back = kept[0] - state.step
        progress.loss_sum.zero_()
        progress.counted = 0
        if back < within:  # the same epoch: what it had seen then counts
            progress.loss_sum.add_(state.own_loss_sum(self.plan.rank, self.plan.world_size))
            progress.counted = state.loss_steps
        state.skipped = 0
        state.step, state.rollbacks, state.evaluated, state.best = kept
        self.logger.warning(f"{error}: back to {path}, passing over the {back} steps since (rollback {state.rollbacks} of "
                            f"{self.rollbacks})")
        self.on_rollback(progress, state.step - back)


def _to_cpu(scalars: list[Tensor]) -> Tensor:
    """Scalars of a device as one tensor on the CPU, read in one go."""
    return torch.stack([scalar.float() for scalar in scalars]).cpu()


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
