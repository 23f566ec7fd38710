"""A copy of a data set with smaller images, which decode several times as fast: class folders of JPEG files.

    python scripts/resize_dataset.py imagenet imagenet-352 --side 352 --quality 90

Reads any layout that training reads. The shorter side becomes --side (256 to 512; smaller images keep their size), by
antialiased bicubic resizing. A JPEG file that needs no resizing is copied as it is; what cannot be read is named, left out and
counted. manifest.jsonl gets a line an image: name, source, size in bytes, SHA-256. A run that was stopped goes on
where it was; --verify reads the copy again and compares every checksum.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.decoding.pillow import Reading, decode
from data.errors import DataError, UnreadableImage
from data.layouts.detect import detect_layout
from data.layouts.options import Options
from data.sources.base import Source
from data.sources.classes import match_classes
from data.sources.deep_levels import settle_reading, window_option
from utils.loggers.console import plain

MANIFEST, RECIPE = "manifest.jsonl", "recipe.json"
_source: Source | None = None  # each process's own


def set_source(source: Source) -> None:
    global _source
    _source = source


def resized(data: bytes, name: str, side: int, quality: int, reading: Reading) -> bytes:
    """An image file with its shorter side at most ``side`` pixels, as JPEG."""
    image = decode(data, name, reading)
    width, height = image.size
    if min(width, height) <= side and data[:2] == b"\xff\xd8" and not reading.exif:
        return data
    if min(width, height) > side:
        scale = side / min(width, height)
        image = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def target_name(source: Source, split: str, index: int) -> str:
    """<split>/<class>/<number>_<name>.jpg; the number keeps images apart whose names are the same."""
    stem = os.path.splitext(os.path.basename(source.path(index)))[0]
    return f"{split}/{folder_name(source.classes[source.targets[index]])}/{index:08d}_{stem[:100]}.jpg"


def folder_name(label: str) -> str:
    """A class's name as a folder's: one that leads nowhere else and is not hidden."""
    folder = label.replace("/", "_").replace("\\", "_").replace("\0", "_")
    return "_" + folder if folder.startswith((".", "__MACOSX")) else folder


def work(task: tuple[int, str, str, int, int]) -> tuple[str, str, int, str]:
    """Write one image; (name, source, size, SHA-256), or ("", source, 0, reason)."""
    index, name, root, side, quality = task
    origin = _source.path(index)
    try:
        data = resized(_source.read(index), origin, side, quality, _source.reading)
    except UnreadableImage as error:
        return "", origin, 0, error.reason
    path = os.path.join(root, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Path(path + ".part").write_bytes(data)
    os.replace(path + ".part", path)
    return name, origin, len(data), hashlib.sha256(data).hexdigest()


def read_manifest(root: str) -> dict[str, dict]:
    """The lines of the manifest by name; a line that a kill cut off does not count."""
    lines = {}
    try:
        with open(os.path.join(root, MANIFEST), encoding="utf-8") as file:
            for line in file:
                try:
                    row = json.loads(line)
                    lines[row["name"]] = row
                except (ValueError, KeyError, TypeError):
                    continue
    except FileNotFoundError:
        pass
    return lines


def verify(root: str) -> int:
    rows, bad = read_manifest(root), 0
    for name, row in rows.items():
        try:
            fine = hashlib.sha256(Path(root, name).read_bytes()).hexdigest() == row["sha256"]
        except OSError:
            fine = False
        if not fine:
            bad += 1
            print(f"warning: {plain(os.path.join(root, name))}: is not what was written; delete it and run again without --verify")
    print(f"{len(rows) - bad} of {len(rows)} images are as they were written")
    return 3 if bad or not rows else 0


def copy_split(split: str, source: Source, args: argparse.Namespace, done: dict[str, dict]) -> int:
    """Write a split's images that are not there yet; how many could not be read."""
    names = ((i, target_name(source, split, i)) for i in range(len(source)))
    tasks = [(i, name, args.output, args.side, args.quality) for i, name in names
             if name not in done or not os.path.exists(os.path.join(args.output, name))]
    begun, bad, written = time.perf_counter(), 0, 0
    for label in source.classes:
        os.makedirs(os.path.join(args.output, split, folder_name(label)), exist_ok=True)
    with (open(os.path.join(args.output, MANIFEST), "a", encoding="utf-8") as manifest,
          ProcessPoolExecutor(args.workers, initializer=set_source, initargs=(source,)) as pool):
        for number, (name, origin, size, what) in enumerate(pool.map(work, tasks, chunksize=16), 1):
            if name:
                manifest.write(json.dumps(dict(name=name, source=origin, size=size, sha256=what)) + "\n")
                written += size
            else:
                bad += 1
                print(f"warning: {plain(origin)}: not a readable image ({what}); left out", flush=True)
            if number % 2000 == 0 or number == len(tasks):
                manifest.flush()
                pace = number / (time.perf_counter() - begun)
                left = (len(tasks) - number) / pace / 60
                print(f"{split}: {number} of {len(tasks)} written, {pace:.0f} images/s, {left:.0f} min left", flush=True)
    print(f"{split}: {len(tasks) - bad} images written ({written / 2**20:.0f} MiB), {len(source) - len(tasks)} there already, "
          f"{bad} unreadable")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", help="any layout that training reads")
    parser.add_argument("output", help="folder for train/ and val/")
    parser.add_argument("--side", type=int, default=352, help="shorter side in pixels, 256 to 512")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEG files")
    parser.add_argument("--exif", action="store_true", help="turn images upright as their EXIF block says")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--val-fraction", type=float, default=0.0, help="share of each class for validation where there is no split")
    parser.add_argument("--verify", action="store_true", help="only compare the copy's checksums")
    args = parser.parse_args()
    try:
        if args.verify:
            return verify(args.output)
        if not args.data:
            raise DataError("give the data set to read and the folder to write")
        if not 256 <= args.side <= 512 or not 50 <= args.quality <= 100:
            raise DataError("--side lies between 256 and 512, --quality between 50 and 100")
        if os.path.realpath(args.output) == os.path.realpath(args.data):
            raise DataError(f"{args.output}: is the folder of the data itself; choose another one")
        layout = detect_layout(args.data, Options(val_fraction=args.val_fraction))
        train = layout.open["train"]()
        sources = {"train": train, "val": match_classes(layout.open["val"](), train.classes)}
        if any(source.labels is not None for source in sources.values()):
            raise DataError(f"{args.data}: its images have several labels each, and a folder is one class")
        if len(set(map(folder_name, train.classes))) < len(train.classes):
            raise DataError(f"{args.data}: two classes would share a folder; rename one")
        levels = settle_reading(train, Reading(args.exif), 0, 0)
        sources["val"].configure(train.reading, 0)
        for line in levels.messages() if levels is not None else []:
            print(line)
        if levels is not None:
            print(f"a model trained on this copy, which has 8 bits, sees the originals alike with --opts {window_option(levels.window)}")
        os.makedirs(args.output, exist_ok=True)
        recipe = dict(side=args.side, quality=args.quality, exif=args.exif, images={s: len(x) for s, x in sources.items()})
        path = Path(args.output, RECIPE)
        if path.exists() and json.loads(path.read_text()) != recipe:
            raise DataError(f"{path}: this copy was begun from other images or with other options; choose another folder")
        path.write_text(json.dumps(recipe))
        done = read_manifest(args.output)
        bad = sum(copy_split(split, source, args, done) for split, source in sources.items())
        print(f"{args.output} holds the copy; train on it with --data-path {args.output}" + (f" ({bad} images left out)" if bad else ""))
    except (DataError, OSError, ValueError) as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
