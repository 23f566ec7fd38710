"""Images of other channels than RGB: grey, RGB with alpha, and the bands of TIFF files, from the file to the export."""

from __future__ import annotations

import io
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import TINY_MODEL, load, write_images
from data_helpers import config_for, encoded, texture
from PIL import Image

import main
from config import ConfigError, config_from_text, get_config
from data import build_loaders
from data.decoding.pillow import Reading, decode, decode_pixels, decode_stored, from_rgb
from data.errors import DataError, UnreadableImage
from data.sources.channel_statistics import measure_channels
from data.sources.deep_levels import find_levels, window_option
from data.sources.folder import scan_flat
from data.transforms import device_transforms, randaugment
from data.transforms.build import build_train_transform
from data.transforms.build_pipelines import build_eval_pipeline, build_train_pipeline
from data.transforms.device_transforms import DeviceAugment
from data.transforms.params import Augmentation, leave_out_colour

tifffile = pytest.importorskip("tifffile")
BANDS = np.random.RandomState(0).randint(0, 4000, (13, 40, 48)).astype(np.uint16)
WINDOW = (0.0, 4000.0)


def tiff(values: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def test_pillows_formats_in_one_two_and_four_channels() -> None:
    colour = np.asarray(texture(20, 30))
    clear = np.dstack([colour, np.arange(600, dtype=np.uint8).reshape(20, 30)])
    for data in (encoded(Image.fromarray(clear), "PNG"), encoded(Image.fromarray(clear), "TIFF")):
        assert (decode_pixels(data, "x", Reading(channels=4)) == clear).all()
    opaque = decode_pixels(encoded(Image.fromarray(colour), "PNG"), "x", Reading(channels=4))
    assert (opaque[..., :3] == colour).all() and (opaque[..., 3] == 255).all() and (opaque == from_rgb(colour, 4)).all()
    grey = decode_pixels(encoded(Image.fromarray(colour), "PNG"), "x", Reading(channels=1))
    assert grey.shape == (20, 30, 1) and (grey[..., 0] == np.asarray(Image.fromarray(colour).convert("L"))).all()
    assert (grey == from_rgb(colour, 1)).all() and decode_pixels(encoded(Image.fromarray(colour)), "x", Reading(channels=2)).shape[2] == 2
    deep = encoded(Image.fromarray(BANDS[0]), "PNG")
    shown = decode_pixels(deep, "x", Reading(window=WINDOW, channels=1))[..., 0]
    assert abs(shown - BANDS[0] / 4000 * 255).max() <= 0.5 and decode(deep, "x", Reading(window=WINDOW, channels=1)).mode == "RGB"
    assert decode_pixels(deep, "x", Reading(window=WINDOW, channels=4))[..., 3].min() == 255
    for data in (deep, encoded(Image.fromarray(colour))):
        with pytest.raises(UnreadableImage, match=r"MODEL\.IN_CHANS is 13"):
            decode_pixels(data, "x", Reading(channels=13))


@pytest.mark.parametrize("options", [
    dict(), dict(photometric="minisblack", planarconfig="separate"), dict(compression="zlib", photometric="minisblack"),
    dict(planarconfig="contig", photometric="minisblack"), dict(photometric="minisblack", bigtiff=True)], ids=str)
def test_bands_of_a_tiff_wherever_they_lie(options: dict) -> None:
    last = options.get("planarconfig") == "contig"
    data = tiff(np.moveaxis(BANDS, 0, -1) if last else BANDS, **options)
    pixels = decode_pixels(data, "x", Reading(window=WINDOW, channels=13))
    assert pixels.shape == (40, 48, 13) and abs(pixels - np.moveaxis(BANDS, 0, -1) / 4000 * 255).max() <= 0.5
    assert decode(data, "x", Reading(window=WINDOW, channels=13)).size == (48, 40)  # the first three are shown
    assert (decode_stored(data, "x", 13).values == np.moveaxis(BANDS, 0, -1)).all()


@pytest.mark.parametrize(("shape", "extra", "told"), [((8, 8, 4), "unspecified", True), ((8, 8, 5), None, True),
                                                      ((8, 8, 4), "unassalpha", False), ((8, 8, 3), None, False)])
def test_bands_that_rgb_leaves_out_are_told(shape: tuple, extra: str | None, told: bool, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "x").mkdir(parents=True)
        data = tiff(np.random.RandomState(0).randint(0, 256, shape, dtype=np.uint8), photometric="rgb", extrasamples=extra and [extra])
        (tmp_path / split / "x" / "1.tif").write_bytes(data)
    lines = [line for line in build_loaders(config_for(tmp_path)).notices if getattr(line, "code", "") == "bands"]
    assert len(lines) == told and all(f"--in-chans {shape[2]}" in line for line in lines)
    if told:
        loaders = build_loaders(config_for(tmp_path, "MODEL.IN_CHANS", shape[2]))
        assert next(iter(loaders.val))[0].shape[1] == shape[2] and not any(getattr(line, "code", "") == "bands" for line in loaders.notices)


def test_other_tiffs_by_their_bands(monkeypatch) -> None:
    unsaid = tiff(np.moveaxis(BANDS, 0, -1))  # 40 pages of 48 x 13
    assert abs(decode_pixels(unsaid, "x", Reading(window=WINDOW, channels=13)) - np.moveaxis(BANDS, 0, -1) / 4000 * 255).max() <= 0.5
    bytes_ = (BANDS[:5] >> 4).astype(np.uint8)
    assert (decode_pixels(tiff(bytes_, photometric="minisblack"), "x", Reading(channels=5)) == np.moveaxis(bytes_, 0, -1)).all()
    infrared = np.moveaxis(BANDS[:4], 0, -1)  # red, green, blue and one that is no alpha
    for photometric in ("rgb", "separated", "minisblack"):
        extra = dict(separated=None, rgb=["unspecified"], minisblack=["unspecified"] * 3)[photometric]
        data = tiff(infrared, photometric=photometric, planarconfig="contig", extrasamples=extra)
        pixels = decode_pixels(data, "x", Reading(window=WINDOW, channels=4))
        assert abs(pixels - infrared / 4000 * 255).max() <= 0.5, photometric
    planes = tiff(BANDS[:3], photometric="rgb", planarconfig="separate")  # which Pillow takes for noise
    assert abs(np.asarray(decode(planes, "x", Reading(window=WINDOW))) - np.moveaxis(BANDS[:3], 0, -1) / 4000 * 255).max() <= 0.5
    doubles = tiff(BANDS[0] / 4000)
    assert abs(decode_pixels(doubles, "x", Reading(window=(0.0, 1.0), channels=1))[..., 0] - BANDS[0] / 4000 * 255).max() <= 0.5
    bad = ((tiff(BANDS), 4, "it has 13 channels"), (tiff(BANDS)[:5000], 13, "failed to read"), (tiff(BANDS[:2] * 1j), 2, "complex"))
    for data, channels, words in bad:
        with pytest.raises(UnreadableImage, match=words):
            decode_pixels(data, "x", Reading(channels=channels))
    with monkeypatch.context() as patch, pytest.raises(UnreadableImage, match="bomb"):
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 900)
        decode_pixels(tiff(BANDS), "x", Reading(channels=13))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(UnreadableImage, match="pip install tifffile"):
        decode_pixels(planes, "x", Reading(window=WINDOW))


