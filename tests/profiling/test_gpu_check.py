"""The check for a GPU, rehearsed on the CPU: its parts give figures, and one that hangs or fails leaves those that it had."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import gpu_check
import pytest
from conftest import ROOT

TINY = gpu_check.TINY
SMALL = argparse.Namespace(device="cpu", small=True)


def rows_of(part: str, tmp_path: Path) -> dict[str, dict]:
    """Rows by what they are, of a part that runs in this process."""
    report = gpu_check.Report(tmp_path / "rows.jsonl", part)
    gpu_check.PARTS[part][0](report, SMALL)
    return {row["what"]: row for row in map(json.loads, report.path.read_text().splitlines())}


def test_numbers_and_gradients_are_compared(tmp_path: Path) -> None:
    rows = rows_of("parity", tmp_path)
    assert set(rows) == {f"{TINY} {precision} {what}" for precision in ("fp32", "bf16") for what in ("logits", "gradients")}
    assert all(row["met"] for row in rows.values())
    assert rows[f"{TINY} fp32 gradients"]["value"] == 0 < rows[f"{TINY} bf16 logits"]["value"]


def test_speed_memory_and_the_kinds_of_work_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "KINDS", ("off",))
    rows = rows_of("goals", tmp_path)
    assert set(rows) == {f"{TINY} off {what}" for what in ("forward", "training", "peak")}
    assert all(row["value"] > 0 for row in rows.values())
    rows = rows_of("profile", tmp_path)
    assert any(what.startswith(f"{TINY}: linears (") for what in rows) and any("aten::mm" in what for what in rows)


def test_a_goal_that_is_missed_is_said() -> None:
    assert gpu_check.met(5000, ">= 4800") and not gpu_check.met(4000, ">= 4800") and gpu_check.met(7, "<= 8")
    assert gpu_check.met(7, "") is None


def test_a_part_that_hangs_or_fails_leaves_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "part.py"
    script.write_text("import json, sys, time\n"
                      "rows = sys.argv[sys.argv.index('--rows') + 1]\n"
                      "open(rows, 'w').write(json.dumps(dict(part='goals', what='first', value=1)) + '\\n')\n"
                      "time.sleep(60) if 'goals' in sys.argv else sys.exit('no such kernel')\n")
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    monkeypatch.setitem(gpu_check.PARTS, "goals", (gpu_check.goals, 1))
    for part, wrong in (("goals", "not done after 1 s"), ("profile", "no such kernel")):
        rows, said = gpu_check.run_part(part, argparse.Namespace(device="cpu", small=False), tmp_path)
        assert [row["what"] for row in rows] == ["first"] and said == wrong


def test_one_command_runs_the_parts_that_are_asked_for(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    command = ["bash", str(ROOT / "scripts/gpu_check.sh"), "--output", str(output), "--parts", "parity"]
    done = subprocess.run([*command, "--device", "cpu", "--small"], capture_output=True, text=True,
                          env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(output.read_text())
    assert result["parts"]["parity"]["wrong"] == "" and len(result["rows"]) == 4 and "met" in done.stdout
