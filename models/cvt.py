"""CvT: Convolutional vision Transformer.

Paper: "CvT: Introducing Convolutions to Vision Transformers" (ICCV 2021).

What the model is made of: an overlapping convolution embeds the tokens of every stage, so the maps shrink and no
position embedding is needed; queries, keys and values come from depthwise convolutions over the map, those of keys and
values strided; a class token joins in the last stage and alone goes to the classifier.

Parameter names are those of the published files. Beyond the official code, a batch of one keeps its axis, an image too
small for the first kernel is padded to it, and the mean of the last map can take the class token's place (``avg``).
Parity: tests/models/test_families.py compares logits, features, stages and an epsilon probe with reference outputs.

Shapes: B batch, H W map, C channels, h heads, d head width, N tokens: H*W, one more with the class token in front.
"""

from __future__ import annotations

from collections import OrderedDict
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
from models.cpu_bf16 import LayerNormForProducts, Linear, compute_dtype, linear
from models.gpu import depthwise as gpu_depthwise
from models.layers import DropPath, add_branch, add_branch_and_norm, init_linear, make_head, norm_and_skip
from models.ops import DepthwiseConv2d, channels_last, conv_norm, pad_to


class ConvEmbedding(nn.Module):
    """An overlapping convolution, then a norm (CvT, section 3.1). (B, C', H', W') -> (B, H, W, C)."""

    def __init__(self, in_chans: int, dim: int, kernel: int, stride: int, padding: int):
        super().__init__()
        self.least = kernel - 2 * padding
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride=stride, padding=padding)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(channels_last(pad_to(x, self.least))).permute(0, 2, 3, 1))


class Attention(nn.Module):
    """Multi-head self-attention behind convolutional projections (CvT, section 3.2). (B, N, C) -> the same.

    The map passes a depthwise convolution and batch norm for each of queries, keys and values, the class token none.
    """

    def __init__(self, dim: int, num_heads: int, kernel: int = 3, kv_stride: int = 2, qkv_bias: bool = True,
                 attn_drop: float = 0.0, proj_drop: float = 0.0, class_token: bool = False):
        super().__init__()
        self.num_heads, self.class_token = num_heads, class_token
        # The official code divides by the root of the stage's width, not of the head's.
        self.scale = dim ** -0.5
        self.conv_proj_q = depthwise_bn(dim, kernel, 1)
        self.conv_proj_k = depthwise_bn(dim, kernel, kv_stride)
        self.conv_proj_v = depthwise_bn(dim, kernel, kv_stride)
        self.proj_q = Linear(dim, dim, bias=qkv_bias)
        self.proj_k = Linear(dim, dim, bias=qkv_bias)
        self.proj_v = Linear(dim, dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """``size``: height and width of the map."""
        batch, tokens, dim = x.shape
        token, x = x.split([1, tokens - 1], dim=1) if self.class_token else (None, x)
        if not x.is_cuda:
            x = x.contiguous()

        def heads(y: Tensor, linear: nn.Linear) -> Tensor:
            y = y.flatten(2).transpose(1, 2)
            y = linear(y if token is None else torch.cat([token, y], dim=1))
            return y.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

        maps = conv_norms([self.conv_proj_q, self.conv_proj_k, self.conv_proj_v], x.unflatten(1, size).permute(0, 3, 1, 2))
        x = attention(*map(heads, maps, (self.proj_q, self.proj_k, self.proj_v)), self.scale, self.attn_drop)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(batch, tokens, dim)))


def conv_norms(branches: Sequence[nn.Sequential], x: Tensor) -> list[Tensor]:
    """What several ``depthwise_bn`` make of one map."""
    convs, dtype = [branch.conv for branch in branches], compute_dtype(x)
    if not branches[0].bn.training or torch.compiler.is_compiling() or not gpu_depthwise.applies(x, dtype):
        return [conv_norm(branch.conv, branch.bn, x) for branch in branches]
    maps = gpu_depthwise.depthwise_branches(x.to(dtype).permute(0, 2, 3, 1), [c.weight for c in convs], [c.stride[0] for c in convs])
    return [branch.bn(y.permute(0, 3, 1, 2)) for branch, y in zip(branches, maps, strict=True)]


def depthwise_bn(dim: int, kernel: int, stride: int) -> nn.Sequential:
    """A depthwise convolution without bias, then batch norm. (B, C, H, W) -> (B, C, H/stride, W/stride), rounded up."""
    return nn.Sequential(OrderedDict(
        conv=DepthwiseConv2d(dim, kernel, stride, bias=False), bn=nn.BatchNorm2d(dim)))


