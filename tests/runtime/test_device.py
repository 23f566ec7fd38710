"""What is set for a device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from config import get_config
from utils.runtime.precision import choose_precision
from utils.tasks.build import build_task
from utils.training import assembly


@pytest.mark.parametrize(("task", "kind", "expected"), [
    ("classification", "cuda", True), ("multilabel", "cuda", True), ("detection", "cuda", False), ("semantic", "cuda", False),
    ("classification", "cpu", False)])
def test_cudnn_measures_convolutions_that_come_back(task: str, kind: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = get_config(None, ["TASK", task])
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(nn.Module, "to", lambda self, *_: self)
    monkeypatch.setattr(assembly, "choose_step", lambda *_: None)
    assembly.assemble(config, build_task(config), nn.Linear(2, 2), torch.device(kind), choose_precision(config, torch.device("cpu")),
                      images=4, transform=lambda batch, step: batch)
    assert torch.backends.cudnn.benchmark is expected
