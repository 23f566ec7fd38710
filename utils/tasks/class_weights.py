"""TRAIN.CLASS_WEIGHTS: how much the loss of each class weighs in training."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

from config import BETA, ConfigError


def class_weights(config: CfgNode, classes: int, images: np.ndarray | None) -> Tensor | None:
    """Weights (C,) by TRAIN.CLASS_WEIGHTS, float32, such that a training image weighs 1 on average; None where all weigh the same.

    ``balanced``: a class weighs the less the more images it has, so that all together weigh the same. ``effective``: by the effective
    number of its n images, (1 - b^n) / (1 - b), of Cui et al. (CVPR 2019), which does not grow beyond 1 / (1 - b).

    Args:
        images: of each class (C,) that an epoch sees; None where nothing tells (a stream): the mean over the classes is then 1.

    Raises:
        ConfigError: as many weights as there are classes are not given, or the images of the classes are not known.
    """
    asked = config.TRAIN.CLASS_WEIGHTS
    if asked == "none":
        return None
    if isinstance(asked, list):
        if len(asked) != classes:
            raise ConfigError(f"TRAIN.CLASS_WEIGHTS has {len(asked)} weights, and {config.DATA.DATA_PATH} has {classes} classes; give one "
                              "for each, in their order")
        weights = np.array(asked)
    elif images is None:
        raise ConfigError(f"TRAIN.CLASS_WEIGHTS {asked} needs the number of each class's images, which a stream does not tell; give a list "
                          "of weights")
    else:
        beta = asked.partition(":")[2] or BETA
        number = np.maximum(images, 1e-9)
        effective = number if asked == "balanced" else (1 - float(beta) ** number) / (1 - float(beta))
        weights = np.where(images > 0, 1 / effective, 0)
    total = weights.sum() / classes if images is None else (weights * images).sum() / images.sum()
    if not total > 0:
        raise ConfigError("TRAIN.CLASS_WEIGHTS gives 0 to every class that has images; nothing would be learned")
    return torch.from_numpy(weights / total).float()
