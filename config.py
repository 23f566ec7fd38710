"""The configuration tree: every key, its default and what it means; reading, merging, checking.

One road leads here: ``get_config(cfg_file, opts)`` starts from the defaults below, merges the YAML file
(and the files its ``BASE`` names), then the ``KEY VALUE`` pairs, checks the values and freezes the tree.
Nothing is written into a config afterwards. Key names follow the Swin repository's tree, so its YAML
files, and those of the CrossFormer repository, are read as they are.
"""

from __future__ import annotations

import ast
import difflib
import errno
import math
import os
import re
import reprlib
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from numbers import Real
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


_DIGITS = 18  # of the largest whole number: every one of them fits into 64 bits


def _int(value: Any) -> int:
    whole = False
    if isinstance(value, (str, Real)) and not isinstance(value, bool):
        try:
            number = Decimal(str(value))  # exact, where a float rounds what lies beyond 2^53
            whole = number == number.to_integral_value()
        except (ArithmeticError, ValueError):
            pass
    if not whole:
        raise ValueError("a whole number")
    if not -10**_DIGITS < number < 10**_DIGITS:
        raise ValueError(f"a whole number of at most {_DIGITS} digits")
    return int(number)


def _float(value: Any) -> float:
    # A YAML 1.1 reader takes `2e-05` for a string; published files hold such numbers.
    if isinstance(value, bool):
        raise ValueError("a number")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("a number") from None
    if not math.isfinite(number):
        raise ValueError("a finite number")
    return number


def _bytes(value: Any) -> int:
    """A size such as 20GB or 500 MiB, in bytes."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
    if isinstance(value, bool) or not found or found[2].upper() not in units or len(found[1]) > _DIGITS:
        raise ValueError("a size such as 20GB")
    return int(Decimal(found[1]) * units[found[2].upper()])


def _str(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (list, tuple, dict)):
        raise ValueError("a text")
    text = str(value)
    try:
        # What stands for a byte of a file name that is not UTF-8 passes, as the system takes it; other halves of a character do not.
        if "\0" in text or len(text.encode("utf-8", "surrogateescape")) > LONGEST_TEXT:
            raise ValueError
    except ValueError:
        raise ValueError(f"a text of at most {LONGEST_TEXT} bytes, without a null byte and halves of characters") from None
    return text


LONGEST_TEXT = 4095  # bytes: of a path, on Linux


def _local(value: Any) -> str:
    """A path, which ``scheme://`` begins nowhere: it would become a folder of that name."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", text := _str(value)) and not re.match(r"[A-Za-z]:/(?!/)", text):
        raise ValueError("a path on this machine's disks (mount a bucket as a folder, or copy from and to it)")
    return text


def _output(value: Any) -> str:
    """A file to write, or ``-`` for standard output, under whatever name."""
    text = _local(value)
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
        return ast.literal_eval(value) if value.lstrip().startswith("(") else yaml_tree(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError("a list") from None


def _list_of(item: Callable[[Any], Any], what: str) -> Callable[[Any], list]:
    def convert(value: Any) -> list:
        value = _literal(value)
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"a list of {what}, such as [1, 2]")
        return [item(v) for v in value]
    return convert


_ints, _floats, _strs = _list_of(_int, "whole numbers"), _list_of(_float, "numbers"), _list_of(_str, "texts")


def _window(value: Any) -> list[float] | list[list[float]]:
    value = _literal(value)
    if isinstance(value, (list, tuple)) and any(isinstance(pair, (list, tuple)) for pair in value):
        return [_floats(pair) for pair in value]
    return _floats(value)


def pairs_of(window: Sequence[Any]) -> Sequence[Sequence[float]]:
    """The pairs of DATA.WINDOW: one, or one a band."""
    return window if window and isinstance(window[0], (list, tuple)) else [window]


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


BETA = "0.999"  # of the effective number of images, as its authors had it for ImageNet


def _class_weights(value: Any) -> str | list[float]:
    value = _literal(value)
    if isinstance(value, (list, tuple)):
        return _floats(value)
    text = "none" if value in (None, False, "") else str(value).lower()
    if not re.fullmatch(r"none|balanced|effective(:0?\.\d+)?", text):
        raise ValueError(f"none, balanced, effective (or effective:{BETA}), or a list of numbers, one a class")
    return text


def _mapping(value: Any) -> CfgNode:
    """Names with plain values: numbers, texts, lists of them. As a node of the tree: a dump then holds it."""
    try:
        value = _literal(value)
    except ValueError:
        value = None
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
    return [_str(value)] if value is None or isinstance(value, str) else _strs(value)


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


def between(low: float, high: float) -> Rule:
    least = f"be at least {low:,}" if low else "not be negative"
    return Rule(lambda number: low <= number <= high, f"it must {least}, and at most {high:,}")


def each(low: float, high: float, words: str = "a number a stage") -> Rule:
    """Of a number a stage, or what else ``words`` say."""
    return Rule(lambda numbers: 1 <= len(numbers) <= MOST_STAGES and all(low <= number <= high for number in numbers),
                f"it takes {words} (1 to {MOST_STAGES} of them), each between {low:,} and {high:,}")


def one_or_each(low: float, high: float) -> Rule:
    """Of one number, or a list of them."""
    many = each(low, high)
    return Rule(lambda value: many.holds(value if isinstance(value, list) else [value]),
                f"it takes one number or a list of 1 to {MOST_STAGES}, each between {low:,} and {high:,}")


MOST_STAGES = 16
AT_LEAST_1 = Rule(lambda number: number >= 1, "it must be at least 1")
NOT_NEGATIVE = Rule(lambda number: number >= 0, "it must not be negative")
ABOVE_0 = Rule(lambda number: number > 0, "it must be above 0")
UP_TO_1 = Rule(lambda number: 0 < number <= 1, "it must lie in (0, 1]")
BELOW_1 = Rule(lambda number: 0 <= number < 1, "it must lie in [0, 1)")
PROBABILITY = Rule(lambda number: 0 <= number <= 1, "a probability lies between 0 and 1")
LEARNING_RATE = Rule(lambda rate: 0 < rate <= 1000, "a learning rate lies above 0, and no training survives one above 1000")
LARGEST_SIDE = 16384  # pixels; a map of that size takes gigabytes already
PIXELS = Rule(lambda size: all(0 < side <= LARGEST_SIDE for side in (size if isinstance(size, list) else [size])),
              f"it must be positive, and at most {LARGEST_SIDE} pixels a side")
IMAGES = between(1, 1_000_000)  # of a batch
EPOCHS = between(1, 1_000_000)
STEPS = between(0, 1_000_000_000)
MILESTONES = Rule(lambda when: all(0 <= number <= 1_000_000_000 for number in when), "they lie between 0 and 1,000,000,000")
SECONDS = between(0, 10_000_000)  # which is four months; the system's clocks take no more than some centuries
SHARES = Rule(lambda pair: len(pair) == 2 and 0 < pair[0] <= pair[1] <= 1, "two shares, rising, in (0, 1]")
RISING = Rule(lambda pair: len(pair) == 2 and 0.001 <= pair[0] <= pair[1] <= 1000, "two numbers, rising, between 0.001 and 1,000")
WINDOW = Rule(lambda value: all(len(pair) == 2 and -1e30 <= pair[0] < pair[1] <= 1e30 for pair in pairs_of(value)),
              "two numbers, rising, or such a pair a band")
PAIR = Rule(lambda paths: len(paths) in (0, 2), "two are compared")
CHANNELS = between(1, 1024)
POSITIVE = Rule(lambda values: min(values, default=0) > 0, "numbers above 0, one a channel")
# Of models. Widths of later stages may be many times the first one's.
WIDTH, WIDTHS = between(1, 8192), each(1, 65536)
DEPTHS = Rule(lambda depths: 1 <= len(depths) <= MOST_STAGES and min(depths) >= 1 and sum(depths) <= 1000,
              f"it takes a number a stage (1 to {MOST_STAGES} of them), each at least 1, together at most 1,000")
HEADS, KERNELS, RATES = each(1, 1024), each(1, 1024), each(1, 1024)
KERNEL, MLP_RATIO, MLP_RATIOS = between(1, 1024), between(0.001, 256), each(0.001, 256)
ONE_OR_MORE_KERNELS, ONE_OR_MORE_RATIOS = one_or_each(1, 1024), one_or_each(0.001, 256)
KERNEL_LISTS = Rule(lambda rows: len(rows) <= MOST_STAGES and all(KERNELS.holds(row) for row in rows),
                    f"it takes at most {MOST_STAGES} lists, each of 1 to {MOST_STAGES} numbers between 1 and 1,024")
CONTROLS = re.compile(r"[\0-\x1f\x7f-\x9f\u2028\u2029]")
NO_CONTROLS = Rule(lambda text: not CONTROLS.search(text), "it must not hold control characters")
_LONGEST_NAME = 200  # bytes; file systems have 255, and what is written beside has longer names


