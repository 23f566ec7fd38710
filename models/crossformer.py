"""CrossFormer and CrossFormer++.

Papers: "CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention" (ICLR 2022), "CrossFormer++:
A Versatile Vision Transformer Hinging on Cross-scale Attention" (TPAMI 2023).

What the model is made of: a cross-scale embedding (CEL) samples every token from patches of several sizes; long-short
distance attention (LSDA) alternates attention among neighbours (SDA) and among tokens a fixed interval apart (LDA); a
dynamic position bias (DPB), an MLP over offsets, makes the bias independent of the group size. CrossFormer++ adds
group sizes that grow with depth (PGS) and amplitude cooling layers (ACL).

Parameter names are those of the published files. Beyond the official code, which takes square sizes whose maps stay
even, any input works: the image is padded to whole tokens and a map of odd size by one row or column before merging.
Parity: tests/models/test_families.py compares logits, features, stages and an epsilon probe with reference outputs.

Shapes: B batch, H W map, C channels, h heads, d head width, G group size, I interval, N = G*G tokens of a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates, trunc_normal_
from torch import Tensor, nn

from models.attention import biased_self_attention
from models.base import MergingModel, Stage, check_heads, check_mlps, check_stages, register_variants
from models.cpu_bf16 import LayerNormForProducts, Linear, compute_dtype
from models.cross_scale_embedding import CrossScaleEmbedding, CrossScaleMerging, check_kernels
from models.gpu import layer_norm as gpu_norm
from models.gpu.group_attention import fits, from_groups, group_attention, to_groups
from models.layers import DropPath, Mlp, add_branch, add_branch_and_norm, init_linear, is_hooked, make_head, norm_and_skip
from models.ops import DepthwiseConv2d
from models.position_bias import POSITIONS, DynamicPositionBias, PositionTable, RelativePositionBias

PADDED_KEY = -1e6  # added to the logits of padded keys


class Attention(nn.Module):
    """Multi-head self-attention within groups, with a position bias (``POSITIONS``). (B*groups, N, C) -> the same."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, qk_scale: float | None = None,
                 attn_drop: float = 0.0, proj_drop: float = 0.0, position: str = "dpb", group_size: int = 7):
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.pos: RelativePositionBias | None = None
        if position == "table":
            self.pos = PositionTable(group_size, num_heads)
        elif position != "none":
            self.pos = DynamicPositionBias(dim // 16, num_heads, residual=position == "dpb_residual")
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def position_bias(self, group: int, device: torch.device) -> Tensor | None:
        """(h, N, N), or nothing without a position bias"""
        return None if self.pos is None else self.pos.cached_bias(group, device)

    def forward(self, x: Tensor, group: int, mask: Tensor | None = None) -> Tensor:
        """``mask``: (groups, 1, 1, N), added to the logits of the keys."""
        batch, tokens, _ = x.shape
        bias = self.position_bias(group, x.device)
        if mask is not None:
            bias = mask.expand(-1, self.num_heads, tokens, -1) if bias is None else bias + mask
            bias = bias.repeat(batch // mask.shape[0], 1, 1, 1)
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1)
        return self.proj_drop(self.proj(biased_self_attention(qkv, bias, self.scale, self.attn_drop)))

    def on_map(self, x: Tensor, group: int, interval: int) -> Tensor:
        """``forward`` for all groups of a map (B, H, W, C) in place, where ``group_attention.fits``; padding is no key."""
        table = None if self.pos is None else self.pos.cached_table(group, x.device)
        y = group_attention(self.qkv(x), table, self.num_heads, group, interval, self.scale)
        return self.proj_drop(self.proj(y))


class Block(nn.Module):
    """LSDA block: attention in groups, MLP, and in CrossFormer++ possibly an ACL. (B, H, W, C) -> the same.

    ``interval`` 1 is SDA, groups of neighbours; above 1 LDA, members that far apart. A map no larger than the group in
    one direction is one SDA group of that size.
    """

    def __init__(self, dim: int, num_heads: int, group_size: int, interval: int = 1, mlp_ratio: float = 4.0,
                 qkv_bias: bool = True, qk_scale: float | None = None, drop: float = 0.0, attn_drop: float = 0.0,
                 drop_path: float = 0.0, acl: bool = False, mask_padding: bool = True, position: str = "dpb"):
        super().__init__()
        self.group_size, self.interval, self.mask_padding = group_size, interval, mask_padding
        self.norm1 = LayerNormForProducts(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop, position, group_size)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = LayerNormForProducts(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        # Amplitude cooling (CrossFormer++, section 3.4): it replaces the residual stream, there is no skip around it.
        self.ex_conv = DepthwiseConv2d(dim) if acl else None
        self.ex_ln = nn.LayerNorm(dim) if acl else None

    def forward(self, x: Tensor) -> Tensor:
        group, interval, on_map = self.layout(x)
        if not on_map and gpu_norm.fuses(self.norm1, x) and not is_hooked(self.norm1):
            groups, x = gpu_norm.norm_and_skip(self.norm1, x, group, interval)
            branch = self.attend_groups(x, groups)
        else:
            y, x = norm_and_skip(self.norm1, x)
            branch = self.attend_groups(y)
        y, x = add_branch_and_norm(x, branch, self.drop_path, self.norm2)
        x = add_branch(x, self.mlp(y), self.drop_path)
        if self.ex_conv is not None:
            x = self.ex_ln(self.ex_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return x

    def layout(self, x: Tensor) -> tuple[int, int, bool]:
        """For a map (B, H, W, C): group size, interval, and whether attention takes the map as it is (``group_attention``)."""
        height, width = x.shape[1:3]
        group, interval = self.group_size, self.interval
        if min(height, width) <= group:
            group, interval = min(height, width), 1
        padded = height % (group * interval) or width % (group * interval)
        attn, possible = self.attn, (self.mask_padding or not padded) and not is_hooked(self.attn)
        return group, interval, possible and fits(x, attn.num_heads, group, attn.attn_drop)

    def attend_groups(self, x: Tensor, groups: Tensor | None = None) -> Tensor:
        """Attention among the tokens of each group. (B, H, W, C) -> the same.

        Args:
            x: the map, normed, or any of its size if there are ``groups``.
            groups: the normed map as ``to_groups`` orders it, padded with zeros.
        """
        batch, height, width, _ = x.shape
        group, interval, on_map = self.layout(x)
        if on_map:
            return self.attn.on_map(x, group, interval)
        span = group * interval
        pad_h, pad_w = (span - height % span) % span, (span - width % span) % span
        mask = None
        if (pad_h or pad_w) and self.mask_padding:
            real = torch.zeros(1, height, width, 1, device=x.device)
            mask = F.pad(real, (0, 0, 0, pad_w, 0, pad_h), value=PADDED_KEY)
            mask = to_groups(mask, group, interval).view(-1, 1, 1, group * group)
        if groups is None:
            # Zeros after the norm: the keys and values of padding are the projection's biases.
            groups = to_groups(F.pad(x, (0, 0, 0, pad_w, 0, pad_h)) if pad_h or pad_w else x, group, interval)
        x = from_groups(self.attn(groups, group, mask), batch, height + pad_h, width + pad_w, group, interval)
        return x[:, :height, :width] if pad_h or pad_w else x


GROUP_TYPES = ("constant", "linear", "linear_div", "alter", "7_14")


def group_size_of(rule: str, nominal: int, block: int, total: int, stage: int, index: int, base: int, size: int) -> int:
    """Group size of a block under CrossFormer++'s rules for PGS (section 3.3).

    Args:
        rule: one of ``GROUP_TYPES``; constant is what the published models use.
        nominal: the stage's own group size.
        block, total: number of the block in the network, and of all blocks.
        stage, index: stage, and number of the block in it.
        base, size: side of the first stage's map, and of this stage's.
    """
    if rule == "constant":
        return nominal
    if rule == "7_14":
        return max(1, nominal // 2) if stage == 2 and index < 4 else nominal
    share = 4 / base + block * (1 - 4 / base) / total
    wanted = share * size
    if rule == "linear":
        return max(4, math.ceil(wanted))
    group = math.ceil(wanted)
    if wanted > size // 2:
        whole = (wanted > 3 * size / 4 or stage != 2) if rule == "linear_div" else (block % 2 == 1 or stage != 2)
        group = size if whole else size // 2
    return max(4, group)


class CrossFormer(MergingModel):
    """CrossFormer / CrossFormer++ classifier and backbone.

    Args:
        img_size: side(s) in pixels that the group-size rules other than ``constant`` are laid out for; the model takes
            any size.
        group_size, interval: per stage. An odd block of a stage is LDA with that interval, an even one SDA.
        use_acl: amplitude cooling after blocks i with (i + 1) % 3 == 0, but for a stage's last block.
        mask_padding: keep attention from padded keys.
        attention: ``lsda`` alternates SDA and LDA; ``sda`` and ``lda`` use one of them alone (the paper's ablation).
        position: ``dpb``, ``dpb_residual``, ``table`` (Swin's relative bias) or ``none``.
        ape: a learned absolute position embedding of ``img_size`` on the tokens, resized for other sizes. With
            ``position="none"`` it is the paper's ablation with absolute positions.
        low_precision_residual: under autocast, keep the residual stream of the first stage in autocast's type, as merging leaves that of
            the others; by itself it is in the fp32 of the embedding's norm.
        drop_path_rate: rate of the last block; it grows linearly over all blocks.
    """

    def __init__(self, img_size: int | tuple[int, int] = 224, in_chans: int = 3, num_classes: int = 1000,
                 global_pool: str = "avg", embed_dim: int = 64, depths: Sequence[int] = (1, 1, 8, 6),
                 num_heads: Sequence[int] = (2, 4, 8, 16), group_size: Sequence[int] = (7, 7, 7, 7),
                 interval: Sequence[int] = (8, 4, 2, 1), patch_size: Sequence[int] = (4, 8, 16, 32),
                 merge_size: Sequence[Sequence[int]] = ((2, 4), (2, 4), (2, 4)),
                 mlp_ratio: float | Sequence[float] = 4.0, qkv_bias: bool = True, qk_scale: float | None = None,
                 patch_norm: bool = True, group_type: str = "constant", use_acl: bool = False, mask_padding: bool = True,
                 attention: str = "lsda", position: str = "dpb", ape: bool = False,
                 low_precision_residual: bool = False, drop_rate: float = 0.0, attn_drop_rate: float = 0.0,
                 drop_path_rate: float = 0.1):
        super().__init__()
        stages = len(depths)
        ratios = [float(mlp_ratio)] * stages if isinstance(mlp_ratio, (int, float)) else list(mlp_ratio)
        check_stages(depths, num_heads=num_heads, group_size=group_size, interval=interval, mlp_ratio=ratios)
        if len(merge_size) < stages - 1:
            raise ValueError(f"merge_size has {len(merge_size)} entries; {stages} stages need {stages - 1}")
        for name, value, choices in (("group_type", group_type, GROUP_TYPES), ("position", position, POSITIONS),
                                     ("attention", attention, ("lsda", "sda", "lda"))):
            if value not in choices:
                raise ValueError(f"{name} is {value!r}; choose from {', '.join(choices)}")
        widths = [embed_dim * 2 ** i for i in range(stages)]
        check_heads(widths, num_heads)
        if embed_dim < 16:
            raise ValueError(f"embed_dim is {embed_dim}; it must be at least 16")
        check_mlps(widths, mlp_ratio=ratios)
        stride = patch_size[0]
        check_kernels("patch_size", patch_size, stride, embed_dim)
        for width, kernels in zip(widths[1:], merge_size, strict=False):
            check_kernels("merge_size", kernels, 2, width)
        self.init_protocol(num_classes, in_chans, global_pool, 0.0, widths, [stride * 2 ** i for i in range(stages)],
                           [f"layers.{i}" for i in range(stages)])
        self.patch_embed = CrossScaleEmbedding(embed_dim, patch_size, in_chans, patch_norm)
        self.absolute_pos_embed = None
        if ape:
            height, width = img_size if isinstance(img_size, (tuple, list)) else (img_size, img_size)
            self.absolute_pos_embed = nn.Parameter(torch.empty(1, -(-height // stride), -(-width // stride), embed_dim))
            trunc_normal_(self.absolute_pos_embed, std=0.02)
        self.pos_drop, self.low_precision_residual = nn.Dropout(drop_rate), low_precision_residual
        side = min(img_size) if isinstance(img_size, (tuple, list)) else img_size
        base = max(1, side // stride)
        rates = calculate_drop_path_rates(drop_path_rate, sum(depths))
        self.layers = nn.ModuleList()
        block = 0
        for s, depth in enumerate(depths):
            blocks = []
            for i in range(depth):
                group = group_size_of(group_type, group_size[s], block, sum(depths), s, i, base, max(1, base // 2 ** s))
                far = attention == "lda" or (attention == "lsda" and i % 2 == 1)
                blocks.append(Block(
                    widths[s], num_heads[s], group, interval[s] if far else 1, ratios[s], qkv_bias, qk_scale, drop_rate,
                    attn_drop_rate, rates[block], use_acl and (i + 1) % 3 == 0 and i < depth - 1, mask_padding, position))
                block += 1
            self.layers.append(Stage(blocks, CrossScaleMerging(widths[s], merge_size[s]) if s < stages - 1 else None))
        self.norm = nn.LayerNorm(widths[-1])
        self.head = make_head(widths[-1], num_classes)
        self.apply(init_linear)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        tables = {name for name, _ in self.named_parameters() if name.endswith("attn.pos.table")}
        return tables | ({"absolute_pos_embed"} if self.absolute_pos_embed is not None else set())

    def place(self, tokens: Tensor) -> Tensor:
        """(B, H/4, W/4, C) -> the same, with absolute positions where the model has them."""
        if self.low_precision_residual:
            tokens = tokens.to(compute_dtype(tokens))
        if self.absolute_pos_embed is not None:
            tokens = tokens + self.absolute_positions(tokens.shape[1], tokens.shape[2])
        return self.pos_drop(tokens)

    def absolute_positions(self, height: int, width: int) -> Tensor:
        """The absolute embedding for a map of that size, (1, H, W, C)."""
        embed = self.absolute_pos_embed
        if embed.shape[1:3] == (height, width):
            return embed
        return F.interpolate(embed.permute(0, 3, 1, 2), (height, width), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)


def checkpoint_filter_fn(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Leave out the derived buffers that the repository's older branch saved in every block."""
    derived = (".attn.biases", ".attn.relative_position_index")
    return {name: tensor for name, tensor in state.items() if not name.endswith(derived)}


_V1 = dict(group_size=(7, 7, 7, 7), interval=(8, 4, 2, 1))
_PP = dict(group_size=(4, 4, 14, 7), interval=(4, 2, 1, 1), use_acl=True)

VARIANTS: dict[str, dict[str, Any]] = {
    "crossformer_tiny": dict(_V1, embed_dim=64, depths=(1, 1, 8, 6), num_heads=(2, 4, 8, 16), drop_path_rate=0.1),
    "crossformer_small": dict(_V1, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.2),
    "crossformer_base": dict(_V1, embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.3),
    "crossformer_large": dict(_V1, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.5),
    "crossformer_pp_small": dict(_PP, embed_dim=64, depths=(2, 2, 18, 2), num_heads=(2, 4, 8, 16), drop_path_rate=0.2),
    "crossformer_pp_base": dict(_PP, embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.3),
    "crossformer_pp_large": dict(_PP, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.5),
    "crossformer_pp_huge": dict(_PP, embed_dim=128, depths=(6, 6, 18, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.5),
}

# The family's config node: its keys and the arguments they set; keys that take one value only; what a label must give.
NODE_KEYS = {"EMBED_DIM": "embed_dim", "DEPTHS": "depths", "NUM_HEADS": "num_heads", "GROUP_SIZE": "group_size",
             "INTERVAL": "interval", "PATCH_SIZE": "patch_size", "MERGE_SIZE": "merge_size", "MLP_RATIO": "mlp_ratio",
             "IN_CHANS": "in_chans", "QKV_BIAS": "qkv_bias", "QK_SCALE": "qk_scale", "PATCH_NORM": "patch_norm",
             "GROUP_TYPE": "group_type", "USE_ACL": "use_acl", "NO_MASK": "no_mask",
             "ATTENTION": "attention", "POSITION": "position", "APE": "ape",
             "LOW_PRECISION_RESIDUAL": "low_precision_residual"}
ONLY = {"USE_CPE": False, "PAD_TYPE": 0, "ADAPT_INTER": False}
REQUIRED = ("EMBED_DIM", "DEPTHS", "NUM_HEADS")


def arguments(node: dict[str, Any]) -> dict[str, Any]:
    """The model's arguments for what the config node sets."""
    kwargs = dict(node)
    if isinstance(kwargs.get("patch_size"), int):
        kwargs["patch_size"] = (kwargs["patch_size"],)
    if "no_mask" in kwargs:
        kwargs["mask_padding"] = not kwargs.pop("no_mask")
    return kwargs


build = register_variants(
    __name__, CrossFormer, VARIANTS, checkpoint_filter_fn,
    cfgs={name: dict(first_conv=tuple(f"patch_embed.projs.{i}" for i in range(4))) for name in VARIANTS},
    descriptions={
        "crossformer_tiny": "CrossFormer-T: 27.8 M parameters, 2.9 GMACs at 224.",
        "crossformer_small": "CrossFormer-S: 30.7 M parameters, 4.9 GMACs at 224.",
        "crossformer_base": "CrossFormer-B: 52.0 M parameters, 9.2 GMACs at 224.",
        "crossformer_large": "CrossFormer-L: 92.0 M parameters, 16.1 GMACs at 224.",
        "crossformer_pp_small": "CrossFormer++-S: 23.3 M parameters, 4.4 GMACs at 224.",
        "crossformer_pp_base": "CrossFormer++-B: 52.0 M parameters, 9.6 GMACs at 224.",
        "crossformer_pp_large": "CrossFormer++-L: 92.0 M parameters, 16.7 GMACs at 224.",
        "crossformer_pp_huge": "CrossFormer++-H: 96.0 M parameters, 22.0 GMACs at 224.",
    })
