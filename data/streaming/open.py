"""Opens the streams that a config names by URL."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from yacs.config import CfgNode

from config import ConfigError
from data.decoding.pillow import Reading, decode_stored
from data.errors import DataError, UnreadableImage
from data.layouts.options import resolve_data_file
from data.messages import Notice
from data.sources.classes import match_classes
from data.sources.deep_levels import FIRST_LOOK, Sample, levels_of, sample
from data.sources.lists import read_text
from data.streaming.huggingface import open_hub_stream
from data.streaming.stream import Record, Stream
from data.streaming.webdataset import open_shard_stream


def open_streams(config: CfgNode, splits: Sequence[str], classes: Sequence[str] | None) -> dict[str, Stream]:
    """The streams of the splits asked for, under common class names.

    Args:
        classes: those of a checkpoint; None takes the stream's, else DATA.CLASS_NAMES, else numbers.

    Raises:
        ConfigError: a key is missing or cannot be used with a stream.
        DataError: a stream cannot be opened, or has no images.
    """
    root, data = config.DATA.DATA_PATH, config.DATA
    for key, value, default in (("DATA.SUBSET", data.SUBSET, 1.0), ("DATA.VAL_FRACTION", data.VAL_FRACTION, 0.0),
                                ("DATA.FOLD", data.FOLD, ""), ("DATA.REPEATED_AUG", data.REPEATED_AUG, 1),
                                ("DATA.SAMPLING", data.SAMPLING, "natural"), ("DATA.ZIP_MODE", data.ZIP_MODE, False)):
        if value != default:
            raise ConfigError(f"{key} {value} cannot be used with a stream ({root}); leave it at {default!r}, or copy the data to a disk")
    class_file = resolve_data_file(data.CLASS_NAMES, ".")
    names = [line.partition("\t")[0].strip() for line in read_text(class_file).splitlines() if line.strip()] if class_file else []
    names = names or [str(number) for number in range(config.MODEL.NUM_CLASSES or len(classes or ()))]
    opened = {}
    for split in splits:
        if root.startswith("hf://") and data.VAL_PATH:
            raise ConfigError(f"DATA.VAL_PATH cannot be used with {root}, which holds both splits; leave it empty")
        path = root if split == "train" or root.startswith("hf://") else data.VAL_PATH
        if not path:
            raise ConfigError(f"{root}: is a stream of training images; give the shards of the validation images with DATA.VAL_PATH")
        judged = config.TEST.SPLIT if list(splits) == ["val"] else split
        if judged != split and not path.startswith("hf://"):
            raise ConfigError(f"TEST.SPLIT is {judged}, but a stream of shards has no names of splits; give the shards to evaluate with "
                              "DATA.VAL_PATH")
        stream = open_hub_stream(path, judged, names) if path.startswith("hf://") else open_shard_stream(path, names)
        if not stream.classes:
            raise ConfigError(f"{path}: the stream does not name its classes; give MODEL.NUM_CLASSES, or DATA.CLASS_NAMES")
        if split == "train":
            stream.size = data.STREAM_IMAGES or stream.size
            if not stream.size:
                raise ConfigError(f"{path}: the stream does not say how many images it has; give the number of training images with "
                                  "DATA.STREAM_IMAGES")
        stream.configure(Reading.of(config), data.READ_PATIENCE)
        classes = list(classes) if classes is not None else stream.classes
        opened[split] = match_classes(stream, classes)
        first = next(stream.records(range(len(stream.segments))), None)  # a fault of every image stops the program now
        if first is None:
            raise DataError(f"{stream.root}: holds no images; give another address")
        stream.target(first)
        if len(opened) == 2:
            stream.configure(opened["train"].reading, data.READ_PATIENCE)
        else:
            _settle_reading(stream, first)
    if "train" in opened:
        opened["train"].notices.append(Notice(f"{root} is a stream: resume is exact to the epoch only (within an epoch the images that "
                                              "were seen are skipped, which is exact if the stream still has the same order)"))
    return opened


def _settle_reading(stream: Stream, first: Record) -> None:
    """Where a stream begins with an image of more than 8 bits, and no window is given, take that of the images it begins with."""
    if stream.reading.window is not None or _sample(first, stream.reading.channels) is None:
        return
    records = islice(stream.records(range(len(stream.segments))), FIRST_LOOK)
    levels = levels_of(found for record in records if (found := _sample(record, stream.reading.channels)) is not None)
    if levels is not None:
        stream.reading = stream.reading._replace(window=levels.window)
        stream.notices += levels.messages()


def _sample(record: Record, channels: int) -> Sample | None:
    try:
        stored = decode_stored(record.data, record.name, channels)
    except UnreadableImage:
        return None
    return sample(stored) if stored is not None else None
