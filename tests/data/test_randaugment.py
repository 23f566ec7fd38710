"""RandAugment here against timm on Pillow: the random parameters, every operation in a worker, every operation on the device."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data import auto_augment as timm_ops

from config import ConfigError, get_config
from data.messages import NOTICE
from data.sources.base import Source
from data.transforms import randaugment as ra
from data.transforms.build import build_train_transform
from data.transforms.build_pipelines import build_eval_pipeline, build_train_pipeline
from data.transforms.device_transforms import _OPERATIONS, DeviceAugment, normal_noise
from data.transforms.params import Augmentation
from data.transforms.pipeline import PillowPipeline, TrainPipeline

FILL = (124, 116, 104)
CPU = torch.device("cpu")


def augmentation_of(*opts: object) -> Augmentation:
    return Augmentation(build_train_transform(get_config(None, ["DATA.IMG_SIZE", "64", *map(str, opts)])))


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def pictures() -> list[np.ndarray]:
    """Noise, a ramp with edges, one colour, few grey levels, and one that is not square."""
    rng = np.random.RandomState(0)
    ramp = np.add.outer(np.arange(64) * 2, np.arange(64))[..., None] + np.array([0, 30, 60])
    ramp[20:40, 10:30] = 250
    return [rng.randint(0, 256, (64, 64, 3)).astype(np.uint8), np.clip(ramp, 0, 255).astype(np.uint8), np.full((64, 64, 3), 77, np.uint8),
            rng.randint(100, 104, (64, 64, 3)).astype(np.uint8), rng.randint(0, 256, (40, 56, 3)).astype(np.uint8)]


# (operation, arguments, timm's function of (image, argument, keywords)); the arguments span what m9-mstd0.5 draws and the extremes.
TABLE = [
    (ra.AUTO_CONTRAST, [0], lambda p, a, k: timm_ops.auto_contrast(p)), (ra.EQUALIZE, [0], lambda p, a, k: timm_ops.equalize(p)),
    (ra.INVERT, [0], lambda p, a, k: timm_ops.invert(p)), (ra.POSTERIZE, [1, 2, 4, 8], lambda p, a, k: timm_ops.posterize(p, a)),
    (ra.SOLARIZE, [0, 1, 26, 128, 256], lambda p, a, k: timm_ops.solarize(p, a)),
    (ra.SOLARIZE_ADD, [0, 99, 110, 128], lambda p, a, k: timm_ops.solarize_add(p, a)),
    (ra.COLOR, [0.1, 0.19, 1.0, 1.81, 1.9], lambda p, a, k: timm_ops.color(p, a)),
    (ra.CONTRAST, [0.1, 0.19, 1.0, 1.81, 1.9], lambda p, a, k: timm_ops.contrast(p, a)),
    (ra.BRIGHTNESS, [0.1, 0.19, 1.0, 1.81, 1.9], lambda p, a, k: timm_ops.brightness(p, a)),
    (ra.SHARPNESS, [0.1, 0.19, 1.0, 1.81, 1.9], lambda p, a, k: timm_ops.sharpness(p, a)),
]
GEOMETRY = [
    (ra.ROTATE, [0, 27.0, -13.3, 30.0], lambda p, a, k: timm_ops.rotate(p, a, **k)),
    (ra.SHEAR_X, [0.27, -0.3, 0.123], lambda p, a, k: timm_ops.shear_x(p, a, **k)),
    (ra.SHEAR_Y, [0.27, -0.3, 0.123], lambda p, a, k: timm_ops.shear_y(p, a, **k)),
    (ra.TRANSLATE_X, [25.9, -28.8, 3.5, 7, -0.25, 500], lambda p, a, k: timm_ops.translate_x_abs(p, a, **k)),
    (ra.TRANSLATE_Y, [25.9, -28.8, 3.5, 7, -0.25, -500], lambda p, a, k: timm_ops.translate_y_abs(p, a, **k)),
]


def on_device(pixels: np.ndarray, operation: int, argument: float, augmentation: Augmentation) -> np.ndarray:
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].repeat(2, 1, 1, 1).float()
    return _OPERATIONS[operation](images, np.array([argument, argument]), augmentation)[1].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("operation, arguments, of_timm", TABLE)
def test_table_operations_are_pillows_bit_for_bit(operation, arguments, of_timm) -> None:
    augmentation = augmentation_of()
    for pixels in pictures():
        for argument in arguments:
            expected = np.asarray(of_timm(Image.fromarray(pixels), argument, {}))
            assert np.array_equal(ra.apply(pixels, operation, argument, FILL, "bicubic"), expected), argument
            assert np.array_equal(on_device(pixels, operation, argument, augmentation), expected), argument


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("operation, arguments, of_timm", GEOMETRY)
def test_geometric_operations_are_pillows_within_rounding(operation, arguments, of_timm, mode, monkeypatch) -> None:
    monkeypatch.setattr(ra, "cv2", None)
    augmentation = augmentation_of("DATA.INTERPOLATION", mode)
    assert augmentation.mode == mode and augmentation.fill == FILL
    keywords = dict(fillcolor=FILL, resample=getattr(Image.Resampling, mode.upper()))
    for pixels in pictures():
        for argument in arguments:
            expected = np.asarray(of_timm(Image.fromarray(pixels), argument, keywords)).astype(int)
            for mine in (ra.apply(pixels, operation, argument, FILL, mode), on_device(pixels, operation, argument, augmentation)):
                off = np.abs(mine.astype(int) - expected)
                assert off.max() <= 1 or (off > 1).mean() < 2e-3, (argument, off.max())  # a pixel on the border may be in or out
                # Where a sum comes to a whole number, single and double precision may round down to either side of it.
                assert off.mean() < (0.01 if mode == "bicubic" else 0.1), argument
                if (pixels == 77).all():
                    assert off.max() == 0  # a flat area stays exactly flat, the uncovered part is exactly the fill


def test_rotation_by_opencv_is_close() -> None:
    pytest.importorskip("cv2")
    y, x = np.mgrid[:64, :64] / 10
    pixels = np.stack([120 + 90 * np.sin(x + k) * np.cos(y) for k in range(3)], -1).astype(np.uint8)
    mine = ra.apply(pixels, ra.ROTATE, 20, FILL, "bicubic").astype(int)
    theirs = np.asarray(Image.fromarray(pixels).rotate(20, Image.Resampling.BICUBIC, fillcolor=FILL)).astype(int)
    assert np.abs(mine - theirs).mean() < 2 and np.abs(mine - theirs)[16:48, 16:48].max() <= 4


def test_no_parameters_fail_and_zero_bits_are_black() -> None:
    """timm's own posterize asks Pillow for 0 bits about once in 650 images, which new Pillow refuses."""
    augmentation, pixels = augmentation_of(), np.random.RandomState(0).randint(0, 255, (64, 64, 3)).astype(np.uint8)
    seen = np.zeros(15, int)
    bits = set()
    for number in range(50_000):
        if number % 1000 == 0:
            seed(number)
        for operation, argument in augmentation._sample_policy():
            seen[operation] += 1
            if operation == ra.POSTERIZE:
                bits.add(argument)
            elif seen[operation] > 40:
                continue
            if operation != ra.POSTERIZE or argument == 0 or seen[operation] < 40:
                assert ra.apply(pixels, operation, argument, FILL, "bicubic").shape == pixels.shape
    assert bits >= {0, 1} and not ra.apply(pixels, ra.POSTERIZE, 0, FILL, "bicubic").any()
    assert not on_device(pixels, ra.POSTERIZE, 0, augmentation).any()
    # two of fifteen operations, each applied with probability 1/2: 3,333 of each are expected, 57 the deviation
    assert abs(seen - 50_000 / 15).max() < 300


