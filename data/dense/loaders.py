"""``build_dense_loaders``: from a config to the loaders of training and evaluation of dense tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from yacs.config import CfgNode

from config import ConfigError, input_channels, with_values
from data.decoding.pillow import Reading
from data.dense.base import DenseSource
from data.dense.dataset import EvalDenseImages, TrainDenseImages
from data.dense.files import header_sizes
from data.dense.packing import Unpack
from data.dense.pipeline import EvalDensePipeline, TrainDensePipeline
from data.dense.samplers import AspectStepSampler, SizeSampler
from data.dense.transforms import EvalTransform, Size, TrainTransform, crop_size, padded_size
from data.layouts.input_paths import InputImages
from data.loading.loader import ImageLoader
from data.loading.loaders import ClassResolver, Loaders, found_in_data, loader_options, require_images, settle
from data.loading.sampler import StepSampler
from data.sources.base import Source
from data.transforms.build import preprocessing

STRIDE = 32  # that padded sizes are multiples of, unless a model says otherwise
LARGEST = 179_000_000  # pixels of an image, Pillow's limit for files
_OBJECTS = 10  # an image, roughly, whose masks lie in a batch as a bit a pixel

OpenSources = Callable[[CfgNode, Sequence[str], Any], tuple[Mapping[str, DenseSource], str]]


def build_dense_loaders(config: CfgNode, rank: int = 0, world_size: int = 1, splits: Sequence[str] = ("train", "val"),
                        classes: Sequence[str] | ClassResolver | None = None, device: torch.device | str = "cpu", published: bool = False,
                        local_world_size: int = 1, stride: int = STRIDE, open_sources: OpenSources | None = None) -> Loaders:
    """Loaders of ``DenseBatch``es; arguments and errors as of ``data.build_loaders``.

    Args:
        stride: of the model: padded sizes are multiples of it.
        open_sources: from (config, splits, classes) to (sources by split, the layout's name); None: ``data.dense.layouts``.
    """
    device, notices = torch.device(device), []
    if open_sources is None:
        from data.dense.layouts import open_dense_sources as open_sources
    sources, layout = open_sources(config, splits, classes)
    first = next(iter(sources.values()))
    for source in sources.values():
        trained = source is not first or "train" not in sources and config.DATA.WINDOW is not None
        settle(source, config, Reading.of(config) if source is first else first.reading, trained)
        notices += source.notices
    names = list(first.classes)
    if found := found_in_data(config, first, notices):
        config = with_values(config, found, "the data")
    if config.MODEL.NUM_CLASSES and len(names) != config.MODEL.NUM_CLASSES:
        raise ConfigError(f"MODEL.NUM_CLASSES is {config.MODEL.NUM_CLASSES}, but {config.DATA.DATA_PATH} has {len(names)} classes; "
                          "set it to 0 to take the data's")
    training = _Training(config, sources["train"], stride) if "train" in sources else None
    evaluation = None
    if "val" in sources:
        source = sources["val"]
        maps = config.TASK == "semantic" or config.TASK == "mask" and source.kind == "maps"
        evaluation = _Evaluation(config, source, source.sizes, stride, published, maps)
    batch_bytes = max(part.batch_bytes() for part in (training, evaluation) if part is not None)
    options, pipe = loader_options(config, batch_bytes, device, local_world_size, notices)
    train = val = None
    if training is not None:
        train = training.loader(rank, world_size, pipe, options, notices)
    if evaluation is not None:
        sampler = SizeSampler(evaluation.padded, evaluation.batch_size, rank, world_size)
        options["workers"] = min(options["workers"], len(sampler))
        val = evaluation.loader(sampler, pipe, options, persistent_workers=options["workers"] > 0)  # it is used after every epoch
    return Loaders(train, val, names, list(dict.fromkeys(notices)), layout, found)


def input_size(config: CfgNode, stride: int = STRIDE) -> Size:
    """Height and width of the images that a run is planned for: of the crop, else of a wide image of the largest size; multiples of
    ``stride``."""
    return padded_size(*(crop_size(config) or (max(config.DATA.DENSE.SHORT_SIDE), config.DATA.DENSE.LONG_SIDE)), stride)


def build_dense_prediction_loader(config: CfgNode, images: InputImages, device: torch.device, published: bool = False,
                                  stride: int = STRIDE) -> tuple[ImageLoader, list[str]]:
    """(loader of images without annotations, notices), with the pixels, batch size and workers of evaluation.

    They come in their order, neighbours of one padded size together. The number of a row is its image's index, -1 for an image that
    cannot be read, which the loader's ``failures`` name.
    """
    settle(images, config, Reading.of(config), trained=config.DATA.WINDOW is not None)
    notices = [*images.notices]
    if found := found_in_data(config, images, notices):
        config = with_values(config, found, "the images")
    sizes = header_sizes(images.path, range(len(images)), config.DATA.EXIF, config.DATA.TIMEOUT)
    part = _Evaluation(config, images, sizes, stride, published, maps=False)
    sampler = SizeSampler(part.padded, part.batch_size, neighbours=True)
    options, pipe = loader_options(config, part.batch_bytes(), device, 1, notices)
    options["workers"] = min(options["workers"], len(sampler)) if len(sampler) > 1 else 0  # one batch is as fast without workers
    return part.loader(sampler, pipe, options), list(dict.fromkeys(notices))


def _unpack(config: CfgNode) -> Unpack:
    prepare = preprocessing(config)
    return Unpack(prepare["mean"], prepare["std"])


class _Training:
    """The parts of a training loader."""

    def __init__(self, config: CfgNode, source: DenseSource, stride: int):
        self.config, self.source, self.stride, self.transform = config, source, stride, TrainTransform(config)
        if config.DATA.DENSE.COPY_PASTE and config.TASK == "semantic":
            raise ConfigError("DATA.DENSE.COPY_PASTE pastes objects, and TASK semantic trains on maps of classes; set it to 0")
        if config.DATA.DENSE.COPY_PASTE and not (source.has_masks and any(source.things)):
            raise ConfigError(f"DATA.DENSE.COPY_PASTE needs objects with masks, which {source.root} does not have; set it to 0")
        if config.DATA.DECODER == "nvjpeg":
            raise ConfigError(f"DATA.DECODER nvjpeg is not supported for TASK {config.TASK}; set it to auto")
        if config.DATA.REPEATED_AUG > 1:
            raise ConfigError(f"DATA.REPEATED_AUG is not supported for TASK {config.TASK}; leave it 1")
        if (pixels := max(math.prod(self.transform.resized(*size)) for size in np.unique(source.sizes, axis=0).tolist())) > LARGEST:
            raise ConfigError(f"DATA.DENSE.SHORT_SIDE, LONG_SIDE and SCALE make images of {pixels / 1e6:,.0f} million pixels of those of "
                              f"{source.root}; lower them")
        largest = {self.transform.largest(*size) for size in np.unique(source.sizes, axis=0).tolist()}
        self.shape = (input_channels(config), *padded_size(*(max(sides) for sides in zip(*largest, strict=True)), stride))

    def batch_bytes(self) -> int:
        pixels = math.prod(self.shape[1:]) * self.config.DATA.BATCH_SIZE * self.config.TRAIN.ACCUMULATION_STEPS
        return pixels * (self.shape[0] + dict(detection=0, semantic=1).get(self.config.TASK, math.ceil(_OBJECTS / 8)))

    def loader(self, rank: int, world_size: int, pipe: bool, options: Mapping[str, Any], notices: list[str]) -> ImageLoader:
        config, data, images = self.config, self.config.DATA, len(self.source)
        dataset = TrainDenseImages(self.source, TrainDensePipeline(config, self.shape, self.transform), config.SEED, self.stride,
                                   _unpack(config), options["workers"], pipe, data.DENSE.COPY_PASTE, self.transform.crop or (1, 1))
        stream = require_images(config, images, world_size, notices), config.TRAIN.EPOCHS, config.SEED, rank, world_size
        if data.DENSE.ASPECT_GROUPS and self.transform.crop is None:
            wide = self.source.sizes[:, 1] >= self.source.sizes[:, 0]
            sampler: StepSampler = AspectStepSampler(wide, *stream, iterations=config.TRAIN.ITERATIONS)
        else:
            sampler = StepSampler(images, *stream, iterations=config.TRAIN.ITERATIONS)
        budget = data.CORRUPT_BUDGET
        return ImageLoader(dataset, batch_sampler=sampler, budget=int(budget * images if budget < 1 else budget), **options)


class _Evaluation:
    """The parts of a loader for evaluation or prediction.

    Args:
        sizes: (images, 2) heights and widths of the files; 0 where it is not known.
        maps: whether batches have the maps of the files.
    """

    def __init__(self, config: CfgNode, source: Source, sizes: np.ndarray, stride: int, published: bool, maps: bool):
        self.config, self.source, self.sizes, self.stride, self.published, self.maps = config, source, sizes, stride, published, maps
        self.transform = EvalTransform(config)
        self.padded = np.array([padded_size(*self.transform.size(*size), stride) for size in sizes.tolist()])
        self.shape = (input_channels(config), *self.padded.max(axis=0).tolist())
        self.batch_size = config.TEST.BATCH_SIZE or config.DATA.BATCH_SIZE

    def batch_bytes(self) -> int:
        images, maps = (int(sizes.astype(np.int64).prod(axis=1).max()) for sizes in (self.padded, self.sizes))
        return self.batch_size * (images * self.shape[0] + maps * self.maps)

    def loader(self, sampler: SizeSampler, pipe: bool, options: Mapping[str, Any], **more: Any) -> ImageLoader:
        pipeline = EvalDensePipeline(self.config, self.shape, self.transform, self.maps, self.published)
        dataset = EvalDenseImages(self.source, pipeline, self.stride, _unpack(self.config), self.sizes, options["workers"], pipe)
        return ImageLoader(dataset, batch_sampler=sampler, **options, **more)
