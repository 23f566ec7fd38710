"""Every layout a user may bring becomes the same images under the same classes, or one sentence of advice."""

from __future__ import annotations

import json
import os
import shutil
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from conftest import write_images
from data_helpers import CLASSES, config_for, content, image_paths, same_content, sources
from PIL import Image

from config import ConfigError
from data import DataError, build_loaders
from data.layouts import digits
from data.layouts.detect import detect_layout
from data.layouts.options import Options
from data.sources.folder import scan_folder


def flatten(plain: Path, root: Path) -> dict[str, str]:
    """plain's val/ as the flat folder that ImageNet hands out; {name: class}."""
    shutil.copytree(plain / "train", root / "train")
    (root / "val").mkdir()
    labels = {}
    for number, path in enumerate(sorted((plain / "val").glob("*/*"), key=lambda p: (p.name, p)), 1):
        name = f"ILSVRC2012_val_{number:08d}.JPEG"
        shutil.copy(path, root / "val" / name)
        labels[name] = path.parent.name
    return labels


def write_flat(kind: str, root: Path, labels: dict[str, str]) -> None:
    numbers = {w: i for i, w in enumerate(CLASSES)}
    if kind == "synset labels":
        (root / "imagenet_2012_validation_synset_labels.txt").write_text("".join(w + "\n" for w in labels.values()))
    elif kind == "kaggle":
        rows = "".join(f"{n[:-5]},{w} 1 2 3 4 {w} 5 6 7 8\n" for n, w in labels.items())
        (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + rows)
    elif kind == "caffe":
        (root / "val.txt").write_bytes(b"\xef\xbb\xbf" + "".join(f"{n} {numbers[w]}\r\n" for n, w in labels.items()).encode())
    elif kind == "csv":
        (root / "val/labels.csv").write_text("filename,label\n" + "".join(f"{n},{w}\n" for n, w in labels.items()))
    else:
        data = root / "ILSVRC2012_devkit_t12/data"
        data.mkdir(parents=True)
        ids = {w: 7 - 2 * i for i, w in enumerate(CLASSES)}  # the devkit's order is its own
        (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{ids[w]}\n" for w in labels.values()))
        if kind == "devkit":
            from scipy.io import savemat
            synsets = np.array([(ids[w], w, "words") for w in CLASSES], dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")])
            savemat(data / "meta.mat", {"synsets": synsets})
        else:
            (data / "map_clsloc.txt").write_text("".join(f"{w} {ids[w]} some_words\n" for w in CLASSES))


@pytest.mark.parametrize("kind", ["synset labels", "kaggle", "caffe", "csv", "devkit", "clsloc"])
def test_flat_validation_folder(plain: Path, tmp_path: Path, kind: str) -> None:
    write_flat(kind, tmp_path, flatten(plain, tmp_path))
    assert any("labels from" in line for line in same_content(tmp_path, plain).notices)


def test_kaggle_keeps_its_lists_three_folders_up(plain: Path, tmp_path: Path) -> None:
    root = tmp_path / "ILSVRC/Data/CLS-LOC"
    root.mkdir(parents=True)
    write_flat("kaggle", tmp_path, flatten(plain, root))
    assert content(sources(root)[1]) == content(sources(plain)[1])


def test_both_splits_flat_with_a_list_each(plain: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        rows = []
        for number, path in enumerate(image_paths(plain, split)):
            shutil.copy(path, tmp_path / split / f"{number}.jpg")
            rows.append(f"{number}.jpg,{path.parent.name}\n")
        (tmp_path / f"{split}.csv").write_text("image,label\n" + "".join(rows))
    same_content(tmp_path, plain)


def test_flat_validation_without_or_with_wrong_labels(plain: Path, tmp_path: Path) -> None:
    labels = flatten(plain, tmp_path)
    with pytest.raises(DataError, match=r"val: .*DATA.VAL_LABELS"):
        sources(tmp_path)
    (tmp_path / "elsewhere.txt").write_text("".join(f"{n}\t{w}\n" for n, w in labels.items()))
    assert content(sources(tmp_path, "DATA.VAL_LABELS", tmp_path / "elsewhere.txt")[1]) == content(sources(plain)[1])
    (tmp_path / "val.txt").write_text("n01440764\n")
    with pytest.raises(DataError, match="val.txt: .*1 labels .*5 images"):
        sources(tmp_path)
    (tmp_path / "val.txt").write_text("".join(f"{n} {w}\n" for n, w in list(labels.items())[1:]))
    with pytest.raises(DataError, match="1 of the 5 images .*ILSVRC2012_val_00000001.JPEG"):
        sources(tmp_path)
    (tmp_path / "val.txt").write_text("ILSVRC2012_val_00000001.JPEG n01440764\nILSVRC2012_val_00000002.JPEG\n")
    with pytest.raises(DataError, match=r"val\.txt:2: "):
        sources(tmp_path)
    (tmp_path / "val.txt").unlink()
    (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n" * 5)
    with pytest.raises(DataError, match=r"meta\.mat or map_clsloc\.txt"):
        sources(tmp_path)


def test_tiny_imagenet(plain: Path, tmp_path: Path) -> None:
    for path in (plain / "train").glob("*/*"):
        target = tmp_path / "train" / path.parent.name / "images" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        (tmp_path / "train" / path.parent.name / f"{path.parent.name}_boxes.txt").write_text("0.jpg 0 0 9 9\n")
    (tmp_path / "val/images").mkdir(parents=True)
    (tmp_path / "test/images").mkdir(parents=True)
    lines = []
    for number, path in enumerate(image_paths(plain, "val")):
        shutil.copy(path, tmp_path / f"val/images/val_{number}.JPEG")
        lines.append(f"val_{number}.JPEG\t{path.parent.name}\t0\t32\t44\t62\n")
    (tmp_path / "val/val_annotations.txt").write_text("".join(lines))
    same_content(tmp_path, plain)


def test_validation_by_its_other_names(plain: Path, tmp_path: Path) -> None:
    for name in ("validation", "valid"):
        root = tmp_path / name
        root.mkdir()
        (root / "train").symlink_to(plain / "train")
        (root / name).symlink_to(plain / "val")
        assert content(sources(root)[1]) == content(sources(plain)[1])


@pytest.mark.parametrize("form", ["csv header", "csv", "tsv", "txt", "json", "semicolon", "windows"])
def test_lists(plain: Path, tmp_path: Path, form: str) -> None:
    for split in ("train", "val"):
        rows = [(os.path.relpath(p, plain), p.parent.name) for p in image_paths(plain, split)]
        if form == "csv header":
            text, suffix = "id,class,path\n" + "".join(f"7,{c},{p}\n" for p, c in rows), ".csv"
        elif form == "windows":
            text, suffix = "\ufeff" + "path,label\r\n" + "".join(f'"{p}",{c}\r\n' for p, c in rows) + "\r\n", ".csv"
        elif form == "json":
            text, suffix = json.dumps([[p, c] for p, c in rows]), ".json"
        else:
            mark, suffix = {"csv": (",", ".csv"), "tsv": ("\t", ".tsv"), "txt": (" ", ".txt"), "semicolon": (";", ".csv")}[form]
            text = ("path;label\n" if form == "semicolon" else "") + "".join(f"{p}{mark}{c}\n" for p, c in rows)
        (tmp_path / (split + suffix)).write_text(text, newline="")
    (tmp_path / "train").symlink_to(plain / "train")
    (tmp_path / "val").symlink_to(plain / "val")
    same_content(tmp_path, plain, "DATA.DATASET", "lists")
    assert "list" in detect_layout(str(tmp_path), Options(dataset="lists")).name
    assert detect_layout(str(tmp_path), Options()).name == "class folders"


def test_one_list_with_a_split_column_or_a_fraction(plain: Path, tmp_path: Path) -> None:
    rows = [f"{p},{p.parent.name},{s}\n" for s in ("train", "val") for p in image_paths(plain, s)]
    (tmp_path / "all.csv").write_text("path,label,split\n" + "".join(rows))
    same_content(tmp_path / "all.csv", plain)
    (tmp_path / "none.csv").write_text("path,label\n" + "".join(r.rpartition(",")[0] + "\n" for r in rows))
    with pytest.raises(DataError, match="none.csv: .*DATA.VAL_FRACTION"):
        sources(tmp_path / "none.csv")
    train, val, _ = sources(tmp_path / "none.csv", "DATA.VAL_FRACTION", 0.25)
    assert sorted(content(train) + content(val)) == sorted(content(sources(plain)[0]) + content(sources(plain)[1]))


def test_bad_lists_name_the_line(plain: Path, tmp_path: Path) -> None:
    shutil.copy(next((plain / "train").glob("*/*.jpg")), tmp_path / "a.jpg")
    (tmp_path / "val.csv").write_text("path,label\na.jpg,x\n")
    for name, text, words in (("train.csv", "path,label\na.jpg,x\n\na.jpg,\n", r"train\.csv:4: "),
                              ("train.csv", "what,ever\n1,2\n", r"train\.csv:1: "),
                              ("train.csv", "path,label\nb.jpg,x\n", r"train\.csv:2: b\.jpg "),
                              ("train.csv", "path,label\n", r"train\.csv: lists no images"),
                              ("train.txt", "a.jpg x\na.jpg\n", r"train\.txt:2: "),
                              ("train.json", "[[\"a.jpg\", 1], [2]]", "entry 2 "), ("train.json", "[[", "not valid JSON")):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=words):
            sources(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "train.csv").write_bytes("path,label\nü.jpg,x\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"train\.csv: .*UTF-8.* 11"):
        sources(tmp_path)


def test_swin_lists_of_imagenet_22k(plain: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        rows = [[f"ILSVRC2011fall_whole/{p.parent.name}/{split}_{p.name}", CLASSES.index(p.parent.name)]
                for p in image_paths(plain, split)]
        for (name, _), path in zip(rows, image_paths(plain, split), strict=True):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / name)
        (tmp_path / f"ILSVRC2011fall_whole_map_{split}.txt").write_text(json.dumps(rows))
    train, val, loaders = sources(tmp_path, "DATA.DATASET", "imagenet22K")
    assert loaders.classes == ["0", "1", "2"] and len(train) == 12 and len(val) == 5
    assert [CLASSES[t] for t in train.targets] == [Path(train.path(i)).parent.name for i in range(12)]


def test_a_folder_without_a_split_is_shared_out_by_class(tmp_path: Path) -> None:
    write_images(tmp_path, ".", {"a": 20, "b": 10, "c": 1, "d": 2})
    with pytest.raises(DataError, match="DATA.VAL_FRACTION 0.1"):
        sources(tmp_path)
    train, val, loaders = sources(tmp_path, "DATA.VAL_FRACTION", 0.2)
    assert np.bincount(val.targets, minlength=4).tolist() == [4, 2, 0, 1] and np.bincount(train.targets).tolist() == [16, 8, 1, 1]
    paths = {s.path(i) for s in (train, val) for i in range(len(s))}
    assert len(paths) == 33 and any("7 of 33 images" in line for line in loaders.notices)
    held = {val.path(i) for i in range(len(val))}
    write_images(tmp_path, ".", {"e": 10})
    again = sources(tmp_path, "DATA.VAL_FRACTION", 0.2, "SEED", 5)[1]
    assert held <= {again.path(i) for i in range(len(again))}  # whatever the seed, and whatever is added
    loaders = build_loaders(config_for(tmp_path, "DATA.VAL_FRACTION", 0.2), splits=("val",))
    assert len(loaders.val.dataset.source) == len(again)


def test_a_training_folder_alone_is_shared_out_when_asked(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "train").symlink_to(plain / "train")
    with pytest.raises(DataError, match="val/ .*DATA.VAL_FRACTION"):
        sources(tmp_path)
    train, val, _ = sources(tmp_path, "DATA.VAL_FRACTION", 0.3)
    assert sorted(content(train) + content(val)) == content(sources(plain)[0]) and len(val) == 4
    both = sources(plain, "DATA.VAL_FRACTION", 0.3)
    assert content(both[0]) == content(sources(plain)[0])  # a split of its own wins


def test_folds_share_out_every_class_once(tmp_path: Path) -> None:
    write_images(tmp_path, ".", {"a": 7, "b": 11, "c": 3, "d": 1})
    folds = [sources(tmp_path, "DATA.FOLD", f"{k}/3", "SEED", k) for k in (1, 2, 3)]
    counts = np.array([np.bincount(val.targets, minlength=4) for _, val, _ in folds])
    assert (np.ptp(counts, axis=0) <= 1).all() and sorted(counts.sum(axis=1)) == [7, 7, 8]
    paths = [{val.path(i) for i in range(len(val))} for _, val, _ in folds]
    assert len(set.union(*paths)) == 22 == sum(map(len, paths)) and all(len(train) == 22 - len(val) for train, val, _ in folds)
    assert all(not paths[k] & {train.path(i) for i in range(len(train))} for k, (train, _, _) in enumerate(folds))
    assert len({tuple(loaders.classes) for _, _, loaders in folds}) == 1
    with pytest.raises(DataError, match="leaves no images"):
        sources(tmp_path, "DATA.FOLD", "40/40")
    for value in ("0/3", "4/3", "1/1", "1/2/3"):
        with pytest.raises(ConfigError, match="DATA.FOLD"):
            config_for(tmp_path, "DATA.FOLD", value)
    with pytest.raises(ConfigError, match="DATA.VAL_FRACTION"):
        config_for(tmp_path, "DATA.FOLD", "1/3", "DATA.VAL_FRACTION", 0.1)
    root = tmp_path / "own"  # a validation part of its own stays aside
    write_images(root, "train", {"a": 4, "b": 4})
    write_images(root, "val", {"a": 1, "b": 1})
    train, val, loaders = sources(root, "DATA.FOLD", "2/4")
    assert (len(train), len(val)) == (6, 2) and "train" in val.path(0) and any("left out" in line for line in loaders.notices)


def test_groups_of_a_list_stay_together_and_its_own_folds_count(tmp_path: Path) -> None:
    sizes = np.random.RandomState(0).randint(1, 9, 40)
    patients = np.repeat(np.arange(40), sizes)
    labels = ["ab"[int(patient % 3 == 0)] for patient in patients]
    write_images(tmp_path, ".", {"x": 1})
    for i in range(1, len(labels)):
        os.link(tmp_path / "x/0.jpg", tmp_path / f"x/{i}.jpg")
    path = tmp_path / "list.csv"

    def written(header: str, cells: list[str]) -> None:
        rows = enumerate(zip(labels, cells, strict=True))
        path.write_text(f"image,label,{header}\n" + "".join(f"x/{i}.jpg,{label},{cell}\n" for i, (label, cell) in rows))

    def held(*opts: object) -> np.ndarray:
        """Numbers of the validation images."""
        source = sources(path, *opts)[1]
        return np.array(sorted(int(Path(source.path(i)).stem) for i in range(len(source))))

    written("patient_id", [f"p{patient}" for patient in patients])
    folds = [held("DATA.FOLD", f"{k}/4") for k in (1, 2, 3, 4)]
    assert sorted(np.concatenate(folds)) == list(range(len(labels)))
    assert sum(len(set(patients[fold])) for fold in folds) == 40  # no patient in two
    assert np.ptp([len(fold) for fold in folds]) <= 4 and np.ptp([sum(labels[i] == "b" for i in fold) for fold in folds]) <= 4
    tenth = held("DATA.VAL_FRACTION", 0.1)
    assert abs(len(tenth) - 0.1 * len(labels)) < 4 and not set(patients[tenth]) & set(np.delete(patients, tenth))
    written("who", [f"p{patient}" for patient in patients])
    assert sum(len(set(patients[held("DATA.FOLD", f"{k}/4", "DATA.GROUP_COLUMN", "who")])) for k in (1, 2, 3, 4)) == 40
    written("kfold", [str(10 * (patient % 3)) for patient in patients])
    assert set(patients[held("DATA.FOLD", "10")] % 3) == {1} == set(patients[held("DATA.FOLD", "2/3")] % 3)
    for value, words in (("5", "folds are 0, 10, 20"), ("1/4", "has 3 folds")):
        with pytest.raises(DataError, match=words):
            sources(path, "DATA.FOLD", value)
    with pytest.raises(DataError, match="one of folds .*DATA.FOLD 0"):
        sources(path)
    written("other", ["7"] * len(labels))
    with pytest.raises(DataError, match="no fold column"):
        sources(path, "DATA.FOLD", "2", "DATA.LABEL_COLUMN", "label")


def test_class_names_set_the_order_choose_and_join(plain: Path, tmp_path: Path) -> None:
    listing = tmp_path / "classes.txt"
    listing.write_text("n02102040\tdog\nn01443537\tfish\nn01440764\tfish\n")
    train, val, loaders = sources(plain, "DATA.CLASS_NAMES", listing)
    assert loaders.classes == ["dog", "fish"]
    assert np.bincount(train.targets).tolist() == [5, 7] and np.bincount(val.targets).tolist() == [1, 4]
    listing.write_text("n02102040\nn01440764\n")
    train, val, loaders = sources(plain, "DATA.CLASS_NAMES", listing)
    assert loaders.classes == ["n02102040", "n01440764"] and np.bincount(train.targets).tolist() == [5, 4]
    assert all(Path(train.path(i)).parent.name == loaders.classes[train.targets[i]] for i in range(len(train)))
    assert any("3 images" in line and "classes.txt" in line for line in loaders.notices)
    assert train.load(0).size == (48, 40)
    shutil.copytree(plain, tmp_path / "d")
    listing.rename(tmp_path / "d/mine.txt")
    assert sources(tmp_path / "d", "DATA.CLASS_NAMES", "mine.txt")[2].classes == ["n02102040", "n01440764"]
    listing.write_text("a\nb\na\n")
    with pytest.raises(DataError, match=r"classes\.txt:3: .*'a'"):
        sources(plain, "DATA.CLASS_NAMES", listing)
    listing.write_text("a\nb\n")
    with pytest.raises(DataError, match=r"classes\.txt: "):
        sources(plain, "DATA.CLASS_NAMES", listing)


def test_subset_is_stratified_and_follows_the_seed(tmp_path: Path) -> None:
    write_images(tmp_path, "train", {"a": 20, "b": 10, "c": 1})
    write_images(tmp_path, "val", {"a": 2, "b": 2, "c": 2})
    train, val, loaders = sources(tmp_path, "DATA.SUBSET", 0.3)
    assert np.bincount(train.targets).tolist() == [6, 3, 1] and len(val) == 6
    assert any("10 of 31 training images" in line for line in loaders.notices)
    other = sources(tmp_path, "DATA.SUBSET", 0.3, "SEED", 1)[0]
    assert {train.path(i) for i in range(10)} != {other.path(i) for i in range(10)}


def test_classes_are_joined_by_name(tmp_path: Path) -> None:
    write_images(tmp_path, "train", {str(i): 1 for i in range(11)})
    write_images(tmp_path, "val", {"10": 1, "2": 1})
    train, val, loaders = sources(tmp_path)
    assert loaders.classes == ["0", "1", "10", "2", "3", "4", "5", "6", "7", "8", "9"]  # torchvision's order
    assert any("DATA.CLASS_NAMES" in line for line in loaders.notices)
    assert [loaders.classes[t] for t in val.targets] == ["10", "2"]
    assert ["9 classes" in line for line in loaders.notices if line.code == "missing-classes"] == [True]
    write_images(tmp_path, "val", {"12": 1})
    with pytest.raises(DataError, match="class '12'"):
        sources(tmp_path)


def test_names_that_look_alike_and_classes_of_an_image_each_are_told(plain: Path, tmp_path: Path) -> None:
    names = ["Cat", "cat", "caf\xe9", "caf\xe9 x", "dog"]
    for split, number in (("train", 3), ("val", 1)):
        for name in names:
            for i in range(number):
                (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
                shutil.copy(next((plain / "train").rglob("*.*")), tmp_path / split / name / f"{i}.jpg")
    assert any("Cat and cat are different classes" in line for line in sources(tmp_path)[2].notices)
    for split in ("train", "val"):
        (tmp_path / split / "Cat").rename(tmp_path / split / "cafe\u0301")
    told = [line for line in sources(tmp_path)[2].notices if "are different classes" in line]
    assert len(told) == 1 and "cafe\u0301 and caf\xe9" in told[0]
    with pytest.raises(DataError, match=r"no class has two images .*DATA\.LABEL_COLUMN"):
        sources(tmp_path / "val", "DATA.VAL_FRACTION", 0.5)


def test_zeros_before_a_number_do_not_move_an_image_to_another_class(tmp_path: Path) -> None:
    def joined(name: str, train: list[str], val: list[str]) -> tuple[list[str], list[str]]:
        """Classes, and those of the validation images; training labels are folders, or with ``list`` in the name a list's."""
        root, folders = tmp_path / name, [f"{i}" for i in range(len(train))] if "list" in name else train
        write_images(root, "train", dict.fromkeys(folders, 1))
        write_images(root, "val", {f"x{i}": 1 for i in range(len(val))})
        (root / "val").rename(root / "images")
        if "list" in name:
            (root / "train").rename(root / "pictures")
            (root / "train.csv").write_text("path,label\n" + "".join(f"pictures/{i}/0.jpg,{c}\n" for i, c in enumerate(train)))
        (root / "val.csv").write_text("path,label\n" + "".join(f"x{i}/0.jpg,{c}\n" for i, c in enumerate(val)))
        loaders = sources(root)[2]
        source = loaders.val.dataset.source
        return loaders.classes, [loaders.classes[t] for t in source.targets]

    three = ["01", "02", "03"]
    assert joined("a", three, three) == (three, three) and joined("list b", three, three) == (three, three)
    assert joined("c", ["1", "2", "3"], three) == (["1", "2", "3"], ["1", "2", "3"])  # a spreadsheet's zeros, or lack of them
    assert joined("list d", three, ["2", "3", "1"]) == (three, ["02", "03", "01"])
    assert joined("e", ["08", "09", "10"], ["8", "9", "10"])[1] == ["08", "09", "10"]
    assert joined("f", three, ["0", "1", "2"])[1] == three  # no name fits the first: positions
    assert joined("list g", ["00", "01", "03"], ["03", "00"]) == (["00", "01", "02", "03"], ["03", "00"])
    assert joined("list h", ["1", "01", "02"], ["01", "1"]) == (["01", "1", "02"], ["01", "1"])
    assert joined("list k", ["0.0", "2.0", "10.0"], ["0", "10"]) == (["0.0", "2.0", "10.0"], ["0.0", "10.0"])  # a column with gaps
    assert joined("list i", ["1" * 5000, "2"], ["2"])[1] == ["2"]  # more digits than int() takes
    with pytest.raises(DataError, match="class '2'"):  # one name fits, so that no number is a position
        joined("j", ["0", "1", "cat"], ["1", "2"])
    (tmp_path / "zip").mkdir()
    for split in ("train", "val"):
        shutil.make_archive(str(tmp_path / "zip" / split), "zip", tmp_path / "c/train")
    (tmp_path / "zip/classes.txt").write_text("3\n2\n1\n")  # orders the folders 1, 2 and 3; does not number them
    train, _, loaders = sources(tmp_path / "zip")
    assert loaders.classes == ["3", "2", "1"] and [train.path(i).split("/")[-2] for i in np.argsort(train.targets)] == ["3", "2", "1"]
    (tmp_path / "names.txt").write_text("3\n1\n")
    assert sources(tmp_path / "list b", "DATA.CLASS_NAMES", tmp_path / "names.txt")[0].targets.tolist() == [1, 0]


def test_the_right_place_is_suggested(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "up").mkdir()
    (tmp_path / "up/imagenet").symlink_to(plain)
    (tmp_path / "kaggle/ILSVRC/Data").mkdir(parents=True)
    (tmp_path / "kaggle/ILSVRC/Data/CLS-LOC").symlink_to(plain)
    (tmp_path / "gz").mkdir()
    (tmp_path / "gz/train.tar.gz").write_bytes(b"x")
    rows = [(plain / "train", "one split, give its parent"), (tmp_path / "up", "up/imagenet holds them, give that"),
            (tmp_path / "gz", "train.tar.gz must be unpacked"),
            (tmp_path / "no", "no such data folder"), (plain / "train/n01440764", "holds images, not classes, give"),
            (tmp_path / "kaggle", "kaggle/ILSVRC/Data/CLS-LOC holds them, give that")]
    for root, words in rows:
        with pytest.raises(DataError, match=words):
            sources(root)
    with pytest.raises(DataError, match=r"holds no train\.zip .*DATA.ZIP_MODE"):
        sources(plain, "DATA.ZIP_MODE", True)
    with pytest.raises(ConfigError, match="DATA.DATASET is 'zips'; choose from .*did you mean zip"):
        sources(plain, "DATA.DATASET", "zips")


def test_hugging_face_on_disk(plain: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets.features")  # datasets alone may be a folder of images
    import datasets
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=CLASSES))

    def table(split: str):
        paths = image_paths(plain, split)
        cells = [dict(bytes=p.read_bytes(), path=None) if i % 2 else dict(bytes=None, path=str(p)) for i, p in enumerate(paths)]
        return datasets.Dataset.from_dict(dict(image=cells, label=[CLASSES.index(p.parent.name) for p in paths]), features=features)

    both = datasets.DatasetDict(train=table("train"), validation=table("val"))
    both.save_to_disk(tmp_path / "saved")
    same_content(tmp_path / "saved", plain)
    table("train").save_to_disk(tmp_path / "single")
    with pytest.raises(DataError, match="train split .*VAL_FRACTION"):
        sources(tmp_path / "single")
    train, val, _ = sources(tmp_path / "single", "DATA.VAL_FRACTION", 0.3)
    assert sorted(content(train) + content(val)) == content(sources(plain)[0])
    assert Image.open(BytesIO(train.read(0))).size == (48, 40)
    workers = build_loaders(config_for(tmp_path / "saved", "DATA.NUM_WORKERS", 2), splits=("val",))
    assert sum(int((y >= 0).sum()) for _, y in workers.val) == 5
    workers.close()


def test_hugging_face_parquet(plain: Path, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("datasets.features")  # datasets alone may be a folder of images
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "hub/data").mkdir(parents=True)
    for split, name in (("train", "train-00000-of-00001"), ("val", "validation-00000-of-00001")):
        paths = image_paths(plain, split)
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=CLASSES))
        cells = dict(image=[dict(bytes=p.read_bytes(), path=p.name) for p in paths], label=[CLASSES.index(p.parent.name) for p in paths])
        datasets.Dataset.from_dict(cells, features=features).to_parquet(tmp_path / f"hub/data/{name}.parquet")
    same_content(tmp_path / "hub", plain)


def test_hugging_face_without_the_package(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "dataset_dict.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        sources(tmp_path)


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