@pytest.mark.parametrize("opts", [(), ("AUG.AUTO_AUGMENT", "none"), ("AUG.AUTO_AUGMENT", "rand-m5-n3-p0.7-mstd101"),
                                  ("AUG.AUTO_AUGMENT", "rand-m9-tweights-inc1", "AUG.VFLIP", 0.5), ("DATA.INTERPOLATION", "bilinear"),
                                  ("AUG.REMODE", "rand", "AUG.REPROB", 1, "AUG.RECOUNT", 3), ("AUG.REMODE", "const", "AUG.REPROB", 1),
                                  ("DATA.FIT", "squash"), ("DATA.FIT", "pad", "AUG.RATIO", "[0.2, 5]")])
def test_a_sample_is_the_one_timm_makes_of_the_same_seeds(opts, monkeypatch) -> None:
    """Not only the same distribution: the same random numbers, so that the images differ by the resize's rounding alone."""
    monkeypatch.setattr(ra, "cv2", None)
    config = get_config(None, ["DATA.IMG_SIZE", "[48, 64]", *map(str, opts)])
    transform = build_train_transform(config)
    y, x = np.mgrid[:100, :130] / 12
    image = Image.fromarray(np.stack([120 + 100 * np.sin(x + k) * np.cos(y) for k in range(3)], -1).astype(np.uint8))

    class OneImage(Source):
        def path(self, index: int) -> str:
            return "one.png"

        def fetch(self, index: int) -> bytes:
            image.save(file := io.BytesIO(), "PNG")
            return file.getvalue()

    worker, device = TrainPipeline(Augmentation(transform), on_device=False), TrainPipeline(Augmentation(transform), on_device=True)
    off, cross = [], []
    for number in range(40):
        seed(number)
        theirs = transform(image)
        seed(number)
        mine = worker(OneImage(), 0)
        seed(number)
        crop, row = device(OneImage(), 0)
        finished = device.finish(crop[None], row[None])[0]
        boxes = worker.augmentation.unpack(row[None].numpy())[2][0].astype(int)
        plain = torch.ones(48, 64, dtype=torch.bool)  # what is erased is noise of another source on the device
        for top, left, height, width in boxes:
            plain[top:top + height, left:left + width] = False
        off.append((255 * 0.225 * (theirs - mine).abs()).mean().item())
        cross.append((255 * 0.225 * (mine - finished).abs())[:, plain].mean().item() if plain.any() else 0)
    # Solarize, equalize and posterize turn the resize's 1 of 255 into more in some pixels of some images.
    assert np.median(off) < 0.05 and np.mean(off) < 0.8, (np.median(off), np.mean(off))
    assert max(cross) < 0.02, max(cross)


