"""Recorded steps (COMPILE graphs): the same bits as steps that are launched one by one, whatever happens between them.

On a CPU a stand-in records and replays (op_recorder.py); at the end is what only a GPU can show.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import differences, load
from families import tiny
from op_recorder import OpRecorder
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config import get_config
from data.messages import NOTICE
from utils.checkpoints.state import TrainState
from utils.optim import optimizer as optim
from utils.optim.ema import build_average
from utils.runtime.compile import compile_model
from utils.runtime.cuda_graph import CudaRecorder
from utils.runtime.precision import Precision
from utils.tasks.build import build_task
from utils.training import assembly, step_graph
from utils.training.engine import Progress, Step, StepPlan, train_one_epoch
from utils.training.step_graph import WARM_UP, Graphs, choose_step

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
STEPS = 8
CLASSES = 5


class Rates:
    """Another one each step, such as fp32 holds: on the device a rate is a number of that kind."""

    def lr_at(self, step: int) -> float:
        return 2.0 ** -(10 + step % 5)


def run(recorder: Any = None, *opts: Any, family: str = "crossformer", device: torch.device = CPU, dtype: torch.dtype = torch.float32,
        accumulate: int = 2) -> tuple[TrainState, StepPlan, list[str]]:
    """(state, plan, what is said) of a tiny model with all that a step may do: mixup, micro-batches, clipping, drop path, an average."""
    said: list[str] = []
    config = get_config(None, list(map(str, ["TRAIN.EMA_DECAY", 0.9, "TRAIN.EMA_WARMUP", True, *opts])))
    torch.manual_seed(0)
    model = tiny(family, "MODEL.DROP_PATH_RATE", 0.3).to(device)
    task, precision = build_task(config), Precision(device, dtype)
    state = TrainState(model, optim.build_optimizer(config, model), precision.scaler, build_average(config, model))
    plan = StepPlan(task, Rates(), task.batch_transform(config, CLASSES, 0), precision, device, 4 // accumulate, 4, 1.0, 0,
                    step=Step if recorder is None else Graphs(said.append, recorder))
    OpRecorder.recordings = OpRecorder.replays = 0
    return state, plan, said


def batches(first: int = 0, broken: tuple[int, ...] = (), short: int = -1, device: torch.device = CPU) -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(first, 100):
        generator = torch.Generator().manual_seed(step)
        images, targets = torch.randn(4, 3, 32, 32, generator=generator), torch.randint(CLASSES, (4,), generator=generator)
        if step in broken:
            images[1] = math.nan
        rows = 2 if step == short else 4
        yield images[:rows].to(device), targets[:rows].to(device)


def train(state: TrainState, plan: StepPlan, until: int, source: Iterator[Any] | None = None) -> list[tuple[int, float, float]]:
    progress = Progress(plan.device)
    train_one_epoch(state.model, state, batches(state.step, device=plan.device) if source is None else source, until, plan, progress,
                    lambda state, progress: None)
    assert all(p.grad is None for p in state.model.parameters())
    return [(step, float(loss), float(norm)) for step, loss, norm in progress.steps]


def content(state: TrainState) -> dict[str, Any]:
    return copy.deepcopy({**state.state_dict(), "steps_per_epoch": 100})


def same(left: Any, right: Any) -> bool:
    return repr(left) == repr(right)  # NaN is as NaN


@pytest.mark.parametrize(("family", "optimizer", "accumulate", "recordings"), [
    ("crossformer", "adamw", 2, 3), ("crossformer", "sgd", 1, 2), ("mpvit", "adamw", 2, 3), ("crossformer", "lion", 2, 2)])
def test_a_recorded_run_ends_in_the_same_bits(family: str, optimizer: str, accumulate: int, recordings: int) -> None:
    """Accumulation, rates that change, random numbers, an average, batch norms, steps that are left out before and after the recording.

    lion asks the host whether to step, so that its update is no recording.
    """
    wanted, options = [], dict(family=family, accumulate=accumulate)
    for recorder in (None, OpRecorder):
        state, plan, said = run(recorder, "TRAIN.OPTIMIZER.NAME", optimizer, **options)
        source = batches(broken=(1, 5))
        seen = train(state, plan, 5, source) + train(state, plan, STEPS, source)  # in two epochs
        wanted.append((content(state), seen))
    assert differences(*(state for state, _ in wanted)) == [] and same(*(seen for _, seen in wanted))
    assert [math.isfinite(norm) for _, _, norm in wanted[0][1]] == [step not in (1, 5) for step in range(STEPS)]
    assert OpRecorder.recordings == recordings and len(said) == 1
    assert OpRecorder.replays == (STEPS - WARM_UP) * (accumulate + (optimizer != "lion"))


def test_what_a_checkpoint_holds_is_the_same_and_either_kind_of_run_continues_the_other() -> None:
    state, plan, _ = run(accumulate=1)
    train(state, plan, WARM_UP + 3)
    wanted = content(state)
    for before, after in ((None, OpRecorder), (OpRecorder, None)):
        state, plan, _ = run(before, accumulate=1)
        train(state, plan, WARM_UP + 1)
        saved = content(state)
        assert all(type(group["lr"]) is float and not group["capturable"] for group in saved["optimizer"]["param_groups"])
        state, plan, _ = run(after, accumulate=1)
        state.load_state_dict(saved, "a file")
        train(state, plan, WARM_UP + 3)
        assert differences(content(state), wanted) == []


def test_a_way_back_to_a_checkpoint_has_the_step_recorded_anew() -> None:
    """It puts other tensors in the place of the optimizer's; the weights stay where they were."""
    wanted = []
    for recorder in (None, OpRecorder):
        state, plan, said = run(recorder)
        train(state, plan, WARM_UP + 1)
        saved = content(state)
        train(state, plan, WARM_UP + 2)
        state.load_state_dict(saved, "a file")
        train(state, plan, STEPS)
        wanted.append(content(state))
    assert differences(*wanted) == [] and OpRecorder.recordings == 2 * 3 and len(said) == 2


