"""Images of more than 8 bits a channel: every stored value counts, and one black and white level holds for the whole data set."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, TINY_MODEL, differences, environment, load
from data_helpers import config_for, encoded, exif, write_tar
from PIL import Image, ImageOps

import main
from config import config_from_text, with_values
from data import build_loaders
from data.decoding.deep import stored_values
from data.decoding.pillow import Reading, decode, is_single_colour
from data.errors import DataError, UnreadableImage
from data.sources.deep_levels import FEWEST_LEVELS, find_levels
from data.sources.folder import ImageFolder, scan_flat
from utils.commands.export import _description

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def png16(values: np.ndarray, extra: bytes = b"") -> bytes:
    """A PNG file of 16 bits a sample, (H, W, C), its rows filtered in turn by Sub and Up."""
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    height, width, channels = values.shape
    rows, before, step = b"", np.zeros(2 * width * channels, np.uint8), 2 * channels
    for y, row in enumerate(np.frombuffer(values.astype(">u2").tobytes(), np.uint8).reshape(height, -1)):
        beside = before if y % 2 else np.concatenate([np.zeros(step, np.uint8), row[:-step]])
        rows, before = rows + bytes([1 + y % 2]) + (row - beside).tobytes(), row
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff16(values: np.ndarray, order: str) -> bytes:
    """An uncompressed RGB TIFF file of 16 bits a sample in the byte order ``<`` or ``>``."""
    height, width, channels = values.shape
    pixels = values.astype(order + "u2").tobytes()
    entries = [(256, 4, width), (257, 4, height), (258, 3, 8 + len(pixels)), (259, 3, 1), (262, 3, 2), (273, 4, 8), (277, 3, channels),
               (278, 4, height), (279, 4, len(pixels))]
    ifd = struct.pack(order + "H", len(entries))
    for tag, kind, value in entries:
        count = channels if tag == 258 else 1
        ifd += struct.pack(order + "HHI", tag, kind, count) + (
            struct.pack(order + "HH", value, 0) if kind == 3 and tag != 258 else struct.pack(order + "I", value))
    bits = struct.pack(order + f"{channels}H", *[16] * channels)
    return {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8 + len(pixels) + len(bits)) + pixels + bits + ifd + bytes(4)


def values_of(data: bytes) -> np.ndarray:
    return stored_values(Image.open(io.BytesIO(data)), data).values


def test_sixteen_bit_colour_keeps_both_bytes() -> None:
    colours = np.random.RandomState(0).randint(0, 65536, (6, 9, 4)).astype(np.uint16)
    plain = colours[..., :3]
    files = [png16(plain), tiff16(plain, "<"), tiff16(plain, ">"), b"P6 9 6 65535\n" + plain.astype(">u2").tobytes(),
             b"P3 9 6 65535\n" + " ".join(map(str, plain.ravel())).encode()]
    assert all((values_of(data) == plain).all() for data in files)
    assert (values_of(b"P6 9 6 4095\n" + (plain >> 4).astype(">u2").tobytes()).astype(int) - plain).min() >= -16
    clear, grey = png16(colours), png16(colours[..., :2])
    assert (values_of(clear) == plain).all() and (values_of(grey) == colours[..., :1]).all()
    # twelve bits of colour in sixteen, on white where they are transparent
    reading, narrow = Reading(window=(0.0, 4095.0)), colours >> 4
    assert abs(np.asarray(decode(png16(narrow[..., :3]), "x", reading)).astype(float) - narrow[..., :3] / 4095 * 255).max() <= 0.5
    narrow[..., 3] = 0
    assert (np.asarray(decode(png16(narrow), "x", reading)) == 255).all()
    keyed = png16(np.full((2, 2, 3), 777, np.uint16), b"\0\0\0\x06tRNS" + (body := struct.pack(">HHH", 777, 777, 777))
                  + struct.pack(">I", zlib.crc32(b"tRNS" + body)))
    assert (np.asarray(decode(keyed, "x", reading)) == 255).all()


@pytest.mark.parametrize(("values", "form", "window"), [
    (RAMP.astype(np.uint16) * 257, "PNG", None), (RAMP.astype(np.uint16) * 257, "PPM", None),
    ((RAMP.astype(np.uint16) * 257).astype(">u2"), "TIFF", None), (RAMP.astype(np.uint16) * 16, "PNG", (0.0, 4080.0)),
    (RAMP.astype(np.int32) * 13 - 1024, "TIFF", (-1024.0, 2291.0)), (RAMP.astype(np.int32), "TIFF", (0.0, 255.0)),
    (RAMP.astype(np.float32) / 255, "TIFF", (0.0, 1.0)), (RAMP.astype(np.float32) * 1000 - 7e4, "TIFF", (-7e4, 1.85e5))])
def test_grey_of_every_type_is_scaled_by_the_window(values: np.ndarray, form: str, window) -> None:
    pixels = np.asarray(decode(encoded(Image.fromarray(values), form), "x", Reading(window=window)))
    assert (pixels == RAMP[..., None]).all()


def test_what_no_type_calls_white_needs_a_window_and_nothing_else_decides() -> None:
    numbers = encoded(Image.fromarray(np.array([[-1.0, 0.5, 3.0, np.nan, np.inf]], np.float32)), "TIFF")
    with pytest.raises(UnreadableImage, match=r"DATA\.WINDOW"):
        decode(numbers, "x")
    assert np.asarray(decode(numbers, "x", Reading(window=(0.0, 2.0))))[0, :, 0].tolist() == [0, 64, 255, 0, 255]
    turned = encoded(Image.fromarray(np.arange(6, dtype=np.uint16).reshape(2, 3) * 9000), "PNG", exif=exif("<", 6))
    plain = decode(turned, "x")
    plain.getexif()[0x0112] = 6
    assert (np.asarray(decode(turned, "x", Reading(exif=True))) == np.asarray(ImageOps.exif_transpose(plain))).all()


def write(folder: Path, images: list[np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, values in enumerate(images):
        Image.fromarray(values).save(folder / f"{number}.tif")


def test_levels_are_of_the_set_and_outliers_do_not_waste_them(tmp_path: Path) -> None:
    generator = np.random.RandomState(0)
    floats = [(generator.rand(20, 20) * top).astype(np.float32) for top in (0.99, 1.02, 0.3)]
    scans = [generator.randint(-1024, 3071, (20, 20)).astype(np.int32) for _ in range(3)]
    hot = [generator.randint(900, 1200, (64, 64)).astype(np.uint16) for _ in range(4)]
    hot[2][5, 7] = 65535
    coarse = [np.repeat(np.arange(4, dtype=np.uint16) * 9, 9).reshape(6, 6)]
    for name, images in dict(floats=floats, scans=scans, hot=hot, coarse=coarse, none=[RAMP, RAMP]).items():
        write(tmp_path / name, images)
    found = {name: find_levels(scan_flat(str(tmp_path / name))) for name in ("floats", "scans", "hot", "coarse", "none")}
    assert found["none"] is None
    assert found["floats"].window == (min(f.min() for f in floats), max(f.max() for f in floats))
    assert found["scans"].window == (min(s.min() for s in scans), max(s.max() for s in scans))
    assert found["hot"].window[1] < 1300 and not found["hot"].few
    assert found["coarse"].window == (0, 27) and not found["coarse"].few  # four values are all that there are
    given = find_levels(scan_flat(str(tmp_path / "hot")), (0.0, 65535.0))
    assert given.levels < FEWEST_LEVELS and given.few and given.better == pytest.approx(found["hot"].window)
    assert [line.code for line in given.messages()] == ["deep", "few-levels"] and "DATA.WINDOW '[" in given.messages()[1]
    assert [line.code for line in found["hot"].messages()] == ["deep"]


def test_validation_images_stored_otherwise_than_those_of_training_are_told(tmp_path: Path) -> None:
    """17 of 4,096 levels were left of them, without a word."""
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for training, range_of_validation, windows in ((ramp.astype(np.uint8), 16, (None, (0.0, 4080.0))),
                                                   (ramp * 16, 257, ((0.0, 4080.0), (0.0, 4080.0)))):
        for split, values in (("train", training), ("val", ramp * range_of_validation)):
            write(tmp_path / split / "x", [values])
        loaders = build_loaders(config_for(tmp_path))
        assert (loaders.train.dataset.source.reading.window, loaders.val.dataset.source.reading.window) == windows
        assert sum(getattr(line, "code", "") == "other-range" for line in loaders.notices) == 1


def test_a_file_that_hangs_at_the_first_look_is_named(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path, [RAMP.astype(np.uint16)] * 3)
    fetch, ended = ImageFolder.fetch, threading.Event()
    monkeypatch.setattr(ImageFolder, "fetch", lambda self, index: (ended.wait(20) if index == 1 else 0, fetch(self, index))[1])
    with pytest.raises(DataError, match=r"0\.3 seconds \(DATA\.TIMEOUT\).*1\.tif;"):
        find_levels(scan_flat(str(tmp_path)), timeout=0.3)
    ended.set()


@pytest.fixture(scope="module")
def xrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve bits in sixteen, 0.35 of 4,095 with little noise; one class has a faint blob, and validation is brighter than training."""
    root, generator = tmp_path_factory.mktemp("xrays"), np.random.RandomState(0)
    y, x = np.mgrid[:40, :40]
    for split, count, offset in (("train", 8, 0), ("val", 3, 30)):
        for name in ("clear", "spot"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                share = generator.normal(0.35, 0.003, (40, 40))
                share += 0.012 * np.exp(-((y - 20) ** 2 + (x - 15 - number) ** 2) / 40) * (name == "spot")
                Image.fromarray((share * 4095 + offset).astype(np.uint16)).save(folder / f"{number}.png")
    return root


def test_one_window_from_training_to_export(xrays: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text("DATA: {IMG_SIZE: 32, BATCH_SIZE: 8, NUM_WORKERS: 0}\n" + TINY_MODEL
                                        + "TRAIN: {EPOCHS: 2, WARMUP_EPOCHS: 0, REPORT: none}\n")
    train = ["--cfg", "tiny.yaml", "--data-path", str(xrays)]
    assert main.main([*train, "--tag", "whole"]) == 0
    values = [np.asarray(Image.open(path)) for path in (xrays / "train").rglob("*.png")]
    window = [float(min(v.min() for v in values)), float(max(v.max() for v in values))]
    whole = load(tmp_path / "output/tiny/whole/last.pth")
    saved = config_from_text(whole["config"])
    assert window == saved.DATA.WINDOW and whole["preprocessing"]["window"] == window
    assert "are black" not in capsys.readouterr().err

    # one epoch, then the other: the same bits, and the window is no change of the recipe
    assert main.main([*train, "--tag", "parts", "--epochs", "1"]) == 0
    assert main.main([*train, "--tag", "parts"]) == 0
    parts = load(tmp_path / "output/tiny/parts/last.pth")
    assert window == config_from_text(parts["config"]).DATA.WINDOW
    once = [*train, "--tag", "parts", "--opts", "DATA.WINDOW", "[0, 4095]"]
    assert main.main(once) == 2 and "DATA.WINDOW changed" in capsys.readouterr().err
    assert not differences(whole["config"], parts["config"].replace("TAG: parts", "TAG: whole"))

    # evaluation has the training window although its own images are brighter, with the YAML file and without
    windows, told, real = [], [], build_loaders

    def spied(*arguments, **options):
        loaders = real(*arguments, **options)
        windows.append(list(loaders.val.dataset.source.reading.window))
        told.extend(loaders.notices)
        return loaders

    monkeypatch.setattr("utils.tasks.base.build_loaders", spied)
    checkpoint = str(tmp_path / "output/tiny/whole/best.pth")
    assert main.main(["--eval", "--resume", checkpoint]) == 0
    assert main.main(["--eval", *train, "--tag", "whole"]) == 0
    assert windows == [window, window]

    # images in another range are told, these are not
    assert "other-range" not in {getattr(line, "code", "") for line in told}
    scaled = tmp_path / "scaled/val/spot/0.png"
    scaled.parent.mkdir(parents=True)
    Image.fromarray(np.asarray(Image.open(xrays / "val/spot/0.png")) * 16).save(scaled)
    again = build_loaders(saved, splits=("val",), classes=["clear", "spot"])
    other = build_loaders(with_values(saved, {"DATA.DATA_PATH": str(tmp_path / "scaled")}, "x"), splits=("val",), classes=["clear", "spot"])
    assert [[line.code for line in loaders.notices if getattr(line, "code", "") == "other-range"] for loaders in (again, other)] == [
        [], ["other-range"]]

    # the same image alone, and exported
    image = xrays / "val/spot/0.png"
    assert main.main(["--predict", str(image), "--resume", checkpoint, "--json", "p.jsonl"]) == 0
    assert main.main(["--export", "hub/", "--resume", checkpoint]) == 0
    assert json.loads((tmp_path / "hub/config.json").read_text())["window"] == window
    described = _description(saved, SimpleNamespace(classes=[], descriptions=[], step=0, facts={}))  # of ONNX and pt2
    facts = json.loads(described["preprocessing"])
    assert facts["window"] == window and str(window) in facts["steps"]
    pixels = np.asarray(decode(image.read_bytes(), "x", Reading(window=tuple(window))).resize((36, 36), Image.Resampling.BICUBIC))
    pixels = (pixels[2:34, 2:34] / 255 - facts["mean"]) / facts["std"]
    exported = timm.create_model("local-dir:hub", pretrained=True).eval()
    with torch.no_grad():
        expected = exported(torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32)).softmax(1)[0]
    probabilities = {row["class"]: row["probability"] for row in json.loads((tmp_path / "p.jsonl").read_text())["top"]}
    assert [probabilities[name] for name in ("clear", "spot")] == pytest.approx(expected.tolist(), abs=0.01)


def test_the_doctor_sees_what_is_stored(xrays: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((40, 40), 1433, np.uint16)).save(xrays / "train/clear/flat.png")
    found = []
    for options in ([], ["DATA.WINDOW", "[0, 65535]"]):
        assert main.main(["--doctor", "--data-path", str(xrays), "--num-workers", "1", "--opts", "DOCTOR.FOLDER", "report", *options]) == 0
        findings = json.loads((tmp_path / "report/report.json").read_text())["findings"]
        found.append({finding["code"]: finding for finding in findings})
    (xrays / "train/clear/flat.png").unlink()
    for by_code in found:
        assert [Path(item["path"]).name for item in by_code["blank"]["items"]] == ["flat.png"]
        assert by_code["deep"]["count"] == 23
    assert "few-levels" not in found[0] and "told" not in found[0]
    advised = found[1]["few-levels"]["mend"][0]
    loaders = build_loaders(config_for(xrays, *advised.removeprefix("--opts ").replace("'", "").split(" ", 1)), splits=("train",))
    assert not any(line.code == "few-levels" for line in loaders.notices if hasattr(line, "code"))
    assert loaders.found == {} and build_loaders(config_for(xrays), splits=("train",)).found["DATA.WINDOW"][0] > 1000


def test_a_faint_pattern_is_not_a_single_colour() -> None:
    pattern = np.where(np.indices((32, 32)).sum(0) % 2, 90, 91).astype(np.uint8)
    assert not is_single_colour(encoded(Image.fromarray(pattern), "PNG"), "x")
    assert is_single_colour(encoded(Image.new("RGB", (9, 9), "white"), "PNG"), "x")


def test_a_stream_and_a_smaller_copy_have_one_window_too(xrays: Path, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    paths = sorted((xrays / "train").rglob("*.png"))
    write_tar(tmp_path / "train-0.tar", [item for i, path in enumerate(paths) for item in (
        (f"{i:03d}.png", path.read_bytes()), (f"{i:03d}.cls", b"%d" % (path.parent.name == "spot")))])
    stream = f"file://{tmp_path}/train-{{0..0}}.tar"
    loaders = build_loaders(config_for(stream, "DATA.STREAM_IMAGES", 16, "MODEL.NUM_CLASSES", 2), splits=("train",))
    expected = build_loaders(config_for(xrays), splits=("train",)).found
    assert loaders.found == expected and loaders.train.dataset.record_source.reading.window == tuple(expected["DATA.WINDOW"])
    loaders.close()
    # one tar file a class: descriptors are shared there, so that threads must not read at the same time
    (tmp_path / "tars/train").mkdir(parents=True)
    for name in ("clear", "spot"):
        write_tar(tmp_path / f"tars/train/{name}.tar", [(path.name, path.read_bytes()) for path in paths if path.parent.name == name])
    packed = build_loaders(config_for(tmp_path / "tars", "DATA.SUBSET", 0.5), splits=("train",))
    assert packed.found == expected and not packed.train.dataset.source.parallel
    done = subprocess.run([sys.executable, ROOT / "scripts/resize_dataset.py", xrays, tmp_path / "copy", "--side", "256", "--workers", "1"],
                          capture_output=True, text=True, env=environment(), check=True)
    copied = np.asarray(Image.open(next((tmp_path / "copy/train/clear").iterdir())))
    assert "DATA.WINDOW '[" in done.stdout and 30 < copied.mean() < 225 and copied.std() > 5
