"""PVT: Pyramid Vision Transformer, the first version (the second is in models/pvt_v2.py).

Paper: "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions" (ICCV 2021).

What the model is made of: four stages of transformer blocks on a shrinking map, each begun by a patch embedding and a
learned table of positions; spatial-reduction attention (SRA), whose keys and values come from the map reduced by a
strided convolution; a class token, which joins in the last stage and goes to the classifier.

Parameter names are those of the published files. As in the official code, a patch or reduction that a map's border cuts
is left out. Beyond it, any input works: tables are resized to the map whenever it is not the one they were made for (the
official test compares token counts with the first stage's, and so fails at twice the built size and keeps a table for a
map of another shape but equal count), and a map smaller than a convolution's kernel is padded to one patch.
Parity: tests/models/test_families.py compares logits, features, stages and an epsilon probe with reference outputs.

Shapes: B batch, H W map, N = H*W tokens (one more with the class token), M reduced tokens, C channels, h heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from models.attention import attention
from models.base import HierarchicalModel, check_heads, check_mlps, check_stages, register_variants
from models.checkpointing import run_blocks
from models.cpu_bf16 import LayerNormForProducts, Linear
from models.layers import DropPath, Mlp, add_branch, add_branch_and_norm, init_linear, make_head, norm_and_skip
from models.ops import merge_patches, pad_to


class PatchEmbed(nn.Module):
    """Linear embedding of whole patches, and a norm. (B, C, H, W) -> (B, H/patch, W/patch, C'), rounded down."""

    def __init__(self, in_chans: int, dim: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(pad_to(x, self.patch_size)).permute(0, 2, 3, 1))


class Attention(nn.Module):
    """SRA (section 3.3): queries from all tokens, keys and values from the reduced map. (B, N, C) -> the same."""

    def __init__(self, dim: int, num_heads: int, sr_ratio: int, qkv_bias: bool = True, attn_drop: float = 0.0,
                 proj_drop: float = 0.0):
        super().__init__()
        self.num_heads, self.sr_ratio = num_heads, sr_ratio
        self.scale = (dim // num_heads) ** -0.5
        self.q = Linear(dim, dim, bias=qkv_bias)
        self.kv = Linear(dim, 2 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio)
            self.norm = LayerNormForProducts(dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """``grid``: height and width of the map; with a class token among the tokens nothing can be reduced."""
        batch, tokens, dim = x.shape
        q = self.q(x).view(batch, tokens, self.num_heads, -1).transpose(1, 2)
        if self.sr_ratio > 1:
            x = pad_to(x.unflatten(1, grid).permute(0, 3, 1, 2), self.sr_ratio)
            x = self.norm(merge_patches(self.sr, x.permute(0, 2, 3, 1)).flatten(1, 2))
        k, v = self.kv(x).view(batch, x.shape[1], 2, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = attention(q, k, v, self.scale, self.attn_drop)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(batch, tokens, dim)))


class Block(nn.Module):
    """Attention and MLP, each after a norm and beside a skip. (B, N, C) -> the same."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, sr_ratio: int, qkv_bias: bool = True, drop: float = 0.0,
                 attn_drop: float = 0.0, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = LayerNormForProducts(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, sr_ratio, qkv_bias, attn_drop, drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = LayerNormForProducts(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        y, x = norm_and_skip(self.norm1, x)
        y, x = add_branch_and_norm(x, self.attn(y, grid), self.drop_path, self.norm2)
        return add_branch(x, self.mlp(y), self.drop_path)


def resize_table(table: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int = 0) -> Tensor:
    """A position table (1, prefix + N, C) for another map: bilinear, the first ``prefix`` rows as they are."""
    if old == new:
        return table
    first, rest = table[:, :prefix], table[:, prefix:]
    rest = rest.float().transpose(1, 2).reshape(1, -1, *old)
    rest = F.interpolate(rest, size=new, mode="bilinear", align_corners=False)
    return torch.cat([first, rest.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


class PyramidVisionTransformer(HierarchicalModel):
    """PVT classifier and backbone.

    ``forward_features`` gives the normed tokens of the last stage, the class token first; stage outputs are maps, without
    the class token.

    Args:
        img_size: size in pixels that the position tables are made for; the model takes any size.
        global_pool: token (the class token), avg (the mean of the others) or '' (all tokens).
        embed_dims, depths, num_heads, mlp_ratios: per stage.
        sr_ratios: reduction of the map that keys and values come from, per stage; 1 in the last.
        patch_size: patches of the first stage; those after it merge 2x2.
        drop_path_rate: rate of the last block; it grows linearly over all blocks.
    """

    pools = ("token", "avg", "")

    def __init__(self, img_size: int | tuple[int, int] = 224, in_chans: int = 3, num_classes: int = 1000,
                 global_pool: str = "token", embed_dims: Sequence[int] = (64, 128, 320, 512),
                 depths: Sequence[int] = (2, 2, 2, 2), num_heads: Sequence[int] = (1, 2, 5, 8),
                 mlp_ratios: Sequence[float] = (8.0, 8.0, 4.0, 4.0), sr_ratios: Sequence[int] = (8, 4, 2, 1),
                 patch_size: int = 4, qkv_bias: bool = True, drop_rate: float = 0.0, attn_drop_rate: float = 0.0,
                 drop_path_rate: float = 0.1):
        super().__init__()
        stages = len(depths)
        check_stages(depths, embed_dims=embed_dims, num_heads=num_heads, mlp_ratios=mlp_ratios, sr_ratios=sr_ratios)
        check_heads(embed_dims, num_heads)
        check_mlps(embed_dims, mlp_ratios=mlp_ratios)
        if sr_ratios[-1] != 1:
            raise ValueError(f"sr_ratios ends with {sr_ratios[-1]}; the last stage has a class token and must not reduce (1)")
        strides = [patch_size * 2 ** i for i in range(stages)]
        self.init_protocol(num_classes, in_chans, global_pool, drop_rate, embed_dims, strides,
                           [f"block{i + 1}" for i in range(stages)])
        self.num_prefix_tokens = 1
        self.num_stages = stages  # those that pruning has left
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.grids = [(max(1, height // stride), max(1, width // stride)) for stride in strides]
        rates = calculate_drop_path_rates(drop_path_rate, sum(depths))
        for s, dim in enumerate(embed_dims):
            rows = self.grids[s][0] * self.grids[s][1] + (s == stages - 1)
            first = sum(depths[:s])
            setattr(self, f"patch_embed{s + 1}", PatchEmbed(
                embed_dims[s - 1] if s else in_chans, dim, 2 if s else patch_size))
            setattr(self, f"pos_embed{s + 1}", nn.Parameter(torch.empty(1, rows, dim)))
            setattr(self, f"block{s + 1}", nn.ModuleList(
                Block(dim, num_heads[s], mlp_ratios[s], sr_ratios[s], qkv_bias, drop_rate, attn_drop_rate, rate)
                for rate in rates[first:first + depths[s]]))
        self.pos_drop = nn.Dropout(drop_rate)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dims[-1]))
        self.norm = nn.LayerNorm(embed_dims[-1], eps=1e-6)
        self.head = make_head(embed_dims[-1], num_classes)
        self.apply(init_linear)
        for parameter in self.parameters(recurse=False):  # the tables and the class token
            trunc_normal_(parameter, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"cls_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """A stage's embedding and table go with its first block, the class token with the last stage's."""
        last = len(self.feature_info)
        stem = r"^(?:patch_embed1|pos_embed1)"
        if coarse:
            return dict(stem=stem, blocks=[(r"^(?:patch_embed|pos_embed|block)(\d+)", None), (r"^cls_token", (last,))])
        return dict(stem=stem, blocks=[
            (r"^(?:patch_embed|pos_embed)(\d+)", (0,)), (r"^cls_token", (last, 0)), (r"^block(\d+)\.(\d+)", None),
            (r"^norm", (99999,))])

    def stage_modules(self) -> nn.ModuleList:
        return nn.ModuleList(getattr(self, f"block{s + 1}") for s in range(self.num_stages))

    def drop_after_stage(self, index: int) -> None:
        for s in range(index + 1, self.num_stages):
            for name in (f"patch_embed{s + 1}", f"pos_embed{s + 1}", f"block{s + 1}"):
                delattr(self, name)
        self.num_stages = min(self.num_stages, index + 1)
        if self.num_prefix_tokens and self.num_stages < len(self.feature_info):
            # The class token and the norm belong to the last stage.
            del self.cls_token
            self.num_prefix_tokens, self.norm = 0, nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[index]["num_chs"]

    def forward_stages(self, x: Tensor, last: int) -> list[Tensor]:
        """(B, 3, H, W) -> maps of stages 0..last, (B, H/4, W/4, C) first, without the class token."""
        return self.run_stages(x, last)[0]

    def run_stages(self, x: Tensor, last: int) -> tuple[list[Tensor], Tensor]:
        """Maps of stages 0..last, and the tokens of the last one run, (B, N, C), the class token first if it has one."""
        outputs: list[Tensor] = []
        tokens = x
        for s in range(min(last + 1, self.num_stages)):
            tokens, x = self.run_stage(x, s)
            outputs.append(x)
            x = x.permute(0, 3, 1, 2)
        return outputs, tokens

    def run_stage(self, x: Tensor, s: int) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> the tokens of stage ``s``, and its map (B, H', W', C')."""
        x = getattr(self, f"patch_embed{s + 1}")(x)
        grid = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2)
        prefix = self.num_prefix_tokens if s == len(self.feature_info) - 1 else 0
        if prefix:
            x = torch.cat([self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
        table = resize_table(getattr(self, f"pos_embed{s + 1}"), self.grids[s], grid, prefix)
        x = self.pos_drop(x + table.to(x.dtype))
        x = run_blocks(getattr(self, f"block{s + 1}"), x, grid, unit=self.recomputed)
        return x, x[:, prefix:].unflatten(1, grid)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) image to the normed tokens of the last stage, (B, 1 + N, C)."""
        return self.norm(self.run_stages(x, len(self.feature_info) - 1)[1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, 1 + N, C) to logits (B, num_classes), or the pooled features (B, C)."""
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens:].mean(dim=1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward_intermediates(self, x: Tensor, indices: int | Sequence[int] | None = None, norm: bool = False,
                              stop_early: bool = False, output_fmt: str = "NCHW", intermediates_only: bool = False,
                              return_prefix_tokens: bool = False) -> list[Any] | tuple[Tensor, list[Any]]:
        """Stage outputs beside the final features; see the base's.

        Args:
            return_prefix_tokens: give the last stage's output as a pair (map, class token (B, 1, C)).
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; choose NCHW or NHWC")
        take, deepest = feature_take_indices(len(self.feature_info), indices)
        final = len(self.feature_info) - 1
        stages, tokens = self.run_stages(x, deepest if stop_early or intermediates_only else final)
        intermediates: list[Any] = []
        for index in take:
            y = self.norm(stages[index]) if norm and index == final else stages[index]
            y = y.permute(0, 3, 1, 2) if output_fmt == "NCHW" else y
            if return_prefix_tokens and index == final:
                prefix = tokens[:, :self.num_prefix_tokens]
                y = (y, self.norm(prefix) if norm else prefix)
            intermediates.append(y)
        if intermediates_only:
            return intermediates
        return (self.norm(tokens) if len(stages) == final + 1 else stages[-1]), intermediates


def checkpoint_filter_fn(state: dict[str, Tensor], model: PyramidVisionTransformer) -> dict[str, Tensor]:
    """Position tables of square images resized to the size that the model is laid out for."""
    state, last = dict(state), len(model.grids) - 1
    for s, grid in enumerate(model.grids):
        name, prefix = f"pos_embed{s + 1}", int(s == last)
        table = state.get(name)
        if table is None or table.ndim != 3 or table.shape[1] == grid[0] * grid[1] + prefix:
            continue
        side = round(max(0, table.shape[1] - prefix) ** 0.5)
        if side and side * side + prefix == table.shape[1]:
            state[name] = resize_table(table, (side, side), grid, prefix)
    return state


_COMMON = dict(embed_dims=(64, 128, 320, 512), num_heads=(1, 2, 5, 8), mlp_ratios=(8, 8, 4, 4), sr_ratios=(8, 4, 2, 1))

VARIANTS: dict[str, dict[str, Any]] = {
    "pvt_tiny": dict(_COMMON, depths=(2, 2, 2, 2), drop_path_rate=0.1),
    "pvt_small": dict(_COMMON, depths=(3, 4, 6, 3), drop_path_rate=0.1),
    "pvt_medium": dict(_COMMON, depths=(3, 4, 18, 3), drop_path_rate=0.3),
    "pvt_large": dict(_COMMON, depths=(3, 8, 27, 3), drop_path_rate=0.3),
}

# The family's config node: its keys and the arguments they set; keys that take one value only; what a label must give.
NODE_KEYS = {"EMBED_DIMS": "embed_dims", "DEPTHS": "depths", "NUM_HEADS": "num_heads", "MLP_RATIOS": "mlp_ratios",
             "SR_RATIOS": "sr_ratios", "PATCH_SIZE": "patch_size", "IN_CHANS": "in_chans", "QKV_BIAS": "qkv_bias"}
ONLY: dict[str, Any] = {}
REQUIRED = ("EMBED_DIMS", "DEPTHS", "NUM_HEADS")


build = register_variants(
    __name__, PyramidVisionTransformer, VARIANTS, checkpoint_filter_fn, cfg=dict(first_conv="patch_embed1.proj"),
    descriptions={
        "pvt_tiny": "PVT-Tiny: 13.2 M parameters, 1.9 GMACs at 224.",
        "pvt_small": "PVT-Small: 24.5 M parameters, 3.8 GMACs at 224.",
        "pvt_medium": "PVT-Medium: 44.2 M parameters, 6.7 GMACs at 224.",
        "pvt_large": "PVT-Large: 61.4 M parameters, 9.8 GMACs at 224.",
    })
