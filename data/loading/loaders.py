"""The loaders of a run, and what all kinds of them are made with."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from yacs.config import CfgNode

from config import ConfigError, input_channels
from data.decoding.pillow import Reading
from data.loading.loader import ImageLoader
from data.loading.workers import MIN_SHARED_MEMORY, free_shared_memory, ignore_signals, kill_workers, pipe_reason, worker_count
from data.messages import Caution, Notice
from data.sources.base import Source
from data.sources.channel_statistics import measure_channels
from data.sources.deep_levels import settle_reading

# From the names of the class folders to the classifier's class names; None for the folders' own.
ClassResolver = Callable[[Sequence[str]], Sequence[str] | None]


@dataclass
class Loaders:
    """The loaders of training and evaluation.

    Attributes:
        train: yields an optimizer step's local batch for each step of the whole run: ``(images, targets)``, or a ``DenseBatch``.
        val: yields ``(images, targets)``, or a ``DenseBatch``; the last batch of the former is padded to the shape of the others with rows
            of target -1. Targets are positions in ``classes`` (B,), or with several labels an image (B, classes) int8: 1, 0, or -1 for
            one that is not known.
        classes: class names, in the order of the classifier's outputs.
        notices: messages for the user.
        layout: the name of the layout that was detected.
        found: what the data told of keys that are None in the config (``config.FOUND_IN_DATA``).
    """

    train: ImageLoader | None
    val: ImageLoader | None
    classes: list[str]
    notices: list[str] = field(default_factory=list)
    layout: str = ""
    found: dict[str, Any] = field(default_factory=dict)

    def batches(self, start: int = 0) -> Iterator[Any]:
        """The training stream from step ``start`` on."""
        self.train.batch_sampler.start = start
        return iter(self.train)

    def fingerprints(self) -> dict[str, str]:
        """Digest of the names and labels of each split: another list of images has another one, wherever they lie."""
        loaders = dict(train=self.train, val=self.val)
        return {split: loader.dataset.source.fingerprint() for split, loader in loaders.items() if loader is not None}

    def report_unreadable(self, report: Callable[[str], None]) -> None:
        """Call ``report`` with a message for each image that turns out to be unreadable."""
        for loader in (self.train, self.val):
            if loader is not None:
                loader.report = report

    def close(self) -> None:
        """End the DataLoader workers now; left to the garbage collector they end after a time-out each."""
        for loader in (self.train, self.val):
            if loader is not None:
                loader.close()


def loader_options(config: CfgNode, batch_bytes: int, device: torch.device, local_world_size: int,
                   notices: list[str]) -> tuple[dict[str, Any], bool]:
    """(what all loaders of a process have in common, whether batches must go through pipes).

    Args:
        batch_bytes: size of the largest batch as a worker hands it over.
        notices: what is told is appended to them.
    """
    workers, free = worker_count(config.DATA.NUM_WORKERS, local_world_size), free_shared_memory()
    if workers and free is not None and free < MIN_SHARED_MEMORY:
        notices.append(Notice(f"/dev/shm can take {free >> 10} KiB, too little for DataLoader workers; images are loaded without them "
                              "(docker: --shm-size=8g, and not read-only)"))
        workers = 0
    reason = pipe_reason(batch_bytes, workers, local_world_size)
    notices += [reason] if reason else []
    return dict(workers=workers, timeout=config.DATA.TIMEOUT, device=device, pin_memory=config.DATA.PIN_MEMORY,
                worker_init_fn=ignore_signals), bool(reason)


def require_images(config: CfgNode, size: int, world_size: int, notices: list[str]) -> int:
    """Images of a step over all processes, for a training set of ``size`` images; a notice where it has fewer.

    Raises:
        ConfigError: there are more processes than images.
    """
    global_batch = config.DATA.BATCH_SIZE * config.TRAIN.ACCUMULATION_STEPS * world_size
    if size < world_size:
        raise ConfigError(f"{config.DATA.DATA_PATH} has {size} training images for {world_size} processes; start at most {size}")
    if size < global_batch:
        notices.append(Notice(f"the {size} training images are fewer than a global batch ({global_batch}); "
                              f"every epoch is one step of {size}"))
    return global_batch


def settle(source: Source, config: CfgNode, reading: Reading, trained: bool) -> None:
    """As ``settle_reading``, with lines among the source's notices.

    Args:
        trained: ``reading`` is that of images which a model is or was trained on.
    """
    levels = settle_reading(source, reading, config.DATA.READ_PATIENCE, config.DATA.TIMEOUT)
    if levels is not None:
        source.notices += levels.messages(trained=trained and reading.window is not None)
        if trained and reading.window is None:
            source.notices.append(Caution(f"{source.root}: has images of more than 8 bits a channel, those of training have none; are both "
                                          "stored alike?", "other-range"))


def found_in_data(config: CfgNode, source: Source, notices: list[str],
                  measure: Callable[[], tuple[list[float], list[float]]] | None = None) -> dict[str, Any]:
    """What ``source`` tells of keys that are None in the config; statistics of the channels only where no published ones fit.

    Args:
        measure: (mean, deviation) of the channels of a source that is not read by index.
    """
    data, channels, found = config.DATA, input_channels(config), {}
    if data.WINDOW is None and source.reading.window is not None:
        found["DATA.WINDOW"] = list(source.reading.window)
    if channels != 3 and (data.MEAN is None or data.STD is None):
        mean, std = measure() if measure is not None else measure_channels(source, data.TIMEOUT)
        found |= {"DATA.MEAN": data.MEAN or mean, "DATA.STD": data.STD or std}
        notices.append(Notice(f"normalised by the data's own mean {_shown(found['DATA.MEAN'])} and deviation {_shown(found['DATA.STD'])}, "
                              f"since its {channels} channel{'s are' if channels > 1 else ' is'} not ImageNet's three"))
    return found


def _shown(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


atexit.register(kill_workers)
