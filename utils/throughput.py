"""Speed of the model alone: forward pass and training step, without data loading."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from yacs.config import CfgNode

from config import image_size
from utils.device import Precision, peak_memory_mib, synchronize
from utils.engine import StepPlan, backward
from utils.optim import build_loss, build_optimizer, build_schedule

ROUNDS, WARM_UP, BUDGET = 30, 3, 20.0  # rounds at most, rounds not counted, seconds a measurement may take


def measure(model: nn.Module, config: CfgNode, device: torch.device, precision: Precision) -> Iterator[str]:
    """Yield a line on the forward pass, then one on the training step, medians over the rounds."""
    batch, size = config.DATA.BATCH_SIZE, image_size(config)
    generator = torch.Generator().manual_seed(config.SEED)
    images = torch.randn(batch, 3, *size, generator=generator).to(device)
    outputs = config.MODEL.NUM_CLASSES or 1000
    targets = torch.randint(outputs, (batch,), generator=generator).to(device)

    @torch.inference_mode()
    def forward() -> None:
        with precision.autocast():
            model(images)

    model.eval()
    yield _line("forward", forward, batch, device, precision)

    optimizer = build_optimizer(config, model)
    plan = StepPlan(build_schedule(config, 1, batch), build_loss(config.MODEL.LABEL_SMOOTHING), lambda x, y, step: (x, y), precision,
                    device, batch, batch, config.TRAIN.CLIP_GRAD or float("inf"), config.SEED, 0, 1)

    def step() -> None:
        backward(model, images, targets, plan, 0)
        precision.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        precision.scaler.step(optimizer)
        precision.scaler.update()
        optimizer.zero_grad(set_to_none=True)

    model.train()
    yield _line("training", step, batch, device, precision)


def _line(what: str, work: Callable[[], None], batch: int, device: torch.device, precision: Precision) -> str:
    times: list[float] = []
    begun = time.perf_counter()
    for number in range(WARM_UP + ROUNDS):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        if number >= WARM_UP:
            times.append(time.perf_counter() - start)
        if len(times) >= 3 and time.perf_counter() - begun > BUDGET:
            break
    median = statistics.median(times)
    return (f"throughput {what}: {batch / median:.1f} images/s (batch {batch}, {1000 * median:.1f} ms, median of {len(times)}, "
            f"{precision.name} on {device}), peak memory {peak_memory_mib(device)} MiB")
