"""SwinMLP: Swin's pyramid with a multi-layer perceptron over the tokens of a window in place of attention.

Paper: "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows" (ICCV 2021), the appendix on Swin-Mixer, after
"MLP-Mixer: An all-MLP Architecture for Vision" (NeurIPS 2021).

What a block does: in each head's channels, token p of a window becomes the sum over the window's tokens q of W[head, p, q] x[q], plus
b[head, p]. W is learned, does not depend on the image and is shared by all windows. Every other block moves the windows by half a
window, not around the edges as Swin does: zeros are put around the map, one window in all, and cut off again. The rest is Swin's:
patch embedding, an MLP over channels, merging of 2x2 tokens between stages, a final norm, mean pooling.

The names of the parameters are those of the Swin repository's files, which so load as they are: W lies in a grouped 1x1 convolution's
weight, (heads * window**2, window**2, 1). A window is no larger than its stage's map at the size that the model is laid out for.
Parity: tests/models/test_swin_mlp.py compares a block with the sums above, token by token, and the counts with the paper's.

Any input works: the image is padded to whole patches, a map to whole windows, and one of odd size by a row or column before merging.

Shapes: B batch, H W map, C channels, h heads, d head width, w window side, n = w*w tokens of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates, to_2tuple, trunc_normal_
from torch import Tensor, nn

from models.base import MergingModel, Stage, check_doubling, register_variants
from models.cpu_bf16 import LayerNormForProducts
from models.layers import DropPath, Mlp, PatchEmbed, PatchMerging, add_branch, add_branch_and_norm, init_linear, make_head, norm_and_skip


class Block(nn.Module):
    """The perceptron over a window's tokens and that over channels, each after a norm and beside a skip. (B, H, W, C) -> the same."""

    def __init__(self, dim: int, num_heads: int, window: int, shift: int, mlp_ratio: float = 4.0, drop: float = 0.0,
                 drop_path: float = 0.0):
        super().__init__()
        self.num_heads, self.window, self.shift = num_heads, window, shift
        self.norm1 = nn.LayerNorm(dim)
        self.spatial_mlp = nn.Conv1d(num_heads * window ** 2, num_heads * window ** 2, 1, groups=num_heads)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = LayerNormForProducts(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor) -> Tensor:
        y, x = norm_and_skip(self.norm1, x)
        y, x = add_branch_and_norm(x, self.mix_windows(y), self.drop_path, self.norm2)
        return add_branch(x, self.mlp(y), self.drop_path)

    def mix_windows(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> the same: every token from all tokens of its window, head by head."""
        batch, height, width, dim = x.shape
        side, heads = self.window, self.num_heads
        before, after = (side - self.shift, self.shift) if self.shift else (0, 0)
        x = F.pad(x, (0, 0, before, after + (side - width % side) % side, before, after + (side - height % side) % side))
        rows, columns = x.shape[1] // side, x.shape[2] // side
        x = x.view(batch, rows, side, columns, side, heads, dim // heads).permute(0, 1, 3, 5, 2, 4, 6)
        tokens = x.reshape(-1, heads, side ** 2, dim // heads)  # (B * windows, h, n, d)
        weight, bias = self.spatial_mlp.weight.view(heads, side ** 2, side ** 2), self.spatial_mlp.bias.view(heads, side ** 2, 1)
        tokens = weight.to(tokens.dtype) @ tokens + bias.to(tokens.dtype)
        x = tokens.view(batch, rows, columns, heads, side, side, dim // heads).permute(0, 1, 4, 2, 5, 3, 6)
        x = x.reshape(batch, rows * side, columns * side, dim)
        return x[:, before:before + height, before:before + width]


class SwinMLP(MergingModel):
    """SwinMLP classifier and backbone.

    Args:
        img_size: the size whose maps bound the windows, one number or (height, width); other sizes work too.
        embed_dim: width of the first stage; it doubles in each of the next.
        depths, num_heads: per stage; the published tiny models are named by the channels of a head.
        drop_path_rate: rate of the last block; it grows linearly over all blocks.
    """

    def __init__(self, img_size: int | Sequence[int] = 224, in_chans: int = 3, num_classes: int = 1000, global_pool: str = "avg",
                 patch_size: int = 4, embed_dim: int = 96, depths: Sequence[int] = (2, 2, 6, 2), num_heads: Sequence[int] = (3, 6, 12, 24),
                 window_size: int = 7, mlp_ratio: float = 4.0, drop_rate: float = 0.0, drop_path_rate: float = 0.1):
        super().__init__()
        stages = len(depths)
        check_doubling(embed_dim, depths, num_heads, mlp_ratio)
        if min(patch_size, window_size) < 1:
            raise ValueError(f"patch_size is {patch_size} and window_size {window_size}; they must be at least 1")
        widths = [embed_dim * 2 ** i for i in range(stages)]
        reductions = [patch_size * 2 ** i for i in range(stages)]
        self.init_protocol(num_classes, in_chans, global_pool, drop_rate, widths, reductions, [f"layers.{i}" for i in range(stages)])
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        self.pos_drop = nn.Dropout(drop_rate)
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self.layers = nn.ModuleList()
        for s, depth in enumerate(depths):
            side = min(-(-pixels // reductions[s]) for pixels in to_2tuple(img_size))
            window, shift = (window_size, window_size // 2) if side > window_size else (side, 0)
            blocks = [Block(widths[s], num_heads[s], window, shift * (i % 2), mlp_ratio, drop_rate, next(rates)) for i in range(depth)]
            self.layers.append(Stage(blocks, PatchMerging(widths[s]) if s < stages - 1 else None))
        self.norm = nn.LayerNorm(widths[-1])
        self.head = make_head(widths[-1], num_classes)
        self.apply(init_weights)


def init_weights(module: nn.Module) -> None:
    """As ``init_linear``, the perceptron over tokens too."""
    init_linear(module)
    if isinstance(module, nn.Conv1d):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The published files hold exactly the model's names."""
    return dict(state)


_TINY = dict(embed_dim=96, depths=(2, 2, 6, 2), window_size=8, drop_path_rate=0.2)

# The repository's presets, named by the channels of a head.
VARIANTS: dict[str, dict[str, Any]] = {
    "swin_mlp_tiny_c24": dict(_TINY, num_heads=(4, 8, 16, 32)),
    "swin_mlp_tiny_c12": dict(_TINY, num_heads=(8, 16, 32, 64)),
    "swin_mlp_tiny_c6": dict(_TINY, num_heads=(16, 32, 64, 128)),
    "swin_mlp_base": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), window_size=7, drop_path_rate=0.5),
}

