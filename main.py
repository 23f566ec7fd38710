"""Train, evaluate and time hierarchical vision transformers: one process or many, CPU or GPU.

    python main.py --cfg configs/quickstart.yaml
    torchrun --nproc_per_node 8 main.py --cfg configs/crossformer_t.yaml --data-path imagenet
    python main.py --eval --resume output/crossformer_tiny/default/best.pth
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from config import ConfigError, describe_keys, get_config, lookup

EXIT_FAILURE, EXIT_USAGE, EXIT_DATA, EXIT_NUMBERS, EXIT_STOPPED = 1, 2, 3, 4, 75

MANY = "*"  # the flag takes one argument or more, a list

# One table from flags to keys: (group, flags, key, fixed value or None for an argument or MANY, help). Both spellings with dash and
# underscore are understood. No flag has a default, so none beats the YAML unless it is given.
FLAGS: list[tuple[str, str, str, str | None, str]] = [
    ("what to do", "--eval", "EVAL_MODE", "True", "evaluate and stop; with --resume of a checkpoint of ours nothing else is needed"),
    ("what to do", "--throughput", "THROUGHPUT_MODE", "True", "measure images per second of the forward pass and of training"),
    ("what to do", "--doctor", "DOCTOR_MODE", "True", "read all images, report what is wrong and what mends it; status 3 for errors"),
    ("what to do", "--doctor-json", "DOCTOR.JSON", None, "file for the doctor's report as JSON; - is standard output"),
    ("data", "--data-path", "DATA.DATA_PATH", None, "folder with train/ and val/"),
    ("data", "--data-set", "DATA.DATASET", None, "imagenet, folder, lists, zip, tar, huggingface or digits"),
    ("data", "--batch-size", "DATA.BATCH_SIZE", None, "images per process and micro-batch"),
    ("data", "--img-size", "DATA.IMG_SIZE", None, "input size in pixels, or [height,width]"),
    ("data", "--num-workers", "DATA.NUM_WORKERS", None, "loading processes per process"),
    ("weights and runs", "--resume", "MODEL.RESUME", None, "checkpoint to continue, or to judge with --eval"),
    ("weights and runs", "--pretrained", "MODEL.PRETRAINED", None, "weights to start from; the head is replaced when it does not fit"),
    ("weights and runs", "--restart", "TRAIN.AUTO_RESUME", "False", "begin anew in a used run folder; its checkpoints are moved aside"),
    ("weights and runs", "--accept-changes", "TRAIN.ACCEPT_CHANGES", "True", "continue although the recipe differs from the run's"),
    ("weights and runs", "--output", "OUTPUT", None, "folder of all runs"),
    ("weights and runs", "--tag", "TAG", None, "name of this run"),
    ("weights and runs", "--seed", "SEED", None, "seed of everything random"),
    ("training", "--epochs", "TRAIN.EPOCHS", None, "passes over the training images"),
    ("training", "--lr", "TRAIN.BASE_LR", None, "peak learning rate for a global batch of 512"),
    ("training", "--min-lr", "TRAIN.MIN_LR", None, "learning rate at the end"),
    ("training", "--warmup-lr", "TRAIN.WARMUP_LR", None, "learning rate of the first step"),
    ("training", "--warmup-epochs", "TRAIN.WARMUP_EPOCHS", None, "epochs of warm-up"),
    ("training", "--weight-decay", "TRAIN.WEIGHT_DECAY", None, "weight decay"),
    ("training", "--optim", "TRAIN.OPTIMIZER.NAME", None, "adamw, sgd or any timm optimizer"),
    ("training", "--accumulation-steps", "TRAIN.ACCUMULATION_STEPS", None, "micro-batches per optimizer step"),
    ("training", "--use-checkpoint", "TRAIN.USE_CHECKPOINT", "True", "activation checkpointing, to save memory"),
    ("device", "--device", "DEVICE", None, "auto, cpu, cuda, cuda:N or mps"),
    ("device", "--precision", "PRECISION", None, "auto, fp32, bf16 or fp16"),
    ("device", "--disable-amp", "AMP_ENABLE", "False", "compute in fp32"),
]

# The modes, in the order they are looked at; training is what is left. (key that asks for it, module, function). A function takes
# (config, content of --resume's file or None, device, logger) and returns an exit status, or nothing for 0.
MODES: list[tuple[str, str, str]] = [
    ("THROUGHPUT_MODE", "utils.modes", "measure_throughput"),
    ("EVAL_MODE", "utils.modes", "evaluate_run"),
]

# Flags of the Swin and CrossFormer trainers that mean something else here: the key they set, and one line of advice.
OLD_FLAGS: list[tuple[str, str, str | None, str]] = [
    ("--amp-opt-level", "AMP_OPT_LEVEL", None, "--amp-opt-level is apex's; --precision fp32, bf16 or fp16 says the same"),
    ("--zip", "DATA.ZIP_MODE", "True", "--zip reads train.zip and val.zip; archives are recognised without it too"),
    ("--cache-mode", "DATA.CACHE_MODE", None, "--cache-mode has no effect: the system's page cache serves"),
    ("--local-rank", "LOCAL_RANK", None, "--local_rank has no effect: the launcher's environment decides"),
    ("--fused-window-process", "FUSED_WINDOW_PROCESS", "True", "--fused_window_process has no effect: no extra kernel is built"),
    ("--fused-layernorm", "FUSED_LAYERNORM", "True", "--fused_layernorm takes NVIDIA apex's layer norm where apex is installed"),
]


class _Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one sentence, with the nearest flags."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def build_parser() -> argparse.ArgumentParser:
    """The command line; every flag sets a key of the config."""
    parser = _Parser(
        prog="main.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        epilog="keys for --opts and YAML files, with their defaults:\n" + describe_keys() + "\n\nexit status: 0 done, 1 failure, "
               "2 usage or configuration, 3 data or checkpoint unusable,\n4 loss, gradients or weights are no longer finite, "
               "75 stopped by a signal with a checkpoint written\n(the same command continues); torchrun reports 1 for any of them")
    parser.add_argument("--cfg", metavar="FILE", help="YAML file of the config tree; its BASE files are merged first")
    parser.add_argument("--opts", metavar="KEY VALUE", nargs="*", action="extend", help="any keys of the tree, listed below")
    groups: dict[str, Any] = {}
    for title, flag, _, fixed, meaning in FLAGS:
        group = groups.setdefault(title, None) or parser.add_argument_group(title)
        groups[title] = group
        _add_flag(group, flag, fixed, meaning)
    old = parser.add_argument_group("understood from other trainers")
    for flag, _, fixed, advice in OLD_FLAGS:
        _add_flag(old, flag, fixed, advice.partition(" ")[2])
    return parser


def _add_flag(group: Any, flag: str, fixed: str | None, meaning: str) -> None:
    spellings = [flag] if flag.replace("_", "-").count("-") == 2 else [flag, "--" + flag[2:].replace("-", "_")]
    destination = flag[2:].replace("-", "_")
    if fixed in (None, MANY):
        # "+": at least one; repeated flags add up
        several = dict(nargs="+", action="extend") if fixed == MANY else {}
        group.add_argument(*spellings, dest=destination, metavar=destination.upper(), help=meaning, **several)
    else:
        group.add_argument(*spellings, dest=destination, action="store_const", const=fixed, help=meaning)


def parse(argv: Sequence[str] | None = None) -> tuple[str | None, list[str], list[str]]:
    """(YAML file, ``[KEY, VALUE, ...]``, lines of advice) of a command line.

    Raises:
        ConfigError: an unknown flag, with the nearest known ones.
    """
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        word = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
        what = "unknown flag" if word.startswith("-") else "unexpected argument"
        raise ConfigError(f"{what} {word}" + (f"; did you mean {', '.join(near)}?" if near else "; see --help"))
    given = vars(args)
    opts, advice = list(given.get("opts", [])), []
    for _, flag, key, _, _ in FLAGS:
        if (value := given.get(flag[2:].replace("-", "_"))) is not None:
            opts += [key, value]
    for flag, key, _, line in OLD_FLAGS:
        if (value := given.get(flag[2:].replace("-", "_"))) is not None:
            opts += [key, value]
            advice.append(f"notice: {line}")
    return given.get("cfg"), opts, advice


def run(argv: Sequence[str] | None = None) -> int:
    """Read the command line and the config, choose the mode, do it."""
    cfg_file, opts, advice = parse(argv)
    if "DOCTOR_MODE" in opts and "MODEL.RESUME" not in opts:
        config = get_config(cfg_file, opts)
        if config.DOCTOR_MODE:
            return _doctor(config, advice)
    # torch and timm take seconds to import: not before the command line has been understood.
    from utils import distributed
    from utils.device import choose_device, keep_freed_memory
    from utils.logger import create_logger
    from utils.modes import resolve_config

    config, content = resolve_config(cfg_file, opts)
    if config.DOCTOR_MODE:
        return _doctor(config, advice)
    keep_freed_memory()
    device = choose_device(config.DEVICE, distributed.local_rank())
    distributed.init(device, config.DIST_TIMEOUT)
    logger = create_logger(speaks=distributed.is_main())
    for line in advice:
        logger.info(line)
    wanted = (mode for mode in MODES if lookup(config, mode[0]))
    _, module, function = next(wanted, ("", "utils.modes", "train_run"))
    status = getattr(importlib.import_module(module), function)(config, content, device, logger)
    distributed.shutdown()
    return status or 0


def _doctor(config: Any, advice: Sequence[str]) -> int:
    """The one mode that needs neither torch nor a model."""
    from utils.doctor import examine_run
    from utils.logger import create_logger

    logger = create_logger(speaks=True)
    for line in advice:
        logger.info(line)
    return examine_run(config, logger)


def main(argv: Sequence[str] | None = None) -> int:
    """``run``, with every mistake a user can make turned into a sentence and an exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 still shows every line
    try:
        return run(argv)
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except ConfigError as error:
        return _fail(str(error), EXIT_USAGE)
    except KeyboardInterrupt:
        return _fail("stopped by Ctrl-C; what was saved before is intact", EXIT_FAILURE)
    except BrokenPipeError:
        return EXIT_FAILURE
    except Exception as error:
        return _explain(error)


