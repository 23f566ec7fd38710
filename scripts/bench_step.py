"""How fast a model trains or infers beside another form of itself, or beside a model of timm.

    python scripts/bench_step.py --model crossformer_tiny --precision bf16 --against textbook --against-precision fp32
    python scripts/bench_step.py --model crossformer_small --precision bf16 --against timm:swin_tiny_patch4_window7_224
    python scripts/bench_step.py --model crossformer_tiny --part embedding     # or update: clip, gradient norm and AdamW

A training step is forward, soft-target cross-entropy, backward, clipping and AdamW, on one batch of noise. Ours and timm's models
are stepped as utils/training/engine.py does it. ``textbook`` is scripts/textbook_crossformer.py at the weights of ours (the logits of
both are compared first), with the step that goes with such code: AdamW tensor by tensor, a number read from the device for each.
Both sides take turns, round by round, in one process; times are medians over the rounds. A round is one step, on CUDA 20, after which
the device is waited for once: after each step that would hide how far the host falls behind. ``--compile graphs`` times the step as one
CUDA graph.

``--apart`` runs the other side in a process of its own with the system's allocator as it comes, as a script without main.py would;
otherwise both have main.py's.

The last lines are ``ratio R``, the other side's time over ours, the median of the rounds' ratios, and against timm ``work R``,
images/s times GMACs over timm's.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from textbook_crossformer import TextbookCrossFormer

import models  # noqa: F401  registers the families with timm
from config import KEY, ConfigError
from models.crossformer import CrossFormer
from utils.profiling.step_speed import multiply_adds
from utils.runtime import memory
from utils.runtime.compile import compile_model, records_steps
from utils.runtime.cuda_graph import CudaRecorder
from utils.runtime.device import choose_device, keep_freed_memory, synchronize
from utils.runtime.precision import Precision
from utils.training.step_graph import WARM_UP

CLIP, LR, DECAY = 5.0, 1e-4, 0.05
STEPS = 20  # of a round on CUDA
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Side:
    """A model and the work that is timed.

    Attributes:
        gmacs: multiply-adds of one image's forward pass, in 1e9.
        peak: MiB that the work takes at its peak beside what stays.
        run: one round of the work; gives the seconds of a step.
        seconds: of each round.
    """

    name: str
    gmacs: float
    peak: float
    run: Callable[[], float]
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


# ---- the work --------------------------------------------------------------------------------------------------------------------

def parameter_groups(model: nn.Module) -> list[dict]:
    """Weight decay on everything but vectors."""
    parameters = list(model.parameters())
    return [dict(params=[p for p in parameters if p.ndim > 1], weight_decay=DECAY),
            dict(params=[p for p in parameters if p.ndim <= 1], weight_decay=0.0)]


def engine_update(model: nn.Module, device: torch.device) -> Callable[[], None]:
    """Clip and apply as utils/training/engine.py does on a CPU or a CUDA GPU."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=LR, fused=True)

    def update() -> None:
        norm = nn.utils.clip_grad_norm_(parameters, CLIP, foreach=True)
        optimizer.grad_scale, optimizer.found_inf = None, (~norm.isfinite()).float()
        for group in optimizer.param_groups:
            group["capturable"] = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        optimizer.step()
    return update


