"""Swin Transformer V2: timm's own model, reached by ``MODEL.TYPE swinv2`` and by the keys of the Swin repository's files.

Paper: "Swin Transformer V2: Scaling Up Capacity and Resolution" (CVPR 2022). Nothing of the model is ours; this file maps config keys to
timm's arguments and the published files' names to timm's. The variants bear timm's names.
Parity: timm's; tests/models/test_swinv2.py has the paper's counts, the published names, and Hugging Face's model beside it.
"""

from __future__ import annotations

from typing import Any

import timm.models.swin_transformer_v2 as timm_swinv2
from timm.models import build_model_with_cfg
from torch import Tensor, nn

from models.base import check_doubling, check_stages


def checkpoint_filter_fn(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Published names to timm's; derived masks, tables and indices left out. A window of another size takes the same weights."""
    return timm_swinv2.checkpoint_filter_fn(dict(state), model)


_TINY = dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.2)
_SMALL = dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.3)
_BASE = dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.5)
_BASE_22K = dict(_BASE, drop_path_rate=0.2)
_LARGE_22K = dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), drop_path_rate=0.2)
_FROM_12 = dict(pretrained_window_sizes=(12, 12, 12, 6))

# The repository's presets and drop path rates.
VARIANTS: dict[str, dict[str, Any]] = {
    "swinv2_tiny_window8_256": dict(_TINY, window_size=8),
    "swinv2_tiny_window16_256": dict(_TINY, window_size=16),
    "swinv2_small_window8_256": dict(_SMALL, window_size=8),
    "swinv2_small_window16_256": dict(_SMALL, window_size=16),
    "swinv2_base_window8_256": dict(_BASE, window_size=8),
    "swinv2_base_window16_256": dict(_BASE, window_size=16),
    "swinv2_base_window12_192": dict(_BASE_22K, window_size=12),
    "swinv2_base_window12to16_192to256": dict(_BASE_22K, window_size=16, **_FROM_12),
    "swinv2_base_window12to24_192to384": dict(_BASE_22K, window_size=24, **_FROM_12),
    "swinv2_large_window12_192": dict(_LARGE_22K, window_size=12),
    "swinv2_large_window12to16_192to256": dict(_LARGE_22K, window_size=16, **_FROM_12),
    "swinv2_large_window12to24_192to384": dict(_LARGE_22K, window_size=24, **_FROM_12),
}
NODE_KEYS = {"EMBED_DIM": "embed_dim", "DEPTHS": "depths", "NUM_HEADS": "num_heads", "WINDOW_SIZE": "window_size",
             "PATCH_SIZE": "patch_size", "IN_CHANS": "in_chans", "MLP_RATIO": "mlp_ratio", "QKV_BIAS": "qkv_bias",
             "PRETRAINED_WINDOW_SIZES": "pretrained_window_sizes"}
ONLY = {"APE": False, "PATCH_NORM": True}
REQUIRED = ("EMBED_DIM", "DEPTHS", "NUM_HEADS")


def build(name: str, kwargs: dict[str, Any], img_size: tuple[int, int]) -> nn.Module:
    """timm's SwinTransformerV2 for an image of ``img_size``; windows are no larger than a stage's map."""
    kwargs = dict(kwargs, img_size=img_size)
    for key in ("depths", "num_heads", "pretrained_window_sizes"):
        if key in kwargs:
            kwargs[key] = tuple(kwargs[key])
    check_doubling(**kwargs)
    if "pretrained_window_sizes" in kwargs:
        check_stages(kwargs["depths"], pretrained_window_sizes=kwargs["pretrained_window_sizes"])
    return build_model_with_cfg(
        timm_swinv2.SwinTransformerV2, name, False, pretrained_cfg=timm_swinv2._cfg(crop_pct=224 / 256),
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(flatten_sequential=True, out_indices=tuple(range(len(kwargs["depths"])))), **kwargs)
