"""What every layout becomes: the images of one split, by number."""

from __future__ import annotations

import errno
import hashlib
import time

import numpy as np
from PIL import Image

from data.decoding.pillow import decode
from data.errors import UnreadableImage

# What a share that comes and goes answers; the same read may succeed a moment later.
_PASSING = {errno.ENOENT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH,
            errno.ECONNRESET, errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE} | (
            {errno.EREMOTEIO} if hasattr(errno, "EREMOTEIO") else set())


class Source:
    """The images of one split; subclasses say what they are called and fetch their bytes.

    Attributes:
        root: where they lie, for messages.
        classes: class names; ``targets`` (int64, an image each) are positions in it.
        notices: lines the user should see.
        patience: seconds that a failing read is tried again for, with growing pauses.
        exif: turn images upright as their EXIF block says.
    """

    root: str
    classes: list[str]
    targets: np.ndarray
    notices: list[str]
    patience: float = 0.0
    exif: bool = False

    def __len__(self) -> int:
        return len(self.targets)

    def path(self, index: int) -> str:
        """The name of an image as a user understands it."""
        raise NotImplementedError

    def fetch(self, index: int) -> bytes:
        """The encoded image, in one try.

        Raises:
            OSError: the system's, where it was the system.
            UnreadableImage: the archive around it is damaged.
        """
        raise NotImplementedError

    def listing(self) -> bytes:
        """What tells this list of images from another, wherever it lies."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Digest of the names and labels: two lists are the same if and only if these are."""
        return hashlib.sha256(self.listing() + self.targets.tobytes()).hexdigest()

    def configure(self, exif: bool, patience: float) -> None:
        """Set how images are read."""
        self.exif, self.patience = exif, patience

    def read(self, index: int) -> bytes:
        """The encoded image.

        Raises:
            UnreadableImage: it cannot be read; the message names the file.
        """
        waited, pause = 0.0, 0.05
        while True:
            try:
                return self.fetch(index)
            except OSError as error:
                if error.errno not in _PASSING or waited >= self.patience:
                    raise UnreadableImage.of(self.path(index), error.strerror or error) from None
            pause = min(2 * pause, self.patience - waited)
            time.sleep(pause)
            waited += pause

    def load(self, index: int) -> Image.Image:
        """The image in RGB.

        Raises:
            UnreadableImage: it cannot be read or decoded; the message names the file.
        """
        return decode(self.read(index), self.path(index), self.exif)


class View(Source):
    """Some images of a source, under targets of their own."""

    def __init__(self, source: Source, indices: np.ndarray, classes: list[str], targets: np.ndarray, notices: list[str]):
        self.source, self.indices = source, indices
        self.root, self.classes, self.targets, self.notices = source.root, classes, targets, notices

    def path(self, index: int) -> str:
        return self.source.path(int(self.indices[index]))

    def listing(self) -> bytes:
        return self.source.listing() + self.indices.tobytes()

    def configure(self, exif: bool, patience: float) -> None:
        self.source.configure(exif, patience)
        super().configure(exif, patience)

    def read(self, index: int) -> bytes:
        return self.source.read(int(self.indices[index]))

    def fetch(self, index: int) -> bytes:
        return self.source.fetch(int(self.indices[index]))
