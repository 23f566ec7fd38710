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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml
from yacs.config import CfgNode

PROGRAM_FOLDER = os.path.dirname(os.path.abspath(__file__))


class ProgramError(Exception):
    """A failure that is told in one sentence, with the exit status that it leads to.

    Attributes:
        any_rank: a single process of several may meet it, so that whoever does says it.
    """

    exit_status = 1
    any_rank = False


class ConfigError(ProgramError, ValueError):
    """A configuration or usage mistake; the message is one sentence with the remedy."""

    exit_status = 2


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


def _output(value: Any) -> str:
    """A file to write, or ``-`` for standard output, under whatever name."""
    text = _str(value)
    return "-" if text in ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1") else text


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


def _mapping(value: Any) -> CfgNode:
    """Names with plain values: numbers, texts, lists of them. As a node of the tree: a dump then holds it."""
    value = _literal(value)
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ValueError("a mapping of names to values, such as {name: 1}")
    return CfgNode({name: _plain_value(item) for name, item in value.items()})


def _plain_value(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain_value(item) for item in value]
    if value is None or isinstance(value, (bool, int)):
        return value
    if not isinstance(value, (float, str)):
        raise ValueError("a mapping of names to numbers, texts or lists of them")
    try:
        return _float(value)  # 1e-3, a text in YAML 1.1
    except ValueError:
        return value


def _base(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else _strs(value)


def _optional(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def maybe(value: Any) -> Any:
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "")):
            return None
        return convert(value)
    return maybe


# --------------------------------------------------------------------------------------------------
# What a key is: its default, its kind, what it means, what values it takes, and whose matter it is
# --------------------------------------------------------------------------------------------------

class Rule(NamedTuple):
    """What a value must fulfil; ``words`` say so behind «KEY is VALUE; »."""

    holds: Callable[[Any], bool]
    words: str


RECIPE = "recipe"  # of what is learned: a run is not continued with another value unless that is meant
RUN = "run"  # where, how fast, how loud and how safely: free to change when a run is continued
PROCESS = "process"  # as RUN, and processes of one job may have different values
COMMAND = "command"  # a matter of one command alone: the config in a checkpoint does not keep it


class Key(NamedTuple):
    """A key of the tree.

    Attributes:
        kind: makes the value of what a YAML file or a command line holds; ``ValueError`` says what it should be.
        rule: for values that are not None.
        choices: the only values there are; ``words``: values worth offering where others are possible.
        scope: RECIPE, RUN, PROCESS or COMMAND.
    """

    name: str
    default: Any
    kind: Callable[[Any], Any]
    meaning: str
    rule: Rule | None = None
    choices: Sequence[str] = ()
    words: Sequence[str] = ()
    scope: str = RECIPE

    @property
    def explanation(self) -> str:
        """The choices where there are any, or some where there are others, and the meaning."""
        shown = [*filter(None, self.choices), *(self.words and (*self.words, "..."))]
        return (f"{', '.join(shown)}: " if shown else "") + self.meaning


AT_LEAST_1 = Rule(lambda number: number >= 1, "it must be at least 1")
NOT_NEGATIVE = Rule(lambda number: number >= 0, "it must not be negative")
ABOVE_0 = Rule(lambda number: number > 0, "it must be above 0")
UP_TO_1 = Rule(lambda number: 0 < number <= 1, "it must lie in (0, 1]")
BELOW_1 = Rule(lambda number: 0 <= number < 1, "it must lie in [0, 1)")
PROBABILITY = Rule(lambda number: 0 <= number <= 1, "a probability lies between 0 and 1")
LEARNING_RATE = Rule(lambda rate: 0 < rate <= 1000, "a learning rate lies above 0, and no training survives one above 1000")
PIXELS = Rule(lambda size: min(size if isinstance(size, list) else [size]) > 0, "it must be positive")
SHARES = Rule(lambda pair: len(pair) == 2 and 0 < pair[0] <= pair[1] <= 1, "two shares, rising, in (0, 1]")
RISING = Rule(lambda pair: len(pair) == 2 and 0 < pair[0] <= pair[1], "two positive numbers, rising")
PAIR = Rule(lambda paths: len(paths) in (0, 2), "two are compared")
RGB = Rule(lambda channels: channels == 3, "images are read in RGB, so only 3 works here")
RGB_NUMBERS = Rule(lambda values: len(values) == 3, "three numbers, one a channel")
RGB_POSITIVE = Rule(lambda values: len(values) == 3 and min(values) > 0, "three numbers above 0, one a channel")


def _names_a_folder(text: str) -> bool:
    parts = text.replace("\\", "/").split("/")
    return ".." not in parts and "." not in parts and all(part.strip() for part in parts)


def _is_fold(text: str) -> bool:
    found = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text)
    return 1 <= int(found[1]) <= int(found[2]) >= 2 if found else "/" not in text


FOLD = Rule(_is_fold, "2/5 is the second of five folds; in a list with a fold column also what that column calls it")
FOLDER_NAME = Rule(_names_a_folder, "it names the run's folder, so it must not be empty, absolute or lead elsewhere")


def ends_in(*suffixes: str) -> Rule:
    return Rule(lambda path: not path or path.endswith(suffixes), f"it ends in {' or '.join(suffixes)}")


MODEL_TYPES = ("crossformer", "swin", "swinv2", "swin_mlp", "cvt", "shunted", "mpvit", "pvt", "pvt_v2", "galerkin", "timm")
LABEL_SETS = ("auto", "imagenet", "v2", "a", "r", "sketch", "real")

# --------------------------------------------------------------------------------------------------
# The commands: one entry each. Parser, help, completion and dispatch come from here; so do the keys of each
# --------------------------------------------------------------------------------------------------

class Flag(NamedTuple):
    """A flag of the command line, which sets a key.

    Attributes:
        help: the key's own explanation where empty.
        fixed: the value it sets; None where it takes an argument.
        several: it takes one argument or more.
        metavar: the word for its argument in the help; by default the flag's last one.
    """

    name: str
    key: str
    help: str = ""
    fixed: str | None = None
    several: bool = False
    metavar: str = ""


class Command(NamedTuple):
    """What the program does instead of training.

    Attributes:
        flag: what asks for it.
        run: module and function in utils/commands, imported when it is run. It takes (config, content of the file that MODEL.RESUME
            names or None, device, logger), or where ``light`` (config, logger), and returns an exit status, or None for 0.
        keys: its own, ``scope`` COMMAND.
        flags: further flags of it.
        light: it needs neither a model nor a device, nor torch where MODEL.RESUME is empty; one process of a job runs it.
        to_stdout: keys whose value ``-`` makes standard output this command's data.
        beside: flags of other commands that may stand beside its own, without effect (as other trainers have it).
    """

    flag: Flag
    run: str
    keys: Sequence[Key] = ()
    flags: Sequence[Flag] = ()
    light: bool = False
    to_stdout: Sequence[str] = ()
    beside: Sequence[str] = ()


