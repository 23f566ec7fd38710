"""How fast a model trains or infers beside another form of itself, or beside a model of timm.

    python scripts/bench_step.py --model crossformer_tiny --precision bf16 --against textbook --against-precision fp32
    python scripts/bench_step.py --model crossformer_small --precision bf16 --against timm:swin_tiny_patch4_window7_224
    python scripts/bench_step.py --model crossformer_tiny --part embedding     # or update: clip, gradient norm and AdamW

A training step is forward, soft-target cross-entropy, backward, clipping and AdamW, on images made up once. Ours and timm's models
are stepped as utils/training/engine.py does it. ``textbook`` is CrossFormer written down as the paper has it, at the weights of ours (the
logits of both are compared first), with the step that goes with such code: AdamW tensor by tensor, a number read from the device
for each. Both sides take turns, round by round, in one process; times are medians over the rounds.

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

import models  # noqa: F401  registers the families with timm
from config import ConfigError
from models import crossformer
from utils.profiling.step_speed import multiply_adds
from utils.runtime import memory
from utils.runtime.compile import compile_model
from utils.runtime.device import choose_device, keep_freed_memory, synchronize
from utils.runtime.precision import Precision

CLIP, LR, DECAY = 5.0, 1e-4, 0.05
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ---- CrossFormer as the paper writes it: modules and names of ours, every formula taken literally --------------------------------

class TextbookEmbedding(nn.Module):
    """Cross-scale embedding: one strided convolution a kernel, concatenated. (B, 3, H, W) -> (B, H/4 * W/4, C)."""

    def __init__(self, ours: crossformer.CrossScaleEmbedding):
        super().__init__()
        self.projs = nn.ModuleList(like(proj) for proj in ours.projs)
        self.norm = like(ours.norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.cat([proj(x).flatten(2).transpose(1, 2) for proj in self.projs], dim=2))


class TextbookMerging(nn.Module):
    """Cross-scale embedding between stages. (B, H, W, C) -> (B, H/2 * W/2, 2C)."""

    def __init__(self, ours: crossformer.PatchMerging):
        super().__init__()
        self.norm = like(ours.norm)
        self.reductions = nn.ModuleList(like(reduction) for reduction in ours.reductions)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x).permute(0, 3, 1, 2)
        return torch.cat([reduction(x).flatten(2).transpose(1, 2) for reduction in self.reductions], dim=2)


class TextbookAttention(nn.Module):
    """Attention in groups of (B*groups, N, C) with a dynamic position bias computed from its offsets each time."""

    def __init__(self, ours: crossformer.Attention):
        super().__init__()
        self.heads, self.scale = ours.num_heads, ours.scale
        self.qkv, self.proj = like(ours.qkv), like(ours.proj)
        self.pos = crossformer.DynamicPositionBias(ours.pos.pos_proj.out_features, ours.num_heads)

    def bias(self, group: int, device: torch.device) -> Tensor:
        """(h, N, N)"""
        side = torch.arange(1 - group, group, device=device)
        offsets = torch.stack(torch.meshgrid(side, side, indexing="ij")).flatten(1).transpose(0, 1).float()
        line = torch.arange(group, device=device)
        places = torch.stack(torch.meshgrid(line, line, indexing="ij")).flatten(1)
        apart = (places[:, :, None] - places[:, None, :]).permute(1, 2, 0) + group - 1
        rows = apart[..., 0] * (2 * group - 1) + apart[..., 1]
        bias = self.pos(offsets)[rows.view(-1)].view(group * group, group * group, -1)
        return bias.permute(2, 0, 1).contiguous()

    def forward(self, x: Tensor, group: int, mask: Tensor | None) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        logits = (q * self.scale) @ k.transpose(-2, -1)
        logits = logits + self.bias(group, x.device).unsqueeze(0)
        if mask is not None:  # (groups, N)
            logits = logits.view(-1, len(mask), self.heads, tokens, tokens) + mask[None, :, None, None, :]
            logits = logits.view(-1, self.heads, tokens, tokens)
        x = (logits.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, tokens, dim)
        return self.proj(x)


class TextbookMlp(nn.Module):
    def __init__(self, ours: nn.Module):
        super().__init__()
        self.fc1, self.fc2 = like(ours.fc1), like(ours.fc2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class TextbookBlock(nn.Module):
    """Short or long distance attention and MLP beside skips, possibly amplitude cooling. (B, H*W, C) -> the same."""

    def __init__(self, ours: crossformer.Block):
        super().__init__()
        self.group, self.interval = ours.group_size, ours.interval
        self.norm1, self.norm2 = like(ours.norm1), like(ours.norm2)
        self.attn, self.mlp = TextbookAttention(ours.attn), TextbookMlp(ours.mlp)
        self.rate = getattr(ours.drop_path, "drop_prob", 0.0)
        self.ex_conv = None if ours.ex_conv is None else like(ours.ex_conv)
        self.ex_ln = None if ours.ex_ln is None else like(ours.ex_ln)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        batch, _, dim = x.shape
        y = self.norm1(x).view(batch, height, width, dim)
        group, interval = self.group, self.interval
        if min(height, width) <= group:
            group, interval = min(height, width), 1
        span, mask = group * interval, None
        bottom, right = -height % span, -width % span
        if bottom or right:
            y = F.pad(y, (0, 0, 0, right, 0, bottom))
            mask = F.pad(torch.zeros(1, height, width, 1, device=x.device), (0, 0, 0, right, 0, bottom), value=crossformer.PADDED_KEY)
            mask = self.group_tokens(mask, group, interval).reshape(-1, group * group)
        tall, wide = height + bottom, width + right
        y = self.attn(self.group_tokens(y, group, interval).reshape(-1, group * group, dim), group, mask)
        y = self.ungroup(y, batch, tall, wide, group, interval)[:, :height, :width].contiguous()
        x = x + self.drop_path(y.view(batch, height * width, dim))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        if self.ex_conv is not None:
            y = self.ex_conv(x.view(batch, height, width, dim).permute(0, 3, 1, 2))
            x = self.ex_ln(y.permute(0, 2, 3, 1).reshape(batch, height * width, dim))
        return x

    @staticmethod
    def group_tokens(x: Tensor, group: int, interval: int) -> Tensor:
        batch, height, width, dim = x.shape
        if interval == 1:  # neighbours
            return x.reshape(batch, height // group, group, width // group, group, dim).permute(0, 1, 3, 2, 4, 5)
        rows, columns = height // (group * interval), width // (group * interval)
        x = x.reshape(batch, rows, group, interval, columns, group, interval, dim)
        return x.permute(0, 1, 4, 3, 6, 2, 5, 7)

    @staticmethod
    def ungroup(x: Tensor, batch: int, height: int, width: int, group: int, interval: int) -> Tensor:
        if interval == 1:
            x = x.reshape(batch, height // group, width // group, group, group, -1).permute(0, 1, 3, 2, 4, 5)
        else:
            rows, columns = height // (group * interval), width // (group * interval)
            x = x.reshape(batch, rows, columns, interval, interval, group, group, -1).permute(0, 1, 5, 3, 2, 6, 4, 7)
        return x.reshape(batch, height, width, -1)

    def drop_path(self, x: Tensor) -> Tensor:
        if not self.rate or not self.training:
            return x
        keep = 1 - self.rate
        return x.div(keep) * (keep + torch.rand(len(x), 1, 1, dtype=x.dtype, device=x.device)).floor()


class TextbookStage(nn.Module):
    def __init__(self, ours: crossformer.Stage):
        super().__init__()
        self.blocks = nn.ModuleList(TextbookBlock(block) for block in ours.blocks)
        if hasattr(ours, "downsample"):
            self.downsample = TextbookMerging(ours.downsample)


class Textbook(nn.Module):
    """The classifier, with the weights of ``ours``; for the published variants, at sizes that need no padding of tokens."""

    def __init__(self, ours: crossformer.CrossFormer):
        super().__init__()
        self.stride = ours.patch_embed.stride
        self.patch_embed = TextbookEmbedding(ours.patch_embed)
        self.layers = nn.ModuleList(TextbookStage(stage) for stage in ours.layers)
        self.norm, self.head = like(ours.norm), like(ours.head)
        self.load_state_dict(ours.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2] // self.stride, x.shape[3] // self.stride
        x = self.patch_embed(x)
        for stage in self.layers:
            for block in stage.blocks:
                x = block(x, height, width)
            if hasattr(stage, "downsample"):
                x = stage.downsample(x.view(len(x), height, width, -1))
                height, width = height // 2, width // 2
        return self.head(self.norm(x).mean(dim=1))


def like(module: nn.Module) -> nn.Module:
    """A layer of torch's own with the sizes of ``module``."""
    if isinstance(module, nn.Linear):
        return nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    if isinstance(module, nn.LayerNorm):
        return nn.LayerNorm(module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.Conv2d):
        return nn.Conv2d(module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding, groups=module.groups)
    return nn.Identity()


