"""``build_loaders``: from a config to the loaders of training and evaluation."""

from __future__ import annotations

import atexit
import math
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info
from yacs.config import CfgNode

from config import ConfigError
from data import digits, seeds
from data.folder import VAL_NAMES, DataError, ImageFolder, find_split, scan_folder
from data.mixup import build_mixup
from data.pipeline import Pipeline, eval_pipeline, train_pipeline
from data.sampler import Key, ShardSampler, StepSampler
from data.stream import StreamLoader


@dataclass
class Loaders:
    """What training and evaluation read from.

    Attributes:
        train: yields an optimizer step's local batch, ``(images, targets)``, for each step of the whole run.
        val: yields ``(images, targets)``; the last batch is filled up to the static shape with rows of target -1.
        classes: class names, in the order of the classifier's outputs.
        mixup: ``(images, targets, step) -> (images, targets)``.
        notices: lines the user should see.
    """

    train: DataLoader | None
    val: DataLoader | None
    classes: list[str]
    mixup: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
    notices: list[str] = field(default_factory=list)
    _stream: Any = None

    def batches(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The training stream from step ``start`` on."""
        self.train.batch_sampler.start = start
        self._stream = iter(self.train)
        return self._stream

    def close(self) -> None:
        """End the loading processes now; left to the garbage collector they end after a time-out each."""
        for iterator in (getattr(self._stream, "inner", None), getattr(self.val, "_iterator", None)):
            shutdown = getattr(iterator, "_shutdown_workers", None)  # torch offers no public way
            if shutdown is not None:
                shutdown()


class TrainImages(Dataset):
    """Augmented training images by key; everything random in a sample is a function of (seed, key).

    A sample is ``(image, target)``, or ``(crop, row of draws, target)`` where the device augments.
    """

    def __init__(self, folder: ImageFolder, pipeline: Pipeline, seed: int):
        self.folder, self.pipeline, self.seed = folder, pipeline, seed

    def __getitem__(self, key: Key) -> tuple[Any, ...]:
        return self.sample(key)

    def __getitems__(self, keys: list[Key]) -> tuple[Tensor, ...]:
        """A whole batch; images are written to their rows at once."""
        images = empty_batch(len(keys), self.pipeline)
        parts = [self.sample(key, image)[1:] for key, image in zip(keys, images, strict=True)]
        return images, *default_collate(parts)

    def sample(self, key: Key, out: Tensor | None = None) -> tuple[Any, ...]:
        epoch, index, copy = key
        seed = seeds.derive(self.seed, seeds.AUGMENT, epoch, index, copy)
        # timm's transforms draw from all three global generators.
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        torch.default_generator.manual_seed(seed)
        image = self.pipeline(self.folder, index, out)
        target = int(self.folder.targets[index])
        return (*image, target) if isinstance(image, tuple) else (image, target)


class EvalImages(Dataset):
    """Images prepared for evaluation, by index; a batch is filled up to ``batch_size`` rows of target -1, so that all have one shape."""

    def __init__(self, folder: ImageFolder, pipeline: Pipeline, batch_size: int):
        self.folder, self.pipeline, self.batch_size = folder, pipeline, batch_size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pipeline(self.folder, index), int(self.folder.targets[index])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        images = empty_batch(self.batch_size, self.pipeline)
        targets = torch.full((self.batch_size,), -1)
        for row, index in enumerate(indices):
            self.pipeline(self.folder, index, images[row])
            targets[row] = int(self.folder.targets[index])
        images[len(indices):].zero_()
        return images, targets


def empty_batch(size: int, pipeline: Pipeline) -> Tensor:
    """Room for a batch; in a loading process it is shared with the main process from the start, and never copied."""
    shape, dtype = (size, *pipeline.shape), torch.float32 if pipeline.finish is None else torch.uint8
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)


def as_it_is(batch: Any) -> Any:
    """The collation of batches that come whole from the data set."""
    return batch


def build_loaders(config: CfgNode, rank: int = 0, world_size: int = 1, splits: Sequence[str] = ("train", "val"),
                  classes: Sequence[str] | None = None, device: torch.device | str = "cpu", published: bool = False) -> Loaders:
    """Loaders of the splits asked for; a split that is not asked for is not touched.

    Args:
        rank, world_size: this process's place among all.
        splits: of ``"train"`` and ``"val"``.
        classes: class names to match the folders against (those of a checkpoint); None takes the training folder's, or
            without training the evaluation folder's.
        device: where batches arrive.
        published: whether weights of others are to be judged, on the pixels that their authors had.

    Raises:
        DataError: the data is missing or laid out otherwise.
        ConfigError: the config does not suit the data (class count, accumulation longer than an epoch).
    """
    root, notices = os.path.expanduser(config.DATA.DATA_PATH), []
    if not root:
        raise ConfigError("DATA.DATA_PATH is empty; give the folder that holds train/ and val/ with --data-path")
    if config.DATA.DATASET == "imagenet22K":
        notices.append("notice: DATA.DATASET imagenet22K is read as folders, train/<class>/ and val/<class>/; lists and archives are not")
    if config.DATA.DATASET == "digits" and root == digits.DEFAULT_PATH and digits.ensure_digits(root):
        notices.append(f"wrote scikit-learn's 1,797 digits to {root}")

    # Paths of both splits before either is scanned: a missing val/ is told at once, not after a million files.
    paths = {split: find_split(root, ("train",) if split == "train" else VAL_NAMES) for split in splits}
    train_folder = scan_folder(paths["train"], classes) if "train" in paths else None
    names = list(classes) if classes is not None else train_folder.classes if train_folder else None
    val_folder = scan_folder(paths["val"], names) if "val" in paths else None
    folders = [f for f in (train_folder, val_folder) if f is not None]
    names = names if names is not None else folders[0].classes
    for folder in folders:
        notices += folder.notices
    if config.MODEL.NUM_CLASSES and len(names) != config.MODEL.NUM_CLASSES:
        raise ConfigError(f"MODEL.NUM_CLASSES is {config.MODEL.NUM_CLASSES}, but {root} has {len(names)} classes; "
                          "set it to 0 to count them in the data")

    workers, device = worker_count(config), torch.device(device)
    common = dict(num_workers=workers, device=device, pin_memory=config.DATA.PIN_MEMORY, collate_fn=as_it_is, worker_init_fn=_quiet_worker,
                  # Forked workers start in milliseconds and share the index; torch and timm are not imported again.
                  multiprocessing_context="fork" if workers and sys.platform.startswith("linux") else None)
    train = val = None
    if train_folder is not None:
        sampler = _step_sampler(config, len(train_folder), rank, world_size, notices)
        pipeline, lines = train_pipeline(config, device)
        train = StreamLoader(TrainImages(train_folder, pipeline, config.SEED), batch_sampler=sampler, finish=pipeline.finish, **common)
        notices += lines
    if val_folder is not None:
        batch = config.TEST.BATCH_SIZE or config.DATA.BATCH_SIZE
        pipeline, lines = eval_pipeline(config, device, published)
        val = StreamLoader(EvalImages(val_folder, pipeline, batch), batch_sampler=ShardSampler(len(val_folder), batch, rank, world_size),
                           finish=pipeline.finish, persistent_workers=workers > 0, **common)  # evaluation comes again every epoch
        notices += lines
    return Loaders(train, val, list(names), build_mixup(config, len(names), rank), notices)


def _step_sampler(config: CfgNode, size: int, rank: int, world_size: int, notices: list[str]) -> StepSampler:
    global_batch = config.DATA.BATCH_SIZE * config.TRAIN.ACCUMULATION_STEPS * world_size
    if size < world_size:
        raise ConfigError(f"{config.DATA.DATA_PATH} has {size} training images for {world_size} processes; start at most {size}")
    if size < global_batch:
        notices.append(f"notice: the {size} training images are fewer than a global batch ({global_batch}); "
                       f"every epoch is one step of {size}")
    return StepSampler(size, global_batch, config.TRAIN.EPOCHS, config.SEED, rank, world_size, config.DATA.REPEATED_AUG)


def usable_cpus() -> int:
    """CPUs this process may use: its affinity, and the quota of its container."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        if quota != "max":
            cpus = min(cpus, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return cpus


def worker_count(config: CfgNode) -> int:
    """Loading processes of this process: the config's number, or its share of the CPUs, 8 at most."""
    if config.DATA.NUM_WORKERS >= 0:
        return config.DATA.NUM_WORKERS
    here = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, min(8, usable_cpus() // max(1, int(here) if here.isdigit() else 1)))


def _end_workers() -> None:
    """At exit, end loading processes that nothing has shut down: they ignore the signal that multiprocessing would send."""
    children = multiprocessing.active_children()
    if children and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each of them
    for child in children:
        child.kill()


atexit.register(_end_workers)


def _quiet_worker(_: int) -> None:
    """Signals may reach the whole process group; the main process decides, and still needs its workers for it."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


__all__ = ["DataError", "Loaders", "build_loaders"]
