"""Several processes do what one does: real torchrun, gloo on the CPU."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import torch
from conftest import load, run_main, torchrun

PLAIN = ("--disable-amp", "--opts", "MODEL.DROP_PATH_RATE", "0", "AUG.MIXUP", "0", "AUG.CUTMIX", "0", "TRAIN.EMA_DECAY", "0")


def weights(folder: Path, tag: str) -> torch.Tensor:
    state = load(folder / f"output/tiny/{tag}/last.pth")["model"]
    return torch.cat([t.flatten() for t in state.values()])


def test_two_processes_train_as_one_and_as_accumulation(tiny_cfg: Path, program) -> None:
    """With nothing drawn per rank, 2 x 4 images, 2 accumulated x 4 and 1 x 8 are the same step."""
    one = program("--cfg", tiny_cfg, "--tag", "one", "--batch-size", 8, *PLAIN)
    accumulated = program("--cfg", tiny_cfg, "--tag", "accumulated", "--batch-size", 4, "--accumulation-steps", 2, *PLAIN)
    two = torchrun("--cfg", tiny_cfg, "--tag", "two", "--batch-size", 4, *PLAIN, cwd=program.folder)
    assert one.returncode == accumulated.returncode == two.returncode == 0, two.stderr
    reference = weights(program.folder, "one")
    for tag in ("accumulated", "two"):
        difference = (weights(program.folder, tag) - reference).norm() / reference.norm()
        assert difference < 1e-5, (tag, difference)
    assert re.findall(r"^top1 .*", two.stdout, re.M) == re.findall(r"^top1 .*", one.stdout, re.M)
    assert two.stdout.count("finished 2 epochs") == 1


def test_evaluation_counts_are_the_same_on_any_number_of_processes_and_batch(tiny_cfg: Path, program) -> None:
    assert program("--cfg", tiny_cfg, "--epochs", 2).returncode == 0
    checkpoint = "output/tiny/default/last.pth"
    lines = {batch: program("--eval", "--resume", checkpoint, "--batch-size", batch).stdout for batch in (1, 7, 64)}
    lines["two"] = torchrun("--eval", "--resume", checkpoint, "--batch-size", 3, cwd=program.folder).stdout
    found = {key: re.findall(r"^(?:raw )?top1 .*\((\d+) of 19\)$", text, re.M) for key, text in lines.items()}
    assert len(found[1]) == 2  # raw, then averaged weights
    assert all(counts == found[1] for counts in found.values()), lines


def test_half_set_environment_is_one_sentence(tiny_cfg: Path, program, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    done = program("--cfg", tiny_cfg)
    assert done.returncode == 2 and "RANK is set but WORLD_SIZE is not" in done.stderr and "torchrun" in done.stderr
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = program("--cfg", tiny_cfg)
    assert done.returncode == 2 and "MASTER_ADDR and MASTER_PORT are not" in done.stderr


def test_port_in_use_is_one_sentence(tiny_cfg: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run_main("--cfg", tiny_cfg, cwd=tmp_path, RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                        MASTER_PORT=str(taken.getsockname()[1]))
    assert done.returncode == 2
    assert "is in use by another program" in done.stderr and "Traceback" not in done.stderr


def test_without_torch_distributed(tiny_cfg: Path, tmp_path: Path) -> None:
    """A torch built without it: is_available() is False and its functions are absent."""
    (tmp_path / "sitecustomize.py").write_text(
        "import torch, torch.distributed as dist\n"
        "dist.is_available = lambda: False\n"
        "for name in ('init_process_group', 'all_reduce', 'is_initialized', 'get_rank', 'get_world_size', 'barrier', 'broadcast'):\n"
        "    delattr(dist, name)\n")
    done = run_main("--cfg", tiny_cfg, "--epochs", 1, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert re.search(r"^top1 \d", done.stdout, re.M)
    two = run_main("--cfg", tiny_cfg, cwd=tmp_path, PYTHONPATH=str(tmp_path), RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                   MASTER_PORT="29555")
    assert two.returncode == 2 and "built without torch.distributed" in two.stderr
