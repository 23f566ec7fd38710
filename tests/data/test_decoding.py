"""Decoding: every file has one defined result or counts as unreadable, and the fast decoder gives Pillow's pixels."""

from __future__ import annotations

import importlib.util
import io
import random
import struct
import sys
import time
import warnings

import numpy as np
import pytest
from data_helpers import encoded, exif, png_bomb, texture
from PIL import Image

from config import get_config
from data.decoding import jpeg
from data.decoding.pillow import Reading, decode
from data.decoding.resize import MODES, resize_crop, resize_window, rows_needed
from data.errors import DataError
from data.transforms.build import build_eval_transform, build_train_transform, preprocessing

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def grey(data: bytes) -> np.ndarray:
    image = decode(data, "x")
    pixels = np.asarray(image)
    assert image.mode == "RGB" and (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all()
    return pixels[..., 0].astype(int)


def test_transparent_pixels_are_white_whatever_lies_below() -> None:
    red = Image.new("RGBA", (4, 4), (255, 0, 0, 255))
    red.putpixel((0, 0), (0, 0, 0, 0))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 255, 0, 0])
    palette.putpixel((0, 0), 0)
    files = [encoded(red, "PNG"), encoded(red, "WEBP", lossless=True), encoded(red, "TIFF"),
             encoded(palette, "PNG", transparency=0), encoded(palette, "PNG", transparency=b"\x00\xff"),
             encoded(palette, "GIF", transparency=0)]
    for data in files:
        pixels = np.asarray(decode(data, "x"))
        assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[1, 1].tolist() == [255, 0, 0]
    pale = Image.new("LA", (3, 3), (0, 128))
    assert abs(grey(encoded(pale, "PNG")) - 127).max() <= 1
    opaque = Image.fromarray(np.dstack([RAMP, RAMP, RAMP, np.full_like(RAMP, 255)]))
    assert (grey(encoded(opaque, "PNG")) == RAMP).all()
    keyed = Image.new("RGB", (2, 2), (5, 5, 5))
    assert (grey(encoded(keyed, "PNG", transparency=(5, 5, 5))) == 255).all()


def test_one_bit_palette_and_first_frame() -> None:
    assert sorted(set(grey(encoded(Image.fromarray(RAMP > 99), "PNG")).ravel())) == [0, 255]
    frames = [Image.new("P", (5, 5), i) for i in range(3)]
    for frame in frames:
        frame.putpalette([10, 20, 30, 0, 255, 0, 0, 0, 255])
    assert np.asarray(decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "x"))[2, 2].tolist() == [10, 20, 30]


def test_cmyk_of_adobe_and_ycck_show_the_picture() -> None:
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    plain = encoded(cyan, "JPEG", quality=95)
    assert b"Adobe" in plain and np.asarray(decode(plain, "x"))[3, 3].tolist() == [0, 255, 255]
    at = plain.index(b"Adobe") + 11  # the colour transform: 2 says YCCK
    ycck = plain[:at] + b"\x02" + plain[at + 1:]
    with Image.open(io.BytesIO(ycck)) as image:
        assert image.info["adobe_transform"] == 2
    assert decode(ycck, "x").mode == "RGB"
    assert np.asarray(decode(encoded(cyan, "TIFF"), "x"))[3, 3].tolist() == [0, 255, 255]


def test_orientation_is_a_choice() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (30, 20)), "JPEG", exif=exif)
    assert decode(data, "x").size == (30, 20) and decode(data, "x", Reading(exif=True)).size == (20, 30)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (20000, 3)])
def test_odd_sizes_pass_and_go_through_both_transforms(size: tuple[int, int]) -> None:
    image = decode(encoded(Image.new("RGB", size, (9, 8, 7)), "PNG"), "x")
    assert image.size == size
    config = get_config(None, ["DATA.IMG_SIZE", "32"])
    random.seed(0)
    assert build_train_transform(config)(image).shape == (3, 32, 32)
    assert build_eval_transform(preprocessing(config))(image).shape == (3, 32, 32)


def test_what_is_no_image_is_named_with_the_reason() -> None:
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64)).astype(np.uint8))
    jpg, png = encoded(noise, "JPEG"), encoded(noise, "PNG")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 255
    rows = [(b"", "an empty file"), (b"<html>no such image</html>", "none of jpeg"), (jpg[:len(jpg) // 2], "truncated"),
            (png[:len(png) // 2], ""), (bytes(flipped), ""), (png_bomb(20000, 20000), "decompression bomb"),
            (png_bomb(60000, 60000), "bomb"), (encoded(Image.fromarray(RAMP), "PCX"), "none of jpeg"), (b"GIF89a", ""),
            (b"II*\x00" + bytes(30), ""), (b"P6 9 9 255\n", "")]
    for data, reason in rows:
        with pytest.raises(DataError, match="a/b.jpg: not a readable image") as caught:
            decode(data, "a/b.jpg")
        assert reason in str(caught.value).lower() and "\n" not in str(caught.value) and "0x" not in str(caught.value)


def test_the_name_does_not_decide_the_format() -> None:
    for form in ("PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG", "MPO"):
        assert decode(encoded(Image.fromarray(RAMP).convert("RGB"), form), "picture.JPEG").size == (16, 16)


def test_damaged_bytes_end_in_one_kind_of_error() -> None:
    """Hundreds of random damages of every format: an image or a DataError, nothing else."""
    generator = np.random.RandomState(0)
    noise = Image.fromarray(generator.randint(0, 255, (24, 24, 3)).astype(np.uint8))
    for form in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"):
        data = encoded(noise, form)
        for _ in range(60):
            spoiled = bytearray(data[:generator.randint(1, len(data) + 1)])
            for at in generator.randint(0, len(spoiled), 3):
                spoiled[at] = generator.randint(256)
            try:
                assert decode(bytes(spoiled), "x").mode == "RGB"
            except DataError as error:
                assert str(error).startswith("x: not a readable image (")


# --------------------------------------------------------------------------------------------------
# The fast decoder and resize
# --------------------------------------------------------------------------------------------------

def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.fixture(params=["simplejpeg", "torchvision"])
def decoder(request, monkeypatch) -> str:
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg")
    else:
        monkeypatch.setattr(jpeg, "simplejpeg", None)
    return request.param


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
    assert capfd.readouterr().err == ""  # libjpeg would warn of the bytes that are skipped


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


def test_what_is_not_plain_is_left_to_pillow(decoder) -> None:
    image = texture(60, 80)
    good = encoded(image)
    for data in (b"", b"\xff\xd8", encoded(image, "PNG"), b"<html>", good[:200], encoded(image.convert("CMYK"))):
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


def test_no_warning_of_torchvisions_decoders_and_pillow_without_them(monkeypatch) -> None:
    """A later torchvision will not have them: no warning even where all are shown, and Pillow takes over without them."""
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
        rows = rows_needed(shape[0], size[0], top + 224)
        window = resize_window(image[:rows], shape, size, (top, left, 224, 224), mode)
        assert np.array_equal(window, whole[top:top + 224, left:left + 224])
