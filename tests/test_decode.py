"""Every real-world file has one defined result, or counts as unreadable."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data.decoding.pillow import decode
from data.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def grey(data: bytes) -> np.ndarray:
    image = decode(data, "x")
    pixels = np.asarray(image)
    assert image.mode == "RGB" and (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all()
    return pixels[..., 0].astype(int)


@pytest.mark.parametrize(("dtype", "form"), [(np.uint16, "PNG"), (np.uint16, "TIFF"), (np.uint16, "PPM"), (">u2", "TIFF"),
                                             (np.int32, "TIFF"), (np.float32, "TIFF")])
def test_deep_grey_is_scaled_not_clipped(dtype, form: str) -> None:
    assert (grey(encoded(Image.fromarray((RAMP.astype(np.uint16) * 257).astype(dtype)), form)) == RAMP).all()


def test_floats_of_one_and_integers_of_a_byte_keep_their_range() -> None:
    assert (grey(encoded(Image.fromarray((RAMP / 255).astype(np.float32)), "TIFF")) == RAMP).all()
    assert (grey(encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF")) == RAMP).all()
    assert (grey(encoded(Image.fromarray((RAMP * 1000.0 - 7e4).astype(np.float32)), "TIFF")) == RAMP).all()
    hollow = np.where(RAMP > 9, np.nan, RAMP).astype(np.float32)
    assert grey(encoded(Image.fromarray(hollow), "TIFF")).max() == 9


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
    assert decode(data, "x").size == (30, 20) and decode(data, "x", exif=True).size == (20, 30)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (20000, 3)])
def test_odd_sizes_pass_and_go_through_both_transforms(size: tuple[int, int]) -> None:
    import random

    from config import get_config
    from data.transforms.build import build_eval_transform, build_train_transform, preprocessing
    image = decode(encoded(Image.new("RGB", size, (9, 8, 7)), "PNG"), "x")
    assert image.size == size
    config = get_config(None, ["DATA.IMG_SIZE", "32"])
    random.seed(0)
    assert build_train_transform(config)(image).shape == (3, 32, 32)
    assert build_eval_transform(preprocessing(config))(image).shape == (3, 32, 32)


def bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_what_is_no_image_is_named_with_the_reason() -> None:
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64)).astype(np.uint8))
    jpeg, png = encoded(noise, "JPEG"), encoded(noise, "PNG")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 255
    rows = [(b"", "an empty file"), (b"<html>no such image</html>", "none of jpeg"), (jpeg[:len(jpeg) // 2], "truncated"),
            (png[:len(png) // 2], ""), (bytes(flipped), ""), (bomb(20000, 20000), "decompression bomb"), (bomb(60000, 60000), "bomb"),
            (encoded(Image.fromarray(RAMP), "PCX"), "none of jpeg"), (b"GIF89a", ""), (b"II*\x00" + bytes(30), ""), (b"P6 9 9 255\n", "")]
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
