"""``Source``: the images of one split, by index, which every layout becomes."""

from __future__ import annotations

import errno
import hashlib
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from data.decoding.pillow import AS_STORED, Reading, decode
from data.errors import UnreadableImage

if TYPE_CHECKING:
    from data.sources.label_sets import LabelSets

# Errors of a network share that comes and goes; the same read may succeed a moment later.
_TRANSIENT = {errno.ENOENT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH,
            errno.ECONNRESET, errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE} | (
            {errno.EREMOTEIO} if hasattr(errno, "EREMOTEIO") else set())

_SAMPLED = 256  # images that a fingerprint reads: a second or two on a slow share


class Retry:
    """Growing pauses between attempts, ``patience`` seconds in all."""

    def __init__(self, patience: float):
        self.patience, self.waited, self.pause = patience, 0.0, 0.05

    def wait(self) -> bool:
        """Wait before the next attempt; False, at once, where the patience is used up."""
        if self.waited >= self.patience:
            return False
        self.pause = min(2 * self.pause, self.patience - self.waited)
        time.sleep(self.pause)
        self.waited += self.pause
        return True


class Source:
    """The images of one split; subclasses name them and fetch their bytes.

    Attributes:
        root: where they lie, for messages.
        classes: class names.
        targets: (images,) int64, positions in ``classes``; where images have several labels, the rarest one of each (the number of classes
            for an image without any), by which they are grouped.
        labels: the labels of each image where it has several of ``classes``, or none; None where each has one class.
        notices: messages for the user.
        patience: seconds for which a failing read is tried again.
        reading: how they become pixels.
        parallel: threads may read at the same time; archives share descriptors that are closed by turns.
        marks: what a list says of each image beside its class, "fold" or "group": (names, positions in them (images,) int64).
    """

    root: str
    classes: list[str]
    targets: np.ndarray
    labels: LabelSets | None = None
    notices: list[str]
    patience: float = 0.0
    reading: Reading = AS_STORED
    parallel: bool = False
    marks: Mapping[str, tuple[list[str], np.ndarray]] = {}
    _fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def path(self, index: int) -> str:
        """The name of an image, as a user knows it."""
        raise NotImplementedError

    def fetch(self, index: int) -> bytes:
        """The encoded image, in one attempt.

        Raises:
            OSError: the system cannot read it.
            UnreadableImage: the archive around it is damaged.
        """
        raise NotImplementedError

    def identity(self) -> bytes:
        """What distinguishes this list of images from another, independent of the folder it lies in."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the list of images, their labels and a sample of their bytes, independent of the folder it lies in.

        The sample tells two class folders apart that were swapped and whose files have the same names.
        """
        if self._fingerprint is None:
            labels = b"" if self.labels is None else self.labels.table.tobytes() + self.labels.which.tobytes()
            self._fingerprint = hashlib.sha256(self.identity() + self.targets.tobytes() + labels + self.sample()).hexdigest()
        return self._fingerprint

    def sample(self) -> bytes:
        """SHA-256 of the bytes of up to 256 images that lie evenly over the list."""
        digest = hashlib.sha256()
        for index in np.unique(np.linspace(0, len(self) - 1, min(len(self), _SAMPLED)).round().astype(np.int64)).tolist():
            try:
                digest.update(self.fetch(index))
            except (OSError, UnreadableImage):  # told when it is trained on
                digest.update(b"unreadable")
        return digest.digest()

    def target_of(self, index: int) -> int | np.ndarray:
        """What an image is: the position of its class, or of several labels (classes,) int8: 1, 0, or -1 for one that is not known."""
        return int(self.targets[index]) if self.labels is None else self.labels[index]

    def configure(self, reading: Reading, patience: float) -> None:
        """Set how images are read."""
        self.reading, self.patience = reading, patience

    def read(self, index: int) -> bytes:
        """The encoded image; a read that fails is tried again for ``patience`` seconds.

        Raises:
            UnreadableImage: it cannot be read; the message names the file.
        """
        retry = Retry(self.patience)
        while True:
            try:
                return self.fetch(index)
            except OSError as error:
                if error.errno not in _TRANSIENT or not retry.wait():
                    raise UnreadableImage.of(self.path(index), error.strerror or error) from None

    def load(self, index: int) -> Image.Image:
        """The image in RGB, 8 bits a channel.

        Raises:
            UnreadableImage: it cannot be read or decoded; the message names the file.
        """
        return decode(self.read(index), self.path(index), self.reading)


class View(Source):
    """Some of a source's images, with their own targets."""

    def __init__(self, source: Source, indices: np.ndarray, classes: list[str], targets: np.ndarray, notices: list[str]):
        self.source, self.indices = source, indices
        self.root, self.classes, self.targets, self.notices = source.root, classes, targets, notices
        self.reading, self.patience, self.parallel = source.reading, source.patience, source.parallel
        self.marks = {what: (names, marked[indices]) for what, (names, marked) in source.marks.items()}
        self.labels = None if source.labels is None else source.labels.take(indices)

    def path(self, index: int) -> str:
        return self.source.path(int(self.indices[index]))

    def identity(self) -> bytes:
        return self.source.identity() + self.indices.tobytes()

    def configure(self, reading: Reading, patience: float) -> None:
        self.source.configure(reading, patience)
        super().configure(reading, patience)

    def read(self, index: int) -> bytes:
        return self.source.read(int(self.indices[index]))

    def fetch(self, index: int) -> bytes:
        return self.source.fetch(int(self.indices[index]))
