"""The report's page: gathers what ``templates/report.html.j2`` shows. The HTML needs no other file, no network, no color scheme in
particular."""

from __future__ import annotations

import base64
import hashlib
import math
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from utils.evaluation.dense_predictions_file import DenseFile
from utils.evaluation.label_predictions_file import LabelPredictionsFile
from utils.evaluation.paired_test import Paired, compare
from utils.evaluation.per_class import PerClass
from utils.evaluation.predictions_file import PredictionsFile, confused_pairs, confusion
from utils.evaluation.statistics import accuracy_interval
from utils.loggers.console import printable
from utils.reporting import dense_plots, dense_sections, plots
from utils.reporting.charts import letters, marks
from utils.reporting.repeats import Repeats, repeats
from utils.reporting.run_reader import Run, beside_preset, circumstances, config_differences, fact_names, facts, shown, source_of
from utils.reporting.tables import MOST_ROWS, Table, percent

MISTAKES = 24
# Whatever a name holds neither steers a terminal nor, escaped, a browser.
_TEMPLATES = Environment(loader=FileSystemLoader(os.path.join(os.path.dirname(__file__), "templates")), autoescape=True,
                         undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, cache_size=8,
                         finalize=lambda value: value if isinstance(value, Markup) else printable(str(value)))


def render(runs: Sequence[Run]) -> str:
    """The page on ``runs``, side by side where they are several."""
    names = letters(runs)
    pairs = list(zip(names, runs, strict=True))
    script = _TEMPLATES.loader.get_source(_TEMPLATES, "sort_tables.js")[0]
    # Nothing may be loaded from anywhere, and no script may run but this one.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _TEMPLATES.get_template("report.html.j2").render(
        title=" and ".join(f"{letter} {run.name}".strip() for letter, run in pairs),
        written=time.strftime("%Y-%m-%d %H:%M"),
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        script=script,
        tiles={name: value for name, value in facts(runs[0], brief=True).items() if (name, value) != ("state", "finished")},
        results=_results(runs, names) if len(runs) > 1 else None,
        repeats=[dict(title=group.title, problems=group.problems, figures=_repeated(group)) for group in repeats(runs)],
        problems=[f"{letter} {problem}".strip() for letter, run in pairs for problem in run.problems],
        curves=[_placed(plot) for plot in plots.curves(runs)],
        happened=[sentence for letter, run in pairs for _, sentence in marks(run, letter)],
        comparisons=[_comparison(runs[0], run, names[0], letter) for letter, run in pairs[1:]],
        differences=_differences(runs, names),
        runs=[_of_run(run, f"{letter}: " if letter else "") for letter, run in pairs])


def _placed(plot: plots.Plot, wide: bool = False) -> dict[str, Any]:
    return dict(svg=plot.svg(), caption=plot.caption, note=plot.note, scales=plot.scales, wide=wide)


def _results(runs: Sequence[Run], names: Sequence[str]) -> Table:
    columns = [facts(run) for run in runs]
    rows = [[name, *(column.get(name, "–") for column in columns)] for name in fact_names(columns)]
    return Table(["", *(f"{letter} {run.name}" for letter, run in zip(names, runs, strict=True))], rows)


# --------------------------------------------------------------------------------------------------
# Runs beside each other
# --------------------------------------------------------------------------------------------------

def _repeated(group: Repeats) -> Table:
    return Table(["", "mean", "standard deviation", "lowest", "highest"],
                 [[figure.name, *(figure.metric.shown(value) for value in (figure.mean, figure.spread, min(figure.values),
                                                                           max(figure.values)))] for figure in group.figures],
                 numeric=(1, 2, 3, 4))


def _comparison(first: Run, second: Run, a: str, b: str) -> dict[str, Any]:
    """The two on the same images; a ``problem`` where that cannot be."""
    kinds = {type(run.predictions) for run in (first, second)} - {type(None)}
    if len(kinds) > 1:
        return dict(problem=f"{a} and {b} are of different tasks, and are not compared image by image.")
    if any(isinstance(run.predictions, LabelPredictionsFile) for run in (first, second)):
        return dict(problem=f"{a} and {b} are not compared image by image, where each has several labels.")
    if first.predictions is None or second.predictions is None:
        return dict(problem=f"{a} and {b} cannot be compared image by image: one has no predictions.npz.")
    if isinstance(first.predictions, DenseFile):
        return dense_sections.comparison(first.predictions, second.predictions, a, b)
    paired = compare(first.predictions, second.predictions)
    if paired is None:
        return dict(problem=f"{a} and {b} were evaluated on different images.")
    return dict(problem="", title=f"{a} and {b} on {paired.images:,} images", figures=_paired(paired, a, b),
                of_classes="Accuracy of each class",
                classes=_class_changes(first.predictions, second.predictions, a, b))


