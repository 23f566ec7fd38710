"""Errors of data that cannot be used."""

from __future__ import annotations


class DataError(RuntimeError):
    """The data cannot be used; one sentence with the path and the remedy (exit status 3)."""


class UnreadableImage(DataError):
    """One image cannot be read or decoded; ``data/loading/corrupt_images.py`` decides what follows.

    Attributes:
        path: the image's name, as a user knows it.
        reason: what the system or the decoder said.
    """

    def __init__(self, message: str, path: str = "", reason: str = ""):
        super().__init__(message)
        self.path, self.reason = path, reason

    @classmethod
    def of(cls, path: str, reason: object) -> UnreadableImage:
        """The error of one image, as a sentence."""
        words = " ".join(str(reason).split()) or type(reason).__name__
        return cls(f"{path}: not a readable image ({words}); repair or remove it", path, words)