def test_a_batch_of_another_shape_is_no_matter_for_the_recording() -> None:
    wanted = []
    for recorder in (None, OpRecorder):
        state, plan, _ = run(recorder)
        train(state, plan, STEPS, batches(short=WARM_UP + 2))
        wanted.append(content(state))
    assert differences(*wanted) == [] and OpRecorder.recordings == 3 and OpRecorder.replays == 3 * (STEPS - WARM_UP - 1)


def test_an_evaluation_between_steps_changes_nothing() -> None:
    wanted = []
    for recorder in (None, OpRecorder):
        state, plan, _ = run(recorder)
        for until in range(1, STEPS + 1):
            train(state, plan, until)
            with torch.inference_mode():
                state.model.eval()(torch.zeros(1, 3, 64, 64))
        wanted.append(content(state))
    assert differences(*wanted) == [] and OpRecorder.recordings == 3


def test_a_whole_run_is_the_same(tiny_cfg: Path, program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through loader, evaluations and checkpoints, its end by another start; on a CPU as it is a notice says that nothing is recorded."""
    options = {"REPORT": "none", "SAVE_EVERY_STEPS": 6, "KEEP_CHECKPOINTS": 0, "LR_SCHEDULER.NAME": "step", "WARMUP_EPOCHS": 0,
               "LR_BATCH": 0, "BASE_LR": 2 ** -6}  # a rate that fp32 holds
    command = ("--cfg", tiny_cfg, "--compile", "graphs", "--device", "cpu", "--epochs", 1, "--batch-size", 4,
               "--opts", *(word for key, value in options.items() for word in (f"TRAIN.{key}", value)))
    plain = program(*command)
    assert plain.returncode == 0 and plain.stdout.count("notice: steps are not recorded") == 1, plain.stderr
    monkeypatch.setattr(assembly, "choose_step", lambda how, device, processes, say: Graphs(say, OpRecorder))
    OpRecorder.replays = 0
    end, folder = load(program.folder / "output/tiny/default/last.pth"), program.folder / "output/tiny/recorded"
    for steps in (end["step"], end["step"] - 6):
        done = program(*command, "TAG", "recorded")
        assert done.returncode == 0 and done.stdout.count("recorded a training step as 2 CUDA graphs") == 1, done.stderr
        found = load(folder / "last.pth")
        assert differences(*[{key: each[key] for key in ("model", "ema", "optimizer", "step")} for each in (found, end)]) == []
        assert OpRecorder.replays == 2 * (steps - WARM_UP)
        OpRecorder.replays = 0
        for path in folder.glob("*.pth"):
            if path.name != "ckpt_00000006.pth":
                path.unlink()  # as a kill in the first epoch leaves it


class _Reads(nn.Module):
    """A model that asks the device for a number."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * (2.0 if x.sum().item() > 0 else 1.0)


class _Fails(OpRecorder):
    def record(self, work: Any) -> Any:
        super().record(work)
        raise RuntimeError("not\nthis time")


@pytest.mark.parametrize("obstacle", ["reads", "fails", "uneven"])
def test_what_cannot_be_recorded_runs_as_it_is_and_says_so_once(obstacle: str) -> None:
    wanted, images = [], 3 if obstacle == "uneven" else 4
    for recorder in (None, _Fails if obstacle == "fails" else OpRecorder):
        state, plan, said = run(recorder, "AUG.MIXUP_PROB", 0)
        model = _Reads(state.model) if obstacle == "reads" else state.model
        source = ((x[:images], y[:images]) for x, y in batches())
        train_one_epoch(model, state, source, STEPS, plan, Progress(CPU), lambda state, progress: None)
        wanted.append(content(state))
    assert differences(*wanted) == [] and OpRecorder.replays == 0
    assert [line.level for line in said] == [NOTICE] and OpRecorder.recordings == (obstacle == "fails")  # what reads is seen before
    assert {"reads": "_local_scalar_dense", "fails": ": not", "uneven": "3 samples"}[obstacle] in said[0]


class _Pair(NamedTuple):
    """As batches of dense tasks, which hold what the host reads."""

    images: Tensor
    targets: Tensor


@pytest.mark.parametrize("kind", [list, lambda parts: _Pair(*parts)])
def test_batches_of_dense_tasks_are_not_recorded(kind: Any) -> None:
    state, plan, said = run(OpRecorder)
    for _ in range(WARM_UP + 2):
        plan.step(state.model, state, plan).run(kind(next(batches())))
    assert len(said) == 1 and plan.task.name in said[0] and OpRecorder.recordings == 0


def test_only_one_process_on_a_cuda_gpu_records() -> None:
    for how, device, processes, notices in (("off", "cuda", 1, 0), ("blocks", "cpu", 1, 0), ("graphs", "cpu", 1, 1),
                                            ("graphs+blocks", "cuda", 2, 1), ("graphs+model", "mps", 1, 1)):
        said: list[str] = []
        assert choose_step(how, torch.device(device), processes, said.append) is Step
        assert [line.level for line in said] == [NOTICE] * notices
    assert isinstance(choose_step("graphs+blocks", torch.device("cuda"), 1, said.append), Graphs) and len(said) == 1


class _Reading(TorchDispatchMode):
    """What the operations inside read that was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.own: set[int] = set()
        self.read: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.numel() and tensor.untyped_storage()._cdata not in self.own:
                self.read[tensor.untyped_storage()._cdata] = StorageWeakRef(tensor.untyped_storage())
        self.own |= {t.untyped_storage()._cdata for t in tree_leaves(result) if isinstance(t, Tensor)} - set(self.read)
        return result


@pytest.mark.parametrize("family", ["cvt", "shunted", "swin", "galerkin"])
def test_a_recording_reads_what_stays(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host reads nothing, and what a step reads is there for good: a recording holds nothing that others let go."""
    monkeypatch.setattr(step_graph, "WARM_UP", 1)
    wanted = []
    for recorder in (None, OpRecorder):
        state, plan, said = run(recorder, family=family, accumulate=1)
        train(state, plan, 2)
        wanted.append(content(state))
    assert differences(*wanted) == [] and OpRecorder.replays == 2 and len(said) == 1
    images, targets = next(batches())
    plain = Step(state.model.train(), state, plan)
    with _Reading() as seen:
        plain.run((images, targets))
    with torch.inference_mode():
        for size in (32,) if family == "swin" else (64, 32):
            state.model.eval()(torch.zeros(1, 3, size, size))
    gone = [ref for ref in seen.read.values() if ref.expired()]
    assert len(seen.read) > 20 and not gone


# ---- what only a GPU can show ----------------------------------------------------------------------------------------------------

class Still:
    """No rate at all: the weights stay, so that losses tell of the random numbers alone."""

    def lr_at(self, step: int) -> float:
        return 0.0


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["graphs", "graphs+blocks"])
def test_on_cuda_a_replay_draws_by_the_seed_of_its_step(how: str) -> None:
    """Other numbers in each step, in a step done again the same, and those of steps that are not recorded."""
    state, plan, said = run(CudaRecorder, "AUG.MIXUP_PROB", 0, device=CUDA)
    plan, last = dataclasses.replace(plan, schedule=Still()), WARM_UP + 4
    compile_model(state.model, how)
    source = itertools.repeat(next(batches(device=CUDA)))
    train(state, plan, WARM_UP + 1, source)
    assert len(said) == 1 and said[0].level != NOTICE, said
    state.step = 0
    recorded = train(state, plan, last, source)
    state.step = 0
    assert same(train(state, plan, last, source), recorded)
    state.step = 0
    plain = train(state, dataclasses.replace(plan, step=Step), last, source)
    assert len({loss for _, loss, _ in recorded}) == last
    assert [loss for _, loss, _ in recorded] == pytest.approx([loss for _, loss, _ in plain], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "optimizer"), [(torch.float32, "adamw"), (torch.bfloat16, "sgd"), (torch.float16, "adamw"),
                                                  (torch.float32, "lion")])
