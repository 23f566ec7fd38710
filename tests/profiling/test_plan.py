"""--plan says what a run will take and touches nothing; --fit keeps the global batch, whatever the memory."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, load, torchrun

from config import ConfigError, get_config
from utils.commands import plan
from utils.runtime import memory
from utils.runtime.device import keep_freed_memory
from utils.tasks.build import build_task
from utils.training import batch_size as fit
from utils.training.batch_size import local_batch, recipe_batch
from utils.training.step_graph import Graphs
from utils.visualization import terminal_chart as curve

QUICK = ["PLAN.SECONDS", 0.02]


def files_below(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_a_plan_fits_and_leaves_nothing_behind(tiny_cfg: Path, program, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = program.folder / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    done = program("--cfg", tiny_cfg, "--plan", "--opts", *QUICK)
    assert done.returncode == 0 and done.stdout.endswith("\nfits: yes\n"), done
    for pattern in (r"^model: tiny, 0\.04 M parameters, [\d.]+ GMACs an image of 32 x 32, on cpu in fp32$",
                    r"^batch: 8 images = 8 x 1 accumulated x 1 processes, 5 steps an epoch$", r"^steps: from the first of 10$",
                    r"^learning rate: \S+ rising to 7\.81e-04 over 2 steps, cosine to ", r"^disk: a checkpoint takes \d+ MiB, the 4 ",
                    r"^speed: \d+ images/s of the step alone \(\d+ ms\), \d+ images/s of the loader alone \(0 DataLoader workers\), \d+ ",
                    r"^bound: by ", r"^checkpoint: \d+ MiB copied in [\d.]+ s, written ", r"^memory: \S+ [MG]iB at the peak, of ",
                    r"^epoch: \d+:\d\d = [\d.]+ s training \+ [\d.]+ s evaluation \+ [\d.]+ s saving$", r"^run: \d+:\d\d for 2 epochs, "):
        assert re.search(pattern, done.stdout, re.M), (pattern, done.stdout)
    assert files_below(program.folder) == [scratch]


def stamps(folder: Path) -> list[tuple[Path, int, int, int]]:
    return [(path, found.st_ino, found.st_mtime_ns, found.st_size) for path in files_below(folder) for found in [path.lstat()]]


@pytest.mark.parametrize(("opts", "why"), [
    (["PLAN.MEMORY", "20MiB"], r"memory: a micro-batch of 8 images takes [\d.]+ [MG]iB, more than 20 MiB; --fit finds"),
    (["TRAIN.CHECKPOINT_BUDGET", "1MB"], r"TRAIN\.CHECKPOINT_BUDGET is 0 MiB"),
    (["PLAN.MEMORY", "20MiB", "PLAN.FIT", "True"], r"a micro-batch of one image does not fit into 19 MiB"),
])
def test_what_does_not_fit_is_said_with_status_1(tiny_cfg: Path, program, opts: list[str], why: str) -> None:
    done = program("--cfg", tiny_cfg, "--plan", "--opts", *opts)
    assert done.returncode == 1 and re.search(rf"^fits: no \({why}", done.stdout.splitlines()[-1]), done
    assert files_below(program.folder) == []


def test_a_gpu_that_is_too_small(tiny_cfg: Path, program, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an allocator raises in the middle of a step is an answer, not a failure."""
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(plan, "two_steps", refuse)
    done = program("--cfg", tiny_cfg, "--plan")
    assert done.returncode == 1 and "fits: no (memory: a micro-batch of 8 images takes more than " in done.stdout


def pretend_memory(monkeypatch: pytest.MonkeyPatch, images: int) -> list[int]:
    """Let ``images`` of a micro-batch fit and no more; the sizes that are tried."""
    tried: list[int] = []

    def taken(self: fit.Trial, micro: int) -> int | None:
        tried.append(micro)
        return micro << 20 if micro <= images else None

    monkeypatch.setattr(fit.Trial, "peak", taken)
    return tried


