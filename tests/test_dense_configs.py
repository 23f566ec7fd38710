"""Every YAML file in configs/dense/: the schedules as published, and models of the published sizes."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import ROOT
from torch import nn

from config import DENSE_TASKS, get_config, without_effect
from models.build_dense import build_dense_model
from utils.optim.lr_schedule import build_schedule
from utils.optim.optimizer import parameter_groups

EMBEDDED = sorted(path for pattern in ("quickstart", "canvases_*") for path in (ROOT / "configs/dense").glob(f"{pattern}.yaml"))
FILES = sorted(set((ROOT / "configs/dense").glob("*.yaml")) - set(EMBEDDED))
# To the unit; the papers' tables have them in millions with one digit.
PARAMETERS = {
    "retinanet_crossformer_s": 40_824_958, "mask_rcnn_crossformer_s_3x": 50_165_119, "semantic_fpn_crossformer_l": 95_440_158,
    "upernet_crossformer_s": 62_308_022, "mask_rcnn_crossformer_pp_s": 42_966_697, "mask_rcnn_swin_t": 47_798_959,
    "retinanet_pvt_s": 34_221_812, "mask_rcnn_mpvit_xs": 30_439_061, "mask2former_swin_t": 47_418_763,
    "mask2former_galerkin_b": 82_402_705,
}
STEPS = {"COCO": 7_329, "ADE20K": 1_263}  # steps of 16 images in an epoch


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_file_is_a_recipe_of_a_dense_task(path) -> None:
    config, head = get_config(str(path)), path.read_text(encoding="utf-8").split("BASE")[0]
    assert config.TASK in DENSE_TASKS and without_effect(config) == [] and config.TAG != "default"
    assert re.search(rf"main.py --cfg configs/dense/{path.stem}.yaml --data-path \w+", head)
    if not path.stem.startswith("finetune"):
        assert config.TRAIN.GLOBAL_BATCH == config.TRAIN.LR_BATCH == 8 * config.DATA.BATCH_SIZE
        assert path.stem.startswith(config.MODEL.DENSE.HEAD) and config.TAG.removesuffix("_3x") == config.MODEL.DENSE.HEAD


@pytest.mark.parametrize("path", EMBEDDED, ids=lambda path: path.stem)
def test_each_file_of_the_canvases_makes_a_small_model(path) -> None:
    if "mask2former" in path.stem or "upernet" in path.stem:
        pytest.importorskip("transformers")
    config, head = get_config(str(path)), path.read_text(encoding="utf-8").split("TASK")[0]
    assert config.DATA.DATASET == "canvases" and without_effect(config) == [] and config.TAG != "default" and config.AUG.HFLIP == 0
    assert f"main.py --cfg configs/dense/{path.stem}.yaml --pretrained" in head
    assert 2e6 < sum(p.numel() for p in build_dense_model(config, 11).parameters()) < 7e6


RATES = {
    "retinanet_crossformer_b": {0: 1e-7, 250: 5.005e-5, 500: 1e-4, 8 * 7329 - 1: 1e-4, 8 * 7329: 1e-5, 11 * 7329: 1e-6},
    "mask_rcnn_crossformer_s_3x": {27 * 7329 - 1: 1e-4, 27 * 7329: 1e-5, 33 * 7329: 1e-6, 36 * 7329 - 1: 1e-6},
    "mask_rcnn_pvt_m": {0: 2e-7, 500: 2e-4, 8 * 7329: 2e-5},
    "retinanet_mpvit_s": {0: 1e-6, 1000: 1e-4, 59_999: 1e-4, 60_000: 1e-5, 80_000: 1e-6},
    "semantic_fpn_crossformer_s": {0: 1e-4, 40_000: 1e-4 * 0.5**0.9, 80_000: 0},
    "semantic_fpn_pvt_s": {0: 2e-4, 20_000: 2e-4 * 0.5**0.9, 40_000: 0},
    "upernet_crossformer_l": {0: 6e-11, 1500: 6e-5 * (1 - 1500 / 160_000), 80_000: 3e-5, 159_999: 6e-5 / 160_000},
    "mask2former_swin_t": {0: 1e-4, 327_777: 1e-4, 327_778: 1e-5, 355_092: 1e-6},
}


@pytest.mark.parametrize("name", RATES)
def test_the_rates_are_the_published_ones(name: str) -> None:
    config = get_config(str(ROOT / f"configs/dense/{name}.yaml"))
    schedule = build_schedule(config, STEPS["ADE20K" if config.TASK == "semantic" else "COCO"], config.TRAIN.GLOBAL_BATCH)
    assert {step: schedule.lr_at(step) for step in RATES[name]} == pytest.approx(RATES[name], rel=1e-9)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_models_are_of_the_published_sizes(name: str) -> None:
    if name.startswith("mask2former"):
        pytest.importorskip("transformers")
    path = ROOT / f"configs/dense/{name}.yaml"
    config = get_config(str(path))
    with torch.device("meta"):
        model = build_dense_model(config, 150 if config.TASK == "semantic" else 80)
    count = sum(p.numel() for p in model.parameters())
    assert count == PARAMETERS[name] and f": {count / 1e6:.1f} M parameters" in path.read_text(encoding="utf-8")
    groups = parameter_groups(config, model)
    assert {group.get("lr_scale", 1.0) for group in groups} == ({0.1, 1.0} if name.startswith("mask2former") else {1.0})
    exempt = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    tables = [p for part in model.modules() if isinstance(part, nn.Embedding) for p in part.parameters()]
    tables += [p for name, p in model.named_parameters() if "table" in name or "level_embed" in name]
    assert all(id(p) in exempt for p in tables) and len(exempt) < len(list(model.parameters()))


def test_no_two_recipes_share_a_runs_folder() -> None:
    places = [(config.MODEL.NAME, config.TAG) for config in (get_config(str(path)) for path in FILES)]
    assert len(set(places)) == len(places)
