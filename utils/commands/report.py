"""``--report``: a run, or several side by side, as one HTML file that needs nothing else, and plots as PNG. Imports no torch."""

from __future__ import annotations

import logging
import os

from yacs.config import CfgNode

from data.messages import Caution
from utils.commands.outputs import check_outputs
from utils.evaluation.predictions_file import FILE
from utils.loggers.console import tell
from utils.reporting.repeats import repeats
from utils.reporting.run_reader import read_run
from utils.reporting.write import report_path, write_plots, write_report


def report_runs(config: CfgNode, logger: logging.Logger) -> int:
    """Report on the runs of REPORT.RUNS; the exit status.

    Raises:
        ConfigError: no such run, or the report cannot be written.
    """
    runs = [read_run(folder) for folder in config.REPORT.RUNS]
    path = os.path.expanduser(config.REPORT.FILE) or report_path(runs)
    check_outputs(config, [("REPORT.FILE", path)], inputs=[os.path.join(run.folder, FILE) for run in runs])
    write_report(runs, path)
    logger.info(f"report {path}")
    tell(logger, [write_plots(runs, os.path.dirname(path) or ".")])
    for group in repeats(runs):
        tell(logger, [Caution(f"{group.title}: {problem}") for problem in group.problems])
        for figure in group.figures:
            logger.info(f"{group.title}, {figure.line()}")
    return 0
