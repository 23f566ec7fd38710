"""Swin Transformer: timm's own model, reached by ``MODEL.TYPE swin`` and by the keys of the Swin repository's files.

Paper: "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows" (ICCV 2021). Nothing of the model is
ours; this file maps config keys to timm's arguments and the published files' names to timm's.
Parity: tests/models/test_families.py compares logits, features, stages and an epsilon probe with reference outputs.
"""

from __future__ import annotations

from typing import Any

import timm.models.swin_transformer as timm_swin
from timm.models import build_model_with_cfg
from torch import Tensor, nn

from models.base import check_doubling
from models.cpu_bf16 import norms_for_products


def checkpoint_filter_fn(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Published names to timm's; derived masks and indices left out; bias tables resized to the model's windows."""
    return timm_swin.checkpoint_filter_fn(dict(state), model)


# The repository's presets. Drop path rates are the recipes' (the paper's appendix A2.1).
VARIANTS: dict[str, dict[str, Any]] = {
    "swin_tiny": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), window_size=7),
    "swin_small": dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), window_size=7),
    "swin_base": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), window_size=7),
    "swin_base_384": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), window_size=12),
    "swin_large": dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), window_size=7),
}
NODE_KEYS = {"EMBED_DIM": "embed_dim", "DEPTHS": "depths", "NUM_HEADS": "num_heads", "WINDOW_SIZE": "window_size",
             "PATCH_SIZE": "patch_size", "IN_CHANS": "in_chans", "MLP_RATIO": "mlp_ratio", "QKV_BIAS": "qkv_bias"}
ONLY = {"QK_SCALE": None, "APE": False, "PATCH_NORM": True}
REQUIRED = ("EMBED_DIM", "DEPTHS", "NUM_HEADS")


def build(name: str, kwargs: dict[str, Any], img_size: tuple[int, int]) -> nn.Module:
    """timm's SwinTransformer for an image of ``img_size``; windows that do not divide a map are padded by timm."""
    check_doubling(**kwargs)
    kwargs = dict(kwargs, img_size=img_size, depths=tuple(kwargs["depths"]), num_heads=tuple(kwargs["num_heads"]))
    model = build_model_with_cfg(
        timm_swin.SwinTransformer, name, False, pretrained_cfg=timm_swin._cfg(), pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(flatten_sequential=True, out_indices=tuple(range(len(kwargs["depths"])))), **kwargs)
    return norms_for_products(model, {timm_swin.SwinTransformerBlock: ("norm1", "norm2"), timm_swin.PatchMerging: ("norm",)})
