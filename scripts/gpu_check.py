"""What ``gpu_check.sh`` runs: parts, each in a process of its own with a time limit, whose figures come as one table and one JSON file.

    python scripts/gpu_check.py [--parts parity tests goals compile program quickstart profile waits] [--output gpu_check.json]

A part that fails or runs out of time leaves the figures that it had, and the others run all the same. The status is 1 where a part
failed or a figure misses what is asked of it. ``--small`` takes tiny models, images and batches: a rehearsal, on a CPU too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

# Images a second in training that are asked for on one H200 (bf16, batch 256).
GOALS = {"crossformer_small": 4800, "mpvit_small": 2000, "crossformer_tiny": 8000, "crossformer_base": 2800, "cvt_13": 4500,
         "pvt_small": 4500, "shunted_s": 2600, "swin_tiny_patch4_window7_224": 4000}
TINY = "test_convnext"  # timm's, for rehearsals
KINDS = ("off", "graphs", "graphs+blocks", "blocks")  # of COMPILE
FAMILIES = ("crossformer_tiny", "crossformer_pp_small", "cvt_13", "shunted_t", "mpvit_tiny", TINY, "galerkin_tiny")
# Largest relative error of logits and of all gradients together that each precision may have against fp32 on the CPU.
ERRORS = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}


class Report:
    """Rows of figures, written as they come: a part that is killed leaves what it had."""

    def __init__(self, path: Path, part: str):
        self.path, self.part = path, part

    def add(self, what: str, value: Any, unit: str = "", asked: str = "") -> None:
        """A figure and what is asked of it, as ``>= 4800`` or ``<= 1e-4``; nothing asks nothing."""
        row = dict(part=self.part, what=what, value=value, unit=unit, asked=asked, met=met(value, asked))
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def met(value: Any, asked: str) -> bool | None:
    """Whether ``value`` is what is asked; None where nothing is."""
    if not asked:
        return None
    sign, limit = asked.split()
    return value >= float(limit) if sign == ">=" else value <= float(limit)


# ---- right numbers ---------------------------------------------------------------------------------------------------------------

def parity(report: Report, options: argparse.Namespace) -> None:
    """Logits and gradients of every family on the device, in training's forms, against the CPU's in fp32, at an odd size."""
    import timm
    import torch

    import models  # noqa: F401  registers the families
    from utils.runtime.precision import Precision
    precisions = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device(options.device)
    for name in [TINY] if options.small else FAMILIES:
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=10, drop_path_rate=0.0).train()
        images, pull = torch.randn(4, 3, *((32, 67) if options.small else (100, 131))), torch.randn(4, 10)

        def outputs(device: torch.device, dtype: torch.dtype, model: Any = model, images: Any = images, pull: Any = pull) -> list[Any]:
            model = model.to(device)
            model.zero_grad()
            with Precision(device, dtype).autocast():
                logits = model(images.to(device))
            (logits.float() * pull.to(device)).sum().backward()
            gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            return [logits.detach().float().cpu(), gradients.float().cpu()]

        kept = {key: value.clone() for key, value in model.state_dict().items()}
        plain = outputs(torch.device("cpu"), torch.float32)
        for precision, dtype in precisions.items():
            if device.type == "cpu" and precision == "fp16":
                continue
            model.load_state_dict(kept)  # batch norms have moved
            for what, ours, theirs in zip(("logits", "gradients"), outputs(device, dtype), plain, strict=True):
                error = float((ours - theirs).norm() / theirs.norm())
                report.add(f"{name} {precision} {what}", error, asked=f"<= {ERRORS[precision]}")


def cuda_tests(report: Report, options: argparse.Namespace) -> None:
    """The tests that are marked with ``gpu``."""
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")
                   if "mark.gpu" in path.read_text(encoding="utf-8"))
    if options.small:
        files = ["tests/optim/test_ema.py"]
    done = subprocess.run([sys.executable, "-m", "pytest", "-rfE", "-m", "gpu", *files], cwd=ROOT, capture_output=True, text=True)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout)}
    for word in ("passed", "skipped"):
        report.add(f"tests {word}", counts.get(word, 0), asked=">= 1" if word == "passed" else "")
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    report.add("tests failed", len(failed) + (not counts), asked="<= 0")
    for name in failed:
        report.add("failed", name)
    if not counts:
        report.add("pytest said", (done.stdout + done.stderr)[-1000:])


# ---- speed -----------------------------------------------------------------------------------------------------------------------

def goals(report: Report, options: argparse.Namespace) -> None:
    """``--throughput`` of every model that has a goal: eager and as graphs, then compiled blocks, for as long as time lasts."""
    names, kinds = ([TINY], KINDS[:2]) if options.small else (list(GOALS), KINDS)
    # The first model in every way before the others.
    for name, kind in [(names[0], kind) for kind in kinds] + [(name, kind) for kind in kinds for name in names[1:]]:
        try:
            measure_model(report, options, name, kind)
        except Exception as error:  # the others still have their turn
            report.add(f"{name} {kind} failed ({str(error)[:100]})", 1, asked="<= 0")


def measure_model(report: Report, options: argparse.Namespace, name: str, kind: str) -> None:
    """Images a second, memory and start of one model trained one way."""
    import torch

    from config import get_config
    from utils.profiling.step_speed import measure
    from utils.runtime.precision import choose_precision
    from utils.tasks.build import build_task
    device = torch.device(options.device)
    config = get_config(None, ["MODEL.TYPE", "timm", "MODEL.NAME", name, "MODEL.NUM_CLASSES", 1000, "COMPILE", kind, "PRECISION",
                               "fp32" if options.small else "bf16", "DATA.BATCH_SIZE", 2 if options.small else 256,
                               "DATA.IMG_SIZE", 32 if options.small else 224])
    for line in measure(build_task(config), config, device, choose_precision(config, device)):
        if found := re.search(r"throughput (forward|training): ([\d.]+) images/s", line):
            goal = f">= {GOALS[name]}" if found[1] == "training" and kind != "off" and name in GOALS and not options.small else ""
            report.add(f"{name} {kind} {found[1]}", float(found[2]), "images/s", goal)
        elif found := re.search(r"peak (\d+) MiB", line):
            report.add(f"{name} {kind} peak", int(found[1]), "MiB")
        elif found := re.search(r"first training step took ([\d.]+) s", line):
            report.add(f"{name} {kind} first step", float(found[1]), "s")
    if device.type == "cuda":
        torch.cuda.empty_cache()


def compile_times(report: Report, options: argparse.Namespace) -> None:
    """The first step of a run with compiled blocks: with nothing compiled before, and with torch's cache of the first run."""
    name, size = (TINY, 32) if options.small else ("crossformer_small", 224)
    with tempfile.TemporaryDirectory() as cache:
        for what, limit in (("cold", 25), ("warm", 8)):
            words = ["--device", options.device, "--throughput", "--batch-size", 2 if options.small else 256, "--compile",
                     "off" if options.small else "blocks", "--img-size", size, "--opts", "MODEL.TYPE", "timm", "MODEL.NAME", name,
                     "MODEL.NUM_CLASSES", 1000]
            output = program(words, env=dict(TORCHINDUCTOR_CACHE_DIR=cache, TRITON_CACHE_DIR=f"{cache}/triton"))
            found = re.search(r"first training step took ([\d.]+) s", output)
            if found:
                report.add(f"{name} first step, {what}", float(found[1]), "s", f"<= {limit}")


