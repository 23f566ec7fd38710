"""Data-parallel training: what is exchanged between processes, and when."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import ROOT, environment, torchrun

# Run by two processes; an assertion that fails ends with a traceback and a status.
_STEPS = '''
import sys
sys.path.insert(0, {root!r})
import copy
import torch
from torch import nn
from config import get_config
from models.crossformer import CrossFormer
from utils.runtime import compile, distributed
from utils.runtime.precision import Precision
from utils.tasks.classification import Classification
from utils.training.engine import StepPlan, backward

CPU = torch.device("cpu")
distributed.init(CPU)
rank = distributed.rank()
images, targets = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


def gradients(model, x, y, world_size, micro):
    plan = StepPlan(Classification(get_config()), None, None, Precision(CPU), CPU, micro, 8, 1.0, 0, 0, world_size)
    model.train()
    for step in range(2):  # a static graph is known from the second on
        model.zero_grad(set_to_none=True)
        loss = backward(model, (x, y), plan, step)
    return torch.cat([p.grad.flatten() for p in model.parameters()]), loss


def tiny(unit=""):
    torch.manual_seed(0)
    model = CrossFormer(embed_dim=16, depths=(1, 2), num_heads=(1, 2), group_size=(4, 4), interval=(2, 1), merge_size=((2, 4),),
                        num_classes=3, drop_path_rate=0.0)
    model.set_grad_checkpointing(bool(unit), unit)
    return model


expected, _ = gradients(tiny(), images, targets, 1, 8)
mine = slice(4 * rank, 4 * rank + 4)
for micro, compression, how, unit in ((4, "off", "off", "stage"), (2, "off", "off", ""), (4, "bf16", "off", ""),
                                      (2, "off", "blocks", "block"), (4, "off", "model", "")):
    case = (micro, compression, how, unit)
    model = tiny(unit)
    compile.compile_model(model, how, "eager")
    parallel = distributed.wrap(model, CPU, 4 // micro, compression)
    assert parallel.gradient_as_bucket_view and not parallel.find_unused_parameters and not parallel.will_sync_module_buffers()
    found, loss = gradients(parallel, images[mine], targets[mine], 2, micro)
    error = float((found - expected).norm() / expected.norm())
    assert (1e-4 < error < 1e-2) if compression == "bf16" else error < 1e-5, (case, error)
    assert all(torch.equal(found, torch.tensor(other)) for other in distributed.gather_objects(found.tolist())), case

# A loss that is not finite on one rank is known to all, in half precision too.
model = distributed.wrap(tiny(), CPU, 1, "bf16")
broken = images[mine] * (float("nan") if rank else 1.0)
assert not gradients(model, broken, targets[mine], 2, 4)[0].norm().isfinite()
distributed.shutdown()
print("done")
'''


def test_gradients_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    """With and without accumulation, checkpointing and compilation; exchanged in bf16, as near as that rounds."""
    (tmp_path / "steps.py").write_text(_STEPS.format(root=str(ROOT)))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "steps.py"],
                          cwd=tmp_path, env=environment(CUDA_VISIBLE_DEVICES=""), capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0 and done.stdout.count("done") == 2, done.stderr[-3000:]


def test_compression_is_of_the_recipe(tiny_cfg: Path, program) -> None:
    half = ("--cfg", tiny_cfg, "--opts", "TRAIN.GRAD_COMPRESSION", "bf16")
    assert torchrun(*half, "--epochs", 1, "--warmup-epochs", 0, cwd=program.folder).returncode == 0
    changed = program("--cfg", tiny_cfg)
    assert changed.returncode == 2 and "TRAIN.GRAD_COMPRESSION changed from bf16 to off" in changed.stderr
    wrong = program("--cfg", tiny_cfg, "--opts", "TRAIN.GRAD_COMPRESSION", "fp8")
    assert wrong.returncode == 2 and "choose from off, bf16" in wrong.stderr
