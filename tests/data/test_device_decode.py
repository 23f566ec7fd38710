"""Files decoded by the device (DATA.DECODER nvjpeg): the samples of the usual path, whoever decodes; libjpeg stands in for nvJPEG."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import config_for, encoded, same_batches, texture
from PIL import Image

from config import ConfigError, get_config
from data import build_loaders
from data.decoding import jpeg, nvjpeg
from data.decoding.resize import resize_crop, resize_crop_on_device
from data.loading.device_decode import EncodedTrainImages
from data.transforms import encoded as encoded_pipeline
from data.transforms.build_pipelines import build_eval_pipeline, build_train_pipeline
from data.transforms.encoded import Encoded

CPU = torch.device("cpu")
SIZES = [(60, 80), (90, 50), (33, 47), (128, 128), (40, 200), (64, 48)]
PLAIN = ("AUG.AUTO_AUGMENT", "none", "AUG.COLOR_JITTER", 0, "AUG.REPROB", 0)
LEVEL = 1 / 255 / 0.224  # of a pixel, normalised


@pytest.fixture(autouse=True)
def _decoder_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvjpeg, "require", lambda device: None)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of two classes: JPEGs of many kinds, among them two that a worker decodes, and four of other formats."""
    root = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 24), ("val", 4)):
        for number in range(count):
            folder = root / split / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            image = texture(*SIZES[number % len(SIZES)], number)
            form, options = ("PNG", {}) if number % 6 == 5 else ("JPEG", dict(quality=80 + number % 15, subsampling=number % 3))
            if number == 7:
                image = image.convert("L")
            if number == 8:
                image = image.convert("CMYK")
            if number == 9:
                options["progressive"] = True
            if number == 10:
                options = dict(keep_rgb=True, subsampling=0)
            (folder / f"{number:02}.{form.lower()}").write_bytes(encoded(image, form, **options))
    return root


def batches_of(root: Path, *opts: object, start: int = 0, count: int = 6) -> tuple[list, tuple[int, ...]]:
    """(``count`` training batches from step ``start`` on, who decoded how many)."""
    loaders = build_loaders(config_for(root, *opts), splits=("train",))
    with contextlib.closing(loaders):
        batches = loaders.batches(start)
        found = [next(batches) for _ in range(count)]
    return found, loaders.train.decoded


@pytest.mark.parametrize("opts", [(), ("DATA.FIT", "pad"), ("DATA.INTERPOLATION", "bilinear", "AUG.SCALE", "[0.5, 0.6]")])
def test_the_crops_and_flips_are_those_of_the_usual_path(photos: Path, opts: tuple) -> None:
    usual, _ = batches_of(photos, "DATA.AUGMENT_ON", "device", *PLAIN, *opts)
    decoded, counts = batches_of(photos, "DATA.DECODER", "nvjpeg", *PLAIN, *opts)
    for (one, labels), (other, same_labels) in zip(usual, decoded, strict=True):
        assert torch.equal(labels, same_labels)
        difference = (one - other).abs()
        assert difference.max() < 1.05 * LEVEL and (difference > 0.05 * LEVEL).float().mean() < 0.2
        assert one.std(0).mean() > 10 * LEVEL  # against which a wrong crop would show
    assert counts[2] > 2 * counts[0] + counts[1] > 0
    summary = build_train_pipeline(config_for(photos, "DATA.DECODER", "nvjpeg"), CPU)[0].summary
    assert "differ slightly: 1,000; by " in summary(1, 2, 1000) and summary(0, 0, 7).endswith(" 7")


def test_the_augmentation_is_that_of_the_usual_path(photos: Path) -> None:
    keys = [(epoch, index, 0) for epoch in range(2) for index in range(24)]
    usual, encoded_ = (build_loaders(config_for(photos, *opts), splits=("train",)).train.dataset.__getitems__(keys)
                       for opts in (("DATA.AUGMENT_ON", "device"), ("DATA.DECODER", "nvjpeg")))
    assert torch.equal(usual.parts[1], encoded_.parts[3]) and torch.equal(usual.parts[2], encoded_.parts[4])


