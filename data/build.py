"""``build_loaders``: from a config to the loaders of training and evaluation."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from yacs.config import CfgNode

from config import ConfigError, with_values
from data.decoding.pillow import Reading, bands_beside_colour
from data.errors import DataError, UnreadableImage
from data.layouts import digits
from data.layouts.detect import detect_layout
from data.layouts.input_paths import InputImages
from data.layouts.options import Options, resolve_data_file
from data.layouts.splits import choose_classes, subset
from data.loading.dataset import EvalImages, TrainImages
from data.loading.device_decode import EncodedTrainImages
from data.loading.loader import ImageLoader
from data.loading.loaders import ClassResolver, Loaders, found_in_data, loader_options, require_images, settle
from data.loading.sampler import ShardSampler, StepSampler
from data.messages import Caution, Notice
from data.sources.base import Source
from data.sources.classes import first_few, match_classes
from data.sources.deep_levels import look_at
from data.sources.label_sets import one_label_each, tell_single_labels
from data.streaming.dataset import StreamEvalImages, StreamTrainImages
from data.streaming.open import open_streams
from data.streaming.sampler import StreamSampler, StreamShardSampler
from data.streaming.stream import Stream, is_stream
from data.transforms.build_pipelines import build_eval_pipeline, build_train_pipeline
from data.transforms.encoded import EncodedTrainPipeline
from data.transforms.pipeline import Pipeline


def build_loaders(config: CfgNode, rank: int = 0, world_size: int = 1, splits: Sequence[str] = ("train", "val"),
                  classes: Sequence[str] | ClassResolver | None = None, device: torch.device | str = "cpu",
                  published: bool = False, local_world_size: int = 1) -> Loaders:
    """Loaders of the splits asked for; the files of other splits are not touched.

    Args:
        rank, world_size: this process's rank and the number of processes.
        splits: of ``"train"`` and ``"val"``.
        classes: the classifier's class names (those of a checkpoint), or a function that chooses them by the names of the class folders
            (for evaluation alone; a stream shows it none); None takes those of the training data, or without training of the
            evaluation data.
        device: where batches arrive.
        published: the weights to evaluate were published by others; they are given Pillow's pixels, as their authors did.
        local_world_size: processes of the run on this machine, which share its CPUs, shared memory and open files.

    Raises:
        DataError: the data is missing, damaged or not laid out as expected.
        ConfigError: the config does not suit the data (number of classes, several labels an image, more processes than images, keys that
            exclude each other).
    """
    root, notices = os.path.expanduser(config.DATA.DATA_PATH), []
    if not root:
        raise ConfigError("DATA.DATA_PATH is empty; give the folder that holds train/ and val/ with --data-path")
    if config.DATA.DATASET == "digits" and root == digits.DEFAULT_PATH and digits.ensure_digits(root):
        notices.append(f"wrote scikit-learn's 1,797 digits to {root}")

    device = torch.device(device)
    pipelines, lines = _pipelines(config, splits, device, published)  # first: an error in the config is raised before any image is read
    notices += lines
    if is_stream(root):
        if "train" in splits and config.DATA.DECODER == "nvjpeg":
            raise ConfigError(f"DATA.DECODER nvjpeg is for files on a disk, and {root} is a stream; set it to auto")
        sources, layout = open_streams(config, splits, classes(()) if callable(classes) else classes), "stream"
    else:
        sources, layout = _open_sources(config, root, splits, classes)
    names = list(next(iter(sources.values())).classes)
    for source in sources.values():
        notices += source.notices
    first = next(iter(sources.values()))
    if found := found_in_data(config, first, notices, first.measure if isinstance(first, Stream) else None):
        pipelines, _ = _pipelines(with_values(config, found, "the data"), splits, device, published)
    if config.MODEL.NUM_CLASSES and len(names) != config.MODEL.NUM_CLASSES:
        raise ConfigError(f"MODEL.NUM_CLASSES is {config.MODEL.NUM_CLASSES}, but {root} has {len(names)} classes; "
                          "set it to 0 to take the data's")
    if layout == "stream" and world_size > 1:
        notices.append(Notice(f"each of the {world_size} processes reads the whole stream and keeps its part"))

    options, pipe = loader_options(config, _batch_bytes(config, pipelines), device, local_world_size, notices)
    workers, train, val = options["workers"], None, None
    if "train" in sources:
        source, kind = sources["train"], StreamTrainImages if layout == "stream" else TrainImages
        if isinstance(pipelines["train"], EncodedTrainPipeline):
            kind = EncodedTrainImages
        dataset = kind(source, pipelines["train"], config.SEED, workers, pipe)
        sampler = _train_sampler(config, source, rank, world_size, workers > 0, notices)
        budget = config.DATA.CORRUPT_BUDGET
        train = ImageLoader(dataset, batch_sampler=sampler, budget=int(budget * len(source) if budget < 1 else budget), **options)
    if "val" in sources:
        source, kind = sources["val"], StreamEvalImages if layout == "stream" else EvalImages
        batch = _val_batch(config)
        if layout != "stream":  # whose length is not known; every batch is filled up to this size, which takes memory
            batch = min(batch, max(1, -(-len(source) // world_size)))
        sampler = _val_sampler(config, source, batch, rank, world_size, workers > 0)
        options["workers"] = workers = workers if layout == "stream" else min(workers, len(sampler))
        dataset = kind(source, pipelines["val"], batch, workers, pipe)
        val = ImageLoader(dataset, batch_sampler=sampler, persistent_workers=workers > 0, **options)  # it is used after every epoch
    return Loaders(train, val, names, list(dict.fromkeys(notices)), layout, found)


def _pipelines(config: CfgNode, splits: Sequence[str], device: torch.device, published: bool) -> tuple[dict[str, Pipeline], list[str]]:
    """(the pipelines of the splits, messages for the user)."""
    made = {}
    if "train" in splits:
        made["train"] = build_train_pipeline(config, device)
    if "val" in splits:
        made["val"] = build_eval_pipeline(config, device, published)
    return {split: pipeline for split, (pipeline, _) in made.items()}, [line for _, lines in made.values() for line in lines]


def build_prediction_loader(config: CfgNode, images: InputImages, device: torch.device,
                            published: bool = False) -> tuple[ImageLoader, list[str]]:
    """(loader of images without labels, notices), with the pixels, batch size and workers of evaluation.

    The target of a row is its image's index; -1 in rows that pad the last batch and for images that cannot be read, which the
    loader's ``failures`` name. A batch has all images where they are fewer than evaluation's batch.

    Args:
        published: as in ``build_loaders``.
    """
    pipeline, notices = build_eval_pipeline(config, device, published)
    settle(images, config, Reading.of(config), trained=config.DATA.WINDOW is not None)
    notices += images.notices
    if found := found_in_data(config, images, notices):
        pipeline, _ = build_eval_pipeline(with_values(config, found, "the images"), device, published)
    options, pipe = loader_options(config, _batch_bytes(config, {"val": pipeline}), device, 1, notices)
    batch = min(_val_batch(config), len(images))
    sampler = ShardSampler(len(images), batch)
    options["workers"] = min(options["workers"], len(sampler)) if len(sampler) > 1 else 0  # one batch is as fast without workers
    dataset = EvalImages(images, pipeline, batch, options["workers"], pipe)
    return ImageLoader(dataset, batch_sampler=sampler, **options), list(dict.fromkeys(notices))


def _open_sources(config: CfgNode, root: str, splits: Sequence[str],
                  classes: Sequence[str] | ClassResolver | None) -> tuple[dict[str, Source], str]:
    """(sources by split, the layout's name) of data on a disk."""
    if config.DATA.VAL_PATH:
        raise ConfigError(f"DATA.VAL_PATH is for streams only, and {root} is not one; leave it empty")
    options = Options.of(config, alone=list(splits) == ["val"])
    layout = detect_layout(root, options, splits)  # both splits before any listing: a missing val/ is an error at once
    class_file, sources = resolve_data_file(config.DATA.CLASS_NAMES, root), {}
    for split in (name for name in ("train", "val") if name in layout.open):
        source = layout.open[split]()
        if source.labels is not None and config.TASK in ("auto", "classification"):
            mark = source.labels.separator
            raise ConfigError(f"{source.root}: its images have several labels ({first_few(source.classes, 3)}), and TASK is {config.TASK}; "
                              "give --opts TASK multilabel" + (f", or, where {mark!r} is part of the name of one class, --opts "
                                                               "DATA.LABEL_SEPARATOR none" if mark else
                                                               ", or the column of the classes with --opts DATA.LABEL_COLUMN"))
        source = choose_classes(source, class_file) if class_file else source
        source = one_label_each(source) if options.keys.several else source
        if options.keys.several and classes is None:
            tell_single_labels(source)
        source = match_classes(source, classes(source.classes) if callable(classes) else classes)
        reading = next(iter(sources.values())).reading if sources else Reading.of(config)
        settle(source, config, reading, trained=bool(sources) or split == "val" and config.DATA.WINDOW is not None)
        if split == "train":
            _tell_left_out_bands(source, config.DATA.TIMEOUT)
            source = subset(source, config.DATA.SUBSET, config.SEED) if config.DATA.SUBSET < 1 else source
            classes = source.classes if classes is None else classes
        if not len(source):
            raise DataError(f"{source.root}: holds no image for {dict(train='training', val='validation')[split]}; add some"
                            + (", or raise DATA.VAL_FRACTION" if options.val_fraction else ""))
        sources[split] = source
    return sources, layout.name


def _tell_left_out_bands(source: Source, timeout: float) -> None:
    """A word where images to train on in RGB, by the first of them, have further bands."""
    def look(index: int) -> int | None:
        try:
            return bands_beside_colour(source.read(index)) if source.path(index).lower().endswith((".tif", ".tiff")) else None
        except UnreadableImage:  # told when it is trained on
            return None

    if source.reading.channels == 3 and (bands := look_at(source, 1, look, timeout)):
        source.notices.append(Caution(f"{source.root}: its images have {bands[0]} bands, of which the first three are used; "
                                      f"--in-chans {bands[0]} takes all", "bands"))


def has_label_sets(config: CfgNode) -> bool:
    """Whether the config's data is, unambiguously, a list of several labels an image; reads such a list. Data that cannot be used has
    none: the loaders say what is wrong with it."""
    root = os.path.expanduser(config.DATA.DATA_PATH)
    if not root or is_stream(root) or config.DATA.DATASET == "imagenet22K":
        return False
    options = Options.of(config)
    options = replace(options, keys=replace(options.keys, unseen=True))
    for split in ("train", "val"):
        try:
            layout = detect_layout(root, options, [split])
            return "list of" in layout.name and layout.open[split]().labels is not None
        except DataError:
            continue
    return False


def _train_sampler(config: CfgNode, source: Source, rank: int, world_size: int, thread: bool, notices: list[str]) -> StepSampler:
    data, size = config.DATA, len(source)
    global_batch = require_images(config, size, world_size, notices)
    if isinstance(source, Stream):
        return StreamSampler(source, global_batch, config.TRAIN.EPOCHS, config.SEED, rank, world_size, data.STREAM_BUFFER, thread,
                             data.TIMEOUT, config.TRAIN.ITERATIONS)
    return StepSampler(size, global_batch, config.TRAIN.EPOCHS, config.SEED, rank, world_size, data.REPEATED_AUG,
                       source.targets, data.SAMPLING, config.TRAIN.ITERATIONS)


def _val_sampler(config: CfgNode, source: Source, batch: int, rank: int, world_size: int,
                 thread: bool) -> ShardSampler | StreamShardSampler:
    if isinstance(source, Stream):
        return StreamShardSampler(source, batch, rank, world_size, thread, config.DATA.TIMEOUT)
    return ShardSampler(len(source), batch, rank, world_size)


def _batch_bytes(config: CfgNode, pipelines: Mapping[str, Pipeline]) -> int:
    """Bytes of the largest batch that a worker hands over."""
    images = dict(train=config.DATA.BATCH_SIZE * config.TRAIN.ACCUMULATION_STEPS, val=_val_batch(config))
    return max(images[split] * p.image_bytes() for split, p in pipelines.items())


def _val_batch(config: CfgNode) -> int:
    return config.TEST.BATCH_SIZE or config.DATA.BATCH_SIZE


__all__ = ["DataError", "Loaders", "build_loaders"]
