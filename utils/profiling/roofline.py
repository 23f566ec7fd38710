"""What a training step or a forward pass launches and moves on a GPU, counted without one, and what that takes by the roofline."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from yacs.config import CfgNode

from utils.profiling.fake_gpu import FakeStep, fake_gpu, with_layout
from utils.profiling.kernel_costs import GAP, LAUNCH, Call, Kernels
from utils.profiling.kernel_rules import kernels_of
from utils.tasks.build import build_task


class Recorder(TorchDispatchMode):
    """Keeps what every operation within it would launch; to be used within ``fake_gpu``."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernels] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = with_layout(func, args, func(*args, **kwargs))
        self.kernels += kernels_of(Call(func, args, kwargs, result))
        return result


def record(config: CfgNode, inference: bool = False) -> list[Kernels]:
    """What a training step of the model in ``config`` launches, or a forward pass in evaluation mode, in bf16 autocast.

    The second step is recorded: the first one makes the optimizer's state.
    """
    with fake_gpu():
        step = FakeStep(config, build_task(config))
        work = step.infer if inference else step.train
        work()
        with Recorder() as recorder:
            work()
    return recorder.kernels


def sums(kernels: Iterable[Kernels], by: str = "name") -> list[Kernels]:
    """``kernels`` summed by ``name``, or by name and ``shapes``; the longest first."""
    groups: dict[tuple[str, str], list[Kernels]] = defaultdict(list)
    for one in kernels:
        groups[one.name, one.shapes if by == "shapes" else ""].append(one)
    numbers = [field.name for field in dataclasses.fields(Kernels)][2:]
    rows = [Kernels(*key, *(sum(getattr(one, name) for one in members) for name in numbers)) for key, members in groups.items()]
    return sorted(rows, key=lambda row: -row.expected)


def total(kernels: Iterable[Kernels]) -> Kernels:
    """All ``kernels`` as one row."""
    rows = sums(dataclasses.replace(one, name="together") for one in kernels)
    return rows[0] if rows else Kernels("together", "", 0, 0, 0, 0, 0.0, 0.0)


def step_seconds(whole: Kernels, graphs: bool = False, pessimistic: bool = False) -> float:
    """Seconds of a step: its kernels' with the gaps between them, or the host's where that takes longer to launch them one by one.

    Args:
        graphs: as a CUDA graph, without the host.
        pessimistic: at half the paces that were not measured.
    """
    device = whole.expected + whole.assumed * pessimistic + whole.launches * GAP
    return device if graphs else max(device, whole.launches * LAUNCH)
