"""``build_loaders``: from a config to the loaders of training and evaluation."""

from __future__ import annotations

import atexit
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from yacs.config import CfgNode

from config import ConfigError
from data.errors import DataError
from data.layouts import digits
from data.layouts.detect import Options, beside, recognise
from data.layouts.input_paths import GivenImages
from data.layouts.splits import choose_classes, subset
from data.loading.dataset import EvalImages, TrainImages
from data.loading.loader import ImageLoader
from data.loading.sampler import ShardSampler, StepSampler
from data.loading.workers import LEAST_SHARED_MEMORY, _end_workers, _quiet_worker, free_shared_memory, needs_pipe, worker_count
from data.messages import Notice
from data.sources.base import Source
from data.sources.classes import join
from data.streaming.dataset import StreamEvalImages, StreamTrainImages
from data.streaming.open import open_streams
from data.streaming.sampler import StreamSampler, StreamShard
from data.streaming.stream import Stream, is_stream
from data.transforms.pipeline import Pipeline, eval_pipeline, train_pipeline

Naming = Callable[[Sequence[str]], Sequence[str] | None]  # from the names of class folders to those of the classifier


@dataclass
class Loaders:
    """What training and evaluation read from.

    Attributes:
        train: yields an optimizer step's local batch, ``(images, targets)``, for each step of the whole run.
        val: yields ``(images, targets)``; the last batch is filled up to the static shape with rows of target -1.
        classes: class names, in the order of the classifier's outputs.
        notices: lines the user should see.
        layout: what the data was recognised as.
    """

    train: ImageLoader | None
    val: ImageLoader | None
    classes: list[str]
    notices: list[str] = field(default_factory=list)
    layout: str = ""

    def batches(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The training stream from step ``start`` on."""
        self.train.batch_sampler.start = start
        return iter(self.train)

    def tell(self, report: Callable[[str], None]) -> None:
        """Let ``report`` have a line for every image that turns out to be unreadable."""
        for loader in (self.train, self.val):
            if loader is not None:
                loader.report = report

    def close(self) -> None:
        """End the loading processes now; left to the garbage collector they end after a time-out each."""
        for loader in (self.train, self.val):
            if loader is not None:
                loader.close()


def build_loaders(config: CfgNode, rank: int = 0, world_size: int = 1, splits: Sequence[str] = ("train", "val"),
                  classes: Sequence[str] | Naming | None = None, device: torch.device | str = "cpu", published: bool = False) -> Loaders:
    """Loaders of the splits asked for; a split that is not asked for is not touched.

    Args:
        rank, world_size: this process's place among all.
        splits: of ``"train"`` and ``"val"``.
        classes: class names to match the folders against (those of a checkpoint), or what chooses them knowing the folders'
            names (for evaluation alone; a stream has none to show); None takes the training folder's, or without training
            the evaluation folder's.
        device: where batches arrive.
        published: whether weights of others are to be judged, on the pixels that their authors had.

    Raises:
        DataError: the data is missing or laid out otherwise.
        ConfigError: the config does not suit the data (class count, accumulation longer than an epoch).
    """
    root, notices = os.path.expanduser(config.DATA.DATA_PATH), []
    if not root:
        raise ConfigError("DATA.DATA_PATH is empty; give the folder that holds train/ and val/ with --data-path")
    if config.DATA.DATASET == "digits" and root == digits.DEFAULT_PATH and digits.ensure_digits(root):
        notices.append(f"wrote scikit-learn's 1,797 digits to {root}")

    # What cannot be done is told before any file is looked at.
    device = torch.device(device)
    train_way, lines = train_pipeline(config, device) if "train" in splits else (None, [])
    val_way, more = eval_pipeline(config, device, published) if "val" in splits else (None, [])
    notices += lines + more

    if is_stream(root):
        return _stream_loaders(config, rank, world_size, open_streams(config, splits, classes(()) if callable(classes) else classes),
                               train_way, val_way, device, notices)
    if config.DATA.VAL_PATH:
        raise ConfigError(f"DATA.VAL_PATH is for streams alone, and {root} is none; leave it empty")

    # Both splits are found before either is listed: a missing val/ is told at once, not after a million files.
    layout = recognise(root, Options.of(config), splits)
    listing = beside(config.DATA.CLASS_NAMES, root)

    def read_split(split: str, classes: Sequence[str] | Naming | None) -> Source | None:
        if split not in layout.open:
            return None
        source = layout.open[split]()
        source = choose_classes(source, listing) if listing else source
        return join(source, classes(source.classes) if callable(classes) else classes)

    train_folder = read_split("train", classes)
    if train_folder is not None and config.DATA.SUBSET < 1:
        train_folder = subset(train_folder, config.DATA.SUBSET, config.SEED)
    names = train_folder.classes if classes is None and train_folder else classes
    val_folder = read_split("val", names)
    folders = [f for f in (train_folder, val_folder) if f is not None]
    names = folders[0].classes if names is None or callable(names) else names
    for folder in folders:
        notices += folder.notices
    if config.MODEL.NUM_CLASSES and len(names) != config.MODEL.NUM_CLASSES:
        raise ConfigError(f"MODEL.NUM_CLASSES is {config.MODEL.NUM_CLASSES}, but {root} has {len(names)} classes; "
                          "set it to 0 to count them in the data")

    for folder in folders:
        folder.configure(config.DATA.EXIF, config.DATA.READ_PATIENCE)
    common, pipe, val_batch = _loading(config, train_way, val_way, device, notices)
    workers = common["workers"]
    train = val = None
    if train_folder is not None:
        sampler = _step_sampler(config, len(train_folder), rank, world_size, notices)
        images = TrainImages(train_folder, train_way, config.SEED, workers, pipe)
        train = ImageLoader(images, batch_sampler=sampler, budget=_budget(config, len(train_folder)), **common)
    if val_folder is not None:
        shard = ShardSampler(len(val_folder), val_batch, rank, world_size)
        val = ImageLoader(EvalImages(val_folder, val_way, val_batch, workers, pipe), batch_sampler=shard,
                          persistent_workers=workers > 0, **common)  # evaluation comes again every epoch
    return Loaders(train, val, list(names), list(dict.fromkeys(notices)), layout.name)


def build_given(config: CfgNode, images: GivenImages, device: torch.device, published: bool = False) -> tuple[ImageLoader, list[str]]:
    """(loader of images without labels, notices): evaluation's pixels, batches and processes; a row's target is its image's number.

    A batch is evaluation's, or all images where those are fewer. -1 is the target of rows that fill the last batch up and
    of images that cannot be read; the loader's ``failures`` name these.

    Args:
        published: as in ``build_loaders``.
    """
    way, notices = eval_pipeline(config, device, published)
    images.configure(config.DATA.EXIF, config.DATA.READ_PATIENCE)
    common, pipe, batch = _loading(config, None, way, device, notices)
    batch = min(batch, len(images))
    shard = ShardSampler(len(images), batch)
    common["workers"] = workers = min(common["workers"], len(shard)) if len(shard) > 1 else 0  # one batch is as fast here
    return ImageLoader(EvalImages(images, way, batch, workers, pipe), batch_sampler=shard, **common), list(dict.fromkeys(notices))


def _loading(config: CfgNode, train_way: Pipeline | None, val_way: Pipeline | None, device: torch.device,
             notices: list[str]) -> tuple[dict[str, Any], bool, int]:
    """How loading processes run: options of both loaders, whether batches go through pipes, and images of an evaluation batch."""
    workers, free = worker_count(config), free_shared_memory()
    if workers and free is not None and free < LEAST_SHARED_MEMORY:
        notices.append(Notice(f"/dev/shm has {free >> 10} KiB free, too little for loading processes; images are loaded without them "
                       "(docker: --shm-size=8g)"))
        workers = 0
    train_batch, val_batch = config.DATA.BATCH_SIZE * config.TRAIN.ACCUMULATION_STEPS, config.TEST.BATCH_SIZE or config.DATA.BATCH_SIZE
    pipe = _pipe_notice(max(_bytes(train_way, train_batch), _bytes(val_way, val_batch)), workers, notices)
    common = dict(workers=workers, timeout=config.DATA.TIMEOUT, device=device, pin_memory=config.DATA.PIN_MEMORY,
                  worker_init_fn=_quiet_worker)
    return common, pipe, val_batch


def _stream_loaders(config: CfgNode, rank: int, world_size: int, streams: dict[str, Stream], train_way: Pipeline | None,
                    val_way: Pipeline | None, device: torch.device, notices: list[str]) -> Loaders:
    """Loaders of streams, which know their images only when they come."""
    first, data = next(iter(streams.values())), config.DATA
    for stream in streams.values():
        notices += stream.notices
    if config.MODEL.NUM_CLASSES and len(first.classes) != config.MODEL.NUM_CLASSES:
        raise ConfigError(f"MODEL.NUM_CLASSES is {config.MODEL.NUM_CLASSES}, but {first.root} has {len(first.classes)} classes; "
                          "set it to 0 to take the stream's")
    if world_size > 1:
        notices.append(Notice(f"each of the {world_size} processes reads the whole stream and keeps its part"))
    common, pipe, val_batch = _loading(config, train_way, val_way, device, notices)
    workers, train, val = common["workers"], None, None
    if "train" in streams:
        stream, step = streams["train"], data.BATCH_SIZE * config.TRAIN.ACCUMULATION_STEPS * world_size
        _check_size(config, len(stream), world_size, step, notices)
        sampler = StreamSampler(stream, step, config.TRAIN.EPOCHS, config.SEED, rank, world_size, data.STREAM_BUFFER,
                                workers > 0, data.TIMEOUT)
        train = ImageLoader(StreamTrainImages(stream, train_way, config.SEED, workers, pipe), batch_sampler=sampler,
                            budget=_budget(config, len(stream)), **common)
    if "val" in streams:
        images = StreamEvalImages(streams["val"], val_way, val_batch, workers, pipe)
        shard = StreamShard(streams["val"], val_batch, rank, world_size, workers > 0, data.TIMEOUT)
        val = ImageLoader(images, batch_sampler=shard, persistent_workers=workers > 0, **common)
    return Loaders(train, val, list(first.classes), list(dict.fromkeys(notices)), "stream")


def _step_sampler(config: CfgNode, size: int, rank: int, world_size: int, notices: list[str]) -> StepSampler:
    global_batch = config.DATA.BATCH_SIZE * config.TRAIN.ACCUMULATION_STEPS * world_size
    _check_size(config, size, world_size, global_batch, notices)
    return StepSampler(size, global_batch, config.TRAIN.EPOCHS, config.SEED, rank, world_size, config.DATA.REPEATED_AUG)


def _check_size(config: CfgNode, size: int, world_size: int, global_batch: int, notices: list[str]) -> None:
    if size < world_size:
        raise ConfigError(f"{config.DATA.DATA_PATH} has {size} training images for {world_size} processes; start at most {size}")
    if size < global_batch:
        notices.append(Notice(f"the {size} training images are fewer than a global batch ({global_batch}); "
                       f"every epoch is one step of {size}"))


def _budget(config: CfgNode, size: int) -> int:
    """Unreadable training images that a process goes on with."""
    budget = config.DATA.CORRUPT_BUDGET
    return int(budget * size if budget < 1 else budget)


def _bytes(pipeline: Pipeline | None, images: int) -> int:
    """Size of a batch as a loading process hands it over."""
    return 0 if pipeline is None else images * math.prod(pipeline.shape) * pipeline.dtype.itemsize


def _pipe_notice(batch_bytes: int, workers: int, notices: list[str]) -> bool:
    here = os.environ.get("LOCAL_WORLD_SIZE", "1")
    line = needs_pipe(batch_bytes, workers * (int(here) if here.isdigit() else 1))
    notices += [line] if line else []
    return bool(line)


atexit.register(_end_workers)


__all__ = ["DataError", "Loaders", "build_loaders"]
