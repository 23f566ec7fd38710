"""Samplers, seeds, batches and workers: the stream of steps is a function of the config."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import differences, load, write_images
from data_helpers import config_for, first_batches, same_batches, sources

from config import ConfigError
from data import build_loaders
from data.dense.samplers import AspectStepSampler
from data.loading.loader import _WorkerDeaths
from data.loading.sampler import ShardSampler, StepSampler
from data.loading.trial_batch import trial_images
from data.loading.workers import free_shared_memory, pipe_reason, worker_count
from data.seeds import derive

STATE = ("model", "ema", "optimizer", "step", "best")
def test_an_epoch_sees_each_image_at_most_once_and_drops_another_remainder() -> None:
    sampler = StepSampler(103, 10, epochs=4, seed=1)
    assert (sampler.steps_per_epoch, sampler.total_steps) == (10, 40)
    steps = list(sampler)
    dropped = []
    for epoch in range(4):
        keys = [key for step in steps[epoch * 10:(epoch + 1) * 10] for key in step]
        assert {k[0] for k in keys} == {epoch} and len({k[1] for k in keys}) == 100
        dropped.append(set(range(103)) - {k[1] for k in keys})
    assert len({frozenset(d) for d in dropped}) == 4


def test_ranks_share_each_global_batch_whatever_their_number() -> None:
    whole = StepSampler(50, 12, 2, seed=5)
    for world in (2, 3, 4):
        ranks = [StepSampler(50, 12, 2, 5, rank, world) for rank in range(world)]
        for step in range(whole.total_steps):
            assert sum((r.keys(step) for r in ranks), []) == whole.keys(step)


def test_starting_later_is_the_same_stream() -> None:
    all_steps = list(StepSampler(50, 12, 3, seed=5))
    later = StepSampler(50, 12, 3, seed=5)
    later.start = 7
    assert list(later) == all_steps[7:] and len(later) == len(all_steps) - 7


def test_small_data_is_one_short_batch_shared_by_ranks() -> None:
    ranks = [StepSampler(11, 64, 2, 0, rank, 3) for rank in range(3)]
    assert [r.local_images() for r in ranks] == [3, 4, 4] and ranks[0].steps_per_epoch == 1
    assert {k[1] for r in ranks for k in r.keys(1)} == set(range(11))


def test_repeated_augmentation() -> None:
    keys = [k for step in StepSampler(30, 6, 1, 0, repeats=3) for k in step]
    assert len(keys) == 30 and len(set(keys)) == 30 and len({k[1] for k in keys}) == 10
    assert sorted({k[2] for k in keys}) == [0, 1, 2]


@pytest.mark.parametrize(("sampling", "draws"), [("natural", [190, 0, 40, 10]), ("balanced", [80, 0, 80, 80]),
                                                 ("sqrt", [240 * root / (190 ** 0.5 + 40 ** 0.5 + 10 ** 0.5)
                                                           for root in (190 ** 0.5, 0, 40 ** 0.5, 10 ** 0.5)])])
def test_classes_are_sampled_as_often_as_asked(sampling: str, draws: list[float]) -> None:
    """In every epoch, by images that come equally often; the same from any step on and for any number of ranks."""
    targets = np.random.RandomState(0).permutation(np.repeat([0, 2, 3], [190, 40, 10]))
    whole = StepSampler(240, 24, 6, 5, targets=targets, sampling=sampling)
    assert whole.draws == pytest.approx(draws)
    steps = list(whole)
    for epoch in range(6):
        keys = [key for step in steps[10 * epoch:10 * epoch + 10] for key in step]
        assert len(set(keys)) == 240  # an image that comes again is augmented anew
        times = np.bincount([index for _, index, _ in keys], minlength=240)
        for number, expected in enumerate(draws):
            assert abs(times[targets == number].sum() - expected) <= 1
            assert not expected or np.ptp(times[targets == number]) <= 1
    assert sampling == "natural" or len({tuple(sorted(index for _, index, _ in step)) for step in steps}) == 60
    later = StepSampler(240, 24, 6, 5, targets=targets, sampling=sampling)
    later.start = 27
    assert list(later) == steps[27:]
    ranks = [StepSampler(240, 24, 6, 5, rank, 3, targets=targets, sampling=sampling) for rank in range(3)]
    assert sum((rank.keys(33) for rank in ranks), []) == steps[33]
    twice = StepSampler(240, 24, 1, 5, repeats=2, targets=targets, sampling=sampling)
    assert len({key for step in twice for key in step}) == 240


@pytest.mark.parametrize("world", [1, 2, 3, 25])
def test_evaluation_shards_cover_everything_once(world: int) -> None:
    seen = [i for rank in range(world) for batch in ShardSampler(19, 4, rank, world) for i in batch]
    assert sorted(seen) == list(range(19))


def test_seeds_differ_in_every_part() -> None:
    assert len({derive(a, b, c) for a in range(12) for b in range(12) for c in range(12)}) == 12 ** 3
    assert derive(1, 2) != derive(2, 1) and 0 <= derive(2 ** 62, 5) < 2 ** 63


def test_a_sample_is_a_function_of_seed_and_key(images: Path) -> None:
    loader = build_loaders(config_for(images)).train
    again = build_loaders(config_for(images)).train
    other = build_loaders(config_for(images, "SEED", 1)).train
    key = (3, 7, 0)
    first = loader.dataset[key][0]
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(first, again.dataset[key][0])
    assert not torch.equal(first, other.dataset[key][0])
    assert not torch.equal(first, loader.dataset[(4, 7, 0)][0]) and not torch.equal(first, loader.dataset[(3, 7, 1)][0])


@pytest.mark.parametrize("where", ["worker", "device"])
def test_workers_do_not_change_the_stream(images: Path, where: str) -> None:
    configs = [config_for(images, "DATA.NUM_WORKERS", workers, "DATA.AUGMENT_ON", where) for workers in (0, 2)]
    streams = [first_batches(config, 3, 5) for config in configs]
    same_batches(*streams)
    assert {(x.dtype, x.shape) for x, _ in streams[0]} == {(torch.float32, (8, 3, 32, 32))}
    sample = build_loaders(configs[0], splits=("train",)).train.dataset[(0, 1, 0)]
    assert (sample[0].dtype, len(sample)) == ((torch.uint8, 3) if where == "device" else (torch.float32, 2))


def test_evaluation_batches_have_one_shape(images: Path) -> None:
    loader = build_loaders(config_for(images), splits=("val",)).val
    targets = [y for x, y in loader if x.shape == (8, 3, 32, 32)]
    assert len(targets) == 3 and int((torch.cat(targets) >= 0).sum()) == 19
    assert torch.cat(targets)[19:].tolist() == [-1] * 5


def test_evaluation_touches_no_training_folder(tmp_path: Path) -> None:
    write_images(tmp_path, "validation", dict(x=2, y=3))
    loaders = build_loaders(config_for(tmp_path), splits=("val",), classes=["w", "x", "y"])
    assert loaders.train is None and loaders.classes == ["w", "x", "y"]
    assert loaders.val.dataset.source.targets.tolist() == [1, 1, 2, 2, 2]  # by name, not by position
    assert ["(w)" in line for line in loaders.notices if line.code == "missing-classes"] == [True]


def test_unreadable_image_in_a_worker_is_one_sentence(tmp_path: Path, program) -> None:
    write_images(tmp_path, "train", {"a": 8, "b": 8})
    write_images(tmp_path, "val", {"a": 1, "b": 1})
    (tmp_path / "train/a/0.jpg").write_text("<html>")
    done = program("--data-path", tmp_path, "--batch-size", 16, "--num-workers", 1, "--epochs", 1, "--warmup-epochs", 0, "--img-size", 32,
                   "--opts", "MODEL.NAME", "x", "MODEL.CROSSFORMER.EMBED_DIM", 16, "MODEL.CROSSFORMER.DEPTHS", "[1]",
                   "MODEL.CROSSFORMER.NUM_HEADS", "[1]", "MODEL.CROSSFORMER.GROUP_SIZE", "[4]", "MODEL.CROSSFORMER.INTERVAL", "[1]")
    assert done.returncode == 3, done
    assert done.stderr.count("\n") == 1 and "train/a/0.jpg: not a readable image" in done.stderr


def test_config_and_data_are_checked_against_each_other(images: Path) -> None:
    with pytest.raises(ConfigError, match="MODEL.NUM_CLASSES is 1000, .* 4 classes"):
        build_loaders(config_for(images, "MODEL.NUM_CLASSES", 1000))
    assert any("44 training images" in line and "(64)" in line for line in build_loaders(config_for(images, "DATA.BATCH_SIZE", 64)).notices)


def test_worker_count_follows_the_machine(monkeypatch) -> None:
    for cpus, chosen in {1: 1, 2: 2, 3: 2, 6: 5, 16: 15, 33: 32, 128: 32}.items():
        monkeypatch.setattr("data.loading.workers.usable_cpus", lambda cpus=cpus: cpus)
        assert (worker_count(-1), worker_count(5), worker_count(0)) == (chosen, 5, 0)
    assert [worker_count(-1, processes) for processes in (2, 8, 64, 256)] == [32, 15, 2, 1]
    assert worker_count(5, 2) == 5


def test_what_the_workers_of_all_processes_share_and_what_they_do_not(monkeypatch) -> None:
    """Eight processes of 15 workers: /dev/shm is there once, the limit of open files for each process."""
    seen: list[int] = []
    monkeypatch.setattr("data.loading.workers.free_shared_memory", lambda: 10 << 30)
    monkeypatch.setattr("data.loading.workers._raise_file_limit", lambda needed: seen.append(needed) or needed)
    assert pipe_reason(28 << 20, 15, 8) == "" and "120 DataLoader workers" in pipe_reason(29 << 20, 15, 8)
    assert seen == [96 + 24 * 15]


def test_evaluation_has_no_more_workers_than_batches(images: Path) -> None:
    loaders = build_loaders(config_for(images, "DATA.NUM_WORKERS", 2, "TEST.BATCH_SIZE", 19))
    assert (loaders.train.num_workers, loaders.val.num_workers, len(loaders.val)) == (2, 1, 1)
    assert sum(int((targets >= 0).sum()) for _, targets in loaders.val) == len(loaders.val.dataset.source) == 19
    loaders.close()


def test_batches_of_a_worker_lie_in_shared_memory_at_once(images: Path) -> None:
    loaders = build_loaders(config_for(images, "DATA.NUM_WORKERS", 1), splits=("val",))
    start = time.perf_counter()
    batch, _ = next(iter(loaders.val))
    assert batch.is_shared() and time.perf_counter() - start < 2  # and the worker started within two seconds
    if sys.platform.startswith("linux"):
        assert {type(p).__name__ for p in multiprocessing.active_children()} == {"ForkProcess"}
    loaders.close()


def test_a_run_with_sampled_and_weighted_classes_resumes_to_the_same_bits(tiny_cfg: Path, program) -> None:
    write_images(program.folder / "uneven", "train", dict(a=30, b=4, c=10))
    write_images(program.folder / "uneven", "val", dict(a=3, b=3, c=3), seed=1)
    command = ["--cfg", tiny_cfg, "--data-path", "uneven", "--opts", "DATA.SAMPLING", "sqrt", "TRAIN.CLASS_WEIGHTS", "balanced",
               "TRAIN.SAVE_EVERY_STEPS", 3, "TRAIN.KEEP_CHECKPOINTS", 0, "TRAIN.REPORT", "none"]
    whole = program(*command)
    assert whole.returncode == 0 and re.search(r"class weights from \S+ \(a\) to \S+ \(b\)", whole.stdout), whole
    folder = program.folder / "output/tiny/default"
    full = load(folder / "last.pth")
    for path in folder.glob("*.pth"):
        if path.name != "ckpt_00000003.pth":
            path.unlink()
    again = program(*command)
    assert again.returncode == 0 and "at step 3\n" in again.stdout, again
    assert differences({k: full[k] for k in STATE}, {k: load(folder / "last.pth")[k] for k in STATE}) == []
    refused = program("--resume", folder / "last.pth", "--epochs", 3, "--opts", "DATA.SAMPLING", "balanced")
    assert refused.returncode == 2 and "DATA.SAMPLING changed from sqrt to balanced" in refused.stderr


@pytest.mark.parametrize("where", ["worker", "device"])
def test_a_run_is_the_same_with_any_workers_and_after_a_stop(where: str, tiny_cfg: Path, program) -> None:
    common = ["--cfg", tiny_cfg, "--opts", "DATA.AUGMENT_ON", where]
    for tag, workers in (("none", 0), ("two", 2)):
        done = program(*common, "DATA.NUM_WORKERS", workers, "TAG", tag)
        assert done.returncode == 0, done.stderr
    assert f"augmented {'on the device' if where == 'device' else 'in the workers'}" in done.stdout
    assert re.search(r"^training images decoded by \w+: \d+, by Pillow \([^)]*\): \d+$", done.stdout, re.M)
    # Another run is stopped in the middle: its checkpoint of step 7 is continued with another number of workers.
    stopped = program(*common, "DATA.NUM_WORKERS", 2, "TAG", "stopped", "TRAIN.SAVE_EVERY_STEPS", 7, "TRAIN.KEEP_CHECKPOINTS", 0)
    assert stopped.returncode == 0, stopped.stderr
    folder = program.folder / "output/tiny"
    for path in (folder / "stopped").glob("*.pth"):
        if path.name != "ckpt_00000007.pth":
            path.unlink()
    again = program(*common, "DATA.NUM_WORKERS", 0, "TAG", "stopped")
    assert again.returncode == 0 and "at step 7" in again.stdout, again.stderr
    one, *others = (load(folder / tag / "last.pth") for tag in ("none", "two", "stopped"))
    for other in others:
        assert differences({k: one[k] for k in STATE}, {k: other[k] for k in STATE}) == []


def test_images_of_a_trial_are_augmented_where_those_of_the_run_are(images: Path) -> None:
    for where in ("device", "worker"):
        made = trial_images(config_for(images, "DATA.AUGMENT_ON", where), 5, torch.device("cpu"))
        assert made.shape == (5, 3, 32, 32) and made.dtype == torch.float32 and bool(made.any()) == (where == "device")


def test_shared_memory_that_cannot_be_written_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_shared_memory() != 0
    monkeypatch.setattr(os, "access", lambda path, mode: path != "/dev/shm")
    assert free_shared_memory() == 0


def test_a_batch_of_evaluation_is_no_larger_than_its_images(plain: Path) -> None:
    """It is filled up to its size: of a million images it would take gigabytes."""
    _, val, loaders = sources(plain, "TEST.BATCH_SIZE", 1_000_000)
    assert [len(batch[0]) for batch in loaders.val] == [len(val)]


def test_a_number_of_steps_in_place_of_epochs() -> None:
    """The last epoch may be cut short; what its steps see is as ever."""
    wide = np.arange(50) % 3 == 0
    for whole, cut in ((StepSampler(50, 12, 3, 5), StepSampler(50, 12, 9, 5, iterations=10)),
                       (AspectStepSampler(wide, 12, 3, 5), AspectStepSampler(wide, 12, 9, 5, iterations=10))):
        assert (cut.total_steps, cut.steps_per_epoch, cut.epochs, len(cut)) == (10, 4, 3, 10)
        assert list(cut) == list(whole)[:10]


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="the system has no such signal")
def test_a_workers_death_is_not_lost_in_a_finalizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a signal's handler raises within ``__del__`` would be printed and forgotten."""
    class Finalized:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGCHLD)
            time.sleep(0.01)

    def torchs_handler(number: int, frame: object) -> None:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    deaths, before = _WorkerDeaths(), signal.getsignal(signal.SIGCHLD)
    monkeypatch.setattr(sys, "unraisablehook", lambda told: pytest.fail(f"lost: {told.exc_value}"))
    signal.signal(signal.SIGCHLD, torchs_handler)
    try:
        deaths.take_over()
        with pytest.raises(RuntimeError, match="DataLoader worker"), deaths:
            Finalized()
            time.sleep(5)
    finally:
        signal.signal(signal.SIGCHLD, before)
