"""Where the time of a training step goes: a table by kind of work, and a trace for chrome://tracing or ui.perfetto.dev.

    python scripts/profile_step.py --cfg configs/crossformer_t.yaml --batch-size 16 --precision bf16
    python scripts/profile_step.py --cfg configs/swin_t.yaml --device cuda --compile blocks --trace step.json

The step is that of training (mixup, forward, loss, backward, clipping, optimizer, average of weights) on synthetic images, or with
--data on those of DATA.DATA_PATH, loaded as training loads them. Times are those of the operations themselves, on a GPU those of
its kernels; what one operation spends in another counts for that other.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import ConfigError, get_config
from data import DataError
from utils.runtime.compile import compiled_part, require_compiler
from utils.runtime.device import choose_device, synchronize
from utils.runtime.files import require_outputs
from utils.runtime.precision import choose_precision
from utils.tasks.build import build_task
from utils.training.assembly import synthetic_step
from utils.training.engine import Progress, train_one_epoch

WARM_UP = 4  # the last of them is recorded with COMPILE graphs
_WAITING = "waiting for data"

# The first that fits an operation's name is its group.
GROUPS: list[tuple[str, str]] = [
    ("data", _WAITING),
    ("optimizer, clipping, average", r"_fused_|_foreach_|vector_norm|Optimizer|lerp"),
    ("attention", r"bmm|softmax|scaled_dot_product|flash|efficient_attention|fmha"),
    ("linears", r"[Aa]ddmm|::mm$|[Ll]inear|gemm|matmul"),
    ("convolutions", r"conv"),
    ("norms", r"norm"),
    ("compiled, fused", r"triton_|cpp_fused|Torch-Compiled|CompiledF|AOTDispatch"),
    ("autograd's own work", r"autograd::|Backward\d*$"),
    ("copies and reordering", r"copy|clone|cat$|contiguous|index|roll|pad|flip|gather|scatter|im2col|fill|zero|stack|split|select|slice"),
    ("allocations and views", r"empty|resize|new_|view|as_strided|transpose|::t$|::to$|permute|reshape|unbind|expand|squeeze|detach"),
    ("pointwise and sums", r"gelu|relu|silu|sigmoid|add|mul|div|sub|where|sum|mean|exp|log|sqrt|pow|max|min|clamp|rand|bernoulli|isfinite|"
                           r"neg|abs|::([lg][te]|eq|ne)_?$"),
]


def group_of(name: str) -> str:
    """The kind of work that an operation's name tells."""
    return next((group for group, pattern in GROUPS if re.search(pattern, name)), "other")


def table(events: Any, device: torch.device, steps: int, top: int, step: float) -> Iterator[str]:
    """Lines: each group's milliseconds a step and share of the ``step`` milliseconds, then the costliest operations."""
    attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    # On a GPU the time of a kernel stands with the operation that started it, and once more with the kernel.
    rows = [(event.key, getattr(event, attribute) / 1000 / steps, event.count / steps) for event in events
            if event.device_type == torch.autograd.DeviceType.CPU]
    rest = max(0.0, step - sum(ms for _, ms, _ in rows))
    total = step if rest else sum(ms for _, ms, _ in rows)
    groups: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, ms, calls in rows:
        groups[group_of(name)][0] += ms
        groups[group_of(name)][1] += calls
    yield f"{'kind of work':34}{'ms a step':>12}{'share':>9}{'calls a step':>14}"
    for name, (ms, calls) in sorted(groups.items(), key=lambda item: -item[1][0]):
        yield f"{name:34}{ms:12.2f}{100 * ms / total:8.1f}%{calls:14.0f}"
    yield f"{'device idle' if device.type == 'cuda' else 'between operations (Python)':34}{rest:12.2f}{100 * rest / total:8.1f}%"
    yield f"{'together':34}{total:12.2f}"
    yield ""
    yield f"{'operation':64}{'ms a step':>12}{'calls a step':>14}"
    for name, ms, calls in sorted(rows, key=lambda row: -row[1])[:top]:
        yield f"{name[:62]:64}{ms:12.2f}{calls:14.0f}"


def run(args: argparse.Namespace) -> None:
    """Profile the steps, print the table, write the trace."""
    if args.steps < 1:
        raise ConfigError(f"--steps is {args.steps}; it must be at least 1")
    require_outputs([("--trace", args.trace)], [args.cfg])
    flags = {"DEVICE": args.device, "PRECISION": args.precision, "COMPILE": args.compile, "DATA.BATCH_SIZE": args.batch_size}
    config = get_config(args.cfg, [*args.opts, *(item for key, value in flags.items() if value is not None for item in (key, value))])
    device = choose_device(config.DEVICE)
    precision = choose_precision(config, device)
    require_compiler(device, config.COMPILE)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    if compiled_part(config.COMPILE) != "off" and device.type == "cpu":
        import torch._inductor.config as inductor
        inductor.cpp.enable_kernel_profile = True  # or its kernels have no names
    with contextlib.ExitStack() as stack:
        task, loaders = build_task(config), None
        if args.data:
            loaders = stack.enter_context(contextlib.closing(task.build_loaders(config, splits=("train",), device=device)))
        state, plan, batch = synthetic_step(config, task, device, precision, len(loaders.classes) if loaders else None, say=print)
        model, batches = state.model, loaders.batches(0) if loaders else itertools.repeat(batch)

        def watched() -> Iterator[Any]:
            while True:
                with record_function(_WAITING):
                    batch = next(batches)
                yield batch

        def steps(number: int) -> float:
            begun = time.perf_counter()
            train_one_epoch(model, state, watched(), state.step + number, plan, Progress(device), lambda state, progress: None)
            synchronize(device)
            return 1000 * (time.perf_counter() - begun) / number

        steps(WARM_UP)
        plain = steps(args.steps)
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        with profile(activities=activities, acc_events=True) as profiler:
            slowed = steps(args.steps)
    print(f"{config.MODEL.NAME}, batch {config.DATA.BATCH_SIZE}, {precision.name} on {device}, compile {config.COMPILE}: {plain:.1f} ms a "
          f"step ({slowed:.1f} ms under the profiler), mean of {args.steps}\n")
    for line in table(profiler.key_averages(), device, args.steps, args.top, slowed):
        print(line)
    profiler.export_chrome_trace(args.trace)
    print(f"\ntrace: {args.trace} (open it in ui.perfetto.dev)")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", help="YAML file of the model and recipe")
    parser.add_argument("--opts", nargs="*", default=[], metavar="KEY VALUE", help="keys of the config, as in main.py")
    parser.add_argument("--device", help="auto, cpu or cuda")
    parser.add_argument("--precision", help="auto, fp32, bf16 or fp16")
    parser.add_argument("--compile", help="as main.py has it")
    parser.add_argument("--batch-size", help="images of a step")
    parser.add_argument("--data", action="store_true", help="load the images of DATA.DATA_PATH instead of synthetic ones")
    parser.add_argument("--steps", type=int, default=3, help="steps to profile")
    parser.add_argument("--top", type=int, default=12, help="operations to list")
    parser.add_argument("--trace", default="step_trace.json", help="file for the trace (.json or .json.gz)")
    try:
        run(parser.parse_args(argv))
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