def whole_program(report: Report, options: argparse.Namespace) -> None:
    """From JPEG files: ours beside a loop of timm's parts, and beside its own step alone."""
    batch, steps, names = (2, 3, [TINY]) if options.small else (256, 24, ["swin_tiny_patch4_window7_224", "crossformer_small"])
    workers = 0 if options.small else max(1, len(os.sched_getaffinity(0)) - 1)
    for name in names:
        words = [sys.executable, str(ROOT / "scripts/bench_program.py"), "--model", name, "--batch", batch, "--steps", steps, "--rounds", 1,
                 "--workers", workers, "--device", options.device, "--precision", "fp32" if options.small else "bf16"]
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, cwd=ROOT)
        ratio = re.search(r"^ratio ([\d.]+)", done.stdout, re.M)
        if not ratio:
            raise RuntimeError(f"bench_program.py: {done.stdout[-500:]}{done.stderr[-500:]}")
        for who, rate in re.findall(r"(ours|reference) ([\d.]+) images/s", done.stdout.splitlines()[-2]):
            report.add(f"{name} from files, {'timm' if who == 'reference' else who}", float(rate), "images/s")
        report.add(f"{name} from files, ours over timm's", float(ratio[1]), asked="" if options.small else ">= 2")


def quickstart(report: Report, options: argparse.Namespace) -> None:
    """The quick start's run: its accuracy and the seconds it trains."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--cfg", ROOT / "configs/quickstart.yaml", "--device", options.device, "--output", folder,
                 *(["--epochs", 1, "--warmup-epochs", 0] if options.small else ["--compile", "graphs"])]
        output = program(words)
    minutes, seconds, best = re.search(r"finished \d+ epochs in (\d+):(\d+), best top1 ([\d.]+)", output).groups()
    report.add("quick start", 60 * int(minutes) + int(seconds), "s", "" if options.small else "<= 10")
    report.add("quick start top-1", float(best), "%", "" if options.small else ">= 98")


def program(words: list[Any], env: dict[str, str] | None = None) -> str:
    """What ``main.py`` prints.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run([sys.executable, str(ROOT / "main.py"), *map(str, words)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, **(env or {})})
    if done.returncode:
        raise RuntimeError(f"main.py ended with {done.returncode}: {(done.stdout + done.stderr)[-1000:]}")
    return done.stdout + done.stderr


# ---- where time goes -------------------------------------------------------------------------------------------------------------

