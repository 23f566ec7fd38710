"""Whose names a file of weights bears: wrappers around the model, Hugging Face's and OpenMMLab's names, and the family's own.

A trainer, a self-supervised method or a library saves the same model under other names: all of them behind a prefix (``encoder.``,
``backbone.``, ``student.backbone.``), or each one spelt its own way. ``recognise`` tries what a file could mean and takes what covers the
model; nothing is guessed from a file's title.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.safe_load import CheckpointError

State = dict[str, Tensor]

# --------------------------------------------------------------------------------------------------
# Spellings: from a library's names to those of the family's published files
# --------------------------------------------------------------------------------------------------

_ATTENTION = ((r"\.attention\.self\.query\.|\.attention\.q_proj\.", ".attn.q."),
              (r"\.attention\.self\.key\.|\.attention\.k_proj\.", ".attn.k."),
              (r"\.attention\.self\.value\.|\.attention\.v_proj\.", ".attn.v."),
              (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."))
_MLP = ((r"\.intermediate\.dense\.", ".mlp.fc1."), (r"\.output\.dense\.", ".mlp.fc2."), (r"\.mlp\.dense([12])\.", r".mlp.fc\1."),
        (r"\.layernorm_before\.", ".norm1."), (r"\.layernorm_after\.", ".norm2."), (r"\.layer_norm_([12])\.", r".norm\1."))
_CLASSIFIER = ((r"^classifier\.", "head."),)


def _next(pattern: str) -> Callable[[re.Match[str]], str]:
    """``pattern`` filled with a match's first number plus one: their stages begin at 0, the published ones at 1."""
    return lambda match: pattern.format(int(match[1]) + 1)


@dataclass(frozen=True)
class Spelling:
    """How a library spells a family's names.

    Attributes:
        mark: what a name must match for the file to be taken for one of these.
        rules: pairs of a pattern and its replacement, applied in turn.
        fuse: names of parts that the published files hold as one tensor: ``{".attn.qkv.": (".attn.q.", ".attn.k.", ".attn.v.")}``.
    """

    label: str
    mark: str
    rules: Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]
    fuse: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def translate(self, source: State) -> State:
        renamed = {}
        for name, tensor in source.items():
            for pattern, replacement in self.rules:
                name = re.sub(pattern, replacement, name)
            renamed[name] = tensor
        for whole, parts in self.fuse.items():
            _fuse(renamed, whole, parts)
        return renamed


def _fuse(state: State, whole: str, parts: Sequence[str]) -> None:
    """Replace tensors that differ in ``parts`` of their names alone by their concatenation, in place."""
    for name in [name for name in state if parts[0] in name]:
        names = [name.replace(parts[0], part) for part in parts]
        if all(other in state for other in names):
            state[name.replace(parts[0], whole)] = torch.cat([state.pop(other) for other in names])
        elif name.endswith(".attn.q.bias"):  # SwinV2's keys have no bias; its file holds the two others apart
            for other, part in ((names[0], "q_bias"), (names[-1], "v_bias")):
                if other in state:
                    state[re.sub(r"\w\.bias$", part, other)] = state.pop(other)


