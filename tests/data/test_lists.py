"""Lists of images as people have them: columns, folders, suffixes and separators are found, or the message says what is missing."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from data_helpers import config_for, sources
from PIL import Image

from config import ConfigError
from data import DataError, build_loaders
from data.errors import UnreadableImage
from data.sources.lists import Row, list_source, read_list, split_line
from data.sources.regular_files import NotARegularFile, read_regular

HALF = ("DATA.VAL_FRACTION", 0.5)


def write_numbers(folder: Path, names: Sequence[str]) -> None:
    """Tiny images, the i-th of brightness i."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), i).save(folder / name, "PNG")


def listed(root: Path, *opts: object) -> dict[int, str]:
    """The class of each image in both splits, by its brightness, under DATA.VAL_FRACTION."""
    train, val, _ = sources(root, *HALF, *opts)
    return {source.load(i).getpixel((0, 0))[0]: source.classes[source.targets[i]] for source in (train, val) for i in range(len(source))}


def judged(root: Path, *opts: object) -> tuple[list[str], list[str]]:
    """(classes of the images that an evaluation alone would judge, messages)."""
    loaders = build_loaders(config_for(root, *opts), splits=("val",))
    source = loaders.val.dataset.source
    return [loaders.classes[t] for t in source.targets], loaders.notices


SIX = [f"{i:02x}b" for i in range(6)]
BREEDS = ["pug", "boxer", "pug", "boxer", "pug", "boxer"]


@pytest.mark.parametrize(("names", "table", "keys"), [
    # an id without its suffix, images in another folder, another folder with the same names beside it
    (["train_images/{}.png", "test_images/{}.png"], "train.csv:id_code,diagnosis|{},{}", ()),
    (["pics/{}.JPG"], "labels.csv:id,breed|{},{}", ()),
    (["in/{}.png"], "all.csv:filepath,species|in\\{}.png,{}", ()),
    (["in/{}.png"], "all.csv:Species;File Path|{1};C:\\old\\data\\in\\{0}.png", ()),
    (["train_images/{}.jpg"], "train.csv:image_id,label|{}.jpg,{}", ()),
    (["images/{}.png"], "metadata.csv:file_name,caption,label|images/{}.png,\"a, b\",{}", ()),
    (["{}.png"], "metadata.jsonl:|{{\"file_name\": \"{}.png\", \"box\": [1, 2], \"label\": \"{}\"}}", ()),
    (["one/{}.png", "two/{}x.png"], "table.csv:Unnamed: 0,lesion_id,image_id,dx,age|1,{0},{0},{1},40.0", ()),
    (["a/{}.png", "b/{}.png"], "x.csv:who,what,age|{},{},4",
     ("DATA.IMAGE_COLUMN", "who", "DATA.LABEL_COLUMN", "What", "DATA.IMAGE_ROOT", "a", "DATA.IMAGE_SUFFIX", ".png")),
], ids=lambda value: value.partition(":")[0] if isinstance(value, str) else "")
def test_a_list_as_people_have_it(names: list[str], table: str, keys: tuple, tmp_path: Path) -> None:
    for name in names:
        write_numbers(tmp_path, [name.format(i) for i in SIX])
    file, _, text = table.partition(":")
    header, _, row = text.partition("|")
    lines = [header, *(row.format(i, breed) for i, breed in zip(SIX, BREEDS, strict=True))]
    for start, end in (("", "\n"), ("\ufeff", "\r\n")):
        (tmp_path / file).write_text(start + "".join(line + end for line in lines if line), newline="")
        if file.endswith(".csv"):
            assert listed(tmp_path / file, *keys) == dict(enumerate(BREEDS))
        assert listed(tmp_path, *keys) == dict(enumerate(BREEDS))
    (tmp_path / file).write_bytes((tmp_path / file).read_text("utf-8-sig").encode("utf-16"))
    assert listed(tmp_path, *keys) == dict(enumerate(BREEDS))


