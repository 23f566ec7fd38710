"""The report's page: HTML that needs no other file, no network and no colour scheme in particular."""

from __future__ import annotations

import base64
import hashlib
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from utils.evaluation.paired_test import Paired, compare
from utils.evaluation.per_class import PerClass
from utils.evaluation.predictions_file import Outcomes, confused_pairs, confusion, reliability
from utils.evaluation.statistics import accuracy_interval
from utils.reporting.charts import charts, letters, marks
from utils.reporting.html_style import SCRIPT, STYLE
from utils.reporting.run_reader import Run, beside_preset, circumstances, config_differences, facts, shown, source_of
from utils.reporting.svg import COLOURS, confusion_matrix, line_chart, reliability_diagram, shortened, text_of

MOST_CLASSES = 50  # of a confusion matrix that is drawn
MOST_ROWS = 1000  # of the table of classes
MISTAKES = 24


def render(runs: Sequence[Run]) -> str:
    """The page on ``runs``, side by side where they are several."""
    names = letters(runs)
    title = " and ".join(f"{letter} {run.name}".strip() for letter, run in zip(names, runs, strict=True))
    parts = [_head(title), f"<header><h1>{text_of(title)}</h1><p class=soft>Written {time.strftime('%Y-%m-%d %H:%M')}</p></header><main>"]
    parts += [_overview(runs, names), _curves(runs, names)]
    if len(runs) > 1:
        parts += [_comparison(runs, names), _differences(runs, names)]
    for run, letter in zip(runs, names, strict=True):
        parts.append(_of_run(run, letter))
    parts.append(f"</main><script>{SCRIPT}</script></body></html>\n")
    return "\n".join(part for part in parts if part)


def _head(title: str) -> str:
    # Nothing may be loaded from anywhere, and no script may run but the one below, whatever a name holds.
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{text_of(title)}</title>'
            f"<style>{STYLE}</style></head><body>")


def _section(title: str, *parts: str) -> str:
    body = "".join(parts)
    return f"<section><h2>{text_of(title)}</h2>{body}</section>" if body else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], numeric: Sequence[int] = (), sortable: bool = False) -> str:
    """A table of texts; columns ``numeric`` are set right. A cell may be (what to sort by, text)."""
    def cell(place: int, value: Any) -> str:
        key, value = value if isinstance(value, tuple) else (None, value)
        sort = f' data-sort="{key}"' if key is not None else ""
        return f"<td{' class=num' if place in numeric else ''}{sort}>{text_of(value)}</td>"
    lines = ["<tr>" + "".join(cell(place, value) for place, value in enumerate(row)) + "</tr>" for row in rows]
    titles = "".join(f"<th{' class=num' if place in numeric else ''}>{text_of(name)}</th>" for place, name in enumerate(head))
    return (f'<div class=scroll><table{" class=sortable" if sortable else ""}><thead><tr>{titles}</tr></thead>'
            f"<tbody>{''.join(lines)}</tbody></table></div>")


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{text_of(title)}</summary>{body}</details>"


# --------------------------------------------------------------------------------------------------
# What a run came to
# --------------------------------------------------------------------------------------------------

def _overview(runs: Sequence[Run], names: Sequence[str]) -> str:
    if len(runs) == 1:
        tiles = "".join(f"<div class=tile><b>{text_of(value)}</b><span>{text_of(name)}</span></div>"
                        for name, value in facts(runs[0]).items() if (name, value) != ("state", "finished"))
        return f"<section><div class=tiles>{tiles}</div>{_problems(runs[0])}</section>"
    columns = [facts(run) for run in runs]
    rows = [[name, *(column.get(name, "–") for column in columns)] for name in dict.fromkeys(n for c in columns for n in c)]
    heads = [f"{letter} {run.name}" for letter, run in zip(names, runs, strict=True)]
    return _section("Results", _table(["", *heads], rows), *(_problems(run, letter) for run, letter in zip(runs, names, strict=True)))


def _problems(run: Run, letter: str = "") -> str:
    return "".join(f"<p class=soft>{text_of(f'{letter} {problem}'.strip())}</p>" for problem in run.problems)


def _curves(runs: Sequence[Run], names: Sequence[str]) -> str:
    figures = []
    for chart in charts(runs):
        labels = [line for line in chart.lines if line.label]
        legend = "".join(f'<span class="c{line.colour % COLOURS}"><i class="key{" dashed" if line.dashed else ""}"></i>'
                         f"{text_of(line.label)}</span>" for line in labels) if len(chart.lines) > 1 else ""
        figures.append(f"<figure><figcaption><b>{text_of(chart.title)}</b><span class=legend>{legend}</span></figcaption>"
                       f"{line_chart(chart.lines, chart.x_label, chart.y_label, chart.marks)}</figure>")
    happened = [sentence for run, letter in zip(runs, names, strict=True) for _, sentence in marks(run, letter)]
    told = "; ".join(happened[:12]) + (" …" if len(happened) > 12 else "")
    note = f"<p class=soft>Upright dashed lines: {text_of(told)}.</p>" if happened else ""
    return _section("Curves", f"<div class=charts>{''.join(figures)}</div>{note}") if figures else ""