def _names_a_folder(text: str) -> bool:
    parts = text.replace("\\", "/").split("/")
    return NO_CONTROLS.holds(text) and ".." not in parts and "." not in parts and all(
        part.strip() and len(part.encode("utf-8", "surrogateescape")) <= _LONGEST_NAME for part in parts)


def _is_fold(text: str) -> bool:
    found = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text)
    return 1 <= int(found[1]) <= int(found[2]) >= 2 if found else "/" not in text


FOLD = Rule(_is_fold, "2/5 is the second of five folds; in a list with a fold column also what that column calls it")
FOLDER_NAME = Rule(_names_a_folder, f"it names the run's folder, so it must not be empty, absolute or lead elsewhere, hold control "
                                    f"characters or a part of more than {_LONGEST_NAME} bytes")


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
        takes_less: what has it take less memory.
    """

    flag: Flag
    run: str
    keys: Sequence[Key] = ()
    flags: Sequence[Flag] = ()
    light: bool = False
    to_stdout: Sequence[str] = ()
    beside: Sequence[str] = ()
    takes_less: str = "evaluate smaller batches (--opts TEST.BATCH_SIZE 8)"


TRAINING_TAKES_LESS = "add --fit, which takes a smaller micro-batch and keeps the recipe, or --use-checkpoint"
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
        Key("TEST.REAL_LABELS", "", _local,
            "--eval: real.json of the ReaL labels (a list of labels an image); empty is the one that timm carries"),
        Key("TEST.PER_CLASS", "", _local,
            "--eval: CSV file for the figures of each class: recall, precision, F1; in dense tasks AP, or IoU"),
        Key("TEST.PREDICTIONS", "", _local,
            "--eval: file for the prediction of every image: .npz; of objects .json in COCO's form, of maps .zip of PNGs; empty: none"),
        ),
        flags=(
            Flag("--split", "TEST.SPLIT"),
            Flag("--labels", "TEST.LABELS", metavar="SET"),
            Flag("--real-labels", "TEST.REAL_LABELS", "real.json, where another than timm's is to be used", metavar="FILE"),
            Flag("--per-class", "TEST.PER_CLASS", "CSV file for the figures of each class", metavar="FILE"),
            Flag("--test-flip", "TEST.FLIP", "evaluate the mean logits of each image and its mirror image", "logits"),
        ),
        to_stdout=("PREDICT.CSV",)),
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
        Key("PREDICT.SCORE", 0.5, _float, "dense tasks: detections of a lower score are not told", PROBABILITY),
        Key("PREDICT.CSV", "", _output,
            "table of the predictions, a row an image, or under --eval of the images not recognised; - is standard output"),
        Key("PREDICT.JSON", "", _output, "predictions as JSON, a line an image; - is standard output"),
        Key("PREDICT.COCO", "", _local,
            "dense tasks: the objects of all images in COCO's form, FILE.json, as tools for annotating open it", ends_in(".json")),
        Key("PREDICT.PICTURES", "", _local, "dense tasks: folder for the images with what was found drawn on them, a PNG each"),
        Key("PREDICT.MASKS", "", _local,
            "dense tasks: folder for masks, a PNG an image: each pixel's class, or of objects the number of the object there"),
        Key("PREDICT.FEATURES", "", _local,
            "pooled features before the classifier: FILE.npy or FILE.safetensors, with FILE.paths.json", ends_in(".npy", ".safetensors")),
        Key("PREDICT.SHEET", "", _local,
            "picture of the images with their classes, FILE.png; more pages are FILE-2.png and so on", ends_in(".png")),
        ),
        flags=(
            Flag("--topk", "PREDICT.TOPK", "classes shown for an image (5)", metavar="NUMBER"),
            Flag("--score", "PREDICT.SCORE", "lowest score of a detection that is told (0.5)", metavar="NUMBER"),
            Flag("--csv", "PREDICT.CSV", "file for the predictions as a table, with --eval for the mistakes; - is standard output",
                 metavar="FILE"),
            Flag("--json", "PREDICT.JSON", "file for the predictions, a line of JSON an image; - is standard output", metavar="FILE"),
            Flag("--coco", "PREDICT.COCO", "file.json for the objects found, in COCO's form", metavar="FILE"),
            Flag("--pictures", "PREDICT.PICTURES", "folder for the images with what was found drawn on them", metavar="FOLDER"),
            Flag("--masks", "PREDICT.MASKS", "folder for masks, a PNG an image", metavar="FOLDER"),
            Flag("--features", "PREDICT.FEATURES", "file.npy or file.safetensors for the features before the classifier", metavar="FILE"),
            Flag("--sheet", "PREDICT.SHEET", "file.png for a picture of the images and their classes", metavar="FILE"),
        ),
        to_stdout=("PREDICT.CSV", "PREDICT.JSON")),
    Command(
        Flag("--export", "EXPORT.FILE", "write the model as file.onnx, file.pt2, or a folder that timm opens; with --resume",
             metavar="FILE"),
        "export.export_run",
        keys=(
        Key("EXPORT.FILE", "", _local,
            "what --export writes: FILE.onnx, FILE.pt2, or a folder (or FILE.safetensors) as timm and its hub have it"),
        Key("EXPORT.OPSET", 18, _int,
            "ONNX operator set", Rule(lambda number: number >= 18, "the exporter writes operator sets from 18 on")),
        Key("EXPORT.PREPROCESS", False, _bool, "ONNX and pt2: normalise inside the model, which then takes pixels of 0 to 255"),
        ), takes_less="export where there is more"),
    Command(
        Flag("--plan", "PLAN.RUN", "dry run: memory, speed, time and disk that the run will take; status 1: it does not fit", "True"),
        "plan.plan_run",
        keys=(
        Key("PLAN.RUN", False, _bool, "dry run (--plan): a few steps, an evaluation batch, a save and a load; says what the run will take"),
        Key("PLAN.FIT", False, _bool, "train (or plan) with the largest micro-batch that memory holds, the global batch staying (--fit)"),
        Key("PLAN.MEMORY", 0, _bytes,
            "memory that --plan and --fit may use, e.g. 24GB, for each GPU, or on a CPU for all processes together; 0: all there is"),
        Key("PLAN.SECONDS", 4.0, _float, "about how long --plan measures each speed; longer is more exact", between(0, 3600)),
        Key("PLAN.SCRATCH", "", _local, "folder on whose disk --plan tries a save; empty is the system's folder for temporary files"),
        ), takes_less=TRAINING_TAKES_LESS),
    Command(
        Flag("--find-lr", "FIND_LR.FILE", "range test: train at rising rates, draw the losses in FILE.png, and name a rate for --lr",
             metavar="FILE"),
        "find_lr.find_lr",
        keys=(
        Key("FIND_LR.FILE", "", _local, "PNG file for the losses of a learning-rate range test (--find-lr)", ends_in(".png")),
        Key("FIND_LR.LOW", 1e-7, _float, "lowest rate of that test, as TRAIN.BASE_LR has it", LEARNING_RATE),
        Key("FIND_LR.HIGH", 1.0, _float, "highest rate of that test", LEARNING_RATE),
        Key("FIND_LR.STEPS", 200, _int, "steps of that test, at rates that rise evenly in their logarithm",
            Rule(lambda steps: 20 <= steps <= 100_000, "it must lie between 20 and 100000")),
        ), takes_less="take a smaller --batch-size, or --use-checkpoint"),
    Command(
        Flag("--doctor", "DOCTOR_MODE", "read all images, say what is wrong and how to mend it; status 3: errors", "True"),
        "doctor.examine_run",
        keys=(
        Key("DOCTOR_MODE", False, _bool, "read and check the data only (--doctor)"),
        Key("DOCTOR.FOLDER", "", _local,
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
        beside=("--eval",), takes_less="measure a smaller --batch-size"),
    Command(
        Flag("--report", "REPORT.RUNS", "write a run folder's report.html; of several runs a comparison", several=True, metavar="RUN"),
        "report.report_runs",
        keys=(
        Key("REPORT.RUNS", [], _strs, "run folders to report on (--report); several are compared"),
        Key("REPORT.FILE", "", _local,
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
        Key("SHOW.BATCH", "", _local, "PNG file for the first training batch as the model sees it (--show-batch)"),
        ), takes_less="show a smaller --batch-size"),
    Command(
        Flag("--show-attention", "SHOW.ATTENTION", "image: draw which tokens of it a CrossFormer's token attends to", metavar="IMAGE"),
        "show_attention.show_attention",
        keys=(
        Key("SHOW.ATTENTION", "", _local, "image on which a CrossFormer's attention is drawn (--show-attention)"),
        Key("SHOW.TOKEN", "", _str,
            "y,x in pixels of the model's input: the token whose attention is drawn; empty is the centre (--show-token)"),
        Key("SHOW.FILE", "attention.png", _local, "PNG file for the attention (--show-file)"),
        ),
        flags=(
            Flag("--show-token", "SHOW.TOKEN", "y,x in pixels of the input: that token, not the central one", metavar="Y,X"),
            Flag("--show-file", "SHOW.FILE", "PNG file for the attention; else attention.png", metavar="FILE"),
        ), takes_less="take a smaller --img-size"),
)

# --------------------------------------------------------------------------------------------------
# The tree. `None` under a model's node means the variant's own value
# --------------------------------------------------------------------------------------------------

KEYS: tuple[Key, ...] = (
    Key("BASE", [""], _base, "YAML files merged before this one, relative to it", scope=RUN),
    Key("OUTPUT", "output", _local, "folder of all runs; a run lives in OUTPUT/MODEL.NAME/TAG", NO_CONTROLS, scope=PROCESS),
    Key("TAG", "default", _str, "name of the run", FOLDER_NAME, scope=RUN),
    Key("SEED", 0, _int, "everything random derives from it: order, augmentation, mixup, dropout, initialisation", NOT_NEGATIVE),
    Key("TASK", "auto", _str,
        "what is learned: one class an image; several labels (multilabel); the pixels of masked squares, to start a classifier from "
        "(simmim; SimMIM's files set it); boxes (detection), boxes with masks (instance), a class for each pixel (semantic), masks by "
        "queries (mask); auto: several labels where a list, unambiguously, has them, else one class",
        words=("auto", "classification", "multilabel", "simmim", "detection", "instance", "semantic", "mask")),
    Key("DEVICE", "auto", _str,
        "cuda:1 is the second GPU; auto takes CUDA, then MPS, then the CPU", words=("auto", "cpu", "cuda", "mps"), scope=PROCESS),
    Key("PRECISION", "auto", _str,
        "auto is bf16 where GPU or CPU compute it (fp16 on older GPUs), else fp32", choices=("auto", "fp32", "bf16", "fp16")),
    Key("COMPILE", "off", _off_or,
        "torch.compile: blocks, each kind of block once; model, the whole (longest start, most speed); graphs, alone or before either: on "
        "one CUDA GPU a training step is recorded once and replayed, so that the host need not launch it piece by piece",
        choices=("off", "blocks", "model", "graphs", "graphs+blocks", "graphs+model"), scope=RUN),
    Key("SAVE_FREQ", 1, _int, "save a checkpoint every so many epochs (the last epoch is always saved)", AT_LEAST_1, scope=RUN),
    Key("PRINT_FREQ", 10, _int, "log a line every so many steps", AT_LEAST_1, scope=RUN),
    Key("AMP_ENABLE", True, _bool, "allow mixed precision; False is PRECISION fp32"),
    Key("AMP_OPT_LEVEL", "", _str,
        "apex's old spelling: O0 is fp32, O1 and O2 mixed precision; PRECISION is the newer key", choices=("", "O0", "O1", "O2")),
    Key("TRACKER", "none", _str, "where the curves of a run go besides its folder", choices=("none", "trackio", "wandb"), scope=RUN),
    Key("TRACKER_PROJECT", "", _str, "project of the tracker; empty is the model's name", scope=RUN),
    Key("DIST_TIMEOUT", 20.0, _float,
        "minutes without progress after which a job of several processes ends, naming the one it waits for",
        between(0.001, 100_000), scope=RUN),
    Key("LOCAL_RANK", 0, _int, "accepted from old files; the launcher's environment decides", scope=PROCESS),
    Key("FUSED_WINDOW_PROCESS", False, _bool, "accepted from old files; has no effect"),
    Key("FUSED_LAYERNORM", False, _bool, "use NVIDIA apex's fused layer norm when apex is installed"),

    Key("DATA.DATA_PATH", "", _str,
        "folder with train/ and val/ (or validation/), each holding a folder a class, or another layout (README)", scope=PROCESS),
    Key("DATA.VAL_PATH", "", _str, "validation shards where DATA.DATA_PATH is a stream of WebDataset shards: file:///d/val-{00..04}.tar"),
    Key("DATA.STREAM_IMAGES", 0, _int, "training images of a stream that does not tell; 0 asks the stream", between(0, 10**11)),
    Key("DATA.STREAM_BUFFER", 4096, _int, "encoded images held by each process to shuffle a stream of training images", between(1, 10**9)),
    Key("DATA.DATASET", "imagenet", _str,
        "imagenet takes whatever layout it finds; folder, lists, zip, tar and huggingface (dense: coco, voc, yolo, maps and panoptic) "
        "look for that alone; digits are scikit-learn's, canvases many of them on one image",
        choices=("imagenet", "imagenet22K", "folder", "lists", "zip", "tar", "huggingface", "digits", "coco", "voc", "yolo", "maps",
                 "panoptic", "canvases"), scope=RUN),
    Key("DATA.BATCH_SIZE", 128, _int, "images per process and micro-batch", IMAGES, scope=RUN),
    Key("DATA.IMG_SIZE", 224, _size,
        "input size in pixels: one number, or [height, width]; dense tasks have their sizes in DATA.DENSE", PIXELS),
    Key("DATA.FIT", "crop", _str,
        "how images come to DATA.IMG_SIZE, in training and evaluation: crop cuts parts out; squash and pad (with the mean colour) keep the "
        "whole of wide or tall images in sight, AUG.RATIO being relative to their own", choices=("crop", "squash", "pad")),
    Key("DATA.INTERPOLATION", None, _optional(_str),
        "of resizing; None is the model's, else bicubic", choices=("bicubic", "bilinear", "lanczos", "nearest", "random")),
    Key("DATA.MEAN", None, _optional(_floats),
        "channel means of the normalisation; None is the model's, else ImageNet's, or for other channels than RGB the data's"),
    Key("DATA.STD", None, _optional(_floats),
        "channel deviations of the normalisation; None is the model's, else ImageNet's, or for other channels than RGB the data's",
        POSITIVE),
    Key("DATA.WINDOW", None, _optional(_window),
        "values that are black and white in images of more than 8 bits a channel, e.g. [0, 4095], of more than 4 bands also a pair each; "
        "None finds them in the data", WINDOW),
    Key("DATA.MASK_PATCH_SIZE", 32, _int, "TASK simmim: side in pixels of the squares that are masked", KERNEL),
    Key("DATA.MASK_RATIO", 0.6, _float, "TASK simmim: share of the squares that are masked",
        Rule(lambda share: 0 < share < 1, "it must lie between 0 and 1")),
    Key("DATA.DENSE.SHORT_SIDE", [800], _ints,
        "dense tasks: sides in pixels that the shorter side of an image is resized to; several: one of them at random in training, the "
        "largest in evaluation", each(8, LARGEST_SIDE, "sides in pixels")),
    Key("DATA.DENSE.LONG_SIDE", 1333, _int, "dense tasks: the longer side is at most this, the shorter one following",
        between(8, LARGEST_SIDE)),
    Key("DATA.DENSE.SCALE", [1.0, 1.0], _floats,
        "dense tasks, training: range of a random factor on that size, e.g. [0.5, 2] for semantic, [0.1, 2] for large-scale jitter",
        Rule(lambda pair: len(pair) == 2 and 0.01 <= pair[0] <= pair[1] <= 100, "two factors, rising, between 0.01 and 100")),
    Key("DATA.DENSE.CROP", 0, _size, "dense tasks, training: random crop of one number, or [height, width], padded up to it; 0: none",
        Rule(lambda size: size == 0 or PIXELS.holds(size), PIXELS.words)),
    Key("DATA.DENSE.CROP_CATEGORY", 1.0, _float,
        "semantic: a random crop is drawn anew (ten times at most) where one class has more than this share of its pixels, e.g. 0.75",
        UP_TO_1),
    Key("DATA.DENSE.DETR_CROPS", False, _bool,
        "dense tasks, training: half of the images are resized, cropped and resized again, as DETR's and Swin's detectors have it"),
    Key("DATA.DENSE.PHOTOMETRIC", False, _bool, "dense tasks, training: brightness, contrast, saturation and hue at random (SSD's)"),
    Key("DATA.DENSE.COPY_PASTE", 0.0, _float,
        "objects with masks, training: probability that objects of another image are pasted in (simple copy-paste)", PROBABILITY),
    Key("DATA.DENSE.EMPTY", False, _bool, "dense tasks: train on images without an object too"),
    Key("DATA.DENSE.ASPECT_GROUPS", True, _bool, "detection and instance: wide and tall images in batches of their own, which pads less"),
    Key("DATA.DENSE.REDUCE_ZERO_LABEL", None, _optional(_bool),
        "maps of classes: value 0 is no class and the others count from 0 (ADE20K); None finds it by the layout"),
    Key("DATA.REPEATED_AUG", 1, _int, "copies of an image in an epoch, each augmented differently (DeiT uses 3)", between(1, 1000)),
    Key("DATA.NUM_WORKERS", -1, _int,
        "DataLoader workers of each process; -1: its share of the CPUs that may be used, but one (32 at most)",
        Rule(lambda number: -1 <= number <= 1024, "it is a number of workers up to 1,024, or -1 to choose it"), scope=PROCESS),
    Key("DATA.PIN_MEMORY", True, _bool, "page-locked batches for faster copies to a GPU", scope=RUN),
    Key("DATA.DECODER", "auto", _str,
        "pillow: every pixel as the papers had it; fast: also where published weights are evaluated; nvjpeg: the GPU decodes images of "
        "training, which differ slightly, for machines with few cores", choices=("auto", "fast", "pillow", "nvjpeg")),
    Key("DATA.AUGMENT_ON", "auto", _str,
        "auto: on a GPU the GPU augments, else the DataLoader workers do", choices=("auto", "worker", "device")),
    Key("DATA.VAL_FRACTION", 0.0, _float,
        "share of each class kept for validation where the data has no split of its own, e.g. 0.1", BELOW_1),
    Key("DATA.FOLD", "", _str,
        "one part of a cross-validation, for validation: 2/5 is the second of five, stratified by class (and by the fold column of a list, "
        "where it has one, whose own names do too)", FOLD),
    Key("DATA.VAL_LABELS", "", _str, "file with the labels of a flat validation folder; empty looks for the usual ones"),
    Key("DATA.CLASS_NAMES", "", _local,
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
    Key("DATA.SAMPLING", "natural", _str,
        "how often an epoch sees each class: as often as it has images; by the square root of that; all alike (balanced)",
        choices=("natural", "sqrt", "balanced")),
    Key("DATA.EXIF", False, _bool, "turn images upright as their EXIF block says (the papers, torchvision and timm do not)"),
    Key("DATA.CORRUPT_BUDGET", 0.001, _float,
        "unreadable training images to go on with: below 1 a share of them, else a number", NOT_NEGATIVE, scope=RUN),
    Key("DATA.READ_PATIENCE", 2.0, _float,
        "seconds that a failing read (file gone, share away) is tried again before the image is bad", SECONDS, scope=RUN),
    Key("DATA.TIMEOUT", 600.0, _float,
        "seconds without a batch after which loading counts as hung; 0 waits for ever", SECONDS, scope=RUN),
    Key("DATA.INDEX_CACHE", "auto", _str,
        "folder for the file lists of large data sets; auto is the user's cache folder, none keeps none", scope=RUN),
    Key("DATA.ZIP_MODE", False, _bool, "read train.zip and val.zip with their map files (train_map.txt), as Swin has them", scope=RUN),
    Key("DATA.CACHE_MODE", "part", _str, "accepted from old files; has no effect", scope=RUN),

    Key("MODEL.TYPE", "crossformer", _str, "family of the model; timm is any timm model", choices=MODEL_TYPES),
    Key("MODEL.NAME", "crossformer_tiny", _str, "variant of the family, or a label when the family's node gives the numbers", FOLDER_NAME),
    Key("MODEL.NUM_CLASSES", 0, _int, "0 counts them in the data; another number must agree with the data", between(0, 10**7), scope=RUN),
    Key("MODEL.PRETRAINED", "", _local, "file of weights to start from (head and sizes are adapted), or hub for timm's own", scope=RUN),
    Key("MODEL.CLASS_MAP", "", _local, "text file, a line a class: its row in the pretrained classifier (ImageNet-22k to 1k)"),
    Key("MODEL.RESUME", "", _local, "checkpoint to continue (training), or to evaluate, predict with or export", scope=RUN),
    Key("MODEL.IN_CHANS", None, _optional(_int),
        "channels of the images: 1 is grey, 4 RGB with alpha, others the bands of TIFF files; None is the family's IN_CHANS, else 3",
        CHANNELS),
    Key("MODEL.DROP_RATE", 0.0, _float, "dropout rate", BELOW_1),
    Key("MODEL.DROP_PATH_RATE", 0.1, _float, "stochastic depth: rate of the last block, growing linearly from 0", BELOW_1),
    Key("MODEL.SIMMIM.NORM_TARGET.ENABLE", False, _bool,
        "TASK simmim: predict pixels normalised by their neighbourhood's mean and deviation"),
    Key("MODEL.SIMMIM.NORM_TARGET.PATCH_SIZE", 47, _int, "side of that neighbourhood in pixels",
        Rule(lambda side: 1 <= side <= 1023 and side % 2 == 1, "an odd number of pixels, so that a pixel is its centre")),
    Key("MODEL.LABEL_SMOOTHING", 0.1, _float, "label smoothing", BELOW_1),

    Key("MODEL.DENSE.HEAD", "auto", _str,
        "what stands on the backbone in dense tasks; auto: mask_rcnn for instance, retinanet for detection, upernet for semantic, "
        "mask2former for mask", choices=("auto", "retinanet", "faster_rcnn", "mask_rcnn", "semantic_fpn", "upernet", "mask2former")),
    Key("MODEL.DENSE.WIDTH", None, _optional(_int), "channels of the head's pyramid; None is as published (256, UPerNet's 512)", WIDTH),
    Key("MODEL.DENSE.OUT_NORM", False, _bool, "a layer norm on each of the backbone's outputs, as Swin's detectors have it"),
    Key("MODEL.DENSE.FROZEN_STAGES", 0, _int,
        "the image embedding and so many stages of the backbone left as they are (1: the embedding alone); 0: none",
        between(0, MOST_STAGES)),
    Key("MODEL.DENSE.ANCHOR_SCALE", None, _optional(_float),
        "side of the smallest anchor over the stride of its level; None is as published (RetinaNet 4, region proposals 8)",
        between(0.1, 64)),
    Key("MODEL.DENSE.DETECTIONS", 100, _int, "most objects found in an image, likeliest first", between(1, 10_000)),
    Key("MODEL.DENSE.MIN_SCORE", 0.05, _float, "detections of a lower score are dropped before evaluation", PROBABILITY),
    Key("MODEL.DENSE.NMS", 0.5, _float, "overlap (intersection over union) beyond which the less likely of two boxes is dropped",
        PROBABILITY),
    Key("MODEL.DENSE.REGIONS", 512, _int,
        "Faster and Mask R-CNN: proposals of an image that the heads are trained on; fewer do for small images with few objects",
        between(1, 10_000)),
    Key("MODEL.DENSE.QUERIES", 100, _int, "Mask2Former: masks that are proposed for an image", between(1, 10_000)),
    Key("MODEL.DENSE.AUXILIARY", 0.4, _float, "UPerNet: weight of the loss of the auxiliary head on the third stage; 0: none",
        between(0, 100)),

    Key("MODEL.CROSSFORMER.EMBED_DIM", None, _optional(_int), "width of the first stage", WIDTH),
    Key("MODEL.CROSSFORMER.DEPTHS", None, _optional(_ints), "blocks per stage", DEPTHS),
    Key("MODEL.CROSSFORMER.NUM_HEADS", None, _optional(_ints), "heads per stage", HEADS),
    Key("MODEL.CROSSFORMER.GROUP_SIZE", None, _optional(_ints), "group size per stage", KERNELS),
    Key("MODEL.CROSSFORMER.INTERVAL", None, _optional(_ints), "interval of long-distance attention per stage", RATES),
    Key("MODEL.CROSSFORMER.PATCH_SIZE", None, _optional(_int_or_list), "kernels of the image embedding, e.g. [4, 8, 16, 32]",
        ONE_OR_MORE_KERNELS),
    Key("MODEL.CROSSFORMER.MERGE_SIZE", None, _optional(_int_lists), "kernels of the embeddings between stages", KERNEL_LISTS),
    Key("MODEL.CROSSFORMER.MLP_RATIO", None, _optional(_number_or_list), "hidden width of the MLPs over their width", ONE_OR_MORE_RATIOS),
    Key("MODEL.CROSSFORMER.IN_CHANS", None, _optional(_int), "input channels; MODEL.IN_CHANS counts before it", CHANNELS),
    Key("MODEL.CROSSFORMER.QKV_BIAS", None, _optional(_bool), "bias of the query, key and value projection"),
    Key("MODEL.CROSSFORMER.QK_SCALE", None, _optional(_float), "scale of the queries; None is head width ** -0.5", between(1e-6, 1e6)),
    Key("MODEL.CROSSFORMER.ATTENTION", None, _optional(_str), "lsda (short and long distance in turn), sda or lda alone"),
    Key("MODEL.CROSSFORMER.POSITION", None, _optional(_str), "position bias: dpb, dpb_residual, table (Swin's) or none"),
    Key("MODEL.CROSSFORMER.APE", None, _optional(_bool), "learned absolute position embedding on the tokens"),
    Key("MODEL.CROSSFORMER.LOW_PRECISION_RESIDUAL", None, _optional(_bool),
        "keep the first stage's residual stream in bf16 or fp16, under PRECISION's, as that of the others is"),
    Key("MODEL.CROSSFORMER.PATCH_NORM", None, _optional(_bool), "layer norm after the image embedding"),
    Key("MODEL.CROSSFORMER.GROUP_TYPE", None, _optional(_str), "constant, linear, linear_div, alter or 7_14 (CrossFormer++)"),
    Key("MODEL.CROSSFORMER.USE_ACL", None, _optional(_bool), "amplitude cooling layers (CrossFormer++)"),
    Key("MODEL.CROSSFORMER.USE_CPE", None, _optional(_bool), "accepted from old files; only False"),
    Key("MODEL.CROSSFORMER.PAD_TYPE", None, _optional(_int), "accepted from old files; only 0"),
    Key("MODEL.CROSSFORMER.NO_MASK", None, _optional(_bool), "let attention see the padding"),
    Key("MODEL.CROSSFORMER.ADAPT_INTER", None, _optional(_bool), "accepted from old files; only False"),

    Key("MODEL.SWIN.EMBED_DIM", None, _optional(_int), "width of the first stage", WIDTH),
    Key("MODEL.SWIN.DEPTHS", None, _optional(_ints), "blocks per stage", DEPTHS),
    Key("MODEL.SWIN.NUM_HEADS", None, _optional(_ints), "heads per stage", HEADS),
    Key("MODEL.SWIN.WINDOW_SIZE", None, _optional(_int), "window size", KERNEL),
    Key("MODEL.SWIN.PATCH_SIZE", None, _optional(_int), "patch size", KERNEL),
    Key("MODEL.SWIN.IN_CHANS", None, _optional(_int), "input channels; MODEL.IN_CHANS counts before it", CHANNELS),
    Key("MODEL.SWIN.MLP_RATIO", None, _optional(_float), "hidden width of the MLPs over their width", MLP_RATIO),
    Key("MODEL.SWIN.QKV_BIAS", None, _optional(_bool), "bias of the query, key and value projection"),
    Key("MODEL.SWIN.QK_SCALE", None, _optional(_float), "accepted from old files; only None"),
    Key("MODEL.SWIN.APE", None, _optional(_bool), "accepted from old files; only False"),
    Key("MODEL.SWIN.PATCH_NORM", None, _optional(_bool), "accepted from old files; only True"),

    Key("MODEL.SWINV2.EMBED_DIM", None, _optional(_int), "width of the first stage", WIDTH),
    Key("MODEL.SWINV2.DEPTHS", None, _optional(_ints), "blocks per stage", DEPTHS),
    Key("MODEL.SWINV2.NUM_HEADS", None, _optional(_ints), "heads per stage", HEADS),
    Key("MODEL.SWINV2.WINDOW_SIZE", None, _optional(_int), "window size", KERNEL),
    Key("MODEL.SWINV2.PRETRAINED_WINDOW_SIZES", None, _optional(_ints),
        "window sizes per stage that the weights to start from were trained with; 0: this model's own", each(0, 1024)),
    Key("MODEL.SWINV2.PATCH_SIZE", None, _optional(_int), "patch size", KERNEL),
    Key("MODEL.SWINV2.IN_CHANS", None, _optional(_int), "input channels; MODEL.IN_CHANS counts before it", CHANNELS),
    Key("MODEL.SWINV2.MLP_RATIO", None, _optional(_float), "hidden width of the MLPs over their width", MLP_RATIO),
    Key("MODEL.SWINV2.QKV_BIAS", None, _optional(_bool), "bias of the query and value projection"),
    Key("MODEL.SWINV2.APE", None, _optional(_bool), "accepted from old files; only False"),
    Key("MODEL.SWINV2.PATCH_NORM", None, _optional(_bool), "accepted from old files; only True"),

    Key("MODEL.SWIN_MLP.EMBED_DIM", None, _optional(_int), "width of the first stage", WIDTH),
    Key("MODEL.SWIN_MLP.DEPTHS", None, _optional(_ints), "blocks per stage", DEPTHS),
    Key("MODEL.SWIN_MLP.NUM_HEADS", None, _optional(_ints), "heads per stage", HEADS),
    Key("MODEL.SWIN_MLP.WINDOW_SIZE", None, _optional(_int), "window size", KERNEL),
    Key("MODEL.SWIN_MLP.PATCH_SIZE", None, _optional(_int), "patch size", KERNEL),
    Key("MODEL.SWIN_MLP.IN_CHANS", None, _optional(_int), "input channels; MODEL.IN_CHANS counts before it", CHANNELS),
    Key("MODEL.SWIN_MLP.MLP_RATIO", None, _optional(_float), "hidden width of the MLPs over their width", MLP_RATIO),
    Key("MODEL.SWIN_MLP.APE", None, _optional(_bool), "accepted from old files; only False"),
    Key("MODEL.SWIN_MLP.PATCH_NORM", None, _optional(_bool), "accepted from old files; only True"),

    Key("MODEL.CVT.EMBED_DIMS", None, _optional(_ints), "width per stage", WIDTHS),
    Key("MODEL.CVT.DEPTHS", None, _optional(_ints), "blocks per stage", DEPTHS),
    Key("MODEL.CVT.NUM_HEADS", None, _optional(_ints), "heads per stage", HEADS),
    Key("MODEL.CVT.MLP_RATIOS", None, _optional(_floats), "hidden width of the MLPs over their width, per stage", MLP_RATIOS),
    Key("MODEL.CVT.PATCH_SIZES", None, _optional(_ints), "kernels of the embeddings", KERNELS),
    Key("MODEL.CVT.PATCH_STRIDES", None, _optional(_ints), "strides of the embeddings", RATES),
    Key("MODEL.CVT.PATCH_PADDINGS", None, _optional(_ints), "paddings of the embeddings", each(0, 1024)),
    Key("MODEL.CVT.KV_STRIDES", None, _optional(_ints), "stride of the key and value projections per stage", RATES),
    Key("MODEL.CVT.QKV_BIAS", None, _optional(_bool), "bias of the query, key and value projection"),
    Key("MODEL.CVT.IN_CHANS", None, _optional(_int), "input channels; MODEL.IN_CHANS counts before it", CHANNELS),

    Key("MODEL.SHUNTED.EMBED_DIMS", None, _optional(_ints), "width per stage", WIDTHS),
    Key("MODEL.SHUNTED.DEPTHS", None, _optional(_ints), "blocks per stage", DEPTHS),
    Key("MODEL.SHUNTED.NUM_HEADS", None, _optional(_ints), "heads per stage", HEADS),
    Key("MODEL.SHUNTED.MLP_RATIOS", None, _optional(_floats), "hidden width of the MLPs over their width, per stage", MLP_RATIOS),
    Key("MODEL.SHUNTED.SR_RATIOS", None, _optional(_ints), "merging rate of keys and values per stage (even; 1 is none)", RATES),
    Key("MODEL.SHUNTED.NUM_CONV", None, _optional(_int), "plain 3x3 convolutions in the image embedding", between(0, 100)),
    Key("MODEL.SHUNTED.QKV_BIAS", None, _optional(_bool), "bias of the query, key and value projection"),
    Key("MODEL.SHUNTED.IN_CHANS", None, _optional(_int), "input channels; MODEL.IN_CHANS counts before it", CHANNELS),

    Key("MODEL.MPVIT.EMBED_DIMS", None, _optional(_ints), "width per stage", WIDTHS),
    Key("MODEL.MPVIT.DEPTHS", None, _optional(_ints), "layers of each path's encoder per stage", DEPTHS),
    Key("MODEL.MPVIT.NUM_PATHS", None, _optional(_ints), "paths per stage", each(1, 16)),
    Key("MODEL.MPVIT.NUM_HEADS", None, _optional(_ints), "heads per stage", HEADS),
    Key("MODEL.MPVIT.MLP_RATIOS", None, _optional(_floats), "hidden width of the MLPs over their width, per stage", MLP_RATIOS),
    Key("MODEL.MPVIT.CRPE_WINDOWS", None, _optional(_int_lists),
        "pairs of a kernel and the heads it serves, e.g. [[3, 2], [5, 3], [7, 3]]", KERNEL_LISTS),
    Key("MODEL.MPVIT.QKV_BIAS", None, _optional(_bool), "bias of the query, key and value projection"),
    Key("MODEL.MPVIT.IN_CHANS", None, _optional(_int), "input channels; MODEL.IN_CHANS counts before it", CHANNELS),

    Key("MODEL.PVT.EMBED_DIMS", None, _optional(_ints), "width per stage", WIDTHS),
    Key("MODEL.PVT.DEPTHS", None, _optional(_ints), "blocks per stage", DEPTHS),
    Key("MODEL.PVT.NUM_HEADS", None, _optional(_ints), "heads per stage", HEADS),
    Key("MODEL.PVT.MLP_RATIOS", None, _optional(_floats), "hidden width of the MLPs over their width, per stage", MLP_RATIOS),
    Key("MODEL.PVT.SR_RATIOS", None, _optional(_ints), "reduction of keys and values per stage (1 in the last)", RATES),
    Key("MODEL.PVT.PATCH_SIZE", None, _optional(_int), "patches of the first stage", KERNEL),
    Key("MODEL.PVT.QKV_BIAS", None, _optional(_bool), "bias of the query, key and value projection"),
    Key("MODEL.PVT.IN_CHANS", None, _optional(_int), "input channels; MODEL.IN_CHANS counts before it", CHANNELS),

    Key("MODEL.PVT_V2.EMBED_DIMS", None, _optional(_ints), "width per stage", WIDTHS),
    Key("MODEL.PVT_V2.DEPTHS", None, _optional(_ints), "blocks per stage", DEPTHS),
    Key("MODEL.PVT_V2.NUM_HEADS", None, _optional(_ints), "heads per stage", HEADS),
    Key("MODEL.PVT_V2.MLP_RATIOS", None, _optional(_floats), "hidden width of the MLPs over their width, per stage", MLP_RATIOS),
    Key("MODEL.PVT_V2.SR_RATIOS", None, _optional(_ints), "reduction of keys and values per stage", RATES),
    Key("MODEL.PVT_V2.LINEAR", None, _optional(_bool), "keys and values from a 7x7 pooled map in every stage (b2_li)"),
    Key("MODEL.PVT_V2.QKV_BIAS", None, _optional(_bool), "bias of the query, key and value projection"),
    Key("MODEL.PVT_V2.IN_CHANS", None, _optional(_int), "input channels; MODEL.IN_CHANS counts before it", CHANNELS),

    Key("MODEL.GALERKIN.EMBED_DIM", None, _optional(_int), "width of the first stage", WIDTH),
    Key("MODEL.GALERKIN.DEPTHS", None, _optional(_ints), "blocks per stage", DEPTHS),
    Key("MODEL.GALERKIN.NUM_HEADS", None, _optional(_ints), "heads per stage", HEADS),
    Key("MODEL.GALERKIN.PATCH_SIZE", None, _optional(_int), "4 for strides 4 to 32, 2 for 2 to 16", KERNEL),
    Key("MODEL.GALERKIN.MLP_RATIO", None, _optional(_float), "hidden width of the MLPs over their width", MLP_RATIO),
    Key("MODEL.GALERKIN.QKV_BIAS", None, _optional(_bool), "bias of the query, key and value projection"),
    Key("MODEL.GALERKIN.PATCH_NORM", None, _optional(_bool), "layer norm after the image embedding"),
    Key("MODEL.GALERKIN.NORM_EPS", None, _optional(_float), "eps of the norms of keys and values", between(0, 1)),
    Key("MODEL.GALERKIN.OUT_PROJ", None, _optional(_bool), "a linear after the heads"),
    Key("MODEL.GALERKIN.POSITIONS", None, _optional(_bool), "give the attention the tokens' coordinates (implies OUT_PROJ)"),
    Key("MODEL.GALERKIN.IN_CHANS", None, _optional(_int), "input channels; MODEL.IN_CHANS counts before it", CHANNELS),

    Key("TRAIN.EPOCHS", 300, _int, "passes over the training images", EPOCHS),
    Key("TRAIN.ITERATIONS", 0, _int,
        "steps of the whole run, in place of TRAIN.EPOCHS, whose last one may be cut short (0: TRAIN.EPOCHS counts)", STEPS),
    Key("TRAIN.START_EPOCH", 0, _int, "accepted from old files; the checkpoint's step decides"),
    Key("TRAIN.WARMUP_EPOCHS", 20, _float, "epochs of linear warm-up", NOT_NEGATIVE),
    Key("TRAIN.WARMUP_STEPS", 0, _int, "steps of linear warm-up, in place of TRAIN.WARMUP_EPOCHS (0: that counts)", STEPS),
    Key("TRAIN.BASE_LR", 5e-4, _float, "peak learning rate for a global batch of LR_BATCH", LEARNING_RATE),
    Key("TRAIN.WARMUP_LR", 5e-7, _float, "learning rate of the first step, likewise scaled", NOT_NEGATIVE),
    Key("TRAIN.MIN_LR", 5e-6, _float, "learning rate at the end, likewise scaled", NOT_NEGATIVE),
    Key("TRAIN.LR_BATCH", 512, _int, "global batch that the three rates are given for; 0 does not scale them", between(0, 10**9)),
    Key("TRAIN.WEIGHT_DECAY", 0.05, _float, "weight decay; none on biases, 1-D parameters and what the model names", NOT_NEGATIVE),
    Key("TRAIN.NO_DECAY", [], _strs,
        "further parameters without weight decay: patterns of names, such as *relative_position_bias_table *queries*"),
    Key("TRAIN.BACKBONE_LR", 1.0, _float, "dense tasks: factor on the learning rate of the backbone, e.g. 0.1 (1: none)", UP_TO_1),
    Key("TRAIN.LAYER_DECAY", 1.0, _float, "factor on the learning rate per layer below the head (1: none)", UP_TO_1),
    Key("TRAIN.CLIP_GRAD", 5.0, _float, "largest gradient norm; 0 does not clip", NOT_NEGATIVE),
    Key("TRAIN.ACCUMULATION_STEPS", 1, _int, "micro-batches per optimizer step", IMAGES, scope=RUN),
    Key("TRAIN.GLOBAL_BATCH", 0, _int,
        "images a step over all processes that the recipe was made for, which --fit keeps; 0: whatever the batch size, the accumulation "
        "and the processes give", between(0, 10**9), scope=RUN),
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
        "auroc is of two classes; of dense tasks box_ap, mask_ap, miou or pq", choices=(
            "auto", "top1", "loss", "mean_recall", "f1", "kappa", "auroc", "map", "micro_f1", "box_ap", "mask_ap", "miou", "pixel_accuracy",
            "pq")),
    Key("TRAIN.DISTILLATION.TEACHER", "", _local,
        "trained model to learn from beside the labels: a checkpoint or export of this program, or timm's name of one; empty is none"),
    Key("TRAIN.DISTILLATION.WEIGHTS", "", _local, "file of weights of that timm model; empty fetches timm's own"),
    Key("TRAIN.DISTILLATION.TYPE", "hard", _str,
        "what is learned of the teacher: its decision, or its probabilities", choices=("hard", "soft")),
    Key("TRAIN.DISTILLATION.ALPHA", 0.5, _float, "share of the loss that the teacher has", PROBABILITY),
    Key("TRAIN.DISTILLATION.TEMPERATURE", 1.0, _float, "soft: what both models' logits are divided by", ABOVE_0),
    Key("TRAIN.PATIENCE", 0, _int,
        "epochs without a better evaluation (TRAIN.BEST_METRIC) after which a run ends early; the schedule stays that of TRAIN.EPOCHS "
        "or TRAIN.ITERATIONS (0: never)", NOT_NEGATIVE, scope=RUN),
    Key("TRAIN.CLASS_WEIGHTS", "none", _class_weights,
        "of classes in the training loss: the rarer the heavier, in full or by their effective numbers of images (effective:0.99 less "
        "so), or a list in the classes' order; an image weighs 1 on average (classification)",
        Rule(lambda asked: isinstance(asked, str) or min(asked, default=-1) >= 0 < max(asked), "weights are not negative, nor all 0"),
        words=("none", "balanced", "effective")),
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
    Key("TRAIN.LR_SCHEDULER.NAME", "cosine", _str, "how the learning rate decays",
        choices=("cosine", "linear", "poly", "step", "multistep")),
    Key("TRAIN.LR_SCHEDULER.WARMUP_PREFIX", None, _optional(_bool),
        "start the decay after the warm-up; None is the family's recipe (CrossFormer False, others True)"),
    Key("TRAIN.LR_SCHEDULER.POWER", 0.9, _float,
        "poly: the rate falls to TRAIN.MIN_LR as this power of the share of steps still to come", between(0.01, 100)),
    Key("TRAIN.LR_SCHEDULER.DECAY_EPOCHS", 30.0, _float, "step: epochs between decays", between(0.001, 1_000_000)),
    Key("TRAIN.LR_SCHEDULER.DECAY_RATE", 0.1, _float, "step: factor of each decay", UP_TO_1),
    Key("TRAIN.LR_SCHEDULER.MULTISTEPS", [], _floats, "multistep: epochs of the decays; steps where TRAIN.ITERATIONS is set", MILESTONES),
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

    Key("AUG.COLOR_JITTER", 0.4, _float, "colour jitter; used when AUTO_AUGMENT is none", between(0, 100)),
    Key("AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1", _str, "timm's policy text, or none"),
    Key("AUG.SCALE", [0.08, 1.0], _floats, "range of the random crop's share of the image", SHARES),
    Key("AUG.RATIO", [3 / 4, 4 / 3], _floats, "range of the random crop's aspect ratio", RISING),
    Key("AUG.HFLIP", 0.5, _float, "probability of a left-right flip", PROBABILITY),
    Key("AUG.VFLIP", 0.0, _float, "probability of an up-down flip", PROBABILITY),
    Key("AUG.REPROB", 0.25, _float, "probability of random erasing", PROBABILITY),
    Key("AUG.REMODE", "pixel", _str, "what random erasing fills with", choices=("const", "rand", "pixel")),
    Key("AUG.RECOUNT", 1, _int, "boxes of random erasing", between(1, 100)),
    Key("AUG.MIXUP", 0.8, _float, "mixup alpha (0: off)", between(0, 1_000_000)),
    Key("AUG.CUTMIX", 1.0, _float, "cutmix alpha (0: off)", between(0, 1_000_000)),
    Key("AUG.CUTMIX_MINMAX", None, _optional(_floats), "range of cutmix's side lengths; replaces its alpha", SHARES),
    Key("AUG.MIXUP_PROB", 1.0, _float, "probability of mixing a batch", PROBABILITY),
    Key("AUG.MIXUP_SWITCH_PROB", 0.5, _float, "probability of cutmix when both are on", PROBABILITY),
    Key("AUG.MIXUP_MODE", "batch", _str, "mix per batch, per pair or per element", choices=("batch", "pair", "elem")),

    Key("TEST.CROP", True, _bool,
        "DATA.FIT crop: resize to 256/224 of the size (or as the timm model was) and crop the centre; False squashes"),
    Key("TEST.BATCH_SIZE", 0, _int, "images per process in evaluation; 0 is DATA.BATCH_SIZE", between(0, 1_000_000), scope=RUN),
    Key("TEST.THRESHOLDS", None, _optional(_number_or_list),
        "probability from which an image has a label, one for all, or a list in the order of the classes; None: found on the validation "
        "images, where each label's F1 is greatest, and kept in the checkpoint",
        Rule(lambda given: all(0 <= number <= 1 for number in (given if isinstance(given, list) else [given])),
             "probabilities lie between 0 and 1")),
    Key("TEST.WEIGHTS", "auto", _str,
        "weights of a checkpoint that are evaluated, predicted with or exported: ema, the average; auto, the average where there is one",
        choices=("auto", "raw", "ema"), scope=COMMAND),
    Key("TEST.SCALES", [1.0], _floats,
        "semantic, --eval: mean over the image at these factors of its size, e.g. [0.5, 0.75, 1, 1.25, 1.5, 1.75]",
        Rule(lambda factors: 1 <= len(factors) <= 16 and all(0.05 <= factor <= 20 for factor in factors),
             "1 to 16 factors between 0.05 and 20")),
    Key("TEST.SLIDE", 0, _size,
        "semantic, evaluation: windows of this size over the image, each a step of two thirds; 0: the whole image at once",
        Rule(lambda size: size == 0 or PIXELS.holds(size), PIXELS.words)),
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

LARGEST_CONFIG = 1 << 18  # bytes of a YAML file; all keys with their values have 16,000


def require_regular(path: str) -> None:
    """Raise ``OSError`` unless ``path`` is a regular file: a pipe or a device might never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "is a folder" if os.path.isdir(path) else "is no regular file", path)