# The family's config node: its keys and the arguments they set; keys that take one value only; what a label must give.
NODE_KEYS = {"EMBED_DIM": "embed_dim", "DEPTHS": "depths", "NUM_HEADS": "num_heads", "WINDOW_SIZE": "window_size",
             "PATCH_SIZE": "patch_size", "IN_CHANS": "in_chans", "MLP_RATIO": "mlp_ratio"}
ONLY = {"APE": False, "PATCH_NORM": True}
REQUIRED = ("EMBED_DIM", "DEPTHS", "NUM_HEADS")

_AT_256 = dict(input_size=(3, 256, 256), pool_size=(8, 8))
build = register_variants(
    __name__, SwinMLP, VARIANTS, checkpoint_filter_fn, cfg=dict(first_conv="patch_embed.proj"),
    cfgs={name: _AT_256 for name in VARIANTS if "tiny" in name},
    descriptions={
        "swin_mlp_tiny_c24": "Swin-Mixer-T/D24: 20 M parameters, 4.0 GMACs at 256.",
        "swin_mlp_tiny_c12": "Swin-Mixer-T/D12: 21 M parameters, 4.0 GMACs at 256.",
        "swin_mlp_tiny_c6": "Swin-Mixer-T/D6: 23 M parameters, 4.0 GMACs at 256.",
        "swin_mlp_base": "Swin-Mixer-B/D24: 61 M parameters, 10.4 GMACs at 224.",
    })
