"""Semantic FPN: counts, the branches, the classes of pixels."""

from __future__ import annotations

import pytest
import torch
from test_detectors import dense
from torch import nn

from config import get_config
from models.build_dense import build_dense_model

IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "count"), [("crossformer_small", 34_260_000), ("crossformer_base", 55_574_160),
                                             ("crossformer_large", 95_440_158), ("swin_tiny", 31_890_960)])
def test_parameters_are_as_many_as_the_papers_have(name: str, count: int) -> None:
    """Counted on the papers' models, whose tables they equal, for ADE20K's 150 classes."""
    family = name.split("_")[0]
    config = get_config(None, ["TASK", "semantic", "MODEL.DENSE.HEAD", "semantic_fpn", "MODEL.TYPE", family, "MODEL.NAME", name])
    with torch.device("meta"):
        model = build_dense_model(config, 150)
        assert sum(p.numel() for p in model.parameters()) == count
        assert [sum(isinstance(m, nn.Conv2d) for m in branch.modules()) for branch in model.branches] == [1, 1, 2, 3]
        assert model.eval()(torch.empty(1, 3, 64, 96)).shape == (1, 150, 64, 96)


def test_every_level_reaches_its_pixels() -> None:
    model = dense("semantic_fpn", "semantic").eval()
    with torch.inference_mode():
        plain = model(IMAGES)
        assert plain.shape == (2, 3, 64, 96) and torch.allclose(plain[1:], model(IMAGES[1:]), atol=1e-5)
        for level in range(2):
            maps = model.backbone(IMAGES[:1])
            maps[level] = maps[level].clone()
            maps[level][..., 0, 0] += 50
            model.backbone.forward = lambda _, maps=maps: maps
            changed = (model(IMAGES[:1]) - plain[:1]).abs().amax(dim=(0, 1))
            assert changed[:8, :8].max() > 1e-3 and changed[40:, 60:].max() < 1e-5
            del model.backbone.forward


def test_it_trains_and_pixels_without_a_class_teach_nothing() -> None:
    model = dense("semantic_fpn", "semantic").train()
    maps = torch.randint(0, 3, (2, 64, 96), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    losses = model(IMAGES, None, [dict(map=x) for x in maps])
    assert set(losses) == {"loss_semantic"} and 0.9 < losses["loss_semantic"] < 1.4
    losses["loss_semantic"].backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    model.zero_grad()
    nothing = model(IMAGES, None, [dict(map=torch.full_like(x, 255)) for x in maps])["loss_semantic"]
    nothing.backward()
    assert nothing == 0 and all(not p.grad.any() for p in model.parameters())


def test_bf16_trains_on_a_cpu() -> None:
    model = dense("semantic_fpn", "semantic").train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(IMAGES, None, [dict(map=torch.zeros(64, 96, dtype=torch.uint8))] * 2)["loss_semantic"]
    loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad.isfinite().all() for p in model.parameters())
