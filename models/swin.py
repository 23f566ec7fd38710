"""Swin Transformer: timm's own model, reached by ``MODEL.TYPE swin`` and by the keys of the Swin repository's files.

Paper: "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows" (ICCV 2021). Nothing of the model is
ours; this file maps config keys to timm's arguments and the published files' names to timm's.
On a GPU its blocks attend in place (``BlockInPlace``).
Parity: tests/models/test_families.py compares logits, features, stages and an epsilon probe with reference outputs.
"""

from __future__ import annotations

from typing import Any

import timm.models.swin_transformer as timm_swin
import torch
from timm.models import build_model_with_cfg
from torch import Tensor, nn

from models.base import check_doubling
from models.cpu_bf16 import norms_for_products
from models.group_attention import fits, group_attention
from models.layers import add_branch, add_branch_and_norm, is_hooked, norm_and_skip


class BlockInPlace(timm_swin.SwinTransformerBlock):
    """timm's block, on a GPU with the windows taken where they lie in the map: it shifts and partitions nothing, and makes neither a
    bias of pairs nor weights of attention. Maps that windows do not divide, and all else that ``fits`` refuses, go timm's way."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda or torch.compiler.is_compiling():
            return super().forward(x)
        y, x = norm_and_skip(self.norm1, x)
        y, x = add_branch_and_norm(x, self._attn(y), self.drop_path1, self.norm2)
        return add_branch(x, self.mlp(y), self.drop_path2)

    def _attn(self, x: Tensor) -> Tensor:
        attn, (side, other), (shift, shift_too) = self.attn, self.window_size, self.shift_size
        square = side == other and shift == shift_too and x.shape[1] % side == x.shape[2] % side == 0
        if not square or not fits(x, attn.num_heads, side, attn.attn_drop) or is_hooked(attn):
            return super()._attn(x)
        table = attn.relative_position_bias_table
        return attn.proj_drop(attn.proj(group_attention(attn.qkv(x), table, attn.num_heads, side, 1, attn.scale, shift)))


def attend_in_place(model: nn.Module) -> nn.Module:
    """Turn timm's Swin blocks in ``model`` into ``BlockInPlace``; names and weights stay."""
    for module in model.modules():
        if type(module) is timm_swin.SwinTransformerBlock:
            module.__class__ = BlockInPlace
    return model


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
