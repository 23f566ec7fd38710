"""``build_dense_model``: from ``MODEL.DENSE`` to a backbone with a head for boxes, masks or a class for each pixel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from yacs.config import CfgNode

from config import ConfigError, input_channels
from models import cpu_bf16, detectors, mask2former, region_cnn, semantic_fpn, upernet
from models.build import build_model
from models.dense import DenseModel
from models.published_names import TRIPS
from models.pyramid import MOST_LEVELS, Pyramid

Build = Callable[[CfgNode, Callable[..., Pyramid], int], DenseModel]


def _upernet(config: CfgNode, pyramid: Callable[..., Pyramid], classes: int) -> DenseModel:
    dense = config.MODEL.DENSE
    return upernet.UPerNet(pyramid(), classes, dense.WIDTH or upernet.WIDTH, dense.AUXILIARY)


def _mask2former(config: CfgNode, pyramid: Callable[..., Pyramid], classes: int) -> DenseModel:
    dense = config.MODEL.DENSE
    return mask2former.Mask2Former(pyramid(), classes, dense.QUERIES, dense.WIDTH or mask2former.WIDTH)


# Of each head the task that it serves, and what makes it of the config, the way to the backbone and the number of classes. The first of a
# task is its usual one.
_HEADS: dict[str, tuple[str, Build]] = {
    "retinanet": ("detection", detectors.build_retinanet),
    "faster_rcnn": ("detection", region_cnn.build_faster_rcnn),
    "mask_rcnn": ("instance", region_cnn.build_mask_rcnn),
    "upernet": ("semantic", _upernet),
    "semantic_fpn": ("semantic", semantic_fpn.build_semantic_fpn),
    "mask2former": ("mask", _mask2former),
}


def build_dense_model(config: CfgNode, num_classes: int) -> DenseModel:
    """The model of ``config.MODEL`` and ``config.MODEL.DENSE`` for ``num_classes`` classes, with fresh weights, on the CPU.

    Raises:
        ConfigError: a head that does not serve ``TASK``, or a backbone that cannot serve dense tasks.
    """
    serving = [head for head, (task, _) in _HEADS.items() if task == config.TASK]
    head = serving[0] if config.MODEL.DENSE.HEAD == "auto" and serving else config.MODEL.DENSE.HEAD
    if head not in serving:
        raise ConfigError(f"MODEL.DENSE.HEAD {head} is not for TASK {config.TASK}, which takes {', '.join(serving) or 'none'}; change one")
    return cpu_bf16.replace_layers(_HEADS[head][1](config, partial(build_pyramid, config), num_classes))


def build_pyramid(config: CfgNode, levels: int = MOST_LEVELS) -> Pyramid:
    """The backbone that ``config.MODEL`` describes, for images of any size.

    Raises:
        ConfigError: as ``build_model``, and for a model of timm's that takes one size, for one whose maps do not shrink from stage to
            stage, and for one of fewer stages than ``MODEL.DENSE.FROZEN_STAGES``.
    """
    options = config.MODEL.DENSE
    model = build_model(config, 0, any_size=True)
    try:
        pyramid = cpu_bf16.replace_layers(Pyramid(model, options.OUT_NORM, options.FROZEN_STAGES, levels))
    except ValueError as error:
        stages = "frozen" in str(error)
        raise ConfigError(f"MODEL.NAME {config.MODEL.NAME} {error}" + (
            "; lower MODEL.DENSE.FROZEN_STAGES" if stages else "; dense tasks need a model with maps of several strides")) from None
    if config.MODEL.TYPE == "timm":
        _try_another_size(pyramid, config)
    return pyramid


def coarsest_stride(config: CfgNode) -> int:
    """Pixels from one value to the next of the last map of ``build_pyramid``'s model, which is laid out without storage; raises as that."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return build_pyramid(config).strides[-1]


def _try_another_size(pyramid: Pyramid, config: CfgNode) -> None:
    """Raise ``ConfigError`` where the model takes no image of five by seven of its coarsest patches: dense tasks have all sizes."""
    height, width = 5 * pyramid.strides[-1], 7 * pyramid.strides[-1]
    device, training = next(pyramid.parameters()).device, pyramid.training
    try:
        with torch.inference_mode():
            maps = pyramid.eval()(torch.zeros(1, input_channels(config), height, width, device=device))
        wrong = [x.shape for x, stride in zip(maps, pyramid.strides, strict=True) if x.shape[-2:] != (height // stride, width // stride)]
        reason = f"its maps are {', '.join(f'{shape[-2]} x {shape[-1]}' for shape in wrong)}" if wrong else ""
    except TRIPS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    finally:
        pyramid.train(training)
    if reason:
        raise ConfigError(f"MODEL.NAME {config.MODEL.NAME} does not take images of any size, such as {height} x {width} ({reason}); "
                          "dense tasks need a model that does")
