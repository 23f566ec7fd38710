"""Sources of images: folders, archives of every kind, and the index cache; damage and traps are named, and nothing is written anywhere."""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
import subprocess
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_MODEL, differences, load, write_images
from data_helpers import (
    ARCHIVES,
    CLASSES,
    config_for,
    content,
    damages,
    first_batches,
    image_paths,
    same_batches,
    same_content,
    sources,
    write_archives,
    write_tar,
    write_zip,
)

from data import DataError, build_loaders
from data.decoding.pillow import AS_STORED
from data.sources import archives, folder, index_cache
from data.sources.archives import scan_archives
from data.sources.folder import scan_folder

# --------------------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------------------

def test_what_counts_as_class_and_image(tmp_path: Path) -> None:
    write_images(tmp_path, "train", {"b": 2, "a b": 1, "ü": 1})
    for name in (".ipynb_checkpoints/x.png", "__MACOSX/b/a.jpg", ".git/x.png", "b/._1.png", "b/Thumbs.db", "b/desktop.ini", "b/notes.txt",
                 "b/.hidden.png", "b/.ipynb_checkpoints/0.jpg", "readme.txt"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_bytes(b"x")
    (tmp_path / "train/empty").mkdir()
    os.rename(tmp_path / "train/b/1.png", tmp_path / "train/b/1.PNG")
    found = scan_folder(str(tmp_path / "train"))
    assert found.classes == ["a b", "b", "empty", "ü"] and found.targets.tolist() == [0, 1, 1, 3]
    assert [os.path.basename(found.path(i)) for i in range(4)] == ["0.jpg", "0.jpg", "1.PNG", "0.jpg"]
    assert found.load(3).size == (48, 40)
    assert ["1 empty class folders (empty)" in line for line in found.notices if line.code == "empty-classes"] == [True]
    (tmp_path / "train/b/0.jpg").write_text("<html>")
    with pytest.raises(DataError, match=r"train/b/0\.jpg: not a readable image"):
        found.load(1)
    for circle in ("train/b/self.png", "train/self"):
        (tmp_path / circle).symlink_to(os.path.basename(circle))
        with pytest.raises(DataError, match=f"{circle}: .*remove it"):
            scan_folder(str(tmp_path / "train"))
        (tmp_path / circle).unlink()  # the remedy
        assert len(scan_folder(str(tmp_path / "train"))) == 4


def test_a_file_that_comes_back_is_waited_for(tmp_path: Path, monkeypatch) -> None:
    write_images(tmp_path, "train", {"a": 2})
    source = scan_folder(str(tmp_path / "train"))
    away, path = tmp_path / "away", Path(source.path(0))
    path.rename(away)
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    source.configure(AS_STORED, patience=2.0)
    with pytest.raises(DataError, match=r"0\.jpg: not a readable image \(No such file"):
        source.load(0)
    assert sum(pauses) == pytest.approx(2.0) and pauses == sorted(pauses[:-1]) + pauses[-1:] and len(pauses) > 3
    monkeypatch.setattr(time, "sleep", lambda seconds: away.rename(path))
    assert source.load(0).size == (48, 40)
    monkeypatch.setattr(source, "fetch", lambda index: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    monkeypatch.setattr(time, "sleep", pauses.append)
    with pytest.raises(DataError, match="Input/output error"):
        source.read(0)


def test_fingerprints_tell_lists_apart_wherever_they_lie(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "copy")
    first, copy = sources(plain), sources(tmp_path / "copy")
    assert first[0].fingerprint() == copy[0].fingerprint() != first[1].fingerprint()
    part = [sources(root, "DATA.SUBSET", 0.5)[0].fingerprint() for root in (plain, tmp_path / "copy")]
    assert part[0] == part[1] != first[0].fingerprint() and sources(plain, "DATA.SUBSET", 0.5, "SEED", 1)[0].fingerprint() != part[0]
    os.rename(tmp_path / "copy/train/n01440764/0.jpg", tmp_path / "copy/train/n01440764/9.jpg")
    assert sources(tmp_path / "copy")[0].fingerprint() != first[0].fingerprint()


# --------------------------------------------------------------------------------------------------
# Archives
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ARCHIVES)
def test_archives_hold_the_same_images(plain: Path, tmp_path: Path, kind: str) -> None:
    write_archives(kind, plain, tmp_path)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    loaders = same_content(tmp_path, plain)
    train, val = loaders.train.dataset.source, loaders.val.dataset.source
    assert train.load(0).size == (48, 40) and str(tmp_path) in train.path(0)
    assert train.fingerprint() == sources(tmp_path)[0].fingerprint() != val.fingerprint()
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before
    if kind.startswith("zip"):
        same_content(tmp_path, plain, "DATA.ZIP_MODE", True)
    if kind in ("zip", "tar with a top folder"):
        (tmp_path / "more").mkdir()
        one = tmp_path / "more" / ("all.zip" if kind == "zip" else "all.tar")
        members = [(f"data/{s}/{p.parent.name}/{p.name}", p.read_bytes()) for s in ("train", "val") for p in image_paths(plain, s)]
        (write_zip if kind == "zip" else write_tar)(one, members)
        same_content(one, plain)


def test_flat_validation_tar_with_a_label_file(plain: Path, tmp_path: Path) -> None:
    write_archives("tar of tars", plain, tmp_path)
    found = image_paths(plain, "val")
    write_tar(tmp_path / "ILSVRC2012_img_val.tar", [(f"ILSVRC2012_val_{i:08d}.JPEG", p.read_bytes()) for i, p in enumerate(found)])
    with pytest.raises(DataError, match=r"img_val\.tar: .*DATA.VAL_LABELS"):
        sources(tmp_path)
    (tmp_path / "imagenet_2012_validation_synset_labels.txt").write_text("".join(p.parent.name + "\n" for p in found))
    same_content(tmp_path, plain)


def test_shards_without_split_and_string_labels(plain: Path, tmp_path: Path) -> None:
    found = image_paths(plain, "train")
    members = [m for i, p in enumerate(found) for m in ((f"{i}.jpg", p.read_bytes()), (f"{i}.cls", p.parent.name.encode() + b"\n"))]
    write_tar(tmp_path / "shard-0.tar", members)
    train, val, loaders = sources(tmp_path, "DATA.VAL_FRACTION", 0.25)
    assert loaders.classes == CLASSES and sorted(content(train) + content(val)) == content(sources(plain)[0]) and len(val) == 3
    write_tar(tmp_path / "shard-1.tar", [("9.jpg", b"x"), ("8.jpg", b"x"), ("8.cls", b"3")])
    with pytest.raises(DataError, match=r"shard-1\.tar/9\.jpg: "):
        sources(tmp_path, "DATA.VAL_FRACTION", 0.25)
    write_tar(tmp_path / "shard-1.tar", [("9.jpg", b"x"), ("9.cls", b"")])
    with pytest.raises(DataError, match=r"shard-1\.tar/9\.cls: "):
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
    whole, later = (first_batches(config_for(tmp_path, "DATA.BATCH_SIZE", 4, "DATA.NUM_WORKERS", workers), start, 6 - start)
                    for workers, start in ((0, 0), (2, 2)))
    same_batches(whole[2:], later)
    if kind == "tar of tars":
        cfg = tmp_path / "tiny.yaml"
        cfg.write_text(f"DATA: {{DATA_PATH: '{tmp_path}', IMG_SIZE: 32, BATCH_SIZE: 4, NUM_WORKERS: 0, INDEX_CACHE: none}}\n{TINY_MODEL}"
                       "TRAIN: {EPOCHS: 2, WARMUP_EPOCHS: 0, BASE_LR: 0.05, SAVE_EVERY_STEPS: 2, KEEP_CHECKPOINTS: 0}\n")
        assert program("--cfg", cfg).returncode == 0
        folder = program.folder / "output/tiny"
        again = program("--cfg", cfg, "--resume", folder / "default/ckpt_00000002.pth", "--tag", "b", "--num-workers", 1)
        assert again.returncode == 0 and not differences(load(folder / "default/last.pth")["model"], load(folder / "b/last.pth")["model"])


@pytest.mark.parametrize("kind", ["tar", "tar of tars"])
def test_an_archive_is_whole_or_damaged(kind: str, plain: Path, tmp_path: Path, program) -> None:
    write_archives(kind, plain, tmp_path)
    path = next(tmp_path.glob("*train*.tar"))
    whole = path.read_bytes()
    for how, (data, place) in damages(whole).items():
        path.write_bytes(data)
        inside = kind == "tar of tars" and how == "cut in a member"  # the tar file in it is cut first
        with pytest.raises(DataError, match=rf"{path.name}: a damaged tar file at byte {'[0-9]+' if inside else place},"):
            pytest.fail(f"{how}: {len(sources(tmp_path)[0])} images")
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        at = tar.getmembers()[1].offset_data if kind == "tar of tars" else tar.getmembers()[1].offset
    path.write_bytes(whole[:at] + b"\0" + whole[at + 1:])  # of the second header, or of one of the tar file in it
    done = program("--doctor", "--data-path", tmp_path)
    assert done.returncode == 3 and f"at byte {at}" in done.stdout, done.stdout + done.stderr
    if kind == "tar" and shutil.which("tar"):  # the remedy for two that were joined
        write_tar(tmp_path / "more.tar", [("n01440764/more.png", b"x")])
        path.write_bytes(whole)
        subprocess.run(["tar", "--concatenate", "--file", path, tmp_path / "more.tar"], check=True)
        (tmp_path / "more.tar").unlink()
        assert len(sources(tmp_path)[0]) == 13


def test_damaged_archives_are_named(plain: Path, tmp_path: Path) -> None:
    write_archives("zip", plain, tmp_path)
    whole = (tmp_path / "train.zip").read_bytes()
    for data, words in ((b"no archive" * 200, r"train\.tar: .*damaged"), (b"\x1f\x8b" + bytes(600), r"train\.tar: .*gzip")):
        (tmp_path / "train.tar").write_bytes(data)
        with pytest.raises(DataError, match=words):
            scan_archives([str(tmp_path / "train.tar")], "all")
    (tmp_path / "train.tar").unlink()
    for data in (b"", b"PK\x03\x04 nothing", b"no archive", whole[:-1], whole + whole, whole + whole[:999]):
        (tmp_path / "train.zip").write_bytes(data)
        with pytest.raises(DataError, match=r"train\.zip: .*damaged"):
            sources(tmp_path)
    (tmp_path / "train.zip").write_bytes(b"#!/bin/sh\n" + whole)  # a self-extracting one
    assert len(sources(tmp_path)[0]) == 12


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, None])
def test_zip_files_that_cannot_be_read_say_why(method: int | None, plain: Path, tmp_path: Path) -> None:
    """Packed in another way, or encrypted."""
    for split in ("train", "val"):
        write_zip(tmp_path / f"{split}.zip", [(f"{split}/{p.parent.name}/{p.name}", p.read_bytes()) for p in image_paths(plain, split)],
                  method or zipfile.ZIP_STORED)
    if method is None:
        for path in tmp_path.glob("*.zip"):
            content = bytearray(path.read_bytes())
            for mark, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
                for found in re.finditer(re.escape(mark), bytes(content)):
                    content[found.start() + flags] |= 1
            path.write_bytes(content)
    for root in (tmp_path, tmp_path / "train.zip"):
        with pytest.raises(DataError, match=f"{'encrypted' if method is None else 'neither stored nor deflated'}.*pack it again"):
            sources(root)


