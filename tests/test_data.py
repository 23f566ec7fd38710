"""Samplers, seeds, folders, transforms: the stream of steps is a function of the config."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image

from config import ConfigError, get_config
from data import DataError, build_loaders
from data.layouts import digits
from data.loading.sampler import ShardSampler, StepSampler
from data.loading.workers import worker_count
from data.seeds import derive
from data.sources.folder import scan_folder
from data.transforms.build import build_eval_transform, build_train_transform, preprocessing
from data.transforms.mixup import build_mixup


def config_for(root: Path, *opts: object):
    return get_config(None, ["DATA.DATA_PATH", str(root), "DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "8", "DATA.NUM_WORKERS", "0",
                             *map(str, opts)])


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


def test_workers_do_not_change_the_stream(images: Path) -> None:
    streams = []
    for workers in (0, 2):
        loader = build_loaders(config_for(images, "DATA.NUM_WORKERS", workers, "TRAIN.EPOCHS", 21), splits=("train",)).train
        loader.batch_sampler.start = 3
        batches = iter(loader)
        streams.append([next(batches) for _ in range(5)])
        del batches
    for (xa, ya), (xb, yb) in zip(*streams, strict=True):
        assert torch.equal(xa, xb) and torch.equal(ya, yb)


def test_evaluation_batches_are_filled_to_one_shape(images: Path) -> None:
    loader = build_loaders(config_for(images), splits=("val",)).val
    targets = [y for x, y in loader if x.shape == (8, 3, 32, 32)]
    assert len(targets) == 3 and int((torch.cat(targets) >= 0).sum()) == 19
    assert torch.cat(targets)[19:].tolist() == [-1] * 5


def test_evaluation_touches_no_training_folder(tmp_path: Path) -> None:
    write_images(tmp_path, "validation", dict(x=2, y=3))
    loaders = build_loaders(config_for(tmp_path), splits=("val",), classes=["w", "x", "y"])
    assert loaders.train is None and loaders.classes == ["w", "x", "y"]
    assert loaders.val.dataset.folder.targets.tolist() == [1, 1, 2, 2, 2]  # by name, not by position
    assert any("classes without a folder (w)" in line for line in loaders.notices)


def test_what_counts_as_class_and_image(tmp_path: Path) -> None:
    write_images(tmp_path, "train", {"b": 2, "a b": 1, "ü": 1})
    for name in (".ipynb_checkpoints/x.png", "b/._1.png", "b/Thumbs.db", "b/notes.txt", "b/.hidden.png"):
        (tmp_path / "train" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / name).write_bytes(b"x")
    (tmp_path / "train/empty").mkdir()
    os.rename(tmp_path / "train/b/1.png", tmp_path / "train/b/1.PNG")
    found = scan_folder(str(tmp_path / "train"))
    assert found.classes == ["a b", "b", "empty", "ü"] and found.targets.tolist() == [0, 1, 1, 3]
    assert [os.path.basename(found.path(i)) for i in range(4)] == ["0.jpg", "0.jpg", "1.PNG", "0.jpg"]
    assert found.load(3).size == (48, 40)
    assert any("1 empty class folders (empty)" in line for line in found.notices)


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    write_images(tmp_path, "train", {"a": 2})
    (tmp_path / "train/a/0.jpg").write_text("<html>")
    with pytest.raises(DataError, match=r"train/a/0\.jpg: not a readable image"):
        scan_folder(str(tmp_path / "train")).load(0)


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
    with pytest.raises(ConfigError, match="MODEL.NUM_CLASSES is 1000, but .* has 4 classes"):
        build_loaders(config_for(images, "MODEL.NUM_CLASSES", 1000))
    assert any("fewer than a global batch" in line for line in build_loaders(config_for(images, "DATA.BATCH_SIZE", 64)).notices)


def test_digits_are_the_real_ones_split_once(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits
    data = load_digits()
    assert digits.ensure_digits(str(tmp_path / "digits")) and not digits.ensure_digits(str(tmp_path / "digits"))
    train, val = (scan_folder(str(tmp_path / "digits" / split)) for split in ("train", "val"))
    assert (len(train), len(val)) == (1437, 360)
    per_class = np.bincount(val.targets) / np.bincount(data.target)
    assert per_class.min() > 0.19 and per_class.max() < 0.21
    numbers = {int(Path(f.path(i)).stem) for f in (train, val) for i in range(len(f))}
    assert numbers == set(range(1797))
    path = val.path(11)
    small = np.asarray(Image.open(path).resize((8, 8), Image.Resampling.BOX), dtype=float) * 16 / 255
    original = data.images[int(Path(path).stem)]
    assert np.corrcoef(small.ravel(), original.ravel())[0, 1] > 0.95 and os.path.basename(os.path.dirname(path)) == str(
        data.target[int(Path(path).stem)])
    assert not list(tmp_path.glob(".digits-*"))


def test_digits_are_never_written_where_the_user_points(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data folder"):
        build_loaders(config_for(tmp_path / "mistyped", "DATA.DATASET", "digits"))
    assert not (tmp_path / "mistyped").exists()


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


def test_thousands_of_augmentations_pass() -> None:
    """timm's posterize with 0 bits is an error in new Pillow; some draws of RandAugment ask for it."""
    import random
    transform = build_train_transform(get_config(None, ["DATA.IMG_SIZE", "32", "AUG.AUTO_AUGMENT", "rand-m10-n4-mstd0.5-inc1"]))
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
        odd = build_mixup(config_for(images, "AUG.MIXUP_MODE", mode), 4, 0)
        mixed, targets = odd(x[:5].clone(), y[:5], 1)
        assert torch.equal(mixed[4], x[4]) and targets.shape == (5, 4) and targets[4].argmax() == y[4]
        assert odd(x[:1].clone(), y[:1], 1)[1].shape == (1, 4)
    off = build_mixup(config_for(images, "AUG.MIXUP", 0, "AUG.CUTMIX", 0), 4, 0)
    assert off(x, y, 0)[1] is y


def test_worker_count_follows_the_machine(images: Path, monkeypatch) -> None:
    monkeypatch.setattr("data.loading.workers.usable_cpus", lambda: 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert worker_count(config_for(images, "DATA.NUM_WORKERS", -1)) == 3
    assert worker_count(config_for(images, "DATA.NUM_WORKERS", 5)) == 5
