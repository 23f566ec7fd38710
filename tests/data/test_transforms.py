"""Transforms and pipelines against timm and Pillow: evaluation's pixels, who decodes what, mixup, and the bench of all paths."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, environment, load
from data_helpers import Operations, config_for, encoded, exif, texture
from PIL import Image

from config import get_config
from data import build_loaders
from data.decoding import jpeg
from data.sources.folder import scan_folder
from data.transforms.build import build_eval_transform, build_train_transform, preprocessing
from data.transforms.mixup import build_mixup
from data.transforms.pipeline import EvalPipeline, PillowPipeline


def test_evaluation_transform_resizes_and_crops() -> None:
    image = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (300, 1, 3)))
    config = get_config(None, ["DATA.IMG_SIZE", "224"])
    out = build_eval_transform(preprocessing(config))(image)
    restored = out[0] * 0.229 + 0.485
    assert out.shape == (3, 224, 224) and float(restored[112, 0]) == pytest.approx(16 / 255, abs=0.01)  # 256 wide already: crop 16
    squash = build_eval_transform(preprocessing(get_config(None, ["TEST.CROP", "False"])))(image)
    assert squash.shape == (3, 224, 224) and float(squash[0, 0, 0] * 0.229 + 0.485) < 0.01
    assert build_eval_transform(preprocessing(get_config(None, ["DATA.IMG_SIZE", "[96, 160]"])))(image).shape == (3, 96, 160)
    inception = preprocessing(get_config(None, ["MODEL.TYPE", "timm", "MODEL.NAME", "vit_base_patch16_224"]))
    assert inception["mean"] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("shape", [(48, 192), (192, 48), (1, 1000), (1000, 1), (64, 96)])
@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
def test_fit_keeps_both_ends_of_an_image_in_sight(shape: tuple[int, int], fit: str) -> None:
    """Red at the start, blue at the end of the longer side, in training, in evaluation, and as timm prepares it from the description."""
    pixels = np.full((*shape, 3), 90, np.uint8)
    end = max(1, max(shape) // 8)
    (pixels if shape[0] > shape[1] else pixels.swapaxes(0, 1))[:end] = 250, 20, 20
    (pixels if shape[0] > shape[1] else pixels.swapaxes(0, 1))[-end:] = 20, 20, 250
    image, size = Image.fromarray(pixels), (64, 96)
    plain = {"AUTO_AUGMENT": "none", "COLOR_JITTER": 0, "HFLIP": 0, "REPROB": 0, "SCALE": "[1, 1]", "RATIO": "[1, 1]"}
    config = get_config(None, ["DATA.IMG_SIZE", "[64, 96]", "DATA.FIT", fit, "DATA.INTERPOLATION", "bilinear",
                               *(str(word) for key, value in plain.items() for word in (f"AUG.{key}", value))])
    prepare = preprocessing(config)
    seen = [build_train_transform(config)(image), build_eval_transform(prepare)(image)]
    if min(shape) > 1:  # timm makes no side of an image so long
        seen.append(timm.data.create_transform(**prepare)(image))
    for out in seen:
        levels = 255 * (out * torch.tensor(prepare["std"])[:, None, None] + torch.tensor(prepare["mean"])[:, None, None])
        assert out.shape == (3, *size)
        ends = [bool((abs(levels - torch.tensor(colour)[:, None, None]).amax(0) < 8).any()) for colour in ((250., 20, 20), (20., 20, 250))]
        assert ends == [fit != "crop" or shape == size] * 2 or (fit == "crop" and out is seen[0] and shape == (64, 96))
    if fit != "crop":
        assert all((out - seen[1]).abs().mean() < 0.02 for out in seen)
    padding = seen[1].abs().amax(0) < 0.01  # the mean colour is nothing behind the normalisation
    inside = dict(squash=1, pad=min(1, shape[1] * 64 / (shape[0] * 96), shape[0] * 96 / (shape[1] * 64))).get(fit, 1)
    assert 1 - padding.float().mean() == pytest.approx(max(inside, 1 / 96), abs=0.03)


@pytest.mark.parametrize("interpolation", ["bicubic", "lanczos"])
def test_thousands_of_augmentations_pass(interpolation: str) -> None:
    """timm's posterize with 0 bits is an error in new Pillow, Lanczos one of its affine transforms; some draws of RandAugment ask for
    either."""
    transform = build_train_transform(get_config(None, ["DATA.IMG_SIZE", "32", "AUG.AUTO_AUGMENT", "rand-m10-n4-mstd0.5-inc1",
                                                        "DATA.INTERPOLATION", interpolation]))
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (36, 36, 3), dtype=np.uint8))
    random.seed(0)
    np.random.seed(0)
    for _ in range(2000):
        assert transform(image).shape == (3, 32, 32)


def test_mixup_is_a_function_of_seed_step_and_rank(images: Path) -> None:
    config = config_for(images)
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    mix = build_mixup(config, 4, rank=0)
    first = mix(x.clone(), y, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, mix(x.clone(), y, 5), strict=True))
    assert not torch.equal(first[0], mix(x.clone(), y, 6)[0])
    assert not torch.equal(first[0], build_mixup(config, 4, rank=1)(x.clone(), y, 5)[0])
    assert torch.allclose(first[1].sum(1), torch.ones(8))
    for mode in ("batch", "pair", "elem"):
        mix = build_mixup(config_for(images, "AUG.MIXUP_MODE", mode), 4, 0)
        mixed, targets = mix(x[:5].clone(), y[:5], 1)
        assert torch.equal(mixed[4], x[4]) and targets.shape == (5, 4) and targets[4].argmax() == y[4]
        assert mix(x[:1].clone(), y[:1], 1)[1].shape == (1, 4)
    off = build_mixup(config_for(images, "AUG.MIXUP", 0, "AUG.CUTMIX", 0), 4, 0)
    assert off(x, y, 0)[1] is y


@pytest.mark.parametrize("mode", ["elem", "pair"])
@pytest.mark.parametrize("opts", [(), ("AUG.CUTMIX_MINMAX", "[0.2, 0.8]"), ("AUG.MIXUP_PROB", 0.5)])
def test_images_mixed_all_at_once_are_those_of_timm(images: Path, mode: str, opts: tuple) -> None:
    """As on CUDA, where the number of launches does not depend on that of the images."""
    mixup = build_mixup(config_for(images, "AUG.MIXUP_MODE", mode, *opts), 4, 0).mixup
    x, seen = torch.randn(32, 3, 12, 16), []
    np.random.seed(3)
    expected = x.clone()
    shares = getattr(mixup, f"_mix_{mode}")(expected)
    for batch in (x, x[:8]):
        np.random.seed(3)
        with Operations() as operations:
            found = mixup.mix_rows(mixed := batch.clone(), len(batch) // (2 if mode == "pair" else 1))
        seen.append(operations.seen.total())
        if batch is x:
            assert torch.equal(mixed, expected) and torch.equal(found, shares) and not torch.equal(mixed, x)
    assert seen[0] == seen[1] < 20


def folder_of(root: Path, files: dict[str, bytes]) -> Path:
    for split in ("train", "val"):
        (root / split / "a").mkdir(parents=True)
        for name, data in files.items():
            (root / split / "a" / name).write_bytes(data)
    return root


@pytest.mark.parametrize("opts", [(), ("TEST.CROP", "False"), ("DATA.IMG_SIZE", "[96, 160]"), ("DATA.INTERPOLATION", "bilinear"),
                                  ("DATA.IMG_SIZE", "64", "TEST.CROP", "False"), ("DATA.FIT", "squash", "DATA.IMG_SIZE", "[96, 160]"),
                                  ("DATA.FIT", "pad", "DATA.IMG_SIZE", "[96, 160]")])
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
        limit = 0.3 if {"TEST.CROP", "squash"} & set(opts) and sizes[i][0] > sizes[i][1] else 0.05
        assert mine.shape == theirs.shape == fast.shape and off.mean() < limit and off.max() < 3.1, (i, off.mean())
        assert torch.allclose(onto_device.finish(onto_device(source, i)[None])[0], mine, atol=1e-5)
    assert fast.counts() == (6, 0) and fast.counts() == (0, 0)
    assert fast.summary(6, 0).startswith(f"decoded by {jpeg.LIBRARY}: 6;")


def test_files_that_only_pillow_decodes_are_counted(tmp_path: Path) -> None:
    image = texture(90, 110)
    root = folder_of(tmp_path, {"0.jpg": encoded(image), "1.JPEG": encoded(image, "PNG"), "2.jpg": encoded(image.convert("CMYK")),
                                "3.jpg": encoded(image, exif=exif("<", 8))})
    xmp = b'<rdf:RDF xmlns:tiff="http://ns.adobe.com/tiff/1.0/"><rdf:Description tiff:Orientation="3"/></rdf:RDF>'
    for split in ("train", "val"):
        (root / split / "a/4.jpg").write_bytes(encoded(image, xmp=xmp))
        Image.fromarray(np.dstack([np.asarray(image), np.full((90, 110), 40, np.uint8)])).save(root / split / "a/5.webp", lossless=True)
    upright = {}
    for turn, by_pillow in ((False, 3), (True, 5)):
        common = ["DATA.IMG_SIZE", 64, "DATA.BATCH_SIZE", 3, "DATA.EXIF", turn]
        loaders = build_loaders(config_for(root, *common, "DATA.NUM_WORKERS", 2), splits=("val",))
        exact = build_loaders(config_for(root, *common, "DATA.DECODER", "pillow"), splits=("val",))
        mine, theirs = (torch.cat([x for x, _ in loader]) for loader in (loaders.val, exact.val))
        assert (mine - theirs).abs().mean() * 255 * 0.225 < 0.05
        assert loaders.val.decoded == (6 - by_pillow, by_pillow)  # counted in two processes
        loaders.close()
        upright[turn] = theirs
    assert [not torch.equal(*pair) for pair in zip(upright[False], upright[True], strict=True)] == [False] * 3 + [True] * 2 + [False]


def test_pillow_decoder_is_the_papers_pixels(images: Path) -> None:
    config = config_for(images, "DATA.BATCH_SIZE", 32, "DATA.DECODER", "pillow")
    loaders = build_loaders(config, splits=("val",))
    source, transform = loaders.val.dataset.source, build_eval_transform(preprocessing(config))
    batch = next(iter(loaders.val))[0]
    assert all(torch.equal(batch[i], transform(Image.open(source.path(i)).convert("RGB"))) for i in range(len(source)))


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
    done = subprocess.run([sys.executable, str(ROOT / "scripts/bench_data.py"), "--images", "20", "--repeats", "1"], env=environment(),
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()[-5:]]
    assert names == ["ratio-device", "ratio-352", "ratio-256", "ratio-val", "ratio"]
    ratios = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines()[-5:]}
    assert all(ratio > 0 for ratio in ratios.values())  # how large they are is for the script to say, on a quiet machine
    assert not done.stderr
