"""The configuration tree: every key, its default and what it means; reading, merging, checking.

One road leads here: ``get_config(cfg_file, opts)`` starts from the defaults below, merges the YAML file
(and the files its ``BASE`` names), then the ``KEY VALUE`` pairs, checks the values and freezes the tree.
Nothing is written into a config afterwards. Key names follow the Swin repository's tree, so its YAML
files, and those of the CrossFormer repository, are read as they are.
"""

from __future__ import annotations

import ast
import difflib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import yaml
from yacs.config import CfgNode

PROGRAM_FOLDER = os.path.dirname(os.path.abspath(__file__))


class ConfigError(ValueError):
    """A configuration or usage mistake; the message is one sentence with the remedy (exit status 2)."""


# --------------------------------------------------------------------------------------------------
# Kinds: how a raw value (from YAML or the command line) becomes the value of a key
# --------------------------------------------------------------------------------------------------

def _bool(value: Any) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if isinstance(value, bool):
        return value
    if str(value).lower() in words:
        return words[str(value).lower()]
    raise ValueError("true or false")


def _int(value: Any) -> int:
    if isinstance(value, bool):
        raise ValueError("a whole number")
    try:
        number = float(value) if not isinstance(value, int) else value
        if int(number) != number:
            raise ValueError
        return int(number)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("a whole number") from None


def _float(value: Any) -> float:
    # A YAML 1.1 reader takes `2e-05` for a string; published files hold such numbers.
    if isinstance(value, bool):
        raise ValueError("a number")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError("a number") from None
    if not math.isfinite(number):
        raise ValueError("a finite number")
    return number