# ---- one side of the comparison --------------------------------------------------------------------------------------------------

@dataclass
class Side:
    """A model and the work that is timed.

    Attributes:
        gmacs: multiply-adds of one image's forward pass, in 1e9.
        memory: MiB that one round of the work takes at its peak beside what stays.
        timed: one round of the work, its seconds.
        seconds: of each round.
    """

    name: str
    gmacs: float
    memory: float
    timed: Callable[[], float]
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def groups_of(model: nn.Module) -> list[dict]:
    """Weight decay on everything but vectors."""
    parameters = list(model.parameters())
    return [dict(params=[p for p in parameters if p.ndim > 1], weight_decay=DECAY),
            dict(params=[p for p in parameters if p.ndim <= 1], weight_decay=0.0)]


def our_update(model: nn.Module) -> Callable[[], None]:
    """Clip and apply as utils/training/engine.py does on a CPU or a CUDA GPU."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(groups_of(model), lr=LR, fused=True)

    def update() -> None:
        norm = nn.utils.clip_grad_norm_(parameters, CLIP, foreach=True)
        optimizer.grad_scale, optimizer.found_inf = None, (~norm.isfinite()).float()
        optimizer.step()
    return update


def textbook_update(model: nn.Module) -> Callable[[], None]:
    """Clip, the norm for the log read from the device tensor by tensor, AdamW in a loop."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(groups_of(model), lr=LR, foreach=False, fused=False)

    def update() -> None:
        nn.utils.clip_grad_norm_(parameters, CLIP, foreach=False)
        math.sqrt(sum(p.grad.norm(2).item() ** 2 for p in parameters))
        optimizer.step()
    return update


