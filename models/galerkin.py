"""Galerkin Transformer for images: attention without softmax in a Swin-shaped pyramid.

Papers: "Choose a Transformer: Fourier or Galerkin" (NeurIPS 2021) for the attention; "Swin Transformer" (ICCV 2021) for
the pyramid around it.

What the model is made of: every token of the map attends to every other by q (K^T V) / n, keys and values layer-normed
head by head and nothing else, so the cost is linear in the tokens; there are no windows, no shift and no bias table.
The rest is Swin's: patch embedding, blocks with an MLP of ratio 4, merging of 2x2 tokens between stages, a final norm,
mean pooling. No official classifier exists; ``galerkin_base`` has the numbers that the paper's author published for one
(patch 2, width 128, depths 2, 2, 12, 2, heads 64, 64, 128, 128), ``galerkin_tiny`` and ``galerkin_small`` are Swin-T and
Swin-S with the attention exchanged, and so without its output projection.

Differences from the official attention: the dropout of K^T V acts in training only, where the official function drops
half of it in evaluation too; heads are normed in one call instead of one by one.
Parity: tests/models/test_galerkin.py compares the attention, as a function and as a module, with reference outputs.

Any input works: the image is padded to whole tokens and a map of odd size by one row or column before merging.

Shapes: B batch, H W map, n = H*W tokens, C channels, h heads, d head width, p coordinates of a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates
from torch import Tensor, nn

from models.base import MergingModel, Stage, check_heads, check_mlps, check_stages, register_variants
from models.cpu_bf16 import LayerNormForProducts, Linear
from models.layers import DropPath, Mlp, PatchEmbed, PatchMerging, add_branch, add_branch_and_norm, init_linear, make_head, norm_and_skip


def galerkin_attention(q: Tensor, k: Tensor, v: Tensor, k_weight: Tensor | None = None, k_bias: Tensor | None = None,
                       v_weight: Tensor | None = None, v_bias: Tensor | None = None, eps: float = 1e-5,
                       positions: Tensor | None = None, dropout: float = 0.0, return_product: bool = False,
                       ) -> Tensor | tuple[Tensor, Tensor]:
    """Galerkin attention: q (LN(k)^T LN(v)) / n, without softmax or scale; the cost is linear in n.

    Args:
        q, k, v: (B, h, n, d), after the split into heads.
        k_weight, k_bias, v_weight, v_bias: scale and shift of the layer norms over d of the keys and the values, each of
            shape (h, d), a row a head, or flat (h*d,). Where a weight is None the keys (the values) are not normed.
        eps: of both norms.
        positions: (B, n, p) coordinates put in front of every head's q, k and v after the norms, which widens d by p.
        dropout: rate at which entries of the product are dropped; give 0 in evaluation.
        return_product: give the pair (output, product).

    Returns:
        The output (B, h, n, d), and if asked for the product K^T V / n, (B, h, d, d).
    """
    k, v = norm_heads(k, k_weight, k_bias, eps), norm_heads(v, v_weight, v_bias, eps)
    if positions is not None:
        coordinates = positions.to(q.dtype).unsqueeze(1).expand(-1, q.shape[1], -1, -1)
        q, k, v = (torch.cat([coordinates, x], dim=-1) for x in (q, k.to(q.dtype), v.to(q.dtype)))
    # Half of 1/n on each side: the sum over n tokens would leave the range of fp16.
    share = k.shape[2] ** -0.5
    product = (k * share).transpose(-2, -1) @ (v * share)
    if dropout:
        product = F.dropout(product, dropout)
    output = q @ product.to(q.dtype)
    return (output, product) if return_product else output


def norm_heads(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm over d of (B, h, n, d) with scale and shift of shape (h, d) or (h*d,); without a weight ``x`` itself."""
    if weight is None:
        return x
    heads, _, dim = x.shape[1:]
    x = F.layer_norm(x, (dim,), eps=eps)
    weight = weight.view(heads, 1, dim).to(x.dtype)  # the product that follows would round to it all the same
    return x * weight if bias is None else torch.addcmul(bias.view(heads, 1, dim).to(x.dtype), x, weight)


