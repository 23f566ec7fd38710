"""Data: finding images, reading and augmenting them, and batching them into the one stream of training steps.

From a path to batches: ``layouts`` detects how the data is laid out and lists its images from ``sources`` (folders, archives, lists,
Hugging Face data sets); ``loading`` has the sampler, the dataset, the DataLoader with its workers, and brings batches to the
device; ``decoding`` turns bytes into pixels; ``transforms`` augments, on the workers or on the device, and mixes batches;
``streaming`` reads data behind a URL, which can only be read in order; ``doctor`` checks a data set before a run. ``build`` puts
the loaders together.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from data.errors import DataError

if TYPE_CHECKING:
    from data.build import Loaders, build_loaders
    from data.transforms.build import preprocessing


__all__ = ["DataError", "Loaders", "build_loaders", "preprocessing"]

_LAZY = {"Loaders": "data.build", "build_loaders": "data.build", "preprocessing": "data.transforms.build"}


def __getattr__(name: str) -> Any:
    """Import what needs torch only when it is used: the doctor and the scripts only read files."""
    if name not in _LAZY:
        raise AttributeError(f"module 'data' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