def _bytes(value: Any) -> int:
    """A size such as 20GB or 500 MiB, in bytes."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
    if isinstance(value, bool) or not found or found[2].upper() not in units:
        raise ValueError("a size such as 20GB")
    return int(float(found[1]) * units[found[2].upper()])


def _str(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (list, dict)):
        raise ValueError("a text")
    return str(value)


def _off_or(value: Any) -> str:
    """A word such as off, which YAML 1.1 reads as False."""
    return "off" if value is False else _str(value)


def _literal(value: Any) -> Any:
    """Command-line text such as ``[2,2,6,2]`` as YAML would read it."""
    if not isinstance(value, str):
        return value
    try:
        # yacs users write tuples as Python does: (0.9, 0.999)
        return ast.literal_eval(value) if value.lstrip().startswith("(") else yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, SyntaxError, MemoryError, RecursionError):
        raise ValueError("a list") from None


def _list_of(item: Callable[[Any], Any], what: str) -> Callable[[Any], list]:
    def convert(value: Any) -> list:
        value = _literal(value)
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"a list of {what}, such as [1, 2]")
        return [item(v) for v in value]
    return convert


_ints, _floats, _strs = _list_of(_int, "whole numbers"), _list_of(_float, "numbers"), _list_of(_str, "texts")


def _int_lists(value: Any) -> list[list[int]]:
    value = _literal(value)
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, (list, tuple)) for v in value):
        raise ValueError("a list of lists of whole numbers, such as [[2, 4], [2, 4], [2, 4]]")
    return [_ints(v) for v in value]


def _size(value: Any) -> int | list[int]:
    value = _literal(value)
    if isinstance(value, (list, tuple)):
        if len(value) != 2:
            raise ValueError("one number, or a height and a width such as [192, 256]")
        return [_int(v) for v in value]
    return _int(value)


def _number_or_list(value: Any) -> float | list[float]:
    value = _literal(value)
    return _floats(value) if isinstance(value, (list, tuple)) else _float(value)


def _int_or_list(value: Any) -> int | list[int]:
    value = _literal(value)
    return _ints(value) if isinstance(value, (list, tuple)) else _int(value)


def _base(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else _strs(value)


def _optional(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def maybe(value: Any) -> Any:
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "")):
            return None
        return convert(value)
    return maybe


# --------------------------------------------------------------------------------------------------
# The tree. (key, default, kind, meaning); `None` under a model's node means the variant's own value.
# --------------------------------------------------------------------------------------------------

KEYS: list[tuple[str, Any, Callable[[Any], Any], str]] = [
    ("BASE", [""], _base, "YAML files merged before this one, relative to it"),
    ("OUTPUT", "output", _str, "folder of all runs; a run lives in OUTPUT/MODEL.NAME/TAG"),
    ("TAG", "default", _str, "name of the run"),
    ("SEED", 0, _int, "everything random derives from it: order, augmentation, mixup, dropout, initialisation"),
    ("TASK", "classification", _str, "what is learned: classification"),
    ("DEVICE", "auto", _str, "auto, cpu, cuda, cuda:1, mps; auto takes CUDA, then MPS, then the CPU"),
    ("PRECISION", "auto", _str, "auto, fp32, bf16 or fp16; auto is bf16 where GPU or CPU compute it (fp16 on older GPUs), else fp32"),
    ("COMPILE", "off", _off_or, "torch.compile: off; blocks, each kind of block once; model, the whole (longest start, most speed)"),
    ("SAVE_FREQ", 1, _int, "save a checkpoint every so many epochs (the last epoch is always saved)"),
    ("PRINT_FREQ", 10, _int, "log a line every so many steps"),
    ("EVAL_MODE", False, _bool, "evaluate only (--eval)"),
    ("THROUGHPUT_MODE", False, _bool, "measure speed only (--throughput)"),
    ("DOCTOR_MODE", False, _bool, "read and judge the data only (--doctor)"),
    ("AMP_ENABLE", True, _bool, "allow mixed precision; False is PRECISION fp32"),
    ("AMP_OPT_LEVEL", "", _str, "apex's old spelling: O0 is fp32, O1 and O2 mixed precision"),
    ("TRACKER", "none", _str, "none, trackio or wandb: where the curves of a run go besides its folder"),
    ("TRACKER_PROJECT", "", _str, "project of the tracker; empty is the model's name"),
    ("DIST_TIMEOUT", 20.0, _float, "minutes without progress after which a job of several processes ends, naming the one it waits for"),
    ("LOCAL_RANK", 0, _int, "accepted from old files; the launcher's environment decides"),
    ("FUSED_WINDOW_PROCESS", False, _bool, "accepted from old files; has no effect"),
    ("FUSED_LAYERNORM", False, _bool, "use NVIDIA apex's fused layer norm when apex is installed"),

    ("DATA.DATA_PATH", "", _str, "folder with train/ and val/ (or validation/), each holding a folder a class, or another layout (README)"),
    ("DATA.VAL_PATH", "", _str, "validation shards where DATA.DATA_PATH is a stream of WebDataset shards: file:///d/val-{00..04}.tar"),
    ("DATA.STREAM_IMAGES", 0, _int, "training images of a stream that does not tell; 0 asks the stream"),
    ("DATA.STREAM_BUFFER", 4096, _int, "encoded images held by each process to shuffle a stream of training images"),
    ("DATA.DATASET", "imagenet", _str,
     "imagenet looks what is there; folder, lists, zip, tar and huggingface look for that alone; digits are scikit-learn's"),
    ("DATA.BATCH_SIZE", 128, _int, "images per process and micro-batch"),
    ("DATA.IMG_SIZE", 224, _size, "input size in pixels: one number, or [height, width]"),
    ("DATA.INTERPOLATION", None, _optional(_str),
     "bicubic, bilinear, lanczos, nearest or random; None is the model's, else bicubic"),
    ("DATA.MEAN", None, _optional(_floats), "channel means of the normalisation; None is the model's, else ImageNet's"),
    ("DATA.STD", None, _optional(_floats), "channel deviations of the normalisation; None is the model's, else ImageNet's"),
    ("DATA.REPEATED_AUG", 1, _int, "copies of an image in an epoch, each augmented differently (DeiT uses 3)"),
    ("DATA.NUM_WORKERS", -1, _int, "loading processes per process; -1 chooses from the CPUs this process may use"),
    ("DATA.PIN_MEMORY", True, _bool, "page-locked batches for faster copies to a GPU"),
    ("DATA.DECODER", "auto", _str, "auto; pillow: every pixel as the papers had it; fast: also where published weights are judged"),
    ("DATA.AUGMENT_ON", "auto", _str, "worker, device, or auto: on a GPU the GPU augments, else the loading processes do"),
    ("DATA.VAL_FRACTION", 0.0, _float, "share of each class kept for validation where the data has no split of its own, e.g. 0.1"),
    ("DATA.VAL_LABELS", "", _str, "file with the labels of a flat validation folder; empty looks for the usual ones"),
    ("DATA.CLASS_NAMES", "", _str, "text file, a line a class in the classifier's order: a label, or label<TAB>class; others are left out"),
    ("DATA.SUBSET", 1.0, _float, "share of each class's training images to use, chosen by the seed, e.g. 0.1"),
    ("DATA.EXIF", False, _bool, "turn images upright as their EXIF block says (the papers, torchvision and timm do not)"),
    ("DATA.CORRUPT_BUDGET", 0.001, _float, "unreadable training images to go on with: below 1 a share of them, else a number"),
    ("DATA.READ_PATIENCE", 2.0, _float, "seconds that a failing read (file gone, share away) is tried again before the image is bad"),
    ("DATA.TIMEOUT", 600.0, _float, "seconds without a batch after which loading counts as hung; 0 waits for ever"),
    ("DATA.INDEX_CACHE", "auto", _str, "folder for the file lists of large data sets; auto is the user's cache folder, none keeps none"),
    ("DATA.ZIP_MODE", False, _bool, "read train.zip and val.zip with their map files (train_map.txt), as Swin has them"),
    ("DATA.CACHE_MODE", "part", _str, "accepted from old files; has no effect"),

    ("REPORT.RUNS", [], _strs, "run folders to report on (--report); several are compared"),
    ("REPORT.FILE", "", _str, "where that report goes; empty is report.html (of several runs comparison.html) in the first run's folder"),
    ("REPORT.DIFF", [], _strs, "two runs, checkpoints or YAML files to show the differences of (--diff)"),
    ("REPORT.CONFIG", False, _bool, "print the config with the source of every value (--print-config)"),

    ("DOCTOR.FOLDER", "", _str, "where the doctor writes its report, manifests and scripts; empty is OUTPUT/doctor/<name of the data>"),
    ("DOCTOR.JSON", "", _str, "file for the doctor's report as JSON; - is standard output; empty is report.json in its folder"),
    ("DOCTOR.NEAR", 8, _int,
     "bits of 128 in which the fingerprints of a training and a validation image may differ to be compared closer (0 to 11; -1: none)"),

    ("COMPARE.FILES", [], _strs, "two checkpoints to judge on the same images, with a paired test (--compare)"),

    ("SHOW.BATCH", "", _str, "PNG file for the first training batch as the model sees it (--show-batch)"),
    ("SHOW.ATTENTION", "", _str, "image on which a CrossFormer's attention is drawn (--show-attention)"),
    ("SHOW.TOKEN", "", _str, "y,x in pixels of the model's input: the token whose attention is drawn; empty is the centre (--show-token)"),
    ("SHOW.FILE", "attention.png", _str, "PNG file for the attention (--show-file)"),

    ("PREDICT.PATHS", [], _strs,
     "images to predict (--predict): files, folders, patterns, lists of them in .txt files; - is a list on standard input"),
    ("PREDICT.TOPK", 5, _int, "classes told for an image, likeliest first"),
    ("PREDICT.CSV", "", _str, "table of the predictions, a row an image; - is standard output"),
    ("PREDICT.JSON", "", _str, "predictions as JSON, a line an image; - is standard output"),
    ("PREDICT.FEATURES", "", _str, "pooled features before the classifier: FILE.npy or FILE.safetensors, with FILE.paths.json"),
    ("PREDICT.SHEET", "", _str, "picture of the images with their classes, FILE.png; more pages are FILE-2.png and so on"),

    ("EXPORT.FILE", "", _str, "what --export writes: FILE.onnx, FILE.pt2, or a folder (or FILE.safetensors) as timm and its hub have it"),
    ("EXPORT.OPSET", 18, _int, "ONNX operator set"),
    ("EXPORT.PREPROCESS", False, _bool, "ONNX and pt2: normalise inside the model, which then takes pixels of 0 to 255"),

    ("PLAN.RUN", False, _bool, "dry run (--plan): a few steps, an evaluation batch, a save and a load; says what the run will take"),
    ("PLAN.FIT", False, _bool, "train (or plan) with the largest micro-batch that memory holds, the global batch staying (--fit)"),
    ("PLAN.MEMORY", 0, _bytes,
     "memory that --plan and --fit may reckon with, e.g. 24GB, for each GPU, or on a CPU for all processes together; 0: all there is"),
    ("PLAN.SECONDS", 4.0, _float, "about how long --plan measures each speed; longer is more exact"),
    ("PLAN.SCRATCH", "", _str, "folder on whose disk --plan tries a save; empty is the system's folder for temporary files"),

    ("MODEL.TYPE", "crossformer", _str, "crossformer, swin, cvt, shunted, mpvit, pvt, pvt_v2, galerkin, or timm for any timm model"),
    ("MODEL.NAME", "crossformer_tiny", _str, "variant of the family, or a label when the family's node gives the numbers"),
    ("MODEL.NUM_CLASSES", 0, _int, "0 counts them in the data; another number must agree with the data"),
    ("MODEL.PRETRAINED", "", _str, "file of weights to start from (head and sizes are adapted), or hub for timm's own"),
    ("MODEL.CLASS_MAP", "", _str, "text file, a line a class: its row in the pretrained classifier (ImageNet-22k to 1k)"),
    ("MODEL.RESUME", "", _str, "checkpoint to continue (training) or to judge (--eval)"),
    ("MODEL.DROP_RATE", 0.0, _float, "dropout rate"),
    ("MODEL.DROP_PATH_RATE", 0.1, _float, "stochastic depth: rate of the last block, growing linearly from 0"),
    ("MODEL.LABEL_SMOOTHING", 0.1, _float, "label smoothing"),

    ("MODEL.CROSSFORMER.EMBED_DIM", None, _optional(_int), "width of the first stage"),
    ("MODEL.CROSSFORMER.DEPTHS", None, _optional(_ints), "blocks per stage"),
    ("MODEL.CROSSFORMER.NUM_HEADS", None, _optional(_ints), "heads per stage"),
    ("MODEL.CROSSFORMER.GROUP_SIZE", None, _optional(_ints), "group size per stage"),
    ("MODEL.CROSSFORMER.INTERVAL", None, _optional(_ints), "interval of long-distance attention per stage"),
    ("MODEL.CROSSFORMER.PATCH_SIZE", None, _optional(_int_or_list), "kernels of the image embedding, e.g. [4, 8, 16, 32]"),
    ("MODEL.CROSSFORMER.MERGE_SIZE", None, _optional(_int_lists), "kernels of the embeddings between stages"),
    ("MODEL.CROSSFORMER.MLP_RATIO", None, _optional(_number_or_list), "hidden width of the MLPs over their width"),
    ("MODEL.CROSSFORMER.IN_CHANS", None, _optional(_int), "input channels"),
    ("MODEL.CROSSFORMER.QKV_BIAS", None, _optional(_bool), "bias of the query, key and value projection"),
    ("MODEL.CROSSFORMER.QK_SCALE", None, _optional(_float), "scale of the queries; None is head width ** -0.5"),
    ("MODEL.CROSSFORMER.ATTENTION", None, _optional(_str), "lsda (short and long distance in turn), sda or lda alone"),
    ("MODEL.CROSSFORMER.POSITION", None, _optional(_str), "position bias: dpb, dpb_residual, table (Swin's) or none"),
    ("MODEL.CROSSFORMER.APE", None, _optional(_bool), "learned absolute position embedding on the tokens"),
    ("MODEL.CROSSFORMER.PATCH_NORM", None, _optional(_bool), "layer norm after the image embedding"),
    ("MODEL.CROSSFORMER.GROUP_TYPE", None, _optional(_str), "constant, linear, linear_div, alter or 7_14 (CrossFormer++)"),
    ("MODEL.CROSSFORMER.USE_ACL", None, _optional(_bool), "amplitude cooling layers (CrossFormer++)"),
    ("MODEL.CROSSFORMER.USE_CPE", None, _optional(_bool), "accepted from old files; only False"),
    ("MODEL.CROSSFORMER.PAD_TYPE", None, _optional(_int), "accepted from old files; only 0"),
    ("MODEL.CROSSFORMER.NO_MASK", None, _optional(_bool), "let attention see the padding"),
    ("MODEL.CROSSFORMER.ADAPT_INTER", None, _optional(_bool), "accepted from old files; only False"),

    ("MODEL.SWIN.EMBED_DIM", None, _optional(_int), "width of the first stage"),
    ("MODEL.SWIN.DEPTHS", None, _optional(_ints), "blocks per stage"),
    ("MODEL.SWIN.NUM_HEADS", None, _optional(_ints), "heads per stage"),
    ("MODEL.SWIN.WINDOW_SIZE", None, _optional(_int), "window size"),
    ("MODEL.SWIN.PATCH_SIZE", None, _optional(_int), "patch size"),
    ("MODEL.SWIN.IN_CHANS", None, _optional(_int), "input channels"),
    ("MODEL.SWIN.MLP_RATIO", None, _optional(_float), "hidden width of the MLPs over their width"),
    ("MODEL.SWIN.QKV_BIAS", None, _optional(_bool), "bias of the query, key and value projection"),
    ("MODEL.SWIN.QK_SCALE", None, _optional(_float), "accepted from old files; only None"),
    ("MODEL.SWIN.APE", None, _optional(_bool), "accepted from old files; only False"),
    ("MODEL.SWIN.PATCH_NORM", None, _optional(_bool), "accepted from old files; only True"),

    ("MODEL.CVT.EMBED_DIMS", None, _optional(_ints), "width per stage"),
    ("MODEL.CVT.DEPTHS", None, _optional(_ints), "blocks per stage"),
    ("MODEL.CVT.NUM_HEADS", None, _optional(_ints), "heads per stage"),
    ("MODEL.CVT.MLP_RATIOS", None, _optional(_floats), "hidden width of the MLPs over their width, per stage"),
    ("MODEL.CVT.PATCH_SIZES", None, _optional(_ints), "kernels of the embeddings"),
    ("MODEL.CVT.PATCH_STRIDES", None, _optional(_ints), "strides of the embeddings"),
    ("MODEL.CVT.PATCH_PADDINGS", None, _optional(_ints), "paddings of the embeddings"),
    ("MODEL.CVT.KV_STRIDES", None, _optional(_ints), "stride of the key and value projections per stage"),
    ("MODEL.CVT.QKV_BIAS", None, _optional(_bool), "bias of the query, key and value projection"),
    ("MODEL.CVT.IN_CHANS", None, _optional(_int), "input channels"),

    ("MODEL.SHUNTED.EMBED_DIMS", None, _optional(_ints), "width per stage"),
    ("MODEL.SHUNTED.DEPTHS", None, _optional(_ints), "blocks per stage"),
    ("MODEL.SHUNTED.NUM_HEADS", None, _optional(_ints), "heads per stage"),
    ("MODEL.SHUNTED.MLP_RATIOS", None, _optional(_floats), "hidden width of the MLPs over their width, per stage"),
    ("MODEL.SHUNTED.SR_RATIOS", None, _optional(_ints), "merging rate of keys and values per stage (even; 1 is none)"),
    ("MODEL.SHUNTED.NUM_CONV", None, _optional(_int), "plain 3x3 convolutions in the image embedding"),
    ("MODEL.SHUNTED.QKV_BIAS", None, _optional(_bool), "bias of the query, key and value projection"),
    ("MODEL.SHUNTED.IN_CHANS", None, _optional(_int), "input channels"),

    ("MODEL.MPVIT.EMBED_DIMS", None, _optional(_ints), "width per stage"),
    ("MODEL.MPVIT.DEPTHS", None, _optional(_ints), "layers of each path's encoder per stage"),
    ("MODEL.MPVIT.NUM_PATHS", None, _optional(_ints), "paths per stage"),
    ("MODEL.MPVIT.NUM_HEADS", None, _optional(_ints), "heads per stage"),
    ("MODEL.MPVIT.MLP_RATIOS", None, _optional(_floats), "hidden width of the MLPs over their width, per stage"),
    ("MODEL.MPVIT.CRPE_WINDOWS", None, _optional(_int_lists), "pairs of a kernel and the heads it serves, e.g. [[3, 2], [5, 3], [7, 3]]"),
    ("MODEL.MPVIT.QKV_BIAS", None, _optional(_bool), "bias of the query, key and value projection"),
    ("MODEL.MPVIT.IN_CHANS", None, _optional(_int), "input channels"),

    ("MODEL.PVT.EMBED_DIMS", None, _optional(_ints), "width per stage"),
    ("MODEL.PVT.DEPTHS", None, _optional(_ints), "blocks per stage"),
    ("MODEL.PVT.NUM_HEADS", None, _optional(_ints), "heads per stage"),
    ("MODEL.PVT.MLP_RATIOS", None, _optional(_floats), "hidden width of the MLPs over their width, per stage"),
    ("MODEL.PVT.SR_RATIOS", None, _optional(_ints), "reduction of keys and values per stage (1 in the last)"),
    ("MODEL.PVT.PATCH_SIZE", None, _optional(_int), "patches of the first stage"),
    ("MODEL.PVT.QKV_BIAS", None, _optional(_bool), "bias of the query, key and value projection"),
    ("MODEL.PVT.IN_CHANS", None, _optional(_int), "input channels"),

    ("MODEL.PVT_V2.EMBED_DIMS", None, _optional(_ints), "width per stage"),
    ("MODEL.PVT_V2.DEPTHS", None, _optional(_ints), "blocks per stage"),
    ("MODEL.PVT_V2.NUM_HEADS", None, _optional(_ints), "heads per stage"),
    ("MODEL.PVT_V2.MLP_RATIOS", None, _optional(_floats), "hidden width of the MLPs over their width, per stage"),
    ("MODEL.PVT_V2.SR_RATIOS", None, _optional(_ints), "reduction of keys and values per stage"),
    ("MODEL.PVT_V2.LINEAR", None, _optional(_bool), "keys and values from a 7x7 pooled map in every stage (b2_li)"),
    ("MODEL.PVT_V2.QKV_BIAS", None, _optional(_bool), "bias of the query, key and value projection"),
    ("MODEL.PVT_V2.IN_CHANS", None, _optional(_int), "input channels"),

    ("MODEL.GALERKIN.EMBED_DIM", None, _optional(_int), "width of the first stage"),
    ("MODEL.GALERKIN.DEPTHS", None, _optional(_ints), "blocks per stage"),
    ("MODEL.GALERKIN.NUM_HEADS", None, _optional(_ints), "heads per stage"),
    ("MODEL.GALERKIN.PATCH_SIZE", None, _optional(_int), "4 for strides 4 to 32, 2 for 2 to 16"),
    ("MODEL.GALERKIN.MLP_RATIO", None, _optional(_float), "hidden width of the MLPs over their width"),
    ("MODEL.GALERKIN.QKV_BIAS", None, _optional(_bool), "bias of the query, key and value projection"),
    ("MODEL.GALERKIN.PATCH_NORM", None, _optional(_bool), "layer norm after the image embedding"),
    ("MODEL.GALERKIN.NORM_EPS", None, _optional(_float), "eps of the norms of keys and values"),
    ("MODEL.GALERKIN.OUT_PROJ", None, _optional(_bool), "a linear after the heads"),
    ("MODEL.GALERKIN.POSITIONS", None, _optional(_bool), "give the attention the tokens' coordinates (implies OUT_PROJ)"),
    ("MODEL.GALERKIN.IN_CHANS", None, _optional(_int), "input channels"),

    ("TRAIN.EPOCHS", 300, _int, "passes over the training images"),
    ("TRAIN.START_EPOCH", 0, _int, "accepted from old files; the checkpoint's step decides"),
    ("TRAIN.WARMUP_EPOCHS", 20, _float, "epochs of linear warm-up"),
    ("TRAIN.BASE_LR", 5e-4, _float, "peak learning rate for a global batch of LR_BATCH"),
    ("TRAIN.WARMUP_LR", 5e-7, _float, "learning rate of the first step, likewise scaled"),
    ("TRAIN.MIN_LR", 5e-6, _float, "learning rate at the end, likewise scaled"),
    ("TRAIN.LR_BATCH", 512, _int, "global batch that the three rates are given for; 0 does not scale them"),
    ("TRAIN.WEIGHT_DECAY", 0.05, _float, "weight decay; none on biases, 1-D parameters and what the model names"),
    ("TRAIN.LAYER_DECAY", 1.0, _float, "factor on the learning rate per layer below the head (1: none)"),
    ("TRAIN.CLIP_GRAD", 5.0, _float, "largest gradient norm; 0 does not clip"),
    ("TRAIN.ACCUMULATION_STEPS", 1, _int, "micro-batches per optimizer step"),
    ("TRAIN.GLOBAL_BATCH", 0, _int, "images a step over all processes that the recipe was made for, which --fit keeps; 0: whatever the "
     "batch size, the accumulation and the processes give"),
    ("TRAIN.USE_CHECKPOINT", False, _bool, "activation checkpointing: less memory, about a third more time"),
    ("TRAIN.CHECKPOINT_UNIT", "block", _str, "what TRAIN.USE_CHECKPOINT keeps of the forward pass: block, the input of each block (least "
     "memory); stage, that of each stage, all of whose activations are then there at once when it is computed again"),
    ("TRAIN.GRAD_COMPRESSION", "off", _off_or, "of gradients between processes: off, or bf16 (half the traffic, another rounding)"),
    ("TRAIN.AUTO_RESUME", True, _bool, "continue from the run folder's newest good checkpoint"),
    ("TRAIN.SAVE_EVERY_STEPS", 0, _int, "also save every so many steps (0: at epochs only)"),
    ("TRAIN.SAVE_EVERY_MINUTES", 0.0, _float, "also save when so many minutes have passed since the last save (0: never)"),
    ("TRAIN.BACKGROUND_SAVE", True, _bool, "write checkpoints while training goes on (costs memory for one more copy of the state)"),
    ("TRAIN.KEEP_CHECKPOINTS", 2, _int, "newest checkpoints kept beside the best one (0: all)"),
    ("TRAIN.CHECKPOINT_BUDGET", 0, _bytes, "largest size of a run's checkpoints together, e.g. 20GB; older ones go first (0: no limit)"),
    ("TRAIN.ACCEPT_CHANGES", False, _bool, "continue a run with a changed recipe (--accept-changes)"),
    ("TRAIN.SKIP_BUDGET", 10, _int,
     "steps whose loss or gradient is not finite that are skipped before the run gives up; one is forgiven every 100 steps"),
    ("TRAIN.ROLLBACKS", 1, _int, "times a run then goes back to its last good checkpoint, passing over the data since, before it stops"),
    ("TRAIN.EVAL_FREQ", 1, _int, "evaluate every so many epochs (and after the last)"),
    ("TRAIN.EMA_DECAY", 0.0, _float, "decay of the averaged weights, e.g. 0.9999 (0: no average)"),
    ("TRAIN.EMA_WARMUP", False, _bool, "let that decay grow from 0 over the first steps"),
    ("TRAIN.EMA_DEVICE", "auto", _str,
     "where that average lies: auto and model are the model's device; cpu saves the GPU's memory and costs a copy of the weights a step"),
    ("TRAIN.FREEZE", [], _strs, "parameters left as they are: patterns of names, such as patch_embed.* layers.0.*"),
    ("TRAIN.LINEAR_PROBE", False, _bool, "train the classifier alone; all else is fixed and computes as in evaluation"),
    ("TRAIN.SYNC_BN", False, _bool, "batch norm over all GPUs instead of each one's own"),
    ("TRAIN.REPORT", "png", _str, "what training writes of itself at its end: report.html (html), also plots/*.png (png), or none"),
    ("TRAIN.TENSORBOARD_HISTOGRAMS", 0, _int, "epochs between histograms of the weights in TensorBoard (0: none)"),
    ("TRAIN.LR_SCHEDULER.NAME", "cosine", _str, "cosine, linear, step or multistep"),
    ("TRAIN.LR_SCHEDULER.WARMUP_PREFIX", None, _optional(_bool),
     "start the decay after the warm-up; None is the family's recipe (CrossFormer False, others True)"),
    ("TRAIN.LR_SCHEDULER.DECAY_EPOCHS", 30.0, _float, "step: epochs between decays"),
    ("TRAIN.LR_SCHEDULER.DECAY_RATE", 0.1, _float, "step: factor of each decay"),
    ("TRAIN.LR_SCHEDULER.MULTISTEPS", [], _floats, "multistep: epochs of the decays"),
    ("TRAIN.LR_SCHEDULER.GAMMA", 0.1, _float, "multistep: factor of each decay"),
    ("TRAIN.OPTIMIZER.NAME", "adamw", _str, "adamw, sgd, any timm optimizer, or fused_adam of NVIDIA apex"),
    ("TRAIN.OPTIMIZER.EPS", None, _optional(_float), "epsilon; None is the optimizer's own (AdamW 1e-8)"),
    ("TRAIN.OPTIMIZER.BETAS", None, _optional(_floats), "betas; None is the optimizer's own (AdamW [0.9, 0.999])"),
    ("TRAIN.OPTIMIZER.MOMENTUM", 0.9, _float, "momentum of SGD's kind"),

    ("AUG.COLOR_JITTER", 0.4, _float, "colour jitter; used when AUTO_AUGMENT is none"),
    ("AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1", _str, "timm's policy text, or none"),
    ("AUG.SCALE", [0.08, 1.0], _floats, "range of the random crop's share of the image"),
    ("AUG.RATIO", [3 / 4, 4 / 3], _floats, "range of the random crop's aspect ratio"),
    ("AUG.HFLIP", 0.5, _float, "probability of a left-right flip"),
    ("AUG.VFLIP", 0.0, _float, "probability of an up-down flip"),
    ("AUG.REPROB", 0.25, _float, "probability of random erasing"),
    ("AUG.REMODE", "pixel", _str, "random erasing's filling: const, rand or pixel"),
    ("AUG.RECOUNT", 1, _int, "boxes of random erasing"),
    ("AUG.MIXUP", 0.8, _float, "mixup alpha (0: off)"),
    ("AUG.CUTMIX", 1.0, _float, "cutmix alpha (0: off)"),
    ("AUG.CUTMIX_MINMAX", None, _optional(_floats), "range of cutmix's side lengths; replaces its alpha"),
    ("AUG.MIXUP_PROB", 1.0, _float, "probability of mixing a batch"),
    ("AUG.MIXUP_SWITCH_PROB", 0.5, _float, "probability of cutmix when both are on"),
    ("AUG.MIXUP_MODE", "batch", _str, "mix per batch, pair or elem"),

    ("TEST.CROP", True, _bool, "resize to 256/224 of the size (or as the timm model was) and crop the centre; False squashes"),
    ("TEST.BATCH_SIZE", 0, _int, "images per process in evaluation; 0 is DATA.BATCH_SIZE"),
    ("TEST.FLIP", "none", _str, "--eval: mean of an image and its mirror image: none, logits or probabilities, of which the mean is taken"),
    ("TEST.LABELS", "auto", _str,
     "--eval: label set: auto, imagenet, v2, a, r, sketch, real, or a text file of the classes that answers are chosen from, one a line"),
    ("TEST.REAL_LABELS", "", _str, "--eval: real.json of the ReaL labels (a list of labels an image); empty is the one that timm carries"),
    ("TEST.PER_CLASS", "", _str, "--eval: CSV file for each class's recall, precision, F1 and what it is mostly taken for"),
    ("TEST.PREDICTIONS", "", _str, "file (.npz) for the prediction of every image under --eval; empty writes none"),
    ("TEST.SEQUENTIAL", False, _bool, "accepted from old files; evaluation is always exact"),
    ("TEST.SHUFFLE", False, _bool, "accepted from old files; has no effect"),
]

_KIND = {key: kind for key, _, kind, _ in KEYS}
_SECTIONS = {key.rsplit(".", n)[0] for key in _KIND for n in range(1, key.count(".") + 1)}

# Spellings of the CrossFormer repository.
_SECTION_ALIASES = {"MODEL.CROS": "MODEL.CROSSFORMER"}
_TYPE_ALIASES = {"cross-scale": "crossformer"}

MODEL_TYPES = ("crossformer", "swin", "cvt", "shunted", "mpvit", "pvt", "pvt_v2", "galerkin", "timm")


def default_config() -> CfgNode:
    """A fresh, unfrozen tree holding every default."""
    root = CfgNode()
    for key, default, kind, _ in KEYS:
        *sections, leaf = key.split(".")
        node = root
        for section in sections:
            if section not in node:
                node[section] = CfgNode()
            node = node[section]
        node[leaf] = kind(default)
    return root


def describe_keys() -> str:
    """Every key with its default and meaning, a section a paragraph, for ``--help``."""
    lines, section = [], None
    for key, default, _, meaning in KEYS:
        parent = key.rpartition(".")[0]
        if parent != section:
            section = parent
            lines += ["", f"  {parent or 'general'}"]
        shown = repr(default) if isinstance(default, str) else str(default)
        lines.append(f"    {key} ({shown}): {meaning}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Reading and merging
# --------------------------------------------------------------------------------------------------

class _Loader(yaml.SafeLoader):
    """Safe YAML only; a class of our own so that nobody's constructors reach it."""


