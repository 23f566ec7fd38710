"""Train, evaluate and ship hierarchical vision transformers: one process or many, CPU or GPU.

    python main.py --cfg configs/quickstart.yaml
        a small model on handwritten digits, two minutes on two CPU cores; the same command again continues a run that was stopped
    torchrun --nproc_per_node 8 main.py --cfg configs/crossformer_t.yaml --data-path imagenet
        train on eight GPUs; on one GPU or a CPU: python main.py ... --fit; what it will take: --plan
    python main.py --resume output/crossformer_tiny/default/last.pth --epochs 400
        go on from a checkpoint, which holds its recipe; any key can be changed: --opts TRAIN.BASE_LR 1e-4 AUG.MIXUP 0
    python main.py --eval --resume output/crossformer_tiny/default/best.pth
        evaluate a checkpoint; nothing else is needed
    python main.py --predict cat.jpg photos/ --resume output/crossformer_tiny/default/best.pth
        name what is in images; --export model.onnx ships the model
"""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from os.path import dirname, realpath
    if (folder := dirname(realpath(__file__))) not in sys.path:  # PYTHONSAFEPATH, python -P and -I leave it out
        sys.path.insert(0, folder)
    from utils.runtime import early_signals
    early_signals.hold()  # before the imports, which take a while

import contextlib
import gc
import importlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator, Sequence

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # which PYTHONSAFEPATH leaves out

from config import TRAINING_TAKES_LESS, command_of, get_config, takes_standard_output
from utils.cli.errors import exit_status
from utils.cli.parser import asks_for_light_command, parse
from utils.cli.suggestions import require_config_file
from utils.loggers.console import create_logger, tell
from utils.runtime import launcher


def run(argv: Sequence[str] | None = None) -> int:
    """Read the command line and the config, choose the command, run it; its exit status."""
    cfg_file, opts, advice = parse(argv, __doc__)
    if cfg_file:
        require_config_file(cfg_file)
    command = None
    if asks_for_light_command(opts):
        config, content = get_config(cfg_file, opts), None
        command = None if config.MODEL.RESUME else command_of(config)
    with _uncollected():
        if command is None:
            # torch and timm take seconds to import: not before the command line has been understood.
            from utils.commands.resolve_config import resolve_config
            config, content = resolve_config(cfg_file, opts)
            command = command_of(config)
        module, _, function = (command.run if command is not None else "train.train_run").partition(".")
        work = getattr(importlib.import_module(f"utils.commands.{module}"), function)
    if __name__ == "__main__":
        early_signals.release()  # after torch's imports too: some libraries catch what Ctrl-C raises, and go on in pieces
    if command is not None and command.light:
        if launcher.rank() != 0:
            return 0  # one process of a job is enough
        logger = create_logger(True, takes_standard_output(config, command))
        tell(logger, advice)
        return work(config, logger) or 0
    from utils.runtime import distributed
    from utils.runtime.device import choose_device, keep_freed_memory
    from utils.runtime.memory import out_of_memory
    from utils.runtime.stop_signals import exit_from_within

    keep_freed_memory()
    device = choose_device(config.DEVICE, launcher.local_rank())
    distributed.init(device, config.DIST_TIMEOUT)
    logger = create_logger(distributed.is_main(), takes_standard_output(config, command))
    tell(logger, advice)
    try:
        with exit_from_within():
            status = work(config, content, device, logger)
    except (RuntimeError, MemoryError, OSError) as error:
        if (told := out_of_memory(error, TRAINING_TAKES_LESS if command is None else command.takes_less)) is not None:
            raise told from None
        raise
    distributed.shutdown()
    return status or 0


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Imports without the garbage collector, which would look at the modules' objects, a million of them and none garbage, again
    and again: a fifth of the time."""
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def main(argv: Sequence[str] | None = None) -> int:
    """``run``, with every mistake a user can make turned into a sentence and an exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 still shows every line
    return exit_status(lambda: run(argv))


if __name__ == "__main__":
    code = main()
    early_signals.hold()
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
