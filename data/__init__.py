"""Data: finding images, augmenting them, mixing batches, and the one stream of training steps.

From a path to batches: ``layouts`` recognises what lies there and opens it as a ``source`` (``folder``, ``archives``, ``lists``,
``flat``, ``huggingface``), ``selection`` and ``classes`` choose and number, ``index`` remembers; ``decode`` makes pixels,
``transforms`` augments, ``sampler`` says which image is where in the stream, ``guard`` and ``loader`` deal with what goes wrong,
``build`` puts it together.
"""

from data.build import Loaders, build_loaders
from data.errors import DataError
from data.transforms import preprocessing

__all__ = ["DataError", "Loaders", "build_loaders", "preprocessing"]