COMMANDS: tuple[Command, ...] = (
    Command(
        Flag("--eval", "EVAL_MODE", "evaluate a checkpoint; with --resume nothing else is needed", "True"), "evaluate.evaluate_run",
        keys=(
        Key("EVAL_MODE", False, _bool, "evaluate only (--eval)"),
        Key("TEST.SPLIT", "val", _str,
            "--eval: split to evaluate, any that the data has; all is everything there is", Rule(bool, "it must not be empty"),
            words=("val", "test", "train", "all")),
        Key("TEST.FLIP", "none", _str,
            "--eval: mean of an image and its mirror image, of logits or of probabilities", choices=("none", "logits", "probabilities")),
        Key("TEST.LABELS", "auto", _str,
            "--eval: label set of an ImageNet variant, or a text file of the classes that predictions are chosen from, one a line",
            words=LABEL_SETS),
        Key("TEST.REAL_LABELS", "", _str,
            "--eval: real.json of the ReaL labels (a list of labels an image); empty is the one that timm carries"),
        Key("TEST.PER_CLASS", "", _str,
            "--eval: CSV file for each class's recall, precision, F1 and the class it is most often confused with"),
        Key("TEST.PREDICTIONS", "", _str, "file (.npz) for the prediction of every image under --eval; empty writes none"),
        ),
        flags=(
            Flag("--split", "TEST.SPLIT"),
            Flag("--labels", "TEST.LABELS", metavar="SET"),
            Flag("--real-labels", "TEST.REAL_LABELS", "real.json, where another than timm's is to be used", metavar="FILE"),
            Flag("--per-class", "TEST.PER_CLASS", "CSV file for the figures of each class", metavar="FILE"),
            Flag("--test-flip", "TEST.FLIP", "evaluate the mean logits of each image and its mirror image", "logits"),
        )),
    Command(
        Flag("--compare", "COMPARE.FILES", "evaluate two checkpoints on the same images, with a paired test", several=True, metavar="FILE"),
        "compare.compare_run",
        keys=(
        Key("COMPARE.FILES", [], _strs, "two checkpoints to evaluate on the same images, with a paired test (--compare)", PAIR),
        )),
    Command(
        Flag("--predict", "PREDICT.PATHS",
             "classes of images: files, folders, 'patterns/*.png', lists in .txt files (a path a line, relative to the list), - for a list "
             "on standard input; with --resume; status 3 if any cannot be read, after the others", several=True, metavar="PATH"),
        "predict.predict_run",
        keys=(
        Key("PREDICT.PATHS", [], _strs,
            "images to predict (--predict): files, folders, patterns, lists of them in .txt files; - is a list on standard input",
            Rule(all, "a path must not be empty")),
        Key("PREDICT.TOPK", 5, _int, "classes shown for an image, most probable first", AT_LEAST_1),
        Key("PREDICT.CSV", "", _output, "table of the predictions, a row an image; - is standard output"),
        Key("PREDICT.JSON", "", _output, "predictions as JSON, a line an image; - is standard output"),
        Key("PREDICT.FEATURES", "", _str,
            "pooled features before the classifier: FILE.npy or FILE.safetensors, with FILE.paths.json", ends_in(".npy", ".safetensors")),
        Key("PREDICT.SHEET", "", _str,
            "picture of the images with their classes, FILE.png; more pages are FILE-2.png and so on", ends_in(".png")),
        ),
        flags=(
            Flag("--topk", "PREDICT.TOPK", "classes shown for an image (5)", metavar="NUMBER"),
            Flag("--csv", "PREDICT.CSV", "file for the predictions as a table; - is standard output", metavar="FILE"),
            Flag("--json", "PREDICT.JSON", "file for the predictions, a line of JSON an image; - is standard output", metavar="FILE"),
            Flag("--features", "PREDICT.FEATURES", "file.npy or file.safetensors for the features before the classifier", metavar="FILE"),
            Flag("--sheet", "PREDICT.SHEET", "file.png for a picture of the images and their classes", metavar="FILE"),
        ),
        to_stdout=("PREDICT.CSV", "PREDICT.JSON")),
    Command(
        Flag("--export", "EXPORT.FILE", "write the model as file.onnx, file.pt2, or a folder that timm opens; with --resume",
             metavar="FILE"),
        "export.export_run",
        keys=(
        Key("EXPORT.FILE", "", _str,
            "what --export writes: FILE.onnx, FILE.pt2, or a folder (or FILE.safetensors) as timm and its hub have it"),
        Key("EXPORT.OPSET", 18, _int,
            "ONNX operator set", Rule(lambda number: number >= 18, "the exporter writes operator sets from 18 on")),
        Key("EXPORT.PREPROCESS", False, _bool, "ONNX and pt2: normalise inside the model, which then takes pixels of 0 to 255"),
        )),
    Command(
        Flag("--plan", "PLAN.RUN", "dry run: memory, speed, time and disk that the run will take; status 1: it does not fit", "True"),
        "plan.plan_run",
        keys=(
        Key("PLAN.RUN", False, _bool, "dry run (--plan): a few steps, an evaluation batch, a save and a load; says what the run will take"),
        Key("PLAN.FIT", False, _bool, "train (or plan) with the largest micro-batch that memory holds, the global batch staying (--fit)"),
        Key("PLAN.MEMORY", 0, _bytes,
            "memory that --plan and --fit may use, e.g. 24GB, for each GPU, or on a CPU for all processes together; 0: all there is"),
        Key("PLAN.SECONDS", 4.0, _float, "about how long --plan measures each speed; longer is more exact", NOT_NEGATIVE),
        Key("PLAN.SCRATCH", "", _str, "folder on whose disk --plan tries a save; empty is the system's folder for temporary files"),
        )),
    Command(
        Flag("--doctor", "DOCTOR_MODE", "read all images, say what is wrong and how to mend it; status 3: errors", "True"),
        "doctor.examine_run",
        keys=(
        Key("DOCTOR_MODE", False, _bool, "read and check the data only (--doctor)"),
        Key("DOCTOR.FOLDER", "", _str,
            "where the doctor writes its report, manifests and scripts; empty is OUTPUT/doctor/<name of the data>"),
        Key("DOCTOR.JSON", "", _output, "file for the doctor's report as JSON; - is standard output; empty is report.json in its folder"),
        Key("DOCTOR.NEAR", 8, _int,
            "bits of 128 in which the fingerprints of a training and a validation image may differ to be compared closer (0 to 11; -1: "
            "none)", Rule(lambda bits: -1 <= bits <= 11, "bits between 0 and 11, or -1 for none")),
        ),
        flags=(Flag("--doctor-json", "DOCTOR.JSON", "file for the doctor's report as JSON; - is standard output", metavar="FILE"),),
        light=True, to_stdout=("DOCTOR.JSON",)),
    Command(
        Flag("--throughput", "THROUGHPUT_MODE", "measure speed and memory of the model, on synthetic images", "True"),
        "throughput.measure_throughput",
        keys=(
        Key("THROUGHPUT_MODE", False, _bool, "measure speed only (--throughput)"),
        ),
        beside=("--eval",)),
    Command(
        Flag("--report", "REPORT.RUNS", "write a run folder's report.html; of several runs a comparison", several=True, metavar="RUN"),
        "report.report_runs",
        keys=(
        Key("REPORT.RUNS", [], _strs, "run folders to report on (--report); several are compared"),
        Key("REPORT.FILE", "", _str,
            "where that report goes; empty is report.html (of several runs comparison.html) in the first run's folder"),
        ),
        light=True),
    Command(
        Flag("--diff", "REPORT.DIFF", "show how two runs, checkpoints or YAML files differ", several=True, metavar="RUN"),
        "show_config.print_differences",
        keys=(
        Key("REPORT.DIFF", [], _strs, "two runs, checkpoints or YAML files to show the differences of (--diff)", PAIR),
        ),
        light=True),
    Command(
        Flag("--print-config", "REPORT.CONFIG", "print the config with the source of every value", "True"), "show_config.print_config",
        keys=(
        Key("REPORT.CONFIG", False, _bool, "print the config with the source of every value (--print-config)"),
        ),
        light=True),
    Command(
        Flag("--show-batch", "SHOW.BATCH", "PNG file: the first training batch with its labels, as the model sees it", metavar="FILE"),
        "show_batch.show_batch",
        keys=(
        Key("SHOW.BATCH", "", _str, "PNG file for the first training batch as the model sees it (--show-batch)"),
        )),
    Command(
        Flag("--show-attention", "SHOW.ATTENTION", "image: draw which tokens of it a CrossFormer's token attends to", metavar="IMAGE"),
        "show_attention.show_attention",
        keys=(
        Key("SHOW.ATTENTION", "", _str, "image on which a CrossFormer's attention is drawn (--show-attention)"),
        Key("SHOW.TOKEN", "", _str,
            "y,x in pixels of the model's input: the token whose attention is drawn; empty is the centre (--show-token)"),
        Key("SHOW.FILE", "attention.png", _str, "PNG file for the attention (--show-file)"),
        ),
        flags=(
            Flag("--show-token", "SHOW.TOKEN", "y,x in pixels of the input: that token, not the central one", metavar="Y,X"),
            Flag("--show-file", "SHOW.FILE", "PNG file for the attention; else attention.png", metavar="FILE"),
        )),
)

