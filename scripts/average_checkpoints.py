"""Average the weights of several checkpoints of this program into one ("model soup"), and evaluate it.

    python scripts/average_checkpoints.py average.pth run_a/best.pth run_b/best.pth run_c/best.pth
    python scripts/average_checkpoints.py average.pth output/crossformer_tiny/default     # all that are kept in a run's folder

The files are of one model, one list of classes and one way to prepare images. Where a run kept an average of its weights, that is what
counts (--weights raw takes the others). The result is a checkpoint without training state: --eval, --predict and --export take it by
--resume, and training by --pretrained. Wortsman et al., "Model soups" (ICML 2022).
"""

from __future__ import annotations

import argparse
import glob
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def run(arguments: argparse.Namespace) -> int:
    """Write the average, then evaluate it; the exit status."""
    import main
    from config import ConfigError
    from utils.checkpoints.average import averaged
    from utils.checkpoints.file_format import write_checkpoint
    from utils.runtime.files import require_place

    files = files_of(arguments.checkpoints)
    if len(files) < 2:
        raise ConfigError(f"{len(files)} checkpoint{'s' * (len(files) != 1)} found in {', '.join(arguments.checkpoints)}; two or more are "
                          "averaged")
    if any(os.path.realpath(arguments.target) == os.path.realpath(file) for file in files):
        raise ConfigError(f"{arguments.target}: is one of the checkpoints that are averaged; give another name")
    require_place(arguments.target)
    content = averaged(files, arguments.weights)
    write_checkpoint(arguments.target, content)
    print(f"wrote {arguments.target}: the average of {len(files)} checkpoints ({', '.join(files)})", flush=True)
    if arguments.no_eval:
        return 0
    data = ["--data-path", arguments.data_path] if arguments.data_path else []
    return main.main(["--eval", "--resume", arguments.target, *data])


def files_of(paths: Sequence[str]) -> list[str]:
    """The files of ``paths``, a folder of a run standing for the checkpoints in it, each once."""
    found: list[str] = []
    for path in map(os.path.expanduser, paths):
        found += sorted(glob.glob(os.path.join(glob.escape(path), "ckpt_*.pth"))) if os.path.isdir(path) else [path]
    return list({os.path.realpath(path): path for path in found}.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="file to write")
    parser.add_argument("checkpoints", nargs="+", help="checkpoints, or folders of runs")
    parser.add_argument("--weights", choices=("auto", "raw", "ema"), default="auto", help="auto: a run's own average where it kept one")
    parser.add_argument("--data-path", help="data to evaluate on, where they are not the first checkpoint's")
    parser.add_argument("--no-eval", action="store_true", help="write only")
    from utils.cli.errors import exit_status
    return exit_status(lambda: run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