@pytest.mark.parametrize("channels", [1, 5])
def test_operations_treat_each_channel_as_one_of_rgb(channels: int) -> None:
    image, fill = np.dstack([np.asarray(texture(40, 48, i))[..., 0] for i in range(channels)]), tuple(range(40, 40 + channels))
    cases = {randaugment.ROTATE: 20.0, randaugment.POSTERIZE: 3, randaugment.SOLARIZE: 100, randaugment.SOLARIZE_ADD: 50,
             randaugment.BRIGHTNESS: 1.4, randaugment.SHARPNESS: 1.7, randaugment.SHEAR_X: 0.2, randaugment.SHEAR_Y: -0.3,
             randaugment.TRANSLATE_X: 7.0, randaugment.TRANSLATE_Y: -5.0, randaugment.AUTO_CONTRAST: 0, randaugment.EQUALIZE: 0,
             randaugment.INVERT: 0, randaugment.CONTRAST: 0.5}
    augmentation = type("Part", (), dict(fill=fill, mode="bicubic"))()
    for operation, argument in cases.items():
        mine = randaugment.apply(image.copy(), operation, argument, fill, "bicubic")
        if operation != randaugment.CONTRAST:  # whose middle is that of all channels
            alone = [randaugment.apply(np.repeat(image[..., i:i + 1], 3, axis=2), operation, argument, (fill[i],) * 3, "bicubic")[..., 0]
                     for i in range(channels)]
            assert (mine == np.stack(alone, axis=-1)).all(), operation
        planes = torch.from_numpy(image).permute(2, 0, 1)[None].float().contiguous()
        there = device_transforms._OPERATIONS[operation](planes, np.array([float(argument)]), augmentation)[0].permute(1, 2, 0).numpy()
        assert np.abs(there - mine).mean() < (3 if operation == randaugment.ROTATE else 0.02), operation


