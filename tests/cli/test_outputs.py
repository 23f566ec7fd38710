"""Files that commands write: through links and to devices, and never over what a command reads or writes besides."""

from __future__ import annotations

import os
import shutil
import stat
import threading
from pathlib import Path

import pytest
from PIL import Image

from utils.runtime.files import is_stream, open_atomically, require_outputs, write_atomically

HEAD = "path,class_1"


def state(*roots: Path) -> dict[str, object]:
    """Every file below with its content, every link with its target."""
    found = {}
    for root in roots:
        for path in sorted(root.rglob("*")):
            if path.is_symlink():
                found[str(path)] = os.readlink(path)
            elif path.is_file():
                found[str(path)] = path.read_bytes()
    return found


@pytest.fixture
def place(images: Path, tiny_run: Path, tmp_path: Path) -> Path:
    """A folder with copies of a run, of data with a list, and of a few images."""
    shutil.copytree(tiny_run.parent, tmp_path / "run", symlinks=True)
    shutil.copytree(images, tmp_path / "data")
    (tmp_path / "data/val_labels.csv").write_text("path,label\n")
    (tmp_path / "photos").mkdir()
    for name in ("a.png", "b-2.png", "c.paths.json"):
        Image.new("RGB", (32, 32)).save(tmp_path / "photos" / name, "PNG")
    (tmp_path / "list.txt").write_text("photos/a.png\nphotos/c.paths.json\n")
    shutil.copy(tmp_path / "run/config.yaml", tmp_path / "own.yaml")
    return tmp_path


def test_links_are_followed_and_pipes_written_to(place: Path, program) -> None:
    (place / "kept").mkdir()
    (place / "kept/out.csv").write_text("old")
    os.chmod(place / "kept/out.csv", 0o600)
    (place / "out.csv").symlink_to("kept/out.csv")
    (place / "new.json").symlink_to("kept/new.json")
    os.mkfifo(place / "pipe.npy")
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append((place / "pipe.npy").read_bytes()), daemon=True)
    reader.start()
    done = program("--predict", "photos/a.png", "--resume", "run/best.pth", "--csv", "out.csv", "--json", "new.json",
                   "--features", "pipe.npy")
    reader.join(20)
    assert done.returncode == 0, done.stderr
    assert (place / "out.csv").is_symlink() and (place / "kept/out.csv").read_text().startswith(HEAD)
    assert stat.S_IMODE((place / "kept/out.csv").stat().st_mode) == 0o600
    assert (place / "new.json").is_symlink() and (place / "kept/new.json").read_text().startswith('{"path"')
    assert stat.S_ISFIFO((place / "pipe.npy").stat().st_mode) and received[0].startswith(b"\x93NUMPY")
    assert not [name for name in (*os.listdir(place), *os.listdir(place / "kept")) if name.startswith(".tmp")]


REFUSED = (
    # arguments, key that the message names, path that it names
    (["--predict", "photos/a.png", "--csv", "run/best.pth"], "PREDICT.CSV", "run/best.pth"),
    (["--predict", "photos/a.png", "--csv", "run/last.pth"], "PREDICT.CSV", "run/last.pth"),
    (["--predict", "photos/a.png", "--json", "run/metrics.jsonl"], "PREDICT.JSON", "run/metrics.jsonl"),
    (["--predict", "photos", "--json", "./photos/../photos/a.png"], "PREDICT.JSON", "photos/a.png"),
    (["--predict", "list.txt", "--csv", "list.txt"], "PREDICT.CSV", "list.txt"),
    (["--predict", "photos/*.png", "--sheet", "photos/b.png"], "PREDICT.SHEET", "photos/b-2.png"),
    (["--predict", "list.txt", "--features", "photos/c.npy"], "PREDICT.FEATURES", "photos/c.paths.json"),
    (["--predict", "photos/a.png", "--csv", "one.csv", "--json", "./one.csv"], "PREDICT.JSON", "one.csv"),
    (["--predict", "photos/a.png", "--csv", "-", "--json", "/dev/stdout"], "PREDICT.JSON", "-"),
    (["--predict", "photos/a.png", "--csv", "link.csv", "--json", "two.csv"], "PREDICT.JSON", "two.csv"),
    (["--predict", "photos/a.png", "--csv", "loop.csv"], "PREDICT.CSV", "loop.csv"),
    (["--predict", "photos/a.png", "--csv", "photos"], "PREDICT.CSV", "photos"),
    (["--predict", "photos/a.png", "--cfg", "own.yaml", "--csv", "own.yaml"], "PREDICT.CSV", "own.yaml"),
    (["--eval", "--data-path", "data", "--per-class", "data/val/a/1.png"], "TEST.PER_CLASS", "data/val/a/1.png"),
    (["--eval", "--data-path", "data", "--opts", "TEST.PREDICTIONS", "data/val_labels.csv"], "TEST.PREDICTIONS", "data/val_labels.csv"),
    (["--eval", "--per-class", "x.csv", "--opts", "TEST.PREDICTIONS", "x.csv"], "TEST.PREDICTIONS", "x.csv"),
    (["--export", "weights.pt2"], "EXPORT.FILE", "weights.pt2"),
    (["--export", "/dev/null"], "EXPORT.FILE", "/dev/null"),
    (["--show-attention", "photos/a.png", "--show-file", "photos/a.png"], "SHOW.FILE", "photos/a.png"),
    (["--show-batch", "data/train/a/1.png", "--data-path", "data"], "SHOW.BATCH", "data/train/a/1.png"),
    (["--doctor", "--data-path", "data", "--doctor-json", "data/val_labels.csv"], "DOCTOR.JSON", "data/val_labels.csv"),
    (["--doctor", "--data-path", "data", "--doctor-json", "output/doctor/data/report.json"], "DOCTOR.JSON", "report.json"),
    (["--report", "run", "--opts", "REPORT.FILE", "run/predictions.npz"], "REPORT.FILE", "run/predictions.npz"),
    (["--report", "run", "--opts", "REPORT.FILE", "run/log.txt"], "REPORT.FILE", "run/log.txt"),
)


def test_nothing_that_is_read_or_written_is_overwritten(place: Path, program) -> None:
    (place / "link.csv").symlink_to("two.csv")
    (place / "loop.csv").symlink_to("loop.csv")
    (place / "weights.pt2").symlink_to("run/best.pth")
    before = state(place)
    for arguments, key, path in REFUSED:
        weights = [] if arguments[0] in ("--doctor", "--report") else ["--resume", "run/best.pth"]
        done = program(*arguments, *weights)
        words = done.stderr.strip().splitlines()
        assert done.returncode == 2 and len(words) == 1, (arguments, done.stdout, done.stderr)
        assert f"{key} is " in words[0] and path in words[0], (arguments, words)
        shutil.rmtree(place / "output", ignore_errors=True)
        assert state(place) == before, arguments


def test_places_and_devices(tmp_path: Path) -> None:
    assert is_stream("/dev/null") and is_stream("/dev/stdout") and not is_stream(str(tmp_path / "new"))
    require_outputs([("A", "/dev/null"), ("B", str(tmp_path / ("long" * 60)))], [])
    long = str(tmp_path / ("ü" * 127))
    write_atomically(long, lambda file: file.write(b"x"))
    assert Path(long).read_bytes() == b"x" and os.listdir(tmp_path) == [os.path.basename(long)]
    with pytest.raises(OSError) as told, open_atomically("/dev/full") as file:
        file.write(b"x")
    assert told.value.filename == "/dev/full" and stat.S_ISCHR(os.stat("/dev/full").st_mode)