# --------------------------------------------------------------------------------------------------
# Runs beside each other
# --------------------------------------------------------------------------------------------------

def _comparison(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Each run against the first, on the same images."""
    parts = []
    for run, letter in list(zip(runs, names, strict=True))[1:]:
        if runs[0].predictions is None or run.predictions is None:
            parts.append(f"<p class=soft>{text_of(names[0])} and {text_of(letter)} cannot be compared image by image: one has no "
                         "predictions.npz.</p>")
        elif (paired := compare(runs[0].predictions, run.predictions)) is None:
            parts.append(f"<p class=soft>{text_of(names[0])} and {text_of(letter)} were judged on different images.</p>")
        else:
            parts.append(_paired(paired, names[0], letter) + _class_changes(runs[0].predictions, run.predictions, names[0], letter))
    return _section("Same images, paired", *parts)


def _paired(paired: Paired, a: str, b: str) -> str:
    difference = 100 * (paired.accuracies[1] - paired.accuracies[0])
    low, high = (100 * bound for bound in paired.interval)
    verdict = ("no difference that could not be chance" if paired.p >= 0.05 else f"{b if difference > 0 else a} is better, beyond chance")
    rows = [[f"top-1 of {a}, {b}", f"{100 * paired.accuracies[0]:.2f} %, {100 * paired.accuracies[1]:.2f} %"],
            [f"{b} minus {a}", f"{difference:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f} (bootstrap)"],
            [f"right in {a} alone, in {b} alone", f"{paired.only_first}, {paired.only_second}"],
            ["McNemar's exact test", f"p = {paired.p:.3g}: {verdict} (at 5 %)"]]
    return f"<h3>{text_of(f'{a} and {b}')} on {paired.images:,} images</h3>" + _table(["", ""], rows)


def _class_changes(first: Outcomes, second: Outcomes, a: str, b: str) -> str:
    recalls = [dict(zip(p.classes, _figures(p).recall.tolist(), strict=True)) for p in (first, second)]
    changes = [(recalls[1].get(name, math.nan) - recall, name) for name, recall in recalls[0].items()]
    rows = [(change, name) for change, name in changes if not math.isnan(change)]
    rows.sort(key=lambda row: (-abs(row[0]), row[1]))
    table = _table(["class", f"{a} (%)", f"{b} (%)", "difference"],
                   [[name, _percent(recalls[0][name]), _percent(recalls[1][name]), (change, f"{100 * change:+.1f}")]
                    for change, name in rows[:MOST_ROWS]], numeric=(1, 2, 3), sortable=True)
    return _folded("Accuracy of each class, the greatest changes first", table)


def _differences(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Where configs, versions and data are not alike."""
    rows = [[key, *map(shown, values)] for key, values in config_differences([run.config for run in runs])]
    rows += [[name, *values] for name, values in circumstances(runs) if any(value != values[0] for value in values)]
    return _section("Differences in config, versions and data",
                    _table(["", *names], rows) if rows else "<p class=soft>None.</p>")


# --------------------------------------------------------------------------------------------------
# One run in depth
# --------------------------------------------------------------------------------------------------

def _percent(share: float) -> tuple[float, str]:
    return (-1.0, "–") if math.isnan(share) else (round(share, 6), f"{100 * share:.1f}")


def _of_run(run: Run, letter: str) -> str:
    lead = f"{letter}: " if letter else ""
    parts = []
    if run.predictions is not None and len(run.predictions.target):
        parts += [_classes(run.predictions, lead), _mistakes(run.predictions, lead)]
    return "".join([*parts, _config(run, lead), _environment(run, lead)])


def _figures(predictions: Outcomes) -> PerClass:
    return PerClass.of(predictions.target, predictions.predicted, len(predictions.classes))


def _classes(predictions: Outcomes, lead: str) -> str:
    cells, classes = confusion(predictions), predictions.classes
    low, high = (100 * bound for bound in accuracy_interval(int(predictions.right.sum()), len(predictions.right)))
    figures = _figures(predictions)
    recall, precision = figures.recall, np.where(figures.answered > 0, figures.precision, np.nan)
    worst = sorted(figures.worst(len(classes)), key=lambda i: (recall[i], -figures.images[i]))
    table = _table(["class", "images", "recognised (%)", "right when named (%)", "mostly taken for"],
                   [[classes[i], (figures.images[i], f"{figures.images[i]:,}"), _percent(recall[i]), _percent(precision[i]),
                     f"{classes[figures.mistaken[i]]} ({figures.times[i]})" if figures.times[i] else ""] for i in worst[:MOST_ROWS]],
                   numeric=(1, 2, 3), sortable=True)
    cut = f"<p class=soft>The {MOST_ROWS:,} worst of {len(worst):,} classes.</p>" if len(worst) > MOST_ROWS else ""
    pairs = [[classes[a], classes[b], (times, f"{times:,}"), _percent(times / figures.images[a])] for a, b, times in confused_pairs(cells)]
    pair_table = _table(["true", "taken for", "times", "of the class (%)"], pairs, numeric=(2, 3), sortable=True)
    bins, error = reliability(predictions)
    wide = " class=row" if len(classes) > 12 else ""
    matrix = (f"<figure{wide}><figcaption><b>Confusion: true classes in rows, predictions in columns</b></figcaption>"
              f"<div class=wide>{confusion_matrix(cells, classes)}</div></figure>" if len(classes) <= MOST_CLASSES else "")
    summary = (f"<p>{100 * predictions.right.mean():.2f} % of {len(predictions.target):,} images of the last evaluation are recognised "
               f"(95 % interval {low:.2f} to {high:.2f}, bootstrap).</p>")
    diagram = (f"<figure><figcaption><b>Reliability: expected calibration error {100 * error:.2f} %</b></figcaption>"
               f"{reliability_diagram(bins)}<p class=soft>Bars: share right among images of that confidence, darker where there are many; "
               "short lines: their mean confidence; equal on the dashed diagonal.</p></figure>")
    confused = f"<div><b>Most confused pairs</b>{pair_table}</div>" if pairs else "<p>No image was mistaken.</p>"
    return (_section(f"{lead}Classes", summary, f'<div class="tall">{table}</div>', cut)
            + _section(f"{lead}Confusion and confidence", f"<div class=charts>{matrix}{diagram}{confused}</div>"))


def _mistakes(predictions: Outcomes, lead: str) -> str:
    cards = []
    for position in predictions.worst(MISTAKES):
        true, taken = (predictions.classes[column[position]] for column in (predictions.target, predictions.predicted))
        blob = predictions.thumbnails.get(position)
        picture = (f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(blob).decode()}">' if blob
                   else "<div class=blank>not kept</div>")
        cards.append(f'<figure class=card title="{text_of(predictions.paths[position])}">{picture}<figcaption>'
                     f"<b>{text_of(shortened(true, 40))}</b><span>taken for {text_of(shortened(taken, 40))}</span>"
                     f"<span class=soft>{100 * predictions.probability[position]:.1f} % sure, "
                     f"{100 * predictions.correct_probability[position]:.1f} % for the right one</span>"
                     f"<span class=path>{text_of(predictions.paths[position])}</span></figcaption></figure>")
    return _section(f"{lead}Most confident mistakes", f"<div class=cards>{''.join(cards)}</div>") if cards else ""


