"""Which rule tells what an operation of torch launches on a GPU: norms, products, convolutions, attention, many tensors at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from utils.profiling.fake_gpu import channels_last
from utils.profiling.kernel_costs import (
    BANDWIDTH,
    PEAK_BANDWIDTH,
    RATES,
    Call,
    Kernels,
    at,
    cat,
    copy,
    copy_of,
    elementwise,
    fill,
    fill_and,
    nbytes,
    one_pass,
    reduction,
    sum_of,
    tensors,
)

aten = torch.ops.aten

# ---- norms -----------------------------------------------------------------------------------------------------------------------

ROW_FORWARD, ROW_BACKWARD = 1.37e-9, 0.8e-9  # seconds: torch gives a block of threads to each row, however narrow
COLUMNS = 4.25e-9  # seconds a row, where blocks of 32 columns walk all rows for the gradients of weight and bias


def layer_norm(call: Call) -> list[Kernels]:
    width = math.prod(call.args[1])
    rows = call.args[0].numel() // width
    return [call.kernels(lambda least: least + rows * ROW_FORWARD, launches=1 if width % 4 == 0 else 2)]


def layer_norm_backward(call: Call) -> list[Kernels]:
    grad, x, width = call.args[0], call.args[1], math.prod(call.args[2])
    rows, weights = x.numel() // width, tensors(call.made[1:])
    done = [] if grad.is_contiguous() else [copy_of(call, grad, torch.empty_like(x))]
    split = rows > 65536 and width // 32 < 66
    columns = nbytes([grad, x]) / BANDWIDTH if split else rows * COLUMNS
    done.append(call.kernels(lambda least: max(nbytes([grad, x, x]) / BANDWIDTH, rows * ROW_BACKWARD) + columns * bool(weights),
                             launches=1 + bool(weights), read=(1 + bool(weights)) * nbytes([grad, x]), once=nbytes([grad, x])))
    if split:  # partial sums
        done += [call.kernels(8e-6, name="sum", read=2 ** 20, written=t, shapes=[t]) for t in weights]
    return done


def batch_norm(call: Call) -> list[Kernels]:
    """Statistics, then the result: the input is read twice. Assumed."""
    x = call.args[1] if "backward" in call.name else call.args[0]
    training = len(call.given) > 0 and "backward" in call.name or True in [a for a in call.args if isinstance(a, bool)]
    passes = 2 if training else 1
    reads = passes * (nbytes(call.args[:2]) if "backward" in call.name else nbytes(x))
    moved = reads + nbytes(call.made[0])
    return [call.kernels(moved / BANDWIDTH / 0.6, launches=passes + 1, read=reads, once=reads // passes, written=call.made[0],
                         assumed=True)]


# ---- products --------------------------------------------------------------------------------------------------------------------

PRODUCTS = {"addmm": 0.68, "mm": 0.8}  # shares of the rate
PRODUCT_MEMORY = 0.88  # share of the bandwidth
# Shares of both of batched products, and of those whose rows begin at odd places, for which cuBLAS has no tensor cores: the first assumed,
# the second so that swin_tiny's step, full of rows of 49, comes nearer to what was measured.
BATCHED, UNALIGNED = 0.5, 0.3


def flops_of(call: Call) -> int:
    count = flop_registry.get(call.func._overloadpacket)
    return 0 if count is None else int(count(*call.args, **call.kwargs, out_val=call.result))


def product(call: Call) -> list[Kernels]:
    flops, rate = flops_of(call), RATES[call.given[-1].dtype]  # results may be wider than what is multiplied
    if call.name in PRODUCTS:
        share, memory = PRODUCTS[call.name], PRODUCT_MEMORY
    else:
        share = memory = UNALIGNED if any(size % 8 for t in call.given[-2:] for size in t.shape[-2:]) else BATCHED
    rows, columns = call.made[0].shape[-2:]
    split = call.name == "mm" and call.args[0].shape[1] > 8 * max(rows, columns)  # over blocks whose sums another kernel adds up
    return [call.kernels(lambda least: max(least / memory, flops / rate / share) + 2e-6, flops=flops, rate=rate, launches=1 + split,
                         assumed=call.name not in PRODUCTS)]


# ---- convolutions ----------------------------------------------------------------------------------------------------------------

FEW_CHANNELS = 16  # fewer results than these leave most of a tile empty
CONVOLUTION, CONVOLUTION_FEW = 0.4, 0.08  # shares of the rate
WEIGHT_GRADIENT_FEW = 0.015
# FLOP/s of torch's own depthwise kernels, whose instructions are mostly indices; the gradient of the weights walks over the whole map for
# each number of a kernel. Assumed.
DEPTHWISE, DEPTHWISE_WEIGHT = 7e12, 1.1e12


def is_depthwise(weight: Tensor, groups: int) -> bool:
    return groups > 1 and weight.shape[1] == 1


def convolution(call: Call) -> list[Kernels]:
    x, weight, bias = call.args[:3]
    groups, flops, y = call.args[8], flops_of(call) // call.args[8], call.made[0]
    done = layout_copies(call, [(x, x), (weight, weight)], channels_last(x, weight))
    if is_depthwise(weight, groups):
        done.append(call.kernels(lambda least: max(least / 0.7, flops / DEPTHWISE), name="conv_depthwise", read=[x, weight], flops=flops,
                                 rate=RATES[torch.float32], assumed=True))
    else:
        share = CONVOLUTION if weight.shape[0] // groups >= FEW_CHANNELS else CONVOLUTION_FEW
        done.append(call.kernels(lambda least: max(least / 0.7, flops / RATES[y.dtype] / share), read=[x, weight], flops=flops,
                                 name="convolution", launches=1 if channels_last(x, weight) else 3, rate=RATES[y.dtype]))
    if bias is not None:
        done.append(one_pass(call, [y, bias.view(1, -1, *(1,) * (y.ndim - 2))], [y], "add"))
    return done


def convolution_backward(call: Call) -> list[Kernels]:
    grad, x, weight = call.args[:3]
    groups, (to_x, to_weight, to_bias), last = call.args[9], call.args[10], channels_last(call.args[1], call.args[2])
    flops = 2 * grad.numel() * weight[0].numel()
    done, rate = layout_copies(call, [(grad, grad), (x, x), (weight, weight)], last), RATES[x.dtype]
    depthwise, few = is_depthwise(weight, groups), weight.shape[0] // groups < FEW_CHANNELS
    if to_x and depthwise:
        done.append(call.kernels(lambda least: max(least / 0.7, flops / DEPTHWISE), read=[grad, weight], written=x, flops=flops,
                                 name="conv_depthwise backward", rate=RATES[torch.float32], assumed=True))
    elif to_x:
        done.append(call.kernels(lambda least: max(least / 0.7, flops / rate / CONVOLUTION), read=[grad, weight], written=x, flops=flops,
                                 launches=1 if last else 3, rate=rate))
    if to_weight and depthwise:
        done.append(call.kernels(lambda least: max(least / 0.7, flops / DEPTHWISE_WEIGHT), read=[grad, x], written=weight, flops=flops,
                                 name="conv_depthwise backward", rate=RATES[torch.float32], assumed=True))
    elif to_weight:
        share = WEIGHT_GRADIENT_FEW if few else CONVOLUTION
        done.append(call.kernels(lambda least: max(least / 0.7, flops / rate / share), read=[grad, x], written=weight, flops=flops,
                                 launches=2 if last else 4, rate=rate))
    if to_bias:
        done.append(sum_of(call, grad.permute(0, 2, 3, 1).reshape(-1, grad.shape[1]) if last else grad, weight[:, 0, 0, 0]))
    return done


def layout_copies(call: Call, pairs: Sequence[tuple[Tensor, Tensor]], last: bool) -> list[Kernels]:
    """A copy of each tensor that does not lie as the kernel wants it."""
    wanted = torch.channels_last if last else torch.contiguous_format
    return [copy_of(call, x, torch.empty_like(x, memory_format=wanted)) for x, _ in pairs if not x.is_contiguous(memory_format=wanted)]


# ---- attention -------------------------------------------------------------------------------------------------------------------

TILE = 64
EFFICIENT, EFFICIENT_BACKWARD = 36e12, 45e12  # FLOP/s on whole tiles of 64 queries and 64 keys
FLASH, FLASH_BACKWARD = 200e12, 130e12  # assumed


def attention(call: Call) -> list[Kernels]:
    backward = "backward" in call.name
    q, k, v = call.args[1:4] if backward else call.args[:3]
    tiles = math.ceil(q.shape[-2] / TILE) * math.ceil(k.shape[-2] / TILE)
    padded = 2 * math.prod(q.shape[:-2]) * tiles * TILE ** 2 * (q.shape[-1] + v.shape[-1])
    flops = 2 * math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])
    flash = "flash" in call.name
    rate = (FLASH_BACKWARD if backward else FLASH) if flash else EFFICIENT_BACKWARD if backward else EFFICIENT
    factor = 2.5 if backward else 1
    name = f"_{'flash' if flash else 'efficient'}_attention_{'backward' if backward else 'forward'}"
    return [call.kernels(lambda least: max(least / 0.7, factor * padded / rate), name=name, flops=int(factor * flops),
                         launches=3 if flash and backward else 1, assumed=flash)]


# ---- many tensors at once --------------------------------------------------------------------------------------------------------

CHUNK, BLOCKS, TENSORS = 65536, 320, {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}  # of torch's multi_tensor_apply


def many(call: Call) -> list[Kernels]:
    """torch's foreach and fused operations: launches of at most so many blocks and tensors."""
    lists = [a for a in call.args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
    numbers = [part for part in lists if part[0].numel() > 1 or len(lists) == 1]
    first = (numbers or lists)[0]
    blocks = sum(math.ceil(t.numel() / CHUNK) for t in first)
    launches = max(math.ceil(blocks / BLOCKS), math.ceil(len(first) / TENSORS[max(1, min(5, len(numbers or lists)))]))
    written = 3 * nbytes(first) if "adam" in call.name else 0 if "norm" in call.name else nbytes(first)
    norm = "norm" in call.name
    return [call.kernels(at(0.55), launches=launches + 2 * norm, read=nbytes(lists), written=written, shapes=[])]


# ---- the table -------------------------------------------------------------------------------------------------------------------

def nothing(call: Call) -> list[Kernels]:
    return []


def several(number: int, pace: float = 0.5) -> Callable[[Call], list[Kernels]]:
    return lambda call: [call.kernels(at(pace), launches=number)]


def custom(call: Call) -> list[Kernels]:
    """An operation that torch does not know: one kernel at 80 % of the peak, and another that adds up what its programs summed apart."""
    if call.name.startswith("group_attention"):
        return [group_attention(call)]
    return [call.kernels(at(0.8 * PEAK_BANDWIDTH / BANDWIDTH), flops=flops_of(call), assumed=True,
                         launches=1 + call.name.endswith(("backward", "sums")))]


def group_attention(call: Call) -> Kernels:
    """CrossFormer's, of (B, H, W, 3C) in groups of ``group`` x ``group`` tokens, in whole tiles of 64 queries and keys."""
    backward = call.name.endswith("backward")
    qkv, group, interval = (call.named[name] for name in ("qkv", "group", "interval"))
    groups = qkv.shape[0] * math.prod(-(-side // (group * interval)) * interval for side in qkv.shape[1:3])
    work, channels = (2.5 if backward else 1) * 4 * groups, qkv.shape[3] // 3
    padded = work * channels * (TILE * math.ceil(group ** 2 / TILE)) ** 2
    return call.kernels(lambda least: max(least * BANDWIDTH / PEAK_BANDWIDTH / 0.8, padded / (FLASH_BACKWARD if backward else FLASH)),
                        flops=int(work * channels * group ** 4), assumed=True, launches=3 if backward else 1)


VIEWS = ("view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "unbind", "detach",
         "alias", "as_strided", "split", "split_with_sizes", "unfold", "diagonal", "empty", "empty_like", "empty_strided", "new_empty",
         "new_empty_strided", "lift_fresh", "_reshape_alias", "_local_scalar_dense", "is_pinned", "set", "resize", "movedim")
FILLS = ("zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "full_like", "new_full", "fill", "zero", "arange",
         "rand", "randn", "rand_like", "bernoulli", "scalar_tensor", "linspace")
BATCH_NORMS = ("native_batch_norm", "native_batch_norm_backward", "cudnn_batch_norm", "cudnn_batch_norm_backward", "batch_norm_backward",
               "_native_batch_norm_legit", "_batch_norm_with_update", "native_group_norm", "native_group_norm_backward")
REDUCTIONS = ("sum", "mean", "linalg_vector_norm", "amax", "amin", "any", "all", "var_mean", "prod")
ATTENTION = tuple(f"_scaled_dot_product_{kind}_attention{way}" for kind in ("efficient", "flash") for way in ("", "_backward"))
RULES: dict[str, Callable[[Call], list[Kernels]]] = {
    **dict.fromkeys(VIEWS, nothing), **dict.fromkeys(FILLS, fill), **dict.fromkeys(("_to_copy", "clone", "copy"), copy),
    **dict.fromkeys(("cat", "stack"), cat),
    **dict.fromkeys(("constant_pad_nd", "slice_backward", "select_backward"), fill_and(elementwise)),
    "native_layer_norm": layer_norm, "native_layer_norm_backward": layer_norm_backward,
    **dict.fromkeys(BATCH_NORMS, batch_norm), **dict.fromkeys(REDUCTIONS, reduction),
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), product), **dict.fromkeys(ATTENTION, attention),
    "convolution": convolution, "convolution_backward": convolution_backward,
    "index_add": several(2), "index_put": several(8), "_index_put_impl": several(8), "embedding_dense_backward": several(5)}


def kernels_of(call: Call) -> list[Kernels]:
    """What ``call`` launches."""
    if call.namespace not in ("aten", "prims"):
        return custom(call) if call.namespace not in ("prim", "profiler") else []
    if call.name.startswith(("_foreach", "_fused")):
        return many(call)
    rule = RULES.get(call.name, elementwise)
    if rule is nothing or not any(t.is_cuda for t in (*call.given, *call.made)):
        return []
    return rule(call)
