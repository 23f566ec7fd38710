"""Panoptic data in COCO's format, whole and damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from miniatures import HEIGHT, WIDTH, coco_panoptic, mask, picture, stripes
from PIL import Image

from config import get_config
from data.dense.base import IGNORED, DenseOptions
from data.dense.layouts import open_dense_sources
from data.dense.panoptic import PanopticFolder, open_panoptic, panoptic_files
from data.errors import DataError, UnreadableImage

LABEL_OF = {3226956: 0, 6979964: 1, 3103879: 2}  # 7000001 is a crowd


def opened(root: Path, split: str = "train") -> PanopticFolder:
    return open_panoptic(str(root), split, DenseOptions(get_config(None, ["DATA.READ_PATIENCE", "0"]).DATA, "mask"))


def change(root: Path, edit) -> None:
    """Rewrite the training annotations by ``edit(content)``."""
    path = root / "annotations/panoptic_train2017.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_segments_are_those_of_the_pixels(tmp_path: Path) -> None:
    decode = pytest.importorskip("pycocotools.mask").decode
    written = coco_panoptic(tmp_path)
    config = get_config(None, ["DATA.DATA_PATH", str(tmp_path), "TASK", "mask"])
    sources, layout = open_dense_sources(config, ("train", "val"), None)
    assert layout == "panoptic" and set(panoptic_files(str(tmp_path))) == {"train", "val"}
    for source in sources.values():
        assert source.kind == "panoptic" and source.classes == ["person", "car", "tree-merged"] and not source.faults
        assert source.things == [True, True, False] and source.category_ids == [1, 3, 184] and source.sizes.tolist() == [[HEIGHT, WIDTH]]
        segments = written[source.path(0)]
        expected = np.vectorize(lambda segment: LABEL_OF.get(segment, IGNORED))(segments)
        assert (source.index_map(0) == expected).all() and source.index_map(0).dtype == np.uint8
        found = source.objects(0)
        assert found.ids.tolist() == sorted(LABEL_OF) + [7000001] and found.labels.tolist() == [2, 0, 1, 0]
        assert found.crowd.tolist() == [False, False, False, True]
        for number, box, area, runs in zip(found.ids, found.boxes, found.areas, found.masks, strict=True):
            rows, columns = np.nonzero(segments == number)
            assert (decode(dict(runs)) == (segments == number)).all() and area == len(rows)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert sources["train"].image_ids.tolist() == [9] and sources["val"].image_ids.tolist() == [139]


def test_as_cityscapes_and_ade20k_have_it(tmp_path: Path) -> None:
    for root, top, image, prefix in ((tmp_path / "c", "gtFine", "leftImg8bit/train/ulm/ulm_1.png", "cityscapes_"),
                                     (tmp_path / "a", "", "images/training/ADE_train_1.jpg", "ade20k_")):
        picture(root / image)
        folder = root / top / f"{prefix}panoptic_train"
        folder.mkdir(parents=True)
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), (7, 1, 0), dtype=np.uint8)).save(folder / "x.png")
        content = dict(images=[dict(id="ulm_1", file_name=Path(image).name)], categories=[dict(id=7, name="road", isthing=0)],
                       annotations=[dict(image_id="ulm_1", file_name="x.png", segments_info=[dict(id=263, category_id=7)])])
        (root / top / f"{prefix}panoptic_train.json").write_text(json.dumps(content))
        source = opened(root)
        assert source.path(0) == str(root / image) and source.sizes.tolist() == [[HEIGHT, WIDTH]] and source.image_ids.tolist() == [1]
        assert not source.index_map(0).any() and not source.faults and source.things == [False]


def test_what_disagrees_is_counted_and_named(tmp_path: Path) -> None:
    coco_panoptic(tmp_path)

    def edit(content: dict) -> None:
        annotation = content["annotations"][0]
        rows = annotation["segments_info"]
        rows[0]["id"] += 1  # in neither file alone: one without a pixel, one without a category
        rows[1]["category_id"] = 99
        rows += [dict(rows[2]), "nothing", dict(id=-5, category_id=1)]
        content["images"] += [dict(id=10, file_name="gone.jpg"), dict(id=11, file_name="000000000011.jpg"),
                              dict(id=12, file_name="000000000012.jpg")]
        content["annotations"] += [dict(annotation, image_id=10), dict(annotation, image_id=11, file_name="gone.png"),
                                   dict(annotation, image_id=12, file_name="small.png"), dict(annotation, image_id=77), 5]

    change(tmp_path, edit)
    picture(tmp_path / "train2017/000000000011.jpg"), picture(tmp_path / "train2017/000000000012.jpg")
    Image.new("RGB", (3, 3)).save(tmp_path / "annotations/panoptic_train2017/small.png")
    source = opened(tmp_path)
    faults = {fault.kind: fault for fault in source.faults}
    assert len(source) == 2 and len(source.notices) == len(faults)
    assert {kind: fault.count for kind, fault in faults.items()} == {
        "entry that is no image, annotation or segment": 11, "annotation of an unknown image": 1, "image missing": 1, "mask missing": 1,
        "unknown category": 2, "segment given twice": 2, "mask of another size": 1, "segment without a pixel": 1,
        "segment without a category": 2}
    assert "3226957" in faults["segment without a pixel"].examples[0] and "gone.jpg" in faults["image missing"].examples[0]
    assert set(np.unique(source.index_map(0))) == {2, IGNORED}
    with pytest.raises(UnreadableImage, match="small.png"):
        source.index_map(1)


def test_unusable_data_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="panoptic_train2017.json"):
        opened(tmp_path)
    edits = (lambda content: content.pop("categories"), lambda content: content.update(annotations=[]),
             lambda content: content["categories"][0].pop("name"), lambda content: content["categories"][0].update(name="car"),
             lambda content: content.update(images=[]), lambda content: content.update(annotations=dict(a=1)),
             lambda content: content.update(categories=[]))
    for number, edit in enumerate(edits):
        coco_panoptic(root := tmp_path / str(number))
        change(root, edit)
        with pytest.raises(DataError, match="panoptic_train2017.json"):
            opened(root)
    for file in (tmp_path / "0/annotations").glob("*.json"):
        file.write_bytes(b"\xff{")
        with pytest.raises(DataError, match=file.name):
            opened(tmp_path / "0", "val" if "val" in file.name else "train")


def test_a_grey_mask_is_told(tmp_path: Path) -> None:
    coco_panoptic(tmp_path)
    mask(next((tmp_path / "annotations/panoptic_train2017").glob("*.png")), stripes(0, 1))
    source = opened(tmp_path)
    assert [fault.kind for fault in source.faults] == ["mask unreadable"]
    with pytest.raises(UnreadableImage, match="RGB"):
        source.objects(0)