def test_fit_keeps_the_global_batch_and_the_checkpoints_on_resume(tiny_cfg: Path, program, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_memory(monkeypatch, 6)
    done = program("--cfg", tiny_cfg, "--fit", "--global-batch", 20, "--tag", "small")
    assert done.returncode == 0, done
    assert "fit: 5 images x 4 accumulated x 1 processes = 20, the recipe's global batch, so that learning rate and " in done.stdout
    assert "10 images would not fit" in done.stdout
    whole = program("--cfg", tiny_cfg, "--batch-size", 20, "--tag", "whole")
    lines = [re.search(r"; learning rate (\d.*)", run.stdout)[0] for run in (done, whole)]
    steps = [re.findall(r"^epoch \d/2 step 2/2 lr (\S+) loss", run.stdout, re.M) for run in (done, whole)]
    assert lines[0] == lines[1] and steps[0] == steps[1] and len(steps[0]) == 2
    saved = load(program.folder / "output/tiny/small/last.pth")
    assert saved["global_batch"] == 20 and saved["step"] == 4
    assert "BATCH_SIZE: 5" in saved["config"] and "ACCUMULATION_STEPS: 4" in saved["config"]

    pretend_memory(monkeypatch, 1000)
    again = program("--cfg", tiny_cfg, "--fit", "--global-batch", 8, "--tag", "small", "--epochs", 3)
    assert again.returncode == 0, again
    assert "fit: 20 images x 1 accumulated x 1 processes = 20, the checkpoint's global batch" in again.stdout
    assert "TRAIN.GLOBAL_BATCH is 8, but" in again.stdout and "has a global batch of 20, which is kept" in again.stdout
    recorded = yaml.safe_load((program.folder / "output/tiny/small/config.yaml").read_text())
    assert not recorded["PLAN"]["FIT"] and recorded["DATA"]["BATCH_SIZE"] == 20  # as --cfg it asks for no fitting again
    assert "would not fit" not in again.stdout and "epoch 3/3 step 2/2" in again.stdout
    before = stamps(program.folder)
    finished = program("--cfg", tiny_cfg, "--plan", "--fit", "--tag", "small", "--epochs", 3)
    assert finished.returncode == 0 and "finished already" in finished.stdout and finished.stdout.endswith("\nfits: yes\n")
    assert stamps(program.folder) == before  # not even a link is made again
    path = program.folder / "output/tiny/small/ckpt_00000004.pth"
    planned = program("--plan", "--resume", path, "--restart", "--epochs", 5, "--opts", *QUICK)
    assert planned.returncode == 0 and f"\nsteps: continues {path} after step 4 of 10\n" in planned.stdout, planned
    assert "for 3 epochs" in planned.stdout


def test_the_recipe_says_its_global_batch_where_it_is_not_kept(tiny_cfg: Path, program) -> None:
    done = program("--cfg", tiny_cfg, "--plan", "--global-batch", 1024, "--opts", *QUICK)
    assert "notice: the recipe's global batch is 1024, this one 8; " in done.stdout and "--fit keeps the recipe's" in done.stdout
    config = get_config(str(ROOT / "configs/crossformer_t.yaml"), ["DATA.BATCH_SIZE", "4"])
    assert recipe_batch(config, 1) == 1024 == recipe_batch(config, 8)


@pytest.mark.parametrize("most", [0, 1, 5, 8, 31, 64, 500])
def test_the_search_finds_the_largest_with_few_trials(most: int) -> None:
    sizes = [1, 2, 4, 8, 16, 32, 64]
    tried: list[int] = []
    found = fit.search(sizes, lambda n: tried.append(n) or n <= most, None, 0)
    assert found == max((n for n in sizes if n <= most), default=0) and len(tried) <= 4 and len(set(tried)) == len(tried)


@pytest.mark.parametrize("most", [0, 1, 5, 8, 31, 64, 500])
def test_on_a_cpu_no_size_is_tried_that_is_foretold_not_to_fit(most: int) -> None:
    sizes, measured = [1, 2, 4, 8, 16, 32, 64], {}

    def fits(n: int) -> bool:
        measured[n] = 100 + n
        return n <= most

    assert fit.search(sizes, fits, measured, 100 + most) == max((n for n in sizes if n <= most), default=0)
    assert max(measured) <= max(fit.STRETCH, most)


def test_measured_memory_is_that_of_the_work() -> None:
    def work(mib: int) -> None:
        torch.ones(mib << 18)

    keep_freed_memory()  # as main.py does: what an earlier piece of work left must not count for the next
    large, small, again = (memory.peak_of(lambda mib=mib: work(mib), torch.device("cpu")) for mib in (256, 64, 256))
    assert abs(large - small - (192 << 20)) < 20 << 20 and abs(again - large) < 20 << 20
    assert memory.available(torch.device("cpu"), 123) == 123 and memory.available(torch.device("cpu"), 0) > 100 << 20


def test_a_real_fit_stays_within_its_memory(tiny_cfg: Path, program) -> None:
    here = memory.peak_of(lambda: None, torch.device("cpu"))
    done = program("--cfg", tiny_cfg, "--plan", "--fit", "--global-batch", 64, "--opts", "PLAN.MEMORY", here + (600 << 20), *QUICK)
    assert done.returncode == 0 and done.stdout.endswith("\nfits: yes\n"), done
    assert re.search(r"^fit: \d+ images x \d+ accumulated x 1 processes = 64, .* are taken at the peak", done.stdout, re.M), done


@pytest.mark.parametrize("opts", [["AUG.MIXUP_PROB", "1"], ["TASK", "simmim", "DATA.MASK_PATCH_SIZE", "8"]])
def test_a_trial_does_what_a_step_of_the_run_does(opts: list[str], tiny_cfg: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole batch is mixed and then split, the next one is prepared meanwhile, and the model is compiled where the run's is."""
    config = get_config(str(tiny_cfg), ["COMPILE", "blocks", "AUG.MIXUP", "0.8", *opts])
    compiled, parts, prepared, forgotten = [], [], [], []
    task = build_task(config)
    monkeypatch.setattr(fit, "make_deterministic", lambda device: None)
    monkeypatch.setattr(fit, "require_compiler", lambda device, how: None)
    monkeypatch.setattr(fit, "compile_model", lambda model, how: compiled.append((model, how)))
    monkeypatch.setattr(fit, "forget_compiled", lambda: forgotten.append(1))
    monkeypatch.setattr(task, "next_images", lambda config, images, device: prepared.append(images))
    real = fit.backward
    monkeypatch.setattr(fit, "backward", lambda *all_of: parts.append((all_of[0], all_of[1], all_of[3])) or real(*all_of))
    trial = fit.Trial(config, task, 16, 10, torch.device("cpu"))
    assert trial.peak(4) > 0 and prepared == [16, 16] and [step for *_, step in parts] == [0, 0, 1, 1] and not forgotten
    model = trial.state.model
    assert compiled == [(model, "blocks")] and all(used is model and len(task.images(batch)) == 4 for used, batch, _ in parts)
    assert task.targets(parts[0][1]).is_floating_point() == ("simmim" not in opts)
    monkeypatch.setattr(fit, "two_steps", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
    assert trial.peak(8) is None and forgotten


def test_a_recorded_step_leaves_room_for_the_evaluation(tiny_cfg: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, taken = get_config(str(tiny_cfg), ["TEST.BATCH_SIZE", "3"]), iter([500, 100, 130])
    trial = fit.Trial(config, build_task(config), 16, 10, torch.device("cpu"))
    seen = []
    trial.state.model.register_forward_hook(lambda model, inputs, outputs: seen.append((model.training, len(inputs[0]))))
    monkeypatch.setattr(fit.memory, "peak_of", lambda work, device: (work(), next(taken))[1])
    trial.plan = dataclasses.replace(trial.plan, step=Graphs(lambda line: None))
    assert trial.peak(4) == 530 and seen == [(True, 4)] * 4 + [(False, 3)]


def test_two_processes_plan_together(tiny_cfg: Path, tmp_path: Path) -> None:
    done = torchrun("--cfg", tiny_cfg, "--plan", "--fit", "--global-batch", 16, "--opts", *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done
    assert done.stdout.count("fits: yes") == 1 and re.search(r"^fit: 8 images x 1 accumulated x 2 processes = 16", done.stdout, re.M)
    assert done.stdout.count("batch: 16 images = 8 x 1 accumulated x 2 processes, 2 steps an epoch") == 1
    assert not (tmp_path / "output").exists()


def test_mistakes_are_one_sentence(tiny_cfg: Path, program, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        (["--plan", "--opts", "PLAN.MEMORY", "much"], ["PLAN.MEMORY", "a size such as 20GB"]),
        (["--plan", "--opts", "PLAN.SCRATCH", program.folder / "absent"], ["PLAN.SCRATCH", "name a folder"]),
        (["--fit", "--eval"], ["--fit", "--eval"]),
        (["--fit", "--predict", "a.jpg"], ["leave it out with --predict"]),
        (["--global-batch", "-1"], ["TRAIN.GLOBAL_BATCH", "must not be negative"]),
        (["--fit", "--global-batch", "64", "--opts", "DATA.SUBSET", "0.4"], ["longer than an epoch", "--global-batch"]),
    ]
    pretend_memory(monkeypatch, 8)
    for arguments, words in rows:
        done = program("--cfg", tiny_cfg, *arguments)
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 2 and len(lines) == 1 and all(word in lines[0] for word in words), (arguments, done)
    with pytest.raises(ConfigError, match="global batch of 10 cannot be shared by 4 processes; start 1, 2, 5, 10 processes, or state"):
        local_batch(10, "the recipe's", 4)
    pretend_memory(monkeypatch, 0)
    done = program("--cfg", tiny_cfg, "--fit")
    assert done.returncode == 1 and done.stderr.startswith("error: a micro-batch of one image does not fit"), done
    assert files_below(program.folder) == []


def test_curves_are_drawn_in_blocks_or_signs() -> None:
    lines = curve.draw([0, 1, 2, 4], 2, "step 0", "9", True)
    assert lines == ["4.00e+00 |   █", "         | ▄██", "       0 +----", "          step 0 9"]
    assert curve.draw([0, 1, 2, 4], 2, "0", "9", False)[:2] == ["4.00e+00 |   #", "         | ###"]
    assert curve.draw([0.0, 0.0], 1, "", "", False)[0] == "1.00e+00 |"
