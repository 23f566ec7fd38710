"""The streams of a config: the one behind a URL, with its splits."""

from __future__ import annotations

from collections.abc import Sequence

from yacs.config import CfgNode

from config import ConfigError
from data.errors import DataError
from data.layouts.detect import beside
from data.messages import Notice
from data.sources.classes import join
from data.sources.lists import read_text
from data.streaming.huggingface import _hub
from data.streaming.stream import Stream
from data.streaming.webdataset import _shards


def open_streams(config: CfgNode, splits: Sequence[str], classes: Sequence[str] | None) -> dict[str, Stream]:
    """The streams of the splits asked for, under common class names.

    Args:
        classes: those of a checkpoint; None takes the stream's, else DATA.CLASS_NAMES, else numbers.

    Raises:
        ConfigError: a key is missing or does not go with a stream.
        DataError: it cannot be opened.
    """
    root, data = config.DATA.DATA_PATH, config.DATA
    for key, value, usual in (("DATA.SUBSET", data.SUBSET, 1.0), ("DATA.VAL_FRACTION", data.VAL_FRACTION, 0.0),
                              ("DATA.REPEATED_AUG", data.REPEATED_AUG, 1), ("DATA.ZIP_MODE", data.ZIP_MODE, False)):
        if value != usual:
            raise ConfigError(f"{key} {value} does not go with a stream ({root}); leave it at {usual}, or copy the data to a disk")
    listing = beside(data.CLASS_NAMES, ".")
    names = [line.partition("\t")[0].strip() for line in read_text(listing).splitlines() if line.strip()] if listing else []
    names = names or [str(number) for number in range(config.MODEL.NUM_CLASSES or len(classes or ()))]
    opened = {}
    for split in splits:
        if root.startswith("hf://") and data.VAL_PATH:
            raise ConfigError(f"DATA.VAL_PATH does not go with {root}, which holds both splits; leave it empty")
        path = root if split == "train" or root.startswith("hf://") else data.VAL_PATH
        if not path:
            raise ConfigError(f"{root}: is a stream of training images; give the shards of the validation images with DATA.VAL_PATH")
        stream = _hub(path, split, names) if path.startswith("hf://") else _shards(path, names)
        if not stream.classes:
            raise ConfigError(f"{path}: the stream does not name its classes; give MODEL.NUM_CLASSES, or DATA.CLASS_NAMES")
        if split == "train":
            stream.size = data.STREAM_IMAGES or stream.size
            if not stream.size:
                raise ConfigError(f"{path}: the stream does not say how many images it has; give the number of training images with "
                                  "DATA.STREAM_IMAGES")
        stream.patience, stream.exif = data.READ_PATIENCE, data.EXIF
        classes = list(classes) if classes is not None else stream.classes
        opened[split] = join(stream, classes)
        first = next(stream.records(range(len(stream.segments))), None)  # what is wrong with every image is told now
        if first is None:
            raise DataError(f"{stream.root}: holds no images; give another address")
        stream.target(first)
    if "train" in opened:
        opened["train"].notices.append(Notice(f"{root} is a stream: resume is exact to the epoch only (in its middle the images that were "
                                       "seen are read past, which is exact if the stream still has the same order)"))
    return opened
