"""The doctor on real files: a folder spoiled in every way we know, a clean one, archives, and what training takes over from it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, environment
from data_helpers import config_for, encoded, png_bomb, write_tar
from PIL import Image

from config import get_config
from data import build_loaders
from data.doctor import worker_pool
from data.doctor.image_hashes import near_pairs
from data.sources import index_cache

TINY = ("--img-size", "64", "--batch-size", "8", "--opts", "DATA.READ_PATIENCE", "0", "DATA.INDEX_CACHE", "none")


def picture(seed: int, width: int = 96, height: int = 80) -> Image.Image:
    """A soft pattern with some noise: no two seeds look alike."""
    generator = np.random.RandomState(seed)
    soft = Image.fromarray(generator.randint(0, 255, (7, 9, 3)).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(soft).astype(int) + generator.randint(-12, 12, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write(root: Path, split: str, counts: dict[str, int], seed: int) -> int:
    for name, count in counts.items():
        folder = root / split / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(seed, 96 + seed % 5).save(folder / f"{i}.jpg", quality=90)
            seed += 1
    return seed


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    write(root, "val", dict(ape=4, bee=4, cat=4), write(root, "train", dict(ape=9, bee=9, cat=9), 1))
    return root


HOSTILE = ["<img src=x onerror=alert(1)>", "=1+1", "new\nline\x1b[31m", "x" * 200, "it's $(touch boo)"]


def spoil(root: Path) -> None:
    """More than twenty things that are wrong with real data sets, each once or twice."""
    train, val = root / "train", root / "val"
    seed = write(root, "train", {**dict(ape=24, bee=6, cat=6, gone=2, rotten=2, nowhere=3), "Red Fox": 3, "red_fox": 3,
                                 **dict.fromkeys(HOSTILE, 3)}, 100)
    seed = write(root, "val", {**dict(ape=6, bee=3, cat=3, rotten=2, bees=2), "Red Fox": 2, "red_fox": 2,
                               **dict.fromkeys(HOSTILE, 1)}, seed)
    whole = (train / "ape/0.jpg").read_bytes()
    (train / "ape/0.jpg").write_bytes(whole[:len(whole) // 2])
    (train / "ape/1.jpg").write_bytes(b"")
    (train / "ape/2.jpg").write_bytes(b"<html>404 not found</html>")
    (train / "ape/3.png").write_bytes(png_bomb(20_000, 20_000))
    (val / "bee/0.jpg").write_bytes(b"\xff\xd8\xff\xe0garbage")
    for path in (*(train / "rotten").iterdir(), *(train / name / "2.jpg" for name in HOSTILE)):
        path.write_bytes(b"rotten" + path.parent.name.encode())
    for path in (train / "gone").iterdir():
        path.unlink()
    shutil.copy(train / "ape/4.jpg", train / "ape/4 (1).jpg")  # a copy
    shutil.copy(train / "ape/5.jpg", train / "bee/five.jpg")  # another class
    shutil.copy(val / "ape/0.jpg", train / "ape/leaked.jpg")  # validation in training
    picture(seed, 300, 240).save(val / "cat/original.png")
    picture(seed, 300, 240).resize((200, 160), Image.Resampling.LANCZOS).save(train / "cat/smaller.jpg", quality=60)
    picture(seed + 1).convert("CMYK").save(train / "cat/print.jpg")
    Image.fromarray(np.random.RandomState(1).randint(0, 65535, (60, 60)).astype(np.uint16)).save(train / "cat/deep.png")
    clear = picture(seed + 2).convert("RGBA")
    clear.putalpha(100)
    clear.save(train / "cat/clear.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(seed + 3).save(train / "cat/turned.jpg", exif=turned)
    picture(seed + 4).save(train / "cat/moving.gif", save_all=True, append_images=[picture(seed + 5)])
    picture(seed + 6).save(train / "cat/really.png", "JPEG")
    picture(seed + 7, 6, 6).save(train / "cat/tiny.png")
    picture(seed + 8, 5000, 4100).save(train / "cat/huge.jpg")
    picture(seed + 9, 400, 20).save(train / "cat/long.jpg")
    Image.new("RGB", (60, 50), "white").save(train / "cat/white.png")
    picture(seed + 10).save(train / "loose.jpg")
    (train / "cat/Thumbs.db").write_bytes(b"x")
    (train / "cat/._0.jpg").write_bytes(b"x")
    (train / ".ipynb_checkpoints").mkdir()
    (train / "cat/photo.heic").write_bytes(b"x")
    (train / "cat/notes.txt").write_bytes(b"x")
    (train / "cat/lost.jpg").symlink_to("nowhere.jpg")


def report_of(folder: Path) -> tuple[dict, dict]:
    """(the report, its findings by code)."""
    text = folder.joinpath("report.json").read_text("ascii")
    assert "<" not in text
    report = json.loads(text)
    return report, {finding["code"]: finding for finding in report["findings"]}


def names(finding: dict) -> set[str]:
    return {"/".join(Path(item["path"]).parts[-3:]) if "path" in item else item["name"] for item in finding["items"]}


def contents(*roots: Path) -> list[bytes]:
    return sorted(path.read_bytes() for root in roots for path in root.rglob("*") if path.is_file())


def test_a_folder_spoiled_in_twenty_ways(tmp_path: Path, program) -> None:
    root = tmp_path / "spoiled"
    spoil(root)
    everything = contents(root)
    before = {path: path.lstat().st_mtime_ns for path in sorted(root.rglob("*"))}
    done = program("--doctor", "--data-path", root, "--doctor-json", tmp_path / "mine.json", *TINY)
    assert done.returncode == 3 and done.stderr == "", done
    folder = tmp_path / "output/doctor/spoiled"
    report, found = report_of(folder)
    assert json.loads((tmp_path / "mine.json").read_text()) == report and report["exit_status"] == 3
    single = {
        "unreadable-train": ("error", {"train/ape/0.jpg", "train/ape/1.jpg", "train/ape/2.jpg", "train/ape/3.png", "train/rotten/0.jpg",
                                       "train/rotten/1.jpg", *(f"train/{name}/2.jpg" for name in HOSTILE)}),
        "unreadable-val": ("warning", {"val/bee/0.jpg"}),
        "unreadable-classes": ("error", {"rotten"}),
        "surplus-classes": ("error", {"bees"}),
        "leaks": ("error", {"val/ape/0.jpg"}),
        "empty-classes": ("warning", {"gone"}),
        "missing-classes": ("warning", {"nowhere"}),
        "double-classes": ("warning", {"Red Fox"}),
        "conflicts": ("warning", {"train/ape/5.jpg", "train/bee/five.jpg"}),
        "copies": ("warning", {"train/ape/4.jpg"}),
        "near-leaks": ("warning", {"val/cat/original.png"}),
        "tiny": ("warning", {"train/cat/tiny.png"}),
        "blank": ("warning", {"train/cat/white.png"}),
        "loose": ("warning", {"spoiled/train/loose.jpg"}),
        "huge": ("note", {"train/cat/huge.jpg"}),
        "long": ("note", {"train/cat/long.jpg"}),
        "misnamed": ("note", {"train/cat/really.png"}),
        "exif": ("note", {"train/cat/turned.jpg"}),
        "animated": ("note", {"train/cat/moving.gif"}),
        "transparent": ("note", {"train/cat/clear.png"}),
        "cmyk": ("note", {"train/cat/print.jpg"}),
        "deep": ("note", {"train/cat/deep.png"}),
        "odd-names": ("note", {HOSTILE[2], HOSTILE[3]}),
    }
    for code, (severity, items) in single.items():
        assert (found[code]["severity"], names(found[code])) == (severity, items), (code, found.get(code))
        assert found[code]["mend"] or found[code]["advice"], code
    remedy = get_config(None, found["imbalance"]["mend"][0].split()[1:])
    assert remedy.DATA.SAMPLING == "balanced" and remedy.TRAIN.BEST_METRIC == "mean_recall"
    assert found["imbalance"]["severity"] == "note" and found.keys() == single.keys() | {"imbalance", "passed-over"}
    reasons = {"/".join(Path(item["path"]).parts[-2:]): item["detail"] for item in found["unreadable-train"]["items"]}
    for name, word in (("ape/0.jpg", "truncated"), ("ape/1.jpg", "empty"), ("ape/2.jpg", "none of JPEG"),
                       ("ape/3.png", "decompression bomb")):
        assert word in reasons[name], reasons
    passed = {item["detail"].partition(" ")[2]: item["number"] for item in found["passed-over"]["items"]}
    assert passed == {"hidden files and folders": 3, ".heic files": 1, ".txt files": 1, "broken links, pipes and devices": 1}
    assert "'bee'" in found["surplus-classes"]["items"][0]["detail"]
    assert "ape/4 (1).jpg" in found["copies"]["items"][0]["detail"]
    assert "class 'bee'" in found["conflicts"]["items"][0]["detail"]
    # the terminal: no control characters, no line too wide but commands
    lines = done.stdout.splitlines()
    assert all(line.isprintable() for line in lines) and "\\x1b[31m" in done.stdout
    assert all(len(line) <= 100 or "mend:" in line or "run with" in line for line in lines), max(lines, key=len)
    assert (folder / "report.txt").read_text() == done.stdout
    assert {path: path.lstat().st_mtime_ns for path in sorted(root.rglob("*"))} == before, "the doctor changes nothing"
    # the scripts mend what they say, and break nothing else
    for code in ("unreadable-train", "unreadable-val", "unreadable-classes", "surplus-classes", "leaks", "empty-classes", "missing-classes",
                 "conflicts", "copies", "near-leaks", "tiny", "blank", "misnamed"):
        command = found[code]["mend"][-1 if not found[code]["mend"][-1].startswith("--") else 0]
        assert command.startswith("sh "), (code, command)
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert not (tmp_path / "boo").exists()
    assert (root / "train/cat/really.jpg").exists() and (folder / "removed/train/ape/leaked.jpg").exists()
    assert contents(root, folder / "removed") == everything, "moved, never lost"
    done = program("--doctor", "--data-path", root, "--accumulation-steps", "1", *TINY)
    assert done.returncode == 0, done.stdout
    left = set(report_of(folder)[1])
    assert left - {"imbalance", "missing-classes"} == {"double-classes", "odd-names", "loose", "passed-over", "huge", "long", "exif",
                                                       "animated", "transparent", "cmyk", "deep"}


def test_hostile_names_in_archives_and_lists(tmp_path: Path, program) -> None:
    """The same findings in a tar file, where nothing can be moved: no script, advice that works."""
    root = tmp_path / "tars"
    root.mkdir()
    classes = list(enumerate(["a", "=1+1", "<b>\n"]))
    train = [(f"{c}/{i}.jpg", encoded(picture(10 * n + i))) for n, c in classes for i in range(6)]
    write_tar(root / "train.tar", [*train, ("a/bad.jpg", b"nothing"), ("a/same.jpg", train[0][1]), ("a/.DS_Store", b"x"),
                                  ("a/x.txt", b"x")])
    write_tar(root / "val.tar", [(f"{c}/{i}.jpg", encoded(picture(100 + 10 * n + i))) for n, c in classes for i in range(2)])
    done = program("--doctor", "--data-path", root, *TINY)
    report, found = report_of(tmp_path / "output/doctor/tars")
    assert done.returncode == 3 and set(found) == {"unreadable-train", "copies", "passed-over", "odd-names"}, done.stdout
    assert report["splits"]["train"]["layout"] == "tar files" and found["unreadable-train"]["mend"] == ["--opts DATA.CORRUPT_BUDGET 1"]
    assert found["copies"]["items"][0]["path"].endswith("train.tar/a/same.jpg") and found["copies"]["mend"] == []
    assert not (tmp_path / "output/doctor/tars/mend").exists()
    done = program("--doctor", "--data-path", root, *TINY, "DATA.CORRUPT_BUDGET", 1)
    assert done.returncode == 0

    folder = tmp_path / "listed"
    (folder / "p").mkdir(parents=True)
    for i in range(8):
        picture(200 + i).save(folder / f"p/{i}.jpg")
    (folder / "train.csv").write_text("path,label\n" + "".join(f"p/{i}.jpg,{'ab'[i % 2]}\n" for i in range(6)) + "p/gone.jpg,a\n")
    (folder / "val.csv").write_text("path,label\np/6.jpg,a\np/7.jpg,b\np/0.jpg,b\n")
    done = program("--doctor", "--data-path", folder, *TINY)
    _, found = report_of(tmp_path / "output/doctor/listed")
    assert done.returncode == 3 and {"unreadable-train", "leaks"} <= set(found)
    assert "there of class 'a'" in found["leaks"]["items"][0]["detail"] and not any("sh " in m for f in found.values() for m in f["mend"])


def test_sound_data_is_clean_and_training_takes_the_index_over(sound: Path, tmp_path: Path, program, monkeypatch) -> None:
    cache = tmp_path / "cache"
    for folder in (sound, *[p for p in sound.rglob("*") if p.is_dir()]):
        os.utime(folder, (time.time() - 100,) * 2)
    arguments = ("--doctor", "--data-path", sound, *TINY, "DATA.INDEX_CACHE", cache)
    done = program(*arguments)
    assert done.returncode == 0 and "the data is clean" in done.stdout, done.stdout
    report, found = report_of(tmp_path / "output/doctor" / sound.name)
    assert not found and report["status"] == "clean" and report["speed"]["plan"]["images"] == 27
    assert [entry["train"] for entry in report["classes"]] == [9, 9, 9]
    with np.load(tmp_path / "output/doctor" / sound.name / "manifest-train.npz", allow_pickle=False) as manifest:
        first = hashlib.sha256((sound / "train/ape/0.jpg").read_bytes()).digest()
        assert manifest["sha256"].shape == (27, 32) and bytes(manifest["sha256"][0]) == first

    kept = list(cache.glob("*.npz"))
    assert len(kept) == 2 and all("sums.sha256" in np.load(path).files for path in kept)
    assert not any("sums.sha256" in index_cache._read(str(path)) for path in kept)
    config = config_for(sound, "DATA.INDEX_CACHE", cache)
    with monkeypatch.context() as patch:
        patch.setattr("data.sources.folder._index_folder", lambda root: pytest.fail("the folder was listed again"))
        assert len(build_loaders(config).train.dataset.source) == 27
    picture(999).save(sound / "train/ape/new.jpg")
    assert len(build_loaders(config).train.dataset.source) == 28  # not used when the folder has changed
    (sound / "train/ape/new.jpg").unlink()

    original = (sound / "train/bee/3.jpg").read_bytes()
    picture(998, 98).save(sound / "train/bee/3.jpg", quality=90)
    program(*arguments)
    assert names(report_of(tmp_path / "output/doctor" / sound.name)[1]["changed"]) == {"train/bee/3.jpg"}
    (sound / "train/bee/3.jpg").write_bytes(original)


@pytest.mark.parametrize(("make", "status", "codes"), [
    (lambda root: write(root, "train", dict(a=9, b=9), 1), 3, {"no-val"}),
    (lambda root: write(root, "train", dict(a=9), write(root, "val", dict(a=3), 50)), 0, {"one-class"}),
    (lambda root: (root / "train").mkdir(), 3, {"no-train", "no-val"}),
    (lambda root: None, 3, {"no-train", "no-val"}),
    (lambda root: [p.write_bytes(b"x") for p in _after(write(root, "train", dict(a=9, b=9), 1), root)], 3,
     {"no-val", "unreadable-train", "unreadable-classes"}),
])
def test_little_or_nothing(make, status: int, codes: set[str], tmp_path: Path, program) -> None:
    root = tmp_path / "data"
    root.mkdir()
    make(root)
    done = program("--doctor", "--data-path", root, *TINY)
    assert done.returncode == status and "Traceback" not in done.stdout + done.stderr, done
    found = report_of(tmp_path / "output/doctor/data")[1]
    assert set(found) == codes
    if codes == {"no-val"}:
        assert found["no-val"]["mend"] == ["--opts DATA.VAL_FRACTION 0.1"]
        assert program("--doctor", "--data-path", root, *TINY, "DATA.VAL_FRACTION", 0.1).returncode == 0


def test_long_images_are_found_from_two_to_one_on(tmp_path: Path, program) -> None:
    """Against the input's shape; what the finding advises ends it."""
    for number, shape in enumerate([(160, 80), (80, 161), (159, 80), (80, 80), (80, 90), (90, 80)]):
        for split in ("train", "val"):
            (tmp_path / f"data/{split}/{number % 2}").mkdir(parents=True, exist_ok=True)
            picture(number + 10 * (split == "val"), *shape).save(tmp_path / f"data/{split}/{number % 2}/{number}.png")
    rest = "--data-path", tmp_path / "data", *TINY, "DATA.BATCH_SIZE", 2
    assert program("--doctor", *rest).returncode == 0
    found = report_of(tmp_path / "output/doctor/data")[1]["long"]
    assert found["severity"] == "warning" and names(found) == {"train/0/0.png", "val/0/0.png", "train/1/1.png", "val/1/1.png"}
    assert found["mend"] == ["--opts DATA.FIT squash"]
    assert program("--doctor", *rest, "DATA.FIT", "squash").returncode == 0
    assert "long" not in report_of(tmp_path / "output/doctor/data")[1]
    assert program(*("[64, 96]" if word == "64" else word for word in ("--doctor", *rest))).returncode == 0
    assert names(report_of(tmp_path / "output/doctor/data")[1]["long"]) == {"train/1/1.png", "val/1/1.png"}


