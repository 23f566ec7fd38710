"""``--show-attention IMAGE``: to which tokens one token of a CrossFormer attends, near and far, drawn on the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn

from models.crossformer import PADDED_KEY, Block, CrossFormer, to_groups
from utils.visualization.drawing import FAINT, INK, LINE, PAPER, canvas, magnification, write_line

KINDS = ("short distance", "long distance")
_TOKEN = (0, 190, 255)


@dataclass(frozen=True)
class Attended:
    """What one token attends to in one block.

    Attributes:
        stage, block: numbers, from 0.
        far: whether the block's groups are of tokens an interval apart (LDA).
        stride: pixels of the input that a token stands for, a side.
        token: (y, x) of the token that attends, in the stage's map.
        cells: (y, x) of its group's tokens in the map (N, 2), those of the padding left out.
        weights: their attention, mean of the heads (N,).
        on_padding: attention that goes to the padding.
    """

    stage: int
    block: int
    far: bool
    stride: int
    token: tuple[int, int]
    cells: np.ndarray
    weights: np.ndarray
    on_padding: float


@torch.inference_mode()
def attended(model: CrossFormer, image: Tensor, point: tuple[int, int]) -> list[Attended]:
    """The attention of the token at ``point`` in every block.

    Args:
        image: (1, 3, H, W), normalised.
        point: (y, x) in pixels of the image.
    """
    maps: dict[nn.Module, Tensor] = {}
    places = [(stage, number, block) for stage, layer in enumerate(model.layers) for number, block in enumerate(layer.blocks)]
    hooks = [block.norm1.register_forward_hook(lambda norm, _, out: maps.__setitem__(norm, out)) for *_, block in places]
    try:
        model.eval()(image)
    finally:
        for hook in hooks:
            hook.remove()
    stride = model.patch_embed.stride
    return [_of_block(stage, number, block, maps[block.norm1], point, stride * 2 ** stage) for stage, number, block in places]


def _of_block(stage: int, number: int, block: Block, x: Tensor, point: tuple[int, int], stride: int) -> Attended:
    """``x``: the map that the block's attention is given, (1, H, W, C)."""
    height, width = x.shape[1:3]
    token = min(point[0] // stride, height - 1), min(point[1] // stride, width - 1)
    group, interval = (block.group_size, block.interval) if min(height, width) > block.group_size else (min(height, width), 1)
    span = group * interval
    pad = (0, 0, 0, (span - width % span) % span, 0, (span - height % span) % span)
    y, x_axis = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    # The coordinates go the way of the tokens: what shares a group with the token is the model's own doing.
    cells = to_groups(F.pad(torch.stack([y, x_axis], dim=-1)[None].float(), pad, value=-1), group, interval).long()
    which, query = torch.nonzero((cells == torch.tensor(token)).all(-1))[0].tolist()
    tokens = to_groups(F.pad(x, pad), group, interval)[which]
    weights = _weights(block, tokens, query, group, cells[which])
    real = (cells[which] >= 0).all(-1)
    return Attended(stage, number, interval > 1, stride, token, cells[which][real].numpy(), weights[real].numpy(),
                    float(weights[~real].sum()))


def _weights(block: Block, tokens: Tensor, query: int, group: int, cells: Tensor) -> Tensor:
    """Attention of one token of a group (N, C) to all of them, mean of the heads: (N,)."""
    attn = block.attn
    q, k, _ = attn.qkv(tokens).view(len(tokens), 3, attn.num_heads, -1).permute(1, 2, 0, 3).unbind(0)
    logits = (q[:, query, None] * attn.scale) @ k.transpose(1, 2)
    bias = attn.position_bias(group, tokens.device)
    if bias is not None:
        logits = logits + bias[:, query, None]
    if block.mask_padding:
        logits = logits + PADDED_KEY * (cells < 0).any(-1)
    return logits.float().softmax(-1).mean(0)[0].cpu()


def chosen(found: Sequence[Attended]) -> list[Attended]:
    """The last block of each stage and kind."""
    return list({(item.stage, item.far): item for item in found}.values())


def token_count(item: Attended) -> str:
    return f"{len(item.cells)} token{'' if len(item.cells) == 1 else 's'}"


# --------------------------------------------------------------------------------------------------
# Drawing
# --------------------------------------------------------------------------------------------------

_MARGIN, _GAP, _SIDE = 26, 20, 252
_ABOVE = 22  # pixels of a panel's title


def page(image: Image.Image, shown: Sequence[Attended], stages: int, point: tuple[int, int], title: str,
         subtitle: str) -> Image.Image:
    """A column a stage, a row a kind of block; before them the image with the token."""
    factor = magnification(image.height, image.width, _SIDE)
    width, height = factor * image.width, factor * image.height
    enlarged = image.resize((width, height), Image.Resampling.BICUBIC if factor < 3 else Image.Resampling.NEAREST)
    cell_width, cell_height = max(width, 210) + _GAP, height + 46 + _GAP
    kinds = sorted({item.far for item in shown})
    head = _MARGIN + 28 + 24 + 12
    sheet, draw = canvas(2 * _MARGIN + (stages + 1) * cell_width - _GAP, head + len(kinds) * cell_height - _GAP + _MARGIN + 24)
    write_line(draw, (_MARGIN, _MARGIN), title, 18, INK, sheet.width - 2 * _MARGIN)
    write_line(draw, (_MARGIN, _MARGIN + 28), subtitle, 14, FAINT, sheet.width - 2 * _MARGIN)
    stride, marked = min(item.stride for item in shown), enlarged.copy()
    _outline(marked, _box((0, -_ABOVE), factor, (point[0] // stride, point[1] // stride), stride, (width, height)))
    _panel(sheet, draw, marked, (_MARGIN, head), "the model's input", f"token at y {point[0]}, x {point[1]}")
    for item in shown:
        place = _MARGIN + (item.stage + 1) * cell_width, head + kinds.index(item.far) * cell_height
        strongest = float(item.weights.max())
        rest = f", {100 * item.on_padding:.0f} % on padding" if item.on_padding > 0.005 else ""
        heated = _heated(enlarged, item, factor)
        inset = _inset(heated, item, factor)
        _outline(heated, _box((0, -_ABOVE), factor, item.token, item.stride, heated.size))
        if inset is not None:
            heated.paste(*inset)
        _panel(sheet, draw, heated, place, f"stage {item.stage + 1}, {KINDS[item.far]}",
               f"block {item.block + 1}, {token_count(item)}, up to {100 * strongest:.1f} %{rest}")
    _legend(draw, (_MARGIN + cell_width, sheet.height - _MARGIN - 8))
    return sheet


def _panel(sheet: Image.Image, draw: ImageDraw.ImageDraw, image: Image.Image, place: tuple[int, int], title: str, below: str) -> None:
    left, top = place
    sheet.paste(image, (left, top + _ABOVE))
    draw.rectangle((left - 1, top + _ABOVE - 1, left + image.width, top + _ABOVE + image.height), outline=LINE)
    width = max(image.width, 210)
    write_line(draw, (left, top), title, 15, INK, width)
    write_line(draw, (left, top + _ABOVE + 4 + image.height), below, 13, FAINT, width)


def _box(place: tuple[int, int], factor: int, cell: Sequence[int], stride: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A cell of the map on the page; what the padding to whole tokens adds is cut off."""
    left, top = place[0], place[1] + _ABOVE
    return (left + cell[1] * stride * factor, top + cell[0] * stride * factor,
            min(left + size[0], left + (cell[1] + 1) * stride * factor) - 1, min(top + size[1], top + (cell[0] + 1) * stride * factor) - 1)


def _outline(image: Image.Image, box: tuple[int, int, int, int]) -> None:
    """A frame around a cell, dark outside, so that it is seen on any ground; at the image's edge it moves inwards."""
    x0, y0, x1, y1 = max(box[0], 3), max(box[1], 3), min(box[2], image.width - 4), min(box[3], image.height - 4)
    draw = ImageDraw.Draw(image)
    draw.rectangle((x0 - 3, y0 - 3, x1 + 3, y1 + 3), outline=(0, 0, 0), width=1)
    draw.rectangle((x0 - 2, y0 - 2, x1 + 2, y1 + 2), outline=_TOKEN, width=2)


def _heated(image: Image.Image, item: Attended, factor: int) -> Image.Image:
    """The image in dim grey, the group's cells in colours from the weakest to the strongest."""
    ground = ImageOps.grayscale(image).point(lambda level: 20 + level * 0.5).convert("RGB")
    colours, draw = Image.new("RGB", image.size), ImageDraw.Draw(ground)
    opaque = Image.new("L", image.size, 0)
    on_colours, on_opaque = ImageDraw.Draw(colours), ImageDraw.Draw(opaque)
    largest = max(float(item.weights.max()), 1e-9)
    for cell, weight in zip(item.cells.tolist(), item.weights.tolist(), strict=True):
        box = _box((0, -_ABOVE), factor, cell, item.stride, image.size)
        on_colours.rectangle(box, fill=_heat(weight / largest))
        on_opaque.rectangle(box, fill=int(90 + 140 * weight / largest))
    ground.paste(colours, (0, 0), opaque)
    for cell in item.cells.tolist():
        box = _box((0, -_ABOVE), factor, cell, item.stride, image.size)
        if box[2] - box[0] >= 6:
            draw.rectangle(box, outline=(70, 72, 76))
    return ground


def _inset(image: Image.Image, item: Attended, factor: int) -> tuple[Image.Image, tuple[int, int]] | None:
    """A small group once more, larger, and the place of that in the corner farthest from it; None where it is large enough."""
    boxes = [_box((0, -_ABOVE), factor, cell, item.stride, image.size) for cell in item.cells.tolist()]
    x0, y0 = min(b[0] for b in boxes), min(b[1] for b in boxes)
    x1, y1 = max(b[2] for b in boxes) + 1, max(b[3] for b in boxes) + 1
    times = int(0.45 * min(image.size) / max(x1 - x0, y1 - y0))
    if times < 2:
        return None
    part = image.crop((x0, y0, x1, y1)).resize((times * (x1 - x0), times * (y1 - y0)), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(part)
    scaled = [(times * (b[0] - x0), times * (b[1] - y0), times * (b[2] + 1 - x0) - 1, times * (b[3] + 1 - y0) - 1) for b in boxes]
    for box in scaled:
        draw.rectangle(box, outline=(70, 72, 76))
    _outline(part, scaled[item.cells.tolist().index(list(item.token))])
    part = ImageOps.expand(part, 2, PAPER)
    left = image.width - part.width - 3 if x0 + x1 < image.width else 3
    return part, (left, image.height - part.height - 3 if y0 + y1 < image.height else 3)


_SCALE = ((0.0, (40, 30, 90)), (0.35, (170, 40, 90)), (0.7, (245, 130, 40)), (1.0, (255, 240, 120)))


def _heat(share: float) -> tuple[int, int, int]:
    """A colour for a share of the strongest weight: dark violet, red, orange, light yellow."""
    for (low, a), (high, b) in zip(_SCALE, _SCALE[1:], strict=False):
        if share <= high:
            t = (share - low) / (high - low)
            return tuple(round(x + (y - x) * t) for x, y in zip(a, b, strict=True))
    return _SCALE[-1][1]


def _legend(draw: ImageDraw.ImageDraw, place: tuple[int, int]) -> None:
    left, top = place
    for i in range(160):
        draw.line((left + i, top, left + i, top + 11), fill=_heat(i / 159))
    write_line(draw, (left + 170, top - 3), "attention, from none to the most in its panel", 13, FAINT, 500)
