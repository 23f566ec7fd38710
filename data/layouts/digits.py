"""The quick start's data: scikit-learn's 1,797 handwritten digits, written once as class folders of images."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable

import numpy as np
from PIL import Image

from data.errors import DataError

DEFAULT_PATH = "datasets/digits"
SIDE = 32  # pixels; the originals are 8 x 8, too few for random crops and shears
VAL_FRACTION = 0.2


def ensure_digits(root: str) -> bool:
    """Write ``root/{train,val}/<digit>/*.png`` unless they are there; True when this call wrote them.

    Raises:
        DataError: scikit-learn is missing, or ``root`` cannot be written.
    """
    return write_once(root, ("train", "val"), _write_digits)


def write_once(root: str, inside: tuple[str, ...], write: Callable[[str], None]) -> bool:
    """Call ``write`` with a folder that becomes ``root``, unless the folders ``inside`` are there; True when this call wrote them.

    They are written to a temporary folder, which is then renamed, so that ranks started together cannot collide and a kill
    leaves nothing incomplete.

    Raises:
        DataError: ``root`` cannot be written; whatever ``write`` raises.
    """
    def is_there() -> bool:
        return all(os.path.isdir(os.path.join(root, name)) for name in inside)

    if is_there():
        return False
    parent = os.path.dirname(os.path.abspath(root))
    try:
        os.makedirs(parent, exist_ok=True)
        scratch = tempfile.mkdtemp(prefix=f".{os.path.basename(os.path.abspath(root))}-", dir=parent)
    except OSError as error:
        raise DataError(f"{parent}: cannot be written ({error.strerror}); give your own images with --data-path") from None
    try:
        try:
            write(scratch)
            os.chmod(scratch, 0o755)
        except OSError as error:
            raise DataError(f"{scratch}: cannot be written ({error.strerror or error}); make room there") from None
        try:
            os.rename(scratch, root)
        except OSError:
            if not is_there():  # else another rank has written it
                raise DataError(f"{root}: exists without {' and '.join(f'{name}/' for name in inside)}; remove it, or give your own "
                                "images with --data-path") from None
            return False
        return True
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def load_pixels() -> tuple[np.ndarray, np.ndarray]:
    """(scikit-learn's digits (1797, 8, 8) uint8, ink white; what each is).

    Raises:
        DataError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("the handwritten digits come from scikit-learn, which is not installed; pip install -r requirements.txt, "
                        "or give your own images with --data-path") from None
    digits = load_digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target


def _write_digits(folder: str) -> None:
    pixels, targets = load_pixels()
    for split, indices in zip(("train", "val"), split_indices(targets), strict=True):
        for index in indices:
            of_class = os.path.join(folder, split, str(targets[index]))
            os.makedirs(of_class, exist_ok=True)
            image = Image.fromarray(pixels[index]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            image.save(os.path.join(of_class, f"{index:04d}.png"))


def split_indices(targets: np.ndarray) -> tuple[list[int], list[int]]:
    """(training, validation) indices of a fixed stratified split; the classes' sizes are rounded by largest remainders."""
    quota = {int(c): VAL_FRACTION * int((targets == c).sum()) for c in np.unique(targets)}
    counts = {c: int(q) for c, q in quota.items()}
    missing = math.ceil(sum(quota.values())) - sum(counts.values())
    for c in sorted(quota, key=lambda c: (counts[c] - quota[c], c))[:missing]:
        counts[c] += 1
    val: list[int] = []
    for c, count in counts.items():
        members = np.flatnonzero(targets == c)
        val += np.random.RandomState(c).permutation(members)[:count].tolist()
    chosen = set(val)
    return [i for i in range(len(targets)) if i not in chosen], sorted(val)
