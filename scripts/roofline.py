"""What a training step launches and moves on a GPU, without one, and what it would take.

    python scripts/roofline.py --model crossformer_small
    python scripts/roofline.py --model mpvit_small --by shape --top 40
    python scripts/roofline.py --model crossformer_small --against 0bcd31b
    python scripts/roofline.py --all

The program's own step (forward, loss, backward, clipping, fused AdamW; bf16 autocast; no mixup) runs on tensors without numbers on a
CUDA device that need not be there. ``roofline`` is the time of each operation at 4.0 TB/s or, for products, 790 TFLOP/s of bf16;
``expected`` that of torch's kernels as an H200 was seen to run them (utils/profiling/kernel_costs.py): the difference is what can be
gained. A step takes what its kernels and the gaps between them take, or what the host takes to launch them, whichever is longer; as a CUDA
graph the kernels alone. ``assumed`` is what is at paces that nobody has measured, ``at half`` the graph's speed with these halved.

``measured`` is of utils/profiling/measured_steps.py, from a GPU, at the commit named there: beside a later form of the program it is
what was, not what is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from yacs.config import CfgNode  # noqa: E402

from config import ConfigError, get_config  # noqa: E402
from utils.profiling import measured_steps as measured  # noqa: E402
from utils.profiling.kernel_costs import LAUNCH, Kernels  # noqa: E402
from utils.profiling.roofline import record, step_seconds, sums, total  # noqa: E402

FAMILIES = ("crossformer_tiny", "crossformer_small", "crossformer_base", "crossformer_pp_small", "swin_tiny", "cvt_13", "pvt_small",
            "shunted_s", "mpvit_small")
NAME = 34


def config_of(model: str, batch: int) -> CfgNode:
    """The recipe of configs/ for that model, or the model alone where there is none, without mixup.

    Raises:
        ConfigError: there is no such model.
    """
    opts = ["DATA.BATCH_SIZE", str(batch), "AUG.MIXUP_PROB", "0.0"]
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        config = get_config(str(path), opts)
        if model == config.MODEL.NAME:
            return config
    return get_config(None, ["MODEL.TYPE", "timm", "MODEL.NAME", model, *opts])


def of_revision(revision: str, arguments: list[str]) -> dict[str, Any]:
    """What this script says of the program as it was at ``revision``.

    Raises:
        ConfigError: git does not know it, or its program cannot be run so.
    """
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "-C", str(ROOT), "archive", revision], capture_output=True)
        if archive.returncode:
            raise ConfigError(f"--against {revision}: git has no such revision ({archive.stderr.decode().strip()})")
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        for own in ("scripts/roofline.py", *(f"utils/profiling/{name}.py" for name in
                                            ("roofline", "kernel_costs", "kernel_rules", "fake_gpu", "measured_steps"))):
            shutil.copy(ROOT / own, Path(folder) / own)
        result = Path(folder) / "result.json"
        done = subprocess.run([sys.executable, str(Path(folder) / "scripts/roofline.py"), *arguments, "--json", str(result)],
                              capture_output=True, text=True)
        if done.returncode:
            raise ConfigError(f"--against {revision}: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}")
        return json.loads(result.read_text())


def numbers(row: Kernels) -> str:
    return (f"{row.launches:9d}{row.read / 1e9:9.2f}{row.written / 1e9:9.2f}{row.flops / 1e12:8.2f}{1e3 * row.least:10.2f}"
            f"{1e3 * row.expected:10.2f}")


def table(kernels: list[Kernels], by: str, top: int, known: dict[str, float], before: dict[str, Any] | None) -> Iterator[str]:
    """Lines: each operation, the longest first, then all together."""
    whole, rows = total(kernels), sums(kernels, "shapes" if by == "shape" else "name")
    then = {row["name"]: row for row in before["operations"]} if before else {}
    extra = f"{'measured':>10}" * bool(known) + f"{'before':>10}{'launches':>10}" * bool(then)
    yield (f"{'operation':{NAME}}{'launches':>9}{'GB read':>9}{'written':>9}{'TFLOP':>8}{'roofline':>10}{'expected':>10}{'share':>7}"
           f"{extra}  ms")
    for row in rows[:top]:
        line = f"{row.name:{NAME}}{numbers(row)}{100 * row.expected / whole.expected:6.1f}%"
        if known:
            line += f"{known[row.name]:10.2f}" if row.name in known else f"{'':10}"
        if row.name in then:
            line += f"{1e3 * then[row.name]['expected']:10.2f}{then[row.name]['launches']:10d}"
        yield f"{line}  {row.shapes}".rstrip()
    for name in [name for name in then if name not in {row.name for row in rows}][:top]:
        yield f"{name:{NAME}}{'gone':>9}{'':52}{'':10}{1e3 * then[name]['expected']:{10 * bool(known) + 3}.2f}{then[name]['launches']:10d}"
    line = f"{'together':{NAME}}{numbers(whole)}{100:6.1f}%" + (f"{measured.MILLISECONDS:10.2f}" if known else "")
    yield line + (f"{1e3 * before['together']['expected']:10.2f}{before['together']['launches']:10d}" if before else "")


def speeds(whole: Kernels, batch: int) -> Iterator[str]:
    """Lines: images a second, launched one by one and as a graph, and how much of it nobody has measured."""
    kernels, host = 1e3 * whole.expected, 1e3 * whole.launches * LAUNCH
    yield (f"{batch / step_seconds(whole):.0f} images/s eager, bound by {'the host' if host > kernels else 'kernels'} (kernels "
           f"{kernels:.1f} ms, launches {host:.1f} ms at {1e6 * LAUNCH:.0f} us each); {batch / step_seconds(whole, graphs=True):.0f} as a "
           f"CUDA graph; {batch / whole.least:.0f} at the roofline")
    halved = batch / step_seconds(whole, graphs=True, pessimistic=True)
    yield (f"{1e3 * whole.assumed:.1f} ms of the kernels are at paces that nobody has measured; at half these paces: "
           f"{kernels + 1e3 * whole.assumed:.1f} ms, {halved:.0f} images/s as a CUDA graph")


def run_one(args: argparse.Namespace) -> dict[str, Any]:
    """One model, operation by operation."""
    kernels = record(config_of(args.model, args.batch), args.inference)
    before = of_revision(args.against, arguments(args)) if args.against else None
    comparable = (args.model, args.batch, args.inference) == (measured.MODEL, measured.BATCH, False) and args.by == "operation"
    work = "a forward pass" if args.inference else "a training step"
    print(f"{work} of {args.model}, batch {args.batch}, bf16, on an H200 by the roofline (nothing was measured here)\n")
    for line in table(kernels, args.by, args.top, measured.BY_OPERATION if comparable else {}, before):
        print(line)
    whole = total(kernels)
    print("", *speeds(whole, args.batch), sep="\n")
    if comparable:
        print(f"measured at {measured.COMMIT}: {measured.LAUNCHES} launches, {measured.MILLISECONDS:.1f} ms of kernels, "
              f"{measured.IMAGES_PER_SECOND[args.model]:.0f} images/s")
    return {"model": args.model, "batch": args.batch, "operations": [dataclasses.asdict(row) for row in sums(kernels)],
            "together": dataclasses.asdict(whole)}


def run_all(args: argparse.Namespace) -> dict[str, Any]:
    """A line for a model of each family."""
    before = of_revision(args.against, arguments(args)) if args.against else None
    known = measured.IMAGES_PER_SECOND if (args.batch, args.inference) == (measured.BATCH, False) else {}
    print(f"{'ms, images/s':22}{'launches':>9}{'GB':>7}{'TFLOP':>7}{'roofline':>9}{'kernels':>9}{'assumed':>9}{'host':>7}{'eager':>8}"
          f"{'graph':>7}{'at half':>8}" + f"{'before: launches, kernels, eager':>34}" * bool(before) + f"{'measured':>10}" * bool(known))
    rows = {}
    for model in FAMILIES:
        whole = total(record(config_of(model, args.batch), args.inference))
        rows[model] = dataclasses.asdict(whole)
        line = (f"{model:22}{whole.launches:9d}{(whole.read + whole.written) / 1e9:7.1f}{whole.flops / 1e12:7.2f}{1e3 * whole.least:9.1f}"
                f"{1e3 * whole.expected:9.1f}{1e3 * whole.assumed:9.1f}{1e3 * whole.launches * LAUNCH:7.1f}"
                f"{args.batch / step_seconds(whole):8.0f}{args.batch / step_seconds(whole, graphs=True):7.0f}"
                f"{args.batch / step_seconds(whole, graphs=True, pessimistic=True):8.0f}")
        if before:
            then = Kernels(**before["models"][model])
            line += f"{then.launches:14d}{1e3 * then.expected:10.1f}{args.batch / step_seconds(then):10.0f}"
        print(line + (f"{known[model]:10.0f}" if model in known else ""), flush=True)
    return {"batch": args.batch, "models": rows}


def arguments(args: argparse.Namespace) -> list[str]:
    """What the same figures are asked for with."""
    return [*(["--all"] if args.all else ["--model", args.model]), "--batch", str(args.batch), *(["--inference"] if args.inference else [])]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=measured.MODEL, help="a model of configs/, or timm's name of one")
    parser.add_argument("--all", action="store_true", help="a line for a model of each family instead")
    parser.add_argument("--batch", type=int, default=256, help="images of a step")
    parser.add_argument("--inference", action="store_true", help="a forward pass in evaluation instead of a training step")
    parser.add_argument("--by", choices=("operation", "shape"), default="operation", help="what a line is")
    parser.add_argument("--top", type=int, default=24, help="operations to list")
    parser.add_argument("--against", metavar="REVISION", help="also as the program was at that revision of git")
    parser.add_argument("--json", help="file for all figures")
    args = parser.parse_args(argv)
    try:
        if args.batch < 1:
            raise ConfigError(f"--batch is {args.batch}; it must be at least 1")
        figures = (run_all if args.all else run_one)(args)
        if args.json:
            Path(args.json).write_text(json.dumps(figures, indent=1))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
