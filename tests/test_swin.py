"""Swin through MODEL.TYPE swin: timm's model on the repository's names gives the repository's outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from conftest import ROOT

from config import get_config
from models import build_model, load_state
from tests.recipe import PROBE_INPUT, deterministic_input, deterministic_state, eps_probe, off
from tests.test_weights import official_swin


@torch.no_grad()
def test_outputs_are_the_official_ones() -> None:
    reference = np.load(Path(__file__).parent / "reference/swin_tiny.npz")
    config = get_config(str(ROOT / "configs/swin_t.yaml"))
    model = build_model(config).eval()
    names = official_swin(model)
    shapes = {name: x.shape for name, x in names.items() if not name.endswith(("relative_position_index", "attn_mask"))}
    state, images = deterministic_state(shapes), torch.from_numpy(deterministic_input(2, 3, 224, 224))
    for weights, x, prefix in ((state, images, ""), (eps_probe(state), images * PROBE_INPUT, "probe_")):
        load_state(model, {name: torch.from_numpy(w) for name, w in weights.items()}, config, "recipe")
        final = model.forward_features(x)
        assert off(model.forward_head(final), reference[f"{prefix}logits"]) < 1e-5
        assert off(model.forward_head(final, pre_logits=True), reference[f"{prefix}features"]) < 1e-5
