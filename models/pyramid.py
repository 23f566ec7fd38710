"""A classifier's body as the backbone of dense tasks: images in, one map a stage out.

Paper: "Feature Pyramid Networks for Object Detection" (CVPR 2017), section 3, takes the last map of every stride.

The model inside is the classifier itself under its own names, less the classifier and the final norm, so that its checkpoints fit by the
prefix ``model.``. Levels are told by their stride (``strides``), never by their place.

Shapes: B batch, H W image, C channels of a map, r its stride.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.models import group_parameters
from torch import Tensor, nn

MOST_LEVELS = 4  # the coarsest are taken: of a ResNet's strides 2 to 32 those from 4 on, as detectors have it


class Pyramid(nn.Module):
    """Maps of one image at several strides. (B, 3, H, W) -> [(B, C, H/r, W/r) for each stride], the finest first.

    Args:
        model: a classifier of ours or timm's whose maps shrink from stage to stage. It loses its classifier and its last norm.
        out_norm: a layer norm over the channels of each map, as Swin's detectors have it.
        frozen_stages: the image embedding and so many stages less one stay as they are (1: the embedding alone): no gradients, and
            evaluation mode also while the rest trains.
        levels: maps to give, the coarsest, where there are more.

    Attributes:
        channels, strides: of each map.

    Raises:
        ValueError: the model has no maps of several strides, or fewer stages than are to be frozen.
    """

    def __init__(self, model: nn.Module, out_norm: bool = False, frozen_stages: int = 0, levels: int = MOST_LEVELS):
        super().__init__()
        infos = [dict(info) for info in getattr(model, "feature_info", None) or ()]
        if not hasattr(model, "forward_intermediates") or not hasattr(model, "prune_intermediate_layers"):
            raise ValueError("gives its last map alone (it has no forward_intermediates)")
        last_of = {info["reduction"]: number for number, info in enumerate(infos)}  # several maps of one stride: the last of them
        strides = sorted(last_of)[-levels:]
        if len(strides) < 2 or any(not float(b / a).is_integer() for a, b in zip(strides, strides[1:], strict=False)):
            raise ValueError(f"is no hierarchy: its maps have strides {', '.join(map(str, last_of)) or 'of no number'}")
        self.channels = [infos[last_of[stride]]["num_chs"] for stride in strides]
        self.strides = [int(stride) for stride in strides]
        self.indices = model.prune_intermediate_layers([last_of[stride] for stride in strides], prune_norm=True, prune_head=True)
        self.model = model
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in self.channels) if out_norm else None
        self.frozen = self._freeze(frozen_stages)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Raises ``ValueError`` for sides that are no multiples of the coarsest stride: levels would not lie over each other."""
        height, width = images.shape[-2:]
        if height % self.strides[-1] or width % self.strides[-1]:
            raise ValueError(f"an image of {height} x {width} pixels is no multiple of the coarsest stride, {self.strides[-1]}; pad it")
        maps = self.model.forward_intermediates(images, indices=self.indices, intermediates_only=True, output_fmt="NCHW")
        if self.norms is None:
            return maps
        return [norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for norm, x in zip(self.norms, maps, strict=True)]

    def _freeze(self, stages: int) -> list[nn.Module]:
        """Fix the parameters of the embedding and the first ``stages`` - 1 stages; the modules that hold nothing else come back."""
        if not stages:
            return []
        layers = group_parameters(self.model, self.model.group_matcher(coarse=True))
        if stages >= len(layers):
            raise ValueError(f"has {len(layers) - 1} stages, so at most {len(layers) - 1} can be frozen, with the embedding as the first")
        fixed = {name for layer in range(stages) for name in layers[layer]}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name not in fixed)
        return [module for module in self.model.modules()
                if (own := list(module.parameters())) and not any(parameter.requires_grad for parameter in own)]

    def train(self, mode: bool = True) -> Pyramid:
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    # -- what optimizers and checkpoints ask of a model ---------------------------------------------

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters of two or more dimensions that weight decay must leave alone: the classifier's own."""
        return {f"model.{name}" for name in self.model.no_weight_decay()} if hasattr(self.model, "no_weight_decay") else set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """The layer of a parameter, from the input on, for layer decay; what the classifier does not hold comes last."""
        return layer_of(self.model, "model.", coarse)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.model.set_grad_checkpointing(enable)


def layer_of(model: nn.Module, prefix: str, coarse: bool = False) -> Callable[[str], float]:
    """timm's group matcher for a model that holds ``model`` under ``prefix``: its layers in their order, then all that is not its own."""
    layers = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    return lambda name: layers.get(name.removeprefix(prefix), float("inf")) if name.startswith(prefix) else float("inf")