def test_a_zip_directory_with_another_name_is_no_label(plain: Path, tmp_path: Path) -> None:
    """One bit in the directory moves an image to another class; the name beside the image knows better."""
    write_archives("zip", plain, tmp_path)
    path = tmp_path / "train.zip"
    data, name = bytearray(path.read_bytes()), b"train/n01443537/1"
    data[data.rindex(name) + len(b"train/n0144")] ^= 1  # n01443537 -> n01442537
    path.write_bytes(data)
    source = sources(tmp_path)[0]
    wrong = [i for i in range(len(source)) if "n01442537" in source.path(i)]
    assert len(wrong) == 1
    with pytest.raises(DataError, match="zip directory"):
        source.read(wrong[0])
    assert all(source.read(i) for i in range(len(source)) if i not in wrong)


def test_bad_crc_counts_as_an_unreadable_image(plain: Path, tmp_path: Path) -> None:
    for kind in ("zip", "zip deflated"):
        write_archives(kind, plain, tmp_path)
        with zipfile.ZipFile(tmp_path / "train.zip") as file:
            info = file.infolist()[3]
        data = bytearray((tmp_path / "train.zip").read_bytes())
        data[info.header_offset + 30 + len(info.filename) + info.compress_size // 2] ^= 1
        (tmp_path / "train.zip").write_bytes(data)
        loaders = build_loaders(config_for(tmp_path, "DATA.BATCH_SIZE", 4, "DATA.CORRUPT_BUDGET", 3), splits=("train",))
        batches = loaders.batches()
        for _ in range(3):
            next(batches)
        assert [os.path.basename(f.path) for f in loaders.train.failures] == [os.path.basename(info.filename)]
        assert kind == "zip deflated" or "CRC" in loaders.train.failures[0].reason


def test_an_archive_cut_after_it_was_listed(plain: Path, tmp_path: Path) -> None:
    write_archives("tar", plain, tmp_path)
    train = sources(tmp_path)[0]
    last = len(train) - 1
    os.truncate(tmp_path / "train.tar", int(train.place[last, 1]) + 10)
    with pytest.raises(DataError, match=re.escape(train.path(last))):
        train.read(last)
    assert train.load(0).size == (48, 40)


def test_an_archive_on_a_share_that_comes_back_is_opened_again(plain: Path, tmp_path: Path, monkeypatch) -> None:
    write_archives("tar", plain, tmp_path)
    source, real, opened = scan_archives([str(tmp_path / "train.tar")], "x"), os.open, []
    source.configure(AS_STORED, patience=1.0)
    whole = source.read(0)
    stale = iter([OSError(116, "Stale file handle")])
    monkeypatch.setattr(os, "open", lambda *a, **k: opened.append(a[0]) or real(*a, **k))
    read = archives.read_at
    monkeypatch.setattr(archives, "read_at", lambda *a: (_ for _ in ()).throw(error) if (error := next(stale, None)) else read(*a))
    assert source.read(0) == whole and opened == [str(tmp_path / "train.tar")]


def test_names_that_lead_outside_and_links_are_skipped(plain: Path, tmp_path: Path) -> None:
    write_archives("tar", plain, tmp_path)
    picture = image_paths(plain, "train")[0].read_bytes()
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
    notices = same_content(tmp_path, plain).notices
    assert any("4 members" in line and "../../evil.jpg" in line for line in notices)
    assert any("3 members" in line and "links" in line for line in notices)


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
    with pytest.raises(DataError, match="CRC"):
        train.read(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000
    (tmp_path / "train.zip").write_bytes(data.replace(true, (0xF0000000).to_bytes(4, "little")))
    loaders = sources(tmp_path)[2]
    assert any("1 members too large" in line and "train/n01440764/bomb.bmp" in line for line in loaders.notices)


def test_bad_maps_name_the_line(plain: Path, tmp_path: Path) -> None:
    write_archives("zip with maps", plain, tmp_path)
    lines = (tmp_path / "train_map.txt").read_text(encoding="utf-8-sig").splitlines()
    for at, bad, words in ((2, "n01440764/gone.jpg\t0", r"train_map\.txt:3: n01440764/gone\.jpg"),
                           (4, "nothing", r"train_map\.txt:5: "),
                           (1, lines[1].split("\t")[0] + "\tdog", r"train_map\.txt:2: .*'dog'")):
        (tmp_path / "train_map.txt").write_text("\n".join([*lines[:at], bad, *lines[at + 1:]]))
        with pytest.raises(DataError, match=words):
            sources(tmp_path)


def test_swin_maps_of_a_flat_validation_archive(plain: Path, tmp_path: Path) -> None:
    write_archives("zip with maps", plain, tmp_path)
    named = {f"ILSVRC2012_val_{i:08d}.JPEG": path for i, path in enumerate(image_paths(plain, "val"))}
    write_zip(tmp_path / "val.zip", [(name, path.read_bytes()) for name, path in named.items()])
    (tmp_path / "val_map.txt").write_text("".join(f"{name}\t{CLASSES.index(p.parent.name)}\n" for name, p in named.items()))
    assert any("positions among the 3 classes" in line for line in same_content(tmp_path, plain).notices)


def test_many_shards_need_few_open_files(plain: Path, tmp_path: Path) -> None:
    data = image_paths(plain, "train")[0].read_bytes()
    for i in range(40):
        write_tar(tmp_path / f"train-{i:04d}.tar", [("0.jpg", data), ("0.cls", b"0")])
    source = scan_archives(sorted(str(p) for p in tmp_path.glob("*.tar")), "x")
    before = len(os.listdir("/proc/self/fd"))
    for i in [*range(40), 3, 39]:
        assert source.read(i) == data
    assert len(os.listdir("/proc/self/fd")) - before <= 16
    del source
    assert len(os.listdir("/proc/self/fd")) <= before


def test_sources_are_small_and_travel_to_other_processes(plain: Path, tmp_path: Path) -> None:
    write_archives("zip", plain, tmp_path)
    source = sources(tmp_path)[0]
    source.read(0)
    assert content(pickle.loads(pickle.dumps(source))) == content(source)
    assert source.place.dtype == np.int64 and source.names.blob.dtype == np.uint8


# --------------------------------------------------------------------------------------------------
# The index cache
# --------------------------------------------------------------------------------------------------

class Canary:
    """Pickled code: unpickling it makes a folder."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_index_of_a_large_folder_is_kept_and_noticed_when_it_changes(plain: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(index_cache, "MIN_CACHED_IMAGES", 5)
    root, cache = tmp_path / "data", tmp_path / "cache"
    shutil.copytree(plain / "train", root)
    os.utime(root)

    def age() -> None:
        for path in (root, *root.rglob("*")):
            if path.is_dir():
                os.utime(path, (1e9, 1e9))

    listed = []
    real = folder._index_folder
    monkeypatch.setattr(folder, "_index_folder", lambda place: listed.append(place) or real(place))
    expected = content(folder.scan_folder(str(root), cache=str(cache)))
    assert len(listed) == 1 and not list(cache.glob("*"))  # changed a moment ago: not to be trusted yet
    age()
    for _ in range(3):
        assert content(folder.scan_folder(str(root), cache=str(cache))) == expected
    assert len(listed) == 2 and len(list(cache.glob("*.npz"))) == 1
    (root / "n01440764/0.jpg").rename(root / "n01440764/new.jpg")
    found = folder.scan_folder(str(root), cache=str(cache))
    assert len(listed) == 3 and any(found.path(i).endswith("new.jpg") for i in range(len(found)))
    age()
    folder.scan_folder(str(root), cache=str(cache))
    kept, = cache.glob("*.npz")
    spoiled = bytearray(kept.read_bytes())
    entry = spoiled.index(b"PK\x01\x02")
    spoiled[entry + 10] = 99  # no such method of compression
    for damage in (b"", b"PK\x03\x04 nonsense", kept.read_bytes()[:-40], bytes(spoiled)):
        kept.write_bytes(damage)
        before = len(listed)
        assert len(folder.scan_folder(str(root), cache=str(cache))) == 12 and len(listed) == before + 1
    pickled = io.BytesIO()
    np.savez(pickled, targets=np.array([Canary(tmp_path / "canary")], dtype=object))
    kept.write_bytes(pickled.getvalue())
    assert len(folder.scan_folder(str(root), cache=str(cache))) == 12 and not (tmp_path / "canary").exists()
    (tmp_path / "file").write_text("")
    assert len(folder.scan_folder(str(root), cache=str(tmp_path / "file/below"))) == 12  # an unwritable cache is no error


def test_where_indices_are_kept(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert index_cache.cache_folder("auto") == str(tmp_path / "hierarchical-transformers")
    assert index_cache.cache_folder("none") is None and index_cache.cache_folder(str(tmp_path / "x")) == str(tmp_path / "x")


def test_index_of_archives_is_kept_until_they_change(plain: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(index_cache, "MIN_CACHED_IMAGES", 5)
    write_archives("shards", plain, tmp_path)
    files = sorted(str(p) for p in tmp_path.glob("*train*.tar"))
    for path in files:
        os.utime(path, (1e9, 1e9))
    listed = []
    real = archives._index_archives
    monkeypatch.setattr(archives, "_index_archives", lambda *a: listed.append(a) or real(*a))
    first = content(scan_archives(files, "x", str(tmp_path / "cache")))
    assert content(scan_archives(files, "x", str(tmp_path / "cache"))) == first and len(listed) == 1
    shutil.copy(files[0], files[1])
    os.utime(files[1], (1e9, 1e9 + 5))
    assert len(scan_archives(files, "x", str(tmp_path / "cache"))) != 0 and len(listed) == 2