class HeadNorm(nn.Module):
    """Scale and shift of the layer norm of each head, head-major in one vector. Applied by ``galerkin_attention``."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))


class GalerkinAttention(nn.Module):
    """Multi-head Galerkin self-attention. (B, n, C) -> the same.

    Args:
        out_proj: a linear after the heads; the published module has one only where positions are given.
        position_dim: coordinates of the positions that ``forward`` is given; they widen the heads, so that ``out_proj``
            must bring them back to C.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, eps: float = 1e-5, out_proj: bool = False,
                 position_dim: int = 0, attn_drop: float = 0.0, proj_drop: float = 0.0):
        super().__init__()
        if position_dim and not out_proj:
            raise ValueError("positions widen the heads; set out_proj to True")
        self.num_heads, self.eps, self.attn_drop = num_heads, eps, attn_drop
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.norm_k = HeadNorm(dim)
        self.norm_v = HeadNorm(dim)
        self.proj = Linear(dim + num_heads * position_dim, dim) if out_proj else nn.Identity()
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """``positions``: (B, n, position_dim)."""
        batch, tokens, _ = x.shape
        q, k, v = (part.transpose(1, 2) for part in self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).unbind(2))
        x = galerkin_attention(q, k, v, self.norm_k.weight, self.norm_k.bias, self.norm_v.weight, self.norm_v.bias, self.eps,
                               positions, self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """Galerkin attention over all tokens and MLP, each after a norm and beside a skip. (B, H, W, C) -> the same."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, qkv_bias: bool = True, eps: float = 1e-5,
                 out_proj: bool = False, positions: bool = False, drop: float = 0.0, attn_drop: float = 0.0,
                 drop_path: float = 0.0):
        super().__init__()
        self.positions = positions
        self.norm1 = LayerNormForProducts(dim)
        self.attn = GalerkinAttention(
            dim, num_heads, qkv_bias, eps, out_proj or positions, 2 if positions else 0, attn_drop, drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = LayerNormForProducts(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        positions = unit_grid(height, width, x.device).expand(batch, -1, -1) if self.positions else None
        y, x = norm_and_skip(self.norm1, x)
        y = self.attn(y.flatten(1, 2), positions).unflatten(1, (height, width))
        y, x = add_branch_and_norm(x, y, self.drop_path, self.norm2)
        return add_branch(x, self.mlp(y), self.drop_path)


def unit_grid(height: int, width: int, device: torch.device) -> Tensor:
    """(y, x) of every token in the unit square, corners included, (1, H*W, 2)."""
    y, x = (torch.linspace(0, 1, size, device=device) for size in (height, width))
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).view(1, -1, 2)


class GalerkinTransformer(MergingModel):
    """Galerkin classifier and backbone.

    Args:
        patch_size: 4 for strides 4 to 32, 2 for 2 to 16.
        embed_dim: width of the first stage; it doubles in each of the next.
        depths, num_heads: per stage. A head must be at least 2 wide, or its norm would leave nothing of it.
        norm_eps: of the norms of keys and values.
        out_proj: a linear after the attention's heads; the published attention has none.
        positions: give the attention the tokens' coordinates in the unit square (implies ``out_proj``).
        drop_path_rate: rate of the last block; it grows linearly over all blocks.
    """

    def __init__(self, in_chans: int = 3, num_classes: int = 1000, global_pool: str = "avg", patch_size: int = 4,
                 embed_dim: int = 96, depths: Sequence[int] = (2, 2, 6, 2), num_heads: Sequence[int] = (3, 6, 12, 24),
                 mlp_ratio: float = 4.0, qkv_bias: bool = True, patch_norm: bool = True, norm_eps: float = 1e-5,
                 out_proj: bool = False, positions: bool = False, drop_rate: float = 0.0, attn_drop_rate: float = 0.0,
                 drop_path_rate: float = 0.1):
        super().__init__()
        stages = len(depths)
        check_stages(depths, num_heads=num_heads)
        if patch_size < 1:
            raise ValueError(f"patch_size is {patch_size}; it must be at least 1 (the variants have 4 or 2)")
        widths = [embed_dim * 2 ** i for i in range(stages)]
        check_heads(widths, num_heads, least=2)
        check_mlps(widths, mlp_ratio=[mlp_ratio] * stages)
        self.init_protocol(num_classes, in_chans, global_pool, drop_rate, widths, [patch_size * 2 ** i for i in range(stages)],
                           [f"layers.{i}" for i in range(stages)])
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, patch_norm)
        self.pos_drop = nn.Dropout(drop_rate)
        rates = calculate_drop_path_rates(drop_path_rate, sum(depths))
        self.layers = nn.ModuleList()
        for s, depth in enumerate(depths):
            first = sum(depths[:s])
            blocks = [Block(widths[s], num_heads[s], mlp_ratio, qkv_bias, norm_eps, out_proj, positions, drop_rate,
                            attn_drop_rate, rate) for rate in rates[first:first + depth]]
            self.layers.append(Stage(blocks, PatchMerging(widths[s]) if s < stages - 1 else None))
        self.norm = nn.LayerNorm(widths[-1])
        self.head = make_head(widths[-1], num_classes)
        self.apply(init_weights)


def init_weights(module: nn.Module) -> None:
    """As ``init_linear``, but the projections to queries, keys and values start near a hundredth of the identity, as the paper's
    layers do: xavier-uniform of gain 0.01 on top."""
    init_linear(module)
    if isinstance(module, GalerkinAttention):  # apply() comes to a module after its children
        dim = module.qkv.in_features
        for weight in module.qkv.weight.detach().split(dim):
            nn.init.xavier_uniform_(weight, gain=0.01)
            weight += 0.01 * torch.eye(dim, device=weight.device, dtype=weight.dtype)


def checkpoint_filter_fn(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """There are no published files; our own hold exactly the model's names."""
    return dict(state)


VARIANTS: dict[str, dict[str, Any]] = {
    "galerkin_tiny": dict(patch_size=4, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.2),
    "galerkin_small": dict(patch_size=4, embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.3),
    "galerkin_base": dict(patch_size=2, embed_dim=128, depths=(2, 2, 12, 2), num_heads=(64, 64, 128, 128), drop_path_rate=0.3),
}

# The family's config node: its keys and the arguments they set; keys that take one value only; what a label must give.
NODE_KEYS = {"EMBED_DIM": "embed_dim", "DEPTHS": "depths", "NUM_HEADS": "num_heads", "PATCH_SIZE": "patch_size",
             "IN_CHANS": "in_chans", "MLP_RATIO": "mlp_ratio", "QKV_BIAS": "qkv_bias", "PATCH_NORM": "patch_norm",
             "NORM_EPS": "norm_eps", "OUT_PROJ": "out_proj", "POSITIONS": "positions"}
ONLY: dict[str, Any] = {}
REQUIRED = ("EMBED_DIM", "DEPTHS", "NUM_HEADS")


build = register_variants(
    __name__, GalerkinTransformer, VARIANTS, checkpoint_filter_fn, cfg=dict(first_conv="patch_embed.proj"),
    cfgs={"galerkin_base": dict(pool_size=(14, 14))},
    descriptions={
        "galerkin_tiny": "Galerkin-T: 26.1 M parameters, 4.1 GMACs at 224.",
        "galerkin_small": "Galerkin-S: 45.7 M parameters, 8.0 GMACs at 224.",
        "galerkin_base": "Galerkin-B: 63.4 M parameters, 42.0 GMACs at 224 (patch 2, so four times the tokens).",
    })
