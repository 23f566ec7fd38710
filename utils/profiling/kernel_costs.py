"""What torch's operations launch on a GPU and what they move: a rule for each kind, with the paces that an H200 was seen to reach.

The paces come from one profile, crossformer_small at batch 256 (``measured_steps``), but for those marked as assumed. Here are the parts
that the rules are made of, and those of copies, sums and all that goes element by element; the others are in ``kernel_rules``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

# An H200. The peak of its memory is 4.8 TB/s; 4.0 is what long kernels reach.
BANDWIDTH, PEAK_BANDWIDTH = 4.0e12, 4.8e12
RATES = {torch.bfloat16: 790e12, torch.float16: 790e12, torch.float32: 50e12, torch.float64: 50e12}  # FLOP/s of products
SHORTEST = 2e-6  # seconds that a kernel takes at least
GAP = 1.3e-6  # seconds between two kernels: a step of 90.4 ms had 88.05 ms of them in 1,874 launches
# Seconds of the host for a launch, with the Python before it, on that machine's slow cores: no more than what cvt_13's 2,263 launches left
# of its step, 84 ms. (crossformer_small's compiled step took 53 us a launch, with torch.compile's checks.)
LAUNCH = 37e-6


@dataclass(frozen=True)
class Kernels:
    """What one operation launches.

    Attributes:
        name: the operation that a profiler names.
        shapes: of its tensors, as text.
        launches: kernels.
        read, written: bytes.
        flops: of products of matrices and convolutions.
        least: seconds at the bandwidth and the rate of the GPU.
        expected: seconds as these kernels are known to take.
        assumed: of these, seconds at a pace that was not measured.
    """

    name: str
    shapes: str
    launches: int
    read: int
    written: int
    flops: int
    least: float
    expected: float
    assumed: float = 0.0


def nbytes(value: Any) -> int:
    """Bytes of the tensors in ``value``, each element counted once however often it is broadcast."""
    if isinstance(value, Tensor):
        return value.element_size() * math.prod(size for size, stride in zip(value.shape, value.stride(), strict=True) if stride)
    return sum(map(nbytes, value)) if isinstance(value, (list, tuple)) else 0


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value for t in tensors(part)] if isinstance(value, (list, tuple)) else []


class Call:
    """An operation as it was called, and what it gave."""

    def __init__(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any):
        self.func, self.args, self.kwargs, self.result = func, args, kwargs, result
        self.namespace, _, name = func._schema.name.partition("::")
        self.name = name.removesuffix("_")  # in place or not, the kernel is the same
        self.named = named = {**dict(zip([argument.name for argument in func._schema.arguments], args, strict=False)), **kwargs}
        filled = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        if self.namespace == "aten":  # its operations in place read what they change, but for what stands as ``out``
            filled = {a.name for a in func._schema.arguments if a.is_out}
        self.given = tensors([value for argument, value in named.items() if argument not in filled])
        self.made = tensors(result) or tensors([value for argument, value in named.items() if argument in filled])

    def kernels(self, seconds: Callable[[float], float] | float, *, name: str = "", launches: int = 1, read: Any = None,
                written: Any = None, flops: int = 0, rate: float = RATES[torch.bfloat16], shapes: Any = None, once: int | None = None,
                assumed: bool = False) -> Kernels:
        """What the operation launches.

        Args:
            seconds: what it takes at least, or what makes that of the least seconds at full pace.
            read, written: bytes, or tensors; otherwise those of the call.
            once: bytes read if nothing is read twice, where that is less than ``read``.
            assumed: nobody has measured the pace.
        """
        read = nbytes(self.given) if read is None else read if isinstance(read, int) else nbytes(read)
        written = nbytes(self.made) if written is None else written if isinstance(written, int) else nbytes(written)
        least = max(((read if once is None else once) + written) / BANDWIDTH, flops / rate)
        expected = max(seconds(least) if callable(seconds) else seconds, launches * SHORTEST)
        text = shape_text(self.given if shapes is None else tensors(shapes))
        return Kernels(name or self.name, text, launches, read, written, flops, least, expected, expected * assumed)


def shape_text(given: Sequence[Tensor]) -> str:
    return " ".join(f"{'x'.join(map(str, t.shape)) or '1'}:{str(t.dtype).removeprefix('torch.').replace('float', 'f')}" for t in given[:4])


def at(pace: float) -> Callable[[float], float]:
    """Seconds at that share of the full pace."""
    return lambda least: least / pace


# ---- elementwise -----------------------------------------------------------------------------------------------------------------

VECTORIZED, CONVERTING, GELU = 1.07, 0.75, 0.82  # shares of the bandwidth: contiguous and of one type (the cache helps), of two types, GELU
# Elements a second where operands are broadcast or lie otherwise, alike in bf16 and fp32: an index is computed for each.
BROADCAST, REORDERED, STRIDED = 360e9, 285e9, 0.85


def elementwise(call: Call) -> list[Kernels]:
    """One kernel over all elements; operations in place write what they read first."""
    return [one_pass(call, call.given, call.made)]


def one_pass(call: Call, given: Sequence[Tensor], made: Sequence[Tensor], name: str = "") -> Kernels:
    sized = [t for t in (*given, *made) if t.ndim and t.numel() > 1]
    plain = all(t.shape == sized[0].shape and t.stride() == sized[0].stride() for t in sized) and all(map(dense, sized))
    if plain:
        pace = CONVERTING if len({t.dtype for t in sized}) > 1 else GELU if "gelu" in call.name else VECTORIZED
        return call.kernels(at(pace), read=list(given), written=list(made), name=name)
    elements = max((t.numel() for t in sized), default=0) / (REORDERED if name == "copy" else BROADCAST)
    return call.kernels(lambda least: max(least / STRIDED, elements), read=list(given), written=list(made), name=name)


def dense(x: Tensor) -> bool:
    """Whether the elements lie side by side, in whatever order."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return reach == x.numel() and all(x.stride()[i] for i, size in enumerate(x.shape) if size > 1)


