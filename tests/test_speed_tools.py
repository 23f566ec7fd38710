"""What measures a step: memory, throughput, the profile."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import nn

from config import get_config
from models import build_model
from utils.device import Precision
from utils.engine import Progress, train_one_epoch
from utils.step_memory import StepMemory, measure_step
from utils.throughput import made_up_batch, prepare_step

CPU = torch.device("cpu")


def step_memory(*opts: object) -> tuple[StepMemory, nn.Module, torch.Tensor]:
    node = dict(EMBED_DIM=32, DEPTHS=[1, 2], NUM_HEADS=[1, 2], GROUP_SIZE=[4, 4], INTERVAL=[4, 2], MERGE_SIZE=[[2, 4]])
    config = get_config(None, ["DATA.BATCH_SIZE", "24", "DATA.IMG_SIZE", "64", "MODEL.NUM_CLASSES", "10", "MODEL.NAME", "tiny",
                               *(item for key, value in node.items() for item in (f"MODEL.CROSSFORMER.{key}", value)), *map(str, opts)])
    model, batch = build_model(config), made_up_batch(config, CPU)
    state, plan = prepare_step(model, config, CPU, Precision(CPU))

    def work(watched) -> None:
        train_one_epoch(model, state, iter([batch]), state.step + 1, watched, Progress(CPU), lambda state, progress: None)

    work(plan)
    return measure_step(state, plan, work, sum(t.nbytes for t in batch)), model, batch[0]


def kept_by_autograd(model: nn.Module, images: torch.Tensor) -> int:
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(images)
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights)


def test_the_peak_of_a_step_is_what_autograd_needs() -> None:
    """Nothing else is alive when the backward pass begins but one layer's temporaries, a larger share of this small model than of a
    published one (there within 5 %)."""
    memory, model, images = step_memory("TRAIN.EMA_DECAY", 0.9)
    size = sum(p.numel() for p in model.parameters()) * 4
    assert memory.optimizer == pytest.approx(2 * size, rel=0.01) and memory.weights == pytest.approx(2 * size, rel=0.05)
    assert memory.gradients == size
    needed = kept_by_autograd(model, images)
    assert memory.activations == pytest.approx(needed, rel=0.05)
    assert memory.peak < 1.1 * (memory.weights + memory.optimizer + memory.gradients + needed)
    less, *_ = step_memory("TRAIN.EMA_DECAY", 0.9, "TRAIN.USE_CHECKPOINT", True)
    assert less.activations < memory.activations / 3 and less.peak < 0.8 * memory.peak
    stage, *_ = step_memory("TRAIN.EMA_DECAY", 0.9, "TRAIN.USE_CHECKPOINT", True, "TRAIN.CHECKPOINT_UNIT", "stage")
    assert stage.activations < less.activations and less.peak < stage.peak < memory.peak


def profile_step():
    spec = importlib.util.spec_from_file_location("profile_step", ROOT / "scripts/profile_step.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_profile_names_the_work_and_leaves_a_trace(tiny_cfg: Path, tmp_path: Path, capsys) -> None:
    trace = tmp_path / "trace.json"
    script = profile_step()
    assert script.main(["--cfg", str(tiny_cfg), "--device", "cpu", "--steps", "1", "--data", "--trace", str(trace)]) == 0
    out = capsys.readouterr().out
    shares = {name.strip(): float(share) for name, share in re.findall(r"^([^\d\n]+?) +[\d.]+ +([\d.]+)%(?: +\d+)?$", out, re.M)}
    assert {"linears", "attention", "norms", "convolutions", "data", "optimizer, clipping, average", "pointwise and sums",
            "copies and reordering", "autograd's own work", "allocations and views", "between operations (Python)"} <= shares.keys()
    assert abs(sum(shares.values()) - 100) < 1 and shares.get("other", 0) < 40
    assert any(event.get("name") == "aten::addmm" for event in json.loads(trace.read_text())["traceEvents"])
    assert script.main(["--opts", "MODEL.TYPE", "nonsense"]) == 2