# --------------------------------------------------------------------------------------------------
# The tree. `None` under a model's node means the variant's own value
# --------------------------------------------------------------------------------------------------

KEYS: tuple[Key, ...] = (
    Key("BASE", [""], _base, "YAML files merged before this one, relative to it", scope=RUN),
    Key("OUTPUT", "output", _str, "folder of all runs; a run lives in OUTPUT/MODEL.NAME/TAG", scope=PROCESS),
    Key("TAG", "default", _str, "name of the run", FOLDER_NAME, scope=RUN),
    Key("SEED", 0, _int, "everything random derives from it: order, augmentation, mixup, dropout, initialisation", NOT_NEGATIVE),
    Key("TASK", "auto", _str,
        "what is learned: one class an image, or several labels; auto: several where a list, unambiguously, has them",
        words=("auto", "classification", "multilabel")),
    Key("DEVICE", "auto", _str,
        "cuda:1 is the second GPU; auto takes CUDA, then MPS, then the CPU", words=("auto", "cpu", "cuda", "mps"), scope=PROCESS),
    Key("PRECISION", "auto", _str,
        "auto is bf16 where GPU or CPU compute it (fp16 on older GPUs), else fp32", choices=("auto", "fp32", "bf16", "fp16")),
    Key("COMPILE", "off", _off_or,
        "torch.compile: blocks, each kind of block once; model, the whole (longest start, most speed)",
        choices=("off", "blocks", "model"), scope=RUN),
    Key("SAVE_FREQ", 1, _int, "save a checkpoint every so many epochs (the last epoch is always saved)", AT_LEAST_1, scope=RUN),
    Key("PRINT_FREQ", 10, _int, "log a line every so many steps", AT_LEAST_1, scope=RUN),
    Key("AMP_ENABLE", True, _bool, "allow mixed precision; False is PRECISION fp32"),
    Key("AMP_OPT_LEVEL", "", _str,
        "apex's old spelling: O0 is fp32, O1 and O2 mixed precision; PRECISION is the newer key", choices=("", "O0", "O1", "O2")),
    Key("TRACKER", "none", _str, "where the curves of a run go besides its folder", choices=("none", "trackio", "wandb"), scope=RUN),
    Key("TRACKER_PROJECT", "", _str, "project of the tracker; empty is the model's name", scope=RUN),
    Key("DIST_TIMEOUT", 20.0, _float,
        "minutes without progress after which a job of several processes ends, naming the one it waits for", ABOVE_0, scope=RUN),
    Key("LOCAL_RANK", 0, _int, "accepted from old files; the launcher's environment decides", scope=PROCESS),
    Key("FUSED_WINDOW_PROCESS", False, _bool, "accepted from old files; has no effect"),
    Key("FUSED_LAYERNORM", False, _bool, "use NVIDIA apex's fused layer norm when apex is installed"),

    Key("DATA.DATA_PATH", "", _str,
        "folder with train/ and val/ (or validation/), each holding a folder a class, or another layout (README)", scope=PROCESS),
    Key("DATA.VAL_PATH", "", _str, "validation shards where DATA.DATA_PATH is a stream of WebDataset shards: file:///d/val-{00..04}.tar"),
    Key("DATA.STREAM_IMAGES", 0, _int, "training images of a stream that does not tell; 0 asks the stream", NOT_NEGATIVE),
    Key("DATA.STREAM_BUFFER", 4096, _int, "encoded images held by each process to shuffle a stream of training images", ABOVE_0),
    Key("DATA.DATASET", "imagenet", _str,
        "imagenet takes whatever layout it finds; folder, lists, zip, tar and huggingface look for that alone; digits are scikit-learn's",
        choices=("imagenet", "imagenet22K", "folder", "lists", "zip", "tar", "huggingface", "digits"), scope=RUN),
    Key("DATA.BATCH_SIZE", 128, _int, "images per process and micro-batch", AT_LEAST_1, scope=RUN),
    Key("DATA.IMG_SIZE", 224, _size, "input size in pixels: one number, or [height, width]", PIXELS),
    Key("DATA.FIT", "crop", _str,
        "how images come to DATA.IMG_SIZE, in training and evaluation: crop cuts parts out; squash and pad (with the mean colour) keep the "
        "whole of wide or tall images in sight, AUG.RATIO being relative to their own", choices=("crop", "squash", "pad")),
    Key("DATA.INTERPOLATION", None, _optional(_str),
        "of resizing; None is the model's, else bicubic", choices=("bicubic", "bilinear", "lanczos", "nearest", "random")),
    Key("DATA.MEAN", None, _optional(_floats), "channel means of the normalisation; None is the model's, else ImageNet's", RGB_NUMBERS),
    Key("DATA.STD", None, _optional(_floats),
        "channel deviations of the normalisation; None is the model's, else ImageNet's", RGB_POSITIVE),
    Key("DATA.WINDOW", None, _optional(_floats),
        "values that are black and white in images of more than 8 bits a channel, e.g. [0, 4095]; None finds them in the data",
        Rule(lambda pair: len(pair) == 2 and pair[0] < pair[1], "two numbers, rising")),
    Key("DATA.MASK_PATCH_SIZE", 32, _int, "TASK simmim: side in pixels of the squares that are masked", AT_LEAST_1),
    Key("DATA.MASK_RATIO", 0.6, _float, "TASK simmim: share of the squares that are masked",
        Rule(lambda share: 0 < share < 1, "it must lie between 0 and 1")),
    Key("DATA.REPEATED_AUG", 1, _int, "copies of an image in an epoch, each augmented differently (DeiT uses 3)", AT_LEAST_1),
    Key("DATA.NUM_WORKERS", -1, _int,
        "DataLoader workers of each process; -1 chooses from the CPUs this process may use",
        Rule(lambda number: number >= -1, "it is a number of workers, or -1 to choose it"), scope=PROCESS),
    Key("DATA.PIN_MEMORY", True, _bool, "page-locked batches for faster copies to a GPU", scope=RUN),
    Key("DATA.DECODER", "auto", _str,
        "pillow: every pixel as the papers had it; fast: also where published weights are evaluated", choices=("auto", "fast", "pillow")),
    Key("DATA.AUGMENT_ON", "auto", _str,
        "auto: on a GPU the GPU augments, else the DataLoader workers do", choices=("auto", "worker", "device")),
    Key("DATA.VAL_FRACTION", 0.0, _float,
        "share of each class kept for validation where the data has no split of its own, e.g. 0.1", BELOW_1),
    Key("DATA.FOLD", "", _str,
        "one part of a cross-validation, for validation: 2/5 is the second of five, stratified by class (and by the fold column of a list, "
        "where it has one, whose own names do too)", FOLD),
    Key("DATA.VAL_LABELS", "", _str, "file with the labels of a flat validation folder; empty looks for the usual ones"),
    Key("DATA.CLASS_NAMES", "", _str,
        "text file, a line a class in the classifier's order: a label, or label<TAB>class; others are left out"),
    Key("DATA.LABEL_SEPARATOR", "auto", _str,
        "what joins several labels of an image in a list; none: labels are names of classes as they stand; auto: | ; or , where a list "
        "uses one so", choices=("auto", "none", "|", ";", ",", "blank")),
    Key("DATA.IMAGE_COLUMN", "", _str, "lists with a header: column of the images' paths; empty finds it"),
    Key("DATA.LABEL_COLUMN", "", _str, "lists with a header: column of the labels; empty finds it"),
    Key("DATA.SPLIT_COLUMN", "", _str, "lists with a header: column that says train, val or test, or a fold's number; empty finds it"),
    Key("DATA.GROUP_COLUMN", "", _str,
        "lists with a header: column of what stays together in one fold or split (a patient); empty finds group, patient_id and the like"),
    Key("DATA.IMAGE_ROOT", "", _str, "folder that the paths in a list are relative to; empty finds it", scope=PROCESS),
    Key("DATA.IMAGE_SUFFIX", "", _str, "suffix that a list leaves out of its images' names, such as .jpg; empty finds it", scope=RUN),
    Key("DATA.SUBSET", 1.0, _float, "share of each class's training images to use, chosen by the seed, e.g. 0.1", UP_TO_1),
    Key("DATA.EXIF", False, _bool, "turn images upright as their EXIF block says (the papers, torchvision and timm do not)"),
    Key("DATA.CORRUPT_BUDGET", 0.001, _float,
        "unreadable training images to go on with: below 1 a share of them, else a number", NOT_NEGATIVE, scope=RUN),
    Key("DATA.READ_PATIENCE", 2.0, _float,
        "seconds that a failing read (file gone, share away) is tried again before the image is bad", NOT_NEGATIVE, scope=RUN),
    Key("DATA.TIMEOUT", 600.0, _float,
        "seconds without a batch after which loading counts as hung; 0 waits for ever", NOT_NEGATIVE, scope=RUN),
    Key("DATA.INDEX_CACHE", "auto", _str,
        "folder for the file lists of large data sets; auto is the user's cache folder, none keeps none", scope=RUN),
    Key("DATA.ZIP_MODE", False, _bool, "read train.zip and val.zip with their map files (train_map.txt), as Swin has them", scope=RUN),
    Key("DATA.CACHE_MODE", "part", _str, "accepted from old files; has no effect", scope=RUN),

    Key("MODEL.TYPE", "crossformer", _str, "family of the model; timm is any timm model", choices=MODEL_TYPES),
    Key("MODEL.NAME", "crossformer_tiny", _str, "variant of the family, or a label when the family's node gives the numbers", FOLDER_NAME),
    Key("MODEL.NUM_CLASSES", 0, _int, "0 counts them in the data; another number must agree with the data", NOT_NEGATIVE, scope=RUN),
    Key("MODEL.PRETRAINED", "", _str, "file of weights to start from (head and sizes are adapted), or hub for timm's own", scope=RUN),
    Key("MODEL.CLASS_MAP", "", _str, "text file, a line a class: its row in the pretrained classifier (ImageNet-22k to 1k)"),
    Key("MODEL.RESUME", "", _str, "checkpoint to continue (training), or to evaluate, predict with or export", scope=RUN),
    Key("MODEL.DROP_RATE", 0.0, _float, "dropout rate", BELOW_1),
    Key("MODEL.DROP_PATH_RATE", 0.1, _float, "stochastic depth: rate of the last block, growing linearly from 0", BELOW_1),
    Key("MODEL.SIMMIM.NORM_TARGET.ENABLE", False, _bool,
        "TASK simmim: predict pixels normalised by their neighbourhood's mean and deviation"),
    Key("MODEL.SIMMIM.NORM_TARGET.PATCH_SIZE", 47, _int, "side of that neighbourhood in pixels",
        Rule(lambda side: side >= 1 and side % 2 == 1, "an odd number of pixels, so that a pixel is its centre")),
    Key("MODEL.LABEL_SMOOTHING", 0.1, _float, "label smoothing", BELOW_1),

    Key("MODEL.CROSSFORMER.EMBED_DIM", None, _optional(_int), "width of the first stage"),
    Key("MODEL.CROSSFORMER.DEPTHS", None, _optional(_ints), "blocks per stage"),
    Key("MODEL.CROSSFORMER.NUM_HEADS", None, _optional(_ints), "heads per stage"),
    Key("MODEL.CROSSFORMER.GROUP_SIZE", None, _optional(_ints), "group size per stage"),
    Key("MODEL.CROSSFORMER.INTERVAL", None, _optional(_ints), "interval of long-distance attention per stage"),
    Key("MODEL.CROSSFORMER.PATCH_SIZE", None, _optional(_int_or_list), "kernels of the image embedding, e.g. [4, 8, 16, 32]"),
    Key("MODEL.CROSSFORMER.MERGE_SIZE", None, _optional(_int_lists), "kernels of the embeddings between stages"),
    Key("MODEL.CROSSFORMER.MLP_RATIO", None, _optional(_number_or_list), "hidden width of the MLPs over their width"),
    Key("MODEL.CROSSFORMER.IN_CHANS", None, _optional(_int), "input channels", RGB),
    Key("MODEL.CROSSFORMER.QKV_BIAS", None, _optional(_bool), "bias of the query, key and value projection"),
    Key("MODEL.CROSSFORMER.QK_SCALE", None, _optional(_float), "scale of the queries; None is head width ** -0.5"),
    Key("MODEL.CROSSFORMER.ATTENTION", None, _optional(_str), "lsda (short and long distance in turn), sda or lda alone"),
    Key("MODEL.CROSSFORMER.POSITION", None, _optional(_str), "position bias: dpb, dpb_residual, table (Swin's) or none"),
    Key("MODEL.CROSSFORMER.APE", None, _optional(_bool), "learned absolute position embedding on the tokens"),
    Key("MODEL.CROSSFORMER.PATCH_NORM", None, _optional(_bool), "layer norm after the image embedding"),
    Key("MODEL.CROSSFORMER.GROUP_TYPE", None, _optional(_str), "constant, linear, linear_div, alter or 7_14 (CrossFormer++)"),
    Key("MODEL.CROSSFORMER.USE_ACL", None, _optional(_bool), "amplitude cooling layers (CrossFormer++)"),
    Key("MODEL.CROSSFORMER.USE_CPE", None, _optional(_bool), "accepted from old files; only False"),
    Key("MODEL.CROSSFORMER.PAD_TYPE", None, _optional(_int), "accepted from old files; only 0"),
    Key("MODEL.CROSSFORMER.NO_MASK", None, _optional(_bool), "let attention see the padding"),
    Key("MODEL.CROSSFORMER.ADAPT_INTER", None, _optional(_bool), "accepted from old files; only False"),

    Key("MODEL.SWIN.EMBED_DIM", None, _optional(_int), "width of the first stage"),
    Key("MODEL.SWIN.DEPTHS", None, _optional(_ints), "blocks per stage"),
    Key("MODEL.SWIN.NUM_HEADS", None, _optional(_ints), "heads per stage"),
    Key("MODEL.SWIN.WINDOW_SIZE", None, _optional(_int), "window size"),
    Key("MODEL.SWIN.PATCH_SIZE", None, _optional(_int), "patch size"),
    Key("MODEL.SWIN.IN_CHANS", None, _optional(_int), "input channels", RGB),
    Key("MODEL.SWIN.MLP_RATIO", None, _optional(_float), "hidden width of the MLPs over their width"),
    Key("MODEL.SWIN.QKV_BIAS", None, _optional(_bool), "bias of the query, key and value projection"),
    Key("MODEL.SWIN.QK_SCALE", None, _optional(_float), "accepted from old files; only None"),
    Key("MODEL.SWIN.APE", None, _optional(_bool), "accepted from old files; only False"),
    Key("MODEL.SWIN.PATCH_NORM", None, _optional(_bool), "accepted from old files; only True"),

    Key("MODEL.SWINV2.EMBED_DIM", None, _optional(_int), "width of the first stage"),
    Key("MODEL.SWINV2.DEPTHS", None, _optional(_ints), "blocks per stage"),
    Key("MODEL.SWINV2.NUM_HEADS", None, _optional(_ints), "heads per stage"),
    Key("MODEL.SWINV2.WINDOW_SIZE", None, _optional(_int), "window size"),
    Key("MODEL.SWINV2.PRETRAINED_WINDOW_SIZES", None, _optional(_ints),
        "window sizes per stage that the weights to start from were trained with; 0: this model's own"),
    Key("MODEL.SWINV2.PATCH_SIZE", None, _optional(_int), "patch size"),
    Key("MODEL.SWINV2.IN_CHANS", None, _optional(_int), "input channels", RGB),
    Key("MODEL.SWINV2.MLP_RATIO", None, _optional(_float), "hidden width of the MLPs over their width"),
    Key("MODEL.SWINV2.QKV_BIAS", None, _optional(_bool), "bias of the query and value projection"),
    Key("MODEL.SWINV2.APE", None, _optional(_bool), "accepted from old files; only False"),
    Key("MODEL.SWINV2.PATCH_NORM", None, _optional(_bool), "accepted from old files; only True"),

    Key("MODEL.SWIN_MLP.EMBED_DIM", None, _optional(_int), "width of the first stage"),
    Key("MODEL.SWIN_MLP.DEPTHS", None, _optional(_ints), "blocks per stage"),
    Key("MODEL.SWIN_MLP.NUM_HEADS", None, _optional(_ints), "heads per stage"),
    Key("MODEL.SWIN_MLP.WINDOW_SIZE", None, _optional(_int), "window size"),
    Key("MODEL.SWIN_MLP.PATCH_SIZE", None, _optional(_int), "patch size"),
    Key("MODEL.SWIN_MLP.IN_CHANS", None, _optional(_int), "input channels", RGB),
    Key("MODEL.SWIN_MLP.MLP_RATIO", None, _optional(_float), "hidden width of the MLPs over their width"),
    Key("MODEL.SWIN_MLP.APE", None, _optional(_bool), "accepted from old files; only False"),
    Key("MODEL.SWIN_MLP.PATCH_NORM", None, _optional(_bool), "accepted from old files; only True"),

    Key("MODEL.CVT.EMBED_DIMS", None, _optional(_ints), "width per stage"),
    Key("MODEL.CVT.DEPTHS", None, _optional(_ints), "blocks per stage"),
    Key("MODEL.CVT.NUM_HEADS", None, _optional(_ints), "heads per stage"),
    Key("MODEL.CVT.MLP_RATIOS", None, _optional(_floats), "hidden width of the MLPs over their width, per stage"),
    Key("MODEL.CVT.PATCH_SIZES", None, _optional(_ints), "kernels of the embeddings"),
    Key("MODEL.CVT.PATCH_STRIDES", None, _optional(_ints), "strides of the embeddings"),
    Key("MODEL.CVT.PATCH_PADDINGS", None, _optional(_ints), "paddings of the embeddings"),
    Key("MODEL.CVT.KV_STRIDES", None, _optional(_ints), "stride of the key and value projections per stage"),
    Key("MODEL.CVT.QKV_BIAS", None, _optional(_bool), "bias of the query, key and value projection"),
    Key("MODEL.CVT.IN_CHANS", None, _optional(_int), "input channels", RGB),

    Key("MODEL.SHUNTED.EMBED_DIMS", None, _optional(_ints), "width per stage"),
    Key("MODEL.SHUNTED.DEPTHS", None, _optional(_ints), "blocks per stage"),
    Key("MODEL.SHUNTED.NUM_HEADS", None, _optional(_ints), "heads per stage"),
    Key("MODEL.SHUNTED.MLP_RATIOS", None, _optional(_floats), "hidden width of the MLPs over their width, per stage"),
    Key("MODEL.SHUNTED.SR_RATIOS", None, _optional(_ints), "merging rate of keys and values per stage (even; 1 is none)"),
    Key("MODEL.SHUNTED.NUM_CONV", None, _optional(_int), "plain 3x3 convolutions in the image embedding"),
    Key("MODEL.SHUNTED.QKV_BIAS", None, _optional(_bool), "bias of the query, key and value projection"),
    Key("MODEL.SHUNTED.IN_CHANS", None, _optional(_int), "input channels", RGB),

    Key("MODEL.MPVIT.EMBED_DIMS", None, _optional(_ints), "width per stage"),
    Key("MODEL.MPVIT.DEPTHS", None, _optional(_ints), "layers of each path's encoder per stage"),
    Key("MODEL.MPVIT.NUM_PATHS", None, _optional(_ints), "paths per stage"),
    Key("MODEL.MPVIT.NUM_HEADS", None, _optional(_ints), "heads per stage"),
    Key("MODEL.MPVIT.MLP_RATIOS", None, _optional(_floats), "hidden width of the MLPs over their width, per stage"),
    Key("MODEL.MPVIT.CRPE_WINDOWS", None, _optional(_int_lists),
        "pairs of a kernel and the heads it serves, e.g. [[3, 2], [5, 3], [7, 3]]"),
    Key("MODEL.MPVIT.QKV_BIAS", None, _optional(_bool), "bias of the query, key and value projection"),
    Key("MODEL.MPVIT.IN_CHANS", None, _optional(_int), "input channels", RGB),

    Key("MODEL.PVT.EMBED_DIMS", None, _optional(_ints), "width per stage"),
    Key("MODEL.PVT.DEPTHS", None, _optional(_ints), "blocks per stage"),
    Key("MODEL.PVT.NUM_HEADS", None, _optional(_ints), "heads per stage"),
    Key("MODEL.PVT.MLP_RATIOS", None, _optional(_floats), "hidden width of the MLPs over their width, per stage"),
    Key("MODEL.PVT.SR_RATIOS", None, _optional(_ints), "reduction of keys and values per stage (1 in the last)"),
    Key("MODEL.PVT.PATCH_SIZE", None, _optional(_int), "patches of the first stage"),
    Key("MODEL.PVT.QKV_BIAS", None, _optional(_bool), "bias of the query, key and value projection"),
    Key("MODEL.PVT.IN_CHANS", None, _optional(_int), "input channels", RGB),

    Key("MODEL.PVT_V2.EMBED_DIMS", None, _optional(_ints), "width per stage"),
    Key("MODEL.PVT_V2.DEPTHS", None, _optional(_ints), "blocks per stage"),
    Key("MODEL.PVT_V2.NUM_HEADS", None, _optional(_ints), "heads per stage"),
    Key("MODEL.PVT_V2.MLP_RATIOS", None, _optional(_floats), "hidden width of the MLPs over their width, per stage"),
    Key("MODEL.PVT_V2.SR_RATIOS", None, _optional(_ints), "reduction of keys and values per stage"),
    Key("MODEL.PVT_V2.LINEAR", None, _optional(_bool), "keys and values from a 7x7 pooled map in every stage (b2_li)"),
    Key("MODEL.PVT_V2.QKV_BIAS", None, _optional(_bool), "bias of the query, key and value projection"),
    Key("MODEL.PVT_V2.IN_CHANS", None, _optional(_int), "input channels", RGB),

    Key("MODEL.GALERKIN.EMBED_DIM", None, _optional(_int), "width of the first stage"),
    Key("MODEL.GALERKIN.DEPTHS", None, _optional(_ints), "blocks per stage"),
    Key("MODEL.GALERKIN.NUM_HEADS", None, _optional(_ints), "heads per stage"),
    Key("MODEL.GALERKIN.PATCH_SIZE", None, _optional(_int), "4 for strides 4 to 32, 2 for 2 to 16"),
    Key("MODEL.GALERKIN.MLP_RATIO", None, _optional(_float), "hidden width of the MLPs over their width"),
    Key("MODEL.GALERKIN.QKV_BIAS", None, _optional(_bool), "bias of the query, key and value projection"),
    Key("MODEL.GALERKIN.PATCH_NORM", None, _optional(_bool), "layer norm after the image embedding"),
    Key("MODEL.GALERKIN.NORM_EPS", None, _optional(_float), "eps of the norms of keys and values"),
    Key("MODEL.GALERKIN.OUT_PROJ", None, _optional(_bool), "a linear after the heads"),
    Key("MODEL.GALERKIN.POSITIONS", None, _optional(_bool), "give the attention the tokens' coordinates (implies OUT_PROJ)"),
    Key("MODEL.GALERKIN.IN_CHANS", None, _optional(_int), "input channels", RGB),

    Key("TRAIN.EPOCHS", 300, _int, "passes over the training images", AT_LEAST_1),
    Key("TRAIN.START_EPOCH", 0, _int, "accepted from old files; the checkpoint's step decides"),
    Key("TRAIN.WARMUP_EPOCHS", 20, _float, "epochs of linear warm-up", NOT_NEGATIVE),
    Key("TRAIN.BASE_LR", 5e-4, _float, "peak learning rate for a global batch of LR_BATCH", LEARNING_RATE),
    Key("TRAIN.WARMUP_LR", 5e-7, _float, "learning rate of the first step, likewise scaled", NOT_NEGATIVE),
    Key("TRAIN.MIN_LR", 5e-6, _float, "learning rate at the end, likewise scaled", NOT_NEGATIVE),
    Key("TRAIN.LR_BATCH", 512, _int, "global batch that the three rates are given for; 0 does not scale them", NOT_NEGATIVE),
    Key("TRAIN.WEIGHT_DECAY", 0.05, _float, "weight decay; none on biases, 1-D parameters and what the model names", NOT_NEGATIVE),
    Key("TRAIN.LAYER_DECAY", 1.0, _float, "factor on the learning rate per layer below the head (1: none)", UP_TO_1),
    Key("TRAIN.CLIP_GRAD", 5.0, _float, "largest gradient norm; 0 does not clip", NOT_NEGATIVE),
    Key("TRAIN.ACCUMULATION_STEPS", 1, _int, "micro-batches per optimizer step", AT_LEAST_1, scope=RUN),
    Key("TRAIN.GLOBAL_BATCH", 0, _int,
        "images a step over all processes that the recipe was made for, which --fit keeps; 0: whatever the batch size, the accumulation "
        "and the processes give", NOT_NEGATIVE, scope=RUN),
    Key("TRAIN.USE_CHECKPOINT", False, _bool, "activation checkpointing: less memory, about a third more time", scope=RUN),
    Key("TRAIN.CHECKPOINT_UNIT", "block", _str,
        "what TRAIN.USE_CHECKPOINT keeps of the forward pass: the input of each block (least memory), or that of each stage, all of "
        "whose activations are then in memory at once when it is computed again", choices=("block", "stage"), scope=RUN),
    Key("TRAIN.GRAD_COMPRESSION", "off", _off_or,
        "of gradients between processes: bf16 is half the traffic and another rounding", choices=("off", "bf16")),
    Key("TRAIN.AUTO_RESUME", True, _bool, "continue from the run folder's newest good checkpoint", scope=COMMAND),
    Key("TRAIN.SAVE_EVERY_STEPS", 0, _int, "also save every so many steps (0: at epochs only)", NOT_NEGATIVE, scope=RUN),
    Key("TRAIN.SAVE_EVERY_MINUTES", 0.0, _float,
        "also save when so many minutes have passed since the last save (0: never)", NOT_NEGATIVE, scope=RUN),
    Key("TRAIN.BACKGROUND_SAVE", True, _bool,
        "write checkpoints while training goes on (costs memory for one more copy of the state)", scope=RUN),
    Key("TRAIN.KEEP_CHECKPOINTS", 2, _int, "newest checkpoints kept beside the best one (0: all)", NOT_NEGATIVE, scope=RUN),
    Key("TRAIN.CHECKPOINT_BUDGET", 0, _bytes,
        "largest size of a run's checkpoints together, e.g. 20GB; older ones go first (0: no limit)", scope=RUN),
    Key("TRAIN.ACCEPT_CHANGES", False, _bool, "continue a run with a changed recipe (--accept-changes)", scope=COMMAND),
    Key("TRAIN.SKIP_BUDGET", 10, _int,
        "steps whose loss or gradient is not finite that are skipped before the run gives up; one is forgiven every 100 steps",
        NOT_NEGATIVE, scope=RUN),
    Key("TRAIN.ROLLBACKS", 1, _int,
        "times a run then goes back to its last good checkpoint, passing over the data since, before it stops", NOT_NEGATIVE, scope=RUN),
    Key("TRAIN.EVAL_FREQ", 1, _int, "evaluate every so many epochs (and after the last)", AT_LEAST_1, scope=RUN),
    Key("TRAIN.BEST_METRIC", "auto", _str,
        "what decides which checkpoint is the best; of equals the one with the lower loss is; auto: top1, for several labels an image map; "
        "auroc is of two classes", choices=("auto", "top1", "loss", "mean_recall", "f1", "kappa", "auroc", "map", "micro_f1")),
    Key("TRAIN.EMA_DECAY", 0.0, _float, "decay of the averaged weights, e.g. 0.9999 (0: no average)", BELOW_1),
    Key("TRAIN.EMA_WARMUP", False, _bool, "let that decay grow from 0 over the first steps"),
    Key("TRAIN.EMA_DEVICE", "auto", _str,
        "where that average lies: auto and model are the model's device; cpu saves the GPU's memory and costs a copy of the weights a "
        "step", choices=("auto", "model", "cpu"), scope=RUN),
    Key("TRAIN.FREEZE", [], _strs, "parameters left as they are: patterns of names, such as patch_embed.* layers.0.*"),
    Key("TRAIN.LINEAR_PROBE", False, _bool, "train the classifier alone; all else is fixed and computes as in evaluation"),
    Key("TRAIN.SYNC_BN", False, _bool, "batch norm over all GPUs instead of each one's own"),
    Key("TRAIN.REPORT", "png", _str,
        "what training writes of itself at its end: report.html (html), plots/*.png too (png)", choices=("none", "html", "png"), scope=RUN),
    Key("TRAIN.TENSORBOARD_HISTOGRAMS", 0, _int,
        "epochs between histograms of the weights in TensorBoard (0: none)", NOT_NEGATIVE, scope=RUN),
    Key("TRAIN.LR_SCHEDULER.NAME", "cosine", _str, "how the learning rate decays", choices=("cosine", "linear", "step", "multistep")),
    Key("TRAIN.LR_SCHEDULER.WARMUP_PREFIX", None, _optional(_bool),
        "start the decay after the warm-up; None is the family's recipe (CrossFormer False, others True)"),
    Key("TRAIN.LR_SCHEDULER.DECAY_EPOCHS", 30.0, _float, "step: epochs between decays", ABOVE_0),
    Key("TRAIN.LR_SCHEDULER.DECAY_RATE", 0.1, _float, "step: factor of each decay", UP_TO_1),
    Key("TRAIN.LR_SCHEDULER.MULTISTEPS", [], _floats, "multistep: epochs of the decays"),
    Key("TRAIN.LR_SCHEDULER.GAMMA", 0.1, _float, "multistep: factor of each decay", UP_TO_1),
    Key("TRAIN.OPTIMIZER.NAME", "adamw", _str, "any of timm's optimizers, or fused_adam of NVIDIA apex", words=("adamw", "sgd")),
    Key("TRAIN.OPTIMIZER.EPS", None, _optional(_float), "epsilon; None is the optimizer's own (AdamW 1e-8)", ABOVE_0),
    Key("TRAIN.OPTIMIZER.BETAS", None, _optional(_floats),
        "betas; None is the optimizer's own (AdamW [0.9, 0.999])",
        Rule(lambda betas: len(betas) >= 2 and all(0 <= b < 1 for b in betas), "two betas or more, in [0, 1)")),
    Key("TRAIN.OPTIMIZER.MOMENTUM", 0.9, _float, "momentum of SGD's kind", BELOW_1),
    Key("TRAIN.OPTIMIZER.ARGS", {}, _mapping,
        "further arguments of the optimizer by its own names, e.g. {ns_steps: 4}; Muon's fallback_list: patterns of parameters that its "
        "AdamW takes, by default embeddings, tables and the classifier"),

    Key("AUG.COLOR_JITTER", 0.4, _float, "colour jitter; used when AUTO_AUGMENT is none", NOT_NEGATIVE),
    Key("AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1", _str, "timm's policy text, or none"),
    Key("AUG.SCALE", [0.08, 1.0], _floats, "range of the random crop's share of the image", SHARES),
    Key("AUG.RATIO", [3 / 4, 4 / 3], _floats, "range of the random crop's aspect ratio", RISING),
    Key("AUG.HFLIP", 0.5, _float, "probability of a left-right flip", PROBABILITY),
    Key("AUG.VFLIP", 0.0, _float, "probability of an up-down flip", PROBABILITY),
    Key("AUG.REPROB", 0.25, _float, "probability of random erasing", PROBABILITY),
    Key("AUG.REMODE", "pixel", _str, "what random erasing fills with", choices=("const", "rand", "pixel")),
    Key("AUG.RECOUNT", 1, _int, "boxes of random erasing", AT_LEAST_1),
    Key("AUG.MIXUP", 0.8, _float, "mixup alpha (0: off)", NOT_NEGATIVE),
    Key("AUG.CUTMIX", 1.0, _float, "cutmix alpha (0: off)", NOT_NEGATIVE),
    Key("AUG.CUTMIX_MINMAX", None, _optional(_floats), "range of cutmix's side lengths; replaces its alpha", SHARES),
    Key("AUG.MIXUP_PROB", 1.0, _float, "probability of mixing a batch", PROBABILITY),
    Key("AUG.MIXUP_SWITCH_PROB", 0.5, _float, "probability of cutmix when both are on", PROBABILITY),
    Key("AUG.MIXUP_MODE", "batch", _str, "mix per batch, per pair or per element", choices=("batch", "pair", "elem")),

    Key("TEST.CROP", True, _bool,
        "DATA.FIT crop: resize to 256/224 of the size (or as the timm model was) and crop the centre; False squashes"),
    Key("TEST.BATCH_SIZE", 0, _int, "images per process in evaluation; 0 is DATA.BATCH_SIZE", NOT_NEGATIVE, scope=RUN),
    Key("TEST.THRESHOLDS", None, _optional(_number_or_list),
        "probability from which an image has a label, one for all, or a list in the order of the classes; None: found on the validation "
        "images, where each label's F1 is greatest, and kept in the checkpoint",
        Rule(lambda given: all(0 <= number <= 1 for number in (given if isinstance(given, list) else [given])),
             "probabilities lie between 0 and 1")),
    Key("TEST.WEIGHTS", "auto", _str,
        "weights of a checkpoint that are evaluated, predicted with or exported: ema, the average; auto, the average where there is one",
        choices=("auto", "raw", "ema"), scope=COMMAND),
    Key("TEST.SEQUENTIAL", False, _bool, "accepted from old files; evaluation is always exact"),
    Key("TEST.SHUFFLE", False, _bool, "accepted from old files; has no effect"),

    *(key._replace(scope=COMMAND) for command in COMMANDS for key in command.keys),
)