def training_step(model: nn.Module, update: Callable[[], None], images: Tensor, targets: Tensor, precision: str) -> Callable[[], None]:
    model.train()

    def work() -> None:
        with autocast(images.device, precision):
            logits = model(images)
        F.cross_entropy(logits.float(), targets).backward()
        update()
        for parameter in model.parameters():
            parameter.grad = None
    return work


def inference(model: nn.Module, images: Tensor, precision: str) -> Callable[[], None]:
    model.eval()

    @torch.inference_mode()
    def work() -> None:
        with autocast(images.device, precision):
            model(images)
    return work


def embedding_step(model: nn.Module, images: Tensor, precision: str) -> Callable[[], None]:
    embedding = model.train().patch_embed
    with autocast(images.device, precision):
        gradient = torch.randn_like(embedding(images))

    def work() -> None:
        with autocast(images.device, precision):
            y = embedding(images)
        y.backward(gradient)
        embedding.zero_grad(set_to_none=True)
    return work


def update_only(model: nn.Module, update: Callable[[], None]) -> Callable[[], None]:
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    return update


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    return Precision(device, PRECISIONS[precision]).autocast()


def build_side(args: argparse.Namespace, name: str, model: nn.Module, precision: str, compiled: str, device: torch.device) -> Side:
    """The side's model on the device, compiled and warm, with its step as a function."""
    gmacs = multiply_adds(model, (args.img_size, args.img_size)) / 1e9
    model.to(device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch, 3, args.img_size, args.img_size, generator=generator).to(device)
    targets = torch.rand(args.batch, 1000, generator=generator).softmax(dim=1).to(device)
    textbook = isinstance(model, Textbook)
    update = textbook_update(model) if textbook else our_update(model)
    if args.part == "embedding":
        work = embedding_step(model, images, precision)
    elif args.part == "update":
        work = update_only(model, update)
    else:
        compile_model(model, compiled)
        work = inference(model, images, precision) if args.inference else training_step(model, update, images, targets, precision)
    said = f"{name} {precision}" + (f" compile {compiled}" if compiled != "off" else "")
    clock = time.perf_counter if args.clock == "wall" else time.process_time

    def timed() -> float:
        synchronize(device)
        begun = clock()
        work()
        synchronize(device)
        return clock() - begun

    work()  # compiles
    peak = peak_of(work, device)
    return Side(said, gmacs, peak, timed)


