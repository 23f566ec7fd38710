"""Models of dense tasks as exporters take them: images in, tensors out."""

from __future__ import annotations

from torch import Tensor, nn

from models.dense import DenseModel
from models.detectors import RetinaNet
from models.mask2former import Mask2Former
from models.region_cnn import RegionCNN


class Exported(nn.Module):
    """A model in evaluation whose answer is a tuple of tensors, in the pixels of the image that it is given.

    Attributes:
        names: of the outputs. ``logits`` (B, C, H, W); or ``class_logits`` (B, Q, C + 1) and ``mask_logits`` (B, Q, h, w); or, of one
            image alone, ``boxes`` (n, 4), ``scores`` (n,), ``labels`` (n,) and of Mask R-CNN ``masks`` (n, 28, 28) inside the boxes.
        detects: whether it takes one image at a time, and finds another number of objects in each.
    """

    def __init__(self, model: DenseModel):
        super().__init__()
        self.model = model
        self.detects = isinstance(model, (RetinaNet, RegionCNN))
        if self.detects:
            masks = isinstance(model, RegionCNN) and model.roi_heads.has_mask()
            self.names = ["boxes", "scores", "labels", *(["masks"] if masks else [])]
        else:
            self.names = ["class_logits", "mask_logits"] if isinstance(model, Mask2Former) else ["logits"]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W), whose sides are multiples of the model's stride."""
        found = self.model(images)
        if isinstance(found, Tensor):
            return (found,)
        found = found[0] if self.detects else found
        return tuple(found[name] for name in self.names)