def test_what_needs_rgb_is_left_out_and_told() -> None:
    options = ["DATA.IMG_SIZE", "32", "MODEL.IN_CHANS", "2", "AUG.REPROB", "1"]
    pipeline, notices = build_train_pipeline(get_config(None, options), torch.device("cpu"))
    assert len(notices) == 1 and "ColorIncreasing" in notices[0] and pipeline.shape == (2, 32, 32)
    assert not any("Color" in op.name for op in pipeline.augmentation.policy.ops)
    transform = build_train_transform(get_config(None, [*options, "AUG.AUTO_AUGMENT", "none"]))
    assert leave_out_colour(transform) == ["saturation"]
    weighted = build_train_transform(get_config(None, [*options, "AUG.AUTO_AUGMENT", "rand-m9-tweights"]))
    leave_out_colour(weighted)
    policy = Augmentation(weighted).policy
    assert len(policy.choice_weights) == len(policy.ops) and policy.choice_weights.sum() == pytest.approx(1)
    assert leave_out_colour(build_train_transform(get_config(None, [*options, "AUG.AUTO_AUGMENT", "original"]))) == ["AutoAugment"]
    augmentation = Augmentation(transform)
    random.seed(0)
    rows = torch.stack([augmentation.pack(augmentation.sample(48, 40), 7)] * 2)
    assert DeviceAugment(augmentation)(torch.zeros(2, 32, 32, 2, dtype=torch.uint8), rows).shape == (2, 2, 32, 32)
    for key, value, build in (("DATA.INTERPOLATION", "lanczos", build_train_pipeline), ("DATA.INTERPOLATION", "nearest", None)):
        with pytest.raises(ConfigError, match="2 channels"):
            config = get_config(None, [*options, key, value])
            build(config, torch.device("cpu")) if build else build_eval_pipeline(config, torch.device("cpu"), False)
    for bad in (["DATA.MEAN", "[0.5, 0.5, 0.5]"], ["DATA.STD", "[0.1]"], ["DATA.DECODER", "pillow"], ["DATA.STD", "[0.1, 0]"]):
        with pytest.raises(ConfigError, match=bad[0].replace(".", r"\.")):
            get_config(None, [*options, *bad])