def _merge_order(state: State) -> State:
    """OpenMMLab gathers the four tokens that a merging joins channel by channel, the published files token by token."""
    reordered = dict(state)
    for name, tensor in state.items():
        if (".downsample.reduction." in name or ".downsample.norm." in name) and tensor.shape[-1] % 4 == 0:
            width = 4 * state[f"{name.rpartition('.downsample.')[0]}.blocks.0.norm1.weight"].shape[0]
            if tensor.shape[-1] == width:
                grid = tensor.unflatten(-1, (width // 4, 2, 2))  # channel, row, column
                reordered[name] = grid.movedim(-3, -1).transpose(-3, -2).flatten(-3)
    return reordered


class _OpenMMLab(Spelling):
    def translate(self, source: State) -> State:
        return _merge_order(super().translate(source))


SPELLINGS = (
    Spelling("Hugging Face's names of Swin", r"embeddings\.patch_embeddings\.projection\.", (
        (r"^swin(?:v2)?\.", ""), (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.norm\.", "patch_embed.norm."), (r"^embeddings\.position_embeddings$", "absolute_pos_embed"),
        (r"^embeddings\.mask_token$", "mask_token"), (r"^encoder\.layers\.", "layers."), *_ATTENTION,
        (r"\.attention\.(?:self|relative_position_bias)\.", ".attn."), (r"\.continuous_position_bias_mlp\.", ".cpb_mlp."),
        *_MLP, (r"^layernorm\.", "norm."), *_CLASSIFIER),
        fuse={".attn.qkv.": (".attn.q.", ".attn.k.", ".attn.v.")}),
    Spelling("Hugging Face's names of CvT", r"\.convolution_embeddings\.", (
        (r"^cvt\.", ""), (r"^encoder\.stages\.(\d+)\.layers\.", r"stage\1.blocks."), (r"^encoder\.stages\.(\d+)\.", r"stage\1."),
        (r"\.embedding\.convolution_embeddings\.projection\.", ".patch_embed.proj."),
        (r"\.embedding\.convolution_embeddings\.normalization\.", ".patch_embed.norm."),
        *((rf"\.attention\.attention\.(?P<kind>(?:convolution_)?projection)_{word}\.",
           lambda match, letter=word[0]: f".attn.{'conv_' if match['kind'] != 'projection' else ''}proj_{letter}.")
          for word in ("query", "key", "value")),
        (r"\.convolution_projection\.convolution\.", ".conv."), (r"\.convolution_projection\.normalization\.", ".bn."),
        (r"\.attention\.output\.dense\.", ".attn.proj."), *_MLP, (r"^layernorm\.", "norm."), *_CLASSIFIER)),
    Spelling("Hugging Face's names of PVT", r"encoder\.patch_embeddings\.\d", (
        (r"^pvt\.", ""), (r"^encoder\.patch_embeddings\.(\d+)\.position_embeddings$", _next("pos_embed{}")),
        (r"^encoder\.patch_embeddings\.\d+\.cls_token$", "cls_token"),
        (r"^encoder\.patch_embeddings\.(\d+)\.projection\.", _next("patch_embed{}.proj.")),
        (r"^encoder\.patch_embeddings\.(\d+)\.layer_norm\.", _next("patch_embed{}.norm.")),
        (r"^encoder\.block\.(\d+)\.", _next("block{}.")), *_ATTENTION, (r"\.attention\.self\.sequence_reduction\.", ".attn.sr."),
        (r"\.attention\.self\.layer_norm\.", ".attn.norm."), *_MLP, (r"^encoder\.layer_norm\.", "norm."), *_CLASSIFIER),
        fuse={".attn.kv.": (".attn.k.", ".attn.v.")}),
    Spelling("Hugging Face's names of PVTv2", r"\.patch_embedding\.proj\.", (
        (r"^pvt_v2\.", ""), (r"^encoder\.layers\.(\d+)\.patch_embedding\.proj\.", _next("patch_embed{}.proj.")),
        (r"^encoder\.layers\.(\d+)\.patch_embedding\.layer_norm\.", _next("patch_embed{}.norm.")),
        (r"^encoder\.layers\.(\d+)\.blocks\.", _next("block{}.")), (r"^encoder\.layers\.(\d+)\.layer_norm\.", _next("norm{}.")),
        (r"\.attention\.(q|k|v)(?:uery|ey|alue)\.", r".attn.\1."), (r"\.attention\.proj\.", ".attn.proj."),
        (r"\.attention\.spatial_reduction\.", ".attn.sr."), (r"\.attention\.layer_norm\.", ".attn.norm."), *_MLP, *_CLASSIFIER),
        fuse={".attn.kv.": (".attn.k.", ".attn.v.")}),
    _OpenMMLab("OpenMMLab's names of Swin", r"\.attn\.w_msa\.", (
        (r"^patch_embed\.projection\.", "patch_embed.proj."), (r"^stages\.", "layers."), (r"\.attn\.w_msa\.", ".attn."),
        (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."), (r"\.ffn\.layers\.1\.", ".mlp.fc2."), (r"^norm3\.", "norm."), (r"^head\.fc\.", "head."))),
)

# --------------------------------------------------------------------------------------------------
# Prefixes
# --------------------------------------------------------------------------------------------------

_LEAST_SHARE = 0.05  # of a file's names, for a prefix to be tried
_MOST_PREFIXES = 32
# Of the two models that self-distillation keeps, the teacher is the one its authors evaluate; a contrastive method's slow copy is not.
_FIRST, _LAST = ("teacher", "ema"), ("student", "momentum", "encoder_k", "target")


def _prefixes(names: Sequence[str]) -> list[str]:
    """Dotted beginnings that many of the names share, the likeliest first; "" (none) before all."""
    counts = Counter(name[:dot.end()] for name in names for dot in re.finditer(r"\.", name))
    likely = [prefix for prefix, count in counts.items() if count >= max(2, _LEAST_SHARE * len(names))]

    def rank(prefix: str) -> tuple[bool, bool, int]:
        return not any(word in prefix for word in _FIRST), any(word in prefix for word in _LAST), -counts[prefix]
    return ["", *sorted(likely, key=rank)[:_MOST_PREFIXES]]


@dataclass(frozen=True)
class Reading:
    """One way to understand a file.

    Attributes:
        source: its tensors by the names of the family's published files.
        state: the same by the model's names.
        prefix, spelling: what was taken off the names, and whose they were; empty for none.
        left_out: names in the file that are none of the model's, and no fault: another model beside it, a projection head, a mask token.
        fresh: names of the model's classifier (and of a final norm) that the file has nothing for.
        misfits: how many of the model, those apart, it lacks or has in another shape, and how many it has beside.
    """

    source: State
    state: State
    prefix: str
    spelling: str
    left_out: Sequence[str]
    fresh: Sequence[str]
    misfits: tuple[int, int]


_USELESS = ("mask_token", "n_averaged")  # of pre-training alone; torch's count of the weights that an average is of
_FOREIGN = 0.1  # share of the model's names in a file, below which it is told as another model's
# What a family's filter raises over names or shapes that are not its own.
TRIPS = (AttributeError, AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def recognise(file: State, own: Mapping[str, Tensor], heads: Sequence[str], translate: Callable[[State], State],
              fits: Callable[[Tensor, Tensor], bool], path: str) -> Reading:
    """The first way to understand ``file`` by which it covers the model, else the one by which it names most of it.

    Args:
        own: the model's state dict.
        heads: dotted names of the classifier's modules.
        translate: the family's ``checkpoint_filter_fn``.
        fits: whether the model's tensor (first) can take the file's, as it is or adapted.

    Raises:
        CheckpointError: hardly a name of the file is the model's under any reading.
    """
    best, most = None, 0
    for prefix in _prefixes(list(file)):
        for spelling in _spellings(name for name in file if name.startswith(prefix)):
            try:
                reading, tripped = _read(file, prefix, spelling, own, tuple(head + "." for head in heads), translate, fits), False
            except TRIPS:
                if spelling is not None:
                    continue
                # the model's names in other numbers or shapes: it is told which
                reading, tripped = _read(file, prefix, None, own, tuple(head + "." for head in heads), _leaving(translate), fits), True
            if reading.misfits == (0, 0) and not tripped:
                return reading
            named = sum(name in own for name in reading.state)
            if named > most and (not prefix or named > len(own) / 2):
                best, most = reading, named
    if best is None or most < _FOREIGN * len(own):
        raise CheckpointError(f"{path}: is not a file of this model: its names are {_some(file)}, the model's {_some(own)}; "
                              "check MODEL.TYPE and MODEL.NAME")
    return best


def _leaving(translate: Callable[[State], State]) -> Callable[[State], State]:
    """A translation that leaves the tensors as they are that ``translate`` cannot take."""
    def trips(state: State) -> bool:
        try:
            translate(dict(state))
        except TRIPS:
            return True
        return False

    def partly(state: State) -> State:
        left = {name: tensor for name, tensor in state.items() if trips({name: tensor})}
        rest = {name: tensor for name, tensor in state.items() if name not in left}
        return (rest if trips(rest) else translate(rest)) | left

    return partly


def _some(names: Mapping[str, Tensor]) -> str:
    return ", ".join(list(names)[:3]) + (", ..." if len(names) > 3 else "")


def _spellings(names: Iterable[str]) -> list[Spelling | None]:
    names = list(names)
    return [*(spelling for spelling in SPELLINGS if any(re.search(spelling.mark, name) for name in names)), None]


def _read(file: State, prefix: str, spelling: Spelling | None, own: Mapping[str, Tensor], heads: tuple[str, ...],
          translate: Callable[[State], State], fits: Callable[[Tensor, Tensor], bool]) -> Reading:
    source = {name[len(prefix):]: tensor for name, tensor in file.items() if name.startswith(prefix)}
    # A classifier may stand beside the backbone instead of in it.
    beside = ("classifier.", *(head.partition(".")[0] + "." for head in heads))
    left_out = [name for name in file if not name.startswith(prefix)]
    for name in [name for name in left_out if name.startswith(beside) and name not in source]:
        source[name] = file[name]
        left_out.remove(name)
    if spelling is not None:
        source = spelling.translate(source)
    left_out += [name for name in source if name in _USELESS and name not in own]
    source = {name: tensor for name, tensor in source.items() if name in own or name not in _USELESS}
    state = translate(dict(source))
    for name in [name for name in state if name.startswith("classifier.")]:
        head = heads[0] + name.removeprefix("classifier.")
        if head in own and head not in state:
            state[head] = state.pop(name)
    foreign_heads = [name for name in state if name.startswith(beside) and name not in own]  # a projection head, or one not wanted
    state = {name: tensor for name, tensor in state.items() if name not in foreign_heads}
    fresh = _fresh(state, own, heads)
    missing = sum(name not in state or not fits(own[name], state[name]) for name in own if not name.startswith(heads) and name not in fresh)
    unexpected = sum(name not in own for name in state)
    return Reading(source, state, prefix, spelling.label if spelling else "", [*left_out, *foreign_heads], fresh, (missing, unexpected))


def _fresh(state: State, own: Mapping[str, Tensor], heads: tuple[str, ...]) -> list[str]:
    """The classifier's tensors where the file has none of it, and then those of a final norm that backbones leave off."""
    if any(name in own and name.startswith(heads) for name in state):
        return []
    head = [name for name in own if name.startswith(heads)]
    norm = [name for name in own if name.startswith(("norm.", "fc_norm.", "head.norm."))]
    return head + (norm if not any(name in state for name in norm) else [])