def textbook_update(model: nn.Module) -> Callable[[], None]:
    """Clip, the norm for the log read from the device tensor by tensor, AdamW in a loop."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=LR, foreach=False, fused=False)

    def update() -> None:
        nn.utils.clip_grad_norm_(parameters, CLIP, foreach=False)
        math.sqrt(sum(p.grad.norm(2).item() ** 2 for p in parameters))
        optimizer.step()
    return update


def training_step(model: nn.Module, update: Callable[[], None], images: Tensor, targets: Tensor, precision: Precision,
                  ) -> Callable[[], None]:
    model.train()

    def step() -> None:
        with precision.autocast():
            logits = model(images)
        F.cross_entropy(logits.float(), targets).backward()
        update()
        for parameter in model.parameters():
            parameter.grad = None
    return step


def inference(model: nn.Module, images: Tensor, precision: Precision) -> Callable[[], None]:
    model.eval()

    @torch.inference_mode()
    def forward() -> None:
        with precision.autocast():
            model(images)
    return forward


def embedding_step(model: nn.Module, images: Tensor, precision: Precision) -> Callable[[], None]:
    """Forward and backward pass of the embedding alone."""
    embedding = model.train().patch_embed
    with precision.autocast():
        gradient = torch.randn_like(embedding(images))

    def step() -> None:
        with precision.autocast():
            tokens = embedding(images)
        tokens.backward(gradient)
        embedding.zero_grad(set_to_none=True)
    return step


def update_alone(model: nn.Module, update: Callable[[], None]) -> Callable[[], None]:
    """The update, again and again with the same gradients."""
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    return update


# ---- the two sides ---------------------------------------------------------------------------------------------------------------

def build_side(args: argparse.Namespace, name: str, model: nn.Module, precision: str, compiled: str, device: torch.device) -> Side:
    """The side's model on the device, compiled and warm, with its work as a function."""
    gmacs = multiply_adds(model, (args.img_size, args.img_size)) / 1e9
    model.to(device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch, 3, args.img_size, args.img_size, generator=generator).to(device)
    targets = torch.rand(args.batch, 1000, generator=generator).softmax(dim=1).to(device)
    update = textbook_update(model) if isinstance(model, TextbookCrossFormer) else engine_update(model, device)
    arithmetic = Precision(device, PRECISIONS[precision])
    if args.part == "embedding":
        work = embedding_step(model, images, arithmetic)
    elif args.part == "update":
        work = update_alone(model, update)
    else:
        compile_model(model, compiled)
        work = inference(model, images, arithmetic) if args.inference else training_step(model, update, images, targets, arithmetic)
    repeats, clock = STEPS if device.type == "cuda" else 1, time.perf_counter if args.clock == "wall" else time.process_time

    def run() -> float:
        synchronize(device)
        start = clock()
        for _ in range(repeats):
            work()
        synchronize(device)
        return (clock() - start) / repeats

    work()  # compiles
    peak = peak_of(work, device)
    if records_steps(compiled):
        work = recorded(work, device)
    label = f"{name} {precision}" + (f" compile {compiled}" if compiled != "off" else "")
    return Side(label, gmacs, peak, run)


