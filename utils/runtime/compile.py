"""torch.compile, of the whole model or block by block (``COMPILE``).

Modules are compiled in place: names, state dict, hooks and copies of a model stay those of the plain one. Every shape is static,
and a graph break is an error, so a family trains in one graph (or one a kind of block) and is evaluated in another. The images of dense
tasks have many sizes: there a second one makes a graph for all.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from timm.layers import DropPath as TimmDropPath
from torch import nn

from config import ConfigError
from models.dense import DenseModel
from models.layers import DropPath

SMALLEST_SHARE = 0.1  # of the parameters, for a class of blocks to be worth a graph
_RECORDED = "graphs"  # of COMPILE's words the one that is not torch.compile's


def compiled_part(how: str) -> str:
    """What of COMPILE, such as ``graphs+blocks``, is torch.compile's: ``off``, ``blocks`` or ``model``."""
    return how.removeprefix(_RECORDED).removeprefix("+") or "off"


def records_steps(how: str) -> bool:
    """Whether COMPILE asks for training steps as CUDA graphs (``utils.training.step_graph``)."""
    return how.startswith(_RECORDED)


def compile_model(model: nn.Module, how: str, backend: str = "inductor", like: nn.Module | None = None) -> list[nn.Module]:
    """Have ``model`` compiled at its first call; what is compiled is returned.

    Args:
        how: COMPILE. ``off`` and ``graphs`` leave it as it is; ``model`` compiles the whole; ``blocks`` each repeated block, whose equals
            share a graph: a fraction of the time before the first step. A model without repeated blocks is compiled whole. Of a model of
            a dense task it is the backbone alone, either way: what comes behind goes by what is found in an image.
        backend: of torch.compile.
        like: the model that this one is an average of: its graphs serve for both.
    """
    how = compiled_part(how)
    if how == "off":
        return []
    if like is not None:
        for parameter, other in zip(model.parameters(), like.parameters(), strict=True):
            parameter.requires_grad_(other.requires_grad)  # a graph is of one kind, also where nothing asks for gradients
    whole = model.backbone if isinstance(model, DenseModel) else model
    targets = [whole]
    if how == "blocks":
        _share_drop_path(whole)
        targets = repeated_blocks(whole) or targets
    # All modules are compiled through the same function of torch, so its limit holds for their graphs together: training,
    # evaluation, and the sizes of a short batch's micro-batches.
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 8 * len(targets))
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 8 * limits.recompile_limit)
    # DDP's gradients of a whole graph would all come at its end: torch splits it at the buckets. Blocks are small enough.
    limits.optimize_ddp = how == "model"
    for module in targets:
        module.compile(fullgraph=True, dynamic=None if isinstance(model, DenseModel) else False, backend=backend)
    return targets


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that ``model`` is made of: the deepest modules in sequences whose class stands there at least twice.

    Deepest means that stages give way to their blocks, and blocks do not to the small parts in sequences of their own.
    """
    total, found = _size(model), list(_sequence_members(model))
    classes: dict[type, list[nn.Module]] = {}
    for module in found:
        classes.setdefault(type(module), []).append(module)
    repeated = {kind for kind, members in classes.items() if len(members) > 1 and sum(map(_size, members)) >= SMALLEST_SHARE * total}
    return [module for module in found if type(module) in repeated]


def _sequence_members(root: nn.Module) -> Iterator[nn.Module]:
    for child in root.children():
        # Single layers are no blocks, nor are torch's own containers.
        single = next(child.children(), None) is None or type(child).__module__.startswith("torch.nn")
        if not isinstance(root, (nn.Sequential, nn.ModuleList)) or single:
            yield from _sequence_members(child)
            continue
        inner = list(_sequence_members(child))
        if inner and 2 * sum(map(_size, inner)) >= _size(child):
            yield from inner
        else:
            yield child


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _share_drop_path(model: nn.Module) -> None:
    """Swap timm's drop paths for ours, whose rate is a tensor: blocks that differ in it alone then share a graph."""
    device = next(model.parameters()).device
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is TimmDropPath and child.scale_by_keep:
                setattr(module, name, DropPath(child.drop_prob).train(child.training).to(device))


def require_compiler(device: torch.device, how: str) -> None:
    """Make sure, before long work, that torch.compile works on ``device``.

    Raises:
        ConfigError: its compiler is missing or fails.
    """
    if compiled_part(how) == "off":
        return
    try:
        torch.compile(_probe, fullgraph=True, dynamic=False)(torch.ones(64, device=device))
    except Exception as error:  # InvalidCxxCompiler, CppCompileError, TritonMissing, OSError, ...: torch raises a kind of its own for each
        tool = "Triton and a C compiler" if device.type == "cuda" else "a C++ compiler"
        raise ConfigError(f"COMPILE is {how}, but torch.compile does not work here ({_reason(error)}); it needs {tool} "
                          "(on Debian: apt-get install g++), or use --compile off") from None


def compile_error(error: Exception) -> ConfigError | None:
    """The error of ours for one that torch.compile raised when it met the model; None for any other error."""
    if not type(error).__module__.startswith(("torch._dynamo.", "torch._inductor.")):
        return None
    return ConfigError(f"this model cannot be compiled ({_reason(error)}); use --compile off")


def _probe(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(x) * 2 + 1


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:160]


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process so far."""
    from torch._dynamo.utils import counters
    return counters["stats"]["unique_graphs"]


def forget_compiled() -> None:
    """Let go of all that was compiled in this process, the count of its graphs included; modules are compiled again at their next call."""
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
