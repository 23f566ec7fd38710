"""Activation checkpointing: the same gradients and the same statistics, by block and by stage."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import differences
from families import FAMILIES, tiny

from config import ConfigError, get_config
from models import build_model
from utils.training.resume import Start, accept_changes

TIMMS = ("swin", "pvt_v2")


def trained_once(family: str, *opts: object) -> list[torch.Tensor]:
    """Gradients and buffers after a step with dropout and drop path."""
    model = tiny(family, "MODEL.DROP_PATH_RATE", 0.5, "MODEL.DROP_RATE", 0.1, *opts).train()
    torch.manual_seed(3)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    return [*(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in TIMMS])
def test_a_step_is_the_same_to_the_bit(family: str) -> None:
    plain = trained_once(family)
    for unit in ("block", "stage"):
        saving = trained_once(family, "TRAIN.USE_CHECKPOINT", True, "TRAIN.CHECKPOINT_UNIT", unit)
        assert differences(plain, saving) == [], unit


@pytest.mark.parametrize("family", TIMMS)
def test_models_of_timm_know_blocks_only(family: str) -> None:
    tiny(family, "TRAIN.USE_CHECKPOINT", True)
    with pytest.raises(ConfigError, match="TRAIN.CHECKPOINT_UNIT is stage, but tiny is timm's own model .* set it to block"):
        tiny(family, "TRAIN.USE_CHECKPOINT", True, "TRAIN.CHECKPOINT_UNIT", "stage")


def test_the_unit_is_one_of_two_and_no_part_of_the_recipe() -> None:
    with pytest.raises(ConfigError, match="TRAIN.CHECKPOINT_UNIT is 'stages'; choose from block, stage .did you mean stage"):
        get_config(None, ["TRAIN.CHECKPOINT_UNIT", "stages"])
    config = get_config(None, ["TRAIN.CHECKPOINT_UNIT", "stage", "COMPILE", "blocks"])
    start = Start("resume", "a.pth", {"config": get_config(None, []).dump()})
    accept_changes(start, config, logging.getLogger("test"))  # raises for a change of the recipe


def test_our_own_models_by_timms_name() -> None:
    opts = ["MODEL.TYPE", "timm", "MODEL.NAME", "crossformer_tiny", "TRAIN.USE_CHECKPOINT", "True", "TRAIN.CHECKPOINT_UNIT", "stage"]
    assert build_model(get_config(None, opts), 3).checkpoint_unit == "stage"
