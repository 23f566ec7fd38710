"""Whatever stands in a file of annotations, opening it gives sound objects or one sentence; the doors of tests/test_doors.py, continued.

More, and others each time: ``DOOR_EXAMPLES=2000 pytest tests/data/dense/test_dense_doors.py``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_coco import CATEGORIES, SOUND, opened, write_coco
from test_doors import NUMBERS, PLAIN, TEXTS, damaged, inputs, passes
from test_voc import item, write_pair
from test_yolo import BOX, OUTLINE, write_yolo

TASKS = st.sampled_from(("detection", "instance"))


def check(folder: Path, task: str, split: str = "train") -> None:
    """What is opened has boxes inside the image, known classes, and masks of its size."""
    source = passes(lambda: opened(folder, "DATA.DENSE.EMPTY", True, task=task, splits=(split,))[split])
    for index in range(len(source) if source is not None else 0):
        found = passes(lambda index=index: source.objects(index))
        height, width = source.sizes[index].tolist()
        assert np.isfinite(found.boxes).all() and (found.boxes >= -1).all() and (found.boxes <= [width + 1, height + 1] * 2).all()
        assert (found.boxes[:, 2:] >= found.boxes[:, :2]).all() and np.isfinite(found.areas).all()
        assert ((found.labels >= 0) & (found.labels < len(source.classes))).all()
        assert found.masks is None or all(mask["size"] == [height, width] for mask in found.masks)
        if source.has_masks:
            passes(lambda index=index: source.index_map(index))


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco"), SOUND)


@st.composite
def annotations(draw: st.DrawFn) -> bytes:
    """COCO's JSON with values of any kind put into some places, or bytes changed."""
    images = [dict(id=i, file_name=f"bild ü {i}.png", width=60, height=40) for i in (9, 7, 4)]
    root: dict[str, Any] = json.loads(json.dumps(dict(images=images, annotations=SOUND, categories=CATEGORIES)))
    for _ in range(draw(st.integers(0, 3))):
        place: Any = root
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and place[key] and draw(st.integers(0, 5)):
                place = place[key]
                continue
            place[key] = draw(st.one_of(NUMBERS, PLAIN, TEXTS, st.lists(st.integers(-5, 70), max_size=8)))
            break
    text = json.dumps(root, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    return draw(damaged(text)) if draw(st.integers(0, 3)) == 0 else text


@inputs(40)
@given(annotations(), TASKS)
def test_coco_files(coco: Path, content: bytes, task: str) -> None:
    coco.write_bytes(content)
    check(coco.parent.parent, task)


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voc")
    for name in "ab":
        write_pair(folder, folder, name, item("dog", 1, 1, 9, 9), item("cat", 5, 5, 60, 40))
    return folder


@st.composite
def xml_files(draw: st.DrawFn, whole: bytes) -> bytes:
    content = draw(damaged(whole)) if draw(st.booleans()) else whole
    for _ in range(draw(st.integers(0, 3))):
        text = draw(TEXTS).encode("utf-8", "surrogatepass").replace(b"\\", b"")
        content = re.sub(rb">[^<>]+<", b">" + text + b"<", content, count=draw(st.integers(1, 8)))
    return content


@inputs(40)
@given(st.data())
def test_voc_files(voc: Path, data: st.DataObject) -> None:
    (voc / "a.xml").write_bytes(data.draw(xml_files((voc / "b.xml").read_bytes())))
    check(voc, "detection", "val")


@pytest.fixture(scope="module")
def yolo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("yolo")
    write_yolo(folder, {"a.png": BOX, "b.png": OUTLINE})
    return folder


@inputs(40)
@given(st.lists(st.one_of(TEXTS, st.lists(st.one_of(st.sampled_from(("0", "1", "0.5", "0.1")), NUMBERS.map(str), TEXTS), max_size=9)
                          .map(" ".join)), max_size=5), st.dictionaries(TEXTS, PLAIN, max_size=2), st.data(), TASKS)
def test_yolo_files(yolo: Path, lines: list[str], entries: dict[str, Any], data: st.DataObject, task: str) -> None:
    (yolo / "train" / "labels" / "a.txt").write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    whole = json.dumps(dict(path=".", train="train/images", val=["train/images"], names=["x", "y"], nc=2)
                       | {key: value for key, value in entries.items() if data.draw(st.booleans())})
    text = whole.encode("utf-8", "surrogatepass")
    (yolo / "data.yaml").write_bytes(data.draw(damaged(text)) if data.draw(st.integers(0, 2)) == 0 else text)
    check(yolo, task)
