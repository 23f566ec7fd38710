"""Detection and segmentation by the whole program: trained, killed, resumed, evaluated, told, on real digits on canvases."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import differences, load, run_main, torchrun
from faults import ends, start, wait_for
from PIL import Image

from config import ConfigError, get_config
from data.dense.canvases import write_canvases
from data.layouts.input_paths import find_input_images
from utils.tasks.build import build_task

pytest.importorskip("pycocotools")

RECIPE = """
DATA: {{DATASET: {dataset}, DATA_PATH: '{root}', BATCH_SIZE: 2, NUM_WORKERS: 0, DENSE: {{SHORT_SIDE: [48, 64], LONG_SIDE: 80, {data}}}}}
TASK: {task}
PRECISION: fp32
MODEL:
  NAME: tiny
  DROP_PATH_RATE: 0.2
  DENSE: {{HEAD: {head}, WIDTH: 16}}
  CROSSFORMER: {{EMBED_DIM: 16, DEPTHS: [1, 1, 1, 1], NUM_HEADS: [1, 2, 2, 2], GROUP_SIZE: [4, 4, 2, 1], INTERVAL: [2, 1, 1, 1],
                PATCH_SIZE: [4, 8]}}
TRAIN: {{EPOCHS: 2, WARMUP_EPOCHS: 0, WARMUP_STEPS: 2, BASE_LR: 0.002, LR_BATCH: 0, EMA_DECAY: 0.9, ACCUMULATION_STEPS: 2,
        KEEP_CHECKPOINTS: 0, SAVE_EVERY_STEPS: 1, REPORT: none}}
PRINT_FREQ: 2
"""
HEADS = {"retinanet": ("detection", "box_ap"), "mask_rcnn": ("instance", "mask_ap"), "semantic_fpn": ("semantic", "miou")}
CROPS = "SCALE: [0.8, 1.2], CROP: 64"


@pytest.fixture(scope="session")
def canvases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("canvases")
    write_canvases(str(root), train=12, val=5)
    return root


@pytest.fixture(scope="session", params=HEADS)
def head(request: pytest.FixtureRequest) -> str:
    return request.param


def recipe(folder: Path, root: Path, head: str) -> Path:
    path, task = folder / f"{head}.yaml", HEADS[head][0]
    path.write_text(RECIPE.format(dataset="maps" if task == "semantic" else "coco", root=root, task=task, head=head,
                                  data=CROPS if task == "semantic" else "ASPECT_GROUPS: True"))
    return path


@pytest.fixture(scope="session")
def trained(head: str, canvases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run of six steps."""
    import main
    folder = tmp_path_factory.mktemp(head)
    assert main.main(["--cfg", str(recipe(folder, canvases, head)), "--output", str(folder / "output")]) == 0
    return folder / "output/tiny/default"


def test_a_run_evaluates_and_its_checkpoint_says_all(head: str, trained: Path, program) -> None:
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    deciding = HEADS[head][1]
    assert [row["epoch"] for row in rows] == [1, 2] and all(0 <= row[deciding] <= 100 and np.isfinite(row["train_loss"]) for row in rows)
    done = program("--eval", "--resume", trained / "best.pth")
    assert done.returncode == 0, done.stderr
    best = max(row[deciding] for row in rows)
    assert f"{best:.2f}" in done.stdout.splitlines()[-1], (best, done.stdout)


def test_resumed_at_any_step_the_run_ends_in_the_same_bits(trained: Path, head: str, canvases: Path, program) -> None:
    whole, cfg = load(trained / "last.pth"), recipe(program.folder, canvases, head)
    for step in (1, 3):  # within an epoch, and at its end
        done = program("--cfg", cfg, "--resume", trained / f"ckpt_{step:08d}.pth", "--tag", f"from{step}", "--output", "output")
        assert done.returncode == 0, done.stderr
        again = load(program.folder / f"output/tiny/from{step}/last.pth")
        assert [d for part in ("model", "ema", "optimizer", "loss_sums") for d in differences(whole[part], again[part], part)] == []