def read_text_file(path: str, most: int, errors: str = "strict") -> str:
    """The text of a file in UTF-8, with or without a byte order mark; ``errors`` as ``bytes.decode`` has it.

    Raises:
        OSError: unreadable, no regular file, of more than ``most`` bytes or in another encoding; ``strerror`` says so.
    """
    require_regular(path)
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"is larger than {most:,} bytes", path)
    try:
        return content.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise OSError(errno.EILSEQ, f"is not UTF-8 at byte {error.start}; save it as UTF-8", path) from None


class _Loader(yaml.SafeLoader):
    """Safe YAML only; a class of our own so that nobody's constructors reach it. Dates are texts."""

    yaml_implicit_resolvers = {first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith(":timestamp")]
                               for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()}


_MOST_VALUES, _DEEPEST = 10_000, 20  # of a YAML text: an alias may stand for any number of values
_SCALARS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null")}


class _PlainValues:
    """Makes the values of a YAML text's nodes; counts them, so that a few aliases of aliases do not become millions."""

    def __init__(self, loader: _Loader):
        self.loader, self.left = loader, _MOST_VALUES

    def value(self, node: yaml.Node, verbatim: bool = False, depth: int = 0) -> Any:
        """Texts, numbers, lists and mappings; ``verbatim``: scalars as they are written (010 is no 8), but for null.

        Raises:
            ValueError: something else, or too much of it; says what.
        """
        self.left -= 1
        if self.left < 0 or depth > _DEEPEST:
            raise ValueError(f"more than {_MOST_VALUES:,} values, or nested deeper than {_DEEPEST} levels")
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.value(item, verbatim, depth + 1) for item in node.value]
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            pairs = [(self.value(key, verbatim, depth + 1), self.value(value, verbatim, depth + 1)) for key, value in node.value]
            if any(isinstance(key, (list, dict)) for key, _ in pairs):
                raise ValueError("a key must be a plain word")
            return dict(pairs)
        if node.tag not in _SCALARS or not isinstance(node, yaml.ScalarNode):
            raise ValueError(f"{node.tag}; only plain values are read")
        if verbatim and not node.tag.endswith(":null"):
            return node.value
        kind = node.tag.rpartition(":")[2]
        try:
            value = self.loader.construct_object(node)
            if kind != "int" or abs(value) < 10**_DIGITS:
                return value
        except (ValueError, KeyError, yaml.YAMLError):
            pass
        raise ValueError(f"{quoted(node.value)} is no {kind}" + (f" of at most {_DIGITS} digits" if kind == "int" else ""))