class QuickGeluMlp(nn.Module):
    """Two linears with x * sigmoid(1.702 x) between them. (B, N, C) -> the same."""

    slope = 1.702

    def __init__(self, dim: int, hidden: int, drop: float = 0.0):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        # It is silu(1.702 x) / 1.702; the factors go to the weights, and one operation on the tokens is left of three.
        x = F.silu(linear(x, self.fc1.weight * self.slope, self.fc1.bias * self.slope))
        return self.drop(linear(self.drop(x), self.fc2.weight * (1 / self.slope), self.fc2.bias))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and around a skip. (B, N, C) -> the same."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, drop: float = 0.0, drop_path: float = 0.0,
                 **attention: Any):
        super().__init__()
        self.norm1 = LayerNormForProducts(dim)
        self.attn = Attention(dim, num_heads, proj_drop=drop, **attention)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = LayerNormForProducts(dim)
        self.mlp = QuickGeluMlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        y, x = norm_and_skip(self.norm1, x)
        y, x = add_branch_and_norm(x, self.attn(y, size), self.drop_path, self.norm2)
        return add_branch(x, self.mlp(y), self.drop_path)


class Stage(nn.Module):
    """Embedding, possibly a class token, and blocks."""

    def __init__(self, patch_embed: ConvEmbedding, blocks: Sequence[Block], drop: float, token_dim: int = 0):
        super().__init__()
        # The embedding's norm does not see the class token.
        self.cls_token = nn.Parameter(torch.zeros(1, 1, token_dim)) if token_dim else None
        self.patch_embed = patch_embed
        self.pos_drop = nn.Dropout(drop)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, unit: str) -> tuple[Tensor | None, Tensor]:
        """(B, C', H', W') -> the class token (B, 1, C) or None, and the map (B, H, W, C). ``unit``: of ``run_blocks``."""
        x = self.patch_embed(x)
        size = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
        x = self.pos_drop(x)
        x = run_blocks(self.blocks, x, size, unit=unit)
        token, x = (None, x) if self.cls_token is None else (x[:, :1], x[:, 1:])
        return token, x.unflatten(1, size)


