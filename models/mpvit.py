"""MPViT: Multi-Path Vision Transformer.

Paper: "MPViT: Multi-Path Vision Transformer for Dense Prediction" (CVPR 2022); its attention is that of "Co-Scale
Conv-Attentional Image Transformers" (CoaT, ICCV 2021). Written from the papers, independently of the official code.

What the model is made of: a multi-scale embedding (MS-PatchEmbed) chains small convolutions, so that a stage sees its
map at growing receptive fields, one path each; every path has its own transformer encoder, whose layers share one
convolutional position encoding (CPE) and one convolutional relative position encoding (CRPE); a convolutional local
branch runs beside them, and a 1x1 convolution aggregates all (MS-GLI). Attention is factorised: softmax over the tokens
of the keys, then two products of the size of a head, so the cost is linear in the tokens.

Parameter names are those of the published files; the encodings that layers share appear there under every owner's name,
and so they do here. The official code takes any size, and so does this one: every convolution pads.
Parity: tests/models/test_families.py compares logits, features, stages and an epsilon probe with reference outputs.

Shapes: B batch, H W map, N = H*W tokens, C channels, h heads, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates
from torch import Tensor, nn

from models.base import HierarchicalModel, check_heads, check_mlps, check_stages, register_variants
from models.checkpointing import run_blocks
from models.cpu_bf16 import LayerNormForProducts, compute_dtype
from models.factorized_attention import FactorizedAttention, RelativePositionEncoding
from models.gpu import depthwise as gpu_depthwise
from models.layers import DropPath, Mlp, add_branch, add_branch_and_norm, init_linear, make_head, norm_and_skip
from models.ops import DepthwiseConv2d, channels_last, concatenate, conv_norm


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, hardswish unless told not to. (B, C, H, W) -> (B, C', H/stride, W/stride)."""

    def __init__(self, dim: int, out_dim: int, kernel: int = 1, stride: int = 1, act: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_dim)
        self.act = nn.Hardswish() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(conv_norm(self.conv, self.bn, x))


class SeparableConvNorm(nn.Module):
    """Depthwise 3x3 and pointwise convolution, batch norm, hardswish. (B, C, H, W) -> (B, C, H/stride, W/stride)."""

    def __init__(self, dim: int, stride: int = 1):
        super().__init__()
        self.dwconv = DepthwiseConv2d(dim, 3, stride, bias=False)
        self.pwconv = nn.Conv2d(dim, dim, 1, bias=False)
        self.bn = nn.BatchNorm2d(dim)
        self.act = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(conv_norm(self.pwconv, self.bn, self.dwconv(x)))


class PathEmbed(nn.Module):
    """The embedding of one path; the published names have a module around the convolution."""

    def __init__(self, dim: int, stride: int = 1):
        super().__init__()
        self.patch_conv = SeparableConvNorm(dim, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.patch_conv(x)


class MultiScaleEmbed(nn.Module):
    """MS-PatchEmbed (section 3.2): path p embeds the output of path p-1, hence two 3x3 see 5x5, three see 7x7.

    (B, C, H, W) -> one (B, C, H/stride, W/stride) a path.
    """

    def __init__(self, dim: int, paths: int, stride: int):
        super().__init__()
        self.patch_embeds = nn.ModuleList(PathEmbed(dim, stride if path == 0 else 1) for path in range(paths))

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = []
        for embed in self.patch_embeds:
            x = embed(x)
            outputs.append(x)
        return outputs


class PositionEncoding(nn.Module):
    """CPE: the map plus a depthwise 3x3 convolution of it. (B, H, W, C) -> the same."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = DepthwiseConv2d(dim, skip=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class EncoderLayer(nn.Module):
    """CPE, factorised attention, MLP. (B, H, W, C) -> the same. ``cpe`` and ``crpe`` are the encoder's."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, cpe: PositionEncoding, crpe: RelativePositionEncoding,
                 qkv_bias: bool = True, drop: float = 0.0, drop_path: float = 0.0):
        super().__init__()
        self.cpe = cpe
        self.crpe = crpe  # used through the attention; the published names have it here too
        self.factoratt_crpe = FactorizedAttention(dim, num_heads, crpe, qkv_bias, drop)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm1 = LayerNormForProducts(dim, eps=1e-6)
        self.norm2 = LayerNormForProducts(dim, eps=1e-6)

    def forward(self, x: Tensor, joined: tuple[Tensor, ...] | None = None) -> Tensor:
        """``joined``: as of ``FactorizedAttention``."""
        x = self.cpe(x)
        y, x = norm_and_skip(self.norm1, x)
        y, x = add_branch_and_norm(x, self.factoratt_crpe(y, joined), self.drop_path, self.norm2)
        return add_branch(x, self.mlp(y), self.drop_path)