def _compose(text: str) -> tuple[_Loader, yaml.Node | None]:
    """The loader and the root node of a YAML text.

    Raises:
        ValueError: no YAML; its arguments are the reason and the line (0: none).
    """
    try:
        loader = _Loader(text)
        return loader, loader.get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(problem, mark.line + 1 if mark else 0) from None
    except RecursionError:
        raise ValueError("nested too deeply", 0) from None
    except (ValueError, OverflowError):  # an escape that stands for no character
        raise ValueError("an impossible character", 0) from None


def yaml_tree(text: str) -> Any:
    """The plain value of a YAML text.

    Raises:
        ValueError: no YAML, or more than plain values, or too many of them.
    """
    if len(text) > LARGEST_CONFIG:
        raise ValueError(f"more than {LARGEST_CONFIG:,} characters")
    loader, root = _compose(text)
    return None if root is None else _PlainValues(loader).value(root)


class _Quoted(reprlib.Repr):
    """Python's spelling of a value, cut where a message would grow long."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 120
        self.maxlist = self.maxtuple = self.maxdict = 20


def quoted(value: Any) -> str:
    """``value`` in Python's spelling, cut where a message would grow long."""
    return _Quoted().repr(value)


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
    near, key = _nearest(key[:200], KEY), key if key.isprintable() and len(key) <= 200 else quoted(key)
    return ConfigError(f"{where}: unknown key {key}" + (f"; did you mean {near}?" if near else "; see --help-keys for all keys"))