def test_images_are_predicted_and_drawn(head: str, trained: Path, canvases: Path, program) -> None:
    images = sorted((canvases / "images/val").iterdir())[:3]
    done = program("--predict", *images, "--resume", trained / "best.pth", "--score", 0, "--sheet", "found.png", "--json", "found.jsonl",
                   "--csv", "found.csv", "--pictures", "drawn", *(("--masks", "masks") if head != "retinanet" else ()),
                   *(("--coco", "coco.json") if head != "semantic_fpn" else ()))
    assert done.returncode == 0, done.stderr
    if head != "mask_rcnn":
        wrong = {"retinanet": "--masks", "semantic_fpn": "--coco"}[head]
        done = program("--predict", *images, "--resume", trained / "best.pth", "--pictures", "more", wrong, "wrong")
        assert done.returncode == 2 and not (program.folder / "more").exists() and not (program.folder / "wrong").exists()
    records = [json.loads(line) for line in (program.folder / "found.jsonl").read_text().splitlines()]
    assert [record["path"] for record in records] == [str(image) for image in images]
    for record, image in zip(records, images, strict=True):
        width, height = Image.open(image).size
        if head == "semantic_fpn":
            assert sum(share["share"] for share in record["shares"]) == pytest.approx(1, abs=1e-4)
            continue
        for found in record["objects"]:
            left, top, right, bottom = found["box"]
            assert 0 <= left <= right <= width and 0 <= top <= bottom <= height and 0 <= found["score"] <= 1
            assert head != "mask_rcnn" or found["mask"]["size"] == [height, width]
    assert Image.open(program.folder / "found.png").width > 600
    for image in images:
        original, drawn = Image.open(image), Image.open(program.folder / "drawn" / image.name)
        assert drawn.width % original.width == 0 and drawn.width >= 240
        if head != "retinanet":
            assert Image.open(program.folder / "masks" / image.name).size == original.size
    if head != "semantic_fpn":
        coco = json.loads((program.folder / "coco.json").read_text())
        assert len(coco["images"]) == 3 and len(coco["annotations"]) == sum(len(record["objects"]) for record in records)


def test_masks_of_images_without_an_object_are_black_and_boxes_have_none(head: str, trained: Path, canvases: Path, program) -> None:
    image = canvases / "images/val/0000.png"
    done = program("--predict", image, "--resume", trained / "best.pth", "--score", 1, "--masks", "masks")
    if head == "retinanet":
        assert done.returncode == 2 and "PREDICT.MASKS" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert head != "mask_rcnn" or Image.open(program.folder / "masks/0000.png").convert("L").getextrema() == (0, 0)


def test_the_first_batch_is_shown(head: str, canvases: Path, program) -> None:
    done = program("--cfg", recipe(program.folder, canvases, head), "--show-batch", "batch.png")
    assert done.returncode == 0, done.stderr
    assert Image.open(program.folder / "batch.png").width > 200


def test_a_run_is_told_and_drawn(head: str, trained: Path, canvases: Path, program) -> None:
    deciding, image, best = HEADS[head][1], canvases / "images/val/0001.png", trained / "best.pth"
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator(
        str(trained / "tensorboard")).Reload()
    assert f"val/{deciding}" in accumulator.Tags()["scalars"] and accumulator.Tags()["images"] == ["train/first_batch"]
    assert deciding in (trained / "metrics.csv").read_text().splitlines()[0].split(",")
    done = program("--report", trained, "--opts", "REPORT.FILE", "page.html")
    assert done.returncode == 0, done.stderr
    page = (program.folder / "page.html").read_text()
    assert "Worst images" in page and page.count("data:image/jpeg") == 5 and "damaged" not in page
    done = program("--show-attention", image, "--show-token", "40,10", "--resume", best)
    assert done.returncode == 0 and "stage 2 block 1" in done.stdout and "token 10,2 of" in done.stdout, done.stderr
    for line in (["--show-attention", image, "--show-token", "400,10", "--resume", best], ["--compare", best, best],
                 ["--eval", "--resume", best, "--csv", "a.csv"], ["--predict", image, "--resume", best, "--features", "a.npy"]):
        done = program(*line)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, (line, done.stderr)


def test_a_classifier_and_a_dense_model_are_not_compared(trained: Path) -> None:
    from utils.commands.compare import compare_run
    content, config = load(trained / "best.pth"), get_config(None, ["COMPARE.FILES", "['a.pth', 'b.pth']"])
    with pytest.raises(ConfigError, match="b.pth was trained for TASK"):
        compare_run(config, [(config, content | dict(config="TAG: a")), (config, content)], torch.device("cpu"),
                    logging.getLogger("test"))


def test_iterations_count(canvases: Path, program) -> None:
    done = program("--cfg", recipe(program.folder, canvases, "retinanet"), "--iterations", 4)
    assert done.returncode == 0 and load(program.folder / "output/tiny/default/last.pth")["step"] == 4, done.stderr


