"""UPerNet: a class for each pixel, from a pyramid of features with pooling over the whole image at its top.

Paper: "Unified Perceptual Parsing for Scene Understanding" (ECCV 2018), section 3.1. The heads are transformers' (``UperNetHead``, and
``UperNetFCNHead`` on the stage before the last, whose loss helps training), with the dropout of 0.1 before their classifiers and the
initial weights (He's normal, 0.01 in classifiers) of the published models, which transformers leaves out.

Shapes: B images, C classes, H W image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from config import ConfigError
from models.dense import DenseModel
from models.optional import optional_module
from models.pyramid import Pyramid
from models.semantic import enlarged_logits, semantic_loss, stacked_maps

WIDTH = 512  # channels of the published models; the auxiliary head has half of them
_DROPOUT = 0.1


class UPerNet(DenseModel):
    """A backbone and UPerNet's heads.

    Args:
        backbone: of any number of stages, at any strides.
        classes: how many.
        width: channels of the head, an even number.
        auxiliary: weight of the auxiliary head's loss; 0: no such head.

    Raises:
        ConfigError: transformers is not installed, or the width is odd.

    Attributes:
        stride: padded images have sides that are multiples of it.
    """

    def __init__(self, backbone: Pyramid, classes: int, width: int = WIDTH, auxiliary: float = 0.4):
        super().__init__()
        if width % 2:
            raise ConfigError(f"MODEL.DENSE.WIDTH is {width}; UPerNet takes an even number, its auxiliary head being half as wide")
        heads = optional_module("transformers.models.upernet.modeling_upernet", "MODEL.DENSE.HEAD upernet")
        arguments = heads.UperNetConfig(num_labels=classes, hidden_size=width, auxiliary_channels=width // 2)
        self.backbone, self.stride, self.auxiliary = backbone, max(backbone.strides), auxiliary
        self.class_modules = ("head.classifier", *(["auxiliary_head.classifier"] if auxiliary else []))
        self.head = _with_dropout(heads.UperNetHead(arguments, backbone.channels))
        if auxiliary:
            self.auxiliary_head = _with_dropout(heads.UperNetFCNHead(arguments, backbone.channels, in_index=len(backbone.channels) - 2))

    def forward(self, images: Tensor, sizes: Tensor | None = None, targets: Sequence[Mapping[str, Tensor]] | None = None,
                ) -> Tensor | dict[str, Tensor]:
        """Images (B, 3, H, W) to logits (B, C, H, W), or, in training, to losses.

        Args:
            sizes: not needed: padding is ignored in the targets.
            targets: of each image ``map``, (H, W) uint8 with 255 where nothing counts.

        Returns:
            With targets in training ``loss_semantic`` and ``loss_auxiliary`` (already weighted), which are means over the images, as
            ``semantic_loss`` has them; they add up over micro-batches.

        Raises:
            ConfigError: one image in training, in which batch norm has nothing to normalise over after pooling to a single pixel.
        """
        features = self.backbone(images)
        if self.training and len(images) == 1 and not self._normalises_over_ranks():
            raise ConfigError("UPerNet's batch norm needs two images or more a step and process; raise DATA.BATCH_SIZE, or set "
                              "TRAIN.SYNC_BN on several GPUs")
        logits = self.head(features)
        if not (self.training and targets is not None):
            return enlarged_logits(logits, images.shape[2:])
        maps = stacked_maps(targets)
        losses = dict(loss_semantic=semantic_loss(logits, maps))
        if self.auxiliary:
            losses["loss_auxiliary"] = self.auxiliary * semantic_loss(self.auxiliary_head(features), maps)
        return losses

    def _normalises_over_ranks(self) -> bool:
        return any(isinstance(module, nn.SyncBatchNorm) for module in self.head.modules())


def _with_dropout(head: nn.Module) -> nn.Module:
    """``head`` with initial weights and whole channels dropped before its classifier."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    nn.init.normal_(head.classifier.weight, std=0.01)
    nn.init.zeros_(head.classifier.bias)
    head.classifier = nn.Sequential(nn.Dropout2d(_DROPOUT), head.classifier)
    return head
