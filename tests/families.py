"""A tiny model of every family, by its config node: two stages of two blocks, the smallest that has all parts."""

from __future__ import annotations

import torch
from torch import nn

from config import get_config
from models import build_model

FAMILIES = {
    "crossformer": "EMBED_DIM 16 DEPTHS [2,2] NUM_HEADS [1,2] GROUP_SIZE [4,4] INTERVAL [2,1] MERGE_SIZE [[2,4]]",
    "swin": "EMBED_DIM 16 DEPTHS [2,2] NUM_HEADS [1,2] WINDOW_SIZE 4",
    "swin_mlp": "EMBED_DIM 16 DEPTHS [2,2] NUM_HEADS [1,2] WINDOW_SIZE 4",
    "cvt": "EMBED_DIMS [16,32] DEPTHS [2,2] NUM_HEADS [1,2] PATCH_SIZES [7,3] PATCH_STRIDES [4,2] PATCH_PADDINGS [2,1] "
           "MLP_RATIOS [2,2] KV_STRIDES [2,2]",
    "shunted": "EMBED_DIMS [16,32] DEPTHS [2,2] NUM_HEADS [2,2] MLP_RATIOS [2,2] SR_RATIOS [4,2] NUM_CONV 0",
    "mpvit": "EMBED_DIMS [16,32] DEPTHS [2,2] NUM_PATHS [2,2] NUM_HEADS [8,8] MLP_RATIOS [2,2]",
    "pvt": "EMBED_DIMS [16,32] DEPTHS [2,2] NUM_HEADS [1,2] MLP_RATIOS [2,2] SR_RATIOS [2,1]",
    "pvt_v2": "EMBED_DIMS [16,32] DEPTHS [2,2] NUM_HEADS [1,2] MLP_RATIOS [2,2] SR_RATIOS [2,1]",
    "galerkin": "EMBED_DIM 16 DEPTHS [2,2] NUM_HEADS [1,2]",
}


def words(family: str) -> list[str]:
    """Keys and values of the config, for images of 32 pixels."""
    node = FAMILIES[family].split()
    node = [x for key, value in zip(node[::2], node[1::2], strict=True) for x in (f"MODEL.{family.upper()}.{key}", value)]
    return ["MODEL.TYPE", family, "MODEL.NAME", "tiny", "DATA.IMG_SIZE", "32", "MODEL.DROP_PATH_RATE", "0.2", *node]


def tiny(family: str, *opts: object) -> nn.Module:
    """For images of 32 pixels and five classes; ``opts`` are keys and values of the config."""
    torch.manual_seed(0)
    return build_model(get_config(None, [*words(family), *map(str, opts)]), 5)