def converted(key: str, raw: Any, what: str) -> Any:
    """The value of ``key`` that ``raw`` stands for; ``what`` names it in the ``ConfigError`` for another kind of value."""
    try:
        return KEY[key].kind(raw)
    except ValueError as error:
        raise ConfigError(f"{what} takes {error}, not {quoted(raw)}") from None


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
FOUND_IN_DATA = ("DATA.WINDOW", "DATA.MEAN", "DATA.STD")


def history(config: CfgNode) -> dict[str, list[tuple[str, Any]]]:
    """Where the values come from: key -> (source, value) of everyone who set it, the last of which counts.

    A source is ``FILE:line``, ``base FILE:line``, ``command line``, ``checkpoint FILE`` or ``derived from KEY``. Keys that nobody set
    have their default and are not listed.
    """
    return dict(config.__dict__.get(_HISTORY, {}))


def _walk(node: yaml.MappingNode, prefix: str, name: str, values: _PlainValues) -> Iterator[tuple[str, Any, str]]:
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
                yield from _walk(value_node, key + ".", name, values)
            elif value_node.value not in ("", "null", "~"):
                raise ConfigError(f"{where}: {key} is a section and takes keys below it, not a value")
        elif canonical not in KEY:
            raise _unknown(key, where)
        else:
            try:
                yield canonical, values.value(value_node, verbatim=KEY[canonical].kind in (_str, _strs, _base, _output)), where
            except ValueError as error:
                raise ConfigError(f"{where}: {key}: {error}") from None