def _after(_: int, root: Path) -> list[Path]:
    return list(root.rglob("*.jpg"))


def test_usage(sound: Path, tmp_path: Path, program) -> None:
    assert program("--doctor").returncode == 2
    missing = program("--doctor", "--data-path", tmp_path / "absent")
    assert missing.returncode == 3 and "no such data folder" in " ".join(missing.stdout.split())
    (tmp_path / "file").write_text("")
    done = program("--doctor", "--data-path", sound, "--opts", "DOCTOR.FOLDER", tmp_path / "file/x")
    assert done.returncode == 2 and "DOCTOR.FOLDER" in done.stderr and len(done.stderr.splitlines()) == 1
    done = program("--doctor", "--data-path", sound, "--doctor-json", tmp_path / "no/x.json")
    assert done.returncode == 2 and f"DOCTOR.JSON is {tmp_path}/no/x.json" in done.stderr
    done = program("--doctor", "--data-path", sound, "--opts", "DOCTOR.FOLDER", sound / "train/report")
    assert done.returncode == 2 and "among the images" in done.stderr and not (sound / "train/report").exists()
    done = program("--doctor", "--data-path", sound, "--doctor-json", "-", *TINY)
    assert json.loads(done.stdout)["status"] == "clean"


def test_a_process_that_dies_or_hangs_is_named(sound: Path, tmp_path: Path, program, monkeypatch) -> None:
    """A decoder that is killed by one image, and one that never comes back from another."""
    inspect_image = worker_pool.inspect_image

    def deadly(source, index, row):
        name = source.path(index)
        if name.endswith("train/bee/4.jpg"):
            os.kill(os.getpid(), signal.SIGKILL)
        if name.endswith("train/ape/1.jpg") and not (tmp_path / "once").exists():
            (tmp_path / "once").touch()
            os.kill(os.getpid(), signal.SIGKILL)  # another's memory was meant: read again, it is fine
        if name.endswith("val/cat/2.jpg"):
            time.sleep(60)
        return inspect_image(source, index, row)

    monkeypatch.setattr(worker_pool, "inspect_image", deadly)
    done = program("--doctor", "--data-path", sound, *TINY, "DATA.TIMEOUT", 1)
    _, found = report_of(tmp_path / "output/doctor" / sound.name)
    assert done.returncode == 3 and names(found["unreadable-train"]) == {"train/bee/4.jpg"}
    assert "died twice (SIGKILL, out of memory?)" in found["unreadable-train"]["items"][0]["detail"]
    assert "no answer for 1 s" in found["unreadable-val"]["items"][0]["detail"] and len(found) == 2


