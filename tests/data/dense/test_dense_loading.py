"""Batches of dense tasks: which images make them, and that they are the same however they are made."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_source import Rectangles, config_for, loaders_of, same
from PIL import Image

from config import ConfigError
from data import DataError
from data.dense.base import IGNORED
from data.dense.loaders import build_dense_prediction_loader, input_size
from data.dense.samplers import AspectStepSampler, SizeSampler
from data.dense.synthetic import synthetic_batch
from data.errors import UnreadableImage
from data.layouts.input_paths import find_input_images
from data.loading import loaders as made
from data.loading import workers
from data.loading.sampler import StepSampler

SIZES = [(60, 80), (80, 60)] * 5 + [(48, 96), (70, 70), (60, 80), (90, 50), (60, 80), (80, 60), (60, 81)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Rectangles:
    return Rectangles(tmp_path_factory.mktemp("rectangles"), SIZES)


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Rectangles:
    return Rectangles(tmp_path_factory.mktemp("maps"), SIZES, "maps")


def batches(source: Rectangles, *opts: object, start: int = 0, task: str = "instance", **options: object) -> list:
    with contextlib.closing(loaders_of(task, source, None, *opts, **options)) as loaders:
        return list(loaders.batches(start))


def test_workers_start_and_pipes_do_not_change_the_stream(source: Rectangles, monkeypatch: pytest.MonkeyPatch) -> None:
    opts = ("DATA.DENSE.SHORT_SIDE", "[48, 64]", "DATA.DENSE.COPY_PASTE", 0.5, "DATA.DENSE.PHOTOMETRIC", True)
    whole = batches(source, *opts)
    assert len(whole) == 3 * (len(SIZES) // 4)
    for workers_ in (1, 2):
        same(whole, batches(source, *opts, "DATA.NUM_WORKERS", workers_))
    same(whole[5:], batches(source, *opts, start=5))
    for module in (workers, made):
        monkeypatch.setattr(module, "free_shared_memory", lambda: 2 << 20)
    same(whole[:4], batches(source, *opts, "DATA.NUM_WORKERS", 1, "TRAIN.EPOCHS", 1))
    assert not all(torch.equal(one.images, other.images) for one, other in zip(whole, batches(source, *opts, "SEED", 1), strict=True))


def test_batches_of_a_worker_are_one_block_of_shared_memory(source: Rectangles) -> None:
    with contextlib.closing(loaders_of("instance", source, None, "DATA.NUM_WORKERS", 1)) as loaders:
        (buffer, layout), *_ = next(iter(loaders.train._loader))
        assert buffer.is_shared() and buffer.ndim == 1 and {name for name, *_ in layout} >= {"images", "masks", "boxes"}


def test_two_ranks_make_what_one_makes(source: Rectangles) -> None:
    one = batches(source, "TRAIN.ACCUMULATION_STEPS", 2)
    two = [batches(source, rank=rank, world_size=2) for rank in (0, 1)]
    for step, batch in enumerate(one):
        for half, mine in zip(batch.split(2, 32), (two[0][step], two[1][step]), strict=True):
            same([half], [mine])


def test_wide_and_tall_images_have_steps_of_their_own() -> None:
    wide = np.random.RandomState(0).rand(103) < 0.7
    sampler, plain = AspectStepSampler(wide, 8, 3, seed=0), StepSampler(103, 8, 3, seed=0)
    assert (sampler.steps_per_epoch, sampler.total_steps) == (12, 36) == (plain.steps_per_epoch, plain.total_steps)
    orders = []
    for epoch in range(3):
        steps = [[index for _, index, _ in sampler.keys(step)] for step in range(12 * epoch, 12 * epoch + 12)]
        orders.append(sum(steps, []))
        assert len(set(orders[-1])) == 96 and sorted(orders[-1]) == sorted(plain.order(epoch)[0][:96].tolist())
        assert sum(len(set(wide[step].tolist())) > 1 for step in steps) <= 1
        assert {len(set(wide[step].tolist())) == 1 and bool(wide[step[0]]) for step in steps} == {False, True}
    assert orders[0] != orders[1] and sampler.order(0)[0][:96].tolist() == orders[0]
    halves = [AspectStepSampler(wide, 8, 3, 0, rank, 2) for rank in (0, 1)]
    assert [key for half in halves for key in half.keys(7)] == sampler.keys(7)
    short = AspectStepSampler(wide[:5], 8, 2, 0)
    assert short.total_steps == 2 and sorted(index for _, index, _ in short.keys(1)) == [0, 1, 2, 3, 4]


def test_wide_and_tall_images_are_padded_less(source: Rectangles) -> None:
    def pixels(grouped: bool) -> int:
        return sum(batch.images.numel() for batch in batches(source, "DATA.BATCH_SIZE", 2, "DATA.DENSE.ASPECT_GROUPS", grouped))
    assert pixels(True) < 0.9 * pixels(False)


@pytest.mark.parametrize("world", [1, 2, 3, 20])
def test_evaluation_takes_each_image_once_with_its_equals(world: int) -> None:
    padded = np.random.RandomState(1).randint(1, 4, (97, 2)) * 32
    samplers = [SizeSampler(padded, 8, rank, world) for rank in range(world)]
    found = [batch for sampler in samplers for batch in sampler]
    assert sorted(index for batch in found for index in batch) == list(range(97)) and sum(map(len, samplers)) == len(found)
    assert all(len(np.unique(padded[batch], axis=0)) == 1 and batch == sorted(batch) for batch in found)
    assert found == list(SizeSampler(padded, 8)) and [batch[0] for batch in found] == sorted(batch[0] for batch in found)
    assert [i for batch in SizeSampler(padded, 8, neighbours=True) for i in batch] == list(range(97))


def test_evaluation_gives_an_image_the_same_pixels_in_every_batch(maps: Rectangles) -> None:
    def of(batch_size: int, *opts: object) -> dict:
        with contextlib.closing(loaders_of("semantic", None, maps, "TEST.BATCH_SIZE", batch_size, *opts)) as loaders:
            found = {}
            for batch in loaders.val:
                shown = batch.maps.split(batch.originals.prod(dim=1).tolist())
                for row, number in enumerate(batch.numbers.tolist()):
                    found[number] = (batch.images[row], shown[row], batch.sizes[row], batch.originals[row])
            return found
    alone = of(1)
    assert sorted(alone) == list(range(len(SIZES)))
    for other in (of(8), of(8, "DATA.NUM_WORKERS", 2), of(3)):
        for number, parts in alone.items():
            assert all(torch.equal(one, two) for one, two in zip(parts, other[number], strict=True)), number
    for number, (image, shown, size, original) in alone.items():
        assert original.tolist() == list(SIZES[number]) and torch.equal(shown.view(*original), torch.from_numpy(maps.index_map(number)))
        assert not any(side % 32 for side in image.shape[1:]) and not image[:, size[0]:].any() and not image[:, :, size[1]:].any()
        assert image[:, :size[0], :size[1]].abs().min() > 0


def test_padded_sizes_follow_the_stride(source: Rectangles) -> None:
    loaders = loaders_of("detection", source, source, "DATA.DENSE.SHORT_SIDE", "[40]", stride=16)
    assert {tuple(batch.images.shape[2:]) for batch in loaders.val} >= {(48, 64), (64, 48)}
    assert all(side % 16 == 0 for batch in loaders.batches() for side in batch.images.shape[2:])


class Broken(Rectangles):
    """Of which number 2 is no image, 5 is of another size than its annotations say, and those of 7 cannot be read."""

    def __init__(self, root: Path, kind: str = "objects"):
        super().__init__(root, SIZES, kind)
        Path(self.path(2)).write_bytes(b"no image")
        Image.new("RGB", (20, 30)).save(self.path(5))

    def objects(self, index: int):
        if index == 7:
            raise UnreadableImage.of("7.xml", "broken")
        return super().objects(index)

    def index_map(self, index: int):
        if index == 7:
            raise UnreadableImage.of("7.map", "broken")
        return super().index_map(index)


@pytest.mark.parametrize("workers_", [0, 2])
def test_what_cannot_be_read_is_replaced_in_training_and_not_counted_in_evaluation(tmp_path: Path, workers_: int) -> None:
    broken = Broken(tmp_path, "maps")
    opts = ("DATA.NUM_WORKERS", workers_, "DATA.CORRUPT_BUDGET", 5)
    with contextlib.closing(loaders_of("semantic", broken, broken, *opts, "TEST.BATCH_SIZE", 8)) as loaders:
        told: list[str] = []
        loaders.report_unreadable(told.append)
        numbers = [number for batch in loaders.batches() for number in batch.numbers.tolist()]
        assert len(numbers) == 48 and not {2, 5, 7} & set(numbers) and {f.index for f in loaders.train.failures} == {2, 5, 7}
        assert sum("7.map" in line for line in told) == 1 and any("20 x 30" in line and "60 x 80" in line for line in told)
        found = list(loaders.val)
        assert sorted(n for batch in found for n in batch.numbers.tolist()) == [-1, -1, -1, *(n for n in range(17) if n not in (2, 5, 7))]
        assert loaders.val.unreadable == 3
        for batch in found:
            maps = batch.maps.split(batch.originals.prod(dim=1).tolist())
            for image, shown in ((batch.images[i], maps[i]) for i in (batch.numbers < 0).nonzero()[:, 0].tolist()):
                assert not shown.ne(IGNORED).any() and len(image[:, :10, :10].flatten(1).unique(dim=1)[0]) == 1
    with contextlib.closing(loaders_of("instance", Broken(tmp_path / "o"), None, "DATA.CORRUPT_BUDGET", 1, *opts[:2])) as loaders, \
            pytest.raises(DataError, match=r"CORRUPT_BUDGET"):
        list(loaders.batches())


def test_other_images_cannot_all_be_broken(tmp_path: Path) -> None:
    source = Rectangles(tmp_path, SIZES[:5])
    for index in range(5):
        Path(source.path(index)).write_bytes(b"")
    with pytest.raises(DataError, match="nor is any other that was tried") as error:
        list(loaders_of("detection", source, None, "DATA.CORRUPT_BUDGET", 99).batches())
    assert "class" not in str(error.value)


def test_copy_paste_needs_masks(tmp_path: Path) -> None:
    source = Rectangles(tmp_path, SIZES[:4])
    source.has_masks = False
    with pytest.raises(ConfigError, match="COPY_PASTE"):
        loaders_of("detection", source, None, "DATA.DENSE.COPY_PASTE", 0.5)


def test_detection_pastes_objects_by_their_masks_and_keeps_boxes_alone(source: Rectangles, maps: Rectangles) -> None:
    plain, pasted = (batches(source, "DATA.DENSE.COPY_PASTE", chance, task="detection") for chance in (0.0, 1.0))
    assert sum(len(found["boxes"]) for batch in pasted for found in batch.objects()) > sum(
        len(found["boxes"]) for batch in plain for found in batch.objects())
    assert all(set(found) == {"boxes", "labels"} for batch in pasted for found in batch.objects())
    with pytest.raises(ConfigError, match="COPY_PASTE"):
        batches(maps, "DATA.DENSE.COPY_PASTE", 1.0, task="semantic")


def test_sizes_beyond_all_memory_are_one_sentence(source: Rectangles) -> None:
    with pytest.raises(ConfigError, match=r"SCALE make images of .* million pixels"):
        loaders_of("detection", source, None, "DATA.DENSE.SCALE", "[1, 100]", "DATA.DENSE.SHORT_SIDE", "[4096]", "DATA.DENSE.CROP", 32,
                   "DATA.DENSE.LONG_SIDE", 4096)
    with pytest.raises(ConfigError, match="REPEATED_AUG"):
        loaders_of("detection", source, None, "DATA.REPEATED_AUG", 2)


def test_micro_batches_are_padded_as_their_own_images_need(source: Rectangles) -> None:
    batch = batches(source, "TRAIN.ACCUMULATION_STEPS", 4, "DATA.BATCH_SIZE", 2)[0]
    parts = batch.split(4, 32)
    assert sum(part.images[0].numel() for part in parts) < 4 * batch.images[0].numel()
    for part in parts:
        height, width = part.images.shape[2:]
        assert part.masks.shape == (int(part.counts.sum()), height, width) and int(part.sizes[:, 0].max()) > height - 32
    assert torch.equal(torch.cat([part.boxes for part in parts]), batch.boxes)


def test_prediction_reads_images_of_any_size_in_their_order(source: Rectangles, tmp_path: Path) -> None:
    (tmp_path / "no.jpg").write_bytes(b"no image")
    Image.new("L", (30, 200)).save(tmp_path / "long.png")
    paths = [*(source.path(i) for i in (0, 2, 4, 1)), str(tmp_path / "no.jpg"), str(tmp_path / "gone.png"), str(tmp_path / "long.png")]
    loader, _ = build_dense_prediction_loader(config_for("detection", "TEST.BATCH_SIZE", 2), find_input_images(paths), torch.device("cpu"))
    found = list(loader)
    assert [batch.numbers.tolist() for batch in found] == [[0, 1], [2], [3], [-1, -1], [6]]
    assert [batch.originals.tolist() for batch in found[:3]] == [[[60, 80], [60, 80]], [[60, 80]], [[80, 60]]]
    assert found[-1].originals.tolist() == [[200, 30]] and {f.index for f in loader.failures} == {4, 5}
    same([batch._replace(numbers=batch.numbers) for batch in list(loader)], found)


@pytest.mark.parametrize("task", ["detection", "instance", "semantic", "mask"])
def test_synthetic_batches_look_like_real_ones(source: Rectangles, task: str) -> None:
    config = config_for(task)
    real, noise = (next(loaders_of(task, source, None).batches()),
                   synthetic_batch(config, 4, 2, torch.device("cpu"), torch.Generator().manual_seed(0)))
    assert tuple(noise.images.shape[2:]) == input_size(config) == (64, 128)
    for name, value in real._asdict().items():
        other = getattr(noise, name)
        assert value.dtype == other.dtype and value.ndim == other.ndim and (value.numel() > 0) == (other.numel() > 0), name
    assert int(noise.counts.sum()) == len(noise.boxes) and (noise.boxes[:, 2:] > noise.boxes[:, :2]).all()
