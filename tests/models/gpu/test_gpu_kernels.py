"""Triton kernels take over only where they give torch's numbers, and leave with one notice where they do not."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from models.gpu.kernels import Kernels, distance

CPU = torch.device("cpu")


def kernels_with(difference: str, module: object = SimpleNamespace(INTERPRETED=True)) -> Kernels:
    kernels = Kernels("none_such", "sums are computed", lambda device: difference)
    kernels.module = module
    return kernels


def test_kernels_that_give_torchs_numbers_are_used_and_compared_once() -> None:
    compared = []
    kernels = kernels_with("")
    kernels.difference = lambda device: compared.append(device) or ""
    assert [kernels.compute(CPU, lambda k: k is kernels.module, lambda: None) for _ in range(3)] == [True] * 3
    assert compared == [CPU] and kernels.available


@pytest.mark.parametrize("fault", ["other numbers", "raises", "raises later"])
def test_kernels_that_do_not_are_left_with_one_notice(fault: str) -> None:
    kernels = kernels_with("sums are off by 0.5" if fault == "other numbers" else "")
    if fault == "raises":
        kernels.difference = lambda device: 1 / 0

    def ours(module: object) -> str:
        raise RuntimeError("out of registers")

    told = {"other numbers": "0.5", "raises": "ZeroDivision", "raises later": "registers"}[fault]
    with pytest.warns(UserWarning, match=told) as notices:
        assert [kernels.compute(CPU, ours, lambda: "torch's") for _ in range(3)] == ["torch's"] * 3
    assert len(notices) == 1 and not kernels.available


def test_memory_that_does_not_suffice_is_not_a_fault_of_the_kernels() -> None:
    kernels = kernels_with("")

    def ours(module: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        kernels.compute(CPU, ours, lambda: None)
    assert kernels.available


def test_without_triton_or_on_a_cpu_torch_computes() -> None:
    for module in (None, SimpleNamespace(INTERPRETED=False)):
        assert kernels_with("", module).compute(CPU, lambda k: "ours", lambda: "torch's") == "torch's"
    assert Kernels("none_such", "", lambda device: "").module is None


def test_distances() -> None:
    one = torch.ones(4)
    assert distance(1.5 * one, one) == pytest.approx(0.5) and not distance(one / 0, one) < 1 and not distance(one * float("nan"), one) < 1


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_each_file_of_kernels_passes_its_own_comparison() -> None:
    """And does not where its numbers are two hundredths off."""
    code = ("import importlib, torch\n"
            "from models.gpu.kernels import distance\n"
            "cpu = torch.device('cpu')\n"
            "for name in ('linear', 'layer_norm', 'depthwise'):\n"
            "    file = importlib.import_module(f'models.gpu.{name}')\n"
            "    assert file.KERNELS.on(cpu) is not None, file.KERNELS.failed\n"
            "    file.distance = lambda a, b: distance(1.02 * a, b)\n"
            "    assert file.KERNELS.difference(cpu), name\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True,
                          text=True)
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("the interpreter of this Triton (3.6 was seen) fails with this numpy")
    assert done.returncode == 0, done.stderr[-2000:]
