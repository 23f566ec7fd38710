"""Data: finding images, augmenting them, mixing batches, and the one stream of training steps.

From a path to batches: ``layouts`` recognises what lies there and opens it as a ``source`` (``folder``, ``archives``, ``lists``,
``flat``, ``huggingface``), ``selection`` and ``classes`` choose and number, ``index`` remembers. ``sampler`` says which image is where
in the stream; ``images`` fills a batch with them row by row, each made by a ``pipeline``: ``decode`` and timm's ``transforms``, or
faster ``jpeg`` and ``resize``, with ``draws`` of timm's numbers that ``randaugment`` carries out in the loading process or
``device_augment`` on the device. ``guard`` stands in for what cannot be read, ``loader`` runs the processes and names what goes
wrong, ``stream`` brings batches to the device, ``mixup`` mixes them; ``build`` puts it together; ``doctor`` looks it all over before a
run. ``streams`` opens what lies behind a URL and ``stream_batches`` makes steps of it: there images have no numbers, only an order.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from data.errors import DataError

if TYPE_CHECKING:
    from data.build import Loaders, build_loaders
    from data.transforms import preprocessing

__all__ = ["DataError", "Loaders", "build_loaders", "preprocessing"]

_HOME = {"Loaders": "data.build", "build_loaders": "data.build", "preprocessing": "data.transforms"}


def __getattr__(name: str) -> Any:
    """What needs torch, imported when it is asked for: the doctor and the scripts only read files."""
    if name not in _HOME:
        raise AttributeError(f"module 'data' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