class CvT(HierarchicalModel):
    """CvT classifier and backbone.

    Args:
        embed_dims, depths, num_heads, mlp_ratios, patch_sizes, patch_strides, patch_paddings, kv_strides: per stage;
            patch sizes, strides and paddings are those of the embedding, kv_strides those of keys and values.
        global_pool: token gives the class token to the classifier, avg the mean of the last map, '' all tokens.
        drop_path_rate: rate of the last block; it grows linearly over the last stage's blocks, earlier stages have none.
    """

    pools = ("token", "avg", "")

    def __init__(self, in_chans: int = 3, num_classes: int = 1000, global_pool: str = "token",
                 embed_dims: Sequence[int] = (64, 192, 384), depths: Sequence[int] = (1, 2, 10),
                 num_heads: Sequence[int] = (1, 3, 6), mlp_ratios: Sequence[float] = (4, 4, 4),
                 patch_sizes: Sequence[int] = (7, 3, 3), patch_strides: Sequence[int] = (4, 2, 2),
                 patch_paddings: Sequence[int] = (2, 1, 1), kv_strides: Sequence[int] = (2, 2, 2), qkv_bias: bool = True,
                 drop_rate: float = 0.0, attn_drop_rate: float = 0.0, drop_path_rate: float = 0.1):
        super().__init__()
        self.num_stages = len(depths)
        check_stages(depths, embed_dims=embed_dims, num_heads=num_heads, mlp_ratios=mlp_ratios, patch_sizes=patch_sizes,
                     patch_strides=patch_strides, patch_paddings=patch_paddings, kv_strides=kv_strides)
        check_heads(embed_dims, num_heads)
        check_mlps(embed_dims, mlp_ratios=mlp_ratios)
        if any(padding >= size for size, padding in zip(patch_sizes, patch_paddings, strict=True)):
            raise ValueError(f"patch_paddings is {list(patch_paddings)}; each must be below its patch_sizes ({list(patch_sizes)})")
        reductions = [patch_strides[0]]
        for stride in patch_strides[1:]:
            reductions.append(reductions[-1] * stride)
        self.init_protocol(num_classes, in_chans, global_pool, drop_rate, embed_dims, reductions,
                           [f"stage{i}" for i in range(len(depths))])
        self.num_prefix_tokens = 1
        for s, (dim, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            last = s == len(depths) - 1
            rates = calculate_drop_path_rates(drop_path_rate if last else 0.0, depth)
            embed = ConvEmbedding(embed_dims[s - 1] if s else in_chans, dim, patch_sizes[s], patch_strides[s], patch_paddings[s])
            blocks = [Block(dim, num_heads[s], mlp_ratios[s], drop_rate, rate, kv_stride=kv_strides[s], qkv_bias=qkv_bias,
                            attn_drop=attn_drop_rate, class_token=last) for rate in rates]
            self.add_module(f"stage{s}", Stage(embed, blocks, drop_rate, dim if last else 0))
        self.norm = nn.LayerNorm(embed_dims[-1])
        self.head = make_head(embed_dims[-1], num_classes)
        self.apply(init_weights)
        init_head(self.head)

    def stage_modules(self) -> nn.ModuleList:
        return nn.ModuleList(getattr(self, f"stage{i}") for i in range(self.num_stages))

    def drop_after_stage(self, index: int) -> None:
        for i in range(index + 1, self.num_stages):
            delattr(self, f"stage{i}")
        self.num_stages = index + 1

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("cls_token")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(
            stem=r"^stage0\.patch_embed",
            blocks=r"^stage(\d+)" if coarse else [
                (r"^stage(\d+)\.(?:patch_embed|cls_token)", (0,)), (r"^stage(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))])

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        init_head(self.head)

    def run_stages(self, x: Tensor, last: int) -> tuple[Tensor | None, list[Tensor]]:
        """(B, 3, H, W) -> the class token after stage ``last``, (B, 1, C) or None, and the maps of stages 0..last."""
        token, outputs = None, []
        for index in range(min(last + 1, self.num_stages)):
            token, y = getattr(self, f"stage{index}")(x, self.recomputed)
            outputs.append(y)
            x = y.permute(0, 3, 1, 2)
        return token, outputs

    def forward_stages(self, x: Tensor, last: int) -> list[Tensor]:
        """(B, 3, H, W) -> maps of stages 0..last, (B, H/4, W/4, C) first, without the class token."""
        return self.run_stages(x, last)[1]

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) image to the normed tokens of the last stage, (B, N, C), the class token first."""
        token, stages = self.run_stages(x, self.num_stages - 1)
        return self.norm(join_tokens(token, stages[-1]))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, N, C) to logits (B, num_classes), or the pooled features (B, C)."""
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, 1:].mean(dim=1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward_intermediates(self, x: Tensor, indices: int | Sequence[int] | None = None, norm: bool = False,
                              stop_early: bool = False, output_fmt: str = "NCHW", intermediates_only: bool = False,
                              ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Stage maps, as in the base class; the final features beside them are tokens (B, N, C), the class token first."""
        if intermediates_only:
            return super().forward_intermediates(x, indices, norm, stop_early, output_fmt, intermediates_only)
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; choose NCHW or NHWC")
        take, deepest = feature_take_indices(len(self.feature_info), indices)
        final = len(self.feature_info) - 1
        token, stages = self.run_stages(x, deepest if stop_early else final)
        y = join_tokens(token, stages[-1])
        y = self.norm(y) if len(stages) == final + 1 else y
        intermediates = [self.norm(stages[i]) if norm and i == final else stages[i] for i in take]
        return y, [m.permute(0, 3, 1, 2) if output_fmt == "NCHW" else m for m in intermediates]


def join_tokens(token: Tensor | None, y: Tensor) -> Tensor:
    """The class token, where there is one, in front of a map's tokens. (B, 1, C), (B, H, W, C) -> (B, N, C)."""
    y = y.flatten(1, 2)
    return y if token is None else torch.cat([token, y], dim=1)


def init_weights(module: nn.Module) -> None:
    """As ``init_linear``; class token normal(0, 0.02)."""
    init_linear(module)
    if isinstance(module, Stage) and module.cls_token is not None:
        trunc_normal_(module.cls_token, std=0.02)


def init_head(head: nn.Module) -> None:
    """The classifier's bias keeps torch's default, uniform in +-1/sqrt(C)."""
    if isinstance(head, nn.Linear):
        bound = head.in_features ** -0.5
        nn.init.uniform_(head.bias, -bound, bound)


def checkpoint_filter_fn(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The published files hold the model's own names and nothing else."""
    return dict(state)


VARIANTS: dict[str, dict[str, Any]] = {
    "cvt_13": dict(embed_dims=(64, 192, 384), depths=(1, 2, 10), num_heads=(1, 3, 6), drop_path_rate=0.1),
    "cvt_21": dict(embed_dims=(64, 192, 384), depths=(1, 4, 16), num_heads=(1, 3, 6), drop_path_rate=0.1),
    "cvt_w24": dict(embed_dims=(192, 768, 1024), depths=(2, 2, 20), num_heads=(3, 12, 16), drop_path_rate=0.3),
}

# The family's config node: its keys and the arguments they set; keys that take one value only; what a label must give.
NODE_KEYS = {"EMBED_DIMS": "embed_dims", "DEPTHS": "depths", "NUM_HEADS": "num_heads", "MLP_RATIOS": "mlp_ratios",
             "PATCH_SIZES": "patch_sizes", "PATCH_STRIDES": "patch_strides", "PATCH_PADDINGS": "patch_paddings",
             "KV_STRIDES": "kv_strides", "QKV_BIAS": "qkv_bias", "IN_CHANS": "in_chans"}
ONLY: dict[str, Any] = {}
REQUIRED = ("EMBED_DIMS", "DEPTHS", "NUM_HEADS")


build = register_variants(
    __name__, CvT, VARIANTS, checkpoint_filter_fn, cfg=dict(pool_size=(14, 14), first_conv="stage0.patch_embed.proj"),
    cfgs={"cvt_w24": dict(input_size=(3, 384, 384), pool_size=(24, 24), crop_pct=1.0, crop_mode="squash")},
    descriptions={
        "cvt_13": "CvT-13: 20.0 M parameters, 4.6 GMACs at 224, 16.3 at 384.",
        "cvt_21": "CvT-21: 31.6 M parameters, 7.2 GMACs at 224, 24.8 at 384.",
        "cvt_w24": "CvT-W24: 277.2 M parameters, 194.2 GMACs at 384.",
    })