def _explain(error: Exception) -> int:
    import torch

    from data import DataError
    from models.weights import CheckpointError
    from utils import distributed
    from utils.engine import NumericError
    from utils.session import SaveError
    from utils.signals import Stopped

    text = str(error)
    if isinstance(error, (DataError, CheckpointError)):
        # A worker process wraps the sentence into its traceback.
        return _fail(text.rpartition("DataError: ")[2].strip(), EXIT_DATA, everywhere=True)
    if isinstance(error, NumericError):
        return _fail(text, EXIT_NUMBERS)
    if isinstance(error, Stopped):
        return _fail(text, EXIT_STOPPED)
    if isinstance(error, SaveError):
        return _fail(text, EXIT_FAILURE)
    if os.environ.get("WORLD_SIZE", "1") != "1" and isinstance(error, RuntimeError) and any(
            word in text for word in ("gloo", "NCCL", "Connection reset", "Connection closed", "DistBackendError", "Broken pipe")):
        culprit = distributed.blame()
        if culprit:
            return _fail(culprit, EXIT_FAILURE, everywhere=True)
        return EXIT_FAILURE if culprit == "" else _fail("another process of this job stopped; its own message says why", EXIT_FAILURE,
                                                        everywhere=True)
    if isinstance(error, ValueError) and "Expected more than 1 value per channel" in text:
        return _fail("batch norm needs more than one value a channel; raise --batch-size or --img-size", EXIT_USAGE)
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: not enough memory" in text:
        return _fail("out of memory; halve --batch-size and double --accumulation-steps (the recipe stays the same), "
                     "or add --use-checkpoint", EXIT_FAILURE, everywhere=True)
    if isinstance(error, OSError):
        return _fail(f"{error.filename or 'file system'}: {error.strerror or text}; what was saved before is intact",
                     EXIT_FAILURE, everywhere=True)
    if "DataLoader worker" in text and ("exited unexpectedly" in text or "killed by signal" in text):
        return _fail("a data loading process was killed, mostly for lack of memory or of /dev/shm (docker: --shm-size=8g); "
                     "use fewer --num-workers", EXIT_FAILURE, everywhere=True)
    traceback.print_exc()
    return _fail(f"unexpected {type(error).__name__}, please report it with the lines above", EXIT_FAILURE, everywhere=True)


def _fail(sentence: str, status: int, everywhere: bool = False) -> int:
    """Say it once: rank 0, or with its number any rank that may be alone in its trouble."""
    from utils.logger import printable
    rank, local, place = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0"), ""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        place = f" (rank {rank})"
        if status not in (EXIT_USAGE, EXIT_STOPPED) and (distributed := sys.modules.get("utils.distributed")):
            distributed.announce_failure(sentence)
            place = f" ({distributed.place()})"
    if rank == "0" or everywhere or local == "0":
        print(f"error{place if rank != '0' or everywhere else ''}: {printable(sentence)}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    code = main()
    if sys.stdout is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
    if code and threading.active_count() > 1:
        # A save may be under way, which Ctrl-C twice does not wait for; other ranks may be inside a collective, where leaving
        # the group in good order would wait for them.
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(code)
    sys.exit(code)
