"""The files of dense evaluations come back as they were, and what is none of them is refused in a sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from utils.evaluation.dense_predictions_file import Curves, DenseFile, DetectionsFile, MapsFile, PanopticFile, f1, read_dense_predictions
from utils.evaluation.predictions_file import PredictionsFileError

CLASSES, IMAGES = ["a", "b", "c"], 4


def curves() -> Curves:
    generator = np.random.RandomState(0)
    ap = generator.rand(3, 4)
    ap[2] = np.nan
    return Curves(generator.rand(10, 101, 3).astype(np.float32), ap, generator.rand(3, 4), np.arange(12).reshape(3, 4), np.arange(3),
                  np.array([[2, 0, 0], [0, 1, 0], [0, 3, 4], [0, 0, 0]]))


def files() -> list[DenseFile]:
    errors = curves().images
    common = (np.arange(IMAGES) * 2, f1(errors), [f"val/{i}.png" for i in range(3)] + ["undecodable\udce9.png"], CLASSES)
    return [DetectionsFile(*common, {2: b"jpeg"}, {"box": curves(), "mask": curves()}), DetectionsFile(*common, {}, {"box": curves()}),
            MapsFile(*common, {1: b"one", 2: b"two"}, np.arange(9).reshape(3, 3)),
            PanopticFile(*common, {}, np.ones((3, 4)), np.array([True, False, True]))]


@pytest.mark.parametrize("number", range(4))
def test_a_file_comes_back_as_it_was(number: int, tmp_path: Path) -> None:
    made = files()[number]
    made.write(str(tmp_path / "predictions.npz"))
    found = read_dense_predictions(str(tmp_path / "predictions.npz"))
    assert type(found) is type(made) and (found.paths, found.classes, found.pictures) == (made.paths, made.classes, made.pictures)
    before, after = ({"index": one.index, "score": one.score, **one.arrays()} for one in (made, found))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name], equal_nan=before[name].dtype.kind == "f") for name in before)
    assert found.worst(9) == ([2, 1] if number < 2 else [1, 2])  # of equals the most mistakes first; no perfect one, none without objects


@pytest.mark.parametrize("change", [
    dict(kind=np.frombuffer(b'["else"]', np.uint8)), dict(index=np.arange(3)), dict(score=np.array([0, 1, -1, 1.0])),
    dict(score=np.array([0, 1, np.inf, 1.0])), dict(counts=np.zeros((2, 3), int)), dict(counts=np.zeros((3, 3))),
    dict(paths=np.frombuffer(b'[1, 2, 3, 4]', np.uint8)), dict(thumbnail_of=np.array([1, 7])), dict(classes=np.frombuffer(b"{", np.uint8)),
    dict(index=None)])
def test_what_does_not_fit_is_refused(change: dict, tmp_path: Path) -> None:
    path = str(tmp_path / "predictions.npz")
    files()[2].write(path)
    with np.load(path) as file:
        content = {key: value for key, value in {**file, **change}.items() if value is not None}
    np.savez(path, **content)
    with pytest.raises(PredictionsFileError, match="no file of predictions, or damaged"):
        read_dense_predictions(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("text.npz", "empty.npz", "missing.npz"):
        with pytest.raises(PredictionsFileError, match=name):
            read_dense_predictions(str(tmp_path / name))
    with pytest.raises(PredictionsFileError):
        read_dense_predictions(str(tmp_path))