def their_model(args: argparse.Namespace, ours: nn.Module) -> nn.Module:
    """The model to compare with; the textbook's has the weights of ``ours``."""
    if args.against == "textbook":
        return Textbook(ours)
    return create(args.model if args.against == "self" else args.against.removeprefix("timm:"))


def other_side(args: argparse.Namespace, model: nn.Module, device: torch.device) -> Side:
    return build_side(args, args.against, model, args.against_precision or args.precision, args.against_compile, device)


def apart(args: argparse.Namespace) -> Side:
    """The other side in a process of its own, which works when asked."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    multiprocessing.get_context("spawn").Process(target=_work_apart, args=(there, args), daemon=True).start()
    name, gmacs, peak = here.recv()

    def timed() -> float:
        here.send(True)
        return here.recv()
    return Side(name, gmacs, peak, timed)


def _work_apart(connection: Connection, args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    side = other_side(args, their_model(args, create(args.model)), choose_device(args.device))
    connection.send((f"{side.name}, apart", side.gmacs, side.memory))
    with contextlib.suppress(EOFError):  # the program has ended
        while connection.recv():
            connection.send(side.timed())


# ---- measuring -------------------------------------------------------------------------------------------------------------------

def compare(ours: nn.Module, theirs: nn.Module, size: int) -> str:
    """Both forms on the same images, in fp32 and both ways of evaluation and training without drop path."""
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, logits = theirs.eval()(images), ours.eval()(images)
        off = float((logits - expected).abs().max() / expected.abs().max())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours16, theirs16 = (float((model(images) - expected).abs().max() / expected.abs().max()) for model in (ours, theirs))
    return (f"logits: fp32 apart by {off:.1e} of the largest; in bf16 from the textbook's fp32: ours {ours16:.1e}, textbook {theirs16:.1e}"
            + ("" if off < 1e-4 else "  NOT EQUAL"))


def measure(sides: list[Side], rounds: int) -> None:
    """Both sides in turn, the first of a round changing."""
    for number in range(rounds):
        for side in sides if number % 2 == 0 else sides[::-1]:
            side.seconds.append(side.timed())


def peak_of(work: Callable[[], None], device: torch.device) -> float:
    """MiB that ``work`` takes at its peak beside what was there before; without CUDA a matter of Linux alone."""
    memory.reset_peak(device)
    before = memory.peak(device)
    work()
    return (memory.peak(device) - before) / 2 ** 20


def table(sides: list[Side], batch: int) -> Iterator[str]:
    yield f"{'side':44} {'ms':>9} {'spread':>7} {'images/s':>9} {'GMACs':>6} {'x images/s':>10} {'peak MiB':>9}"
    for side in sides:
        speed, spread = batch / side.median, (max(side.seconds) - min(side.seconds)) / side.median
        yield (f"{side.name:44} {1000 * side.median:9.1f} {spread:7.1%} {speed:9.2f} {side.gmacs:6.2f} {speed * side.gmacs:10.1f} "
               f"{side.memory:9.0f}")


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
        parser.add_argument(f"--{side}compile", choices=("off", "model", "blocks"), default="off")
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
        if not isinstance(ours, crossformer.CrossFormer):
            raise ConfigError(f"the textbook form is CrossFormer's alone; for {args.model} use --against timm:NAME or self")
        if args.img_size % 32:
            raise ConfigError(f"--img-size is {args.img_size}; the textbook form takes multiples of 32")
    theirs = their_model(args, ours)
    if args.against == "textbook":
        print(compare(ours, theirs, args.img_size))
    if args.part == "embedding" and not (hasattr(ours, "patch_embed") and hasattr(theirs, "patch_embed")):
        raise ConfigError("--part embedding is for models with one patch_embed, such as CrossFormer's")
    sides = [build_side(args, args.model, ours, args.precision, args.compile, device),
             apart(args) if args.apart else other_side(args, theirs, device)]
    for side in sides * 2:  # memory grows to what both need
        side.timed()
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
