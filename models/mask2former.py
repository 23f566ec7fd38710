"""Mask2Former: a fixed number of queries, each of which becomes a mask and its class.

Paper: "Masked-attention Mask Transformer for Universal Image Segmentation" (CVPR 2022). The pixel decoder (deformable attention over the
three coarsest maps of the backbone, then finer ones added) and the transformer decoder are transformers', with its initial weights; the
backbone is ours. As in the published models padding is not masked in attention; it is left out of the losses
(``models.mask2former_loss``), and of the answers by who reads them.

Shapes: B images, Q queries, C classes, H W padded image, r the backbone's finest stride.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from config import ConfigError
from models.dense import DenseModel
from models.mask2former_loss import mask_losses
from models.optional import optional_module
from models.pyramid import Pyramid

WIDTH = 256  # channels of the published models
_GROUPS = 32  # of the group norms in the pixel decoder


class Mask2Former(DenseModel):
    """A backbone, Mask2Former's two decoders and the classes of the queries.

    Args:
        backbone: of three stages or more; masks come at its finest stride (4; of a backbone with patches of 2 at 2).
        classes: how many.
        queries: how many masks are proposed.
        width: channels of the decoders, a multiple of 32; 4 and 8 times as many within their feed-forward layers.

    Raises:
        ConfigError: transformers is not installed, the backbone has fewer stages, or another width.
    """

    class_modules = ("class_predictor",)

    def __init__(self, backbone: Pyramid, classes: int, queries: int = 100, width: int = WIDTH):
        super().__init__()
        if len(backbone.strides) < 3:
            raise ConfigError("MODEL.DENSE.HEAD mask2former needs a backbone with maps of three strides or more; choose another MODEL.NAME")
        if width % _GROUPS:
            raise ConfigError(f"MODEL.DENSE.WIDTH is {width}; Mask2Former takes a multiple of {_GROUPS}")
        library = _library()
        # Its pixel decoder counts the levels finer than the three coarsest by their strides, one for each doubling.
        strides = [backbone.strides[0] * 2**level for level in range(len(backbone.strides))]
        arguments = library.Mask2FormerConfig(
            num_labels=classes, num_queries=queries, feature_size=width, mask_feature_size=width, hidden_dim=width,
            encoder_feedforward_dim=4 * width, dim_feedforward=8 * width, feature_strides=strides, common_stride=strides[0])
        self.backbone, self.stride = backbone, backbone.strides[-1]
        self.pixel_decoder = library.Mask2FormerPixelDecoder(arguments, backbone.channels)
        self.transformer = library.Mask2FormerTransformerModule(width, arguments)
        self.class_predictor = nn.Linear(width, classes + 1)
        published = library.Mask2FormerPreTrainedModel(arguments)
        for part in (self.pixel_decoder, self.transformer, self.class_predictor):
            part.apply(published._init_weights)

    def forward(self, images: Tensor, sizes: Tensor | None = None, targets: Sequence[Mapping[str, Tensor]] | None = None,
                masks_per_image: Tensor | float | None = None) -> dict[str, Tensor]:
        """Images (B, 3, H, W) to masks and their classes, or, in training, to losses.

        Args:
            sizes: (B, 2) height and width of each image within the padded one; None: no padding.
            targets: of each image ``labels`` (n,) and ``masks`` (n, H, W) bool, or a ``map`` (H, W) uint8 with 255 where nothing is.
            masks_per_image: mean over all images of the step, on all ranks: see ``mask_losses``.

        Returns:
            ``class_logits`` (B, Q, C + 1), the last class meaning no object, and ``mask_logits`` (B, Q, H/r, W/r); with targets in
            training the losses of ``mask_losses``.
        """
        decoded = self.pixel_decoder(self.backbone(images))
        out = self.transformer(decoded.multi_scale_features, decoded.mask_features)
        states, masks = out.intermediate_hidden_states, out.masks_queries_logits
        if not (self.training and targets is not None):
            return dict(class_logits=self.class_predictor(states[-1].transpose(0, 1)), mask_logits=masks[-1])
        classes = [self.class_predictor(state.transpose(0, 1)) for state in states]
        with torch.autocast(images.device.type, enabled=False):
            return mask_losses(_library(), classes, masks, sizes, targets, masks_per_image)


def _library() -> ModuleType:
    return optional_module("transformers.models.mask2former.modeling_mask2former", "MODEL.DENSE.HEAD mask2former")
