"""Every layout a user may bring becomes the same images under the same classes, or one sentence of advice."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import write_images
from PIL import Image

from config import ConfigError, get_config
from data import DataError, build_loaders
from data.layouts.detect import Options, recognise


def config_for(root: Path, *opts: object):
    return get_config(None, ["DATA.DATA_PATH", str(root), "DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "8", "DATA.NUM_WORKERS", "0",
                             "DATA.INDEX_CACHE", "none", *map(str, opts)])


def sources(root: Path, *opts: object):
    loaders = build_loaders(config_for(root, *opts))
    return loaders.train.dataset.folder, loaders.val.dataset.folder, loaders


def content(source) -> list[tuple[str, bytes]]:
    """(class, bytes) of every image, in any order."""
    return sorted((source.classes[source.targets[i]], source.read(i)) for i in range(len(source)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plain")
    write_images(root, "train", {"n01440764": 4, "n01443537": 3, "n02102040": 5})
    write_images(root, "val", {"n01440764": 2, "n01443537": 2, "n02102040": 1}, seed=1)
    return root


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


WNIDS = ["n01440764", "n01443537", "n02102040"]


def write_flat(kind: str, root: Path, labels: dict[str, str]) -> None:
    numbers = {w: i for i, w in enumerate(WNIDS)}
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
        ids = {w: 7 - 2 * i for i, w in enumerate(WNIDS)}  # the devkit's order is its own
        (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{ids[w]}\n" for w in labels.values()))
        if kind == "devkit":
            from scipy.io import savemat
            synsets = np.array([(ids[w], w, "words") for w in WNIDS], dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")])
            savemat(data / "meta.mat", {"synsets": synsets})
        else:
            (data / "map_clsloc.txt").write_text("".join(f"{w} {ids[w]} some_words\n" for w in WNIDS))


@pytest.mark.parametrize("kind", ["synset labels", "kaggle", "caffe", "csv", "devkit", "clsloc"])
def test_flat_validation_folder(plain: Path, tmp_path: Path, kind: str) -> None:
    write_flat(kind, tmp_path, flatten(plain, tmp_path))
    train, val, loaders = sources(tmp_path)
    assert loaders.classes == WNIDS and content(train) == content(sources(plain)[0])
    assert content(val) == content(sources(plain)[1])
    assert any("labels from" in line for line in loaders.notices)


def test_kaggle_keeps_its_lists_three_folders_up(plain: Path, tmp_path: Path) -> None:
    root = tmp_path / "ILSVRC/Data/CLS-LOC"
    root.mkdir(parents=True)
    write_flat("kaggle", tmp_path, flatten(plain, root))
    assert content(sources(root)[1]) == content(sources(plain)[1])


def test_both_splits_flat_with_a_list_each(plain: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        rows = []
        for number, path in enumerate(sorted((plain / split).glob("*/*"))):
            shutil.copy(path, tmp_path / split / f"{number}.jpg")
            rows.append(f"{number}.jpg,{path.parent.name}\n")
        (tmp_path / f"{split}.csv").write_text("image,label\n" + "".join(rows))
    train, val, _ = sources(tmp_path)
    assert content(train) == content(sources(plain)[0]) and content(val) == content(sources(plain)[1])


def test_flat_validation_without_or_with_wrong_labels(plain: Path, tmp_path: Path) -> None:
    labels = flatten(plain, tmp_path)
    with pytest.raises(DataError, match=r"val: its images lie loose; .*DATA.VAL_LABELS"):
        sources(tmp_path)
    (tmp_path / "elsewhere.txt").write_text("".join(f"{n}\t{w}\n" for n, w in labels.items()))
    assert content(sources(tmp_path, "DATA.VAL_LABELS", tmp_path / "elsewhere.txt")[1]) == content(sources(plain)[1])
    (tmp_path / "val.txt").write_text("n01440764\n")
    with pytest.raises(DataError, match="has 1 labels for the 5 images"):
        sources(tmp_path)
    (tmp_path / "val.txt").write_text("".join(f"{n} {w}\n" for n, w in list(labels.items())[1:]))
    with pytest.raises(DataError, match=r"has no label for 1 of the 5 images .*\(ILSVRC2012_val_00000001.JPEG\)"):
        sources(tmp_path)
    (tmp_path / "val.txt").write_text("ILSVRC2012_val_00000001.JPEG n01440764\nILSVRC2012_val_00000002.JPEG\n")
    with pytest.raises(DataError, match=r"val\.txt:2: has no label"):
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
    for number, path in enumerate(sorted((plain / "val").glob("*/*"))):
        shutil.copy(path, tmp_path / f"val/images/val_{number}.JPEG")
        lines.append(f"val_{number}.JPEG\t{path.parent.name}\t0\t32\t44\t62\n")
    (tmp_path / "val/val_annotations.txt").write_text("".join(lines))
    train, val, loaders = sources(tmp_path)
    assert loaders.classes == WNIDS and content(train) == content(sources(plain)[0]) and content(val) == content(sources(plain)[1])


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
        rows = [(os.path.relpath(p, plain), p.parent.name) for p in sorted((plain / split).glob("*/*"))]
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
    opts = ("DATA.DATASET", "lists")
    train, val, loaders = sources(tmp_path, *opts)
    assert loaders.classes == WNIDS and content(train) == content(sources(plain)[0]) and content(val) == content(sources(plain)[1])
    assert "list" in recognise(str(tmp_path), Options(dataset="lists")).name and recognise(str(tmp_path), Options()).name == "class folders"


def test_one_list_with_a_split_column_or_a_fraction(plain: Path, tmp_path: Path) -> None:
    rows = [f"{p},{p.parent.name},{s}\n" for s in ("train", "val") for p in sorted((plain / s).glob("*/*"))]
    (tmp_path / "all.csv").write_text("path,label,split\n" + "".join(rows))
    train, val, _ = sources(tmp_path / "all.csv")
    assert content(train) == content(sources(plain)[0]) and content(val) == content(sources(plain)[1])
    (tmp_path / "none.csv").write_text("path,label\n" + "".join(r.rpartition(",")[0] + "\n" for r in rows))
    with pytest.raises(DataError, match="has no split column; .*DATA.VAL_FRACTION"):
        sources(tmp_path / "none.csv")
    train, val, _ = sources(tmp_path / "none.csv", "DATA.VAL_FRACTION", 0.25)
    assert sorted(content(train) + content(val)) == sorted(content(sources(plain)[0]) + content(sources(plain)[1]))


def test_bad_lists_name_the_line(plain: Path, tmp_path: Path) -> None:
    shutil.copy(next((plain / "train").glob("*/*.jpg")), tmp_path / "a.jpg")
    (tmp_path / "val.csv").write_text("path,label\na.jpg,x\n")
    for name, text, words in (("train.csv", "path,label\na.jpg,x\n\na.jpg,\n", r"train\.csv:4: has no path or no label"),
                              ("train.csv", "what,ever\n1,2\n", r"train\.csv:1: neither a header"),
                              ("train.csv", "path,label\nb.jpg,x\n", r"train\.csv:2: b\.jpg is not below"),
                              ("train.csv", "path,label\n", "lists no images"),
                              ("train.txt", "a.jpg x\na.jpg\n", r"train\.txt:2: has no label"),
                              ("train.json", "[[\"a.jpg\", 1], [2]]", "entry 2 is no"), ("train.json", "[[", "not valid JSON")):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=words):
            sources(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "train.csv").write_bytes("path,label\nü.jpg,x\n".encode("latin-1"))
    with pytest.raises(DataError, match="no UTF-8 text at byte 11"):
        sources(tmp_path)


def test_swin_lists_of_imagenet_22k(plain: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        rows = [[f"ILSVRC2011fall_whole/{p.parent.name}/{split}_{p.name}", WNIDS.index(p.parent.name)]
                for p in sorted((plain / split).glob("*/*"))]
        for (name, _), path in zip(rows, sorted((plain / split).glob("*/*")), strict=True):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / name)
        (tmp_path / f"ILSVRC2011fall_whole_map_{split}.txt").write_text(json.dumps(rows))
    train, val, loaders = sources(tmp_path, "DATA.DATASET", "imagenet22K")
    assert loaders.classes == ["0", "1", "2"] and len(train) == 12 and len(val) == 5
    assert [WNIDS[t] for t in train.targets] == [Path(train.path(i)).parent.name for i in range(12)]


def test_a_folder_without_a_split_is_shared_out_by_class(tmp_path: Path) -> None:
    write_images(tmp_path, ".", {"a": 20, "b": 10, "c": 1, "d": 2})
    with pytest.raises(DataError, match="classes without a split: .*DATA.VAL_FRACTION 0.1"):
        sources(tmp_path)
    train, val, loaders = sources(tmp_path, "DATA.VAL_FRACTION", 0.2)
    assert np.bincount(val.targets, minlength=4).tolist() == [4, 2, 0, 1] and np.bincount(train.targets).tolist() == [16, 8, 1, 1]
    paths = {s.path(i) for s in (train, val) for i in range(len(s))}
    assert len(paths) == 33 and any("7 of 33 images are for validation" in line for line in loaders.notices)
    held = {val.path(i) for i in range(len(val))}
    write_images(tmp_path, ".", {"e": 10})
    again = sources(tmp_path, "DATA.VAL_FRACTION", 0.2, "SEED", 5)[1]
    assert held <= {again.path(i) for i in range(len(again))}  # whatever the seed, and whatever is added
    loaders = build_loaders(config_for(tmp_path, "DATA.VAL_FRACTION", 0.2), splits=("val",))
    assert len(loaders.val.dataset.folder) == len(again)


def test_a_training_folder_alone_is_shared_out_when_asked(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "train").symlink_to(plain / "train")
    with pytest.raises(DataError, match="holds no val/ or validation/ folder; .*DATA.VAL_FRACTION"):
        sources(tmp_path)
    train, val, _ = sources(tmp_path, "DATA.VAL_FRACTION", 0.3)
    assert sorted(content(train) + content(val)) == content(sources(plain)[0]) and len(val) == 4
    both = sources(plain, "DATA.VAL_FRACTION", 0.3)
    assert content(both[0]) == content(sources(plain)[0])  # a split of its own wins


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
    assert any("3 images of classes that" in line for line in loaders.notices)
    assert train.load(0).size == (48, 40)
    shutil.copytree(plain, tmp_path / "d")
    listing.rename(tmp_path / "d/mine.txt")
    assert sources(tmp_path / "d", "DATA.CLASS_NAMES", "mine.txt")[2].classes == ["n02102040", "n01440764"]
    listing.write_text("a\nb\na\n")
    with pytest.raises(DataError, match=r"classes\.txt:3: stands twice"):
        sources(plain, "DATA.CLASS_NAMES", listing)
    listing.write_text("a\nb\n")
    with pytest.raises(DataError, match="names none of the classes"):
        sources(plain, "DATA.CLASS_NAMES", listing)


def test_subset_is_stratified_and_follows_the_seed(tmp_path: Path) -> None:
    write_images(tmp_path, "train", {"a": 20, "b": 10, "c": 1})
    write_images(tmp_path, "val", {"a": 2, "b": 2, "c": 2})
    train, val, loaders = sources(tmp_path, "DATA.SUBSET", 0.3)
    assert np.bincount(train.targets).tolist() == [6, 3, 1] and len(val) == 6
    assert any("10 of 31 training images are used" in line for line in loaders.notices)
    other = sources(tmp_path, "DATA.SUBSET", 0.3, "SEED", 1)[0]
    assert {train.path(i) for i in range(10)} != {other.path(i) for i in range(10)}


def test_classes_are_joined_by_name(tmp_path: Path) -> None:
    write_images(tmp_path, "train", {str(i): 1 for i in range(11)})
    write_images(tmp_path, "val", {"10": 1, "2": 1})
    train, val, loaders = sources(tmp_path)
    assert loaders.classes == ["0", "1", "10", "2", "3", "4", "5", "6", "7", "8", "9"]  # torchvision's order
    assert any("timm counts them by number" in line for line in loaders.notices)
    assert [loaders.classes[t] for t in val.targets] == ["10", "2"]
    assert any("9 classes without a folder" in line for line in loaders.notices)
    write_images(tmp_path, "val", {"12": 1})
    with pytest.raises(DataError, match="class '12' is unknown to the training classes"):
        sources(tmp_path)


def test_fingerprints_tell_lists_apart_wherever_they_lie(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "copy")
    first, copy = sources(plain), sources(tmp_path / "copy")
    assert first[0].fingerprint() == copy[0].fingerprint() != first[1].fingerprint()
    part = [sources(root, "DATA.SUBSET", 0.5)[0].fingerprint() for root in (plain, tmp_path / "copy")]
    assert part[0] == part[1] != first[0].fingerprint() and sources(plain, "DATA.SUBSET", 0.5, "SEED", 1)[0].fingerprint() != part[0]
    os.rename(tmp_path / "copy/train/n01440764/0.jpg", tmp_path / "copy/train/n01440764/9.jpg")
    assert sources(tmp_path / "copy")[0].fingerprint() != first[0].fingerprint()


def test_rubbish_is_no_class_and_no_image(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "d")
    for name in (".ipynb_checkpoints/a.jpg", "__MACOSX/n01440764/a.jpg", ".git/x.png", "n01440764/._0.jpg", "n01440764/Thumbs.db",
                 "n01440764/.ipynb_checkpoints/0.jpg", "n01440764/desktop.ini", "readme.txt"):
        (tmp_path / "d/train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d/train" / name).write_bytes(b"x")
    assert content(sources(tmp_path / "d")[0]) == content(sources(plain)[0]) and sources(tmp_path / "d")[2].classes == WNIDS


def test_wrong_places_are_told(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "up").mkdir()
    (tmp_path / "up/imagenet").symlink_to(plain)
    (tmp_path / "kaggle/ILSVRC/Data").mkdir(parents=True)
    (tmp_path / "kaggle/ILSVRC/Data/CLS-LOC").symlink_to(plain)
    (tmp_path / "gz").mkdir()
    (tmp_path / "gz/train.tar.gz").write_bytes(b"x")
    rows = [(plain / "train", "this looks like one split, give its parent"), (tmp_path / "up", "up/imagenet holds them, give that"),
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
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=WNIDS))

    def table(split: str):
        paths = sorted((plain / split).glob("*/*"))
        cells = [dict(bytes=p.read_bytes(), path=None) if i % 2 else dict(bytes=None, path=str(p)) for i, p in enumerate(paths)]
        return datasets.Dataset.from_dict(dict(image=cells, label=[WNIDS.index(p.parent.name) for p in paths]), features=features)

    both = datasets.DatasetDict(train=table("train"), validation=table("val"))
    both.save_to_disk(tmp_path / "saved")
    train, val, loaders = sources(tmp_path / "saved")
    assert loaders.classes == WNIDS and content(train) == content(sources(plain)[0]) and content(val) == content(sources(plain)[1])
    table("train").save_to_disk(tmp_path / "single")
    with pytest.raises(DataError, match="has no train split .*VAL_FRACTION"):
        sources(tmp_path / "single")
    train, val, _ = sources(tmp_path / "single", "DATA.VAL_FRACTION", 0.3)
    assert sorted(content(train) + content(val)) == content(sources(plain)[0])
    from io import BytesIO
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
        paths = sorted((plain / split).glob("*/*"))
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=WNIDS))
        cells = dict(image=[dict(bytes=p.read_bytes(), path=p.name) for p in paths], label=[WNIDS.index(p.parent.name) for p in paths])
        datasets.Dataset.from_dict(cells, features=features).to_parquet(tmp_path / f"hub/data/{name}.parquet")
    train, val, loaders = sources(tmp_path / "hub")
    assert loaders.classes == WNIDS and content(train) == content(sources(plain)[0]) and content(val) == content(sources(plain)[1])


def test_hugging_face_without_the_package(tmp_path: Path, monkeypatch) -> None:
    import sys
    (tmp_path / "dataset_dict.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        sources(tmp_path)


class Canary:
    """Pickled code: unpickling it makes a folder."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_index_of_a_large_folder_is_kept_and_noticed_when_it_changes(plain: Path, tmp_path: Path, monkeypatch) -> None:
    from data.sources import folder
    from data.sources import index_cache as index
    monkeypatch.setattr(index, "WORTH_KEEPING", 5)
    root, cache = tmp_path / "data", tmp_path / "cache"
    shutil.copytree(plain / "train", root)
    os.utime(root)

    def age() -> None:
        for path in (root, *root.rglob("*")):
            if path.is_dir():
                os.utime(path, (1e9, 1e9))

    listed = []
    real = folder._index_folder
    monkeypatch.setattr(folder, "_index_folder", lambda place: listed.append(place) or real(place))
    expected = content(folder.scan_folder(str(root), cache=str(cache)))
    assert len(listed) == 1 and not list(cache.glob("*"))  # changed a moment ago: not to be trusted yet
    age()
    for _ in range(3):
        assert content(folder.scan_folder(str(root), cache=str(cache))) == expected
    assert len(listed) == 2 and len(list(cache.glob("*.npz"))) == 1
    (root / "n01440764/0.jpg").rename(root / "n01440764/new.jpg")
    found = folder.scan_folder(str(root), cache=str(cache))
    assert len(listed) == 3 and any(found.path(i).endswith("new.jpg") for i in range(len(found)))
    age()
    folder.scan_folder(str(root), cache=str(cache))
    kept, = cache.glob("*.npz")
    odd = bytearray(kept.read_bytes())
    entry = odd.index(b"PK\x01\x02")
    odd[entry + 10] = 99  # a way of compressing that there is not
    for damage in (b"", b"PK\x03\x04 nonsense", kept.read_bytes()[:-40], bytes(odd)):
        kept.write_bytes(damage)
        before = len(listed)
        assert len(folder.scan_folder(str(root), cache=str(cache))) == 12 and len(listed) == before + 1
    pickled = io.BytesIO()
    np.savez(pickled, targets=np.array([Canary(tmp_path / "canary")], dtype=object))
    kept.write_bytes(pickled.getvalue())
    assert len(folder.scan_folder(str(root), cache=str(cache))) == 12 and not (tmp_path / "canary").exists()
    (tmp_path / "file").write_text("")
    assert len(folder.scan_folder(str(root), cache=str(tmp_path / "file/below"))) == 12  # an unwritable cache is no error


def test_where_indices_are_kept(monkeypatch, tmp_path: Path) -> None:
    from data.sources.index_cache import cache_folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("auto") == str(tmp_path / "hierarchical-transformers")
    assert cache_folder("none") is None and cache_folder(str(tmp_path / "x")) == str(tmp_path / "x")