def _canonical(key: str) -> str:
    for alias, name in _SECTION_ALIASES.items():
        if key == alias or key.startswith(alias + "."):
            return name + key[len(alias):]
    return key


def _nearest(word: str, names: Iterable[str]) -> str:
    names = list(names)
    near = difflib.get_close_matches(word.upper(), names, n=3, cutoff=0.6)
    leaf = word.rpartition(".")[2].upper()
    near += [n for n in names if n.rpartition(".")[2] == leaf and n not in near]
    leaves = difflib.get_close_matches(leaf, {n.rpartition(".")[2] for n in names}, n=2, cutoff=0.75)
    near += [n for n in names if n.rpartition(".")[2] in leaves and n not in near]
    return ", ".join(near[:4])


def _unknown(key: str, where: str) -> ConfigError:
    near = _nearest(key, _KIND)
    return ConfigError(f"{where}: unknown key {key}" + (f"; did you mean {near}?" if near else "; see --help-keys for all keys"))


def converted(key: str, raw: Any, what: str) -> Any:
    """The value of ``key`` that ``raw`` stands for; ``what`` names it in the ``ConfigError`` for another kind of value."""
    try:
        return _KIND[key](raw)
    except ValueError as error:
        raise ConfigError(f"{what} takes {error}, not {raw!r}") from None


