"""A model as ONNX or pt2, and how far its outputs are from ours."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from config import ConfigError

LIMIT = 1e-4  # largest difference over the largest logit


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


def trace_onnx(model: nn.Module, images: Tensor, opset: int = 18) -> torch.onnx.ONNXProgram:
    """As ``trace``, an ONNX program with the input ``images`` and the output ``logits``."""
    with quiet_exporter():
        return torch.onnx.export(model, (images,), dynamo=True, input_names=["images"], output_names=["logits"],
                                 dynamic_shapes=_any_batch(), opset_version=opset, verbose=False)


def run_onnx(path: str, images: Tensor) -> Tensor:
    """The logits by onnxruntime on the CPU."""
    return onnx_runner(path)(images)


def onnx_runner(path: str) -> Callable[[Tensor], Tensor]:
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


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
