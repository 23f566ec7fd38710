"""The running average of the weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from utils.optim.ema import WeightAverage


class Shared(nn.Module):
    """One layer under two names, and a batch norm with its counter."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = self.a
        self.norm = nn.BatchNorm1d(3)


def test_each_tensor_is_averaged_once() -> None:
    model = Shared()
    average = WeightAverage(model, 0.9)
    start = model.a.weight.detach().clone()
    with torch.no_grad():
        model.a.weight += 1
        model.norm.running_mean += 1
        model.norm.num_batches_tracked += 5
    average.update(1)
    assert torch.allclose(average.module.a.weight, start + 0.1) and average.module.b.weight is average.module.a.weight
    assert torch.allclose(average.module.norm.running_mean, torch.full((3,), 0.1)) and average.module.norm.num_batches_tracked == 5
    average.update(2)
    assert torch.allclose(average.module.a.weight, start + 0.19)
    assert not any(p.requires_grad for p in average.module.parameters())


@pytest.mark.gpu(or_cpu=True)
def test_an_average_elsewhere_comes_to_be_judged_and_goes_back() -> None:
    """As that of a model on a GPU, kept by the CPU; without a GPU both places are one."""
    model = nn.Linear(2, 2)
    average = WeightAverage(model, 0.5, device="cpu")
    with average.on(torch.device("cpu")) as evaluated:
        assert evaluated is average.module
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    average.update(1)
    assert torch.allclose(average.module.weight, start + 0.5)
    if torch.cuda.is_available():
        far = WeightAverage(model.cuda(), 0.5, device="cpu")
        with far.on(torch.device("cuda", 0)) as evaluated:
            assert evaluated.weight.is_cuda
        before = far.module.weight.clone()
        with torch.no_grad():
            model.weight += 1
        far.update(1)
        assert far.module.weight.device.type == "cpu" and torch.allclose(far.module.weight, before + 0.5)


def test_warm_up_forgets_the_beginning() -> None:
    model = nn.Linear(1, 1)
    average = WeightAverage(model, 0.999, warmup=True)
    with torch.no_grad():
        model.weight += 1
    before = average.module.weight.clone()
    average.update(1)
    assert float(average.module.weight - before) == pytest.approx(1 - 2 / 11)


@pytest.mark.parametrize(("keys", "warned"), [
    (["TRAIN.EMA_DECAY", 0.9999], True), (["TRAIN.EMA_DECAY", 0.9999, "TRAIN.EMA_WARMUP", True], False), (["TRAIN.EMA_DECAY", 0], False)])
def test_an_average_longer_than_the_run_is_told(tiny_cfg: Path, program, keys: list, warned: bool) -> None:
    done = program("--cfg", tiny_cfg, "--opts", *keys)
    found = re.search(r"^warning: TRAIN.EMA_DECAY 0.9999 .* 10 steps.*; TRAIN.EMA_DECAY ([\d.]+) fits", done.stdout, re.M)
    assert done.returncode == 0 and (found is not None) == warned
    if warned:
        again = program("--cfg", tiny_cfg, "--tag", "fits", "--opts", "TRAIN.EMA_DECAY", found[1])
        assert again.returncode == 0 and "TRAIN.EMA_DECAY" not in again.stdout
