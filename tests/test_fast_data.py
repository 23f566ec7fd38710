"""The loader's fast paths on real files: decoding, resizing, odd files, whole runs; Pillow and timm are the measure."""

from __future__ import annotations

import importlib.util
import io
import multiprocessing
import re
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, differences, environment, load
from PIL import Image

from config import get_config
from data import build_loaders
from data.decoding import jpeg
from data.decoding.resize import MODES, needed, resize_crop, resize_window
from data.sources.folder import scan_folder
from data.transforms.build import build_eval_transform, preprocessing
from data.transforms.pipeline import EvalPipeline, PillowPipeline


def texture(height: int, width: int, number: int = 0) -> Image.Image:
    y, x = np.mgrid[:height, :width] / (9 + number)
    noise = np.random.RandomState(number).randint(0, 30, (height, width, 3))
    return Image.fromarray((np.stack([110 + 80 * np.sin(x + k) * np.cos(y * (k + 1)) for k in range(3)], -1) + noise).astype(np.uint8))


def encoded(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.fixture(params=["simplejpeg", "torchvision"])
def decoder(request, monkeypatch) -> str:
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg")
    else:
        monkeypatch.setattr(jpeg, "simplejpeg", None)
    return request.param


STATE = ("model", "ema", "optimizer", "step", "best")
PLAIN = [dict(quality=90, subsampling=0), dict(quality=75, subsampling=2), dict(quality=85, subsampling=1),
         dict(quality=90, progressive=True), dict(quality=90, restart_marker_blocks=3), dict(quality=90, optimize=True)]


@pytest.mark.parametrize("options", PLAIN)
def test_decoding_gives_pillows_bytes_whole_and_in_part(options, decoder, capfd) -> None:
    for image in (texture(150, 190), texture(37, 41), texture(100, 120).convert("L")):
        data = encoded(image, **options)
        header, expected = jpeg.read_header(data), by_pillow(data)
        assert (header.width, header.height) == image.size and header.sequential == (not options.get("progressive"))
        assert np.array_equal(jpeg.decode(data, header), expected)
        for rows in (1, 8, 17, 33, 90, 149):
            part = jpeg.decode(data, header, rows)
            rows = min(rows, len(expected))
            assert len(part) >= rows and np.array_equal(part[:rows], expected[:rows])
    assert capfd.readouterr().err == ""  # libjpeg would tell of the bytes that are passed over


def test_fewer_rows_take_less_time() -> None:
    data = encoded(texture(1200, 800), quality=95)
    header = jpeg.read_header(data)
    assert len(jpeg.decode(data, header, 100)) < 120
    times = {rows: min(_seconds(lambda rows=rows: jpeg.decode(data, header, rows)) for _ in range(5)) for rows in (100, 1200)}
    assert times[100] < 0.5 * times[1200]


def _seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def exif(order: str, orientation: int) -> bytes:
    mark = dict(zip("<>", (b"II", b"MM"), strict=True))[order]
    return b"Exif\0\0" + mark + struct.pack(order + "HIHHHIHHI", 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def test_what_is_not_plain_is_left_to_pillow(decoder) -> None:
    image = texture(60, 80)
    good = encoded(image)
    png = io.BytesIO()
    image.save(png, "PNG")
    for data in (b"", b"\xff\xd8", png.getvalue(), b"<html>", good[:200], encoded(image.convert("CMYK"))):
        assert jpeg.read_header(data) is None
    upright = [encoded(image, exif=exif("<", 1)), encoded(image, exif=exif(">", 1)), encoded(image, comment=b"x" * 3000)]
    turned = [encoded(image, exif=exif("<", 6)), encoded(image, exif=exif(">", 3)), encoded(image, xmp=b'<x tiff:Orientation="6"/>'),
              encoded(image, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")]
    for data in upright + turned:
        assert np.array_equal(jpeg.decode(data, jpeg.read_header(data), 20)[:20], by_pillow(data)[:20])
        assert jpeg.read_header(data).upright == (data in upright)
    assert jpeg.decode(good[:len(good) // 2], jpeg.read_header(good), 5) is None  # damaged, whatever rows are asked for
    bomb = bytearray(good)
    struct.pack_into(">HH", bomb, jpeg.read_header(good).height_at, 65000, 65000)
    assert jpeg.read_header(bytes(bomb)) is None


def test_torchvision_going_away_is_no_matter_of_the_user(monkeypatch) -> None:
    """Its decoders are announced to go: no warning, even where all are shown, and without them Pillow."""
    data = encoded(texture(48, 64))
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    spec = importlib.util.spec_from_file_location("jpeg_again", jpeg.__file__)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spec.loader.exec_module(again := importlib.util.module_from_spec(spec))
        assert again.decode(data, again.read_header(data)).shape == (48, 64, 3) and again.LIBRARY == "torchvision"
    assert not caught
    monkeypatch.setattr(again, "decode_jpeg", None)
    assert again.decode(data, again.read_header(data)) is None


def test_random_headers_never_fail() -> None:
    good, rng = bytearray(encoded(texture(30, 40), exif=exif("<", 1))), np.random.RandomState(0)
    for _ in range(3000):
        spoiled = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            spoiled[rng.randint(0, min(400, len(good)))] = rng.randint(0, 256)
        header = jpeg.read_header(bytes(spoiled[:rng.randint(1, len(good))]))
        assert header is None or header.width > 0


@pytest.mark.parametrize("mode", MODES)
def test_resizing_is_pillows_within_rounding(mode: str) -> None:
    resample = getattr(Image.Resampling, mode.upper())
    for (height, width), size in (((375, 500), (224, 224)), ((100, 130), (224, 224)), ((60, 900), (32, 48)), ((224, 224), (224, 224))):
        image = texture(height, width)
        mine = resize_crop(np.asarray(image).copy(), (10, 5, height - 20, width - 9), size, mode)
        theirs = np.asarray(image.crop((5, 10, width - 4, height - 10)).resize(size[::-1], resample))
        off = np.abs(mine.astype(int) - theirs)
        assert mine.flags.c_contiguous and off.max() <= 3 and off.mean() < 0.05


@pytest.mark.parametrize("mode", MODES)
def test_a_window_is_a_part_of_the_whole_result(mode: str) -> None:
    for shape, size in (((375, 500), (256, 341)), ((500, 333), (384, 256)), ((80, 70), (292, 256)), ((256, 300), (256, 300)),
                        ((260, 240), (277, 256)), ((239, 256), (277, 256)), ((250, 500), (256, 512)), ((260, 3000), (256, 2953))):
        image = np.asarray(texture(*shape)).copy()
        whole = resize_crop(image, (0, 0, *shape), size, mode)
        top, left = (size[0] - 224) // 2, (size[1] - 224) // 2
        rows = needed(shape[0], size[0], top + 224)
        window = resize_window(image[:rows], shape, size, (top, left, 224, 224), mode)
        assert np.array_equal(window, whole[top:top + 224, left:left + 224])


def folder_of(root: Path, files: dict[str, bytes]) -> Path:
    for split in ("train", "val"):
        (root / split / "a").mkdir(parents=True)
        for name, data in files.items():
            (root / split / "a" / name).write_bytes(data)
    return root


@pytest.mark.parametrize("opts", [(), ("TEST.CROP", "False"), ("DATA.IMG_SIZE", "[96, 160]"), ("DATA.INTERPOLATION", "bilinear"),
                                  ("DATA.IMG_SIZE", "64", "TEST.CROP", "False")])
def test_evaluation_is_within_a_twentieth_of_a_grey_level(tmp_path: Path, opts) -> None:
    sizes = [(375, 500), (500, 333), (260, 240), (40, 48), (150, 1200), (1, 1)]
    root = folder_of(tmp_path, {f"{i}.jpg": encoded(texture(*s, i), quality=90) for i, s in enumerate(sizes)})
    source, transform = scan_folder(str(root / "val")), build_eval_transform(preprocessing(get_config(None, list(opts))))
    fast, exact = EvalPipeline(transform, on_device=False), PillowPipeline(transform)
    onto_device = EvalPipeline(transform, on_device=True)
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None] * 255
    for i in range(len(sizes)):
        theirs, mine = exact(source, i), fast(source, i)
        off = ((theirs - mine) * std).abs()
        # A squashed image may shrink more in height, where new Pillow rounds in another order than older Pillow and torch.
        limit = 0.3 if "TEST.CROP" in opts and sizes[i][0] > sizes[i][1] else 0.05
        assert mine.shape == theirs.shape == fast.shape and off.mean() < limit and off.max() < 3.1, (i, off.mean())
        assert torch.allclose(onto_device.finish(onto_device(source, i)[None])[0], mine, atol=1e-5)
    assert fast.counts() == (6, 0) and fast.counts() == (0, 0)
    assert fast.summary(6, 0).startswith(f"decoded by {jpeg.LIBRARY}: 6;")


def test_odd_files_come_out_as_pillows_and_are_counted(tmp_path: Path) -> None:
    image = texture(90, 110)
    png = io.BytesIO()
    image.save(png, "PNG")
    root = folder_of(tmp_path, {"0.jpg": encoded(image), "1.JPEG": png.getvalue(), "2.jpg": encoded(image.convert("CMYK")),
                                "3.jpg": encoded(image, exif=exif("<", 8))})
    xmp = b'<rdf:RDF xmlns:tiff="http://ns.adobe.com/tiff/1.0/"><rdf:Description tiff:Orientation="3"/></rdf:RDF>'
    for split in ("train", "val"):
        (root / split / "a/4.jpg").write_bytes(encoded(image, xmp=xmp))
        Image.fromarray(np.dstack([np.asarray(image), np.full((90, 110), 40, np.uint8)])).save(root / split / "a/5.webp", lossless=True)
    upright = {}
    for turn, odd in ((False, 3), (True, 5)):
        common = ["DATA.DATA_PATH", str(root), "DATA.IMG_SIZE", "64", "DATA.BATCH_SIZE", "3", "DATA.EXIF", str(turn)]
        loaders = build_loaders(get_config(None, [*common, "DATA.NUM_WORKERS", "2"]), splits=("val",))
        exact = build_loaders(get_config(None, [*common, "DATA.NUM_WORKERS", "0", "DATA.DECODER", "pillow"]), splits=("val",))
        mine, theirs = (torch.cat([x for x, _ in loader]) for loader in (loaders.val, exact.val))
        assert (mine - theirs).abs().mean() * 255 * 0.225 < 0.05
        assert loaders.val.decoded == (6 - odd, odd)  # counted in two processes
        loaders.close()
        upright[turn] = theirs
    assert [not torch.equal(*pair) for pair in zip(upright[False], upright[True], strict=True)] == [False] * 3 + [True] * 2 + [False]


def test_pillow_decoder_is_the_papers_pixels(images: Path) -> None:
    config = get_config(None, ["DATA.DATA_PATH", str(images), "DATA.IMG_SIZE", "32", "DATA.NUM_WORKERS", "0", "DATA.DECODER", "pillow"])
    loaders = build_loaders(config, splits=("val",))
    source, transform = loaders.val.dataset.folder, build_eval_transform(preprocessing(config))
    batch = next(iter(loaders.val))[0]
    assert all(torch.equal(batch[i], transform(Image.open(source.path(i)).convert("RGB"))) for i in range(len(source)))


def test_workers_do_not_change_the_device_stream(images: Path) -> None:
    streams = []
    for workers in (0, 2):
        config = get_config(None, ["DATA.DATA_PATH", str(images), "DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "8", "TRAIN.EPOCHS", "21",
                                   "DATA.NUM_WORKERS", str(workers), "DATA.AUGMENT_ON", "device"])
        loaders = build_loaders(config, splits=("train",))
        assert loaders.train.dataset[(0, 1, 0)][0].dtype == torch.uint8
        batches = loaders.batches(3)
        streams.append([next(batches) for _ in range(5)])
        loaders.close()
    for (xa, ya), (xb, yb) in zip(*streams, strict=True):
        assert xa.dtype == torch.float32 and xa.shape == (8, 3, 32, 32) and torch.equal(xa, xb) and torch.equal(ya, yb)


def test_batches_of_a_worker_lie_in_shared_memory_at_once(images: Path) -> None:
    config = get_config(None, ["DATA.DATA_PATH", str(images), "DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "8", "DATA.NUM_WORKERS", "1"])
    loaders = build_loaders(config, splits=("val",))
    start = time.perf_counter()
    batch, _ = next(iter(loaders.val))
    assert batch.is_shared() and time.perf_counter() - start < 2  # and the worker started within two seconds
    if sys.platform.startswith("linux"):
        assert {type(p).__name__ for p in multiprocessing.active_children()} == {"ForkProcess"}
    loaders.close()


@pytest.mark.parametrize("where", ["worker", "device"])
def test_a_run_is_the_same_with_any_workers_and_after_a_stop(where: str, tiny_cfg: Path, program) -> None:
    common = ["--cfg", tiny_cfg, "--opts", "DATA.AUGMENT_ON", where]
    for tag, workers in (("none", 0), ("two", 2)):
        done = program(*common, "DATA.NUM_WORKERS", workers, "TAG", tag)
        assert done.returncode == 0, done.stderr
    assert f"augmented {'on the device' if where == 'device' else 'in the workers'}" in done.stdout
    assert re.search(r"^training images decoded by \w+: \d+, by Pillow \(other formats, odd files\): \d+$", done.stdout, re.M)
    # Another run is stopped in the middle: its checkpoint of step 7 is continued with another number of workers.
    stopped = program(*common, "DATA.NUM_WORKERS", 2, "TAG", "stopped", "TRAIN.SAVE_EVERY_STEPS", 7, "TRAIN.KEEP_CHECKPOINTS", 0)
    assert stopped.returncode == 0, stopped.stderr
    folder = program.folder / "output/tiny"
    for path in (folder / "stopped").glob("*.pth"):
        if path.name != "ckpt_00000007.pth":
            path.unlink()
    again = program(*common, "DATA.NUM_WORKERS", 0, "TAG", "stopped")
    assert again.returncode == 0 and "at step 7" in again.stdout, again.stderr
    one, *others = (load(folder / tag / "last.pth") for tag in ("none", "two", "stopped"))
    for other in others:
        assert differences({k: one[k] for k in STATE}, {k: other[k] for k in STATE}) == []


def test_evaluation_says_which_path_ran(tiny_cfg: Path, program) -> None:
    assert program("--cfg", tiny_cfg, "--epochs", 1).returncode == 0
    best = program.folder / "output/tiny/default/best.pth"
    own = program("--eval", "--resume", best)
    assert re.search(r"^images decoded by \w+: \d+, by Pillow .*: 8; resized by torch", own.stdout, re.M), own.stdout
    assert own.stdout.splitlines()[-1].startswith("top1 ")
    exact = program("--eval", "--resume", best, "--opts", "DATA.DECODER", "pillow")
    assert "\nimages decoded and resized by Pillow\n" in exact.stdout
    torch.save({"model": load(best)["model"]}, program.folder / "published.pth")
    published = program("--eval", "--cfg", tiny_cfg, "--resume", program.folder / "published.pth")
    assert "\nimages decoded and resized by Pillow\n" in published.stdout, published.stderr
    fast = program("--eval", "--cfg", tiny_cfg, "--resume", program.folder / "published.pth", "--opts", "DATA.DECODER", "fast")
    assert "resized by torch" in fast.stdout


def test_bench_prints_its_ratios() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "scripts/bench_data.py"), "--images", "20", "--repeats", "3"], env=environment(),
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()[-5:]]
    assert names == ["ratio-device", "ratio-352", "ratio-256", "ratio-val", "ratio"]
    ratios = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines()[-5:]}
    assert all(ratio > 0 for ratio in ratios.values())  # how large they are is for the script to say, on a quiet machine
    assert not done.stderr
