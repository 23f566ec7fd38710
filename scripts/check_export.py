"""Prove that models compile, export and convert, and that each form computes what the model does.

    python scripts/check_export.py                          # every registered model: torch.compile's one graph, torch.export
    python scripts/check_export.py cvt_13 --onnx            # and ONNX with a dynamic batch, checked by onnxruntime
    python scripts/check_export.py crossformer_tiny --backend inductor

ONNX needs the packages of requirements-extras.txt.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import models  # noqa: E402, F401  registers
from config import ConfigError  # noqa: E402
from utils.inference.exporters import LIMIT, difference, require_packages, run_onnx, trace, trace_onnx  # noqa: E402


def check_compile(model: nn.Module, x: Tensor, backend: str) -> Tensor:
    return torch.compile(model, fullgraph=True, backend=backend)(x)


def check_onnx(model: nn.Module, x: Tensor) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        trace_onnx(model, torch.cat([x, x])).save(path)
        return run_onnx(path, x)


def main() -> int:
    known = sorted(name for module in ("crossformer", "cvt", "shunted", "mpvit", "pvt", "galerkin")
                   for name in timm.list_models(module=f"{module}") if timm.model_entrypoint(name).__module__ == f"models.{module}")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=known, help="models; all registered ones by default")
    parser.add_argument("--onnx", action="store_true", help="also convert to ONNX and run it")
    parser.add_argument("--backend", default="aot_eager", help="torch.compile's backend")
    args = parser.parse_args()
    if args.onnx:
        try:
            require_packages()
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    failed = 0
    for name in args.names:
        torch.manual_seed(0)
        model = timm.create_model(name).eval()
        side = model.default_cfg["input_size"][1]
        x = torch.randn(1, 3, side, side)
        with torch.no_grad():
            expected = model(x)
            checks: dict[str, Callable[[], Tensor]] = {
                f"compile ({args.backend})": lambda m=model, x=x: check_compile(m, x, args.backend),
                "export": lambda m=model, x=x: trace(m, torch.cat([x, x])).module()(x)}
            if args.onnx:
                checks["onnx"] = lambda m=model, x=x: check_onnx(m, x)
            for what, check in checks.items():
                torch.compiler.reset()
                begun = time.perf_counter()
                try:
                    off = difference(check(), expected)
                    verdict = "ok" if off < LIMIT else "DIFFERS"
                except Exception as error:  # any failure of the tools is this check's result
                    off, verdict = float("nan"), f"FAILED {type(error).__name__}: {str(error).splitlines()[0][:100]}"
                failed += verdict != "ok"
                print(f"{name} {what}: {verdict}, difference {off:.1e}, {time.perf_counter() - begun:.0f} s", flush=True)
    print(f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
