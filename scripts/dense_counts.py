"""Parameters and multiply-adds of the dense models, counted, beside those that their papers print.

    python scripts/dense_counts.py

Nothing is computed: the models lie on torch's meta device. Of R-CNN the box head is counted on 1,000 proposals and the mask head on 100
boxes, as OpenMMLab's counter, whose figures the papers print, has it. That counter also took in something that grows with the model (15 G
of CrossFormer-S, 30 G of -B) and is not known; the difference between group sizes does not hang on it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import get_config  # noqa: E402
from models.build_dense import build_dense_model  # noqa: E402
from models.dense import DenseModel, named  # noqa: E402
from models.detectors import RetinaNet  # noqa: E402
from models.region_cnn import RegionCNN  # noqa: E402

TASKS = {"retinanet": "detection", "mask_rcnn": "instance", "semantic_fpn": "semantic", "upernet": "semantic"}
SIZES = {"retinanet": (800, 1280), "mask_rcnn": (800, 1280), "semantic_fpn": (1024, 1024), "upernet": (1024, 1024)}  # height, width
CLASSES = {"detection": 80, "instance": 80, "semantic": 150}
LARGE = ("MODEL.CROSSFORMER.GROUP_SIZE", "[14,14,7,7]", "MODEL.CROSSFORMER.INTERVAL", "[16,8,2,1]")

# Head, variant, whether with the large groups of the paper's A.3 (the semantic ones as configs/dense has them); the papers' parameters in
# millions and multiply-adds in G, where printed.
PUBLISHED: list[tuple[str, str, bool, str, float | None]] = [
    ("retinanet", "crossformer_small", False, "40.8", None), ("retinanet", "crossformer_small", True, "40.8", 282.0),
    ("retinanet", "crossformer_base", False, "62.1", None), ("retinanet", "crossformer_base", True, "62.1", 389.0),
    ("retinanet", "swin_tiny", False, "38.5", None), ("retinanet", "pvt_medium", False, "53.9", None),
    ("retinanet", "pvt_large", False, "71.1", None), ("retinanet", "mpvit_xsmall", False, "20", None),
    ("retinanet", "mpvit_small", False, "32", None), ("retinanet", "mpvit_base", False, "85", None),
    ("mask_rcnn", "crossformer_small", False, "50.2", 291.1), ("mask_rcnn", "crossformer_small", True, "50.2", 301.0),
    ("mask_rcnn", "crossformer_base", False, "71.5", 398.1), ("mask_rcnn", "crossformer_base", True, "71.5", 407.9),
    ("mask_rcnn", "swin_tiny", False, "47.8", None), ("mask_rcnn", "pvt_medium", False, "63.9", None),
    ("mask_rcnn", "pvt_large", False, "81.0", None), ("mask_rcnn", "mpvit_xsmall", False, "30", None),
    ("mask_rcnn", "mpvit_small", False, "43", None), ("mask_rcnn", "mpvit_base", False, "95", None),
    ("semantic_fpn", "crossformer_small", False, "34.3", 209.8), ("semantic_fpn", "crossformer_base", False, "55.6", 320.1),
    ("semantic_fpn", "crossformer_large", True, "95.4", 482.7),
    ("upernet", "crossformer_small", False, "62.3", 979.5), ("upernet", "crossformer_base", False, "83.6", 1089.7),
    ("upernet", "crossformer_large", False, "125.5", 1257.8), ("upernet", "swin_tiny", False, "60.0", None),
]


def build(head: str, variant: str, large: bool) -> DenseModel:
    """On the meta device."""
    task = TASKS[head]
    config = get_config(None, ["TASK", task, "MODEL.DENSE.HEAD", head, "MODEL.TYPE", variant.split("_")[0], "MODEL.NAME", variant,
                               *(LARGE if large else ())])
    with torch.device("meta"):
        return build_dense_model(config, CLASSES[task]).eval()


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def multiply_adds(model: DenseModel, height: int, width: int) -> float:
    """Of one image, in G."""
    images = torch.empty(1, 3, height, width, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        if isinstance(model, RetinaNet):
            model.head(list(model.fpn(named(model.backbone(images))).values()))
        elif isinstance(model, RegionCNN):
            maps = model.fpn(named(model.backbone(images)))
            model.rpn.head(list(maps.values()))
            channels, heads = maps["0"].shape[1], model.roi_heads
            heads.box_predictor(heads.box_head(torch.empty(1000, channels, 7, 7, device="meta")))
            if heads.has_mask():
                heads.mask_predictor(heads.mask_head(torch.empty(100, channels, 14, 14, device="meta")))
        else:
            model(images)
    return counter.get_total_flops() / 2e9


def main() -> None:
    print("| head | backbone | groups | size | parameters | published | GMACs | published |\n|---|---|---|---|---|---|---|---|")
    for head, variant, large, millions, published in PUBLISHED:
        model, (height, width) = build(head, variant, large), SIZES[head]
        print(f"| {head} | {variant} | {'14, 14, 7, 7' if large else '-'} | {width} x {height} | {parameters(model):,} | {millions} M | "
              f"{multiply_adds(model, height, width):.1f} | {published or '-'} |")


if __name__ == "__main__":
    main()