def _set(root: CfgNode, key: str, raw: Any, where: str, source: str = "") -> None:
    """``where`` is said in messages; ``source``, or else ``where``, is remembered as the value's origin."""
    key = _canonical(key)
    if key not in _KIND:
        if key in _SECTIONS:
            raise ConfigError(f"{where}: {key} is a section; give one of its keys, such as "
                              f"{next(k for k in _KIND if k.startswith(key + '.'))}")
        raise _unknown(key, where)
    value = converted(key, raw, f"{where}: {key}")
    if key == "MODEL.TYPE":
        value = _TYPE_ALIASES.get(value, value)
    *sections, leaf = key.split(".")
    node = root
    for section in sections:
        node = node[section]
    node[leaf] = value
    root.__dict__.setdefault(_HISTORY, {}).setdefault(key, []).append((source or where, value))


_HISTORY = "history"  # attribute of the root beside the tree: key -> [(source, value), ...]
COMMAND_LINE = "command line"


def history(config: CfgNode) -> dict[str, list[tuple[str, Any]]]:
    """Where the values come from: key -> (source, value) of everyone who set it, the last of which counts.

    A source is ``FILE:line``, ``base FILE:line``, ``command line``, ``checkpoint FILE`` or ``derived from KEY``. Keys that nobody set
    have their default and are not listed.
    """
    return dict(config.__dict__.get(_HISTORY, {}))


