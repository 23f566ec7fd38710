"""What detection and the kinds of segmentation have in common: batches of images of any size with what they show."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from yacs.config import CfgNode

from config import ConfigError, input_channels
from data import Loaders
from data.dense.base import IGNORED, DenseSource
from data.dense.batch import DenseBatch
from data.dense.loaders import STRIDE, build_dense_loaders, build_dense_prediction_loader, input_size
from data.dense.shapes import mask_library
from data.dense.synthetic import synthetic_batch
from data.layouts.input_paths import InputImages
from data.loading.loader import ImageLoader
from data.transforms.build import preprocessing
from models.build_dense import build_dense_model, coarsest_stride
from utils.tasks.base import Task
from utils.visualization.drawing import to_image
from utils.visualization.overlays import draw_map, draw_objects

_MOST_LINES = 4  # classes told below a picture of a batch


class DenseTask(Task):
    """Batches are ``DenseBatch``es. In training a model's outputs are its losses by name, each the mean over the batch's images, so that
    they are computed inside the model that DDP wraps; in evaluation they are what the task makes of the model's answer, an item an image,
    in the pixels of the image's file.

    The losses of R-CNN, means over proposals sampled of all images together, hang a little on how a batch is cut into micro-batches, and so
    do batch norm and padding; the images of each weigh alike.

    Attributes:
        source: of the validation images, once the loaders are there.
    """

    source: DenseSource | None = None
    usual_classes = 80
    one_size = False

    def __init__(self, config: CfgNode):
        self.config = config
        for key, usual, remedy in (
                ("TRAIN.CLASS_WEIGHTS", config.TRAIN.CLASS_WEIGHTS == "none", "leave it none"),
                ("TRAIN.DISTILLATION.TEACHER", not config.TRAIN.DISTILLATION.TEACHER, "leave it empty"),
                ("TRAIN.LINEAR_PROBE", not config.TRAIN.LINEAR_PROBE, "give TRAIN.FREEZE [backbone] to train the head alone"),
                ("DATA.SAMPLING", config.DATA.SAMPLING == "natural", "leave it natural"),
                ("COMPILE", not config.COMPILE.endswith("model"), "give --compile blocks, which compiles the backbone")):
            if not usual:
                raise ConfigError(f"{key} is not supported for TASK {config.TASK}; {remedy}")

    @functools.cached_property
    def stride(self) -> int:
        """Pixels that the sides of padded images are multiples of: ``STRIDE``, or the model's stride where that does not divide it."""
        coarsest = coarsest_stride(self.config)
        return coarsest if STRIDE % coarsest else STRIDE

    def build_loaders(self, config: CfgNode, rank: int = 0, world_size: int = 1, **options: Any) -> Loaders:
        loaders = build_dense_loaders(config, rank, world_size, stride=self.stride, **options)
        if self.name in ("instance", "mask") or self.name == "detection" and loaders.val is not None:
            mask_library()  # whose absence is told now, not when the first masks are read or the first epoch is evaluated
        loader = loaders.val or loaders.train
        self.source = loader.dataset.source if loader is not None else None
        return loaders

    def build_model(self, config: CfgNode, num_classes: int | None = None) -> nn.Module:
        return build_dense_model(config, num_classes or config.MODEL.NUM_CLASSES or self.usual_classes)

    def check_input_size(self, model: nn.Module, config: CfgNode) -> None:
        """Any size will do: images are padded to what the model takes."""

    def input_size(self, config: CfgNode) -> tuple[int, int]:
        return input_size(config, self.stride)

    def preprocessing(self, config: CfgNode) -> dict[str, Any]:
        prepare, dense = preprocessing(config), config.DATA.DENSE
        return dict(mean=prepare["mean"], std=prepare["std"], short_side=max(dense.SHORT_SIDE), long_side=dense.LONG_SIDE)

    def to_device(self, batch: DenseBatch, device: torch.device) -> DenseBatch:
        return batch  # its loader has brought it there

    def split(self, batch: DenseBatch, parts: int) -> list[DenseBatch]:
        return batch.split(parts, 0 if self.config.DATA.DENSE.CROP else self.stride)  # crops are of one size anyway

    def images(self, batch: DenseBatch) -> Tensor:
        return batch.images

    def numbers(self, batch: DenseBatch) -> Tensor:
        return batch.numbers

    def synthetic_batch(self, config: CfgNode, images: int, num_classes: int, device: torch.device,
                        generator: torch.Generator) -> DenseBatch:
        return synthetic_batch(config, images, num_classes, device, generator, self.stride)

    def next_images(self, config: CfgNode, images: int, device: torch.device) -> Tensor:
        return torch.zeros(images, input_channels(config), *self.input_size(config), device=device)  # the workers augment

    def forward(self, model: nn.Module, batch: DenseBatch) -> Any:
        if model.training:
            return model(batch.images, batch.sizes, self.training_targets(batch))
        return self.answers(model(batch.images, batch.sizes), batch)

    def training_targets(self, batch: DenseBatch) -> list[dict[str, Tensor]]:
        """What the model is given of each image in training."""
        return batch.objects()

    def answers(self, outputs: Any, batch: DenseBatch) -> list[Any]:
        """What is evaluated and told of each image, from the model's outputs in evaluation."""
        raise NotImplementedError

    def loss(self, outputs: dict[str, Tensor], batch: DenseBatch) -> Tensor:
        return torch.stack([part.float() for part in outputs.values()]).sum() * len(batch.images)

    def prediction_loader(self, config: CfgNode, images: InputImages, device: torch.device,
                          published: bool) -> tuple[ImageLoader, list[str]]:
        return build_dense_prediction_loader(config, images, device, published, self.stride)

    def shown_batch(self, config: CfgNode, batch: DenseBatch, classes: Sequence[str],
                    most: int) -> tuple[list[Image.Image], list[list[tuple[str, str]]], str]:
        prepare, dense = self.preprocessing(config), config.DATA.DENSE
        tiles, lines = [], []
        for image, shown, number in zip(batch.images[:most], batch.objects(), range(most), strict=False):
            tile, labels = to_image(image, prepare["mean"], prepare["std"]), shown["labels"].tolist()
            there = Counter(labels) if len(batch.maps) == 0 else Counter(batch.maps[number][batch.maps[number] != IGNORED].tolist())
            if len(batch.maps):
                tile = draw_map(tile, batch.maps[number].cpu().numpy())
            else:
                masks = list(shown["masks"].cpu().numpy()) if "masks" in shown else None
                tile = draw_objects(tile, shown["boxes"].cpu().numpy(), [classes[label] for label in labels], labels, masks)
            tiles.append(tile)
            counted = there.most_common(_MOST_LINES)
            lines.append([(classes[label], f" x {count}" if len(batch.maps) == 0 else "") for label, count in counted] or [("nothing", "")])
        sides = ", ".join(map(str, dense.SHORT_SIDE))
        return tiles, lines, (f"shorter side {sides}, longer at most {dense.LONG_SIDE}; scale {dense.SCALE[0]:g} to "
                              f"{dense.SCALE[1]:g}; crop {dense.CROP or 'none'}; flip {config.AUG.HFLIP:g}; seed {config.SEED}")
