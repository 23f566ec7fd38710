"""The scripts that turn data into other data: what they write is what training reads, and a stopped run goes on."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, write_images
from data_helpers import CLASSES, content, image_paths, same_content, sources, write_archives
from PIL import Image


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """A script's ``main`` in this process, where importing torch anew each time would take longest."""
    def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        spec = importlib.util.spec_from_file_location(name[:-3], ROOT / "scripts" / name)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name[:-3], module)  # the processes of a pool look their work up there
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        status = module.main()
        said = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, status, said.out, said.err)
    return run


def test_unpack_imagenet(plain: Path, tmp_path: Path, script) -> None:
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    write_archives("tar of tars", plain, downloads)
    found = image_paths(plain, "val")
    with tarfile.open(downloads / "ILSVRC2012_img_val.tar", "w") as tar:
        for i, path in enumerate(found):
            tar.add(path, f"ILSVRC2012_val_{i:08d}.JPEG")
    missing = script("unpack_imagenet.py", downloads, tmp_path / "out")
    assert missing.returncode == 3 and "ILSVRC2012_devkit_t12.tar.gz" in missing.stderr
    from scipy.io import savemat
    mat = io.BytesIO()
    ids = {w: 3 - i for i, w in enumerate(CLASSES)}
    savemat(mat, {"synsets": np.array([(ids[w], w) for w in CLASSES], dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")])})
    with tarfile.open(downloads / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        for name, data in (("meta.mat", mat.getvalue()),
                           ("ILSVRC2012_validation_ground_truth.txt", "".join(f"{ids[p.parent.name]}\n" for p in found).encode())):
            info = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    done = script("unpack_imagenet.py", downloads, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    same_content(tmp_path / "out", plain)
    next((tmp_path / "out/train").glob("*/*")).write_bytes(b"cut")
    again = script("unpack_imagenet.py", downloads, tmp_path / "out")
    assert "train: 1 images written" in again.stdout and "11 there already" in again.stdout and "val: 0 images written" in again.stdout
    assert content(sources(tmp_path / "out")[0]) == content(sources(plain)[0])
    (downloads / "ILSVRC2012_img_train.tar").unlink()
    for label in ("../..", "..", "/tmp", "a/b", "a\\..\\b"):
        (downloads / "val.txt").write_text("".join(f"ILSVRC2012_val_{i:08d}.JPEG {label}\n" for i in range(5)))
        led = script("unpack_imagenet.py", downloads, tmp_path / "led/astray")
        assert led.returncode == 3 and repr(label) in led.stderr, led.stderr
        assert not (tmp_path / "led").exists()


def test_make_shards(plain: Path, tmp_path: Path, script) -> None:
    done = script("make_shards.py", plain, tmp_path / "shards", "--images", 5)
    assert done.returncode == 0, done.stderr
    same_content(tmp_path / "shards", plain)
    shards = sorted((tmp_path / "shards").glob("train-*.tar"))
    assert len(shards) == 3 and len(json.loads((tmp_path / "shards/manifest.json").read_text())["shards"]) == 4
    before = {p.name: p.read_bytes() for p in shards}
    shards[1].unlink()
    assert script("make_shards.py", plain, tmp_path / "shards", "--images", 5).returncode == 0
    assert {p.name: p.read_bytes() for p in shards} == before
    other = script("make_shards.py", plain, tmp_path / "shards", "--images", 4)
    assert other.returncode == 3 and "choose another folder" in other.stderr
    for number, name in enumerate(("a\tb", "a\nb", " a", "a\u2028b", os.fsdecode(b"a\xff"))):  # classes.txt has a line a class
        for split in ("train", "val"):
            write_images(tmp_path / str(number), split, {name: 1, "x": 1})
        refused = script("make_shards.py", tmp_path / str(number), tmp_path / "other")
        assert refused.returncode == 3 and "rename its folder" in refused.stderr and not (tmp_path / "other").exists()


def test_resize_dataset(tmp_path: Path, script) -> None:
    generator = np.random.RandomState(0)
    for split, name, size in (("train", "a/wide.png", (900, 300)), ("train", "b/small.jpg", (40, 50)), ("train", "b/tall.jpg", (300, 1200)),
                              ("val", "a/x.jpg", (400, 400)), ("val", "b/y.jpg", (256, 256))):
        path = tmp_path / "data" / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.randint(0, 255, (size[1], size[0], 3)).astype(np.uint8)).save(path)
    (tmp_path / "data/train/b/bad.jpg").write_bytes(b"<html>")
    out = tmp_path / "out"
    done = script("resize_dataset.py", tmp_path / "data", out, "--side", 256, "--workers", 2)
    assert done.returncode == 0 and "bad.jpg: not a readable image" in done.stdout and "1 images left out" in done.stdout, done
    sizes = {p.name.partition("_")[2]: Image.open(p).size for p in out.rglob("*.jpg")}
    assert sizes == {"wide.jpg": (768, 256), "small.jpg": (40, 50), "tall.jpg": (256, 1024), "x.jpg": (256, 256), "y.jpg": (256, 256)}
    kept = next(out.rglob("*small.jpg"))
    assert kept.read_bytes() == (tmp_path / "data/train/b/small.jpg").read_bytes()
    assert len(sources(out)[0]) == 3 and script("resize_dataset.py", out, "--verify").stdout.startswith("5 of 5 images are as they were")
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-3])
    assert script("resize_dataset.py", out, "--verify").returncode == 3
    kept.unlink()
    again = script("resize_dataset.py", tmp_path / "data", out, "--side", 256, "--workers", 1)
    assert "train: 1 images written" in again.stdout and kept.read_bytes() == whole
    assert script("resize_dataset.py", tmp_path / "data", out, "--side", 300).returncode == 3
    assert not list(out.rglob("*.part")) and os.path.exists(out / "manifest.jsonl")
    shutil.rmtree(out)
