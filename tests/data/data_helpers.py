"""What the tests of data/ share: configs and loaders, the content of sources, encoded images, and archives of every kind."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from config import get_config
from data import build_loaders

CLASSES = ["n01440764", "n01443537", "n02102040"]  # those of the fixture ``plain``


def config_for(root: Path, *opts: object):
    base = {"DATA.DATA_PATH": root, "DATA.IMG_SIZE": 32, "DATA.BATCH_SIZE": 8, "DATA.NUM_WORKERS": 0, "DATA.INDEX_CACHE": "none",
            "DATA.READ_PATIENCE": 0, "TRAIN.EPOCHS": 21}
    return get_config(None, [str(part) for pair in base.items() for part in pair] + [str(part) for part in opts])


def sources(root: Path, *opts: object):
    """(training source, validation source, loaders)."""
    loaders = build_loaders(config_for(root, *opts))
    return loaders.train.dataset.source, loaders.val.dataset.source, loaders


def content(source) -> list[tuple[str, bytes]]:
    """(class, bytes) of every image, sorted."""
    return sorted((source.classes[source.targets[i]], source.read(i)) for i in range(len(source)))


def same_content(root: Path, plain: Path, *opts: object):
    """Assert that both splits have the images and classes of ``plain``; returns the loaders."""
    train, val, loaders = sources(root, *opts)
    expected = sources(plain)
    assert loaders.classes == CLASSES and content(train) == content(expected[0]) and content(val) == content(expected[1])
    return loaders


def same_batches(some, others) -> None:
    """Assert that two lists of (images, targets) are equal, bit for bit."""
    for (images, targets), (other_images, other_targets) in zip(some, others, strict=True):
        assert torch.equal(images, other_images) and torch.equal(targets, other_targets)


def first_batches(config, start: int, count: int) -> list:
    """``count`` training batches from step ``start`` on."""
    loaders = build_loaders(config, splits=("train",))
    batches = loaders.batches(start)
    found = [next(batches) for _ in range(count)]
    loaders.close()
    return found


def encoded(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png_bomb(width: int, height: int) -> bytes:
    """A small PNG whose header promises an enormous picture."""
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def texture(height: int, width: int, seed: int = 0) -> Image.Image:
    y, x = np.mgrid[:height, :width] / (9 + seed)
    noise = np.random.RandomState(seed).randint(0, 30, (height, width, 3))
    return Image.fromarray((np.stack([110 + 80 * np.sin(x + k) * np.cos(y * (k + 1)) for k in range(3)], -1) + noise).astype(np.uint8))


def exif(order: str, orientation: int) -> bytes:
    """An EXIF block in the byte order ``<`` or ``>``."""
    mark = dict(zip("<>", (b"II", b"MM"), strict=True))[order]
    return b"Exif\0\0" + mark + struct.pack(order + "HIHHHIHHI", 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def image_paths(root: Path, split: str) -> list[Path]:
    return sorted((root / split).glob("*/*"))


def tar_bytes(members: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.write_bytes(tar_bytes(members))


def damages(whole: bytes) -> dict[str, tuple[bytes, int]]:
    """Ways a tar is spoiled: (what is left of it, the byte that the message names)."""
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        members = tar.getmembers()
    middle, last = members[len(members) // 2], members[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    flipped = bytearray(whole)
    flipped[middle.offset + 5] ^= 16
    return {"a bit of a header": (bytes(flipped), middle.offset), "cut in a header": (whole[:middle.offset + 100], middle.offset),
            "cut at a member's end": (whole[:middle.offset], middle.offset), "cut in a member": (whole[:last.offset_data + 9], end),
            "cut before the end marker": (whole[:end], end), "half an end marker": (whole[:end + 512], end),
            "two joined": (whole + whole, end), "something behind": (whole + b"x", end), "empty": (b"", 0)}


def write_zip(path: Path, members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in members:
            file.writestr(name, data)


ARCHIVES = ("tar", "tar with a top folder", "tar of tars", "a tar a class", "zip", "zip deflated", "zip with maps", "shards",
            "shards with json", "shards in folders")


def write_archives(kind: str, plain: Path, root: Path) -> None:
    """``plain``'s two splits as archives in ``root``."""
    for split in ("train", "val"):
        paths = image_paths(plain, split)
        named = [(f"{p.parent.name}/{p.name}", p.read_bytes()) for p in paths]
        if kind == "tar":
            write_tar(root / f"{split}.tar", named)
        elif kind == "tar with a top folder":
            write_tar(root / f"{split}.tar", [(f"./{split}/{name}", data) for name, data in named])
        elif kind == "tar of tars":
            inner = {c: tar_bytes([(f"{c}_{p.name}", p.read_bytes()) for p in paths if p.parent.name == c]) for c in CLASSES}
            write_tar(root / f"ILSVRC2012_img_{split}.tar", [(f"{c}.tar", data) for c, data in inner.items()])
        elif kind == "a tar a class":
            (root / split).mkdir()
            for c in CLASSES:
                write_tar(root / split / f"{c}.tar", [(p.name, p.read_bytes()) for p in paths if p.parent.name == c])
        elif kind in ("zip", "zip deflated"):
            method = zipfile.ZIP_DEFLATED if kind == "zip deflated" else zipfile.ZIP_STORED
            write_zip(root / f"{split}.zip", [(f"{split}/{name}", data) for name, data in named], method)
        elif kind == "zip with maps":
            write_zip(root / f"{split}.zip", [*named, ("n01440764/unlisted.jpg", b"x")])
            lines = "".join(f"{name}\t{CLASSES.index(name.split('/')[0])}\r\n" for name, _ in named)
            (root / f"{split}_map.txt").write_bytes(b"\xef\xbb\xbf" + lines.encode())
        else:
            for shard in range(3):
                members = []
                for i, path in list(enumerate(paths))[shard::3]:
                    label, key = CLASSES.index(path.parent.name), f"x/{i:06d}"
                    members.append((f"{key}{path.suffix}", path.read_bytes()))
                    if kind == "shards with json":
                        members.append((f"{key}.json", json.dumps(dict(label=label, width=48)).encode()))
                    else:
                        members += [(f"{key}.cls", str(label).encode()), (f"{key}.json", b'{"width": 48}'), (f"{key}.mask.png", b"x")]
                place = root / split / f"{shard:05d}.tar" if kind == "shards in folders" else root / f"imagenet1k-{split}-{shard:04d}.tar"
                place.parent.mkdir(exist_ok=True)
                write_tar(place, members)
            (root / "classes.txt").write_text("".join(c + "\n" for c in CLASSES))


class Operations(TorchDispatchMode):
    """Counts what a GPU would be told to do by torch: everything but views and allocations."""

    NOTHING = frozenset({"empty", "slice", "select", "view", "expand", "permute", "detach", "alias", "lift_fresh", "unbind", "unsqueeze"})

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ not in self.NOTHING:
            self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))
