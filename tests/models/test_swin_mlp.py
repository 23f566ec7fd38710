"""SwinMLP: a block against its sums, token by token; the published names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.swin_mlp import Block, SwinMLP


def mixed(block: Block, x: Tensor) -> Tensor:
    """``mix_windows`` by the sums of the docstring: x[p] -> sum over q of the same window of W[head, p, q] x[q], plus b[head, p]."""
    (_, height, width, dim), side = x.shape, block.window
    weight = block.spatial_mlp.weight[..., 0].unflatten(0, (block.num_heads, -1))
    bias = block.spatial_mlp.bias.view(block.num_heads, -1)
    origin = side - block.shift if block.shift else 0
    heads = torch.arange(dim) // (dim // block.num_heads)
    y = torch.empty_like(x)
    for row in range(height):
        for column in range(width):
            top, left = ((i + origin) // side * side - origin for i in (row, column))
            p = (row - top) * side + column - left
            y[:, row, column] = bias[heads, p]
            for q in range(side * side):
                i, j = top + q // side, left + q % side
                if 0 <= i < height and 0 <= j < width:
                    y[:, row, column] += weight[heads, p, q] * x[:, i, j]
    return y


@torch.no_grad()
def test_a_block_is_its_sums_also_where_windows_do_not_divide_the_map() -> None:
    torch.manual_seed(0)
    for shift, size in ((0, (8, 8)), (2, (8, 8)), (2, (7, 10)), (0, (3, 5)), (1, (5, 4))):
        block, x = Block(12, 3, 4, shift), torch.randn(2, *size, 12)
        nn.init.normal_(block.spatial_mlp.weight), nn.init.normal_(block.spatial_mlp.bias)
        assert torch.allclose(block.mix_windows(x), mixed(block, x), atol=1e-4)
        y = x + mixed(block, block.norm1(x))
        assert torch.allclose(block(x), y + block.mlp(block.norm2(y)), atol=1e-4)
        # and the layout of the published grouped convolution, (windows, heads * tokens, channels of a head)
        tokens = torch.randn(5, 3, 16, 4)
        weight, bias = block.spatial_mlp.weight.view(3, 16, 16), block.spatial_mlp.bias.view(3, 16, 1)
        assert torch.allclose(F.conv1d(tokens.flatten(1, 2), block.spatial_mlp.weight, block.spatial_mlp.bias, groups=3).view(5, 3, 16, 4),
                              weight @ tokens + bias, atol=1e-4)


def test_published_names_and_windows_bounded_by_the_map() -> None:
    with torch.device("meta"):
        state = SwinMLP(256, window_size=8, num_heads=(4, 8, 16, 32)).state_dict()
        small = SwinMLP(128, window_size=7, depths=(2, 2, 2, 2))
    assert state["layers.0.blocks.1.spatial_mlp.weight"].shape == (4 * 64, 64, 1) and "layers.3.downsample.norm.weight" not in state
    assert {"patch_embed.proj.weight", "patch_embed.norm.bias", "layers.2.blocks.5.mlp.fc2.bias", "layers.0.downsample.reduction.weight",
            "layers.0.downsample.norm.weight", "layers.0.blocks.1.spatial_mlp.bias", "norm.weight", "head.bias"} <= state.keys()
    assert [(stage.blocks[1].window, stage.blocks[1].shift) for stage in small.layers] == [(7, 3), (7, 3), (7, 3), (4, 0)]
