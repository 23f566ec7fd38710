"""What COMPILE graphs records holds nothing that a recording refuses, on the way that a GPU takes (utils/profiling/fake_gpu.py)."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, words
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config import get_config
from utils.profiling.fake_gpu import FakeStep, fake_gpu
from utils.tasks.build import build_task
from utils.training.engine import Step
from utils.training.step_graph import decides_on_device


class _OnTheHost(TorchDispatchMode):
    """The operations that the host takes part in: on its own tensors, from them to the device or back, or reading a number."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        devices = {t.device.type for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)}
        if "cpu" in devices or name in ("_local_scalar_dense", "nonzero", "is_nonzero"):
            self.seen.append(name)
        return result


def on_the_host(*opts: object, work=lambda images: None) -> list[str]:
    """What the host does in the parts of a second step that are recorded, and in ``work``."""
    config = get_config(None, list(map(str, ["PRECISION", "bf16", "DATA.BATCH_SIZE", 4, "MODEL.NUM_CLASSES", 5, *opts])))
    with fake_gpu():
        fake = FakeStep(config, build_task(config))
        fake.train()
        model, plan = fake.state.model, fake.plan
        step, batch = Step(model, fake.state, plan), plan.transform(fake.batch, 1)
        assert decides_on_device(fake.state)
        with _OnTheHost() as host:
            loss = step.forward_backward(model, batch, plan, 0)
            step.update(loss)
            work(batch[0])
    return host.seen


@pytest.mark.parametrize("family", FAMILIES)
def test_the_host_has_no_part_in_a_familys_step(family: str) -> None:
    assert on_the_host(*words(family)) == []


@pytest.mark.parametrize("opts", [("TASK", "multilabel", "AUG.MIXUP_PROB", 0), ("TASK", "simmim", "DATA.MASK_PATCH_SIZE", 8)])
def test_nor_in_a_tasks(opts: tuple) -> None:
    assert on_the_host(*words("swin"), *opts) == []


def test_what_the_host_does_is_seen() -> None:
    def work(images: Tensor) -> None:
        torch.tensor([1.0, 2.0], device=images.device)
        images.add(torch.zeros(4, 1, 1, 1).to(images.device)).cpu()

    assert set(on_the_host(*words("swin_mlp"), work=work)) >= {"lift_fresh", "_to_copy"}
