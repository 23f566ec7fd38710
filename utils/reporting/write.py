"""Writes report.html and plots/*.png of a run. matplotlib and jinja2 are imported when that is asked for: training imports this module."""

from __future__ import annotations

import os
from collections.abc import Sequence

from config import ConfigError
from data.messages import Caution
from utils.evaluation.dense_predictions_file import DenseFile
from utils.evaluation.predictions_file import PredictionsFile
from utils.reporting.run_reader import Run
from utils.runtime.files import replace_file

REPORT, COMPARISON = "report.html", "comparison.html"


def report_path(runs: Sequence[Run]) -> str:
    """Where the report on ``runs`` goes by default: the first one's folder."""
    return os.path.join(runs[0].folder, REPORT if len(runs) == 1 else COMPARISON)


def write_report(runs: Sequence[Run], path: str = "") -> str:
    """Write the report on ``runs``; its path, by default ``report_path``.

    Raises:
        ConfigError: the report cannot be written.
    """
    from utils.reporting.html_page import render
    path = path or report_path(runs)
    try:
        replace_file(path, render(runs).encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise ConfigError(f"{path}: the report cannot be written ({error.strerror}); choose another place with --opts "
                          "REPORT.FILE") from None
    return path


def write_plots(runs: Sequence[Run], beside: str) -> str:
    """The charts of ``runs``, and of a single one's predictions, as PNG files in a folder of the folder ``beside``; a line that says so."""
    from utils.reporting import dense_plots, plots
    folder = os.path.join(beside, "plots" if len(runs) == 1 else "comparison-plots")
    predictions, drawn = runs[0].predictions if len(runs) == 1 else None, plots.curves(runs)
    if isinstance(predictions, PredictionsFile) and len(predictions.target):
        drawn += plots.of_predictions(predictions)
    elif isinstance(predictions, DenseFile) and predictions.paths:
        drawn += dense_plots.of_dense(predictions)
    try:
        os.makedirs(folder, exist_ok=True)
        names = [plot.png(folder) for plot in drawn]
    except OSError as error:
        return Caution(f"{folder}: plots cannot be written ({error.strerror})")
    return f"plots {folder}: {', '.join(names) or 'none, there are no figures'}"
