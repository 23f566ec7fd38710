"""Errors of data that cannot be used."""

from __future__ import annotations

from config import ProgramError


class DataError(ProgramError, RuntimeError):
    """The data cannot be used; one sentence with the path and the remedy."""

    exit_status = 3
    any_rank = True


class WorkerDied(ProgramError, RuntimeError):
    """A DataLoader worker was killed."""

    any_rank = True

    def __init__(self) -> None:
        super().__init__("a DataLoader worker was killed, mostly for lack of memory or of /dev/shm (docker: --shm-size=8g); "
                         "use fewer --num-workers")


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
