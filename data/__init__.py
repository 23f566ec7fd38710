"""Data: finding images, augmenting them, mixing batches, and the one stream of training steps.

From a path to batches: ``layouts`` recognises what lies there and lists it from a ``source`` (folders, archives, lists, Hugging Face);
``loading`` says which image is where in the stream (``sampler``), fills batches (``dataset``), runs the DataLoader workers and brings
batches to the device; ``decoding`` makes pixels of bytes; ``transforms`` augments on the workers or on the device and mixes batches;
``streaming`` reads what lies behind a URL, where images have an order and no numbers; ``doctor`` looks it all over before a run.
``build`` puts it together.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from data.errors import DataError

if TYPE_CHECKING:
    from data.build import Loaders, build_loaders
    from data.transforms.build import preprocessing


__all__ = ["DataError", "Loaders", "build_loaders", "preprocessing"]

_HOME = {"Loaders": "data.build", "build_loaders": "data.build", "preprocessing": "data.transforms.build"}


def __getattr__(name: str) -> Any:
    """What needs torch, imported when it is asked for: the doctor and the scripts only read files."""
    if name not in _HOME:
        raise AttributeError(f"module 'data' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