def write_bands(root: Path, counts: dict[str, int]) -> None:
    """Two classes of 13 bands in TIFF files, the second with a stronger last band."""
    generator = np.random.RandomState(1)
    for split, count in counts.items():
        for number, name in enumerate(("bare", "green")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                values = generator.randint(200, 2200, (13, 36, 40))
                values[12] += 1500 * number
                tifffile.imwrite(root / split / name / f"{i}.tif", values.astype(np.uint16), photometric="minisblack")


def test_thirteen_bands_from_training_to_export(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write_bands(tmp_path / "data", dict(train=6, val=2))
    (tmp_path / "tiny.yaml").write_text("DATA: {IMG_SIZE: 32, BATCH_SIZE: 4, NUM_WORKERS: 0}\n" + TINY_MODEL
                                        + "TRAIN: {EPOCHS: 1, WARMUP_EPOCHS: 0, REPORT: html}\n")
    assert main.main(["--cfg", "tiny.yaml", "--data-path", "data", "--in-chans", "13"]) == 0
    checkpoint = str(tmp_path / "output/tiny/default/last.pth")
    saved = load(Path(checkpoint))
    config = config_from_text(saved["config"])
    assert len(config.DATA.MEAN) == len(config.DATA.STD) == saved["preprocessing"]["input_size"][0] == 13
    assert len(config.DATA.WINDOW) == 13 and config.DATA.WINDOW[12][1] > 3500 > 2300 > config.DATA.WINDOW[0][1]
    assert saved["preprocessing"]["window"] == config.DATA.WINDOW and saved["model"]["patch_embed.projs.0.weight"].shape[1] == 13
    assert "ColorIncreasing" in (log := capsys.readouterr()).out + log.err
    assert main.main(["--eval", "--cfg", "tiny.yaml", "--data-path", "data"]) == 0  # which says nothing of channels
    image = "data/val/green/0.tif"
    assert main.main(["--predict", image, "--resume", checkpoint, "--json", "p.jsonl", "--sheet", "sheet.png"]) == 0
    assert main.main(["--export", "hub/", "--resume", checkpoint]) == 0
    described = json.loads(Path("hub/config.json").read_text())
    assert described["pretrained_cfg"]["input_size"] == [13, 32, 32] and described["pretrained_cfg"]["mean"] == config.DATA.MEAN
    prepare, (_, val) = described["pretrained_cfg"], next(iter(build_loaders(config_from_text(saved["config"]), splits=("val",)).val))
    assert val.tolist()[:4] == [0, 0, 1, 1] and prepare["std"] == config.DATA.STD
    pixels = decode_pixels(Path(image).read_bytes(), "x", Reading.of(config))
    bands = [Image.fromarray(pixels[..., i]).resize((40, 36), Image.Resampling.BICUBIC) for i in range(13)]  # 36 is 32 x 256 / 224
    pixels = (np.stack([np.asarray(b)[2:34, 4:36] for b in bands]) / 255 - np.array(prepare["mean"])[:, None, None]) \
        / np.array(prepare["std"])[:, None, None]
    with torch.no_grad():
        expected = timm.create_model("local-dir:hub", pretrained=True).eval()(torch.tensor(pixels[None], dtype=torch.float32)).softmax(1)[0]
    found = {row["class"]: row["probability"] for row in json.loads(Path("p.jsonl").read_text())["top"]}
    assert [found["bare"], found["green"]] == pytest.approx(expected.tolist(), abs=2e-3)
    # the commands that only look
    for command in (["--show-batch", "b.png"], ["--show-attention", image, "--show-file", "a.png"], ["--doctor", "--num-workers", "1"]):
        assert main.main([*command, "--resume", checkpoint]) == 0, command
    report = json.loads(next(Path("output/doctor").glob("*/report.json")).read_text())
    codes = {finding["code"]: finding for finding in report["findings"]}
    assert codes["deep"]["count"] == 16 and not {"unreadable-train", "blank", "tiny"} & set(codes)
    assert main.main(["--predict", image, "--resume", checkpoint, "--opts", "MODEL.IN_CHANS", "4"]) == 2
    capsys.readouterr()
    assert main.main(["--cfg", "tiny.yaml", "--data-path", "data", "--tag", "grey", "--in-chans", "4"]) == 3
    assert "it has 13 channels, and MODEL.IN_CHANS is 4" in capsys.readouterr().err


def test_pretrained_weights_are_adapted_as_timm_does(tiny_run: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "data", "train", dict(a=4, b=4))
    write_images(tmp_path / "data", "val", dict(a=1, b=1))
    (tmp_path / "tiny.yaml").write_text("DATA: {IMG_SIZE: 32, BATCH_SIZE: 4, NUM_WORKERS: 0}\n" + TINY_MODEL
                                        + "TRAIN: {EPOCHS: 1, WARMUP_EPOCHS: 0, BASE_LR: 1.0e-12, MIN_LR: 0, WARMUP_LR: 0, REPORT: none}\n")
    assert main.main(["--cfg", "tiny.yaml", "--data-path", "data", "--in-chans", "1", "--pretrained", str(tiny_run)]) == 0
    name = "patch_embed.projs.0.weight"
    before, after = load(tiny_run)["ema"][name], load(tmp_path / "output/tiny/default/last.pth")["model"][name]
    assert torch.allclose(after, before.sum(1, keepdim=True), atol=1e-5)


def test_each_of_many_bands_has_its_own_window_and_missing_values_none(tmp_path: Path) -> None:
    generator = np.random.RandomState(0)
    values = generator.randint(0, 10000, (6, 30, 30)).astype(np.float32)
    values[4] = generator.randint(10, 200, (30, 30))  # one window for all would leave it five levels
    values[5] = np.nan
    values[:, :9] = -9999
    values[0, 20] = -3.4e38
    tag = [(42113, "s", 0, "-9999", True)]
    (tmp_path / "0.tif").write_bytes(tiff(values, photometric="minisblack", extratags=tag))
    source = scan_flat(str(tmp_path))
    source.configure(Reading(channels=6), 0)
    found = find_levels(source)
    kept = [np.where(np.abs(band) > 9998.5, np.nan, band) for band in values[:5]]
    assert found.window == (*((np.nanmin(band), np.nanmax(band)) for band in kept), (0.0, 1.0)) and not found.few
    pixels = decode_pixels(source.read(0), "x", Reading(window=found.window, channels=6))
    assert len(np.unique(pixels[..., 4])) > 150 and not pixels[:9].any() and not pixels[20, :, 0].any()
    given = find_levels(source, (0.0, 10000.0))
    assert given.few and given.levels < 10 and len(given.better) == 6
    written = window_option(given.better).partition(" ")[2].strip("'")
    assert get_config(None, ["MODEL.IN_CHANS", "6", "DATA.WINDOW", written]).DATA.WINDOW[4] == list(found.window[4])
    for bad in ("[[0, 1], [0, 1]]", "[[0, 1], 2]", "[3, 1]", "[]"):
        with pytest.raises(ConfigError, match=r"DATA\.WINDOW"):
            get_config(None, ["MODEL.IN_CHANS", "6", "DATA.WINDOW", bad])
    grey = encoded(Image.fromarray(values[0]), "TIFF", tiffinfo={42113: "-9999"})
    (tmp_path / "0.tif").write_bytes(grey)
    assert find_levels(scan_flat(str(tmp_path))).window == found.window[0]


def test_statistics_of_channels(tmp_path: Path) -> None:
    generator = np.random.RandomState(0)
    values = generator.randint(0, 200, (3, 20, 20, 4)).astype(np.uint8)
    values[..., 3] = 255
    for i, pixels in enumerate(values):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_bytes(b"x")
    source = scan_flat(str(tmp_path))
    source.configure(Reading(channels=4), 0)
    mean, std = measure_channels(source, 0)
    assert mean == pytest.approx((values / 255).mean((0, 1, 2)).tolist(), abs=1e-4)
    assert std[:3] == pytest.approx((values / 255).std((0, 1, 2)).tolist()[:3], abs=1e-4) and std[3] == 1
    source.configure(Reading(channels=13), 0)
    with pytest.raises(DataError, match=r"MODEL\.IN_CHANS is 13"):
        measure_channels(source, 0)
    loaders = build_loaders(config_for(_classes(tmp_path), "MODEL.SWIN.IN_CHANS", 1, "MODEL.TYPE", "swin"), splits=("train",))
    assert next(iter(loaders.train))[0].shape[1] == 1 and len(loaders.found["DATA.MEAN"]) == 1


def _classes(folder: Path) -> Path:
    (folder / "train/a").mkdir(parents=True)
    for path in folder.glob("?.png"):
        path.rename(folder / "train/a" / path.name)
    return folder
