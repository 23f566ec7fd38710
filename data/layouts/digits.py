"""The quick start's data: scikit-learn's 1,797 handwritten digits, written once as class folders of images."""

from __future__ import annotations

import math
import os
import shutil
import tempfile

import numpy as np
from PIL import Image

from data.errors import DataError

DEFAULT_PATH = "datasets/digits"
SIDE = 32  # pixels; the originals are 8 x 8, too few for random crops and shears
VAL_FRACTION = 0.2


def ensure_digits(root: str) -> bool:
    """Write ``root/{train,val}/<digit>/*.png`` unless they are there; True when this call wrote them.

    They are written to a temporary folder, which is then renamed, so that ranks started together cannot collide and a kill
    leaves nothing incomplete.

    Raises:
        DataError: scikit-learn is missing, or ``root`` cannot be written.
    """
    if os.path.isdir(os.path.join(root, "train")) and os.path.isdir(os.path.join(root, "val")):
        return False
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(f"{root}: the digits come from scikit-learn, which is not installed; "
                        "pip install -r requirements.txt, or give your own images with --data-path") from None
    parent = os.path.dirname(os.path.abspath(root))
    try:
        os.makedirs(parent, exist_ok=True)
        scratch = tempfile.mkdtemp(prefix=".digits-", dir=parent)
    except OSError as error:
        raise DataError(f"{parent}: cannot be written ({error.strerror}); give your own images with --data-path") from None
    try:
        digits = load_digits()
        for split, indices in zip(("train", "val"), _split_indices(digits.target), strict=True):
            for index in indices:
                folder = os.path.join(scratch, split, str(digits.target[index]))
                os.makedirs(folder, exist_ok=True)
                pixels = np.round(digits.images[index] * (255 / 16)).astype(np.uint8)
                image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                image.save(os.path.join(folder, f"{index:04d}.png"))
        os.chmod(scratch, 0o755)
        try:
            os.rename(scratch, root)
        except OSError:
            if not os.path.isdir(os.path.join(root, "val")):  # else another rank has written it
                raise DataError(f"{root}: exists without train/ and val/; remove it, or give your own images "
                                "with --data-path") from None
            return False
        return True
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _split_indices(targets: np.ndarray) -> tuple[list[int], list[int]]:
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