def _paired(paired: Paired, a: str, b: str) -> Table:
    difference = 100 * (paired.accuracies[1] - paired.accuracies[0])
    low, high = (100 * bound for bound in paired.interval)
    verdict = "no significant difference" if paired.p >= 0.05 else f"{b if difference > 0 else a} is significantly better"
    return Table(["", ""], [
        [f"top-1 of {a}, {b}", f"{100 * paired.accuracies[0]:.2f} %, {100 * paired.accuracies[1]:.2f} %"],
        [f"{b} minus {a}", f"{difference:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f} (bootstrap)"],
        [f"correct in {a} alone, in {b} alone", f"{paired.only_first}, {paired.only_second}"],
        ["McNemar's exact test", f"p = {paired.p:.3g}: {verdict} (at 5 %)"]])


def _class_changes(first: PredictionsFile, second: PredictionsFile, a: str, b: str) -> Table:
    recalls = [dict(zip(p.classes, _figures(p).recall.tolist(), strict=True)) for p in (first, second)]
    changes = [(recalls[1].get(name, math.nan) - recall, name) for name, recall in recalls[0].items()]
    rows = [(change, name) for change, name in changes if not math.isnan(change)]
    rows.sort(key=lambda row: (-abs(row[0]), row[1]))
    return Table(["class", f"{a} (%)", f"{b} (%)", "difference"],
                 [[name, percent(recalls[0][name]), percent(recalls[1][name]), (change, f"{100 * change:+.1f}")]
                  for change, name in rows[:MOST_ROWS]], numeric=(1, 2, 3), sortable=True)


def _differences(runs: Sequence[Run], names: Sequence[str]) -> Table:
    """Where configs, versions and data are not alike."""
    rows = [[key, *map(shown, values)] for key, values in config_differences([run.config for run in runs])]
    rows += [[name, *values] for name, values in circumstances(runs) if any(value != values[0] for value in values)]
    return Table(["", *names], rows)


# --------------------------------------------------------------------------------------------------
# One run in depth
# --------------------------------------------------------------------------------------------------

def _of_run(run: Run, lead: str) -> dict[str, Any]:
    dense = run.predictions if isinstance(run.predictions, DenseFile) and run.predictions.paths else None
    some = run.predictions is not None and not isinstance(run.predictions, DenseFile) and len(run.predictions.target) > 0
    classes, mistakes = (_labels, _label_mistakes) if isinstance(run.predictions, LabelPredictionsFile) else (_classes, _mistakes)
    config = [[key, shown(value), source_of(run, key)] for key, value in run.config.items()]
    config.sort(key=lambda row: row[2] == "default")
    changed = [[key, shown(preset), shown(value), source] for key, preset, value, source in beside_preset(run)]
    return dict(
        lead=lead, sources=bool(run.sources),
        classes=classes(run.predictions) if some else None,
        mistakes=mistakes(run.predictions) if some else [],
        dense=dense_sections.sections(dense) if dense else [],
        plots=[_placed(plot, wide=not plot.scales and len(dense.classes) > 12) for plot in dense_plots.of_dense(dense)] if dense else [],
        worst=dense_sections.worst(dense) if dense else None,
        changed=Table(["key", "preset", "this run", "source"], changed),
        config=Table(["key", "value", "source"], config) if config else None,
        environment=Table(["", ""], [[name, values[0]] for name, values in circumstances([run])]) if run.starts else None,
        history=_history(run))


def _figures(predictions: PredictionsFile) -> PerClass:
    return PerClass.of(predictions.target, predictions.predicted, len(predictions.classes))