def recorded(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """``work`` as one CUDA graph, as utils/training/step_graph.py makes a few of a run's step."""
    if device.type != "cuda":
        raise ConfigError(f"--compile graphs is for CUDA, and the device is {device}")
    recorder = CudaRecorder(device)
    for _ in range(WARM_UP):
        _, obstacle = recorder.rehearse(work)
    if obstacle:
        raise ConfigError(f"--compile graphs: {obstacle}")
    return recorder.record(work)[0]


def peak_of(work: Callable[[], None], device: torch.device) -> float:
    """MiB that ``work`` takes at its peak beside what was there before; without CUDA only Linux tells."""
    memory.reset_peak(device)
    before = memory.peak(device, cached=False)
    work()
    return (memory.peak(device, cached=False) - before) / 2 ** 20


def other_model(args: argparse.Namespace, model: nn.Module) -> nn.Module:
    """The model to compare ``model`` with; the textbook's has its weights."""
    if args.against == "textbook":
        return TextbookCrossFormer(model)
    return create(args.model if args.against == "self" else args.against.removeprefix("timm:"))


def other_side(args: argparse.Namespace, model: nn.Module, device: torch.device) -> Side:
    return build_side(args, args.against, model, args.against_precision or args.precision, args.against_compile, device)


def other_side_apart(args: argparse.Namespace) -> Side:
    """The other side in a process of its own, which works when asked."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=_work_apart, args=(there, args), daemon=True).start()
    name, gmacs, peak = here.recv()

    def run() -> float:
        here.send(True)
        return here.recv()
    return Side(name, gmacs, peak, run)


def _work_apart(connection: Connection, args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    side = other_side(args, other_model(args, create(args.model)), choose_device(args.device))
    connection.send((f"{side.name}, apart", side.gmacs, side.peak))
    with contextlib.suppress(EOFError):  # the program has ended
        while connection.recv():
            connection.send(side.run())


# ---- measuring -------------------------------------------------------------------------------------------------------------------

def compare_logits(ours: nn.Module, textbook: nn.Module, size: int) -> str:
    """Errors of both forms on the same images, relative to the largest logit of the textbook in fp32."""
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))

    def error(logits: Tensor) -> float:
        return float((logits - expected).abs().max() / expected.abs().max())

    with torch.no_grad():
        expected = textbook.eval()(images)
        fp32 = error(ours.eval()(images))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours_bf16, textbook_bf16 = error(ours(images)), error(textbook(images))
    return (f"logits: fp32 differ by {fp32:.1e} of the largest; in bf16 from the textbook's fp32: ours {ours_bf16:.1e}, "
            f"textbook {textbook_bf16:.1e}" + ("" if fp32 < 1e-4 else "  NOT EQUAL"))


def measure(sides: list[Side], rounds: int) -> None:
    """Both sides in turn; which goes first alternates."""
    for number in range(rounds):
        for side in sides if number % 2 == 0 else sides[::-1]:
            side.seconds.append(side.run())


def table(sides: list[Side], batch: int) -> Iterator[str]:
    yield f"{'side':44} {'ms':>9} {'spread':>7} {'images/s':>9} {'GMACs':>6} {'x images/s':>10} {'peak MiB':>9}"
    for side in sides:
        speed, spread = batch / side.median, (max(side.seconds) - min(side.seconds)) / side.median
        yield (f"{side.name:44} {1000 * side.median:9.1f} {spread:7.1%} {speed:9.2f} {side.gmacs:6.2f} {speed * side.gmacs:10.1f} "
               f"{side.peak:9.0f}")


def create(name: str) -> nn.Module:
    if not timm.is_model(name):
        raise ConfigError(f"{name!r} is no model of timm {timm.__version__} or of this program; timm.list_models() names them")
    return timm.create_model(name)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"takes a whole number from 1 on, not {text!r}")
    return int(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="crossformer_tiny", help="a name that timm knows, ours among them")
    parser.add_argument("--against", default="textbook", help="textbook, timm:NAME, or self (another precision or compilation)")
    parser.add_argument("--batch", type=positive, default=16)
    parser.add_argument("--img-size", type=positive, default=224)
    parser.add_argument("--device", default="auto")
    for side in ("", "against-"):
        parser.add_argument(f"--{side}precision", choices=tuple(PRECISIONS), default=None if side else "fp32")
        parser.add_argument(f"--{side}compile", choices=KEY["COMPILE"].choices, default="off")
    parser.add_argument("--inference", action="store_true", help="forward passes alone, no gradients")
    parser.add_argument("--part", choices=("step", "embedding", "update"), default="step")
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: seconds of this process, steadier when shared")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--apart", action="store_true", help="the other side in a process of its own, without main.py's allocator settings")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Build both sides, measure them, print the table and the ratios."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    keep_freed_memory()  # as main.py
    device = choose_device(args.device)
    ours = create(args.model)
    if args.against == "textbook":
        if not isinstance(ours, CrossFormer):
            raise ConfigError(f"the textbook form is CrossFormer's alone; for {args.model} use --against timm:NAME or self")
        if args.img_size % 32:
            raise ConfigError(f"--img-size is {args.img_size}; the textbook form takes multiples of 32")
    other = other_model(args, ours)
    if args.against == "textbook":
        print(compare_logits(ours, other, args.img_size))
    if args.part == "embedding" and not (hasattr(ours, "patch_embed") and hasattr(other, "patch_embed")):
        raise ConfigError("--part embedding is for models with one patch_embed, such as CrossFormer's")
    sides = [build_side(args, args.model, ours, args.precision, args.compile, device),
             other_side_apart(args) if args.apart else other_side(args, other, device)]
    for side in sides * 2:  # memory grows to what both need
        side.run()
    measure(sides, args.rounds)
    print("\n".join(table(sides, args.batch)))
    ratios = [b / a for a, b in zip(sides[0].seconds, sides[1].seconds, strict=True)]
    print(f"batch {args.batch}, {args.img_size} pixels, {args.threads} threads, {args.clock} clock, {device}; ratio round by round "
          f"{min(ratios):.2f} to {max(ratios):.2f}")
    ratio = statistics.median(ratios)
    print(f"ratio {ratio:.3f}")
    if args.against.startswith("timm:"):
        print(f"work {ratio * sides[0].gmacs / sides[1].gmacs:.3f}")


def main(argv: list[str] | None = None) -> int:
    try:
        run(parse(argv))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
