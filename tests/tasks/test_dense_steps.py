"""A step's gradients in dense tasks: the same for a batch at once, in micro-batches, and shared by two processes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from config import get_config
from data.dense.batch import DenseBatch
from models import mask2former_loss
from utils.runtime.precision import Precision
from utils.tasks import mask
from utils.tasks.build import build_task
from utils.tasks.dense import DenseTask
from utils.training.engine import StepPlan, backward

TINY = ["PRECISION", "fp32", "MODEL.TYPE", "galerkin", "MODEL.NAME", "tiny", "MODEL.GALERKIN.EMBED_DIM", "16", "MODEL.GALERKIN.DEPTHS",
        "[1,1,1]", "MODEL.GALERKIN.NUM_HEADS", "[1,1,2]", "MODEL.DROP_PATH_RATE", "0.0", "MODEL.DENSE.WIDTH", "32",
        "MODEL.DENSE.QUERIES", "6"]
CPU, SIDE, COUNTS = torch.device("cpu"), 64, [2, 0, 3, 1]


def batch_of_four(task: str) -> DenseBatch:
    """Of images with different numbers of objects, or with maps of which different parts count."""
    generator = torch.Generator().manual_seed(0)
    images, sizes = torch.randn(4, 3, SIDE, SIDE, generator=generator), torch.full((4, 2), SIDE)
    corners = torch.rand(sum(COUNTS), 2, generator=generator) * 30
    boxes = torch.cat([corners, corners + 10 + torch.rand(sum(COUNTS), 2, generator=generator) * 20], dim=1)
    across = torch.arange(SIDE) + 0.5
    inside = [(across >= boxes[:, axis, None]) & (across < boxes[:, axis + 2, None]) for axis in (0, 1)]
    maps = torch.randint(3, (4, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    for image in range(4):
        maps[image, 16 * image:] = 255
    return DenseBatch(images, sizes, sizes, torch.arange(4), torch.tensor(COUNTS), boxes, torch.arange(sum(COUNTS)) % 3,
                      inside[1][:, :, None] & inside[0][:, None, :], maps if task == "semantic" else torch.zeros(0, dtype=torch.uint8))


def gradients(task: DenseTask, model: nn.Module, batch: DenseBatch, micro: int, world_size: int = 1) -> Tensor:
    model.zero_grad()
    backward(model, batch, StepPlan(task, None, None, Precision(CPU), CPU, micro, 4, 1.0, 0, 0, world_size), 0)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(("name", "head"), [("detection", "retinanet"), ("semantic", "semantic_fpn"), ("semantic", "upernet"),
                                            ("mask", "mask2former")])
def test_micro_batches_and_processes_add_up_to_the_whole_step(name: str, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if head in ("upernet", "mask2former"):
        pytest.importorskip("transformers")
    task = build_task(get_config(None, ["TASK", name, "MODEL.DENSE.HEAD", head, *TINY]))
    torch.manual_seed(0)
    model = task.build_model(task.config, 3).train()
    for module in model.modules():  # these do differ: they see a micro-batch alone
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.Dropout2d):
            module.eval()
    whole = batch_of_four(name)
    # Points where masks are compared are drawn anew for every micro-batch; here they lie in a grid.
    grid = torch.stack(torch.meshgrid(torch.arange(16) / 16, torch.arange(16) / 16, indexing="ij"), dim=-1).view(1, -1, 2) + 0.03
    monkeypatch.setattr(mask2former_loss, "_points", lambda library, logits, extents, points: grid.expand(len(logits), -1, -1))
    monkeypatch.setattr(mask2former_loss.torch, "rand", lambda *size, device: grid)
    exchanged: list[Tensor] = []
    monkeypatch.setattr(mask, "all_reduce_sum", lambda own: exchanged.append(own) or torch.tensor([float(sum(COUNTS)), 4.0]))
    expected = gradients(task, model, whole, 4)
    assert expected.norm() > 0
    found = {"accumulated": gradients(task, model, whole, 2)}
    assert not exchanged  # a process that tries a step alone waits for nobody
    found["shared"] = sum(gradients(task, model, part, 2, world_size=2) for part in whole.split(2)) / 2  # DDP's mean
    assert [own.tolist() for own in exchanged] == ([[2.0, 2.0], [4.0, 2.0]] if name == "mask" else [])
    for how, other in found.items():
        error = float((other - expected).norm() / expected.norm())
        assert error < 1e-5, (how, error)