def _classes(predictions: PredictionsFile) -> dict[str, Any]:
    classes, figures = predictions.classes, _figures(predictions)
    low, high = (100 * bound for bound in accuracy_interval(int(predictions.right.sum()), len(predictions.right)))
    recall, precision = figures.recall, np.where(figures.answered > 0, figures.precision, np.nan)
    worst = sorted(figures.worst(len(classes)), key=lambda i: (recall[i], -figures.images[i]))
    rows = [[classes[i], (figures.images[i], f"{figures.images[i]:,}"), percent(recall[i]), percent(precision[i]),
             f"{classes[figures.mistaken[i]]} ({figures.times[i]})" if figures.times[i] else ""] for i in worst[:MOST_ROWS]]
    pairs = [[classes[a], classes[b], (times, f"{times:,}"), percent(times / figures.images[a])]
             for a, b, times in confused_pairs(confusion(predictions))]
    return dict(
        summary=f"Accuracy {100 * predictions.right.mean():.2f} % on {len(predictions.target):,} images of the last evaluation "
                f"(95 % interval {low:.2f} to {high:.2f}, Wilson's).",
        table=Table(["class", "images", "recall (%)", "precision (%)", "mostly confused with"], rows, numeric=(1, 2, 3), sortable=True),
        cut=f"The {MOST_ROWS:,} worst of {len(worst):,} classes." if len(worst) > MOST_ROWS else "",
        pairs=Table(["true", "confused with", "times", "of the class (%)"], pairs, numeric=(2, 3), sortable=True),
        plots=[_placed(plot, wide=not plot.scales and len(classes) > 12) for plot in plots.of_predictions(predictions)])


def _labels(predictions: LabelPredictionsFile) -> dict[str, Any]:
    """As ``_classes``, of several labels an image."""
    classes, figures = predictions.classes, predictions.figures()
    precision, recall, f1 = figures.precision, figures.recall, figures.f1
    rows = [[classes[i], (figures.images[i], f"{figures.images[i]:,}"), percent(figures.precision_area[i]), percent(precision[i]),
             percent(recall[i]), percent(f1[i]), f"{figures.thresholds[i]:.3f}"] for i in figures.worst()]
    return dict(
        summary=f"mAP {100 * figures.mean_average_precision():.2f} %, macro F1 {100 * figures.macro_f1():.2f} %, micro F1 "
                f"{100 * figures.micro_f1():.2f} % on {len(predictions.target):,} images of the last evaluation; "
                f"{100 * predictions.right.mean():.2f} % of them have all their labels right.",
        table=Table(["label", "images", "average precision (%)", "precision (%)", "recall (%)", "F1 (%)", "threshold"], rows[:MOST_ROWS],
                    numeric=(1, 2, 3, 4, 5, 6), sortable=True),
        cut=f"The {MOST_ROWS:,} worst of {len(rows):,} labels." if len(rows) > MOST_ROWS else "", pairs=None, plots=[])


def _label_mistakes(predictions: LabelPredictionsFile) -> list[dict[str, str]]:
    def named(which: np.ndarray) -> str:
        return plots.shortened(", ".join(predictions.classes[i] for i in np.flatnonzero(which)) or "none", 80)

    cards = []
    for position in predictions.worst(MISTAKES):
        has, given, known = predictions.target[position] == 1, predictions.given[position], predictions.target[position] >= 0
        cards.append(dict(path=predictions.paths[position], true=named(has), predicted="",
                          picture=base64.b64encode(predictions.thumbnails.get(position, b"")).decode(),
                          confidence=f"missed: {named(has & ~given)}; wrongly given: {named(given & ~has & known)}"))
    return cards


def _mistakes(predictions: PredictionsFile) -> list[dict[str, str]]:
    return [dict(path=predictions.paths[position], picture=base64.b64encode(predictions.thumbnails.get(position, b"")).decode(),
                 true=plots.shortened(predictions.classes[predictions.target[position]], 40),
                 predicted=plots.shortened(predictions.classes[predictions.predicted[position]], 40),
                 confidence=f"confidence {100 * predictions.probability[position]:.1f} %, in the true class "
                            f"{100 * predictions.correct_probability[position]:.1f} %")
            for position in predictions.worst(MISTAKES)]


def _history(run: Run) -> Table:
    rows = []
    for event in run.events:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(event["time"])) if isinstance(event.get("time"), (int, float)) else ""
        what = str(event.get("event", "?"))
        detail = {"start": " ".join(map(str, event.get("flags") or [])), "rollback": f"to step {event.get('to', '?')}"}
        rows.append([when, what, event["step"], detail.get(what, str(event.get("reason", "")))])
    return Table(["time (UTC)", "event", "step", "flags, reason"], rows, numeric=(2,))
