"""The augmentation's Triton kernels against its operations one by one: on a GPU, or where there is none by Triton's interpreter."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT
from data_helpers import Operations
from torch import Tensor

from config import get_config
from data.loading.device_prefetch import to_device
from data.messages import NOTICE
from data.transforms import randaugment as ra
from data.transforms.build import build_train_transform
from data.transforms.build_pipelines import build_train_pipeline
from data.transforms.device_transforms import DeviceAugment
from data.transforms.params import Augmentation, AugmentParams
from data.transforms.pipeline import TrainPipeline

triton = pytest.importorskip("triton")
from data.transforms import device_kernels  # noqa: E402

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if CUDA and not INTERPRETED else "cpu")
pytestmark = pytest.mark.gpu(or_cpu=True)
runs_kernels = pytest.mark.skipif(not CUDA and not INTERPRETED, reason="runs on a GPU, or as test_the_kernels_by_tritons_interpreter")
ARGUMENTS = {
    ra.AUTO_CONTRAST: [0], ra.EQUALIZE: [0], ra.INVERT: [0], ra.ROTATE: [0, 27.0, -13.3, 180.0], ra.POSTERIZE: [0, 1, 4, 8],
    ra.SOLARIZE: [0, 26, 256], ra.SOLARIZE_ADD: [0, 99, 128], ra.COLOR: [0.1, 1.0, 1.9], ra.CONTRAST: [0.1, 1.0, 1.9],
    ra.BRIGHTNESS: [0.1, 1.0, 1.9], ra.SHARPNESS: [0.1, 1.0, 1.9], ra.SHEAR_X: [0.27, -0.3], ra.SHEAR_Y: [0.123, -0.3],
    ra.TRANSLATE_X: [25.9, -3.5, -0.25, 500], ra.TRANSLATE_Y: [-28.8, 7, 0.25, -500]}
KERNELS = ("_flip", "_make_tables", "_apply", "_finish")


def augmentation_of(*opts: object) -> Augmentation:
    return Augmentation(build_train_transform(get_config(None, [*map(str, opts)])))


def pictures(height: int, width: int, channels: int) -> list[np.ndarray]:
    """Noise, few grey levels, one colour."""
    rng, shape = np.random.RandomState(0), (height, width, channels)
    return [rng.randint(0, 256, shape).astype(np.uint8), rng.randint(100, 104, shape).astype(np.uint8), np.full(shape, 77, np.uint8)]


def batch_of(augmentation: Augmentation, size: int) -> tuple[Tensor, Tensor]:
    """Noise with random parameters."""
    height, width = augmentation.size
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    rows = [augmentation.pack(augmentation.sample(90, 80), random.getrandbits(48)) for _ in range(size)]
    return torch.randint(256, (size, height, width, len(augmentation.mean)), dtype=torch.uint8), torch.stack(rows)


def assert_same(augmentation: Augmentation, crops: Tensor, rows: Tensor, noise: bool = False) -> None:
    """Equal bit for bit, but for the last bits of logarithms and cosines in ``noise``."""
    found = device_kernels.augment(crops.to(DEVICE), rows, augmentation).cpu()
    expected = DeviceAugment(augmentation)(crops, rows)
    assert found.shape == expected.shape and found.is_contiguous()
    different = (found != expected).flatten(1).any(1).nonzero().flatten().tolist()
    assert (torch.allclose(found, expected, rtol=0, atol=2e-6) if noise else not different), rows[different, 2:4]


@runs_kernels
@pytest.mark.parametrize(("mode", "channels"), [("bicubic", 3), ("bilinear", 3), ("bicubic", 2)])
def test_every_operation_is_the_one_of_the_plain_form(mode: str, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_kernels, "_BLOCK", 1024)
    augmentation = augmentation_of(
        "DATA.IMG_SIZE", "[24, 40]", "DATA.INTERPOLATION", mode, "AUG.REPROB", 0, "AUG.AUTO_AUGMENT", "rand-m9-n1")
    augmentation.mean, augmentation.std, augmentation.fill = (
        part[:channels] for part in (augmentation.mean, augmentation.std, (124, 116, 104)))
    crops, rows = [], []
    for operation, arguments in ARGUMENTS.items():
        if operation == ra.COLOR and channels != 3 or mode == "bilinear" and not (operation == ra.ROTATE or operation >= ra.SHEAR_X):
            continue
        for argument in arguments:
            for number, picture in enumerate(pictures(24, 40, channels)[:3 if argument == arguments[0] else 1]):
                params = AugmentParams((0, 0, 24, 40), number == 1, number == 2, [(operation, argument)], [])
                crops.append(torch.from_numpy(picture))
                rows.append(augmentation.pack(params, 0))
    assert_same(augmentation, torch.stack(crops), torch.stack(rows))


@runs_kernels
@pytest.mark.parametrize("opts", [
    ("AUG.REPROB", 1, "AUG.RECOUNT", 2, "AUG.VFLIP", 0.5), ("AUG.REPROB", 1, "AUG.REMODE", "const"),
    ("AUG.AUTO_AUGMENT", "none", "AUG.COLOR_JITTER", 0.4, "AUG.REPROB", 1, "AUG.REMODE", "rand")])
def test_whole_samples_are_those_of_the_plain_form(opts: tuple) -> None:
    augmentation = augmentation_of("DATA.IMG_SIZE", "[17, 33]", *opts)
    assert_same(augmentation, *batch_of(augmentation, 6), noise="const" not in opts)


@runs_kernels
def test_images_smaller_than_a_neighbourhood_and_no_operation() -> None:
    augmentation = augmentation_of("DATA.IMG_SIZE", "2", "AUG.REPROB", 0)
    size, crops = (0, 0, 2, 2), torch.arange(36, dtype=torch.uint8).view(3, 2, 2, 3)
    rows = [augmentation.pack(AugmentParams(size, True, False, drawn, []), 0) for drawn in ([], [(ra.SHARPNESS, 1.9)], [(ra.ROTATE, 45)])]
    assert_same(augmentation, crops, torch.stack(rows))


def test_the_kernels_by_tritons_interpreter() -> None:
    """In a process of its own: Triton reads the variable when it is imported."""
    if CUDA:
        pytest.skip("they have run on the GPU")
    process = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "plain_form or neighbourhood", __file__],
                             env=os.environ | dict(TRITON_INTERPRET="1"), cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0 and "7 passed" in process.stdout, process.stdout[-4000:] + process.stderr[-2000:]


@pytest.mark.parametrize(("opts", "launches"), [
    ((), 6), (("AUG.AUTO_AUGMENT", "none", "AUG.COLOR_JITTER", 0), 2), (("AUG.AUTO_AUGMENT", "rand-m9-n3"), 8)])
def test_the_number_of_launches_does_not_depend_on_what_is_drawn(opts: tuple, launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers of RandAugment, flips, normalisation and noise in boxes: 6 launches, of which the host waits for none; and one copy of
    all parameters, which on a CPU is none."""
    launched: Counter[str] = Counter()
    for name in KERNELS:
        monkeypatch.setattr(device_kernels, name, type("", (), {"__getitem__": lambda self, grid, name=name: (
            lambda *args, **options: launched.update([name]))})())
    augmentation = augmentation_of("DATA.IMG_SIZE", 32, "AUG.REPROB", 0.5, *opts)
    crops, rows = batch_of(augmentation, 16)
    device_kernels.augment(crops, rows, augmentation)  # the constants are there from now on
    drawn = [rows, rows[:1], rows[:8], torch.stack([augmentation.pack(AugmentParams((0, 0, 32, 32), False, False, [], []), 0)] * 16)]
    for part in drawn:
        launched.clear()
        with Operations() as torchs:
            device_kernels.augment(crops[:len(part)], part, augmentation)
        assert launched.total() == launches and not torchs.seen
    with Operations() as one_by_one:
        DeviceAugment(augmentation)(crops, rows)
    assert one_by_one.seen.total() > (60 if launches > 2 else 30)


