"""The training step: nothing waits for the device, and a step that is not finite is left out whole."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from config import get_config
from models.crossformer import CrossFormer
from utils.checkpoints.state import TrainState
from utils.optim import optimizer as optim
from utils.optim.ema import WeightAverage
from utils.optim.lr_schedule import build_schedule
from utils.runtime import distributed
from utils.runtime.precision import Precision
from utils.tasks.classification import Classification
from utils.training.engine import Progress, StepPlan, train_one_epoch
from utils.training.loop import after_step

TINY = dict(embed_dim=16, depths=(1, 2), num_heads=(1, 2), group_size=(4, 4), interval=(2, 1), merge_size=((2, 4),), num_classes=3,
            drop_path_rate=0.2)
WAITS = ("_local_scalar_dense", "is_nonzero", "item", "nonzero", "equal", "masked_select", "unique", "bincount", "repeat_interleave")
pytestmark = pytest.mark.gpu(or_cpu=True)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Waits(TorchDispatchMode):
    """Counts the operations whose result, or its shape, the host has to know."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        index = args[1] if name in ("index", "index_put", "index_put_") else ()
        masked = any(isinstance(i, Tensor) and i.dtype == torch.bool for i in index)
        crossing = name in ("_to_copy", "copy_") and {a.device.type for a in args if isinstance(a, Tensor)} | {
            torch.device((kwargs or {}).get("device") or args[0].device).type} > {"cpu"}
        if masked or crossing or name.strip("_") in {wait.strip("_") for wait in WAITS}:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def training(name: str = "adamw", *opts: object) -> tuple[TrainState, StepPlan]:
    """A tiny model with all that a step may do: mixup and cutmix, two micro-batches, clipping, an average."""
    config = get_config(None, ["TRAIN.OPTIMIZER.NAME", name, "TRAIN.EPOCHS", "40", "TRAIN.BASE_LR", "0.1", *map(str, opts)])
    torch.manual_seed(0)
    model = CrossFormer(**TINY).to(DEVICE)
    precision = Precision(DEVICE)
    state = TrainState(model, optim.build_optimizer(config, model), precision.scaler, WeightAverage(model, 0.9))
    task = Classification(config)
    plan = StepPlan(task, build_schedule(config, 1, 4), task.batch_transform(config, 3, 0), precision, DEVICE, 2, 4, 1.0, 0)
    return state, plan


def batches(broken: int = -1) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for step in range(100):
        images = torch.randn(4, 3, 32, 32, generator=generator)
        if step == broken:
            images[1] = math.nan
        yield images.to(DEVICE), torch.randint(3, (4,), generator=generator).to(DEVICE)


def steps(state: TrainState, plan: StepPlan, until: int, source: Iterator[tuple[Tensor, Tensor]],
          after: Callable[[TrainState, Progress], None] = lambda state, progress: None) -> Progress:
    progress = Progress(DEVICE)
    train_one_epoch(state.model, state, source, until, plan, progress, after)
    return progress


@pytest.mark.parametrize(("name", "waits"), [("adamw", 0), ("adam", 0), ("sgd", 0), ("momentum", 0), ("adagrad", 0), ("lion", 1)])
def test_a_step_does_not_wait_for_the_device(name: str, waits: int) -> None:
    state, plan = training(name)
    if name == "adagrad" and not optim.has_fused_form(torch.optim.Adagrad, DEVICE):
        waits = 1  # on CUDA with torch 2.11
    ready = iter(list(zip(range(9), batches(), strict=False)))
    source = (batch for _, batch in ready)
    steps(state, plan, 1, source)  # the first step allocates
    mode = torch.cuda.get_sync_debug_mode() if DEVICE.type == "cuda" else 0
    try:
        if DEVICE.type == "cuda" and not waits:
            torch.cuda.set_sync_debug_mode("error")
        with Waits() as seen:
            steps(state, plan, 9, source)
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode(mode)
    assert sum(seen.seen.values()) == 8 * waits, seen.seen


def test_waiting_for_data_is_counted() -> None:
    state, plan = training()

    def slow() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches():
            time.sleep(0.1)
            yield batch

    assert steps(state, plan, 1, slow()).data_wait.seconds() > 0.09


def test_the_counting_sees_what_waits() -> None:
    x = torch.ones(3)
    for wait in (lambda: x.sum().item(), lambda: bool(x.any()), lambda: x[x > 0], lambda: x.nonzero(), lambda: torch.equal(x, x)):
        with Waits() as seen:
            wait()
        assert seen.seen


@pytest.mark.parametrize(("device", "looks"), [("cuda", 3), ("cpu", 6)])
def test_a_gpu_is_read_only_when_a_line_is_due(device: str, looks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the lines after steps 2 and 4 and at the epoch's end; on a CPU, where it costs nothing, after every step."""
    looked = []
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    run = SimpleNamespace(
        config=get_config(None, ["PRINT_FREQ", "2"]), plan=SimpleNamespace(device=torch.device(device)), steps_per_epoch=6, total_steps=12,
        stop=SimpleNamespace(agreed=lambda: (False, False, False)), guard=SimpleNamespace(inspect=lambda progress: looked.append(1)))
    for step in range(1, 7):
        run.state = SimpleNamespace(step=step)
        after_step(run, None, first_step=0)
    assert len(looked) == looks


@pytest.mark.parametrize("name", ["adamw", "sgd", "adagrad", "lion"])
@pytest.mark.parametrize("broken", [0, 3])
def test_a_step_that_is_not_finite_changes_nothing(name: str, broken: int) -> None:
    """The first one too, before an optimizer has any state: what follows is as if the step had not been."""
    state, plan = training(name, "AUG.MIXUP_PROB", 0)
    source = batches(broken)
    steps(state, plan, broken, source)
    before = {k: v.clone() for k, v in state.model.state_dict().items()}
    kept = [{k: v.clone() for k, v in s.items()} for s in state.optimizer.state.values()]
    progress = steps(state, plan, broken + 1, source)
    assert not progress.steps[-1][2].isfinite() and progress.loss_sum == 0
    assert all(torch.equal(v, before[k]) for k, v in state.model.state_dict().items())
    for now, then in zip(state.optimizer.state.values(), kept, strict=False):
        assert all(torch.equal(now[k], then[k]) for k in then)
    steps(state, plan, broken + 3, source)
    assert all(v.isfinite().all() for v in state.model.state_dict().values())


def test_sgd_begins_as_torchs() -> None:
    """Its momentum is zeros before the first step, which gives the same numbers as none. The gradients are given, since those of two
    backward passes on a GPU may differ in their last bits."""
    generator, states = torch.Generator().manual_seed(0), [training("sgd")[0] for _ in range(2)]
    states[1].optimizer.state.clear()
    for _ in range(3):
        gradients = [torch.randn(p.shape, generator=generator).to(DEVICE) for p in states[0].model.parameters()]
        for state in states:
            for parameter, gradient in zip(state.model.parameters(), gradients, strict=True):
                parameter.grad = gradient.clone()
            state.optimizer.step()
    first, second = (list(state.model.parameters()) for state in states)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