def test_crop_boxes_flips_and_erasing_have_timms_distribution() -> None:
    """A check by statistics, on samples that share no seed with timm's."""
    from timm.data.random_erasing import RandomErasing
    from timm.data.transforms import RandomResizedCropAndInterpolation
    augmentation, picture = augmentation_of("AUG.REPROB", 0.25), Image.new("RGB", (500, 375))
    seed(1)
    samples = [augmentation.sample(500, 375) for _ in range(3000)]
    seed(2)
    crops = [RandomResizedCropAndInterpolation.get_params(picture, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(3000)]
    for part in range(4):
        assert stats.ks_2samp([s.crop[part] for s in samples], [c[part] for c in crops]).pvalue > 1e-3
    assert abs(np.mean([d.hflip for d in samples]) - 0.5) < 0.04 and not any(d.vflip for d in samples)
    assert abs(np.mean([bool(d.boxes) for d in samples]) - 0.25) < 0.04
    erase = RandomErasing(1.0, mode="const", device="cpu")
    areas = [1 - erase(torch.ones(1, 64, 64)).mean().item() for _ in range(1000)]
    mine = [d.boxes[0][2] * d.boxes[0][3] / 64 ** 2 for d in samples if d.boxes]
    assert stats.ks_2samp(mine, areas).pvalue > 1e-3


def test_magnitudes_have_timms_distribution() -> None:
    augmentation = augmentation_of()
    seed(3)
    mine = [a for _ in range(12_000) for o, a in augmentation._sample_policy() if o == ra.SHEAR_X]
    op = next(o for o in augmentation.policy.ops if o.name == "ShearX")
    seen = []
    op.aug_fn = lambda image, factor, **_: seen.append(factor)
    for _ in range(1600):
        op(None)
    assert stats.ks_2samp(mine, seen).pvalue > 1e-3 and 0.2 < np.abs(mine).mean() < 0.3


def test_device_samples_do_not_depend_on_their_batch() -> None:
    augmentation = augmentation_of("AUG.REPROB", 1.0, "AUG.RECOUNT", 2)
    augment = DeviceAugment(augmentation)
    crops = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (24, 64, 64, 3)).astype(np.uint8))
    rows = []
    for number in range(24):
        seed(number)
        rows.append(augmentation.pack(augmentation.sample(90, 80), random.getrandbits(48)))
    rows = torch.stack(rows)
    whole = augment(crops, rows)
    assert whole.shape == (24, 3, 64, 64) and whole.is_contiguous()
    order = torch.randperm(24)
    assert torch.equal(augment(crops[order], rows[order]), whole[order])
    assert torch.equal(torch.cat([augment(crops[i:i + 1], rows[i:i + 1]) for i in range(24)]), whole)