def profiles(report: Report, options: argparse.Namespace) -> None:
    """scripts/profile_step.py of two models: milliseconds by kind of work."""
    import profile_step
    small = ["DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "2"] if options.small else ["DATA.BATCH_SIZE", "256"]
    for name in [TINY] if options.small else ["crossformer_small", "mpvit_small"]:
        output = io.StringIO()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(output):
            status = profile_step.main(["--device", options.device, "--steps", "2", "--top", "40", "--trace", f"{folder}/trace.json",
                                        "--opts", "MODEL.TYPE", "timm", "MODEL.NAME", name, "MODEL.NUM_CLASSES", "1000", *small])
        if status:
            raise RuntimeError(f"profile_step.py ended with {status}")
        for line in output.getvalue().splitlines():
            if found := re.match(r"(\S.*?) +([\d.]+)(?: +[\d.]+%)?(?: +(\d+))?$", line):
                report.add(f"{name}: {found[1].strip()}" + (f" ({found[3]} calls)" if found[3] else ""), float(found[2]), "ms")


def waits(report: Report, options: argparse.Namespace) -> None:
    """How often the real loop, with its loader, waits for the device between two log lines."""
    import logging

    import torch

    from config import get_config
    from utils.training.engine import Progress, train_one_epoch
    from utils.training.setup import prepare
    with tempfile.TemporaryDirectory() as folder:
        config = get_config(str(ROOT / "configs/quickstart.yaml"), [
            "OUTPUT", folder, "DATA.NUM_WORKERS", 0 if options.small else 2])
        ready = prepare(config, None, torch.device(options.device), logging.getLogger("gpu_check"))
        number, first = (2, 1) if options.small else (12, 4)
        with contextlib.closing(ready.loaders) as loaders, warnings.catch_warnings(record=True) as seen:
            batches = loaders.batches(0)

            def train(until: int) -> None:
                train_one_epoch(ready.state.model, ready.state, batches, until, ready.plan, Progress(ready.device), lambda *_: None)

            train(first)
            warnings.simplefilter("always")
            del seen[:]
            with debug_waits(torch, ready.device.type == "cuda"):
                train(first + number)
            found = [str(warning.message) for warning in seen if "synchroniz" in str(warning.message)]
    report.add(f"waits for the device in {number} steps", len(found), asked="<= 0")


@contextlib.contextmanager
def debug_waits(torch: Any, on: bool) -> Iterator[None]:
    """Have torch warn of every wait of the host for the device."""
    if on:
        torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        if on:
            torch.cuda.set_sync_debug_mode("default")


# ---- the parts -------------------------------------------------------------------------------------------------------------------

# Each with the seconds that it may take; together eight minutes.
PARTS: dict[str, tuple[Callable[[Report, argparse.Namespace], None], int]] = {
    "parity": (parity, 40), "waits": (waits, 20), "goals": (goals, 160), "quickstart": (quickstart, 25), "compile": (compile_times, 50),
    "program": (whole_program, 95), "profile": (profiles, 30), "tests": (cuda_tests, 60)}


def run_part(name: str, options: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Any]], str]:
    """(rows, what went wrong or nothing) of a part in a process of its own, killed with all that it started when its time is up."""
    rows, limit = folder / f"{name}.jsonl", 600 if options.small else PARTS[name][1]
    words = [sys.executable, __file__, "--run", name, "--rows", str(rows), "--device", options.device]
    words += ["--small"] if options.small else []
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=limit)
        wrong = "" if process.returncode == 0 else (output.strip().splitlines() or ["?"])[-1][:300]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        wrong = f"not done after {limit} s"
    return [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()] if rows.exists() else [], wrong


def shown(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.3g}" if abs(value) < 10 and value != int(value) else f"{value:,.0f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="these alone")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models and batches: does everything run?")
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"), help="file for all figures")
    parser.add_argument("--run", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        PARTS[options.run][0](Report(options.rows, options.run), options)
        return 0
    import torch
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("error: torch finds no CUDA GPU here; rehearse with --device cpu --small", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device
    print(f"{name}, torch {torch.__version__}\n{'part':11}{'what':62}{'figure':>12} {'':9}asked", flush=True)
    result: dict[str, Any] = dict(device=name, torch=torch.__version__, small=options.small, parts={}, rows=[])
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        for part in options.parts:
            begun = time.perf_counter()
            rows, wrong = run_part(part, options, Path(folder))
            seconds = round(time.perf_counter() - begun, 1)
            result["parts"][part] = dict(seconds=seconds, wrong=wrong)
            result["rows"] += rows
            for row in rows:
                missed = "" if row["met"] is None else "  met" if row["met"] else "  MISSED"
                print(f"{part:11}{row['what'][:60]:62}{shown(row['value']):>12} {row['unit']:9}{row['asked']}{missed}")
            print(f"{part:11}{'done' if not wrong else f'FAILED: {wrong}'} in {seconds} s", flush=True)
            options.output.write_text(json.dumps(result, indent=1), encoding="utf-8")
    bad = [row["what"] for row in result["rows"] if row["met"] is False]
    failed = [part for part, told in result["parts"].items() if told["wrong"]]
    print(f"{len(result['rows'])} figures in {options.output}; missed: {', '.join(bad) or 'none'}; parts failed: "
          f"{', '.join(failed) or 'none'}")
    return int(bool(bad or failed))


if __name__ == "__main__":
    sys.exit(main())