def _read_yaml(text: str, name: str) -> list[tuple[str, Any, str]]:
    try:
        loader, root = _compose(text)
    except ValueError as error:
        problem, line = error.args
        raise ConfigError(f"{name}{f':{line}' if line else ''}: not valid YAML ({problem})") from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{name}: a configuration is a mapping of sections and keys, such as 'MODEL: {{TYPE: crossformer}}'")
    return list(_walk(root, "", name, _PlainValues(loader)))


_MOST_FILES = 100  # that BASE leads to


def _merge_file(root: CfgNode, path: str, stack: tuple[str, ...] = (), merged: list[str] | None = None) -> None:
    if os.path.splitext(path)[1].lower() not in (".yaml", ".yml"):
        raise ConfigError(f"{path}: a configuration file ends in .yaml or .yml")
    real = os.path.realpath(path)
    if real in stack:
        raise ConfigError(f"{path}: BASE leads back to this file; remove the cycle")
    merged = [] if merged is None else merged
    merged.append(real)
    if len(merged) > _MOST_FILES:
        raise ConfigError(f"{path}: BASE leads to more than {_MOST_FILES} files, counting one as often as it is named")
    try:
        text = read_text_file(path, LARGEST_CONFIG)
    except FileNotFoundError:
        origin = f" (named by BASE in {stack[-1]})" if stack else ""
        raise ConfigError(f"{path}: no such configuration file{origin}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    entries = _read_yaml(text, path)
    for key, value, where in entries:
        if key == "BASE":
            for base in filter(None, converted(key, value, f"{where}: BASE")):
                _merge_file(root, os.path.join(os.path.dirname(path), base), (*stack, real), merged)
    for key, value, where in entries:
        if key != "BASE":
            _set(root, key, value, where, f"base {where}" if stack else where)


# What SimMIM's pre-training does to images, where nothing else is asked for (the paper's section 4.1.1): crops and flips alone.
_SIMMIM_AUGMENTATION = {"AUG.SCALE": [0.67, 1.0], "AUG.AUTO_AUGMENT": "none", "AUG.COLOR_JITTER": 0.0, "AUG.REPROB": 0.0, "AUG.MIXUP": 0.0,
                        "AUG.CUTMIX": 0.0}


DENSE_TASKS = ("detection", "instance", "semantic", "mask")
# What is for classes of whole images alone, with the values that switch it off.
_OF_CLASSIFICATION = {"AUG.COLOR_JITTER": 0.0, "AUG.AUTO_AUGMENT": "none", "AUG.REPROB": 0.0, "AUG.MIXUP": 0.0, "AUG.CUTMIX": 0.0,
                      "AUG.CUTMIX_MINMAX": None, "MODEL.LABEL_SMOOTHING": 0.0}


def without_effect(config: CfgNode) -> list[str]:
    """Keys whose values ask for something that a dense TASK leaves out."""
    return [key for key, off in _OF_CLASSIFICATION.items() if config.TASK in DENSE_TASKS and lookup(config, key) != off]


def _finish(root: CfgNode, opts: Sequence[str] | None) -> CfgNode:
    opts = list(opts or [])
    if len(opts) % 2:
        raise ConfigError(f"--opts takes pairs of KEY VALUE; {opts[-1]!r} has no partner")
    for key, raw in zip(opts[::2], opts[1::2], strict=True):
        if key == "BASE":
            raise ConfigError(f"--opts: BASE is read in YAML files only; give that file by --cfg {quoted(raw)}")
        _set(root, key, raw, "--opts", COMMAND_LINE)
    if "TASK" not in history(root) and root.MODEL.NAME.startswith("simmim_pretrain"):  # theirs is a program of its own
        _set(root, "TASK", "simmim", "MODEL.NAME", "derived from MODEL.NAME")
    usual = _SIMMIM_AUGMENTATION if root.TASK == "simmim" else _OF_CLASSIFICATION if root.TASK in DENSE_TASKS else {}
    for key, value in usual.items():
        if key not in history(root):
            _set(root, key, value, "TASK", "derived from TASK")
    if root.TRAIN.ITERATIONS and history(root).get("TRAIN.EPOCHS", [("", 0)])[-1][0] == COMMAND_LINE:
        raise ConfigError(f"TRAIN.EPOCHS is {root.TRAIN.EPOCHS}, but TRAIN.ITERATIONS ({root.TRAIN.ITERATIONS}) counts before it; give "
                          "--iterations, or TRAIN.ITERATIONS 0 with the warm-up and the milestones in epochs")
    if root.TRAIN.WARMUP_STEPS and "TRAIN.WARMUP_EPOCHS" not in history(root):
        _set(root, "TRAIN.WARMUP_EPOCHS", 0, "TRAIN.WARMUP_STEPS", "derived from TRAIN.WARMUP_STEPS")
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


def input_channels(config: CfgNode) -> int:
    """Channels of the images: MODEL.IN_CHANS, else the IN_CHANS of the family's node, else 3."""
    node = config.MODEL.get(config.MODEL.TYPE.upper(), {})
    return config.MODEL.IN_CHANS or node.get("IN_CHANS") or 3


def check(config: CfgNode) -> None:
    """Raise ``ConfigError`` for the first value that cannot work: by the rule of its key, then by what ties keys together."""
    for key in KEYS:
        value = lookup(config, key.name)
        if value is None:
            continue
        if key.choices and value not in key.choices:
            near = difflib.get_close_matches(str(value), key.choices, n=1)
            raise ConfigError(f"{key.name} is {quoted(value)}; choose from {', '.join(filter(None, key.choices))}"
                              + (f" (did you mean {near[0]}?)" if near else ""))
        if key.rule is not None and not key.rule.holds(value):
            raise ConfigError(f"{key.name} is {quoted(value)}; {key.rule.words}")
    for key, fault in _faults_between(config):
        raise ConfigError(f"{key} is {lookup(config, key)}; {fault}")


def _faults_between(config: CfgNode) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) where values that are possible do not go together."""
    train, predict, channels = config.TRAIN, config.PREDICT, input_channels(config)
    for key, values in (("DATA.MEAN", config.DATA.MEAN), ("DATA.STD", config.DATA.STD)):
        if values is not None and len(values) != channels:
            yield key, f"{channels} number{'s' * (channels != 1)}, one a channel (MODEL.IN_CHANS)"
    pairs = pairs_of(config.DATA.WINDOW or [0, 1])
    if len(pairs) != 1 and (channels <= 4 or len(pairs) != channels):
        yield "DATA.WINDOW", "one pair for all bands" + (f", or {channels} pairs" if channels > 4 else "")
    if channels != 3 and config.DATA.DECODER == "pillow":
        yield "DATA.DECODER", f"Pillow prepares images of 3 channels, not of {channels}; set it to auto"
    if channels != 3 and config.DATA.DECODER == "nvjpeg":
        yield "DATA.DECODER", f"nvJPEG makes images of 3 channels, not of {channels}; set it to auto"
    if train.MIN_LR > train.BASE_LR:
        yield "TRAIN.MIN_LR", f"it must lie between 0 and TRAIN.BASE_LR ({train.BASE_LR})"
    if 0 < train.ITERATIONS <= train.WARMUP_STEPS:
        yield "TRAIN.WARMUP_STEPS", f"the warm-up must end before training does (TRAIN.ITERATIONS is {train.ITERATIONS})"
    if train.WARMUP_EPOCHS and train.WARMUP_EPOCHS >= train.EPOCHS and not train.ITERATIONS:
        yield "TRAIN.WARMUP_EPOCHS", f"the warm-up must end before training does (TRAIN.EPOCHS is {train.EPOCHS})"
    if train.WARMUP_STEPS and train.WARMUP_EPOCHS:
        yield "TRAIN.WARMUP_STEPS", f"it takes the place of TRAIN.WARMUP_EPOCHS ({train.WARMUP_EPOCHS:g}); set one of them to 0"
    if config.PLAN.FIT and (command := command_of(config)) is not None and not command.light and command.flag.key != "PLAN.RUN":
        yield "PLAN.FIT", f"--fit chooses the micro-batch of training; leave it out with {command.flag.name}"
    if config.FIND_LR.HIGH <= config.FIND_LR.LOW:
        yield "FIND_LR.HIGH", f"it must be above FIND_LR.LOW ({config.FIND_LR.LOW:g})"
    if train.DISTILLATION.WEIGHTS and not train.DISTILLATION.TEACHER:
        yield "TRAIN.DISTILLATION.WEIGHTS", "it goes with TRAIN.DISTILLATION.TEACHER, the name of its model"
    if config.DATA.FOLD and config.DATA.VAL_FRACTION:
        yield "DATA.FOLD", "it takes the place of DATA.VAL_FRACTION; set that to 0"
    for key in ("PREDICT.CSV", "PREDICT.JSON", "PREDICT.FEATURES", "PREDICT.SHEET", "PREDICT.COCO", "PREDICT.PICTURES", "PREDICT.MASKS"):
        if lookup(config, key) and not predict.PATHS and not (key == "PREDICT.CSV" and config.EVAL_MODE):
            yield key, "it goes with --predict, which says what images to predict" + (", or with --eval" if key == "PREDICT.CSV" else "")
