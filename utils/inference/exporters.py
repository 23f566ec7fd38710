"""A model as ONNX or pt2, and how far its outputs are from ours."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from config import ConfigError, ProgramError

LIMIT = 1e-4  # largest difference over the largest logit


class ExportError(ProgramError):
    """The model cannot be exported, or the export computes something else."""


class Normalised(nn.Module):
    """A model that takes pixels: (N, C, H, W), uint8, scaled to 0..1 and normalised inside."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: list[float], std: list[float]):
        super().__init__()
        self.model = model
        self.register_buffer("mean", 255 * torch.tensor(mean)[:, None, None])
        self.register_buffer("std", 255 * torch.tensor(std)[:, None, None])

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model((pixels.float() - self.mean) / self.std)


@contextlib.contextmanager
def explained(config: CfgNode, what: str) -> Iterator[None]:
    try:
        yield
    except (ProgramError, OSError):
        raise
    except Exception as error:  # the exporters raise anything where a model does what they do not know
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise ExportError(f"{config.MODEL.NAME} cannot be exported by {what} ({type(error).__name__}: {reason}); another form may do"
                          + (f", or EXPORT.OPSET 18 in place of {config.EXPORT.OPSET}" if config.EXPORT.OPSET > 18 else "")) from None


_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def require_packages() -> None:
    """Raise ``ConfigError`` unless the packages for ONNX are there."""
    for name in _ONNX_PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError:
            raise ConfigError(f"ONNX needs the package {name}, which is not installed here; "
                              "pip install -r requirements-extras.txt") from None


# --------------------------------------------------------------------------------------------------
# Tracing, shared with scripts/check_export.py
# --------------------------------------------------------------------------------------------------

def trace(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """torch.export of ``model`` for any batch size of images like ``images`` (two or more: one would be taken for a constant)."""
    with quiet_exporter():
        return torch.export.export(model, (images,), dynamic_shapes=_any_batch())


def trace_onnx(model: nn.Module, images: Tensor, opset: int = 18, outputs: Sequence[str] = ("logits",)) -> torch.onnx.ONNXProgram:
    """As ``trace``, an ONNX program with the input ``images`` and the ``outputs``."""
    with quiet_exporter():
        return torch.onnx.export(model, (images,), dynamo=True, input_names=["images"], output_names=list(outputs),
                                 dynamic_shapes=_any_batch(), opset_version=opset, verbose=False)


def run_onnx(path: str, images: Tensor) -> Tensor:
    """The logits by onnxruntime on the CPU."""
    return onnx_runner(path)(images)


def onnx_runner(path: str) -> Callable[[Tensor], Tensor]:
    """What gives the first output."""
    run = onnx_outputs(path)
    return lambda images: run(images)[0]


def onnx_outputs(path: str) -> Callable[[Tensor], list[Tensor]]:
    """What gives every output, by onnxruntime on the CPU."""
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})]


def _any_batch() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("batch", min=1)},)


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """The exporters warn and log about their own inner life."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value that was expected."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
