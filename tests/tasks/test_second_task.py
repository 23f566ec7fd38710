"""Loop, engine, checkpoints, plan and reports know a task only by its protocol: another one needs no line outside its own file."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
from pathlib import Path

import pytest
import warm_start
from conftest import ROOT, differences, environment, load
from faults import fault, wait_for, waiting

from utils.tasks.build import TASKS

RUN = "output/tiny/default"


def script(folder: Path) -> Path:
    """The program with the task known to it."""
    path = folder / "main_with_task.py"
    path.write_text(f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]\n"
                    "import main\nfrom utils.tasks.build import TASKS\nTASKS['mean_color'] = ('mean_color', 'MeanColor')\n"
                    "sys.exit(main.main(sys.argv[1:]))\n")
    return path


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return warm_start.run([str(argument) for argument in arguments], folder, environment(), 120, script(folder))


@pytest.fixture(scope="module")
def trained(tiny_cfg: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("color")
    done = run(folder, *training(tiny_cfg))
    assert done.returncode == 0, done.stderr
    return folder


def training(tiny_cfg: Path) -> tuple[object, ...]:
    return ("--cfg", tiny_cfg, "--epochs", 4, "--opts", "TASK", "mean_color", "TRAIN.SAVE_EVERY_STEPS", 2, "TRAIN.CLIP_GRAD", 1.0)


def test_it_trains_and_its_own_metric_decides_what_is_best(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / RUN / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and {"close", "error", "raw_error", "train_loss"} <= rows[0].keys() and "top1" not in rows[0]
    assert rows[-1]["error"] < rows[0]["error"] and rows[-1]["train_loss"] < rows[0]["train_loss"]
    best = load(trained / RUN / "best.pth")["best"]
    assert best["error"] == min(row["error"] for row in rows) and set(best) == {"error", "epoch", "step"}


def test_killed_and_resumed_it_ends_in_the_same_bits(trained: Path, tiny_cfg: Path, tmp_path: Path) -> None:
    # The 14th loss is in the third epoch (5 steps each, the evaluation computes none).
    killed = warm_start.Process([str(argument) for argument in training(tiny_cfg)], tmp_path, script=script(tmp_path),
                                env=environment(**fault(tmp_path, "loss_of_color", after=13, how="wait")))
    wait_for(waiting(tmp_path))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = run(tmp_path, *training(tiny_cfg))
    assert done.returncode == 0 and "auto-resume" in done.stdout, done.stderr
    ours, theirs = (load(folder / RUN / "last.pth") for folder in (tmp_path, trained))
    assert ours["step"] == theirs["step"] == 20
    for part in ("model", "ema", "optimizer", "best"):
        assert differences(ours[part], theirs[part], part) == []


def test_it_is_evaluated_predicted_planned_and_reported(trained: Path, tiny_cfg: Path, images: Path, program, monkeypatch) -> None:
    monkeypatch.setitem(TASKS, "mean_color", ("mean_color", "MeanColor"))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.chdir(trained)
    rows = [json.loads(line) for line in (trained / RUN / "metrics.jsonl").read_text().splitlines()]
    best = min(rows, key=lambda row: row["error"])
    done = program("--eval", "--resume", f"{RUN}/best.pth")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == f"close {best['close']:.2f} error {best['error']:.4f} (19)", done.stderr
    done = program("--predict", images / "val/a", "--resume", f"{RUN}/best.pth", "--csv", "colors.csv", "--sheet", "s.png")
    assert done.returncode == 0, done.stderr
    table = list(csv.DictReader((trained / "colors.csv").open()))
    assert len(table) == 5 and all(float(row["red"]) < 5 for row in table)
    done = program("--plan", *training(tiny_cfg), "--tag", "other", "--opts", "PLAN.SECONDS", 0.2)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "fits: yes", done.stderr
    done = program("--report", RUN)
    page = (trained / RUN / "report.html").read_text()
    assert done.returncode == 0 and f"{best['error']:.4f}" in page and "top-1" not in page


def test_a_task_that_is_not_there_is_named_with_the_nearest(tiny_cfg: Path, program) -> None:
    done = program("--cfg", tiny_cfg, "--opts", "TASK", "clasification")
    assert done.returncode == 2 and "TASK" in done.stderr and "did you mean classification" in done.stderr