class Encoder(nn.Module):
    """The layers of one path, with the encodings that they share. (B, C, H, W) -> the same."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, windows: Sequence[Sequence[int]], qkv_bias: bool,
                 drop: float, drop_path: Sequence[float]):
        super().__init__()
        self.recomputed = ""  # in training, as of ``HierarchicalModel``
        self.cpe = PositionEncoding(dim)
        self.crpe = RelativePositionEncoding(dim // num_heads, windows)
        self.MHCA_layers = nn.ModuleList(
            EncoderLayer(dim, num_heads, mlp_ratio, self.cpe, self.crpe, qkv_bias, drop, rate) for rate in drop_path)

    def forward(self, x: Tensor) -> Tensor:
        unit, x = self.recomputed if self.training else "", x.permute(0, 2, 3, 1)
        # Once for all layers, whose encoding it is.
        joined = self.crpe.joined(x.device) if gpu_depthwise.applies(x, compute_dtype(x)) else None
        return run_blocks(self.MHCA_layers, x, joined, unit=unit).permute(0, 3, 1, 2)


class LocalBranch(nn.Module):
    """The residual convolutions beside the encoders (section 3.3). (B, C, H, W) -> the same."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1 = ConvNorm(dim, dim)
        self.dwconv = DepthwiseConv2d(dim, bias=False)
        self.norm = nn.BatchNorm2d(dim)
        self.act = nn.Hardswish()
        self.conv2 = ConvNorm(dim, dim, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.act(conv_norm(self.dwconv, self.norm, self.conv1(x))))


class Stage(nn.Module):
    """MS-GLI: an encoder a path, the local branch on path 0, and their aggregation to the next stage's width."""

    def __init__(self, dim: int, out_dim: int, encoders: Sequence[Encoder]):
        super().__init__()
        self.mhca_blks = nn.ModuleList(encoders)
        self.InvRes = LocalBranch(dim)
        self.aggregate = ConvNorm((len(encoders) + 1) * dim, out_dim)

    def forward(self, paths: list[Tensor]) -> Tensor:
        outputs = [self.InvRes(paths[0])]
        outputs += [encoder(path) for encoder, path in zip(self.mhca_blks, paths, strict=True)]
        return self.aggregate(concatenate(outputs))