KEY = {key.name: key for key in KEYS}
_SECTIONS = {key.rsplit(".", n)[0] for key in KEY for n in range(1, key.count(".") + 1)}

# Spellings of the CrossFormer and the SimMIM repository.
_SECTION_ALIASES = {"MODEL.CROS": "MODEL.CROSSFORMER", "PRETRAINED": "MODEL.PRETRAINED"}
_TYPE_ALIASES = {"cross-scale": "crossformer"}
# Keys of theirs whose models are not here, and why.
_MOE = "Swin-MoE is not supported: its layers of experts need the library Tutel; train a plain Swin (MODEL.TYPE swin or swinv2)"
_VIT = "a plain ViT is none of the families here; timm's are reached by MODEL.TYPE timm, SimMIM's by MODEL.NAME beit_base_patch16_224"
_REFUSED = {"MODEL.SWIN_MOE": _MOE, "TRAIN.MOE": _MOE, "MODEL.VIT": _VIT}


def default_config() -> CfgNode:
    """A fresh, unfrozen tree holding every default."""
    root = CfgNode()
    for key in KEYS:
        *sections, leaf = key.name.split(".")
        node = root
        for section in sections:
            if section not in node:
                node[section] = CfgNode()
            node = node[section]
        node[leaf] = key.kind(key.default)
    return root