def _walk(node: yaml.MappingNode, prefix: str, name: str, loader: yaml.Loader) -> Iterable[tuple[str, Any, str]]:
    """(key, value, file:line) of every leaf; duplicate keys are refused, YAML would keep the last silently."""
    seen: set[str] = set()
    for key_node, value_node in node.value:
        where = f"{name}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{where}: a key must be a plain word")
        key = f"{prefix}{key_node.value}"
        if key in seen:
            raise ConfigError(f"{where}: {key} stands twice in this file; keep one")
        seen.add(key)
        canonical = _canonical(key)
        if canonical in _SECTIONS:
            if isinstance(value_node, yaml.MappingNode):
                yield from _walk(value_node, key + ".", name, loader)
            elif value_node.value not in ("", "null", "~"):
                raise ConfigError(f"{where}: {key} is a section and takes keys below it, not a value")
        elif canonical not in _KIND:
            raise _unknown(key, where)
        else:
            try:
                yield canonical, loader.construct_object(value_node, deep=True), where
            except yaml.YAMLError as error:
                problem = getattr(error, "problem", None) or "not plain YAML"
                raise ConfigError(f"{where}: {key}: {problem}; only plain values are read") from None


def _read_yaml(text: str, name: str) -> list[tuple[str, Any, str]]:
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{name}: a configuration is a mapping of sections and keys, such as 'MODEL: {{TYPE: crossformer}}'")
        return list(_walk(root, "", name, loader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{name}{line}: not valid YAML ({problem})") from None
    finally:
        loader.dispose()


def _merge_file(root: CfgNode, path: str, stack: tuple[str, ...] = ()) -> None:
    if os.path.splitext(path)[1].lower() not in (".yaml", ".yml"):
        raise ConfigError(f"{path}: a configuration file ends in .yaml or .yml")
    real = os.path.realpath(path)
    if real in stack:
        raise ConfigError(f"{path}: BASE leads back to this file; remove the cycle")
    try:
        with open(path, "rb") as file:
            text = file.read().decode("utf-8-sig")
    except FileNotFoundError:
        origin = f" (named by BASE in {stack[-1]})" if stack else ""
        raise ConfigError(f"{path}: no such configuration file{origin}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    entries = _read_yaml(text, path)
    for key, value, _ in entries:
        if key == "BASE":
            for base in (b for b in _KIND["BASE"](value) if b):
                _merge_file(root, os.path.join(os.path.dirname(path), base), (*stack, real))
    for key, value, where in entries:
        if key != "BASE":
            _set(root, key, value, where, f"base {where}" if stack else where)


def _finish(root: CfgNode, opts: Sequence[str] | None) -> CfgNode:
    opts = list(opts or [])
    if len(opts) % 2:
        raise ConfigError(f"--opts takes pairs of KEY VALUE; {opts[-1]!r} has no partner")
    for key, raw in zip(opts[::2], opts[1::2], strict=True):
        _set(root, key, raw, "--opts", COMMAND_LINE)
    if root.TRAIN.LR_SCHEDULER.WARMUP_PREFIX is None:
        _set(root, "TRAIN.LR_SCHEDULER.WARMUP_PREFIX", root.MODEL.TYPE != "crossformer", "MODEL.TYPE", "derived from MODEL.TYPE")
    check(root)
    root.freeze()
    return root


def get_config(cfg_file: str | None = None, opts: Sequence[str] | None = None) -> CfgNode:
    """The frozen configuration: defaults, then the YAML file, then ``opts`` (``[KEY, VALUE, ...]``).

    Raises:
        ConfigError: an unknown key, a value of the wrong kind, an unreadable file, an impossible value.
    """
    root = default_config()
    if cfg_file:
        _merge_file(root, os.fspath(cfg_file))
    return _finish(root, opts)


def config_from_text(text: str, opts: Sequence[str] | None = None) -> CfgNode:
    """As ``get_config``, from YAML text as a checkpoint holds it (``BASE`` was resolved when it was written)."""
    root = default_config()
    for key, value, where in _read_yaml(text, "checkpoint"):
        if key != "BASE":
            _set(root, key, value, where, "checkpoint")
    return _finish(root, opts)


def config_for_another_command(text: str, data_path: str, opts: Sequence[str], name: str) -> CfgNode:
    """The config in the checkpoint ``name``, without what the command that wrote it asked for itself; its data lie at ``data_path``."""
    root = default_config()
    for key, value, where in _read_yaml(text, name):
        if key != "BASE" and not of_the_command(key):
            _set(root, key, value, where, f"checkpoint {name}")
    _set(root, "DATA.DATA_PATH", data_path, name, f"checkpoint {name}")
    return _finish(root, opts)


def with_values(config: CfgNode, values: Mapping[str, Any], source: str) -> CfgNode:
    """A frozen copy of ``config`` with other values, which come from ``source``.

    Raises:
        ConfigError: an impossible value.
    """
    root = config.clone()
    root.defrost()
    for key, value in values.items():
        _set(root, key, value, source)
    check(root)
    root.freeze()
    return root


# --------------------------------------------------------------------------------------------------
# Checking: impossible values stop the program before anything is built
# --------------------------------------------------------------------------------------------------

def lookup(config: CfgNode, key: str) -> Any:
    """The value under a dotted key such as ``TRAIN.EPOCHS``."""
    node: Any = config
    for part in key.split("."):
        node = node[part]
    return node


# What one command asks for; the config in a checkpoint that it left must not ask for it again, and no recipe depends on it.
COMMAND_NODES = ("PREDICT", "EXPORT", "REPORT", "SHOW", "PLAN", "COMPARE", "DOCTOR")
COMMAND_KEYS = ("TRAIN.AUTO_RESUME", "TRAIN.ACCEPT_CHANGES", "EVAL_MODE", "THROUGHPUT_MODE", "DOCTOR_MODE", "LOCAL_RANK",
                "TEST.FLIP", "TEST.LABELS", "TEST.REAL_LABELS", "TEST.PER_CLASS", "TEST.PREDICTIONS")


# Of these a command line asks for one; --throughput may stand beside --eval, as other trainers have it. (key, flag)
COMMANDS = (("EVAL_MODE", "--eval"), ("COMPARE.FILES", "--compare"), ("SHOW.BATCH", "--show-batch"),
            ("SHOW.ATTENTION", "--show-attention"), ("DOCTOR_MODE", "--doctor"), ("PREDICT.PATHS", "--predict"),
            ("EXPORT.FILE", "--export"), ("REPORT.RUNS", "--report"), ("REPORT.DIFF", "--diff"), ("PLAN.RUN", "--plan"))


def of_the_command(key: str) -> bool:
    """Whether ``key`` is a matter of one command alone, not of the run."""
    return key in COMMAND_KEYS or key.partition(".")[0] in COMMAND_NODES


def of_the_run(config: CfgNode) -> CfgNode:
    """``config`` without what one command alone asked for: as a file for ``--cfg`` it must not ask for that again."""
    return with_values(config, {key: default for key, default, *_ in KEYS if of_the_command(key)}, "default")


def takes_standard_output(config: CfgNode) -> bool:
    """Whether standard output is a command's data; what the program says then goes to standard error."""
    return "-" in (config.PREDICT.CSV, config.PREDICT.JSON) or (config.DOCTOR_MODE and config.DOCTOR.JSON == "-")


def image_size(config: CfgNode) -> tuple[int, int]:
    """(height, width) of the input in pixels."""
    size = config.DATA.IMG_SIZE
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def check(config: CfgNode) -> None:
    """Raise ``ConfigError`` for the first value that cannot work."""
    def require(condition: bool, key: str, rule: str) -> None:
        if not condition:
            raise ConfigError(f"{key} is {lookup(config, key)}; {rule}")

    def one_of(key: str, names: Sequence[str]) -> None:
        value = lookup(config, key)
        if value not in names:
            near = difflib.get_close_matches(str(value), names, n=1)
            raise ConfigError(f"{key} is {value!r}; choose from {', '.join(names)}"
                              + (f" (did you mean {near[0]}?)" if near else ""))

    train, schedule, aug = config.TRAIN, config.TRAIN.LR_SCHEDULER, config.AUG
    one_of("MODEL.TYPE", MODEL_TYPES)
    for key in ("MODEL.NAME", "TAG"):
        parts = lookup(config, key).replace("\\", "/").split("/")
        if ".." in parts or "." in parts or not all(part.strip() for part in parts):
            raise ConfigError(f"{key} is {lookup(config, key)!r}; it names the run's folder, so it must not be empty, absolute "
                              "or lead elsewhere")
    one_of("PRECISION", ("auto", "fp32", "bf16", "fp16"))
    one_of("COMPILE", ("off", "blocks", "model"))
    one_of("TRAIN.CHECKPOINT_UNIT", ("block", "stage"))
    one_of("TRAIN.GRAD_COMPRESSION", ("off", "bf16"))
    one_of("TRAIN.EMA_DEVICE", ("auto", "model", "cpu"))
    require(config.AMP_OPT_LEVEL in ("", "O0", "O1", "O2"), "AMP_OPT_LEVEL", "it is O0, O1 or O2; PRECISION is the newer key")
    if config.DATA.INTERPOLATION is not None:
        one_of("DATA.INTERPOLATION", ("bicubic", "bilinear", "lanczos", "nearest", "random"))
    one_of("TEST.FLIP", ("none", "logits", "probabilities"))
    require(len(config.COMPARE.FILES) in (0, 2), "COMPARE.FILES", "two checkpoints are compared")
    one_of("DATA.DECODER", ("auto", "fast", "pillow"))
    one_of("DATA.AUGMENT_ON", ("auto", "worker", "device"))
    one_of("DATA.DATASET", ("imagenet", "imagenet22K", "folder", "lists", "zip", "tar", "huggingface", "digits"))
    require(min(image_size(config)) > 0, "DATA.IMG_SIZE", "it must be positive")
    for key in ("DATA.BATCH_SIZE", "DATA.REPEATED_AUG", "TRAIN.ACCUMULATION_STEPS", "TRAIN.EPOCHS", "TRAIN.EVAL_FREQ",
                "SAVE_FREQ", "PRINT_FREQ", "AUG.RECOUNT"):
        require(lookup(config, key) >= 1, key, "it must be at least 1")
    for key in ("MODEL.NUM_CLASSES", "TRAIN.WARMUP_EPOCHS", "TRAIN.WEIGHT_DECAY", "TRAIN.CLIP_GRAD", "TRAIN.SAVE_EVERY_STEPS",
                "TRAIN.KEEP_CHECKPOINTS", "TRAIN.LR_BATCH", "TRAIN.SAVE_EVERY_MINUTES", "TRAIN.SKIP_BUDGET", "TRAIN.ROLLBACKS",
                "TRAIN.TENSORBOARD_HISTOGRAMS", "TRAIN.GLOBAL_BATCH", "TEST.BATCH_SIZE", "AUG.MIXUP", "AUG.CUTMIX",
                "AUG.COLOR_JITTER", "SEED"):
        require(lookup(config, key) >= 0, key, "it must not be negative")
    for key in ("DATA.CORRUPT_BUDGET", "DATA.READ_PATIENCE", "DATA.TIMEOUT"):
        require(lookup(config, key) >= 0, key, "it must not be negative")
    require(-1 <= config.DOCTOR.NEAR <= 11, "DOCTOR.NEAR", "bits between 0 and 11, or -1 for none")
    _check_commands(config, require)
    require(0 <= config.DATA.VAL_FRACTION < 1, "DATA.VAL_FRACTION", "a share lies in [0, 1)")
    require(0 < config.DATA.SUBSET <= 1, "DATA.SUBSET", "a share lies in (0, 1]")
    require(config.DATA.STREAM_IMAGES >= 0, "DATA.STREAM_IMAGES", "it is a number of images, or 0 to ask the stream")
    require(config.DATA.STREAM_BUFFER >= 1, "DATA.STREAM_BUFFER", "it must be positive")
    require(config.DATA.NUM_WORKERS >= -1, "DATA.NUM_WORKERS", "it is a number of processes, or -1 to choose it")
    require(not (config.PLAN.FIT and (config.EVAL_MODE or config.THROUGHPUT_MODE)), "PLAN.FIT",
            "--fit chooses the micro-batch of training; leave it out with --eval and --throughput")
    require(config.PLAN.SECONDS >= 0, "PLAN.SECONDS", "it must not be negative")
    require(config.DIST_TIMEOUT > 0, "DIST_TIMEOUT", "it is a number of minutes above 0")
    require(train.BASE_LR > 0, "TRAIN.BASE_LR", "a learning rate must be above 0")
    require(train.BASE_LR <= 1000, "TRAIN.BASE_LR", "no training survives that learning rate")
    require(train.WARMUP_LR >= 0, "TRAIN.WARMUP_LR", "it must not be negative")
    require(0 <= train.MIN_LR <= train.BASE_LR, "TRAIN.MIN_LR", f"it must lie between 0 and TRAIN.BASE_LR ({train.BASE_LR})")
    require(train.WARMUP_EPOCHS == 0 or train.WARMUP_EPOCHS < train.EPOCHS, "TRAIN.WARMUP_EPOCHS",
            f"the warm-up must end before training does (TRAIN.EPOCHS is {train.EPOCHS})")
    require(0 < train.LAYER_DECAY <= 1, "TRAIN.LAYER_DECAY", "it must lie in (0, 1]")
    require(0 <= train.EMA_DECAY < 1, "TRAIN.EMA_DECAY", "it must lie in [0, 1)")
    one_of("TRAIN.LR_SCHEDULER.NAME", ("cosine", "linear", "step", "multistep"))
    require(schedule.DECAY_EPOCHS > 0, "TRAIN.LR_SCHEDULER.DECAY_EPOCHS", "it must be above 0")
    require(0 < schedule.DECAY_RATE <= 1, "TRAIN.LR_SCHEDULER.DECAY_RATE", "it must lie in (0, 1]")
    require(0 < schedule.GAMMA <= 1, "TRAIN.LR_SCHEDULER.GAMMA", "it must lie in (0, 1]")
    if train.OPTIMIZER.BETAS is not None:
        require(len(train.OPTIMIZER.BETAS) >= 2 and all(0 <= b < 1 for b in train.OPTIMIZER.BETAS), "TRAIN.OPTIMIZER.BETAS",
                "two betas or more, in [0, 1)")
    if train.OPTIMIZER.EPS is not None:
        require(train.OPTIMIZER.EPS > 0, "TRAIN.OPTIMIZER.EPS", "it must be above 0")
    for key in (key for key in _KIND if key.endswith(".IN_CHANS")):
        require(lookup(config, key) in (None, 3), key, "images are read in RGB, so only 3 works here")
    require(0 <= train.OPTIMIZER.MOMENTUM < 1, "TRAIN.OPTIMIZER.MOMENTUM", "it must lie in [0, 1)")
    for key in ("MODEL.DROP_RATE", "MODEL.DROP_PATH_RATE", "MODEL.LABEL_SMOOTHING"):
        require(0 <= lookup(config, key) < 1, key, "it must lie in [0, 1)")
    for key in ("AUG.HFLIP", "AUG.VFLIP", "AUG.REPROB", "AUG.MIXUP_PROB", "AUG.MIXUP_SWITCH_PROB"):
        require(0 <= lookup(config, key) <= 1, key, "a probability lies between 0 and 1")
    require(len(aug.SCALE) == 2 and 0 < aug.SCALE[0] <= aug.SCALE[1] <= 1, "AUG.SCALE", "two shares of the image, rising, in (0, 1]")
    require(len(aug.RATIO) == 2 and 0 < aug.RATIO[0] <= aug.RATIO[1], "AUG.RATIO", "two aspect ratios, rising")
    one_of("TRAIN.REPORT", ("none", "html", "png"))
    one_of("TRACKER", ("none", "trackio", "wandb"))
    require(len(config.REPORT.DIFF) in (0, 2), "REPORT.DIFF", "two are compared: --diff A B")
    one_of("AUG.REMODE", ("const", "rand", "pixel"))
    one_of("AUG.MIXUP_MODE", ("batch", "pair", "elem"))
    if aug.CUTMIX_MINMAX is not None:
        require(len(aug.CUTMIX_MINMAX) == 2 and 0 < aug.CUTMIX_MINMAX[0] <= aug.CUTMIX_MINMAX[1] <= 1, "AUG.CUTMIX_MINMAX",
                "two shares of the side, rising, in (0, 1]")
    for key in ("DATA.MEAN", "DATA.STD"):
        value = lookup(config, key)
        require(value is None or (len(value) == 3 and (key == "DATA.MEAN" or min(value) > 0)), key, "three numbers, one a channel")


def _check_commands(config: CfgNode, require: Callable[[bool, str, str], None]) -> None:
    """The keys of single commands."""
    predict, export = config.PREDICT, config.EXPORT
    require(predict.TOPK >= 1, "PREDICT.TOPK", "it must be at least 1")
    require(all(predict.PATHS), "PREDICT.PATHS", "a path must not be empty")
    require(predict.FEATURES.endswith((".npy", ".safetensors")) or not predict.FEATURES, "PREDICT.FEATURES",
            "it ends in .npy or .safetensors")
    require(predict.SHEET.endswith(".png") or not predict.SHEET, "PREDICT.SHEET", "it ends in .png")
    outputs = [key for key in ("PREDICT.CSV", "PREDICT.JSON", "PREDICT.FEATURES", "PREDICT.SHEET") if lookup(config, key)]
    for number, key in enumerate(outputs):
        require(bool(predict.PATHS), key, "it goes with --predict, which says what images to predict")
        require(lookup(config, key) not in [lookup(config, other) for other in outputs[:number]], key,
                "another output goes there already")
    require(export.OPSET >= 18, "EXPORT.OPSET", "the exporter writes operator sets from 18 on")
    asked = [flag for key, flag in COMMANDS if lookup(config, key)]
    if len(asked) > 1:
        raise ConfigError(f"{' and '.join(asked)} are commands of their own; give one of them")
