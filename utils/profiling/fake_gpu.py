"""A CUDA device without a GPU: a program's own step on tensors that have shapes, strides and types but no numbers.

torch's fake tensors do most of it. What they lack without a driver is mended here, for as long as ``fake_gpu`` lasts:

- the engine of autograd asks the driver about streams: ``backward`` walks the graph of the backward pass instead;
- autocast, generators, bf16, streams and events are refused: they are let through;
- the choice of an attention kernel reads the GPU's properties: ``_attention`` chooses as torch does on one of compute capability 9.0;
- the layout that cuDNN gives a convolution's results is not known: ``with_layout`` gives it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from yacs.config import CfgNode

from utils.runtime.precision import Precision
from utils.tasks.base import Batch, Task
from utils.training.assembly import build_initial_model, synthetic_step
from utils.training.engine import Progress, StepPlan, train_one_epoch

DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    """Within it tensors made on ``DEVICE`` are fake ones, and a training step on them runs as on a GPU; no kernel is ever started."""
    generator = SimpleNamespace(manual_seed=lambda seed: None, initial_seed=lambda: 0)
    quiet = mock.MagicMock()  # streams and events: all they do is wait
    quiet.return_value.query.return_value, quiet.return_value.elapsed_time.return_value = True, 0.0
    with contextlib.ExitStack() as stack:
        for target, name, value in (
                (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False), (Tensor, "backward", backward),
                (torch.cuda, "is_bf16_supported", lambda including_emulation=True: True), (torch.cuda, "default_generators", (generator,)),
                *((torch.cuda, name, quiet) for name in ("Event", "Stream", "stream", "current_stream", "synchronize")),
                (torch.cuda, "get_device_capability", lambda device=None: (9, 0))):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_ChosenAttention())
        yield


class FakeStep:
    """Training steps and forward passes of the model that ``config`` names, at its batch size, on the fake GPU.

    Make and use it within ``fake_gpu``.
    """

    def __init__(self, config: CfgNode, task: Task, dtype: torch.dtype = torch.bfloat16):
        with unset_fake_temporarily(), torch.device("meta"):  # building reads numbers
            model = build_initial_model(config, task, None)
        _move(model)
        object.__setattr__(model, "to", lambda *args, **kwargs: model)  # it is there, and fake parameters cannot be moved
        self.task, self.precision = task, Precision(DEVICE, dtype)
        made: tuple[Any, StepPlan, Batch] = synthetic_step(config, task, DEVICE, self.precision, model=model)
        self.state, self.plan, self.batch = made

    def train(self) -> None:
        """One step of ``utils.training.engine``."""
        train_one_epoch(self.state.model, self.state, itertools.repeat(self.batch), self.state.step + 1, self.plan, Progress(DEVICE),
                        lambda state, progress: None)

    @torch.no_grad()
    def infer(self) -> None:
        """One forward pass in evaluation mode."""
        self.state.model.eval()
        with self.precision.autocast():
            self.task.forward(self.state.model, self.batch)


def _move(model: nn.Module) -> None:
    """Give ``model``, made without storage, fake parameters and buffers on ``DEVICE``; what modules share stays shared."""
    moved: dict[Tensor, Tensor] = {}

    def there(t: Tensor) -> Tensor:
        if t not in moved:
            fake = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE)
            moved[t] = nn.Parameter(fake, t.requires_grad) if isinstance(t, nn.Parameter) else fake
        return moved[t]

    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            kept.update({name: there(t) for name, t in kept.items() if t is not None})


def backward(loss: Tensor, gradient: Tensor | None = None, **options: Any) -> None:
    """``Tensor.backward`` node by node: what each node of the graph launches is what it launches under torch's engine."""
    if options.get("create_graph"):
        raise NotImplementedError("gradients of gradients are not known here")
    root = loss.grad_fn
    waiting, found, rest = Counter(), {root}, [root]
    while rest:
        for node, _ in rest.pop().next_functions:
            waiting[node] += 1
            if node is not None and node not in found:
                found.add(node)
                rest.append(node)
    with torch.no_grad():
        gradients: dict[Any, dict[int, Tensor]] = {root: {loss.output_nr: torch.ones_like(loss) if gradient is None else gradient}}
        ready = [root]
        while ready:
            node = ready.pop()
            results = _through(node, gradients.pop(node, {}))
            for (following, number), result in zip(node.next_functions, results, strict=False):
                if following is None:
                    continue
                if result is not None:
                    _add_to(gradients.setdefault(following, {}), number, _fitted(result, following, number))
                waiting[following] -= 1
                if waiting[following] == 0:
                    ready.append(following)


