"""Number formats of a run: fp32, bf16 or fp16, with autocast and loss scaling."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from yacs.config import CfgNode

from data.messages import Notice


@dataclass
class Precision:
    """Autocast and gradient scaling; both do nothing in fp32, so that training has one path.

    Attributes:
        dtype: fp32, bf16 or fp16, what the forward pass computes in.
        notice: a line for the user when it is not what was asked for.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    notice: str = ""
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        on_gpu = self.dtype == torch.float16 and self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(self.device.type if on_gpu else "cpu", enabled=on_gpu)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    @property
    def name(self) -> str:
        return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 itself (AVX512-BF16 or AMX), oneDNN being there to ask it; emulated, it is slower than fp32."""
    if not torch.backends.mkldnn.is_available():
        return False
    able = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def choose_precision(config: CfgNode, device: torch.device) -> Precision:
    """The precision that the config asks for, or fp32 with a notice where the device lacks it."""
    wanted = config.PRECISION
    if not config.AMP_ENABLE or config.AMP_OPT_LEVEL == "O0":
        wanted = "fp32"
    if wanted == "auto":
        wanted = "fp32"
        if device.type == "cuda":
            wanted = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        elif device.type == "cpu" and cpu_has_bf16():
            wanted = "bf16"
    lacking = (wanted == "fp16" and device.type != "cuda") or (wanted == "bf16" and device.type == "mps") \
        or (wanted == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported())
    if lacking:
        return Precision(device, notice=Notice(f"{wanted} training is not supported on {device.type}; computing in fp32"))
    return Precision(device, {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[wanted])
