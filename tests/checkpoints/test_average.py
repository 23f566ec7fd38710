"""scripts/average_checkpoints.py: own files in, a file in the own format out that every command takes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load

sys.path.insert(0, str(ROOT / "scripts"))


@pytest.fixture
def average(program, monkeypatch: pytest.MonkeyPatch):
    import average_checkpoints

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["average_checkpoints.py", *map(str, arguments)])
        status = average_checkpoints.main()
        return status, *program.capsys.readouterr()

    return call


def test_the_mean_is_a_checkpoint_that_is_evaluated_and_started_from(average, tiny_run: Path, tiny_cfg: Path, program) -> None:
    run = tiny_run.parent
    files = sorted(run.glob("ckpt_*.pth"))
    status, out, err = average("mean.pth", run, tiny_run)  # best.pth is one of those
    assert status == 0 and not err and f"average of {len(files)} checkpoints" in out and out.splitlines()[-1].startswith("top1 "), out
    mean, states = load(program.folder / "mean.pth"), [load(file)["ema"] for file in files]
    for name, tensor in mean["model"].items():
        assert tensor.dtype == states[0][name].dtype
        assert torch.allclose(tensor.double(), sum(s[name].double() for s in states) / len(states), atol=1e-7), name
    raw, _, _ = average("raw.pth", *files, "--weights", "raw", "--no-eval")
    assert raw == 0 and not all(torch.equal(t, mean["model"][n]) for n, t in load(program.folder / "raw.pth")["model"].items())
    done = program("--resume", "mean.pth", "--tag", "new")
    assert done.returncode == 3 and "--pretrained mean.pth" in done.stderr
    done = program("--cfg", tiny_cfg, "--pretrained", "mean.pth", "--tag", "new", "--epochs", 1, "--opts", "TRAIN.REPORT", "none")
    assert done.returncode == 0 and "98 tensors kept" in done.stdout, done
    other = load(files[0])
    for change, words in ((dict(classes=["x", "y", "z", "w"]), "other classes"),
                          (dict(config=other["config"].replace("IMG_SIZE: 32", "IMG_SIZE: 64")), "DATA.IMG_SIZE is 64")):
        from utils.checkpoints.file_format import write_checkpoint
        write_checkpoint("other.pth", other | change)
        status, _, err = average("no.pth", files[0], "other.pth")
        assert status == 3 and words in err and len(err.splitlines()) == 1, err
    torch.save(other["model"], "bare.pth")
    assert average("no.pth", files[0], "bare.pth")[0] == 3 and average("no.pth", files[0])[0] == 2
    assert average("mean.pth", "mean.pth", files[0])[0] == 2 and not (program.folder / "no.pth").exists()