def describe_keys() -> str:
    """Every key with its default and meaning, a section a paragraph, for ``--help-keys``."""
    sections: dict[str, list[str]] = {}
    for key in KEYS:
        shown = repr(key.default) if isinstance(key.default, str) else str(key.default)
        sections.setdefault(key.name.rpartition(".")[0], []).append(f"    {key.name} ({shown}): {key.explanation}")
    return "\n".join(line for section, lines in sections.items() for line in ("", f"  {section or 'general'}", *lines))


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
    for section, reason in _REFUSED.items():
        if key == section or key.startswith(section + "."):
            return ConfigError(f"{where}: {key}: {reason}")
    near = _nearest(key, KEY)
    return ConfigError(f"{where}: unknown key {key}" + (f"; did you mean {near}?" if near else "; see --help-keys for all keys"))


def converted(key: str, raw: Any, what: str) -> Any:
    """The value of ``key`` that ``raw`` stands for; ``what`` names it in the ``ConfigError`` for another kind of value."""
    try:
        return KEY[key].kind(raw)
    except ValueError as error:
        raise ConfigError(f"{what} takes {error}, not {raw!r}") from None


def _set(root: CfgNode, key: str, raw: Any, where: str, source: str = "") -> None:
    """``where`` is said in messages; ``source``, or else ``where``, is remembered as the value's origin."""
    key = _canonical(key)
    if key not in KEY:
        if key in _SECTIONS:
            raise ConfigError(f"{where}: {key} is a section; give one of its keys, such as "
                              f"{next(k for k in KEY if k.startswith(key + '.'))}")
        raise _unknown(key, where)
    value = converted(key, raw, f"{where}: {key}")
    if key == "MODEL.TYPE":
        value = _TYPE_ALIASES.get(value, value)
        if f"MODEL.{value.upper()}" in _REFUSED:
            raise ConfigError(f"{where}: MODEL.TYPE {value}: {_REFUSED[f'MODEL.{value.upper()}']}")
    *sections, leaf = key.split(".")
    node = root
    for section in sections:
        node = node[section]
    node[leaf] = value
    root.__dict__.setdefault(_HISTORY, {}).setdefault(key, []).append((source or where, value))


