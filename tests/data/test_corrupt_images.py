"""Images that cannot be read, hangs and narrow machines: nothing stops that need not, everything is named."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_MODEL, differences, environment, load, write_images
from data_helpers import config_for, same_batches

from data import DataError, build_loaders
from data.loading import loaders as made
from data.loading import workers
from data.sources.folder import ImageFolder


@pytest.fixture
def spoiled(tmp_path: Path) -> Path:
    """40 training images of two classes, three of them bad; 10 validation images, two of them bad."""
    write_images(tmp_path, "train", {"a": 20, "b": 20})
    write_images(tmp_path, "val", {"a": 5, "b": 5}, seed=1)
    (tmp_path / "train/a/3.png").write_bytes(b"")
    whole = (tmp_path / "train/b/4.jpg").read_bytes()
    (tmp_path / "train/b/4.jpg").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "train/b/5.png").write_text("<html>")
    (tmp_path / "val/a/0.jpg").write_text("<html>")
    (tmp_path / "val/b/2.jpg").write_bytes(b"")
    return tmp_path


def stream(root: Path, start: int, steps: int, *opts: object) -> tuple[list, list[str], list]:
    """(batches, messages, failures) of training on ``root``."""
    loaders, lines = build_loaders(config_for(root, "DATA.CORRUPT_BUDGET", 5, *opts), splits=("train",)), []
    loaders.report_unreadable(lines.append)
    batches = loaders.batches(start)
    found = [next(batches) for _ in range(steps)]
    loaders.close()
    return found, lines, loaders.train.failures


PIPELINES = [("DATA.AUGMENT_ON", "worker"), ("DATA.AUGMENT_ON", "device"), ("DATA.DECODER", "pillow"), ("DATA.DECODER", "nvjpeg")]


@pytest.fixture(autouse=True)
def _decoder_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """libjpeg stands in for nvJPEG."""
    monkeypatch.setattr("data.decoding.nvjpeg.require", lambda device: None)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_bad_images_are_replaced_the_same_way_however_the_stream_is_read(spoiled: Path, pipeline) -> None:
    whole, lines, failures = stream(spoiled, 0, 10, *pipeline)
    assert sorted(os.path.relpath(f.path, spoiled) for f in failures) == ["train/a/3.png", "train/b/4.jpg", "train/b/5.png"]
    assert len(lines) == 3 and all(line.level == logging.WARNING for line in lines)  # each once, though read in both epochs
    assert any("a/3.png: not a readable image (an empty file)" in line for line in lines)
    later = stream(spoiled, 4, 6, "DATA.NUM_WORKERS", 2, *pipeline)[0]
    same_batches(whole[4:], later)
    assert torch.cat([y for _, y in whole[:5]]).bincount().tolist() == [20, 20]  # of the same class
    other = stream(spoiled, 0, 5, "SEED", 1, *pipeline)[0]
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(whole, other, strict=False))


def test_replacements_differ_from_step_to_step_and_are_readable(tmp_path: Path) -> None:
    write_images(tmp_path, "train", {"a": 12})
    for i in range(10):
        next((tmp_path / "train/a").glob(f"{i}.*")).write_bytes(b"")
    dataset = build_loaders(config_for(tmp_path, "DATA.CORRUPT_BUDGET", 50), splits=("train",)).train.dataset
    assert len({float(dataset[(epoch, 0, 0)][0].sum()) for epoch in range(8)}) == 8
    assert dataset[(0, 0, 0)][1] == 0 and not torch.equal(dataset[(0, 0, 0)][0], dataset[(0, 1, 0)][0])
    for i in (10, 11):
        next((tmp_path / "train/a").glob(f"{i}.*")).write_bytes(b"")
    with pytest.raises(DataError, match="class 'a'"):
        dataset[(0, 0, 0)]


def test_over_the_budget_the_first_ten_are_named(tmp_path: Path) -> None:
    write_images(tmp_path, "train", {"a": 20, "b": 20})
    for i in range(15):
        next((tmp_path / "train/a").glob(f"{i}.*")).write_bytes(b"")
    with pytest.raises(DataError, match="DATA.CORRUPT_BUDGET") as caught:
        list(build_loaders(config_for(tmp_path, "DATA.CORRUPT_BUDGET", 12), splits=("train",)).batches())
    assert str(caught.value).count("an empty file") == 10 and "3 more" in str(caught.value) and "13 unreadable" in str(caught.value)
    share = build_loaders(config_for(tmp_path, "DATA.CORRUPT_BUDGET", 0.1), splits=("train",)).train
    assert share.budget == 4
    assert build_loaders(config_for(tmp_path), splits=("train",)).train.budget == 0


@pytest.mark.parametrize("pipeline", [("DATA.DECODER", "auto"), ("DATA.DECODER", "pillow")])
def test_evaluation_leaves_bad_images_out_and_says_so(spoiled: Path, pipeline) -> None:
    loaders, lines = build_loaders(config_for(spoiled, *pipeline), splits=("val",)), []
    loaders.report_unreadable(lines.append)
    for _ in range(2):
        images, targets = (torch.cat(parts) for parts in zip(*loaders.val, strict=True))
        assert (images.flatten(1).abs().amax(1) > 0).equal(targets >= 0)  # blank, whatever lay there before
        assert targets.tolist() == [-1, 0, 0, 0, 0, 1, 1, -1, 1, 1, -1, -1, -1, -1, -1, -1] and loaders.val.unreadable == 2
    assert sorted(os.path.relpath(line.partition(":")[0], spoiled) for line in lines) == ["val/a/0.jpg", "val/b/2.jpg"]


def test_the_program_goes_on_counts_and_resumes_exactly(spoiled: Path, program) -> None:
    cfg = spoiled / "tiny.yaml"
    cfg.write_text(f"DATA: {{DATA_PATH: '{spoiled}', IMG_SIZE: 32, BATCH_SIZE: 8, NUM_WORKERS: 0, CORRUPT_BUDGET: 0.1}}\n{TINY_MODEL}"
                   "TRAIN: {EPOCHS: 2, WARMUP_EPOCHS: 0, BASE_LR: 0.05, SAVE_EVERY_STEPS: 3, KEEP_CHECKPOINTS: 0}\n")
    done = program("--cfg", cfg)
    assert done.returncode == 0, done
    for name in ("train/a/3.png", "train/b/4.jpg", "train/b/5.png", "val/a/0.jpg", "val/b/2.jpg"):
        assert done.stdout.count(f"{name}: not a readable image") == 1
    assert done.stdout.count("warning: 2 of 10 validation images") == 2
    assert re.findall(r"\((\d+) of (\d+)\)", done.stdout)[-1][1] == "8"
    folder = program.folder / "output/tiny/default"
    again = program("--cfg", cfg, "--resume", folder / "ckpt_00000003.pth", "--tag", "again", "--num-workers", 1)
    assert again.returncode == 0, again
    assert not differences(load(folder / "last.pth")["model"], load(program.folder / "output/tiny/again/last.pth")["model"])
    evaluated = program("--eval", "--resume", folder / "last.pth")
    assert evaluated.returncode == 0 and evaluated.stdout.rstrip().endswith("of 8)"), evaluated
    for path in spoiled.glob("val/*/*"):
        path.write_bytes(b"")
    none = program("--eval", "--resume", folder / "last.pth")
    assert none.returncode == 3 and "none of its 10 validation images" in none.stderr


def test_a_hang_is_ended_and_the_file_named(tmp_path: Path, program, monkeypatch) -> None:
    write_images(tmp_path, "train", {"a": 10, "b": 10})
    write_images(tmp_path, "val", {"a": 2, "b": 2})
    fetch, here = ImageFolder.fetch, os.getpid()
    monkeypatch.setattr(ImageFolder, "fetch", lambda self, index: (
        time.sleep(3600) if self.path(index).endswith("a/7.png") and os.getpid() != here else fetch(self, index)))
    cfg = tmp_path / "tiny.yaml"
    cfg.write_text(f"DATA: {{DATA_PATH: '{tmp_path}', IMG_SIZE: 32, BATCH_SIZE: 8, NUM_WORKERS: 2, TIMEOUT: 2}}\n{TINY_MODEL}"
                   "TRAIN: {EPOCHS: 3, WARMUP_EPOCHS: 0}\n")
    done = program("--cfg", cfg)
    assert done.returncode == 3 and not multiprocessing.active_children(), done
    assert "2 seconds (DATA.TIMEOUT)" in done.stderr and "train/a/7.png;" in done.stderr and done.stderr.count("\n") == 1


def test_few_open_files_still_run(spoiled: Path) -> None:
    """A hard limit of 64: the batches go through pipes, and the stream is the same."""
    def run(pipe) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        loaders = build_loaders(config_for(spoiled, "DATA.NUM_WORKERS", 2), splits=("train",))
        pipe.send((loaders.train.dataset.pipe, digest(stream(spoiled, 0, 10, "DATA.NUM_WORKERS", 2)[0])))

    def digest(batches) -> str:
        return hashlib.sha256(b"".join(x.numpy().tobytes() for x, _ in batches)).hexdigest()

    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=run, args=(there,))
    process.start()
    assert here.poll(60) and here.recv() == (True, digest(stream(spoiled, 0, 10)[0]))
    process.join(10)
    assert process.exitcode == 0


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_batches_go_through_pipes_where_shared_memory_is_small(spoiled: Path, monkeypatch, pipeline) -> None:
    for module in (workers, made):
        monkeypatch.setattr(module, "free_shared_memory", lambda: 2 << 20)
    opts = ("DATA.NUM_WORKERS", 2, "DATA.CORRUPT_BUDGET", 5, "TEST.BATCH_SIZE", 200, *pipeline)
    loaders = build_loaders(config_for(spoiled, *opts))
    assert any("2.0 MiB" in line and "--shm-size" in line for line in loaders.notices)
    assert loaders.train.dataset.pipe and loaders.val.dataset.pipe
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", None)  # in the workers too: they are forked
    images, targets = next(loaders.batches())
    assert sum(len(y[y >= 0]) for _, y in loaders.val) == 8
    same_batches([(images, targets)], stream(spoiled, 0, 1, *pipeline)[0])
    loaders.close()
    assert not build_loaders(config_for(spoiled)).train.dataset.pipe
    monkeypatch.setattr(made, "free_shared_memory", lambda: 1000)
    loaders = build_loaders(config_for(spoiled, *opts))
    assert loaders.train.num_workers == 0 and any("/dev/shm can take 0 KiB" in line for line in loaders.notices)


def test_a_real_small_dev_shm(spoiled: Path) -> None:
    script = (f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}, {str(ROOT / 'tests/data')!r}]\n"
              "from pathlib import Path\nfrom test_corrupt_images import made, stream\n"
              f"print(len(stream(Path({str(spoiled)!r}), 0, 4, 'DATA.NUM_WORKERS', 2, 'DATA.IMG_SIZE', 224)[0]))")
    script += "\nimport os; os.system('mount -t tmpfs -o ro tmpfs /dev/shm')\nassert made.free_shared_memory() == 0\n"
    inner = f"mount -t tmpfs -o size=2m tmpfs /dev/shm && exec {sys.executable} -c \"$SCRIPT\""
    done = subprocess.run(["unshare", "-m", "bash", "-c", inner], env=environment(SCRIPT=script), capture_output=True, text=True,
                          timeout=60, check=False)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("needs the right to mount")
    assert done.returncode == 0 and done.stdout.strip() == "4", done.stderr[-800:]


def test_a_replacement_is_of_the_same_class(spoiled: Path) -> None:
    dataset = build_loaders(config_for(spoiled), splits=("train",)).train.dataset
    for epoch in range(3):
        for index in range(len(dataset.source)):
            assert dataset[(epoch, index, 0)][1] == dataset.source.targets[index]
    assert np.bincount(dataset.source.targets).tolist() == [20, 20]
