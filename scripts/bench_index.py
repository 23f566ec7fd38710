"""How fast a large folder opens: first and second time, and what the list of files costs in memory.

    python scripts/bench_index.py --files 1000000

Makes empty files in a temporary folder (an inode each, no content), lists them as training does, and prints seconds for the
plain listing, the first listing with the index kept, and the next ones. With --archive it makes a tar file instead.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tarfile
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.sources.archives import scan_archives
from data.sources.base import Source
from data.sources.folder import scan_folder


def write_files(root: Path, files: int, classes: int) -> None:
    """Empty files named as ImageNet's are, dated back so that the index may be kept at once."""
    for number in range(classes):
        folder = root / f"n{number:08d}"
        folder.mkdir()
        for i in range(number, files, classes):
            os.close(os.open(folder / f"n{number:08d}_{i}.JPEG", os.O_CREAT | os.O_WRONLY))
        os.utime(folder, (1e9, 1e9))
    os.utime(root, (1e9, 1e9))


def write_tar(path: Path, files: int, classes: int) -> None:
    with tarfile.open(path, "w") as tar:
        for i in range(files):
            info = tarfile.TarInfo(f"n{i % classes:08d}/n{i % classes:08d}_{i}.JPEG")
            info.size = 8
            tar.addfile(info, io.BytesIO(b"8 bytes."))
    os.utime(path, (1e9, 1e9))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--archive", action="store_true", help="a tar file instead of a folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        begun = time.perf_counter()
        place = Path(scratch, "train.tar" if args.archive else "train")
        if args.archive:
            write_tar(place, args.files, args.classes)
        else:
            place.mkdir()
            write_files(place, args.files, args.classes)
        print(f"made {args.files} files in {args.classes} classes in {time.perf_counter() - begun:.1f} s")
        cache = os.path.join(scratch, "cache")
        for what, folder in (("listing, no index kept", None), ("first time", cache), ("second time", cache), ("third time", cache)):
            begun = time.perf_counter()
            source = scan_archives([str(place)], str(place), folder) if args.archive else scan_folder(str(place), cache=folder)
            print(f"{what:24s} {time.perf_counter() - begun:7.2f} s, {len(source)} images")
        arrays = [source.targets, source.names.blob, source.names.ends] + ([source.place] if args.archive else [])
        kept = sum(path.stat().st_size for path in Path(cache).iterdir())
        print(f"arrays {sum(a.nbytes for a in arrays) / 2**20:.0f} MiB, index on disk {kept / 2**20:.0f} MiB")
        for workers in (1, 4):
            print(f"{workers} forked processes that name every image: {private_growth(source, workers):.1f} MiB of their own each")


def private_growth(source: Source, workers: int) -> float:
    """MiB of its own memory that a forked process gains by touching every image's name and label; the largest of all."""
    pipes = []
    for _ in range(workers):
        read, write = os.pipe()
        if not os.fork():
            before = private()
            for i in range(len(source)):
                source.path(i), int(source.targets[i])
            os.write(write, str(private() - before).encode())
            os._exit(0)
        os.close(write)
        pipes.append(read)
    grown = [float(os.read(pipe, 64)) for pipe in pipes]
    for _ in range(workers):
        os.wait()
    return max(grown)


def private() -> float:
    """MiB that this process shares with no other (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1024


if __name__ == "__main__":
    main()
