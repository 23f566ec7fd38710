"""Any data set that training reads, as WebDataset shards: few large files instead of a million small ones.

    python scripts/make_shards.py imagenet shards

Writes <split>-000000.tar, ... with a <key>.jpg (or the file's own ending) and a <key>.cls (number of the class) for each image, in
a shuffled order that --seed fixes, and classes.txt, a class a line. The images' bytes are copied as they are. A shard appears
under its name only when it is whole; shards that are there are kept, so that a run that was stopped goes on where it was.
manifest.json lists every shard with its SHA-256, and what it was made from.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.errors import DataError
from data.layouts.detect import detect_layout
from data.layouts.options import Options
from data.sources.base import Source
from data.sources.classes import match_classes
from utils.loggers.console import plain


def shards_of(source: Source, seed: int, size: int) -> list[np.ndarray]:
    """The images of each shard: a shuffled order, cut where ``images`` are reached."""
    order = np.random.RandomState(seed).permutation(len(source))
    return np.array_split(order, max(1, -(-len(source) // size)))


def write_shard(source: Source, indices: np.ndarray, path: str) -> str:
    """Write a shard; its SHA-256."""
    scratch = path + ".part"
    with tarfile.open(scratch, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in indices.tolist():
            suffix = os.path.splitext(source.path(index))[1].lower() or ".jpg"
            suffix = ".jpg" if suffix == ".jpeg" else suffix
            for name, data in ((f"{index:08d}{suffix}", source.read(index)), (f"{index:08d}.cls", str(source.targets[index]).encode())):
                info = tarfile.TarInfo(name)
                info.size, info.mode = len(data), 0o644
                tar.addfile(info, io.BytesIO(data))
    digest = sha256(scratch)
    os.replace(scratch, path)
    return digest


def class_lines(classes: Sequence[str]) -> str:
    """The text of classes.txt: a name a line, in the order of the labels.

    Raises:
        DataError: a name that reading cuts, which would give every later class another's name.
    """
    for name in classes:
        read = name.encode("utf-8", "ignore").decode().partition("\t")[0].strip()
        if read != name or name.splitlines() != [name]:
            raise DataError(f"class {name!r} has a tab, a line break, blanks at its ends or is not UTF-8, which classes.txt cannot hold; "
                            "rename its folder")
    return "".join(name + "\n" for name in classes)


def sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="any layout that training reads")
    parser.add_argument("output", help="folder for the shards")
    parser.add_argument("--images", type=int, default=2000, help="images a shard, at most (2000 are about 220 MB of ImageNet)")
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument("--val-fraction", type=float, default=0.0, help="share of each class for validation where there is no split")
    args = parser.parse_args()
    manifest_path = os.path.join(args.output, "manifest.json")
    try:
        if os.path.realpath(args.output) == os.path.realpath(args.data):
            raise DataError(f"{args.output}: is the folder of the data itself; choose another one")
        layout = detect_layout(args.data, Options(val_fraction=args.val_fraction))
        train = layout.open["train"]()
        sources = {"train": train, "val": match_classes(layout.open["val"](), train.classes)}
        if any(source.labels is not None for source in sources.values()):
            raise DataError(f"{args.data}: its images have several labels each, and a shard's image has one class")
        names = class_lines(train.classes)
        content = hashlib.sha256("\n".join(train.classes).encode()).hexdigest()
        made_from = dict(images={split: len(source) for split, source in sources.items()}, classes=content, images_a_shard=args.images,
                         seed=args.seed)
        os.makedirs(args.output, exist_ok=True)
        manifest = dict(made_from=made_from, shards={})
        if os.path.exists(manifest_path):
            manifest = json.loads(Path(manifest_path).read_text())
            if manifest.get("made_from") != made_from:
                raise DataError(f"{manifest_path}: these shards were made from other images or with other options; choose another folder")
        Path(args.output, "classes.txt").write_text(names, encoding="utf-8", newline="\n")
        for split, source in sources.items():
            parts = shards_of(source, args.seed, args.images)
            for number, indices in enumerate(parts):
                name = f"{split}-{number:06d}.tar"
                path = os.path.join(args.output, name)
                if manifest["shards"].get(name) is None or not os.path.exists(path):
                    manifest["shards"][name] = write_shard(source, indices, path)
                    Path(manifest_path + ".part").write_text(json.dumps(manifest, indent=1))
                    os.replace(manifest_path + ".part", manifest_path)
                print(f"{split}: shard {number + 1} of {len(parts)}", flush=True)
    except (DataError, OSError, ValueError) as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
