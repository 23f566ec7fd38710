"""ImageNet's tar files (ILSVRC2012) to folders that training reads: train/<wnid>/*.JPEG and val/<wnid>/*.JPEG.

    python scripts/unpack_imagenet.py downloads imagenet

``downloads`` holds ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and the devkit (ILSVRC2012_devkit_t12.tar.gz, or unpacked);
either image file may be missing. Files that are there with the right size are passed over, so that a run that was stopped
goes on where it was. (Training also reads the tar files as they are: give ``downloads`` as --data-path.)
"""

from __future__ import annotations

import argparse
import glob
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.errors import DataError
from data.layouts.detect import detect_layout
from data.layouts.flat_labels import find_label_file, label_flat
from data.layouts.options import Options
from data.sources.archives import Member, members, read_at
from data.sources.packed_names import is_image
from utils.loggers.console import plain

LISTS = ("ILSVRC2012_validation_ground_truth.txt", "meta.mat")


def find(folder: str, pattern: str) -> str | None:
    return next(iter(sorted(glob.glob(os.path.join(glob.escape(folder), pattern)))), None)


def training(tar: str) -> Iterator[tuple[str, Member]]:
    """(path below the output, member) of the training images: a tar file a class inside the tar file."""
    for member in members(tar, []):
        inner, slash, name = member.name.rpartition("/")
        if slash and is_image(name):
            yield f"train/{os.path.basename(inner).removesuffix('.tar')}/{name}", member


def validation(tar: str, downloads: str) -> Iterator[tuple[str, Member]]:
    """(path below the output, member) of the validation images, by the devkit's labels."""
    from data.sources.archives import scan_archives
    source = scan_archives([tar], tar)
    with tempfile.TemporaryDirectory() as scratch:
        label_flat(source, find_label_file(downloads, "val") or ground_truth(downloads, scratch))
    wnids = {os.path.basename(source.path(i)): source.classes[source.targets[i]] for i in range(len(source))}
    for member in members(tar, []):
        name = os.path.basename(member.name)
        if name in wnids:
            yield f"val/{wnids[name]}/{name}", member


def ground_truth(downloads: str, scratch: str) -> str:
    """The label file out of the packed devkit, written to ``scratch`` with the table that it needs."""
    kit = find(downloads, "ILSVRC2012_devkit*.tar.gz") or find(downloads, "ILSVRC2012_devkit*.tar")
    if kit is None:
        raise DataError(f"{downloads}: the validation labels are in ILSVRC2012_devkit_t12.tar.gz, which is not there")
    try:
        with tarfile.open(kit) as tar:
            for member in tar:
                name = os.path.basename(member.name)
                if member.isreg() and name in LISTS and member.size < 1 << 26:
                    Path(scratch, name).write_bytes(tar.extractfile(member).read())
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{kit}: a damaged tar file ({error})") from None
    return os.path.join(scratch, LISTS[0])


def write(tar: str, found: Iterator[tuple[str, Member]], root: str) -> tuple[int, int]:
    """(written, there already); a file appears under its name only when it is whole."""
    written = there = 0
    descriptor = os.open(tar, os.O_RDONLY)
    try:
        for path, member in found:
            label = path.partition("/")[2].rpartition("/")[0]
            if label in ("", ".", "..") or set("/\\\0") & set(label):
                raise DataError(f"{tar}: {member.name} has the label {label!r}, which is no folder's name; mend that")
            target = os.path.join(root, path)
            if os.path.exists(target) and os.path.getsize(target) == member.size:
                there += 1
            else:
                data = read_at(descriptor, member.offset, member.size)
                if len(data) < member.size:
                    raise DataError(f"{tar}: ends before {member.name} does; copy it again")
                os.makedirs(os.path.dirname(target), exist_ok=True)
                Path(target + ".part").write_bytes(data)
                os.replace(target + ".part", target)
                written += 1
            if (written + there) % 10_000 == 0:
                print(f"{tar}: {written} written, {there} there already", flush=True)
    finally:
        os.close(descriptor)
    return written, there


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("downloads", help="folder with the tar files")
    parser.add_argument("output", help="folder for train/ and val/")
    args = parser.parse_args()
    try:
        train, val = find(args.downloads, "*img_train*.tar"), find(args.downloads, "*img_val*.tar")
        if train is None and val is None:
            raise DataError(f"{args.downloads}: holds neither ILSVRC2012_img_train.tar nor ILSVRC2012_img_val.tar")
        for split, tar in (("val", val), ("train", train)):
            if tar is None:
                print(f"{split}: no tar file in {args.downloads}, left out")
                continue
            written, there = write(tar, training(tar) if split == "train" else validation(tar, args.downloads), args.output)
            print(f"{split}: {written} images written to {args.output}, {there} there already")
        splits = [split for split, tar in (("train", train), ("val", val)) if tar]
        layout = detect_layout(args.output, Options(), splits)
        for split in splits:
            source = layout.open[split]()
            print(f"{split}: {len(source)} images in {len(source.classes)} classes")
    except (DataError, OSError) as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
