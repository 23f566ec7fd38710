"""PVTv2: timm's own model, reached by ``MODEL.TYPE pvt_v2``; the first version is in models/pvt.py.

Paper: "PVT v2: Improved Baselines with Pyramid Vision Transformer" (Computational Visual Media 2022). Nothing of the
model is ours; this file maps config keys to timm's arguments and the published files' names to timm's. timm registers
the variants under the official names already (``timm.create_model("pvt_v2_b2")``).
Parity: tests/models/test_families.py compares logits, features, stages and an epsilon probe with reference outputs.
"""

from __future__ import annotations

import re
from typing import Any

import timm.models.pvt_v2 as timm_pvt_v2
from timm.models import build_model_with_cfg
from torch import Tensor, nn

from models.base import check_heads, check_mlps, check_stages
from models.cpu_bf16 import norms_for_products

_STAGE_PARTS = (
    (re.compile(r"^patch_embed1\."), "patch_embed."),
    (re.compile(r"^patch_embed(\d+)\."), "stages.{}.downsample."),
    (re.compile(r"^block(\d+)\.(?=\d)"), "stages.{}.blocks."),
    (re.compile(r"^norm(\d+)\."), "stages.{}.norm."),
)


def checkpoint_filter_fn(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Published names to timm's; timm's own files pass as they are."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in _STAGE_PARTS:
            if match := pattern.match(name):
                stage = int(match.group(1)) - 1 if match.groups() else 0
                name = replacement.format(stage) + name[match.end():].replace("mlp.dwconv.dwconv.", "mlp.dwconv.")
                break
        renamed[name] = tensor
    return renamed


_COMMON = dict(embed_dims=(64, 128, 320, 512), num_heads=(1, 2, 5, 8), mlp_ratios=(8, 8, 4, 4), sr_ratios=(8, 4, 2, 1))

# The repository's presets and drop path rates.
VARIANTS: dict[str, dict[str, Any]] = {
    "pvt_v2_b0": dict(_COMMON, embed_dims=(32, 64, 160, 256), depths=(2, 2, 2, 2), drop_path_rate=0.1),
    "pvt_v2_b1": dict(_COMMON, depths=(2, 2, 2, 2), drop_path_rate=0.1),
    "pvt_v2_b2": dict(_COMMON, depths=(3, 4, 6, 3), drop_path_rate=0.1),
    "pvt_v2_b2_li": dict(_COMMON, depths=(3, 4, 6, 3), linear=True, drop_path_rate=0.1),
    "pvt_v2_b3": dict(_COMMON, depths=(3, 4, 18, 3), drop_path_rate=0.3),
    "pvt_v2_b4": dict(_COMMON, depths=(3, 8, 27, 3), drop_path_rate=0.3),
    "pvt_v2_b5": dict(_COMMON, depths=(3, 6, 40, 3), mlp_ratios=(4, 4, 4, 4), drop_path_rate=0.3),
}

# The family's config node: its keys and the arguments they set; keys that take one value only; what a label must give.
NODE_KEYS = {"EMBED_DIMS": "embed_dims", "DEPTHS": "depths", "NUM_HEADS": "num_heads", "MLP_RATIOS": "mlp_ratios",
             "SR_RATIOS": "sr_ratios", "LINEAR": "linear", "IN_CHANS": "in_chans", "QKV_BIAS": "qkv_bias"}
ONLY: dict[str, Any] = {}
REQUIRED = ("EMBED_DIMS", "DEPTHS", "NUM_HEADS")


def build(name: str, kwargs: dict[str, Any], img_size: tuple[int, int]) -> nn.Module:
    """timm's PyramidVisionTransformerV2; it takes images of any size from 29 pixels a side."""
    kwargs = dict(_COMMON, **kwargs)
    stages, widths, ratios = len(kwargs["depths"]), kwargs["embed_dims"], kwargs["mlp_ratios"]
    check_stages(kwargs["depths"], embed_dims=widths, num_heads=kwargs["num_heads"], mlp_ratios=ratios, sr_ratios=kwargs["sr_ratios"])
    check_heads(widths, kwargs["num_heads"])
    check_mlps(widths, mlp_ratios=ratios)
    kwargs = {key: tuple(value) if isinstance(value, list) else value for key, value in kwargs.items()}
    # timm describes its own re-evaluation, which crops less; the published figures are of the usual crop.
    model = build_model_with_cfg(
        timm_pvt_v2.PyramidVisionTransformerV2, name, False, pretrained_cfg=timm_pvt_v2._cfg(crop_pct=224 / 256),
        pretrained_filter_fn=checkpoint_filter_fn, feature_cfg=dict(flatten_sequential=True, out_indices=tuple(range(stages))),
        **kwargs)
    # Of linear attention a pooling reads the first norm.
    return norms_for_products(model, {timm_pvt_v2.Block: ("norm2",) if kwargs.get("linear") else ("norm1", "norm2")})
