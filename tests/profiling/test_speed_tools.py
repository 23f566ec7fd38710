"""What measures a step: memory, throughput, the profile."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import bench_step
import profile_step
import pytest
import torch
from torch import nn

from config import get_config
from utils.profiling import step_speed
from utils.profiling.step_memory import StepMemory, measure_step
from utils.runtime.precision import Precision
from utils.tasks.build import build_task
from utils.training.assembly import synthetic_step
from utils.training.engine import Progress, train_one_epoch

CPU = torch.device("cpu")


def step_memory(*opts: object) -> tuple[StepMemory, nn.Module, torch.Tensor]:
    node = dict(EMBED_DIM=32, DEPTHS=[1, 2], NUM_HEADS=[1, 2], GROUP_SIZE=[4, 4], INTERVAL=[4, 2], MERGE_SIZE=[[2, 4]])
    config = get_config(None, ["DATA.BATCH_SIZE", "24", "DATA.IMG_SIZE", "64", "MODEL.NUM_CLASSES", "10", "MODEL.NAME", "tiny",
                               *(item for key, value in node.items() for item in (f"MODEL.CROSSFORMER.{key}", value)), *map(str, opts)])
    state, plan, batch = synthetic_step(config, build_task(config), CPU, Precision(CPU))

    def work(watched) -> None:
        train_one_epoch(state.model, state, iter([batch]), state.step + 1, watched, Progress(CPU), lambda state, progress: None)

    work(plan)
    return measure_step(state, plan, work, sum(t.nbytes for t in batch)), state.model, batch[0]


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


def test_the_profile_names_the_work_and_leaves_a_trace(tiny_cfg: Path, tmp_path: Path, capsys) -> None:
    trace = tmp_path / "trace.json"
    assert profile_step.main(["--cfg", str(tiny_cfg), "--device", "cpu", "--steps", "1", "--data", "--trace", str(trace)]) == 0
    out = capsys.readouterr().out
    shares = {name.strip(): float(share) for name, share in re.findall(r"^([^\d\n]+?) +[\d.]+ +([\d.]+)%(?: +\d+)?$", out, re.M)}
    assert {"linears", "attention", "norms", "convolutions", "data", "optimizer, clipping, average", "pointwise and sums",
            "copies and reordering", "autograd's own work", "allocations and views", "between operations (Python)"} <= shares.keys()
    assert abs(sum(shares.values()) - 100) < 1 and shares.get("other", 0) < 40
    assert any(event.get("name") == "aten::addmm" for event in json.loads(trace.read_text())["traceEvents"])
    for arguments in (["--opts", "MODEL.TYPE", "nonsense"], ["--steps", "0"], ["--trace", str(tmp_path / "absent/trace.json")]):
        assert profile_step.main(arguments) == 2 and capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(("device", "waits", "words"), [("cpu", 2 + 33, "median of 30,"), ("cuda", 2 + 32, "median of 30 rounds of 20,")])
def test_a_gpu_is_waited_for_once_in_many_steps(device: str, waits: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 2 s here, the first one 7; compilation and a recording are in no round."""
    now, waited = [0.0], []
    monkeypatch.setattr(step_speed, "synchronize", waited.append)
    monkeypatch.setattr(step_speed.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(step_speed, "BUDGET", math.inf)
    clock = step_speed._Clock(torch.device(device))
    waited.append(None)
    for step in range(clock.most):
        now[0] += 7.0 if step == 0 else 2.0
        assert not clock.enough()
    assert clock.first == 7 and set(clock.times) == {2.0} and len(waited) == waits
    assert words in clock.line(8, Precision(CPU)) and clock.line(8, Precision(CPU)).startswith("4.0 images/s (batch 8, 2000.0 ms")


def test_two_forms_of_a_model_are_compared(capsys) -> None:
    assert bench_step.main(["--model", "pvt_tiny", "--against", "self", "--batch", "1", "--img-size", "32", "--rounds", "1", "--inference",
                            "--precision", "fp32", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"ratio \d+\.\d{3}$", lines[-1])
    rows = [line.split() for line in lines if line.startswith(("pvt_tiny", "self"))]
    assert rows[0][-3] == rows[1][-3] and all(float(row[-1]) >= 0 for row in rows)
    for arguments in (["--model", "nonsense"], ["--against", "timm:nonsense"], ["--device", "tpu"], ["--model", "pvt_tiny"],
                      ["--model", "pvt_tiny", "--against", "self", "--part", "embedding"], ["--img-size", "30"],
                      ["--model", "pvt_tiny", "--against", "self", "--compile", "graphs", "--device", "cpu", "--img-size", "32"]):
        assert bench_step.main(arguments) == 2 and capsys.readouterr().err.startswith("error: ")
