"""Triton kernels in place of torch's own operations: imported where they are needed first, tried once, left alone once they fail."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

import torch

T = TypeVar("T")


class Kernels:
    """A file of kernels of this folder, which has ``INTERPRETED``: whether Triton runs them on a CPU (TRITON_INTERPRET=1, in tests).

    Args:
        file: its name.
        work: what is slower without them, for a notice.
        difference: a function of a device, which says in how far their numbers are not torch's there; "" where they are. It is called once
            a device, before their first use.

    Attributes:
        failed: why they are not used any more, or "".
    """

    def __init__(self, file: str, work: str, difference: Callable[[torch.device], str]):
        self.file, self.work, self.difference, self.failed = file, work, difference, ""
        self._tried: set[torch.device] = set()

    @functools.cached_property
    def module(self) -> ModuleType | None:
        """The file, or none without Triton, which takes a second to import, and which a machine need not have."""
        try:
            return importlib.import_module(f"models.gpu.{self.file}")
        except Exception:  # not only ImportError: a Triton that does not fit its torch raises others
            return None

    @property
    def available(self) -> bool:
        """Whether there is a chance: they are there and have not failed."""
        return not self.failed and self.module is not None

    def on(self, device: torch.device) -> ModuleType | None:
        """The kernels for tensors there; none where torch's own operations are to compute."""
        if not self.available or not (device.type == "cuda" or self.module.INTERPRETED):
            return None
        if device not in self._tried:
            self._tried.add(device)  # first: trying them comes by here
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
                problem = problem_of(self.work, lambda: self.difference(device))
            self.failed = self.failed or problem
        return None if self.failed else self.module

    def compute(self, device: torch.device, ours: Callable[[ModuleType], T], plain: Callable[[], T]) -> T:
        """What ``ours`` makes of the kernels where they work on ``device``, else what ``plain`` gives, with one notice of why."""
        kernels = self.on(device)
        if kernels is not None:
            try:
                return ours(kernels)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # Triton compiles at the first call, and raises what its tools do
                self.failed = in_words(error)
                tell(self.work, self.failed)
        return plain()


def problem_of(work: str, difference: Callable[[], str]) -> str:
    """``difference()``, in how far kernels' numbers are not torch's, or why it cannot be known; after a notice that ``work`` is done by
    torch unless it is ""."""
    try:
        problem = difference()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        problem = in_words(error)
    if problem:
        tell(work, problem)
    return problem


def in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def tell(work: str, problem: str) -> None:
    warnings.warn(f"{work} by torch's own kernels, which are slower: Triton's do not work here ({problem})", stacklevel=4)


def distance(ours: torch.Tensor, plain: torch.Tensor) -> float:
    """The norm of the difference over that of ``plain``, computed in fp64; NaN where ``ours`` is not finite."""
    ours, plain = ours.detach().double().flatten(), plain.detach().double().flatten()
    return float((ours - plain).norm() / plain.norm())
