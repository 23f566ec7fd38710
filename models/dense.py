"""What the models of dense tasks share: a backbone with a head, asked for losses or for what an image shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.pyramid import Pyramid, layer_of

BACKBONE = "backbone.model."  # before the classifier's names in a state dict


class DenseModel(nn.Module):
    """Base of the models of dense tasks.

    ``forward(images, sizes, targets)`` takes images (B, 3, H, W), normalised, padded below and to the right to multiples of ``stride``,
    and ``sizes`` (B, 2), height and width of each image within; None means that nothing is padding. In training, with targets, it
    gives named losses, each the mean over the images, whose sum is the loss; in evaluation what the images show, in the coordinates of
    the padded image. Classes count from 0.

    Attributes:
        backbone: its names in a state dict are the classifier's behind ``backbone.model.``.
        stride: pixels that the sides of a padded image are multiples of.
        class_modules: dotted names of the modules whose size hangs on the number of classes: fresh where that is another.
    """

    backbone: Pyramid
    stride: int
    class_modules: tuple[str, ...] = ()

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's description of the model, as far as it holds here: where the classes are, and what meets the pixels."""
        first = (getattr(self.backbone.model, "pretrained_cfg", None) or {}).get("first_conv") or ()
        first = (first,) if isinstance(first, str) else first
        return dict(classifier=self.class_modules, first_conv=tuple(BACKBONE + name for name in first))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters of two or more dimensions that weight decay must leave alone: the backbone's, and embeddings such as queries."""
        embeddings = {f"{name}.weight" for name, module in self.named_modules() if isinstance(module, nn.Embedding)}
        return embeddings | {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """The layer of a parameter, for layer decay: the backbone's, and behind them the head as one."""
        return layer_of(self.backbone.model, BACKBONE, coarse)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.set_grad_checkpointing(enable)


def image_sizes(images: Tensor, sizes: Tensor | None) -> list[tuple[int, int]]:
    """Height and width of each image within a padded batch (B, C, H, W), as numbers."""
    if sizes is None:
        return [tuple(images.shape[-2:])] * len(images)
    return [(int(height), int(width)) for height, width in sizes.tolist()]


def named(maps: Sequence[Tensor]) -> dict[str, Tensor]:
    """A backbone's maps as torchvision's pyramid takes them."""
    return {str(level): x for level, x in enumerate(maps)}