def _config(run: Run, lead: str) -> str:
    if not run.config:
        return ""
    changed = beside_preset(run)
    told = (_table(["key", "preset", "this run", "source"], [[key, shown(a), shown(b), source] for key, a, b, source in changed])
            if changed else "<p class=soft>As the preset says.</p>" if run.sources else "<p class=soft>Sources were not recorded.</p>")
    rows = [[key, shown(value), source_of(run, key)] for key, value in run.config.items()]
    rows.sort(key=lambda row: row[2] == "default")
    return _section(f"{lead}Config", "<h3>Beside its preset</h3>", told,
                    _folded(f"All {len(rows)} values with their sources", _table(["key", "value", "source"], rows)))


def _environment(run: Run, lead: str) -> str:
    if not run.starts:
        return ""
    table = _table(["", ""], [[name, values[0]] for name, values in circumstances([run])])
    rows = []
    for event in run.events:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(event["time"])) if isinstance(event.get("time"), (int, float)) else ""
        detail = {"start": " ".join(map(str, event.get("flags") or [])), "rollback": f"to step {event.get('to', '?')}"}
        rows.append([when, event.get("event", "?"), event["step"], detail.get(event.get("event"), event.get("reason", ""))])
    history = _table(["time (UTC)", "event", "step", "flags, reason"], rows, numeric=(2,))
    return _section(f"{lead}Environment", table, "<h3>History</h3>", history)