def test_on_cuda_a_recorded_run_learns_as_one_that_is_not(dtype: torch.dtype, optimizer: str) -> None:
    """Rates, accumulation, steps that are left out, the way back to a checkpoint, a short batch."""
    losses = []
    for recorder in (None, CudaRecorder):
        state, plan, said = run(recorder, "TRAIN.OPTIMIZER.NAME", optimizer, device=CUDA, dtype=dtype, family="mpvit")
        seen = train(state, plan, 6, batches(broken=(1, 5), device=CUDA))
        saved = content(state)
        state.load_state_dict(saved, "a file")
        seen += train(state, plan, 10, batches(6, short=8, device=CUDA))
        assert all(type(group["lr"]) is float for group in saved["optimizer"]["param_groups"])
        losses.append([loss for _, loss, _ in seen])
    assert len(said) == 2 and not any(line.level == NOTICE for line in said), said
    assert losses[0] == pytest.approx(losses[1], rel=1e-2 if dtype == torch.float32 else 5e-2, nan_ok=True)


@pytest.mark.gpu
def test_on_cuda_what_is_looked_at_later_is_not_written_over() -> None:
    state, plan, _ = run(CudaRecorder, device=CUDA)
    train(state, plan, WARM_UP)
    assert len({(loss, norm) for _, loss, norm in train(state, plan, WARM_UP + 5)}) == 5


def refuse() -> None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("not in a recording")


@pytest.mark.gpu
@pytest.mark.parametrize("obstacle", ["waits", "draws", "refuses", "breaks"])
def test_on_cuda_what_cannot_be_recorded_runs_as_it_is(obstacle: str) -> None:
    """It waits, draws on the host, raises an error, or has the driver break the recording off; drop path draws on afterwards."""
    state, plan, said = run(CudaRecorder, device=CUDA)
    does = dict(waits=lambda x: x.sum().item(), draws=lambda x: torch.rand(()), refuses=lambda x: refuse(),
                breaks=lambda x: torch.cuda.current_stream().query())[obstacle]
    state.model.register_forward_pre_hook(lambda module, inputs: (does(inputs[0]), None)[1])
    seen = train(state, plan, STEPS)
    assert [line.level for line in said] == [NOTICE] and all(math.isfinite(norm) for _, _, norm in seen)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
