"""--predict on real images: what evaluation would say of them, in every form, whatever is given and however it is called."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from config import ConfigError, get_config
from data.layouts.input_paths import find_input_images
from models.crossformer import CrossFormer
from utils.commands import predict
from utils.inference.trained_model import describe_classes, open_trained
from utils.runtime import distributed
from utils.tasks.build import build_task
from utils.visualization.drawing import drawable, fitted, length


@pytest.fixture
def logits() -> Iterator[list[tuple[int, Tensor]]]:
    """(model, output) of every forward pass."""
    seen: list[tuple[int, Tensor]] = []

    def note(module: nn.Module, _: object, output: Tensor) -> None:
        if isinstance(module, CrossFormer) and output.device.type != "meta":
            seen.append((id(module), output.clone()))

    handle = nn.modules.module.register_module_forward_hook(note)
    yield seen
    handle.remove()


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_predictions_are_those_of_evaluation_bit_for_bit(program, tiny_run: Path, images: Path, logits) -> None:
    evaluated = program("--eval", "--resume", tiny_run)
    assert evaluated.returncode == 0, evaluated.stderr
    last = logits[-1][0]  # the averaged weights come last and count
    expected = torch.cat([output for model, output in logits if model == last])
    logits.clear()
    done = program("--predict", images / "val", "--resume", tiny_run, "--num-workers", 2, "--topk", 9, "--csv", "-")
    assert (done.returncode, len(expected)) == (0, 24)  # 19 images, the last batch filled up
    assert torch.equal(torch.cat([output for _, output in logits]), expected)

    rows = rows_of(done.stdout)
    assert [row["path"] for row in rows] == sorted(row["path"] for row in rows) and len(rows) == 19
    right = sum(Path(row["path"]).parent.name == row["class_1"] for row in rows)
    assert f"({right} of 19)" in evaluated.stdout.splitlines()[-1]
    for row, output in zip(rows, expected[:19].softmax(dim=1), strict=True):
        assert [row[f"class_{rank}"] for rank in range(1, 5)] == ["abcd"[i] for i in output.argsort(descending=True)]
        assert float(row["probability_1"]) == pytest.approx(float(output.max()), rel=1e-5)
    assert "class_5" not in rows[0] and "averaged weights" in done.stderr  # topk is capped, the rest goes to standard error


def test_whatever_is_given_is_done_in_its_order_and_the_rest_named(program, tiny_run: Path, images: Path) -> None:
    """A bad item is a line on standard error, a row with a reason, and status 3; the others are done."""
    here = program.folder
    shutil.copytree(images / "val/a", here / "in/deep")
    (here / "in/.hidden.jpg").write_bytes(b"")
    (here / "in/notes.md").write_text("")
    (here / "in/deep/loop").symlink_to(here / "in")
    (here / "cut.jpg").write_bytes((images / "val/a/0.jpg").read_bytes()[:300])
    (here / "named").write_bytes((images / "val/b/0.jpg").read_bytes())
    (here / "empty").mkdir()
    (here / "lists").mkdir()
    (here / "lists/list.txt").write_text("\ufeff# of mine\n../named\n\nabsent.png\n../in\nhttp://x/l.png\n", encoding="utf-8")
    (here / "lists/none.txt").write_text("# nothing\n")
    items = ["named", "cut.jpg", "https://x/y.jpg", "in/deep/[01].*", "in", "nothing*.png", "empty", "lists/list.txt", "lists/none.txt",
             "named"]
    done = program("--predict", *items, "--resume", tiny_run, "--json", "out.jsonl", "--csv", "out.csv", "--topk", 1)
    assert done.returncode == 3
    found = [json.loads(line) for line in (here / "out.jsonl").read_text().splitlines()]
    deep = [f"in/deep/{name}" for name in ("0.jpg", "1.png", "2.jpg", "3.png", "4.jpg")]
    names = ["named", "cut.jpg", "https://x/y.jpg", *deep[:2], *deep, "nothing*.png", "empty", "lists/../named", "lists/absent.png",
             *(name.replace("in/", "lists/../in/") for name in deep), "http://x/l.png", "lists/none.txt", "named"]
    assert [row["path"] for row in found] == names
    errors = {row["path"]: row["error"] for row in found if "error" in row}
    for path, words in {"cut.jpg": "not a readable image", "https://x/y.jpg": "is a URL", "nothing*.png": "matches no images",
                        "empty": "holds no images", "lists/absent.png": "no such file", "http://x/l.png": "is a URL",
                        "lists/none.txt": "lists no images"}.items():
        assert words in errors.pop(path)
        assert f"warning: {path}: " in done.stderr
    assert not errors and done.stderr.count("warning: ") == 7 and f"7 of {len(names)} could not be read" in done.stdout
    assert len({row["top"][0]["probability"] for row in found if row["path"].endswith("named")}) == 1
    table = rows_of((here / "out.csv").read_text())
    assert [row["error"] for row in table] == [row.get("error", "") for row in found]
    lines = [line for line in done.stdout.splitlines() if " %" in line]
    assert len(lines) == len(names) - 7 and re.fullmatch(r"named: [abcd] \d+\.\d %", lines[0])
    assert not list(here.rglob(".tmp*"))
    (here / "in/self.png").symlink_to("self.png")
    circle = program("--predict", "in", "--resume", tiny_run)
    assert circle.returncode == 3 and circle.stderr.count("\n") == 1 and "warning: in/self.png: " in circle.stderr
    assert sum(" %" in line for line in circle.stdout.splitlines()) == 5


def test_lists_relative_to_the_current_folder_and_on_standard_input(program, tiny_run: Path, images: Path, monkeypatch) -> None:
    here = program.folder
    shutil.copytree(images / "val/b", here / "b")
    (here / "lists").mkdir()
    (here / "lists/list.txt").write_text("b/0.jpg\nb/1.png\n")
    assert list(find_input_images(["lists/list.txt"]).names) == ["b/0.jpg", "b/1.png"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"b/3.png\r\nb/2.jpg")))
    done = program("--predict", "-", "--resume", tiny_run, "--json", "-")
    assert [json.loads(line)["path"] for line in done.stdout.splitlines()] == ["b/3.png", "b/2.jpg"]
    assert done.returncode == 0 and "predicting 2 images" in done.stderr


def test_features_are_what_the_classifier_sees(program, tiny_run: Path, images: Path) -> None:
    here = program.folder
    (here / "bad.jpg").write_bytes(b"no image")
    for name in ("f.npy", "g.safetensors"):
        done = program("--predict", images / "val", "bad.jpg", images / "val/a/0.jpg", "--resume", tiny_run, "--features", name,
                       "--json", "out.jsonl", "--batch-size", 4)
        assert done.returncode == 3
    vectors = np.load(here / "f.npy")
    assert vectors.dtype == np.float32 and np.array_equal(vectors, load_file(here / "g.safetensors")["features"].numpy())
    good = [row for line in (here / "out.jsonl").read_text().splitlines() if "top" in (row := json.loads(line))]
    for name in ("f.paths.json", "g.paths.json"):
        assert json.loads((here / name).read_text()) == [row["path"] for row in good]
    weights = torch.load(tiny_run, weights_only=True)["ema"]
    shares = (torch.from_numpy(vectors) @ weights["head.weight"].T + weights["head.bias"]).softmax(dim=1)
    assert len(shares) == len(good) == 20
    for row, of_image in zip(good, shares, strict=True):
        assert row["top"][0]["probability"] == pytest.approx(float(of_image.max()), rel=1e-4)


HOSTILE = ["猫", "new\nline\x1b[31m", "x" * 180, "=1+1"]


def test_hostile_names_steer_no_terminal_and_the_sheet_has_pages(program, tmp_path: Path, monkeypatch) -> None:
    here = program.folder
    write_images(here / "odd", "train", dict.fromkeys(HOSTILE, 3))
    write_images(here / "odd", "val", dict.fromkeys(HOSTILE, 2), seed=1)
    cfg = here / "odd.yaml"
    cfg.write_text("DATA: {DATASET: folder, DATA_PATH: odd, IMG_SIZE: 32, BATCH_SIZE: 8, NUM_WORKERS: 0}\nMODEL: {TYPE: pvt_v2, NAME: x, "
                   "PVT_V2: {EMBED_DIMS: [8, 8, 8, 8], DEPTHS: [1, 1, 1, 1], NUM_HEADS: [1, 1, 1, 1]}}\nTRAIN: {EPOCHS: 1, "
                   "WARMUP_EPOCHS: 0}\n")
    assert program("--cfg", cfg).returncode == 0
    (here / "photos").mkdir()
    for number, name in enumerate([*HOSTILE, "wide", "tiny"]):
        size = {"wide": (300, 20), "tiny": (4, 3)}.get(name, (64, 48))
        Image.new("RGB", size, (200, 30 * number, 60)).save(here / "photos" / f"{name}.png")
    (here / "photos/bad.png").write_bytes(b"bad")
    for name, value in dict(_COLUMNS=2, _ROWS=1, _PAGES=2).items():
        monkeypatch.setattr(f"utils.visualization.contact_sheet.{name}", value)
    done = program("--predict", "photos", "--resume", "output/x/default/best.pth", "--sheet", "sheet.png", "--csv", "out.csv")
    assert done.returncode == 3 and "the first 4 of 7 images" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr and "new\\nline\\x1b[31m.png: " in done.stdout
    rows = rows_of((here / "out.csv").read_text())
    assert {row["class_1"] for row in rows if not row["error"]} <= set(HOSTILE)
    assert [Path(row["path"]).name for row in rows] == sorted(f"{name}.png" for name in (*HOSTILE, "wide", "tiny", "bad"))
    assert sorted(path.name for path in here.glob("sheet*")) == ["sheet-2.png", "sheet.png"]
    first, second = (np.asarray(Image.open(here / name)).astype(int) for name in ("sheet.png", "sheet-2.png"))
    assert first.shape == second.shape and first.shape[1] == 2 * 216 + 16
    assert abs(first[116, 116] - (200, 90, 60)).max() < 4  # =1+1.png in the middle of its tile
    assert (abs(first[230:260, 232:448] - (0xb3, 0x26, 0x1e)).max(axis=2) < 40).any()  # the reason, in red, below bad.png
    long = fitted(drawable("猫" * 3 + "y" * 5000), 12, 150.0)
    assert length(long, 12) <= 150 and "..." in long and long.endswith("y")


def test_published_weights_with_their_config(program, tiny_cfg: Path, tiny_run: Path, images: Path) -> None:
    here = program.folder
    torch.save(torch.load(tiny_run, weights_only=True)["ema"], here / "bare.pth")
    (here / "names.txt").write_text("ant\nbee\ncat\ndog\n")
    call = ["--cfg", tiny_cfg, "--output", here / "none", "--pretrained", here / "bare.pth", "--predict", images / "val/d", "--topk", 1]
    numbers, named = program(*call), program(*call, "--opts", "DATA.CLASS_NAMES", here / "names.txt")
    ours = program("--predict", images / "val/d", "--resume", tiny_run, "--topk", 1, "--opts", "DATA.DECODER", "pillow")
    told = [[line.rpartition(": ")[2] for line in done.stdout.splitlines() if " %" in line] for done in (numbers, named, ours)]
    assert numbers.returncode == named.returncode == ours.returncode == 0, (numbers, named, ours)
    assert [f"{'abcd'[int(line[0])]}{line[1:]}" for line in told[0]] == told[2] and len(told[2]) == 4
    assert [line[0] + line[3:] for line in told[1]] == told[2]
    (here / "names.txt").write_text("ant\nbee\n")
    done = program(*call, "--opts", "DATA.CLASS_NAMES", here / "names.txt")
    assert done.returncode == 2 and "names 2 classes, the weights tell 4 apart" in done.stderr
    assert describe_classes(["n01440764", "mine", "n99999999"]) == ["tench, Tinca tinca", "", ""]


def test_a_signal_to_end_leaves_no_half_file(program, tiny_run: Path, images: Path, monkeypatch) -> None:
    def ended(*_: object) -> None:
        signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)
    monkeypatch.setattr(predict, "predictions_of", ended)
    done = program("--predict", images / "val/a", "--resume", tiny_run, "--csv", "p.csv", "--features", "f.npy")
    assert done.returncode == 128 + signal.SIGTERM and not any(program.folder.iterdir())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_mistakes_are_told_before_anything_is_done(program, tiny_cfg: Path, tiny_run: Path, images: Path, monkeypatch) -> None:
    image = images / "val/a/0.jpg"
    (program.folder / "nothing").mkdir()
    rows = [
        (["--predict", image], 2, ["--predict needs weights", "--resume FILE"]),
        (["--predict", "nothing", "gone.jpg", "--resume", tiny_run], 3, ["nothing: holds no images", "gone.jpg: no such file"]),
        (["--csv", "x.csv", "--cfg", tiny_cfg], 2, ["PREDICT.CSV", "--predict"]),
        (["--predict", image, "--resume", tiny_run, "--csv", "-", "--json", "-"], 2, ["PREDICT.JSON", "another output"]),
        (["--predict", image, "--resume", tiny_run, "--features", "f.txt"], 2, ["PREDICT.FEATURES", ".npy or .safetensors"]),
        (["--predict", image, "--resume", tiny_run, "--sheet", "s.jpg"], 2, ["PREDICT.SHEET", ".png"]),
        (["--predict", image, "--resume", tiny_run, "--eval"], 2, ["--eval and --predict are commands of their own"]),
        (["--predict", image, "--resume", tiny_run, "--topk", 0], 2, ["PREDICT.TOPK"]),
        (["--predict", image, "--resume", tiny_run, "--csv", "absent/x.csv"], 2, ["absent/x.csv", "there is no folder"]),
        (["--predict", image, "--resume", tiny_run, "--json", "nothing"], 2, ["is a folder"]),
    ]
    for arguments, status, words in rows:
        done = program(*arguments)
        lines = done.stderr.strip().splitlines()
        assert done.returncode == status and len(lines) == 1 and not done.stdout, (arguments, done)
        assert all(word in lines[0] for word in words), (arguments, lines)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ConfigError, match="runs in one process"):
        open_trained(build_task(get_config()), get_config(), None, "--predict")
