"""Data: finding images, augmenting them, mixing batches, and the one stream of training steps."""

from data.build import Loaders, build_loaders
from data.errors import DataError
from data.transforms import preprocessing

__all__ = ["DataError", "Loaders", "build_loaders", "preprocessing"]
