"""Where a command's files may go: the one place that decides it, for every command. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator

from yacs.config import CfgNode

from config import ConfigError, history, lookup
from data.layouts.options import SPLIT_NAMES, resolve_data_file
from data.sources.packed_names import is_image
from utils.loggers.metrics_files import CONFIG, RECORDS
from utils.runtime.files import require_outputs

# Keys that name files which commands read.
_READ = ("MODEL.RESUME", "MODEL.PRETRAINED", "COMPARE.FILES", "SHOW.ATTENTION", "TEST.LABELS", "TEST.REAL_LABELS", "DATA.DATA_PATH",
         "PREDICT.PATHS", "REPORT.RUNS")
_READ_OF_THE_DATA = ("DATA.CLASS_NAMES", "DATA.VAL_LABELS", "TEST.LABELS")
_CHECKPOINTS = (".pth", ".pt", ".ckpt", ".bin")
_SPLITS = {name for names in SPLIT_NAMES.values() for name in names}
_ARCHIVES = (".tar", ".zip", ".parquet", ".arrow")
_LISTS = re.compile(rf"(?:^|.*[^a-z])(?:{'|'.join([*_SPLITS, 'labels?', 'classes', 'solution', 'ground_truth', 'metadata'])})(?:[^a-z].*)?"
                    r"\.(?:csv|tsv|txt|jsonl?|mat|cls)", re.IGNORECASE)


def check_outputs(config: CfgNode, outputs: Iterable[tuple[str, str]], inputs: Iterable[str] = ()) -> None:
    """Decide, before long work, whether a command may write its files (``utils.runtime.files.require_outputs``).

    What the config names is not overwritten, nor are the images of its data, nor a run's checkpoints and records.

    Args:
        outputs: (key, path) of each file; empty paths are passed over.
        inputs: files that the command reads, beyond those that the config names.

    Raises:
        ConfigError: an output may not be written.
    """
    outputs = [(key, os.path.expanduser(path)) for key, path in outputs if path]
    require_outputs(outputs, _inputs(config, inputs))
    for key, path in outputs:
        if os.path.isfile(path) and (what := _precious(config, os.path.realpath(path))):
            raise ConfigError(f"{key} is {path}; {what} would be overwritten; give another file")


def _inputs(config: CfgNode, more: Iterable[str]) -> Iterator[str]:
    for key in _READ:
        value = lookup(config, key)
        yield from (os.path.expanduser(path) for path in (value if isinstance(value, list) else [value]) if path)
    for path in map(os.path.expanduser, (config.MODEL.RESUME, config.MODEL.PRETRAINED)):
        if os.path.isdir(path) or path.endswith(".safetensors"):  # an exported model, two files of a folder
            folder = path if os.path.isdir(path) else os.path.dirname(path)
            yield from (os.path.join(folder, name) for name in ("model.safetensors", "config.json"))
    for key in _READ_OF_THE_DATA:
        yield resolve_data_file(lookup(config, key), config.DATA.DATA_PATH)
    sources = {source.removeprefix("base ").rpartition(":")[0] for values in history(config).values() for source, _ in values}
    yield from filter(None, sources)  # YAML files
    yield from more


def _precious(config: CfgNode, path: str) -> str:
    """What an existing file is that no command overwrites; "" where it is none."""
    folder, name = os.path.split(path)
    if os.path.isfile(os.path.join(folder, CONFIG)) and (name in RECORDS or name.endswith(_CHECKPOINTS)):
        return "a record of a run"
    root = os.path.expanduser(config.DATA.DATA_PATH)
    for place in (root, *(os.path.join(root, name) for name in _SPLITS)) if os.path.isdir(root) else ():
        below = os.path.relpath(path, os.path.realpath(place)).split(os.sep)
        image = is_image(name) and (place != root or len(below) > 1)  # those loose in the data's own folder are none of its images
        if below[0] != os.pardir and (image or name.lower().endswith(_ARCHIVES) or _LISTS.fullmatch(name)):
            return f"a file of the data {root}"
    return ""
