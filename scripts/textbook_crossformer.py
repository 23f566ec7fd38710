"""CrossFormer as the paper writes it, every formula taken literally, with the names and weights of models/crossformer.py.

What scripts/bench_step.py compares the fast form with.

Shapes: B batch, H W map, C channels, h heads, N tokens of a group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.cross_scale_embedding import CrossScaleEmbedding, CrossScaleMerging
from models.crossformer import PADDED_KEY, Attention, Block, CrossFormer
from models.layers import Mlp
from models.position_bias import DynamicPositionBias


class TextbookCrossFormer(nn.Module):
    """The classifier, with the weights of ``model``; for the published variants, at sizes that need no padding of tokens."""

    def __init__(self, model: CrossFormer):
        super().__init__()
        self.stride = model.patch_embed.stride
        self.patch_embed = TextbookEmbedding(model.patch_embed)
        self.layers = nn.ModuleList()
        for stage in model.layers:
            layer = nn.ModuleDict({"blocks": nn.ModuleList(TextbookBlock(block) for block in stage.blocks)})
            if hasattr(stage, "downsample"):
                layer["downsample"] = TextbookMerging(stage.downsample)
            self.layers.append(layer)
        self.norm, self.head = plain_layer(model.norm), plain_layer(model.head)
        self.load_state_dict(model.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2] // self.stride, x.shape[3] // self.stride
        x = self.patch_embed(x)
        for layer in self.layers:
            for block in layer["blocks"]:
                x = block(x, height, width)
            if "downsample" in layer:
                x = layer["downsample"](x.view(len(x), height, width, -1))
                height, width = height // 2, width // 2
        return self.head(self.norm(x).mean(dim=1))


class TextbookEmbedding(nn.Module):
    """Cross-scale embedding: one strided convolution a kernel, concatenated. (B, 3, H, W) -> (B, H/4 * W/4, C)."""

    def __init__(self, embedding: CrossScaleEmbedding):
        super().__init__()
        self.projs = nn.ModuleList(plain_layer(conv) for conv in embedding.projs)
        self.norm = plain_layer(embedding.norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.cat([conv(x).flatten(2).transpose(1, 2) for conv in self.projs], dim=2))


class TextbookMerging(nn.Module):
    """Cross-scale embedding between stages. (B, H, W, C) -> (B, H/2 * W/2, 2C)."""

    def __init__(self, merging: CrossScaleMerging):
        super().__init__()
        self.norm = plain_layer(merging.norm)
        self.reductions = nn.ModuleList(plain_layer(conv) for conv in merging.reductions)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x).permute(0, 3, 1, 2)
        return torch.cat([conv(x).flatten(2).transpose(1, 2) for conv in self.reductions], dim=2)


class TextbookBlock(nn.Module):
    """Short or long distance attention and MLP beside skips, possibly amplitude cooling. (B, H*W, C) -> the same."""

    def __init__(self, block: Block):
        super().__init__()
        self.group_size, self.interval = block.group_size, block.interval
        self.norm1, self.norm2 = plain_layer(block.norm1), plain_layer(block.norm2)
        self.attn, self.mlp = TextbookAttention(block.attn), TextbookMlp(block.mlp)
        self.drop_rate = getattr(block.drop_path, "drop_prob", 0.0)
        self.ex_conv = None if block.ex_conv is None else plain_layer(block.ex_conv)
        self.ex_ln = None if block.ex_ln is None else plain_layer(block.ex_ln)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        batch, _, dim = x.shape
        y = self.norm1(x).view(batch, height, width, dim)
        group, interval = self.group_size, self.interval
        if min(height, width) <= group:
            group, interval = min(height, width), 1
        span, mask = group * interval, None
        pad_h, pad_w = -height % span, -width % span
        if pad_h or pad_w:
            y = F.pad(y, (0, 0, 0, pad_w, 0, pad_h))
            mask = F.pad(torch.zeros(1, height, width, 1, device=x.device), (0, 0, 0, pad_w, 0, pad_h), value=PADDED_KEY)
            mask = group_tokens(mask, group, interval).reshape(-1, group * group)
        y = self.attn(group_tokens(y, group, interval).reshape(-1, group * group, dim), group, mask)
        y = ungroup_tokens(y, batch, height + pad_h, width + pad_w, group, interval)[:, :height, :width].contiguous()
        x = x + self.drop_path(y.view(batch, height * width, dim))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        if self.ex_conv is not None:
            y = self.ex_conv(x.view(batch, height, width, dim).permute(0, 3, 1, 2))
            x = self.ex_ln(y.permute(0, 2, 3, 1).reshape(batch, height * width, dim))
        return x

    def drop_path(self, x: Tensor) -> Tensor:
        if not self.drop_rate or not self.training:
            return x
        keep = 1 - self.drop_rate
        return x.div(keep) * (keep + torch.rand(len(x), 1, 1, dtype=x.dtype, device=x.device)).floor()


def group_tokens(x: Tensor, group: int, interval: int) -> Tensor:
    """(B, H, W, C) to the groups of a block and their tokens; the last three axes are those of one group."""
    batch, height, width, dim = x.shape
    if interval == 1:  # neighbours
        return x.reshape(batch, height // group, group, width // group, group, dim).permute(0, 1, 3, 2, 4, 5)
    rows, columns = height // (group * interval), width // (group * interval)
    x = x.reshape(batch, rows, group, interval, columns, group, interval, dim)
    return x.permute(0, 1, 4, 3, 6, 2, 5, 7)


def ungroup_tokens(x: Tensor, batch: int, height: int, width: int, group: int, interval: int) -> Tensor:
    """The inverse of ``group_tokens``, (B, H, W, C)."""
    if interval == 1:
        x = x.reshape(batch, height // group, width // group, group, group, -1).permute(0, 1, 3, 2, 4, 5)
    else:
        rows, columns = height // (group * interval), width // (group * interval)
        x = x.reshape(batch, rows, columns, interval, interval, group, group, -1).permute(0, 1, 5, 3, 2, 6, 4, 7)
    return x.reshape(batch, height, width, -1)


class TextbookAttention(nn.Module):
    """Attention in groups of (B*groups, N, C) with a dynamic position bias computed from its offsets each time."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.qkv, self.proj = plain_layer(attention.qkv), plain_layer(attention.proj)
        self.pos = DynamicPositionBias(attention.pos.pos_proj.out_features, attention.num_heads)

    def position_bias(self, group: int, device: torch.device) -> Tensor:
        """(h, N, N)"""
        side = torch.arange(1 - group, group, device=device)
        offsets = torch.stack(torch.meshgrid(side, side, indexing="ij")).flatten(1).transpose(0, 1).float()
        line = torch.arange(group, device=device)
        positions = torch.stack(torch.meshgrid(line, line, indexing="ij")).flatten(1)
        distances = (positions[:, :, None] - positions[:, None, :]).permute(1, 2, 0) + group - 1
        rows = distances[..., 0] * (2 * group - 1) + distances[..., 1]
        bias = self.pos(offsets)[rows.view(-1)].view(group * group, group * group, -1)
        return bias.permute(2, 0, 1).contiguous()

    def forward(self, x: Tensor, group: int, mask: Tensor | None) -> Tensor:
        """``mask``: (groups, N)."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        logits = (q * self.scale) @ k.transpose(-2, -1)
        logits = logits + self.position_bias(group, x.device).unsqueeze(0)
        if mask is not None:
            logits = logits.view(-1, len(mask), self.num_heads, tokens, tokens) + mask[None, :, None, None, :]
            logits = logits.view(-1, self.num_heads, tokens, tokens)
        x = (logits.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, tokens, dim)
        return self.proj(x)


class TextbookMlp(nn.Module):
    """Two linears with a GELU between. (.., C) -> the same."""

    def __init__(self, mlp: Mlp):
        super().__init__()
        self.fc1, self.fc2 = plain_layer(mlp.fc1), plain_layer(mlp.fc2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def plain_layer(module: nn.Module) -> nn.Module:
    """A layer of torch's own with the sizes of ``module``."""
    if isinstance(module, nn.Linear):
        return nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    if isinstance(module, nn.LayerNorm):
        return nn.LayerNorm(module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.Conv2d):
        return nn.Conv2d(module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding, groups=module.groups)
    return nn.Identity()
