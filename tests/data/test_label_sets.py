"""Several labels an image: every form that a list may have them in, and where they are names of classes instead."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from data_helpers import config_for, image_paths

from config import ConfigError
from data import DataError, build_loaders
from data.build import has_label_sets
from data.transforms.mixup import build_label_mixup

NAMES = ["blue", "green", "red"]
SETS = {"train": ["red", "red|green", "", "green|blue", "blue", "red|green|blue", "red", "red", "green", "blue|red", "", "red"],
        "val": ["green|red", "red", "", "blue", "green"]}
TRUTH = {split: np.array([[name in text.split("|") for name in NAMES] for text in texts], dtype=np.int8) for split, texts in SETS.items()}


def write(root: Path, plain: Path, form: str, extension: str = "csv", header: str = "path,labels") -> None:
    """A list of each split in ``root``; ``form`` is formatted with the path, the joined labels and those in columns."""
    for split, texts in SETS.items():
        rows = [header] if header else []
        for path, text, marks in zip(image_paths(plain, split), texts, TRUTH[split].tolist(), strict=True):
            rows.append(form.format(path, *marks, labels=text, comma=text.replace("|", ","), semicolon=text.replace("|", "; "),
                                    json=json.dumps(text.split("|") if text else [])))
        end = ",\n" if extension == "json" else "\n"
        text = end.join(rows)
        (root / f"{split}.{extension}").write_text(f"[{text}]" if extension == "json" else text + "\n")


FORMS = {
    "|": ("{0},{labels}",), '","': ('{0},"{comma}"',), ";": ("{0},{semicolon}",), "tsv": ("{0}\t{comma}", "tsv", "image\tlabel"),
    "unquoted": ("{0},{comma}",), "unquoted, no header": ("{0},{comma}", "csv", ""), "text": ("{0} {semicolon}", "txt", ""),
    "text, commas": ("{0},{comma}", "txt", ""), "text, both": ("{0} {comma}", "txt", ""), "json": ('["{0}", {json}]', "json", ""),
    "columns": ("{0},{3},{2},{1}", "csv", "filename,red,green,blue"),
    "columns beside others": ("{0},17.5,{3}.0,{2}.0,{1}.0", "csv", "id,age,red,green,blue"),
}


@pytest.mark.parametrize("form", FORMS)
def test_lists_of_several_labels(plain: Path, tmp_path: Path, form: str) -> None:
    write(tmp_path, plain, *FORMS[form])
    assert has_label_sets(config_for(tmp_path))
    loaders = build_loaders(config_for(tmp_path, "TASK", "multilabel"))
    assert loaders.classes == NAMES and any("several labels" in line or "several an image" in line for line in loaders.notices)
    for split, loader in (("train", loaders.train), ("val", loaders.val)):
        source = loader.dataset.source
        assert (np.stack([source.target_of(i) for i in range(len(source))]) == TRUTH[split]).all()
    (images, targets), = loaders.val
    assert images.shape[0] == 5 and (targets.numpy() == TRUTH["val"]).all()
    images, targets = next(loaders.batches())
    assert targets.shape == (8, 3) and set(targets.unique().tolist()) == {0, 1}
    with pytest.raises(ConfigError, match=r"several labels.*TASK multilabel") as refused:
        build_loaders(config_for(tmp_path, "TASK", "classification"))
    assert ("LABEL_SEPARATOR" in str(refused.value)) == ("columns" not in form)


def test_columns_may_say_that_a_label_is_not_known(plain: Path, tmp_path: Path) -> None:
    write(tmp_path, plain, "{0},{1},{2},{3}", "csv", "id,blue,green,red")
    rows = (tmp_path / "train.csv").read_text().splitlines()
    rows[1:4] = [row[:-5] + cells for row, cells in zip(rows[1:4], ("-1.0,1,", "true,,1", "0,0,0"), strict=True)]
    (tmp_path / "train.csv").write_text("\n".join(rows))
    config = config_for(tmp_path, "TASK", "multilabel", "MODEL.LABEL_SMOOTHING", 0)
    loaders = build_loaders(config)
    source = loaders.train.dataset.source
    assert [source.target_of(i).tolist() for i in range(3)] == [[-1, 1, -1], [1, -1, 1], [0, 0, 0]]
    assert any("3 empty or negative cells" in line for line in loaders.notices)
    images, targets = next(loaders.batches())
    mixed = build_label_mixup(config, 0)(images, targets.clone(), 0)[1]
    unknown = (targets < 0) | (targets < 0).flip(0)
    assert ((mixed < 0) == unknown).all() and ((mixed >= 0) & (mixed <= 1) | unknown).all() and len(mixed.unique()) > 3
    share = ((targets + targets.flip(0)) == 1) & ~unknown  # one of two that were mixed has it
    assert len(mixed[share].unique()) == 2 and abs(float(mixed[share].unique().sum()) - 1) < 1e-6
    assert (mixed[((targets + targets.flip(0)) == 2) & ~unknown] == 1).all()


def test_minus_one_is_no_where_there_is_no_0(plain: Path, tmp_path: Path) -> None:
    write(tmp_path, plain, "{0},{1},{2},{3}", "csv", "image_id,blue,green,red")
    for split in SETS:
        path = tmp_path / f"{split}.csv"
        head, *rows = path.read_text().splitlines()
        path.write_text("\n".join([head, *(row[:-5] + row[-5:].replace("0", "-1") for row in rows)]))
    source = build_loaders(config_for(tmp_path, "TASK", "multilabel")).train.dataset.source
    assert (np.stack([source.target_of(i) for i in range(12)]) == TRUTH["train"]).all()


def test_one_column_each_and_names_with_commas_are_classes(plain: Path, tmp_path: Path) -> None:
    paths = image_paths(plain, "train")
    one = ["1,0,0", "0,1,0", "0,0,1"]
    (tmp_path / "train.csv").write_text("image,c,a,b\n" + "".join(f"{p},{one[i % 3]}\n" for i, p in enumerate(paths)))
    (tmp_path / "val.csv").write_text("image,label\n" + "".join(f"{p},{'cab'[i % 3]}\n" for i, p in enumerate(paths)))
    loaders = build_loaders(config_for(tmp_path))
    assert loaders.classes == ["a", "b", "c"] and not has_label_sets(config_for(tmp_path))
    assert (loaders.train.dataset.source.targets == loaders.val.dataset.source.targets).all()
    assert build_loaders(config_for(tmp_path, "TASK", "multilabel")).train.dataset.source.target_of(0).tolist() == [0, 0, 1]
    for names in (["Tench, Tinca tinca", "goldfish, gold", "shark"], ["retriever, golden", "retriever, flat", "cat"], ["a|b", "c|d", "e"]):
        for split in SETS:
            (tmp_path / f"{split}.csv").write_text("image,label\n" + "".join(f'{p},"{names[i % 3]}"\n' for i, p in enumerate(paths)))
        loaders = build_loaders(config_for(tmp_path))
        assert sorted(loaders.classes) == sorted(names) and any("TASK multilabel" in line for line in loaders.notices)
        assert len(build_loaders(config_for(tmp_path, "TASK", "multilabel")).classes) > 3  # the remedy of that notice
    for split in SETS:
        (tmp_path / f"{split}.csv").write_text("image,label\n" + "".join(f"{p},{'a' if i % 2 else 'a|b'}\n" for i, p in enumerate(paths)))
    assert build_loaders(config_for(tmp_path, "DATA.LABEL_SEPARATOR", "none")).classes == ["a", "a|b"]
    (tmp_path / "train.csv").write_text("image,label,split\n" + f"{paths[0]},a,b,train\n")
    with pytest.raises(DataError, match=r"train\.csv:2: .*quotes"):
        build_loaders(config_for(tmp_path))


def test_parts_by_group_and_fold_and_columns_that_are_named(plain: Path, tmp_path: Path) -> None:
    rows = [f"{path},p{i % 4},{i % 3},{','.join(map(str, TRUTH['train'][i]))}" for i, path in enumerate(image_paths(plain, "train"))]
    (tmp_path / "all.csv").write_text("path,patient_id,fold,blue,green,red\n" + "\n".join(rows))
    for opts, count in ((("DATA.VAL_FRACTION", 0.25), 3), (("DATA.FOLD", 2), 4), (("DATA.FOLD", "1/3"), 4)):
        loaders = build_loaders(config_for(tmp_path / "all.csv", "TASK", "multilabel", *opts))
        parts = [loader.dataset.source for loader in (loaders.train, loaders.val)]
        assert loaders.classes == NAMES and [len(part) for part in parts] == [12 - count, count]
        truth = {part.path(i): part.target_of(i).tolist() for part in parts for i in range(len(part))}
        assert [truth[str(path)] for path in image_paths(plain, "train")] == TRUTH["train"].tolist()
    config = config_for(tmp_path / "all.csv", "TASK", "multilabel", "DATA.FOLD", 2, "DATA.LABEL_COLUMN", "red,blue")
    assert build_loaders(config).classes == ["blue", "red"]


def test_other_ways_to_labels(plain: Path, tmp_path: Path) -> None:
    """A separator that is named; class folders; a file of class names; a flat folder; a split by fraction; an unreadable image."""
    write(tmp_path, plain, "{0},{labels}")
    for split in SETS:
        path = tmp_path / f"{split}.csv"
        path.write_text(path.read_text().replace("|", " "))
    blank = config_for(tmp_path, "TASK", "multilabel", "DATA.LABEL_SEPARATOR", "blank")
    assert build_loaders(blank).classes == NAMES
    with pytest.raises(DataError, match="LABEL_SEPARATOR none, or blank"):
        build_loaders(config_for(tmp_path, "TASK", "multilabel"))
    assert not has_label_sets(config_for(tmp_path)) and build_loaders(
        config_for(tmp_path, "TASK", "multilabel", "DATA.LABEL_SEPARATOR", "blank")).classes == NAMES
    (tmp_path / "names.txt").write_text("red\twarm\ngreen\tcold\nblue\tcold\n")
    loaders = build_loaders(config_for(tmp_path, "TASK", "multilabel", "DATA.LABEL_SEPARATOR", "blank", "DATA.CLASS_NAMES", "names.txt"))
    assert loaders.classes == ["warm", "cold"]
    expected = np.stack([TRUTH["val"][:, 2], TRUTH["val"][:, :2].max(1)], axis=1)
    assert (np.stack([loaders.val.dataset.source.target_of(i) for i in range(5)]) == expected).all()
    assert build_loaders(config_for(plain, "TASK", "multilabel")).val.dataset.source.target_of(0).tolist() == [1, 0, 0]

    folder = tmp_path / "flat/train"
    folder.mkdir(parents=True)
    for number, path in enumerate(image_paths(plain, "train")):
        (folder / f"{number:02d}.png").write_bytes(path.read_bytes())
    (tmp_path / "flat/train.txt").write_text("".join(f"{i:02d}.png {text.replace('|', ',')}\n" for i, text in enumerate(SETS["train"])))
    config = config_for(tmp_path / "flat", "TASK", "multilabel", "DATA.VAL_FRACTION", 0.3, "DATA.CORRUPT_BUDGET", 3)
    assert has_label_sets(config)
    (folder / "06.png").write_bytes(b"x")
    loaders = build_loaders(config)
    parts = [loader.dataset.source for loader in (loaders.train, loaders.val)]
    rows = {part.path(i): part.target_of(i).tolist() for part in parts for i in range(len(part))}
    assert [rows[str(folder / f"{i:02d}.png")] for i in range(12)] == TRUTH["train"].tolist()
    assert all((part.labels.counts() > 0).all() for part in parts) and len(parts[1]) in (3, 4)
    if any(part.path(i).endswith("06.png") for part in parts[:1] for i in range(len(part))):
        batches = loaders.batches()
        assert all((next(batches)[1] >= 0).all() for _ in range(3))  # another image replaces it, with its own labels