def _through(node: Any, gradients: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients that ``node`` gives to those before it."""
    if not gradients:  # none of the branches behind has one
        return (None,) * len(node.next_functions)
    if hasattr(node, "variable"):  # the end: a parameter, whose gradient is kept as it comes where its layout is the parameter's
        parameter, gradient = node.variable, gradients[0]
        if parameter.grad is not None:
            parameter.grad += gradient
        elif gradient.stride() == parameter.stride():
            parameter.grad = gradient.detach()
        else:
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        return ()
    given = [gradients.get(number) for number in range(len(node._input_metadata))]
    results = node.apply(*given) if hasattr(node, "apply") else node(*given)
    return results if isinstance(results, tuple) else (results,)


def _fitted(gradient: Tensor, node: Any, number: int) -> Tensor:
    """In the shape and type of what it is the gradient of: autograd's engine sums over what was broadcast, and converts."""
    wanted = node._input_metadata[number]
    shape = torch.Size(wanted.shape)
    gradient = gradient if gradient.shape == shape else gradient.sum_to_size(shape)
    return gradient if gradient.dtype == wanted.dtype else gradient.to(wanted.dtype)


def _add_to(sums: dict[int, Tensor], number: int, gradient: Tensor) -> None:
    sums[number] = sums[number] + gradient if number in sums else gradient


class _ChosenAttention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and args[0].is_cuda:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
               scale: float | None = None, enable_gqa: bool = False) -> Tensor:
    """Flash attention without a mask, the memory-efficient kernel with one, in a precision and of head widths that they take."""
    backends, width = torch.backends.cuda, q.shape[-1]
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        attn_mask = attn_mask.to(dtype) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    half = q.dtype in (torch.float16, torch.bfloat16)
    if attn_mask is None and half and width <= 256 and backends.flash_sdp_enabled():
        padding = -width % 8
        q, k, v = (F.pad(t, (0, padding)) if padding else t for t in (q, k, v))
        y = aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale or width ** -0.5)[0]
        return y[..., :width] if padding else y
    if width % (8 if half else 4) == 0 and v.shape[-1] % (8 if half else 4) == 0 and backends.mem_efficient_sdp_enabled():
        keys = k.shape[2]
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, float("-inf"))
            if attn_mask.stride(-2) % 8 or attn_mask.stride(-1) != 1:  # rows must begin at multiples of 8: a copy
                attn_mask = F.pad(attn_mask, (0, -keys % 8))[..., :keys]
            attn_mask = attn_mask.expand(*q.shape[:3], keys)
        needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, attn_mask))
        return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, needed, dropout_p, is_causal, scale=scale)[0]
    return aten._scaled_dot_product_attention_math(q, k, v, attn_mask, dropout_p, is_causal, None, scale=scale)[0]


def with_layout(func: Any, args: Any, result: Any) -> Any:
    """The results of a convolution or of its gradient in the layout that cuDNN gives them: channels last if input or weight is."""
    if func is aten.convolution.default and channels_last(args[0], args[1]):
        return torch.empty_like(result, memory_format=torch.channels_last)
    if func is aten.convolution_backward.default and channels_last(args[1], args[2]):
        return tuple(torch.empty_like(t, memory_format=torch.channels_last) if t is not None and t.ndim == 4 else t for t in result)
    return result


def channels_last(x: Tensor, weight: Tensor) -> bool:
    """Whether a convolution of ``x`` is computed with channels last."""
    return x.ndim == 4 and any(suggest_memory_format(t) == torch.channels_last for t in (x, weight))
