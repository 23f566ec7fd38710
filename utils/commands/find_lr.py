"""``--find-lr``: a learning-rate range test by the config's own recipe, as a plot and a number for --lr."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
from typing import Any

import torch
from matplotlib.figure import Figure
from yacs.config import CfgNode

from config import with_values
from utils.commands.outputs import check_outputs
from utils.loggers.console import RESULT
from utils.optim.lr_schedule import lr_scale
from utils.runtime import distributed
from utils.runtime.files import replace_file, require_place
from utils.training.lr_range import RangeTest, Sweep, run_sweep
from utils.training.setup import prepare


def find_lr(config: CfgNode, content: Any, device: torch.device, logger: logging.Logger) -> None:
    """Raise the rate step by step from FIND_LR.LOW to FIND_LR.HIGH, write the losses to FIND_LR.FILE, and name a rate; no run is touched.

    Raises:
        ConfigError: the file cannot be written, or what training would raise.
    """
    path, asked = os.path.expanduser(config.FIND_LR.FILE), config.FIND_LR
    require_place(path, "FIND_LR.FILE is ")
    check_outputs(config, [("FIND_LR.FILE", path)])
    # From where a run would start, and never from what the run of this name has come to; as long as the sweep, and any warm-up, is.
    epochs = max(config.TRAIN.EPOCHS, asked.STEPS, min(config.TRAIN.WARMUP_STEPS + 1, 1_000_000))
    config = with_values(config, {"TRAIN.AUTO_RESUME": False, "TRAIN.EPOCHS": epochs, "TRAIN.ITERATIONS": 0}, "--find-lr")
    ready = prepare(config, content, device, logger, dry=True)
    if ready is None:
        return
    state, plan = ready.state, ready.plan
    state.ema = None
    scale = lr_scale(ready.config, plan.images)
    sweep = Sweep(asked.LOW * scale, asked.HIGH * scale, asked.STEPS, state.step)
    logger.info(f"range test: {asked.STEPS} steps of {plan.images} images at rates from {sweep.low:.3g} to {sweep.high:.3g}, which are "
                f"--lr {asked.LOW:g} to {asked.HIGH:g} times {scale:g}")
    with contextlib.closing(ready.loaders):
        model = distributed.wrap(state.model, device, ready.config.TRAIN.ACCUMULATION_STEPS, ready.config.TRAIN.GRAD_COMPRESSION)
        found = run_sweep(model, state, ready.loaders.batches(state.step), plan, sweep)
    if not distributed.is_main():
        return
    if found.rates:
        replace_file(path, _drawn(found, scale))
        logger.info(f"wrote {path}: {len(found.rates)} steps" + (", then the loss ran away" if found.ran_away else ""))
    logger.info(_verdict(found, scale), extra=RESULT)


def _verdict(found: RangeTest, scale: float) -> str:
    if found.suggested is None:
        return "no rate stands out: the loss never fell; start lower (FIND_LR.LOW), take more FIND_LR.STEPS, or look at the data"
    told = f"--lr {found.suggested / scale:.2g}: there the loss falls fastest ({found.suggested:.3g} at this batch)"
    if not found.ran_away:
        return f"{told}; it did not run away up to --lr {found.rates[-1] / scale:.2g}, so that higher rates (FIND_LR.HIGH) may do too"
    at_lowest = found.rates[min(range(len(found.means)), key=found.means.__getitem__)]
    return f"{told}; it was lowest at --lr {at_lowest / scale:.2g}, beyond which training is not stable"


def _drawn(found: RangeTest, scale: float) -> bytes:
    """A PNG of loss and smoothed loss over the rate as --lr has it."""
    rates = [rate / scale for rate in found.rates]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="--lr", ylabel="training loss", title="learning-rate range test")
    axes.plot(rates, found.losses, color="#2f6fde", alpha=0.3, linewidth=1, label="loss of a step")
    axes.plot(rates, found.means, color="#2f6fde", label="smoothed")
    if found.suggested is not None:
        axes.axvline(found.suggested / scale, color="#d9622b", linestyle="--", label=f"--lr {found.suggested / scale:.2g}")
    top = found.means[0] + max(found.means[0] - min(found.means), 0.1 * abs(found.means[0]))
    if math.isfinite(top):
        axes.set_ylim(top=max(top, max(found.means[:10])))
    axes.legend(frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()