def test_killed_it_goes_on_to_the_same_bits(canvases: Path, tmp_path: Path) -> None:
    cfg = recipe(tmp_path, canvases, "mask_rcnn")
    command = ["--cfg", cfg, "--num-workers", 1, "--epochs", 3]
    straight = run_main(*command, "--tag", "straight", cwd=tmp_path)
    assert straight.returncode == 0, straight.stderr
    process, folder = start(*command, cwd=tmp_path), tmp_path / "output/tiny/default"
    wait_for(folder / "ckpt_00000004.pth")
    os.killpg(process.pid, signal.SIGKILL)
    ends([process])
    done = run_main(*command, cwd=tmp_path)
    assert done.returncode == 0 and "resumed" in done.stdout, done.stderr
    ours, theirs = load(folder / "last.pth"), load(tmp_path / "output/tiny/straight/last.pth")
    assert [d for part in ("model", "ema", "optimizer", "best") for d in differences(ours[part], theirs[part], part)] == []


def test_two_ranks_evaluate_as_one(canvases: Path, tmp_path: Path) -> None:
    cfg = recipe(tmp_path, canvases, "retinanet")
    done = torchrun("--cfg", cfg, "--opts", "TRAIN.ACCUMULATION_STEPS", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    best = tmp_path / "output/tiny/default/best.pth"
    one = run_main("--eval", "--resume", best, cwd=tmp_path)
    two = torchrun("--eval", "--resume", best, "--opts", "TEST.BATCH_SIZE", 1, cwd=tmp_path)
    assert one.returncode == two.returncode == 0, two.stderr[-2000:]
    assert one.stdout.splitlines()[-1] == two.stdout.splitlines()[-1]


def test_images_are_padded_to_the_stride_of_the_model(canvases: Path) -> None:
    config = get_config(None, ["TASK", "instance", "DATA.DATASET", "coco", "DATA.DATA_PATH", str(canvases), "DATA.BATCH_SIZE", "2",
                               "DATA.NUM_WORKERS", "0", "DATA.DENSE.SHORT_SIDE", "[50]", "DATA.DENSE.LONG_SIDE", "80", "MODEL.TYPE",
                               "galerkin", "MODEL.NAME", "tiny", "MODEL.GALERKIN.PATCH_SIZE", "3", "MODEL.GALERKIN.EMBED_DIM", "16",
                               "MODEL.GALERKIN.DEPTHS", "[1,1,1,1]", "MODEL.GALERKIN.NUM_HEADS", "[1,1,2,2]", "MODEL.DENSE.WIDTH", "16"])
    task = build_task(config)
    before = torch.get_rng_state()
    loaders, shown = task.build_loaders(config), find_input_images([str(canvases / "images/val")])
    assert task.stride == 24 and torch.equal(torch.get_rng_state(), before)
    model = task.build_model(config, len(loaders.classes)).train()
    batch = next(iter(loaders.batches(0)))
    for part in (*task.split(batch, 2), task.synthetic_batch(config, 2, 3, torch.device("cpu"), torch.Generator())):
        assert task.loss(task.forward(model, part), part).isfinite()
    model.eval()
    for loader in (loaders.val, task.prediction_loader(config, shown, torch.device("cpu"), False)[0]):
        with torch.inference_mode():
            assert len(task.forward(model, next(iter(loader)))) >= 1
    assert task.input_size(config) == (72, 96)


def test_a_folder_of_classes_is_no_data_of_objects(trained: Path, images: Path, program) -> None:
    done = program("--eval", "--resume", trained / "best.pth", "--data-path", images)
    assert done.returncode == 3 and done.stderr.count("\n") == 1 and str(images) in done.stderr, done.stderr


def test_upernet_is_planned_with_the_images_that_its_batch_norm_needs(canvases: Path, tmp_path: Path, program) -> None:
    pytest.importorskip("transformers")
    path = recipe(tmp_path, canvases, "semantic_fpn")
    words = ["--cfg", str(path), "--output", str(tmp_path), "--opts", "MODEL.DENSE.HEAD", "upernet"]
    assert program(*words, "--plan").returncode == 0
    assert program(*words, "DATA.BATCH_SIZE", "1").returncode == 2 and not (tmp_path / "tiny").exists()


def test_a_missing_package_is_told_before_the_run_has_a_folder(head: str, canvases: Path, program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    task = HEADS[head][0] if head != "semantic_fpn" else "instance"
    done = program("--cfg", recipe(program.folder, canvases, "mask_rcnn" if task == "instance" else head))
    assert done.returncode == 2 and "requirements-extras" in done.stderr and not (program.folder / "output").exists()