_HISTORY = "history"  # attribute of the root beside the tree: key -> [(source, value), ...]
COMMAND_LINE = "command line"
# Keys that a run finds in its data where they are None; its checkpoints hold what was found.
FOUND_IN_DATA = ("DATA.WINDOW",)


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
        elif canonical not in KEY:
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
            for base in (b for b in KEY["BASE"].kind(value) if b):
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


def of_the_command(key: str) -> bool:
    """Whether ``key`` is a matter of one command alone, not of the run."""
    return key in KEY and KEY[key].scope == COMMAND


def of_the_run(config: CfgNode) -> CfgNode:
    """``config`` without what one command alone asked for: as a file for ``--cfg`` it must not ask for that again."""
    return with_values(config, {key.name: key.default for key in KEYS if key.scope == COMMAND}, "default")


def command_of(config: CfgNode) -> Command | None:
    """The command that ``config`` asks for; None is training.

    Raises:
        ConfigError: it asks for more than one.
    """
    asked = [command for command in COMMANDS if lookup(config, command.flag.key)]
    beside = {flag for command in asked for flag in command.beside}
    asked = [command for command in asked if command.flag.name not in beside] or asked
    if len(asked) > 1:
        raise ConfigError(f"{' and '.join(command.flag.name for command in asked)} are commands of their own; give one of them")
    return asked[0] if asked else None


