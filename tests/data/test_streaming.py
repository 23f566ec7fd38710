"""Streams: WebDataset shards by URL and Hugging Face data sets, read once an epoch, in an order that the seed determines."""

from __future__ import annotations

import hashlib
import io
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import TINY_MODEL, differences, load
from data_helpers import damages, write_tar

from config import ConfigError, get_config
from data import DataError, build_loaders
from data.streaming.stream import Record, Stream
from data.streaming.webdataset import open_shard_stream

CLASSES = "abcd"


def records(images: Path, split: str) -> list[tuple[str, bytes, int]]:
    return [(path.suffix, path.read_bytes(), CLASSES.index(path.parent.name)) for path in sorted((images / split).glob("*/*"))]


def write_shards(folder: Path, split: str, rows: list[tuple[str, bytes, int]], shards: int) -> str:
    for shard in range(shards):
        write_tar(folder / f"{split}-{shard:02d}.tar", [
            member for i, (suffix, data, label) in list(enumerate(rows))[shard::shards]
            for member in ((f"{i:04d}{suffix}", data), (f"{i:04d}.cls", str(label).encode()))])
    return f"file://{folder}/{split}-{{00..{shards - 1:02d}}}.tar"


@pytest.fixture(scope="module")
def shards(images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Options that name 44 training images in 3 shards and 19 validation images in 2."""
    pytest.importorskip("webdataset")
    root = tmp_path_factory.mktemp("shards")
    train = write_shards(root, "train", records(images, "train"), 3)
    return ["DATA.DATA_PATH", train, "DATA.VAL_PATH", write_shards(root, "val", records(images, "val"), 2), "DATA.STREAM_IMAGES", 44,
            "MODEL.NUM_CLASSES", 4, "DATA.STREAM_BUFFER", 8]


@pytest.fixture(scope="module")
def parquet(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("datasets.features")  # datasets alone may be a folder of images
    import datasets
    root = tmp_path_factory.mktemp("hub")
    (root / "data").mkdir()
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES)))
    for split, name in (("train", "train"), ("val", "validation")):
        rows = records(images, split)
        for part in range(2):
            cells = dict(image=[dict(bytes=r[1], path=None) for r in rows[part::2]], label=[r[2] for r in rows[part::2]])
            datasets.Dataset.from_dict(cells, features=features).to_parquet(root / f"data/{name}-{part:05d}-of-00002.parquet")
    return root


def loaders_of(options: list[object], *more: object, rank: int = 0, world: int = 1, workers: int = 0, **how: object):
    base = ("DATA.IMG_SIZE", 32, "DATA.BATCH_SIZE", 8, "DATA.NUM_WORKERS", workers, "TRAIN.WARMUP_EPOCHS", 0)
    config = get_config(None, [str(o) for o in (*base, *options, *more)])
    return build_loaders(config, rank, world, **how)


def seen(options: list[object], epoch: int, rank: int = 0, world: int = 1) -> list[list[str]]:
    """Names of the images of each step of an epoch."""
    sampler = loaders_of(options, rank=rank, world=world).train.batch_sampler
    sampler.start = epoch * sampler.steps_per_epoch
    steps = iter(sampler)
    return [[item.record.name for item in next(steps)[0].items] for _ in range(sampler.steps_per_epoch)]


def test_each_image_at_most_once_and_another_order_each_epoch(shards: list[object]) -> None:
    first, again, second = seen(shards, 0), seen(shards, 0), seen(shards, 1)
    names = sum(first, [])
    assert first == again != second and len(names) == 40 == len(set(names)) and len(set(sum(second, []))) == 40
    assert names != sorted(names) and set(names) != set(sum(second, []))  # the remainder is another one each epoch
    apart = [seen([*shards, "DATA.BATCH_SIZE", 4], 0, rank, 2) for rank in (0, 1)]
    assert [a + b for a, b in zip(*apart, strict=True)] == first  # the same steps, whatever the number of processes


def test_batches_do_not_depend_on_workers_and_begin_anywhere(shards: list[object]) -> None:
    runs = {}
    for workers, start in ((0, 0), (2, 0), (2, 7)):
        loaders = loaders_of(shards, "TRAIN.EPOCHS", 2, workers=workers)
        runs[workers, start] = list(loaders.batches(start))
        loaders.close()
    assert len(runs[0, 0]) == 10 and not differences(runs[0, 0], runs[2, 0]) and not differences(runs[0, 0][7:], runs[2, 7])


def test_a_number_of_steps_ends_within_an_epoch(shards: list[object]) -> None:
    whole, cut = (list(loaders_of(shards, *how).train.batch_sampler) for how in (("TRAIN.EPOCHS", 2), ("TRAIN.ITERATIONS", 7)))
    assert len(cut) == 7 and cut == whole[:7]


def test_evaluation_sees_every_image_once(shards: list[object], parquet: Path, images: Path) -> None:
    expected = sorted(hashlib.sha256(data).hexdigest() for _, data, _ in records(images, "val"))
    for options in (shards, ["DATA.DATA_PATH", f"hf://{parquet}"]):
        ranks = [loaders_of(options, splits=("val",), rank=rank, world=2) for rank in (0, 1)]
        parts = [[step[0].items for step in loaders.val.batch_sampler] for loaders in ranks]
        assert len(parts[0]) == len(parts[1]) == 2 and len(ranks[0].val) == len(ranks[1].val)
        items = [item for part in parts for step in part for item in step]
        assert sorted(hashlib.sha256(item.record.data).hexdigest() for item in items) == expected
        targets = torch.cat([targets for loaders in ranks for _, targets in loaders.val])
        assert len(targets) == 32 and torch.bincount(targets + 1).tolist() == [13, 5, 5, 5, 4]


@pytest.mark.parametrize("kind", ["webdataset", "datasets"])
def test_a_run_resumes_at_an_epochs_end_bit_by_bit(kind: str, request: pytest.FixtureRequest, program, tmp_path: Path) -> None:
    options = request.getfixturevalue("shards") if kind == "webdataset" else [
        "DATA.DATA_PATH", f"hf://{request.getfixturevalue('parquet')}", "DATA.STREAM_IMAGES", 44, "DATA.STREAM_BUFFER", 8]
    (tmp_path / "tiny.yaml").write_text("DATA: {IMG_SIZE: 32, BATCH_SIZE: 8, NUM_WORKERS: 2}\n" + TINY_MODEL
                                        + "TRAIN: {EPOCHS: 2, WARMUP_EPOCHS: 0.5, BASE_LR: 0.05}\nSAVE_FREQ: 1\n")
    whole = program("--cfg", "tiny.yaml", "--output", "o", "--tag", "whole", "--opts", *options)
    assert whole.returncode == 0, whole.stderr
    assert "exact to the epoch only" in whole.stdout and "44 training and an unknown number of" in whole.stdout
    folder = next(tmp_path.glob("o/*/whole"))
    part = program("--cfg", "tiny.yaml", "--output", "o", "--tag", "part", "--resume", folder / "ckpt_00000005.pth", "--opts", *options)
    assert part.returncode == 0, part.stderr
    ends = [load(next(tmp_path.glob(f"o/*/{tag}/ckpt_00000010.pth"))) for tag in ("whole", "part")]
    assert not differences(ends[0]["model"], ends[1]["model"]) and not differences(ends[0]["optimizer"], ends[1]["optimizer"])
    evaluated = program("--eval", "--resume", folder / "last.pth")
    assert evaluated.returncode == 0 and "of 19)" in evaluated.stdout, evaluated.stdout + evaluated.stderr


def test_a_bad_image_is_replaced_and_counted_once(images: Path, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    rows = records(images, "train")[:16]
    rows[3] = (".jpg", rows[3][1][:50], rows[3][2])
    options = ["DATA.DATA_PATH", write_shards(tmp_path, "train", rows, 2), "DATA.STREAM_IMAGES", 16, "MODEL.NUM_CLASSES", 4,
               "TRAIN.EPOCHS", 2, "DATA.CORRUPT_BUDGET", 1]
    lines, runs = [], []
    for workers in (0, 2):
        loaders = loaders_of(options, splits=("train",), workers=workers)
        loaders.report_unreadable(lines.append)
        runs.append(list(loaders.batches()))
        loaders.close()
        assert len(loaders.train.failures) == 1
    assert not differences(*runs) and len(lines) == 2 and "train-01.tar/0003.jpg: not a readable image" in lines[0]
    with pytest.raises(DataError, match="DATA.CORRUPT_BUDGET"):
        list(loaders_of(options, "DATA.CORRUPT_BUDGET", 0, splits=("train",)).batches())


def test_a_damaged_shard_is_no_shorter_stream(images: Path, tmp_path: Path) -> None:
    """Neither in training, whatever number of images is given, nor in evaluation, nor where a connection may have broken off."""
    pytest.importorskip("webdataset")
    train = write_shards(tmp_path, "train", records(images, "train")[:16], 2)
    options = ["DATA.DATA_PATH", train, "DATA.VAL_PATH", train, "DATA.STREAM_IMAGES", 16, "MODEL.NUM_CLASSES", 4]
    path = tmp_path / "train-01.tar"
    for how, (data, place) in damages(path.read_bytes()).items():
        path.write_bytes(data)
        place = "[0-9]+" if how == "cut in a member" else place
        for split, more in (("train", ()), ("val", ()), ("train", ("DATA.STREAM_IMAGES", 13))):
            with pytest.raises(DataError, match=f"train-01.tar: a damaged tar file at byte {place},"):
                loaders = loaders_of(options, *more, splits=(split,))
                found = list(loaders.batches() if split == "train" else loaders.val)
                pytest.fail(f"{how}: {len(found)} batches")
    remote = train.replace("file://", "https://host")
    stream, tries = open_shard_stream(remote, list(CLASSES)), []
    stream.patience = 0.01
    webdataset = sys.modules["webdataset"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(webdataset, "gopen", lambda url: tries.append(url) or io.BytesIO(path.read_bytes()))
        with pytest.raises(DataError, match="DATA.READ_PATIENCE"):
            list(stream.records([1]))
    assert len(tries) > 1


def test_labels_are_names_first_and_numbers_of_shards_are_positions() -> None:
    stream = Stream("x", [], 1, ["02", "01", "10"])
    for label, at in (("01", 1), ("1", 1), (1, 1), ("10", 2), (2, 2), ("2", 0)):
        assert stream.target(Record("n", b"", label)) == at, label
    named = Stream("x", [], 1, ["cat", "dog"])
    assert [named.target(Record("n", b"", label)) for label in ("dog", "1", "01", 0)] == [1, 1, 1, 0]
    for label in ("cow", "9" * 5000, "-1", 2, -1):
        with pytest.raises(DataError, match="none of the 2 classes"):
            named.target(Record("n", b"", label))


def test_what_is_missing_is_named(shards: list[object], parquet: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [(["DATA.STREAM_IMAGES", 0], "DATA.STREAM_IMAGES"), (["DATA.VAL_PATH", ""], "DATA.VAL_PATH"),
            (["MODEL.NUM_CLASSES", 0], "MODEL.NUM_CLASSES, or DATA.CLASS_NAMES"), (["DATA.SUBSET", 0.5], "DATA.SUBSET 0.5"),
            (["DATA.DATA_PATH", "ftp://x/a.tar"], "ftp://x/a.tar: .*https://"),
            (["DATA.DATA_PATH", "s3://x/folder"], "s3://x/folder: .*shards"), (["DATA.DATA_PATH", "s3://x/a';b.tar"], "a';b.tar: .*quotes")]
    for more, words in rows:
        with pytest.raises(ConfigError, match=words):
            loaders_of(shards, *more)
    with pytest.raises(ConfigError, match="TEST.SPLIT is test.*DATA.VAL_PATH"):
        loaders_of(shards, "TEST.SPLIT", "test", splits=("val",))
    hub = ["DATA.DATA_PATH", f"hf://{parquet}", "DATA.STREAM_IMAGES", 44]
    with pytest.raises(DataError, match=f"hf://{tmp_path}/none: .*datasets"):
        loaders_of(["DATA.DATA_PATH", f"hf://{tmp_path}/none", "DATA.STREAM_IMAGES", 44])
    with pytest.raises(DataError, match="44 images and not 60; .*DATA.STREAM_IMAGES to 44"):
        list(loaders_of(shards, "DATA.STREAM_IMAGES", 60).batches())
    with pytest.raises(DataError, match="label '3' .* 3 classes"):
        list(loaders_of(shards, "MODEL.NUM_CLASSES", 3).batches())
    with pytest.raises(DataError, match="gone-.*DATA.READ_PATIENCE"):
        loaders_of(shards, "DATA.VAL_PATH", f"file://{tmp_path}/gone-{{0..1}}.tar", "DATA.READ_PATIENCE", 0.1)
    for package, options in (("webdataset", shards), ("datasets", hub)):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ConfigError, match=f"pip install {package}"):
            loaders_of(options)
    monkeypatch.setitem(sys.modules, "datasets", types.ModuleType("datasets"))  # a folder called datasets is all there is
    with pytest.raises(ConfigError, match="pip install datasets"):
        loaders_of(hub)


def test_a_read_that_fails_goes_on_where_it_stopped(shards: list[object]) -> None:
    loaders = loaders_of(shards, "DATA.READ_PATIENCE", 1)
    stream = loaders.train.dataset.source
    expected, opened = [r.name for r in stream.records([0, 1, 2])], []

    def failing(segment):
        def read():
            opened.append(1)
            for i, record in enumerate(segment()):
                if i == 5 and len(opened) % 2:
                    raise OSError("connection reset")
                yield record
        return read

    stream.segments = [failing(segment) for segment in stream.segments]
    assert [r.name for r in stream.records([0, 1, 2])] == expected and len(opened) == 6
