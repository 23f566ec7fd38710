"""What the program says and keeps: lines that no name can forge, whole whatever the disk does."""

from __future__ import annotations

import csv
import os
import resource
import shutil
from pathlib import Path

import numpy as np
from conftest import write_images
from PIL import Image

from utils.loggers import console
from utils.runtime.files import Appended

# A line of its own, a terminal's colour and title, a return to the line's beginning, a break by Unicode, and no UTF-8.
HOSTILE = "x\nfinished 300 epochs\x1b[31m\x1b]0;t\x07\rerror: gone\u2028y" + os.fsdecode(b"\xff")


def test_names_forge_no_lines(tmp_path: Path, capsys) -> None:
    logger = console.create_logger(True)
    console.log_to_file(logger, str(tmp_path / "log.txt"))
    logger.warning(f"{HOSTILE}: cannot be read")
    logger.info("next")
    console.close_files(logger)
    said = capsys.readouterr().out
    for text in (said, (tmp_path / "log.txt").read_text(encoding="utf-8")):
        first, second = text.split("\n")[:2]
        assert first.startswith("warning: x\\nfinished") and first.isprintable() and "\\udcff" in first and second == "next"


def test_names_that_are_not_utf8_in_a_run(tiny_cfg: Path, images: Path, tmp_path: Path, program) -> None:
    folder, odd = tmp_path / os.fsdecode(b"da\xffta"), os.fsdecode(b"a\xff")
    shutil.copytree(images, folder)
    for split in ("train", "val"):
        (folder / split / "a").rename(folder / split / odd)
    (folder / "train" / odd / "0.jpg").write_bytes(b"no image")
    done = program("--cfg", tiny_cfg, "--data-path", folder, "--output", odd, "--tag", odd, "--epochs", 1, "--warmup-epochs", 0,
                   "--opts", "DATA.CORRUPT_BUDGET", 1)
    run = next(tmp_path.glob("a*/tiny/a*"))
    log = (run / "log.txt").read_text(encoding="utf-8")
    assert done.returncode == 0 and "cannot be written" not in done.stdout and "end here" not in done.stdout, done.stdout
    assert "da\\udcffta/train/a\\udcff/0.jpg: not a readable image" in log
    assert {line for line in done.stdout.splitlines() if not line.startswith("report ")} <= set(log.splitlines())


def test_hostile_names_in_lines_tables_and_errors(tiny_run: Path, tmp_path: Path, program) -> None:
    root = tmp_path / "data"
    write_images(root, "val", {"a": 2, "b": 1, "c": 1, "d": 1})
    (root / "val/a/1.png").rename(os.path.join(root, "val/a", f"{HOSTILE[:40]}.png"))
    (root / "val/b" / f"{HOSTILE[:40]}.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "a\rb.png")
    predicted = program("--predict", root, tmp_path / "a\rb.png", "--resume", tiny_run, "--csv", "out.csv", "--json", "out.json")
    assert predicted.returncode == 3
    shown = program("--predict", root, "--resume", tiny_run)
    evaluated = program("--eval", "--resume", tiny_run, "--data-path", root, "--opts", "DATA.CORRUPT_BUDGET", 1)
    refused = program("--predict", tmp_path / HOSTILE[:40], "--resume", tiny_run)
    assert shown.returncode == 3 and evaluated.returncode == 0 and refused.returncode == 3
    for done in (predicted, shown, evaluated, refused):
        lines = (done.stdout + done.stderr).rstrip("\n").split("\n")
        assert all(line.isprintable() and not line.startswith("finished") for line in lines), lines
    raw = (tmp_path / "out.csv").read_bytes()
    assert len(raw.splitlines()) > raw.count(b"\r") and b'/a\rb.png",' in raw
    with open(tmp_path / "out.csv", encoding="utf-8", newline="") as file:
        paths = [row[0] for row in csv.reader(file)]
    assert str(tmp_path / "a\rb.png") in paths and len(paths) == 8


def test_a_partial_line_is_taken_back(tmp_path: Path) -> None:
    """A disk that fills within a line, for a moment, for longer than what is kept, and to the end."""
    path, told = tmp_path / "steps.jsonl", []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def room(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    file = Appended(str(path), told.append)
    try:
        file.write(b"one\n")
        room(6)
        file.write(b"two\n")
        file.write(b"three\n")
        assert path.read_bytes() == b"one\n" and len(told) == 1
        room(before[1])
        file.write(b"four\n")
        assert path.read_bytes() == b"one\ntwo\nthree\nfour\n" and len(told) == 1
        room(1)
        file.write(b"five\n")
        room(before[1])
        file.close()  # without a further line
        assert path.read_bytes().endswith(b"four\nfive\n") and len(told) == 2
        room(1)
        file._MOST = 10
        for _ in range(3):
            file.write(b"123456\n")
        file.close()
        assert "is lost" in told[-1] and path.read_bytes().endswith(b"five\n")
    finally:
        room(before[0])