def takes_standard_output(config: CfgNode, command: Command | None) -> bool:
    """Whether standard output is a command's data; what the program says then goes to standard error."""
    return command is not None and any(lookup(config, key) == "-" for key in command.to_stdout)


def image_size(config: CfgNode) -> tuple[int, int]:
    """(height, width) of the input in pixels."""
    size = config.DATA.IMG_SIZE
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def check(config: CfgNode) -> None:
    """Raise ``ConfigError`` for the first value that cannot work: by the rule of its key, then by what ties keys together."""
    for key in KEYS:
        value = lookup(config, key.name)
        if value is None:
            continue
        if key.choices and value not in key.choices:
            near = difflib.get_close_matches(str(value), key.choices, n=1)
            raise ConfigError(f"{key.name} is {value!r}; choose from {', '.join(filter(None, key.choices))}"
                              + (f" (did you mean {near[0]}?)" if near else ""))
        if key.rule is not None and not key.rule.holds(value):
            raise ConfigError(f"{key.name} is {value!r}; {key.rule.words}" if isinstance(value, str) else
                              f"{key.name} is {value}; {key.rule.words}")
    for key, fault in _faults_between(config):
        raise ConfigError(f"{key} is {lookup(config, key)}; {fault}")


def _faults_between(config: CfgNode) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) where values that are possible do not go together."""
    train, predict = config.TRAIN, config.PREDICT
    if train.MIN_LR > train.BASE_LR:
        yield "TRAIN.MIN_LR", f"it must lie between 0 and TRAIN.BASE_LR ({train.BASE_LR})"
    if train.WARMUP_EPOCHS and train.WARMUP_EPOCHS >= train.EPOCHS:
        yield "TRAIN.WARMUP_EPOCHS", f"the warm-up must end before training does (TRAIN.EPOCHS is {train.EPOCHS})"
    if config.PLAN.FIT and (config.EVAL_MODE or config.THROUGHPUT_MODE):
        yield "PLAN.FIT", "--fit chooses the micro-batch of training; leave it out with --eval and --throughput"
    if config.DATA.FOLD and config.DATA.VAL_FRACTION:
        yield "DATA.FOLD", "it takes the place of DATA.VAL_FRACTION; set that to 0"
    for key in ("PREDICT.CSV", "PREDICT.JSON", "PREDICT.FEATURES", "PREDICT.SHEET"):
        if lookup(config, key) and not predict.PATHS:
            yield key, "it goes with --predict, which says what images to predict"