def test_noise_is_normal_and_differs_by_seed_and_place() -> None:
    noise = normal_noise(torch.arange(40) * 7919 + (1 << 30), (3, 40, 40))
    assert stats.kstest(noise.flatten().numpy()[::3], "norm").pvalue > 1e-3
    flat = noise.flatten(1)
    assert abs(np.corrcoef(flat.numpy()) - np.eye(40)).max() < 0.08
    assert abs(np.corrcoef(flat[:, 1:].flatten(), flat[:, :-1].flatten())[0, 1]) < 0.01
    assert torch.equal(normal_noise(torch.tensor([7919 + (1 << 30)]), (3, 40, 40))[0], noise[1])


def test_what_is_not_supported_is_timms_with_a_notice() -> None:
    for opts in (("AUG.AUTO_AUGMENT", "augmix-m3-w3"), ("AUG.AUTO_AUGMENT", "original"), ("AUG.AUTO_AUGMENT", "3a"),
                 ("AUG.AUTO_AUGMENT", "v0"), ("AUG.AUTO_AUGMENT", "rand-m9-t3aw"), ("DATA.INTERPOLATION", "lanczos"),
                 ("DATA.INTERPOLATION", "random")):
        pipeline, lines = build_train_pipeline(get_config(None, list(opts)), CPU)
        assert isinstance(pipeline, PillowPipeline) and [line.level for line in lines] == [NOTICE], opts
        with pytest.raises(ConfigError, match="DATA.AUGMENT_ON is device"):
            build_train_pipeline(get_config(None, [*opts, "DATA.AUGMENT_ON", "device"]), CPU)
    assert isinstance(build_train_pipeline(get_config(None, []), CPU)[0], TrainPipeline)
    assert isinstance(build_train_pipeline(get_config(None, ["DATA.DECODER", "pillow"]), CPU)[0], PillowPipeline)
    with pytest.raises(ConfigError, match="DATA.AUGMENT_ON device .*DATA.DECODER pillow"):
        build_train_pipeline(get_config(None, ["DATA.DECODER", "pillow", "DATA.AUGMENT_ON", "device"]), CPU)
    assert build_train_pipeline(get_config(None, []), torch.device("cuda"))[0].on_device  # auto, on a GPU
    assert isinstance(build_eval_pipeline(get_config(None, []), CPU, published=True)[0], PillowPipeline)
    assert not isinstance(build_eval_pipeline(get_config(None, ["DATA.DECODER", "fast"]), CPU, published=True)[0], PillowPipeline)