def test_a_spreadsheets_number_is_the_file_whose_name_has_zeros_in_front(tmp_path: Path) -> None:
    write_numbers(tmp_path / "train_images", ["0007.png", "0010.png", "7.png", "x0010.png"])
    (tmp_path / "train.csv").write_text("id,breed\n10,pug\n7,pug\n")
    assert listed(tmp_path / "train.csv") == {1: "pug", 2: "pug"}


def test_a_list_that_was_mended_leaves_images_out_when_asked(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_numbers(tmp_path / split, ["a.png", "b.png", "bad.png"])
        (tmp_path / f"{split}.csv").write_text("image,label\na.png,x\nb.png,y\n")
    with pytest.raises(DataError, match=r"no label for 1 of the 3 .*bad\.png.*--data-set lists"):
        sources(tmp_path)
    train, val, _ = sources(tmp_path, "DATA.DATASET", "lists")
    assert len(train) == len(val) == 2 and (train.root, val.root) == (str(tmp_path / "train"), str(tmp_path / "val"))


def test_a_missing_image_is_not_that_of_the_same_name_in_another_folder(tmp_path: Path) -> None:
    """One missing of 40 made another split's folder, which has all these names, the images of the whole list."""
    for folder in ("train", "val", "train_images", "test_images"):
        write_numbers(tmp_path / folder, [f"{i}.png" for i in range(40)])
    for folder in ("train", "train_images"):
        (tmp_path / folder / "5.png").unlink()
    for name, row, folder in (("train.csv", "train/{}.png", "train"), ("train.csv", "C:\\x\\train\\{}.png", "train"),
                              ("train_images.csv", "{}", "train_images")):
        for order in (range(40), [5, *range(40), 5]):
            (tmp_path / name).write_text("path,label\n" + "".join(f"{row.format(i)},{i % 2}\n" for i in order))
            train, val, loaders = sources(tmp_path / name, *HALF)
            paths = [source.path(i) for source in (train, val) for i in range(len(source))]
            assert {os.path.relpath(os.path.dirname(path), tmp_path) for path in paths} == {folder}
            assert any(f"{len(order) - 39} of its {len(order)} images are not there" in line for line in loaders.notices)
    (tmp_path / "labels.csv").write_text((tmp_path / "train_images.csv").read_text())
    with pytest.raises(DataError, match=r"test_images and .*DATA\.IMAGE_ROOT"):
        sources(tmp_path / "labels.csv", *HALF)
    (tmp_path / "val/5.png").rename(tmp_path / "val/x5.png")
    assert len(judged(tmp_path / "labels.csv", "DATA.IMAGE_ROOT", tmp_path / "test_images")[0]) == 42


def test_different_paths_are_never_one_image(tmp_path: Path) -> None:
    write_numbers(tmp_path, [f"a/{i}.png" for i in range(6)])
    for rows in (range(6), range(8)):
        for pattern in ("/old/x/{}/{}.png", "{}/{}.png", "/old/x/{}/deep/{}.png"):  # of b/ nothing is there
            (tmp_path / "all.csv").write_text("path,label\n" + "".join(f"{pattern.format(f, i)},{f}\n" for f in "ab" for i in rows))
            try:
                train, val, loaders = sources(tmp_path / "all.csv", *HALF)
            except DataError as error:
                assert "is not below" in str(error) and "deep" in pattern
                continue
            there = [(source.path(i), source.classes[source.targets[i]]) for source in (train, val) for i in range(len(source))
                     if os.path.exists(source.path(i))]
            assert len(there) == 6 and {label for _, label in there} == {"a"}
            assert any("images are not there" in line for line in loaders.notices)


def test_a_list_of_one_splits_images_labels_no_others(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_numbers(tmp_path / split, ["a.png", "b.png"])
    (tmp_path / "labels.csv").write_text("path,label\ntrain/a.png,x\ntrain/b.png,y\n")
    with pytest.raises(DataError, match=r"no label for 2 of the 2 images of .*val"):
        sources(tmp_path)
    (tmp_path / "labels.csv").write_text("path,label\ntrain/a.png,x\ntrain/b.png,y\nval/a.png,y\nval/b.png,x\n")
    train, val, loaders = sources(tmp_path)
    assert [loaders.classes[t] for t in [*train.targets, *val.targets]] == ["x", "y", "y", "x"]


def test_rows_of_one_image_are_in_one_part(tmp_path: Path) -> None:
    """As in lists of boxes: its rows in training and in validation made the validation easier than it is."""
    write_numbers(tmp_path, [f"{i}.png" for i in range(20)])
    rows = [f"{i}.png,{i % 2}\n" for i in range(20) for _ in range(1 + i % 4)] + ["3.png,0\n"]
    (tmp_path / "all.csv").write_text("path,label\n" + "".join(rows))
    held: list[set[str]] = []
    for opts in (("DATA.FOLD", "1/3"), ("DATA.FOLD", "2/3"), ("DATA.FOLD", "3/3"), ("DATA.VAL_FRACTION", 0.3)):
        train, val = ({source.path(i) for i in range(len(source))} for source in sources(tmp_path / "all.csv", *opts)[:2])
        assert not train & val and len(train | val) == 20
        held.append(val)
    assert sorted(map(len, held[:3])) == [6, 7, 7] and len(set.union(*held[:3])) == 20


def test_an_image_of_two_labels_in_two_rows_is_told(tmp_path: Path) -> None:
    write_numbers(tmp_path, ["a.png", "b.png", "c.png"])
    (tmp_path / "all.csv").write_text("path,label\na.png,x\nb.png,y\nc.png,x\na.png,y\nb.png,y\n")
    told = [line for line in judged(tmp_path / "all.csv")[1] if "another label" in line]
    assert len(told) == 1 and "1 rows" in told[0] and "(a.png)" in told[0]


def test_hugging_faces_metadata_beside_the_images_of_a_split(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        write_numbers(tmp_path / split, [f"{i}.png" for i in SIX])
        rows = zip(SIX, BREEDS if split == "train" else BREEDS[::-1], strict=True)
        (tmp_path / split / "metadata.csv").write_text("file_name,text,label\n" + "".join(f"{i}.png,words,{b}\n" for i, b in rows))
    train, val, loaders = sources(tmp_path)
    assert [loaders.classes[t] for t in train.targets] == BREEDS and [loaders.classes[t] for t in val.targets] == BREEDS[::-1]
    assert judged(tmp_path, "TEST.SPLIT", "test")[0] == BREEDS[::-1]
    (tmp_path / "hub").mkdir()
    shutil.copytree(tmp_path / "train", tmp_path / "hub/data")  # the only folder, and no class
    assert sorted(listed(tmp_path / "hub").values()) == sorted(BREEDS) and judged(tmp_path / "hub")[0] == BREEDS


def test_columns_that_are_not_clear_are_shown_with_the_names_that_would_be(tmp_path: Path) -> None:
    write_numbers(tmp_path, ["a.png", "b.png"])
    path = tmp_path / "list.csv"
    for text, words in (("image,one,two\na.png,x,y\nb.png,x,z\n",
                         r"list\.csv:1: .*labels .*\(image, one, two\).*DATA\.LABEL_COLUMN.*breed"),
                        ("one,two,label\nq,w,x\nq,w,z\n", r"images .*\(one, two, label\).*DATA\.IMAGE_COLUMN.*id_code"),
                        ("image,label\nc.png,x\n", r"list\.csv:2: c\.png .*DATA\.IMAGE_ROOT.*DATA\.IMAGE_SUFFIX"),
                        (",".join(f"c{i}" for i in range(30_000)) + "\na.png,x\n", "has 30,000 columns"),
                        ("image,label\na.png,x\n\nb.png,\n", r"list\.csv:4: ")):
        path.write_text(text)
        with pytest.raises(DataError, match=words):
            judged(path)
    path.write_text("image,one,two\na.png,x,y\nb.png,x,z\n")
    assert judged(path, "DATA.LABEL_COLUMN", "two")[0] == ["y", "z"]
    with pytest.raises(DataError, match=r"no column 'three', which DATA\.LABEL_COLUMN names; .*\(image, one, two\)"):
        judged(path, "DATA.LABEL_COLUMN", "three")
    for folder in ("cats", "dogs"):  # folders that may be the classes, and a table that says nothing clear
        write_numbers(tmp_path / "pets", [f"{folder}/{i}.png" for i in range(2)])
    (tmp_path / "pets/sizes.csv").write_text("image,height,width\ncats/0.png,4,5\ncats/1.png,4,6\n")
    labels, notices = judged(tmp_path / "pets")
    assert labels == ["cats", "cats", "dogs", "dogs"] and any("sizes.csv" in line for line in notices)


def test_splits_of_a_list_and_the_rows_of_none(tmp_path: Path) -> None:
    write_numbers(tmp_path, [f"{i}.png" for i in range(8)])
    words = ["train", "Train ", "val", "test", "test", "trian", "", "training"]
    path = tmp_path / "list.csv"
    path.write_text("image,label,split\n" + "".join(f"{i}.png,{'ab'[i % 2]},{word}\n" for i, word in enumerate(words)))
    train, val, loaders = sources(path)
    assert len(train) == 3 and len(val) == 1
    (told,) = [line for line in loaders.notices if "left out" in line]
    assert "4 of its 8" in told and "test (2)" in told and "trian (1)" in told and "empty (1)" in told and told.level > 25
    labels, notices = judged(path, "TEST.SPLIT", "TEST")
    assert labels == ["b", "a"] and any("6 of its 8" in line for line in notices)
    assert len(judged(path, "TEST.SPLIT", "trian")[0]) == 1 and len(judged(path, "TEST.SPLIT", "all")[0]) == 8
    with pytest.raises(DataError, match=r"split is dev; it has test \(2\), train \(2\), .*--split all"):
        judged(path, "TEST.SPLIT", "dev")
    path.write_text("image,label,is_valid\n" + "".join(f"{i}.png,{'ab'[i % 2]},{i > 5}\n" for i in range(8)))
    train, val, _ = sources(path)
    assert len(train) == 6 and len(val) == 2
    path.write_text("image,label\n" + "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(8)))
    labels, notices = judged(path)
    assert len(labels) == 8 and any("all of its 8" in line for line in notices)
    path.write_text("image,label\n0.png,a\n")
    with pytest.raises(DataError, match="no image for validation"):  # not 0 of 0
        sources(path, *HALF)
    for name in ("train.csv", "val.csv"):
        (tmp_path / name).write_text("image,label\n0.png,a\n")
    with pytest.raises(DataError, match=rf"val\.csv lies beside it: give their folder {tmp_path} "):
        sources(tmp_path / "train.csv")
    assert len(sources(tmp_path)[0]) == 1
    os.mkfifo(tmp_path / "fifo.csv")
    for place in (tmp_path / "fifo.csv", "/dev/zero"):
        with pytest.raises(DataError, match="is a (pipe|device); give"):
            judged(place)


def test_blanks_and_commas_in_the_names_of_a_text_list(tmp_path: Path) -> None:
    for line, parts in (("a, b.jpg 3", ("a, b.jpg", "3")), ("a,b.JPG,red fox", ("a,b.JPG", "red fox")), ("a b.png; 3", ("a b.png", "3")),
                        ("a.jpg b.jpg 3", ("a.jpg b.jpg", "3")), ('"a, b.jpg", c', ("a, b.jpg", "c")), ("a b,c", ("a b", "c")),
                        ("a b\tc d", ("a b", "c d")), ("17\t2\tx.jpg", ("x.jpg", "2")), ("my a.jpg", ("my a.jpg", ""))):
        assert split_line(line) == parts, line
    (tmp_path / "l.txt").write_text("\ufeff# comment\r\na.png\v 1\r\rfilename\u2028.png 2\n")  # only line ends end a line
    assert [(row.path, row.label) for row in read_list(str(tmp_path / "l.txt"))] == [("a.png", "1"), ("filename\u2028.png", "2")]
    (tmp_path / "l.txt").write_text("filename,label\na.png,1\n")
    assert read_list(str(tmp_path / "l.txt"))[0][:3] == (2, "a.png", "1")


def test_rows_that_are_no_files_and_names_that_cannot_be(tmp_path: Path) -> None:
    write_numbers(tmp_path, ["a.png", "b.png"])
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    path = tmp_path / "list.csv"
    for name, words in (("/dev/zero", "a device"), ("pipe.png", "a pipe"), ("folder.png", "a folder"), ("a\0.png", "cannot be the name"),
                        ("a" * 5000 + ".png", "cannot be the name")):
        path.write_text(f"image,label\na.png,x\nb.png,y\n{name},x\n")
        with pytest.raises(DataError, match=rf"list\.csv:4: .*{words}"):
            judged(path)
    for label in ("x\x1b[31m", "x\x7f", '"x\ny"', "9" * 20_000):
        path.write_text(f"image,label\na.png,{label}\n")
        with pytest.raises(DataError, match=r"list\.csv:[23]: .*cannot be a label"):
            judged(path)
    for text in ('[["a\\ud800.png", 1]]', '[["a.png", ' + "9" * 9999 + "]]", "[" * 100_000, '[["a.png", 1.5]]', '{"a.png": []}', "7", "[7]",
                 '[{"image": "a.png", "label": null}]', '[{"image": "a.png", "label": ' + "9" * 9999 + "}]", '[["a.png", "\\u0000"]]'):
        (tmp_path / "list.json").write_text(text)
        with pytest.raises(DataError, match=r"list\.json"):
            judged(tmp_path / "list.json")
    path.write_text('image,label\n"a.png,x\n' + "b.png,y\n" * 20_000)  # a quote that is never closed
    with pytest.raises(DataError, match=r"list\.csv:\d+: "):
        judged(path)
    for file, words in (("pipe.png", "pipe"), ("folder.png", "folder"), ("/dev/zero", "device"), ("a\0", "name"), ("a.png", "MiB")):
        with pytest.raises(NotARegularFile, match=words):
            read_regular(os.path.join(tmp_path, file), 10)
    source = list_source(str(path), [Row(1, "a.png", "x")], [str(tmp_path)])
    (tmp_path / "a.png").unlink()
    os.mkfifo(tmp_path / "a.png")  # since the list was read
    with pytest.raises(UnreadableImage, match="pipe"):
        source.read(0)


def test_whatever_a_list_holds_only_sentences_come_out(tmp_path: Path) -> None:
    """Seeded nonsense made of what lists hold: every one is read, or refused in a sentence with a status, and nothing else changes."""
    write_numbers(tmp_path, ["a.png", "b c.png", "sub/1.png", "sub/2.jpg"])
    os.mkfifo(tmp_path / "pipe.png")
    before = sorted(tmp_path.rglob("*"))
    paths = ["a.png", "b c.png", "sub\\1.png", "2", "./a.png", "C:\\x\\sub\\1.png", "/dev/zero", "pipe.png", "sub", "", "..", "a\0", "~",
             "x" * 5000]
    cells = [*paths, "a", "b", "01", "1", "-1", "1.5", "9" * 5000, "nan", "a|b", "\x1b[1m", "\u2028", "\u0663", '"', "train", "val"]
    heads = ["path,label", "id,breed", "image,label,split", "image,label,fold,patient_id", "x,y,z", "", "image", "label,label", "a.png,a"]
    outcomes = {True: 0, False: 0}
    for seed in range(300):
        draw = random.Random(seed)
        mark, extension = draw.choice(",,,,,,;\t| "), draw.choice([".csv", ".csv", ".tsv", ".txt", ".json", ".jsonl"])
        tame = seed % 2
        rows = [[draw.choice(paths[:4] if tame else paths), *draw.choices(cells[14:18] if tame else cells, k=draw.randint(tame, 4))]
                for _ in range(draw.randint(tame, 6))]
        if extension.startswith(".json"):
            entries = [dict(zip(("image", "label", "split"), row, strict=False)) if seed % 3 else row for row in rows]
            text = json.dumps(entries) if extension == ".json" else "\n".join(map(json.dumps, entries))
        else:
            head = draw.choice(heads[:4] if tame else heads).replace(",", mark)
            text = draw.choice("\n\r").join([head, *(mark.join(row) for row in rows)])
        path = tmp_path / f"list{extension}"
        path.write_bytes(text.encode("utf-8", "replace")[:draw.choice([10, 50, 10**6, 10**6])])
        opts = draw.choice([(), ("TEST.SPLIT", "all"), HALF, ("DATA.FOLD", "1/2"), ("DATA.FOLD", "0"), ("DATA.LABEL_COLUMN", "split")])
        try:
            judged(path, *opts)
            outcomes[True] += 1
        except (DataError, ConfigError) as error:  # several labels are for another task
            assert str(error), text
            outcomes[False] += 1
        path.unlink()
    assert min(outcomes.values()) > 20 and sorted(tmp_path.rglob("*")) == before


def test_a_list_of_records_needs_no_header(tmp_path: Path) -> None:
    write_numbers(tmp_path, ["a.png", "b.png"])
    (tmp_path / "l.json").write_text(json.dumps([{"x": [1], "img": "a.png", "target": 0}, {"img": "b.png", "target": 1}]))
    assert judged(tmp_path / "l.json")[0] == ["0", "1"]
    (tmp_path / "l.json").write_text(json.dumps({"a.png": "cat", "b.png": 7}))
    assert judged(tmp_path / "l.json")[0] == ["cat", "7"]


def test_one_folder_around_the_class_folders_of_an_archive_is_no_class(tmp_path: Path) -> None:
    write_numbers(tmp_path, [f"photos/{c}/{i}.png" for c in ("01", "02") for i in range(2)])
    for kind in ("zip", "tar"):
        archive = shutil.make_archive(str(tmp_path / "holdout"), kind, tmp_path, "photos")
        assert sorted(judged(Path(archive))[0]) == ["01", "01", "02", "02"]
    shutil.copytree(tmp_path / "photos", tmp_path / "outer/inner/photos")
    deep = shutil.make_archive(str(tmp_path / "deep"), "zip", tmp_path, "outer")
    assert sorted(judged(Path(deep))[0]) == ["01", "01", "02", "02"]
    shutil.rmtree(tmp_path / "photos/02")
    assert judged(Path(shutil.make_archive(str(tmp_path / "one"), "zip", tmp_path, "photos")))[0] == ["photos", "photos"]


def test_splits_in_capital_letters(tmp_path: Path) -> None:
    for split in ("Train", "VAL", "Test"):
        write_numbers(tmp_path, [f"{split}/{c}/{i}.png" for c in "ab" for i in range(2)])
    train, val, loaders = sources(tmp_path)
    assert loaders.classes == ["a", "b"] and train.root.endswith("Train") and val.root.endswith("VAL")
    assert judged(tmp_path, "TEST.SPLIT", "test")[0] == ["a", "a", "b", "b"]
    with pytest.raises(DataError, match="no split dev; --split test or train or val"):
        judged(tmp_path, "TEST.SPLIT", "dev")
    with pytest.raises(DataError, match=r"has splits \(train, val, test\).* --split train"):
        judged(tmp_path, "TEST.SPLIT", "all")
    (tmp_path / "VAL").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="no split val; --split test or train is there"):
        judged(tmp_path)
    with pytest.raises(DataError, match=r"no val/ .*DATA\.VAL_FRACTION 0\.1"):
        sources(tmp_path)