class MPViT(HierarchicalModel):
    """MPViT classifier and backbone.

    A stage's output has the width of the next stage, to which it has been aggregated. There is no final norm.

    Args:
        embed_dims, num_heads, mlp_ratios: per stage.
        num_paths: paths per stage.
        depths: layers of each path's encoder, per stage.
        crpe_windows: pairs of a kernel and the number of heads that it serves; the heads add up to ``num_heads``.
        drop_path_rate: rate of the last layer; it grows linearly over all layers, the same in every path.
    """

    def __init__(self, in_chans: int = 3, num_classes: int = 1000, global_pool: str = "avg",
                 embed_dims: Sequence[int] = (64, 96, 176, 216), num_paths: Sequence[int] = (2, 3, 3, 3),
                 depths: Sequence[int] = (1, 2, 4, 1), num_heads: Sequence[int] = (8, 8, 8, 8),
                 mlp_ratios: Sequence[float] = (2.0, 2.0, 2.0, 2.0),
                 crpe_windows: Sequence[Sequence[int]] = ((3, 2), (5, 3), (7, 3)), qkv_bias: bool = True,
                 drop_rate: float = 0.0, drop_path_rate: float = 0.0):
        super().__init__()
        stages = len(depths)
        check_stages(depths, embed_dims=embed_dims, num_paths=num_paths, num_heads=num_heads, mlp_ratios=mlp_ratios)
        check_heads(embed_dims, num_heads)
        check_mlps(embed_dims, mlp_ratios=mlp_ratios)
        if embed_dims[0] < 2:
            raise ValueError(f"embed_dims is {list(embed_dims)}; the first convolution has half the first width, so give at least 2")
        if min(num_paths) < 1:
            raise ValueError(f"num_paths is {list(num_paths)}; every stage needs a path")
        if any(len(window) != 2 or window[0] % 2 == 0 for window in crpe_windows):
            raise ValueError(f"crpe_windows is {crpe_windows}; give pairs of an odd kernel and its heads")
        served = sum(heads for _, heads in crpe_windows)
        for heads in num_heads:
            if served != heads:
                raise ValueError(f"crpe_windows serves {served} heads of {heads}; its second numbers must add up to num_heads")
        out_dims = [*embed_dims[1:], embed_dims[-1]]
        self.init_protocol(num_classes, in_chans, global_pool, drop_rate, out_dims, [4 * 2 ** i for i in range(stages)],
                           [f"mhca_stages.{i}" for i in range(stages)])
        self.stem = nn.Sequential(ConvNorm(in_chans, embed_dims[0] // 2, 3, 2), ConvNorm(embed_dims[0] // 2, embed_dims[0], 3, 2))
        self.patch_embed_stages = nn.ModuleList(
            MultiScaleEmbed(dim, paths, 2 if s else 1) for s, (dim, paths) in enumerate(zip(embed_dims, num_paths, strict=True)))
        rates = calculate_drop_path_rates(drop_path_rate, sum(depths))
        self.mhca_stages = nn.ModuleList()
        for s, (dim, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            first = sum(depths[:s])
            self.mhca_stages.append(Stage(dim, out_dims[s], [
                Encoder(dim, num_heads[s], mlp_ratios[s], crpe_windows, qkv_bias, drop_rate, rates[first:first + depth])
                for _ in range(num_paths[s])]))
        self.norm = nn.Identity()
        self.cls_head = nn.ModuleDict({"cls": make_head(out_dims[-1], num_classes)})
        self.apply(init_weights)

    @property
    def head(self) -> nn.Module:
        return self.cls_head["cls"]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        # The module that the line above set under the base's name goes where the published files have it.
        self.cls_head["cls"] = self._modules.pop("head")

    def stage_modules(self) -> nn.ModuleList:
        return self.mhca_stages

    def drop_after_stage(self, index: int) -> None:
        del self.patch_embed_stages[index + 1:]
        self.num_features = self.head_hidden_size = self.feature_info[index]["num_chs"]

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True, unit: str = "block") -> None:
        """Only the encoders recompute, layer by layer or a path's together: batch norm outside them would count a batch twice."""
        super().set_grad_checkpointing(enable, unit)
        for module in self.modules():
            if isinstance(module, Encoder):
                module.recomputed = unit if enable else ""

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """A stage's embedding, local branch and shared encodings go with its first layers, its aggregation with the last."""
        return dict(
            stem=r"^stem",
            blocks=r"^(?:patch_embed_stages|mhca_stages)\.(\d+)" if coarse else [
                (r"^patch_embed_stages\.(\d+)", (0,)), (r"^mhca_stages\.(\d+)\.mhca_blks\.\d+\.MHCA_layers\.(\d+)", None),
                (r"^mhca_stages\.(\d+)\.aggregate", (99999,)), (r"^mhca_stages\.(\d+)", (0,))])

    def forward_stages(self, x: Tensor, last: int) -> list[Tensor]:
        """(B, 3, H, W) -> outputs of stages 0..last, (B, H/4, W/4, C) first, aggregated to the next stage's width."""
        x = self.stem(channels_last(x))
        outputs: list[Tensor] = []
        for embed, stage in zip(self.patch_embed_stages[:last + 1], self.mhca_stages[:last + 1], strict=True):
            x = stage(embed(x))
            outputs.append(x.permute(0, 2, 3, 1))
        return outputs


def init_weights(module: nn.Module) -> None:
    """As ``init_linear``; convolutions followed by a batch norm, which are those without bias, normal(0, sqrt(2 / (kernel area *
    outputs))), depthwise ones too; the position encodings keep torch's default."""
    init_linear(module)
    if isinstance(module, nn.Conv2d) and module.bias is None:
        nn.init.normal_(module.weight, std=math.sqrt(2 / (module.kernel_size[0] * module.kernel_size[1] * module.out_channels)))


def checkpoint_filter_fn(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The published files hold exactly the model's names."""
    return dict(state)


_COMMON = dict(num_paths=(2, 3, 3, 3), num_heads=(8, 8, 8, 8), mlp_ratios=(4, 4, 4, 4))

VARIANTS: dict[str, dict[str, Any]] = {
    "mpvit_tiny": dict(_COMMON, embed_dims=(64, 96, 176, 216), depths=(1, 2, 4, 1), mlp_ratios=(2, 2, 2, 2), drop_path_rate=0.0),
    "mpvit_xsmall": dict(_COMMON, embed_dims=(64, 128, 192, 256), depths=(1, 2, 4, 1), drop_path_rate=0.0),
    "mpvit_small": dict(_COMMON, embed_dims=(64, 128, 216, 288), depths=(1, 3, 6, 3), drop_path_rate=0.05),
    "mpvit_base": dict(_COMMON, embed_dims=(128, 224, 368, 480), depths=(1, 3, 8, 3), drop_path_rate=0.3),
}

# The family's config node: its keys and the arguments they set; keys that take one value only; what a label must give.
NODE_KEYS = {"EMBED_DIMS": "embed_dims", "DEPTHS": "depths", "NUM_PATHS": "num_paths", "NUM_HEADS": "num_heads",
             "MLP_RATIOS": "mlp_ratios", "CRPE_WINDOWS": "crpe_windows", "IN_CHANS": "in_chans", "QKV_BIAS": "qkv_bias"}
ONLY: dict[str, Any] = {}
REQUIRED = ("EMBED_DIMS", "DEPTHS", "NUM_PATHS", "NUM_HEADS", "MLP_RATIOS")


build = register_variants(
    __name__, MPViT, VARIANTS, checkpoint_filter_fn, cfg=dict(first_conv="stem.0.conv", classifier="cls_head.cls"),
    descriptions={
        "mpvit_tiny": "MPViT-T: 5.8 M parameters, 1.6 GMACs at 224.",
        "mpvit_xsmall": "MPViT-XS: 10.6 M parameters, 3.0 GMACs at 224.",
        "mpvit_small": "MPViT-S: 22.9 M parameters, 4.8 GMACs at 224.",
        "mpvit_base": "MPViT-B: 74.8 M parameters, 16.4 GMACs at 224.",
    })