def test_a_process_of_its_own_needs_no_torch_and_ends_at_once(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write(root, "train", dict(a=6, b=6), write(root, "val", dict(a=2, b=2), 70))
    code = ("import sys, main; status = main.main(sys.argv[1:]); "
            "assert not {'torch', 'timm', 'torchvision'} & set(sys.modules); sys.exit(status)")
    done = subprocess.run([sys.executable, "-c", code, "--doctor", "--data-path", root, *TINY], cwd=tmp_path, capture_output=True,
                          text=True, env=environment(PYTHONPATH=str(ROOT)), timeout=60, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    slow = ("import signal, sys, time, main\nfrom data.doctor import worker_pool\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
            "worker_pool.inspect_image = lambda *_: time.sleep(60)\nsys.exit(main.main(sys.argv[1:]))")
    process = subprocess.Popen([sys.executable, "-c", slow, "--doctor", "--data-path", root, *TINY], cwd=tmp_path, text=True,
                               env=environment(PYTHONPATH=str(ROOT)), stderr=subprocess.PIPE, start_new_session=True)
    report = tmp_path / "output/doctor/data/report.txt"
    report.unlink()
    until = time.monotonic() + 30
    while not report.exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.3)
    begun = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert time.monotonic() - begun < 3 and process.returncode == 1 and len(said.splitlines()) == 1 and "Ctrl-C" in said, said


def test_near_pairs_are_those_of_comparing_all() -> None:
    generator = np.random.RandomState(0)
    known = generator.randint(0, 2**63, (3000, 2)).astype(np.uint64)
    asked = generator.randint(0, 2**63, (400, 2)).astype(np.uint64)
    for i in range(200):
        asked[i] = known[7 * i]
        for bit in generator.choice(128, i % 16, replace=False):
            asked[i, bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
    bits = np.unpackbits((known[None] ^ asked[:, None]).view(np.uint8), axis=2).sum(axis=2, dtype=np.int64)
    for distance in (0, 5, 11):
        at, match, far = near_pairs(known, asked, distance)
        assert np.array_equal(at, np.flatnonzero(bits.min(axis=1) <= distance))
        assert np.array_equal(match, bits[at].argmin(axis=1)) and np.array_equal(far, bits[at].min(axis=1))
