"""``--report``: a run, or several side by side, as one HTML file that needs nothing else, and plots as PNG. Imports no torch."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from yacs.config import CfgNode

from config import ConfigError
from utils.files import replace_file
from utils.report_page import render
from utils.runs import Run, read_run

REPORT, COMPARISON = "report.html", "comparison.html"


def report_runs(config: CfgNode, logger: logging.Logger) -> int:
    """Report on the runs of REPORT.RUNS; the exit status.

    Raises:
        ConfigError: no such run, or the report cannot be written.
    """
    if os.environ.get("RANK", "0") != "0":
        return 0  # one process of a job is enough
    runs = [read_run(folder) for folder in config.REPORT.RUNS]
    path = write_report(runs, os.path.expanduser(config.REPORT.FILE))
    logger.info(f"report {path}")
    logger.info(write_plots(runs, os.path.dirname(path) or "."))
    return 0


def write_report(runs: Sequence[Run], path: str = "") -> str:
    """Write the report on ``runs``; its path, by default in the first one's folder.

    Raises:
        ConfigError: the report cannot be written.
    """
    path = path or os.path.join(runs[0].folder, REPORT if len(runs) == 1 else COMPARISON)
    try:
        replace_file(path, render(runs).encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise ConfigError(f"{path}: the report cannot be written ({error.strerror}); choose another place with --opts "
                          "REPORT.FILE") from None
    return path


def write_plots(runs: Sequence[Run], beside: str) -> str:
    """The curves of ``runs`` as PNG files in a folder of the folder ``beside``, where matplotlib is installed; a line that says so."""
    try:
        from utils.plots import plot
    except ImportError as error:
        return f"notice: no plots as PNG, the report has its own ({error.name or 'matplotlib'} is not installed)"
    folder = os.path.join(beside, "plots" if len(runs) == 1 else "comparison-plots")
    try:
        os.makedirs(folder, exist_ok=True)
        names = plot(runs, folder)
    except OSError as error:
        return f"warning: {folder}: plots cannot be written ({error.strerror})"
    return f"plots {folder}: {', '.join(names) or 'none, there are no figures'}"