@pytest.mark.parametrize("opts", [("DATA.NUM_WORKERS", 2), ("DATA.NUM_WORKERS", 1)])
def test_batches_are_the_same_with_any_workers_and_after_a_restart(photos: Path, opts: tuple) -> None:
    whole, _ = batches_of(photos, "DATA.DECODER", "nvjpeg")
    same_batches(whole, batches_of(photos, "DATA.DECODER", "nvjpeg", *opts)[0])
    same_batches(whole[3:], batches_of(photos, "DATA.DECODER", "nvjpeg", *opts, start=3, count=3)[0])


def test_a_file_that_the_device_does_not_decode_is_decoded_as_by_a_worker(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, _ = batches_of(photos, "DATA.AUGMENT_ON", "device")
    by_device, (_, _, all_there) = batches_of(photos, "DATA.DECODER", "nvjpeg")
    real, seen = nvjpeg._decode, []

    def decode(files, device):
        seen.append(len(files))
        if any(len(file) % 3 == 0 for file in files):  # as torchvision: all or none
            raise RuntimeError("Failed to decode jpeg stream: 4")
        return real(files, device)

    monkeypatch.setattr(nvjpeg, "_decode", decode)
    some, (_, _, some_there) = batches_of(photos, "DATA.DECODER", "nvjpeg")
    assert 0 < some_there < all_there and max(seen) > 1 and 1 in seen
    for index in range(len(usual)):
        images = zip(usual[index][0], by_device[index][0], some[index][0], strict=True)
        assert all(torch.equal(c, a) or torch.equal(c, b) for a, b, c in images)
    monkeypatch.setattr(nvjpeg, "_decode", lambda files, device: (_ for _ in ()).throw(RuntimeError("no")))
    none, (fast, by_pillow, there) = batches_of(photos, "DATA.DECODER", "nvjpeg")
    same_batches(usual, none)
    assert there == 0 and fast > by_pillow > 0
    monkeypatch.setattr(nvjpeg, "_decode", lambda files, device: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        batches_of(photos, "DATA.DECODER", "nvjpeg")


def test_what_only_the_device_finds_unreadable_is_replaced_and_counted(photos: Path, tmp_path: Path) -> None:
    """A file with a header and an end, but without the tables to decode it by: a worker that only reads it notices nothing."""
    for number in range(6):
        folder = tmp_path / "train" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(encoded(texture(60, 80, number)))
    broken = tmp_path / "train/a/2.jpg"
    data = broken.read_bytes()
    broken.write_bytes(data.replace(b"\xff\xdb", b"\xff\xec"))  # quantisation tables as a block that nobody reads
    found = {}
    for opts in (("DATA.AUGMENT_ON", "device"), ("DATA.DECODER", "nvjpeg")):
        loaders = build_loaders(config_for(tmp_path, "DATA.BATCH_SIZE", 6, "DATA.CORRUPT_BUDGET", 3, *opts, *PLAIN), splits=("train",))
        lines: list[str] = []
        loaders.report_unreadable(lines.append)
        batches = loaders.batches()
        found[opts] = [next(batches) for _ in range(3)], [os.path.basename(f.path) for f in loaders.train.failures], len(lines)
        loaders.close()
    (usual, *told), (decoded, *also) = found.values()
    assert told == also == [["2.jpg"], 1]
    for (one, labels), (other, same_labels) in zip(usual, decoded, strict=True):
        assert torch.equal(labels, same_labels) and (one - other).abs().max() < 1.05 * LEVEL


def test_which_files_the_device_gets(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = build_loaders(config_for(photos, "DATA.DECODER", "nvjpeg"), splits=("train",)).train.dataset
    assert isinstance(dataset, EncodedTrainImages)

    def left() -> set[int]:
        return {int(Path(dataset.source.path(index)).stem) for index in range(24) if not isinstance(dataset[(0, index, 0)][0], Encoded)}

    assert left() == {5, 11, 17, 23, 8, 10}  # PNG, CMYK, RGB; grey and progressive ones go to the device
    monkeypatch.setattr(encoded_pipeline, "LONGEST", 199)
    assert left() == {5, 11, 17, 23, 8, 10, 4, 16, 22}  # 40 x 200
    monkeypatch.setattr(encoded_pipeline, "LARGEST", 0)
    assert left() == set(range(24))
    image = texture(40, 60)
    whole = encoded(image)
    adobe = whole[:2] + b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
    for data, ycc in ((whole, True), (adobe + b"\x01" + whole[2:], True), (adobe + b"\x00" + whole[2:], False),
                      (adobe + b"\x00" + encoded(image.convert("L"))[2:], True)):
        assert jpeg.is_ycc(data, jpeg.read_header(data)) == ycc
    assert jpeg.is_whole(whole) and not jpeg.is_whole(whole[:-40])


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_resized_in_fp32_it_is_a_level_from_the_cpus(mode: str) -> None:
    pixels = np.array(texture(90, 120))
    for box, size in (((3, 5, 80, 100), (32, 32)), ((0, 0, 20, 30), (48, 40)), ((10, 10, 32, 32), (32, 32))):
        usual = torch.from_numpy(resize_crop(pixels, box, size, mode)).permute(2, 0, 1)
        other = resize_crop_on_device(torch.from_numpy(pixels).permute(2, 0, 1), box, size, mode).round().clamp(0, 255)
        assert (usual - other).abs().max() <= 1 and (usual != other).float().mean() < 0.25  # it rounds once, not twice


def test_mistakes_are_one_sentence(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for opts, words in ((("DATA.AUGMENT_ON", "worker"), "DATA.AUGMENT_ON worker"), (("MODEL.IN_CHANS", 1), "is nvjpeg; nvJPEG"),
                        (("AUG.AUTO_AUGMENT", "original"), "DATA.DECODER is nvjpeg")):
        with pytest.raises(ConfigError, match=words):
            build_train_pipeline(config_for(photos, "DATA.DECODER", "nvjpeg", *opts), CPU)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="CUDA GPU, and this is cpu; set it to auto"):
        build_train_pipeline(get_config(None, ["DATA.DECODER", "nvjpeg"]), CPU)
    with pytest.raises(ConfigError, match="torchvision does not have here"):
        nvjpeg.require(torch.device("cuda"))  # there is none here
    build_eval_pipeline(get_config(None, ["DATA.DECODER", "nvjpeg"]), CPU, published=False)  # evaluation goes on without


@pytest.mark.gpu
def test_nvjpeg_shows_the_same_pictures(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smooth colours, of which nvJPEG's pixels are those of libjpeg within a few levels; and the same batches twice."""
    monkeypatch.undo()
    device, opts = torch.device("cuda", torch.cuda.current_device()), ("DATA.DECODER", "nvjpeg", *PLAIN)
    nvjpeg.require(device)
    usual, _ = batches_of(photos, "DATA.AUGMENT_ON", "device", *PLAIN)
    found = []
    for _ in range(2):
        loaders = build_loaders(config_for(photos, *opts, "DATA.NUM_WORKERS", 2), splits=("train",), device=device)
        batches = loaders.batches()
        found.append([next(batches) for _ in range(6)])
        loaders.close()
        assert loaders.train.decoded[2] > 0
    same_batches(*found)
    for (one, labels), (other, same_labels) in zip(usual, found[0], strict=True):
        assert other.is_cuda and torch.equal(labels, same_labels.cpu())
        assert (one - other.cpu()).abs().mean() < 3 * LEVEL
    file = io.BytesIO()
    Image.new("CMYK", (32, 32)).save(file, "JPEG")
    assert nvjpeg.decode([torch.frombuffer(bytearray(b"\xff\xd8" + bytes(60)), dtype=torch.uint8)], device) == [None]