def test_the_kernels_compile_for_a_gpu_and_keep_the_order_of_rounding() -> None:
    """No machine with a GPU is needed; what counts for the pixels is not contracted to multiply-adds."""
    if INTERPRETED:
        pytest.skip("nothing is compiled")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    types = dict(dict.fromkeys(("crops", "images", "source", "target", "tables"), "*u8"), stride="i32",
                 **dict.fromkeys(("flips", "operations", "turns", "boxes", "noise"), "*fp64"),
                 **dict.fromkeys(("fill", "mean", "std", "out"), "*fp32"))
    fixed = dict(H=32, W=48, C=3, BLOCK=256, CUBIC=True, BOXES=1, FILLING=2)
    for name in KERNELS:
        kernel = getattr(device_kernels, name)
        source = ASTSource(kernel, {a: "constexpr" if a in fixed else types[a] for a in kernel.arg_names},
                           {a: fixed[a] for a in kernel.arg_names if a in fixed})
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(enable_fp_fusion=False))
        assert compiled.asm["cubin"]
        assert name == "_finish" or not re.search(r"\bfma\.", compiled.asm["ptx"]), name


def test_without_triton_the_operations_are_applied_one_by_one_with_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    config, cuda = get_config(None, ["DATA.IMG_SIZE", "32"]), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "data.transforms.device_kernels", None)
    monkeypatch.delattr("data.transforms.device_kernels")
    pipeline, notices = build_train_pipeline(config, cuda)
    assert isinstance(pipeline, TrainPipeline) and pipeline.on_device and [line.level for line in notices] == [NOTICE]
    assert "Triton" in notices[0] and "ModuleNotFoundError" in notices[0]


@pytest.mark.gpu
def test_on_a_gpu_a_batch_is_augmented_by_the_kernels_without_a_wait() -> None:
    pipeline, notices = build_train_pipeline(get_config(None, ["DATA.IMG_SIZE", "64"]), torch.device("cuda"))
    assert not notices
    crops, rows = batch_of(pipeline.augmentation, 16)
    there = crops.to("cuda")
    pipeline.finish(there, rows)
    mode = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        with Operations() as torchs:
            found = pipeline.finish(there, rows)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert torchs.seen.total() < 8, torchs.seen  # to pinned memory, and from there to the device
    moved = to_device([(crops, rows)] * 3, lambda batch, device: pipeline.finish(batch[0].to(device), batch[1]), torch.device("cuda"))
    expected = DeviceAugment(pipeline.augmentation)(crops, rows)
    for images in (found, *moved):
        assert torch.allclose(images.cpu(), expected, rtol=0, atol=2e-6)
