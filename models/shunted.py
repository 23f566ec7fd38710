"""Shunted Transformer.

Paper: "Shunted Self-Attention via Multi-Scale Token Aggregation" (CVPR 2022).

What the model is made of: shunted self-attention (SSA) merges keys and values at two rates in one layer, the first half
of the heads looking at the coarse map and the second half at the fine one; a depthwise convolution over the values adds
local detail; the MLP passes its hidden map through a depthwise convolution with a skip (detail-specific feed-forward).
Every stage ends in a norm, whose output is the stage's feature map; the last one's mean goes to the classifier.

Parameter names are those of the published files. Beyond the official code, which fails where a map is smaller than its
merging kernel, such a map is padded with zeros to the kernel; elsewhere rows and columns left over by a kernel stay
unseen, as there. Parity: tests/models/test_families.py compares logits, features, stages and an epsilon probe with reference
outputs.

Shapes: B batch, H W map, C channels, h heads, d head width, R merging rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates
from torch import Tensor, nn

from models.attention import attention
from models.base import HierarchicalModel, check_heads, check_mlps, check_stages, register_variants
from models.checkpointing import run_blocks
from models.cpu_bf16 import LayerNormForProducts, Linear
from models.layers import DropPath, add_branch, add_branch_and_norm, init_linear, make_head, norm_and_skip
from models.ops import DepthwiseConv2d, channels_last, merge_patches, pad_to

NORM_EPS = 1e-6  # of the blocks' and stages' norms; those of embeddings and merged maps have torch's 1e-5


class Stem(nn.Module):
    """Image embedding: a strided convolution, ``extra`` plain ones, a 2x2 patch convolution. (B, 3, H, W) -> (B, H/4, W/4, C)."""

    def __init__(self, in_chans: int, dim: int, extra: int):
        super().__init__()
        layers = [nn.Conv2d(in_chans, dim, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(dim), nn.ReLU(inplace=True)]
        for _ in range(extra):
            layers += [nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim), nn.ReLU(inplace=True)]
        self.conv = nn.Sequential(*layers, nn.Conv2d(dim, dim, 2, stride=2))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        # Of three pixels a side the strided convolution makes two, the least that the patch convolution takes.
        return self.norm(self.conv(channels_last(pad_to(x, 3))).permute(0, 2, 3, 1))


class ConvEmbedding(nn.Module):
    """Embedding between stages: an overlapping convolution of stride 2, then a norm. (B, C', H', W') -> (B, H, W, C)."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ShuntedAttention(nn.Module):
    """SSA: half of the heads on keys and values merged R x R, half on R/2 x R/2 (section 3.1). (B, H, W, C) -> the same."""

    def __init__(self, dim: int, num_heads: int, rate: int, qkv_bias: bool = True, attn_drop: float = 0.0,
                 proj_drop: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.q = Linear(dim, dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.sr1 = nn.Conv2d(dim, dim, rate, stride=rate)
        self.norm1 = nn.LayerNorm(dim)
        self.sr2 = nn.Conv2d(dim, dim, rate // 2, stride=rate // 2)
        self.norm2 = nn.LayerNorm(dim)
        self.kv1 = Linear(dim, dim, bias=qkv_bias)
        self.kv2 = Linear(dim, dim, bias=qkv_bias)
        self.local_conv1 = DepthwiseConv2d(dim // 2, skip=True)
        self.local_conv2 = DepthwiseConv2d(dim // 2, skip=True)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        coarse, fine = split_heads(self.q(x), self.num_heads).chunk(2, dim=1)
        y = torch.cat([self.branch(coarse, x, self.sr1, self.norm1, self.kv1, self.local_conv1),
                       self.branch(fine, x, self.sr2, self.norm2, self.kv2, self.local_conv2)], dim=2)
        return self.proj_drop(self.proj(y.reshape(x.shape)))

    def branch(self, q: Tensor, x: Tensor, merge: nn.Conv2d, norm: nn.Module, kv: nn.Linear, local: nn.Conv2d) -> Tensor:
        """Attention of half of the heads over one merged map. (B, h/2, H*W, d), (B, H, W, C) -> (B, H*W, h/2, d)."""
        merged = merge_patches(merge, pad_to(x.permute(0, 3, 1, 2), merge.stride[0]).permute(0, 2, 3, 1))
        k, v = kv(F.gelu(norm(merged))).chunk(2, dim=-1)
        v = over_map(local, v)  # its skip included
        keys, values = (split_heads(t, self.num_heads // 2) for t in (k, v))
        return attention(q, keys, values, self.scale, self.attn_drop).transpose(1, 2)


class PlainAttention(nn.Module):
    """Attention over the whole map, for stages without merging; the local detail is added after it. (B, H, W, C) -> the same."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, attn_drop: float = 0.0, proj_drop: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.q = Linear(dim, dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.kv = Linear(dim, 2 * dim, bias=qkv_bias)
        self.local_conv = DepthwiseConv2d(dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).chunk(2, dim=-1)
        y = attention(*(split_heads(t, self.num_heads) for t in (self.q(x), k, v)), self.scale, self.attn_drop)
        return self.proj_drop(self.proj(join_heads(y, x) + over_map(self.local_conv, v)))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, H, W, C) -> (B, h, H*W, d)"""
    return x.flatten(1, 2).unflatten(2, (heads, -1)).transpose(1, 2)


def join_heads(y: Tensor, x: Tensor) -> Tensor:
    """(B, h, H*W, d) -> (B, H, W, C), the shape of ``x``."""
    return y.transpose(1, 2).reshape(x.shape)


def over_map(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution over a map whose channels come last. (B, H, W, C) -> the same."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DepthwiseConv(nn.Module):
    """A map plus its depthwise 3x3 convolution, (B, H, W, C) -> the same; a module for the sake of its published name."""

    def __init__(self, dim: int):
        super().__init__()
        self.dwconv = DepthwiseConv2d(dim, skip=True)

    def forward(self, x: Tensor) -> Tensor:
        return over_map(self.dwconv, x)


class DetailMlp(nn.Module):
    """The detail-specific feed-forward layer (section 3.2): a depthwise convolution is added to the hidden map."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.drop(self.fc2(self.drop(F.gelu(self.dwconv(x)))))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and around a skip. (B, H, W, C) -> the same."""

    def __init__(self, dim: int, num_heads: int, rate: int, mlp_ratio: float = 4.0, qkv_bias: bool = True, drop: float = 0.0,
                 attn_drop: float = 0.0, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = LayerNormForProducts(dim, eps=NORM_EPS)
        self.attn = (ShuntedAttention(dim, num_heads, rate, qkv_bias, attn_drop, drop) if rate > 1
                     else PlainAttention(dim, num_heads, qkv_bias, attn_drop, drop))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = LayerNormForProducts(dim, eps=NORM_EPS)
        self.mlp = DetailMlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor) -> Tensor:
        y, x = norm_and_skip(self.norm1, x)
        y, x = add_branch_and_norm(x, self.attn(y), self.drop_path, self.norm2)
        return add_branch(x, self.mlp(y), self.drop_path)


class ShuntedTransformer(HierarchicalModel):
    """Shunted Transformer classifier and backbone.

    Args:
        embed_dims, depths, num_heads, mlp_ratios: per stage.
        sr_ratios: merging rate R of keys and values per stage, even, or 1 for attention over the whole map.
        num_conv: plain convolutions in the image embedding.
        drop_path_rate: rate of the last block; it grows linearly over all blocks.
    """

    def __init__(self, in_chans: int = 3, num_classes: int = 1000, global_pool: str = "avg",
                 embed_dims: Sequence[int] = (64, 128, 256, 512), depths: Sequence[int] = (1, 2, 4, 1),
                 num_heads: Sequence[int] = (2, 4, 8, 16), mlp_ratios: Sequence[float] = (8, 8, 4, 4),
                 sr_ratios: Sequence[int] = (8, 4, 2, 1), num_conv: int = 0, qkv_bias: bool = True, drop_rate: float = 0.0,
                 attn_drop_rate: float = 0.0, drop_path_rate: float = 0.1):
        super().__init__()
        self.num_stages = len(depths)
        check_stages(depths, embed_dims=embed_dims, num_heads=num_heads, mlp_ratios=mlp_ratios, sr_ratios=sr_ratios)
        check_heads(embed_dims, num_heads)
        check_mlps(embed_dims, mlp_ratios=mlp_ratios)
        for heads, rate in zip(num_heads, sr_ratios, strict=True):
            if rate != 1 and (rate < 1 or rate % 2 or heads % 2):
                raise ValueError(f"sr_ratios is {list(sr_ratios)}: a stage of {heads} heads cannot merge at rate {rate}; merging takes an "
                                 "even rate and an even number of heads, 1 is no merging")
        self.init_protocol(num_classes, in_chans, global_pool, drop_rate, embed_dims, [4 * 2 ** i for i in range(len(depths))],
                           [f"norm{i + 1}" for i in range(len(depths))])
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        for s, (dim, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            self.add_module(f"patch_embed{s + 1}",
                            ConvEmbedding(embed_dims[s - 1], dim) if s else Stem(in_chans, dim, num_conv))
            self.add_module(f"block{s + 1}", nn.ModuleList(
                Block(dim, num_heads[s], sr_ratios[s], mlp_ratios[s], qkv_bias, drop_rate, attn_drop_rate, next(rates))
                for _ in range(depth)))
            self.add_module(f"norm{s + 1}", nn.LayerNorm(dim, eps=NORM_EPS))
        # The stages' outputs are normed already.
        self.norm = nn.Identity()
        self.head = make_head(embed_dims[-1], num_classes)
        self.apply(init_weights)

    def stage_modules(self) -> nn.ModuleList:
        return nn.ModuleList(getattr(self, f"block{i + 1}") for i in range(self.num_stages))

    def drop_after_stage(self, index: int) -> None:
        for i in range(index + 1, self.num_stages):
            for name in ("patch_embed", "block", "norm"):
                delattr(self, f"{name}{i + 1}")
        self.num_stages = index + 1

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(
            stem=r"^patch_embed1",
            blocks=r"^(?:patch_embed|block|norm)(\d+)" if coarse else [
                (r"^patch_embed(\d+)", (0,)), (r"^block(\d+)\.(\d+)", None), (r"^norm(\d+)", (99999,))])

    def forward_stages(self, x: Tensor, last: int) -> list[Tensor]:
        """(B, 3, H, W) -> outputs of stages 0..last, (B, H/4, W/4, C) first, each after its norm."""
        outputs: list[Tensor] = []
        for s in range(1, min(last + 1, self.num_stages) + 1):
            x = getattr(self, f"patch_embed{s}")(x)
            x = run_blocks(getattr(self, f"block{s}"), x, unit=self.recomputed)
            outputs.append(getattr(self, f"norm{s}")(x))
            x = outputs[-1].permute(0, 3, 1, 2)
        return outputs


def init_weights(module: nn.Module) -> None:
    """As ``init_linear``; convolutions normal(0, sqrt(2 / fan out)), biases 0."""
    init_linear(module)
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The published files hold the model's own names and nothing else."""
    return dict(state)


_WIDTHS = dict(embed_dims=(64, 128, 256, 512), num_heads=(2, 4, 8, 16))

VARIANTS: dict[str, dict[str, Any]] = {
    "shunted_t": dict(_WIDTHS, depths=(1, 2, 4, 1), num_conv=0, drop_path_rate=0.1),
    "shunted_s": dict(_WIDTHS, depths=(2, 4, 12, 1), num_conv=1, drop_path_rate=0.2),
    "shunted_b": dict(_WIDTHS, depths=(3, 4, 24, 2), num_conv=2, drop_path_rate=0.3),
}

# The family's config node: its keys and the arguments they set; keys that take one value only; what a label must give.
NODE_KEYS = {"EMBED_DIMS": "embed_dims", "DEPTHS": "depths", "NUM_HEADS": "num_heads", "MLP_RATIOS": "mlp_ratios",
             "SR_RATIOS": "sr_ratios", "NUM_CONV": "num_conv", "QKV_BIAS": "qkv_bias", "IN_CHANS": "in_chans"}
ONLY: dict[str, Any] = {}
REQUIRED = ("EMBED_DIMS", "DEPTHS", "NUM_HEADS")


build = register_variants(
    __name__, ShuntedTransformer, VARIANTS, checkpoint_filter_fn, cfg=dict(first_conv="patch_embed1.conv.0"),
    descriptions={
        "shunted_t": "Shunted-T: 11.6 M parameters, 2.1 GMACs at 224.",
        "shunted_s": "Shunted-S: 22.4 M parameters, 5.0 GMACs at 224.",
        "shunted_b": "Shunted-B: 39.6 M parameters, 8.1 GMACs at 224.",
    })
