"""Folders of images with maps of classes, in the layouts of real data sets, whole and damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from miniatures import (
    ADE_NAMES,
    ade20k,
    cityscapes,
    coco_panoptic,
    folders_of_masks,
    mask,
    picture,
    roboflow_masks,
    stripes,
    voc_colour,
    voc_segmentation,
)
from PIL import Image

from config import get_config
from data.dense.base import IGNORED, DenseOptions
from data.dense.canvases import write_canvases
from data.dense.layouts import open_dense_sources
from data.dense.map_layouts import CITYSCAPES, VOC_CLASSES, splits_of_maps
from data.dense.maps import MapFolder, open_maps
from data.errors import DataError, UnreadableImage


def opened(root: Path, split: str = "train", *opts: object) -> MapFolder:
    assert split in splits_of_maps(str(root))
    data = get_config(None, ["DATA.READ_PATIENCE", "0", *map(str, opts)]).DATA
    return open_maps(str(root), split, DenseOptions(data, "semantic"))


def check(root: Path, written: dict[str, np.ndarray], class_of: dict[int, int], *opts: object) -> dict[str, MapFolder]:
    """Both splits have every image that was written, with ``class_of`` each value; others are ignored."""
    found = {split: opened(root, split, *opts) for split in ("train", "val")}
    seen = {source.path(i): source.index_map(i) for source in found.values() for i in range(len(source))}
    assert {str(Path(path)) for path in seen} == set(written)
    for path, values in written.items():
        expected = np.vectorize(lambda value: class_of.get(value, IGNORED))(values)
        assert (seen[path] == expected).all() and seen[path].dtype == np.uint8
    for source in found.values():
        assert not source.faults and source.sizes.tolist() == [[12, 16]] * len(source) and len(source.category_ids) == len(source.classes)
        assert source.load(0).size == (16, 12) and source.kind == "maps"
    return found


def test_ade20k(tmp_path: Path) -> None:
    written = ade20k(tmp_path)
    for root in (tmp_path, tmp_path / "ADEChallengeData2016"):
        found = check(root, written, {value: value - 1 for value in range(1, 6)})
    assert found["val"].classes == [name.split(",")[0] for name in ADE_NAMES] and found["val"].category_ids == [1, 2, 3, 4, 5]
    assert found["val"].things == [False] * 4 + [True]


@pytest.mark.parametrize("train_ids", [True, False])
def test_cityscapes(tmp_path: Path, train_ids: bool) -> None:
    found = check(tmp_path, cityscapes(tmp_path, train_ids), {value: at for at, value in enumerate(CITYSCAPES.values())})
    assert found["train"].classes == found["val"].classes == list(CITYSCAPES) and found["train"].classes[13] == "car"


def test_voc(tmp_path: Path) -> None:
    written = voc_segmentation(tmp_path)
    for root in (tmp_path, tmp_path / "VOCdevkit", tmp_path / "VOCdevkit/VOC2012"):
        assert check(root, written, {value: value for value in range(21)})["val"].classes == list(VOC_CLASSES)


def test_roboflow(tmp_path: Path) -> None:
    assert check(tmp_path, roboflow_masks(tmp_path), {0: 0, 1: 1, 2: 2})["val"].classes == ["background", "cat", "dog"]


def test_own_folders(tmp_path: Path) -> None:
    written = folders_of_masks(tmp_path)
    assert check(tmp_path, written, {0: 0, 1: 1, 2: 2})["train"].classes == ["0", "1", "2"]
    mask(tmp_path / "masks/val/c.png", stripes(2, 1))
    assert opened(tmp_path, "val").classes == ["1", "2"]  # by its own masks: names join them
    written[str(tmp_path / "images/val/c.jpg")] = stripes(2, 1)
    (tmp_path / "data.yaml").write_text("names: {0: ground, 1: tree, 2: house, 3: car}\n")
    assert check(tmp_path, written, {0: 0, 1: 1, 2: 2})["val"].classes == ["ground", "tree", "house", "car"]
    (tmp_path / "classes.txt").write_text("tree\nhouse\n")
    found = check(tmp_path, written, {1: 0, 2: 1}, "DATA.DENSE.REDUCE_ZERO_LABEL", True)
    assert found["train"].classes == ["tree", "house"] and found["train"].category_ids == [1, 2]


def test_other_names_of_folders_and_files(tmp_path: Path) -> None:
    for folder, below in (("train/images", "train/masks"), ("train", "train_labels"), ("img_dir/train", "ann_dir/train")):
        root = tmp_path / folder.replace("/", "_")
        picture(root / folder / "x/0001.png"), mask(root / below / "x/0001_L.png", stripes(0, 1))
        source = opened(root)
        assert len(source) == 1 and source.path(0) == str(root / folder / "x/0001.png") and set(np.unique(source.index_map(0))) == {0, 1}


def test_colours_by_a_list(tmp_path: Path) -> None:
    paths = [picture(tmp_path / f"images/train/{i}.png") for i in range(2)]
    colours = np.array([[0, 0, 0], [128, 64, 0], [9, 9, 9]], dtype=np.uint8)
    (tmp_path / "masks/train").mkdir(parents=True)
    Image.fromarray(colours[stripes(0, 1, 2)]).save(tmp_path / "masks/train/0.png")
    mask(tmp_path / "masks/train/1.png", stripes(0, 2))
    with pytest.raises(DataError, match="0.png.*class_dict.csv"):
        opened(tmp_path)
    (tmp_path / "class_dict.csv").write_text("name,r,g,b\nnone,0,0,0\nroad,128,64,0\nignore,9,9,9\n")
    source = opened(tmp_path)
    assert source.classes == ["none", "road"] and (source.index_map(0) == np.array([0, 1, 255])[stripes(0, 1, 2)]).all() and len(paths) == 2
    (tmp_path / "class_dict.csv").unlink()
    (tmp_path / "labelmap.txt").write_text("# label:color_rgb:parts:actions\nroad:128,64,0::\nnone:0,0,0::\n")
    with pytest.raises(DataError, match="0.png.*9,9,9"):
        opened(tmp_path)


def test_cvat_with_palette(tmp_path: Path) -> None:
    voc_segmentation(tmp_path)
    values = dict(ignore=255, plane=1, none=0, tv=20)
    lines = [f"{name}:{','.join(map(str, voc_colour(value)))}::" for name, value in values.items()]
    (tmp_path / "VOCdevkit/VOC2012/labelmap.txt").write_text("\n".join(lines))
    source = opened(tmp_path)
    assert source.classes == ["plane", "none", "tv"] and (source.index_map(0) == np.array([1, 0, 255])[stripes(0, 1, 2)]).all()


def test_black_and_white(tmp_path: Path) -> None:
    for split in ("train", "val"):
        picture(tmp_path / f"images/{split}/a.jpg"), mask(tmp_path / f"masks/{split}/a.png", stripes(0, 255))
    for split in ("train", "val"):
        source = opened(tmp_path, split)
        assert source.classes == ["0", "255"] and (source.index_map(0) == stripes(0, 1)).all()
    mask(tmp_path / "masks/train/a.png", stripes(0, 1, 255))
    assert opened(tmp_path, "val").classes == ["0"]
    Image.fromarray(stripes(0, 1).astype(bool)).save(tmp_path / "masks/train/a.png")
    assert opened(tmp_path).classes == ["0", "1"]


def test_faults_are_counted_and_named(tmp_path: Path) -> None:
    folders_of_masks(tmp_path)
    picture(tmp_path / "images/train/lonely.jpg"), mask(tmp_path / "masks/train/widow.png", stripes(0, 1))
    picture(tmp_path / "images/train/turned.jpg"), mask(tmp_path / "masks/train/turned.png", stripes(0, 1, height=16, width=12))
    picture(tmp_path / "images/train/cut.jpg"), mask(tmp_path / "masks/train/cut.png", stripes(0, 1))
    (tmp_path / "masks/train/cut.png").write_bytes((tmp_path / "masks/train/cut.png").read_bytes()[:40])
    (tmp_path / "images/train/empty.jpg").write_bytes(b""), mask(tmp_path / "masks/train/empty.png", stripes(0, 1))
    source = opened(tmp_path)
    assert len(source) == 2 and len(source.notices) == 5
    faults = {fault.kind: fault for fault in source.faults}
    assert {kind: fault.count for kind, fault in faults.items()} == {
        "mask missing": 1, "image missing": 1, "mask of another size": 1, "mask unreadable": 1, "image unreadable": 1}
    for kind, name in (("mask missing", "lonely.jpg"), ("image missing", "widow.png"), ("mask of another size", "turned.png"),
                       ("mask unreadable", "cut.png"), ("image unreadable", "empty.jpg")):
        assert name in faults[kind].examples[0]
    assert "DATA.EXIF" in faults["mask of another size"].remedy
    mask(tmp_path / "masks/train/a.png", stripes(0, 1, width=10))  # after the start
    with pytest.raises(UnreadableImage, match="a.png"):
        source.index_map(0)


def test_unusable_data_is_one_sentence(tmp_path: Path) -> None:
    folders_of_masks(tmp_path, "ground\ntree\n")
    with pytest.raises(DataError, match="b.png.* value 2.*classes.txt.*REDUCE_ZERO_LABEL"):
        opened(tmp_path)
    (tmp_path / "classes.txt").write_text("ground\ntree\ntree\n")
    with pytest.raises(DataError, match="classes.txt"):
        opened(tmp_path)
    (tmp_path / "classes.txt").unlink()
    deep = stripes(0, 300).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "masks/train/a.png")
    with pytest.raises(DataError, match="a.png.*300"):
        opened(tmp_path)
    Image.fromarray(deep // 100).save(tmp_path / "masks/train/a.png")
    assert opened(tmp_path).classes == ["0", "2", "3"]
    mask(tmp_path / "masks/train/a.png", np.arange(192).reshape(12, 16))
    mask(tmp_path / "masks/train/b.png", np.arange(64, 256).reshape(12, 16))
    with pytest.raises(DataError, match="255 values|254"):
        opened(tmp_path)
    Image.new("L", (16, 12)).save(tmp_path / "masks/train/a.png", format="JPEG")
    with pytest.raises(DataError, match="a.png.*JPEG"):
        opened(tmp_path)
    for name, text in (("class_dict.csv", "name,r,g,b\nroad,1,2\n"), ("labelmap.txt", "a:1,1,1::\nb:1,1,1::\n"),
                       ("data.yaml", "names: 5\n"), ("_classes.csv", "Pixel Value, Class\n0, a\n999, b\n"),
                       ("objectInfo150.txt", "wall\n"), ("labels.txt", "\n"),
                       ("codes.txt", b"\xff\xfe\xfd")):
        folders_of_masks(tmp_path / name)
        (tmp_path / name / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(DataError, match=name):
            opened(tmp_path / name)


def test_a_map_as_objects(tmp_path: Path) -> None:
    decode = pytest.importorskip("pycocotools.mask").decode
    folders_of_masks(tmp_path)
    found = opened(tmp_path).objects(1)
    assert found.labels.tolist() == [2] and found.boxes.tolist() == [[0, 0, 8, 12]] and found.areas.tolist() == [96]
    assert (decode(dict(found.masks[0])) == (stripes(2, 255) == 2)).all()


def test_what_is_no_such_data(tmp_path: Path) -> None:
    assert not splits_of_maps(str(tmp_path)) and not splits_of_maps(str(tmp_path / "nothing"))
    picture(tmp_path / "images/train/a.jpg"), (tmp_path / "labels/train").mkdir(parents=True)
    (tmp_path / "labels/train/a.txt").write_text("0 .5 .5 .1 .1\n")  # YOLO's
    assert not splits_of_maps(str(tmp_path))
    with pytest.raises(DataError, match="masks/train"):
        open_maps(str(tmp_path), "train", DenseOptions(get_config().DATA, "semantic"))


def test_without_splits(tmp_path: Path) -> None:
    for name in "abcd":
        picture(tmp_path / f"images/{name}.jpg"), mask(tmp_path / f"masks/{name}_mask.png", stripes(0, 1))
    assert splits_of_maps(str(tmp_path)) == ["all"]
    sources, layout = open_dense_sources(config_for(tmp_path, "TASK", "semantic", "DATA.VAL_FRACTION", 0.25), ("train", "val"), None)
    assert layout == "maps" and (len(sources["train"]), len(sources["val"])) == (3, 1)
    assert (sources["val"].index_map(0) == stripes(0, 1)).all()


def test_from_another_working_directory(tmp_path: Path, monkeypatch) -> None:
    write_canvases(str(tmp_path / "there"), 1, 1)
    coco_panoptic(tmp_path / "panoptic")
    for folder, task in (("there", "semantic"), ("there", "detection"), ("panoptic", "mask")):
        found = []
        for root, place in ((tmp_path / folder, tmp_path), (folder, tmp_path)):
            monkeypatch.chdir(place)
            source = open_dense_sources(config_for(root, "TASK", task), ("train",), None)[0]["train"]
            assert source.load(0).size == tuple(source.sizes[0].tolist()[::-1]) and (task == "detection" or source.index_map(0).size)
            found.append(source.fingerprint())
        assert found[0] == found[1]


def test_which_layout_serves_which_task(tmp_path: Path) -> None:
    write_canvases(str(tmp_path), 2, 1)
    for task, expected, classes in (("detection", "coco", 10), ("instance", "coco", 10), ("mask", "coco", 10), ("semantic", "maps", 11)):
        sources, layout = open_dense_sources(config_for(tmp_path, "TASK", task), ("train", "val"), None)
        assert layout == expected and len(sources["val"].classes) == classes and len(sources["train"]) == 2
    maps = sources["train"]
    painted, _ = open_dense_sources(config_for(tmp_path, "TASK", "semantic", "DATA.DATASET", "coco"), ("train", "val"), None)
    assert painted["train"].classes == maps.classes and painted["train"].kind == "maps"
    assert all((painted["train"].index_map(i) == maps.index_map(i)).all() for i in range(2))


def config_for(root: Path, *opts: object):
    return get_config(None, [str(part) for part in ("DATA.DATA_PATH", root, "DATA.READ_PATIENCE", 0, *opts)])
