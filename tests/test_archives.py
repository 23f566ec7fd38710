"""Images in tar and zip archives are the same images; damage and traps are named, and nothing is written anywhere."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL, differences, load, write_images

from config import get_config
from data import DataError, build_loaders
from data.sources.archives import scan_archives

CLASSES = ["n01440764", "n01443537", "n02102040"]


def config_for(root: Path, *opts: object):
    return get_config(None, ["DATA.DATA_PATH", str(root), "DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "4", "DATA.NUM_WORKERS", "0",
                             "DATA.INDEX_CACHE", "none", "TRAIN.EPOCHS", "21", *map(str, opts)])


def sources(root: Path, *opts: object):
    loaders = build_loaders(config_for(root, *opts))
    return loaders.train.dataset.folder, loaders.val.dataset.folder, loaders


def content(source) -> list[tuple[str, bytes]]:
    return sorted((source.classes[source.targets[i]], source.read(i)) for i in range(len(source)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plain")
    write_images(root, "train", dict.fromkeys(CLASSES, 4))
    write_images(root, "val", dict.fromkeys(CLASSES, 2), seed=1)
    return root


def images(plain: Path, split: str) -> list[Path]:
    return sorted((plain / split).glob("*/*"))


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def bytes_of_tar(members: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def write_archives(kind: str, plain: Path, root: Path) -> None:
    for split in ("train", "val"):
        found = images(plain, split)
        named = [(f"{p.parent.name}/{p.name}", p.read_bytes()) for p in found]
        if kind == "tar":
            tar_of(root / f"{split}.tar", named)
        elif kind == "tar with a top folder":
            tar_of(root / f"{split}.tar", [(f"./{split}/{name}", data) for name, data in named])
        elif kind == "tar of tars":
            inner = {c: bytes_of_tar([(f"{c}_{p.name}", p.read_bytes()) for p in found if p.parent.name == c]) for c in CLASSES}
            tar_of(root / f"ILSVRC2012_img_{split}.tar", [(f"{c}.tar", data) for c, data in inner.items()])
        elif kind == "a tar a class":
            (root / split).mkdir()
            for c in CLASSES:
                tar_of(root / split / f"{c}.tar", [(p.name, p.read_bytes()) for p in found if p.parent.name == c])
        elif kind in ("zip", "zip deflated"):
            method = zipfile.ZIP_DEFLATED if kind == "zip deflated" else zipfile.ZIP_STORED
            with zipfile.ZipFile(root / f"{split}.zip", "w", method) as file:
                for name, data in named:
                    file.writestr(f"{split}/{name}", data)
        elif kind == "zip with maps":
            with zipfile.ZipFile(root / f"{split}.zip", "w") as file:
                for name, data in named:
                    file.writestr(name, data)
                file.writestr("n01440764/unlisted.jpg", b"x")
            lines = "".join(f"{name}\t{CLASSES.index(name.split('/')[0])}\r\n" for name, _ in named)
            (root / f"{split}_map.txt").write_bytes(b"\xef\xbb\xbf" + lines.encode())
        elif kind in ("shards", "shards with json", "shards in folders"):
            (root / split).mkdir(exist_ok=True)
            for shard in range(3):
                members = []
                for i, path in list(enumerate(found))[shard::3]:
                    label = CLASSES.index(path.parent.name)
                    key = f"x/{i:06d}"
                    members.append((f"{key}{path.suffix}", path.read_bytes()))
                    if kind == "shards with json":
                        members.append((f"{key}.json", json.dumps(dict(label=label, width=48)).encode()))
                    else:
                        members += [(f"{key}.cls", str(label).encode()), (f"{key}.json", b'{"width": 48}'), (f"{key}.mask.png", b"x")]
                place = root / split / f"{shard:05d}.tar" if kind == "shards in folders" else root / f"imagenet1k-{split}-{shard:04d}.tar"
                tar_of(place, members)
            if kind != "shards in folders":
                (root / split).rmdir()
            (root / "classes.txt").write_text("".join(c + "\n" for c in CLASSES))


KINDS = ("tar", "tar with a top folder", "tar of tars", "a tar a class", "zip", "zip deflated", "zip with maps", "shards",
         "shards with json", "shards in folders")


@pytest.mark.parametrize("kind", KINDS)
def test_archives_hold_the_same_images(plain: Path, tmp_path: Path, kind: str) -> None:
    write_archives(kind, plain, tmp_path)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    train, val, loaders = sources(tmp_path)
    folder_train, folder_val, _ = sources(plain)
    assert loaders.classes == CLASSES and content(train) == content(folder_train) and content(val) == content(folder_val)
    assert train.load(0).size == (48, 40) and str(tmp_path) in train.path(0)
    assert train.fingerprint() == sources(tmp_path)[0].fingerprint() != val.fingerprint()
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before
    if kind.startswith("zip"):
        assert content(sources(tmp_path, "DATA.ZIP_MODE", True)[0]) == content(folder_train)
    if kind in ("zip", "tar with a top folder"):
        (tmp_path / "more").mkdir()
        one = tmp_path / "more" / ("all.zip" if kind == "zip" else "all.tar")
        members = [(f"data/{s}/{p.parent.name}/{p.name}", p.read_bytes()) for s in ("train", "val") for p in images(plain, s)]
        if kind == "zip":
            with zipfile.ZipFile(one, "w") as file:
                for name, data in members:
                    file.writestr(name, data)
        else:
            tar_of(one, members)
        train, val, _ = sources(one)
        assert content(train) == content(folder_train) and content(val) == content(folder_val)


def test_flat_validation_tar_with_a_label_file(plain: Path, tmp_path: Path) -> None:
    write_archives("tar of tars", plain, tmp_path)
    found = images(plain, "val")
    (tmp_path / "ILSVRC2012_img_val.tar").unlink()
    tar_of(tmp_path / "ILSVRC2012_img_val.tar", [(f"ILSVRC2012_val_{i:08d}.JPEG", p.read_bytes()) for i, p in enumerate(found)])
    with pytest.raises(DataError, match=r"img_val\.tar: its images lie loose, .*DATA.VAL_LABELS"):
        sources(tmp_path)
    (tmp_path / "imagenet_2012_validation_synset_labels.txt").write_text("".join(p.parent.name + "\n" for p in found))
    train, val, loaders = sources(tmp_path)
    assert loaders.classes == CLASSES and content(val) == content(sources(plain)[1])


def test_shards_without_split_and_string_labels(plain: Path, tmp_path: Path) -> None:
    found = images(plain, "train")
    members = [m for i, p in enumerate(found) for m in ((f"{i}.jpg", p.read_bytes()), (f"{i}.cls", p.parent.name.encode() + b"\n"))]
    tar_of(tmp_path / "shard-0.tar", members)
    train, val, loaders = sources(tmp_path, "DATA.VAL_FRACTION", 0.25)
    assert loaders.classes == CLASSES and sorted(content(train) + content(val)) == content(sources(plain)[0]) and len(val) == 3
    tar_of(tmp_path / "shard-1.tar", [("9.jpg", b"x"), ("8.jpg", b"x"), ("8.cls", b"3")])
    with pytest.raises(DataError, match=r"shard-1\.tar/9\.jpg: has no label"):
        sources(tmp_path, "DATA.VAL_FRACTION", 0.25)
    tar_of(tmp_path / "shard-1.tar", [("9.jpg", b"x"), ("9.cls", b"")])
    with pytest.raises(DataError, match=r"shard-1\.tar/9\.cls: holds no label"):
        sources(tmp_path, "DATA.VAL_FRACTION", 0.25)


def test_webdataset_reads_the_same_samples(plain: Path, tmp_path: Path) -> None:
    """The reference reader agrees on what a shard holds."""
    webdataset = pytest.importorskip("webdataset")
    write_archives("shards", plain, tmp_path)
    urls = sorted(str(p) for p in tmp_path.glob("*train*.tar"))
    reference = [(CLASSES[int(s["cls"])], s.get("jpg") or s.get("png")) for s in webdataset.WebDataset(urls, shardshuffle=False)]
    assert sorted(reference) == content(sources(tmp_path)[0])


@pytest.mark.parametrize("kind", ["tar of tars", "zip deflated"])
def test_workers_and_resume_from_archives_are_exact(plain: Path, tmp_path: Path, kind: str, program) -> None:
    write_archives(kind, plain, tmp_path)
    streams = []
    for workers, start in ((0, 0), (2, 2)):
        loaders = build_loaders(config_for(tmp_path, "DATA.NUM_WORKERS", workers), splits=("train",))
        batches = loaders.batches(start)
        streams.append([next(batches) for _ in range(6 - start)])
        loaders.close()
    for (xa, ya), (xb, yb) in zip(streams[0][2:], streams[1], strict=True):
        assert torch.equal(xa, xb) and torch.equal(ya, yb)
    if kind == "tar of tars":
        cfg = tmp_path / "tiny.yaml"
        cfg.write_text(f"DATA: {{DATA_PATH: '{tmp_path}', IMG_SIZE: 32, BATCH_SIZE: 4, NUM_WORKERS: 0, INDEX_CACHE: none}}\n{TINY_MODEL}"
                       "TRAIN: {EPOCHS: 2, WARMUP_EPOCHS: 0, BASE_LR: 0.05, SAVE_EVERY_STEPS: 2, KEEP_CHECKPOINTS: 0}\n")
        assert program("--cfg", cfg).returncode == 0
        folder = program.folder / "output/tiny"
        again = program("--cfg", cfg, "--resume", folder / "default/ckpt_00000002.pth", "--tag", "b", "--num-workers", 1)
        assert again.returncode == 0 and not differences(load(folder / "default/last.pth")["model"], load(folder / "b/last.pth")["model"])


def test_damaged_archives_are_named(plain: Path, tmp_path: Path) -> None:
    write_archives("tar", plain, tmp_path)
    whole = (tmp_path / "train.tar").read_bytes()
    for data, words in ((whole[:len(whole) // 2], r"train\.tar"), (b"", r"train\.tar"), (b"no archive" * 200, r"train\.tar: a damaged tar"),
                        (b"\x1f\x8b" + bytes(600), r"train\.tar: is compressed as a whole \(gzip\)")):
        (tmp_path / "train.tar").write_bytes(data)
        with pytest.raises(DataError, match=words):
            train = sources(tmp_path)[0]
            for i in range(len(train)):
                train.read(i)
    (tmp_path / "train.tar").unlink()
    for data in (b"", b"PK\x03\x04 nothing", b"no archive"):
        (tmp_path / "train.zip").write_bytes(data)
        with pytest.raises(DataError, match=r"train\.zip: a damaged zip"):
            sources(tmp_path)


def test_bad_crc_counts_as_an_unreadable_image(plain: Path, tmp_path: Path) -> None:
    for kind in ("zip", "zip deflated"):
        write_archives(kind, plain, tmp_path)
        with zipfile.ZipFile(tmp_path / "train.zip") as file:
            info = file.infolist()[3]
        data = bytearray((tmp_path / "train.zip").read_bytes())
        data[info.header_offset + 30 + len(info.filename) + info.compress_size // 2] ^= 1
        (tmp_path / "train.zip").write_bytes(data)
        loaders = build_loaders(config_for(tmp_path, "DATA.CORRUPT_BUDGET", 3), splits=("train",))
        batches = loaders.batches()
        for _ in range(3):
            next(batches)
        assert [os.path.basename(f.path) for f in loaders.train.failures] == [os.path.basename(info.filename)]
        assert kind == "zip deflated" or "checksum (CRC) is wrong" in loaders.train.failures[0].reason


def test_an_archive_cut_after_it_was_listed(plain: Path, tmp_path: Path) -> None:
    write_archives("tar", plain, tmp_path)
    train = sources(tmp_path)[0]
    last = len(train) - 1
    os.truncate(tmp_path / "train.tar", int(train.place[last, 1]) + 10)
    with pytest.raises(DataError, match="the archive ends before it"):
        train.read(last)
    assert train.load(0).size == (48, 40)


def test_an_archive_on_a_share_that_comes_back_is_opened_anew(plain: Path, tmp_path: Path, monkeypatch) -> None:
    write_archives("tar", plain, tmp_path)
    source, real, opened = scan_archives([str(tmp_path / "train.tar")], "x"), os.open, []
    source.configure(exif=False, patience=1.0)
    whole = source.read(0)
    stale = iter([OSError(116, "Stale file handle")])
    monkeypatch.setattr(os, "open", lambda *a, **k: opened.append(a[0]) or real(*a, **k))
    from data.sources import archives
    read = archives.read_at
    monkeypatch.setattr(archives, "read_at", lambda *a: (_ for _ in ()).throw(error) if (error := next(stale, None)) else read(*a))
    assert source.read(0) == whole and opened == [str(tmp_path / "train.tar")]


def test_names_that_lead_outside_links_and_bombs_are_passed_over(plain: Path, tmp_path: Path) -> None:
    write_archives("tar", plain, tmp_path)
    picture = images(plain, "train")[0].read_bytes()
    for name in ("../../evil.jpg", "/tmp/evil.jpg", "n01440764/../../evil.jpg", "C:/evil.jpg"):
        with tarfile.open(tmp_path / "train.tar", "a") as tar:
            info = tarfile.TarInfo(name)
            info.size = len(picture)
            tar.addfile(info, io.BytesIO(picture))
    with tarfile.open(tmp_path / "train.tar", "a") as tar:
        for name, kind in (("link.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE), ("pipe.jpg", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(f"n01440764/{name}")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in ("n01440764/._0.jpg", "__MACOSX/n01440764/0.jpg", ".hidden/0.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    train, val, loaders = sources(tmp_path)
    assert content(train) == content(sources(plain)[0])
    assert any("4 members whose names lead outside are passed over (../../evil.jpg" in line for line in loaders.notices)
    assert any("3 members that are links" in line for line in loaders.notices)


def test_zip_bombs_unpack_to_no_more_than_they_say(plain: Path, tmp_path: Path) -> None:
    write_archives("zip", plain, tmp_path)
    with zipfile.ZipFile(tmp_path / "train.zip", "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("train/n01440764/bomb.bmp", bytes(20_000_000))
    data = (tmp_path / "train.zip").read_bytes()
    true = (20_000_000).to_bytes(4, "little")
    (tmp_path / "train.zip").write_bytes(data.replace(true, (1000).to_bytes(4, "little")))  # lies about its size
    train = sources(tmp_path)[0]
    bomb = next(i for i in range(len(train)) if train.path(i).endswith("bomb.bmp"))
    tracemalloc.start()
    with pytest.raises(DataError, match="checksum"):
        train.read(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000
    (tmp_path / "train.zip").write_bytes(data.replace(true, (0xF0000000).to_bytes(4, "little")))
    loaders = sources(tmp_path)[2]
    assert any("1 members too large to be images are passed over (train/n01440764/bomb.bmp)" in line for line in loaders.notices)


def test_bad_maps_name_the_line(plain: Path, tmp_path: Path) -> None:
    write_archives("zip with maps", plain, tmp_path)
    lines = (tmp_path / "train_map.txt").read_text(encoding="utf-8-sig").splitlines()
    for at, bad, words in ((2, "n01440764/gone.jpg\t0", r"train_map\.txt:3: n01440764/gone\.jpg is not in"),
                           (4, "nothing", r"train_map\.txt:5: has no label"),
                           (1, lines[1].split("\t")[0] + "\tdog", r"train_map\.txt:2: the label 'dog' is no number")):
        (tmp_path / "train_map.txt").write_text("\n".join([*lines[:at], bad, *lines[at + 1:]]))
        with pytest.raises(DataError, match=words):
            sources(tmp_path)


def test_swin_maps_of_a_flat_validation_archive(plain: Path, tmp_path: Path) -> None:
    write_archives("zip with maps", plain, tmp_path)
    with zipfile.ZipFile(tmp_path / "val.zip", "w") as file:
        for i, path in enumerate(images(plain, "val")):
            file.writestr(f"ILSVRC2012_val_{i:08d}.JPEG", path.read_bytes())
    (tmp_path / "val_map.txt").write_text("".join(f"ILSVRC2012_val_{i:08d}.JPEG\t{CLASSES.index(p.parent.name)}\n"
                                                  for i, p in enumerate(images(plain, "val"))))
    train, val, loaders = sources(tmp_path)
    assert loaders.classes == CLASSES and content(val) == content(sources(plain)[1])
    assert any("taken for positions among the 3 classes" in line for line in loaders.notices)


def test_index_of_archives_is_kept_until_they_change(plain: Path, tmp_path: Path, monkeypatch) -> None:
    from data.sources import archives
    from data.sources import index_cache as index
    monkeypatch.setattr(index, "WORTH_KEEPING", 5)
    write_archives("shards", plain, tmp_path)
    files = sorted(str(p) for p in tmp_path.glob("*train*.tar"))
    for path in files:
        os.utime(path, (1e9, 1e9))
    listed = []
    real = archives._index
    monkeypatch.setattr(archives, "_index", lambda *a: listed.append(a) or real(*a))
    first = content(scan_archives(files, "x", str(tmp_path / "cache")))
    assert content(scan_archives(files, "x", str(tmp_path / "cache"))) == first and len(listed) == 1
    shutil.copy(files[0], files[1])
    os.utime(files[1], (1e9, 1e9 + 5))
    assert len(scan_archives(files, "x", str(tmp_path / "cache"))) != 0 and len(listed) == 2


def test_many_shards_need_few_open_files(plain: Path, tmp_path: Path) -> None:
    data = images(plain, "train")[0].read_bytes()
    for i in range(40):
        tar_of(tmp_path / f"train-{i:04d}.tar", [("0.jpg", data), ("0.cls", b"0")])
    source = scan_archives(sorted(str(p) for p in tmp_path.glob("*.tar")), "x")
    before = len(os.listdir("/proc/self/fd"))
    for i in [*range(40), 3, 39]:
        assert source.read(i) == data
    assert len(os.listdir("/proc/self/fd")) - before <= 16
    del source
    assert len(os.listdir("/proc/self/fd")) <= before


def test_sources_are_small_and_travel_to_other_processes(plain: Path, tmp_path: Path) -> None:
    import pickle
    write_archives("zip", plain, tmp_path)
    source = sources(tmp_path)[0]
    source.read(0)
    assert content(pickle.loads(pickle.dumps(source))) == content(source)
    assert source.place.dtype == np.int64 and source.names.blob.dtype == np.uint8
