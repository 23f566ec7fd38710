"""What the tests share: small real images on disk, a tiny recipe, and ways to run the program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import warm_start
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
# A shell's background job ignores Ctrl-C, and so would every program that a test starts.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

# fp32: the tests compare bits across settings; auto is bf16 where the CPU computes it.
TINY_MODEL = """
PRECISION: fp32
MODEL:
  NAME: tiny
  DROP_PATH_RATE: 0.2
  CROSSFORMER: {EMBED_DIM: 16, DEPTHS: [1, 2], NUM_HEADS: [1, 2], GROUP_SIZE: [4, 4], INTERVAL: [2, 1], MERGE_SIZE: [[2, 4]]}
"""


def write_images(root: Path, split: str, counts: dict[str, int], seed: int = 0) -> None:
    """Noise over a brightness that tells the class, so that a few steps learn something."""
    generator = np.random.RandomState(seed)
    for number, (name, count) in enumerate(counts.items()):
        folder = root / split / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = generator.randint(0, 120, (40, 48, 3)) + 40 * number
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.{'png' if i % 2 else 'jpg'}")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes, 44 training and 19 validation images, of a size that is not the model's."""
    root = tmp_path_factory.mktemp("images")
    write_images(root, "train", dict(a=11, b=11, c=11, d=11))
    write_images(root, "val", dict(a=5, b=5, c=5, d=4), seed=1)
    return root


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of three ImageNet classes, 12 training and 5 validation images."""
    root = tmp_path_factory.mktemp("plain")
    write_images(root, "train", {"n01440764": 4, "n01443537": 3, "n02102040": 5})
    write_images(root, "val", {"n01440764": 2, "n01443537": 2, "n02102040": 1}, seed=1)
    return root


@pytest.fixture(scope="session")
def tiny_cfg(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YAML file that trains a 40,000-parameter CrossFormer with everything random switched on."""
    path = tmp_path_factory.mktemp("cfg") / "tiny.yaml"
    path.write_text(f"DATA: {{DATASET: folder, DATA_PATH: '{images}', IMG_SIZE: 32, BATCH_SIZE: 8, NUM_WORKERS: 0}}\n"
                    + TINY_MODEL + "TRAIN: {EPOCHS: 2, WARMUP_EPOCHS: 0.5, BASE_LR: 0.05, EMA_DECAY: 0.9, REPORT: html}\nPRINT_FREQ: 2\n")
    return path


@pytest.fixture(scope="session")
def tiny_run(tiny_cfg: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The best checkpoint of two epochs of ``tiny_cfg``, with averaged weights beside the raw ones."""
    import main
    output = tmp_path_factory.mktemp("run")
    assert main.main(["--cfg", str(tiny_cfg), "--output", str(output)]) == 0
    return output / "tiny/default/best.pth"


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without a launcher's variables, plus ``extra``."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {name: value for name, value in os.environ.items() if name not in launcher}
    # One thread: such small tensors gain nothing from more, and the machine runs other tests.
    return {**clean, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", **extra}


def run_main(*arguments: object, cwd: Path, timeout: int = 120, **env: str) -> subprocess.CompletedProcess[str]:
    """``python main.py ...``."""
    return warm_start.run([str(argument) for argument in arguments], cwd, environment(**env), timeout)


def torchrun(*arguments: object, cwd: Path, processes: int = 2, timeout: int = 180) -> subprocess.CompletedProcess[str]:
    """``torchrun main.py ...`` with gloo processes on the CPU, a thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
               str(ROOT / "main.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment(CUDA_VISIBLE_DEVICES=""), capture_output=True,
                          text=True, timeout=timeout, check=False)


def load(path: Path) -> dict:
    """A checkpoint, by torch's own safe reader."""
    return torch.load(path, map_location="cpu", weights_only=True)


def differences(a: object, b: object, where: str = "") -> list[str]:
    """Where two nested structures of plain values and tensors are not equal, bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [f"{where}: keys"] if a.keys() != b.keys() else []
        return keys + [d for k in a.keys() & b.keys() for d in differences(a[k], b[k], f"{where}.{k}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{where}[{i}]")]
    return [] if a == b else [where]


class InProcess:
    """The program called in this process, where no process of its own is at stake: no import of torch each time."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
        self.folder, self.capsys = folder, capsys
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.chdir(folder)

    def __call__(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        import main
        self.capsys.readouterr()
        status = main.main([str(argument) for argument in arguments])
        captured = self.capsys.readouterr()
        return subprocess.CompletedProcess(arguments, status, captured.out, captured.err)


def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("gpu")
    if marker is not None and not marker.kwargs.get("or_cpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Where CI is set the optional packages are installed: a test that is skipped for want of one would never run."""
    report = (yield).get_result()
    if os.environ.get("CI") and report.skipped and "could not import" in str(report.longrepr):
        report.outcome = "failed"


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Models share code objects; without this torch.compile would fall back to dynamic shapes from test to test."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture
def program(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> InProcess:
    return InProcess(tmp_path, capsys, monkeypatch)