def copy(call: Call) -> list[Kernels]:
    """Copies and conversions."""
    if call.func is aten.copy_.default:
        given, made = call.given[1:2], call.given[:1]
    else:
        given, made = call.given[:1], call.made
    if not (given and given[0].is_cuda and made[0].is_cuda):
        return [call.kernels(at(0.01), name="copy", read=given, written=made)] if made and made[0].is_cuda else []
    return [one_pass(call, given, made, "copy")]


def copy_of(call: Call, x: Tensor, like: Tensor) -> Kernels:
    return one_pass(call, [x], [like], "copy")


def fill(call: Call) -> list[Kernels]:
    return [call.kernels(at(VECTORIZED), name="fill", read=0)]


def fill_and(rule: Callable[[Call], list[Kernels]]) -> Callable[[Call], list[Kernels]]:
    """A result filled with zeros, then written by ``rule``."""
    return lambda call: [*fill(call), *rule(call)]


def cat(call: Call) -> list[Kernels]:
    """Parts whose rows are no multiples of 16 bytes, side by side along the last axis, were seen at a fifth of the pace."""
    parts = call.given
    axis = (call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0)) if call.name == "cat" else 0
    narrow = axis in (-1, parts[0].ndim - 1) and any(t.shape[-1:].numel() * t.element_size() % 16 for t in parts)
    return [call.kernels(at(0.17 if narrow else 0.92), name="cat")]


# ---- sums ------------------------------------------------------------------------------------------------------------------------

def reduction(call: Call) -> list[Kernels]:
    return [sum_of(call, call.given[0], call.made[0], "sum" if call.name == "sum" else call.name)]


def sum_of(call: Call, x: Tensor, y: Tensor, name: str = "sum") -> Kernels:
    """Down the rows of a matrix (the gradient of a bias) blocks wait for each other, by counters that are set to zero before."""
    rows = x.numel() // max(1, y.numel())
    down = x.ndim > 1 and y.numel() > 1 and x.stride(-1) == 1 and y.shape[-1:] == x.shape[-1:]
    wait = min(46e-6, 9e-6 + rows * 0.75e-9) if down and x.is_contiguous() else 3e-6
    pace = 0.75 if x.is_contiguous() else 0.54
    return call.kernels(lambda least: least / pace + wait, read=x, written=y, name=name, shapes=x, launches=1 + (down and rows > 1024))
