"""The doctor's report as text for a terminal of any width; names of files and classes are harmless in it."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator

import numpy as np

from data.doctor.diagnose import Diagnosis
from data.doctor.finding import Finding
from data.doctor.survey import Survey
from utils.loggers.console import plain

_INDENT = " " * 9
_SHOWN = 3  # items of a finding
_ALL_CLASSES, _SOME_CLASSES, _BINS = 16, 4, 6


def shortened(text: str, width: int, keep_end: bool = False) -> str:
    """``text`` in at most ``width`` characters, three dots standing for what is left out."""
    if len(text) <= width:
        return text
    return "..." + text[len(text) - width + 3:] if keep_end else text[:width - 3] + "..."


class FindingLine(str):
    """The first line of a finding, which knows how grave it is."""

    severity: str


def render(diagnosis: Diagnosis, mends: dict[str, str], folder: str, width: int) -> Iterator[str]:
    """The lines of the report.

    Args:
        mends: the command of each finding's script, by the finding's code.
        folder: where the report, the manifests and the scripts lie.
        width: columns; below 60 counts as 60.
    """
    width = max(60, min(width, 120))
    survey = diagnosis.survey
    yield from _splits(diagnosis, width)
    yield from _classes(survey, width)
    yield from _sizes(diagnosis)
    yield from _speed(diagnosis, width)
    yield ""
    counts = diagnosis.facts["counts"]
    told = ", ".join(f"{n} {word}{'s' * (n != 1)}" for word, n in counts.items() if n)
    yield f"Findings: {told or 'none, the data is clean'}"
    for finding in diagnosis.found:
        yield ""
        yield from _finding(finding, mends.get(finding.code), survey, width)
    yield ""
    yield f"Report, manifests{' and scripts' if mends else ''}: {plain(folder)}"


def _splits(diagnosis: Diagnosis, width: int) -> Iterator[str]:
    yield f"Data: {plain(diagnosis.survey.root)}"
    for name in ("train", "val"):
        facts = diagnosis.facts["splits"].get(name)
        if facts is None:
            yield f"  {name:6} none"
            continue
        kinds = "; ".join(", ".join(f"{kind} {count:,}" for kind, count in facts[what].items())
                          for what in ("formats", "modes") if facts[what])
        text = (f"{facts['layout']}: {facts['images']:,} images, {facts['classes']:,} classes, {_size(facts['bytes'])}, "
                f"{facts['images'] - facts['readable']:,} unreadable" + (f" ({kinds})" if kinds else ""))
        yield from _wrapped(text, f"  {name:6} ", " " * 9, width)


def _classes(survey: Survey, width: int) -> Iterator[str]:
    """A bar for each class where they are few; the largest, the smallest, and a histogram of their sizes where they are many."""
    split = next(iter(survey.splits), None)
    if split is None:
        return
    counts, val = survey.counts(split), survey.counts("val")
    beside = split == "train" and "val" in survey.splits
    order = np.argsort(-counts, kind="stable")
    room = max(8, min(32, max(len(plain(name)) for name in survey.classes[:1000]), width // 3))
    digits = len(f"{counts.max():,}")
    widest = width - room - 2 * digits - 12

    def bar(count: int, most: int) -> str:
        return "#" * max(int(count > 0), round(widest * count / max(1, most)))

    def line(number: int) -> str:
        name = shortened(plain(survey.classes[number]), room)
        numbers = f"{counts[number]:>{digits},}" + (f" {val[number]:>{digits},}" if beside else "")
        return f"  {name:{room}} {numbers} {bar(counts[number], counts.max())}".rstrip()

    yield ""
    yield f"Classes: {len(counts):,}, images of {split}{' and val' if beside else ''} in each"
    if len(order) <= _ALL_CLASSES:
        yield from map(line, order.tolist())
        return
    yield from map(line, order[:_SOME_CLASSES].tolist())
    yield "  ..."
    yield from map(line, order[-_SOME_CLASSES:].tolist())
    edges = np.unique(np.linspace(counts.min(), counts.max() + 1, _BINS + 1).astype(int))
    inside, _ = np.histogram(counts, edges)
    spans = [f"{low:,}" if low == high - 1 else f"{low:,} to {high - 1:,}" for low, high in zip(edges[:-1], edges[1:], strict=True)]
    room = max(map(len, spans))
    yield ""
    yield f"Classes by their number of images in {split}"
    for span, count in zip(spans, inside.tolist(), strict=True):
        number = f"{count:>{len(f'{inside.max():,}')},}"
        yield f"  {span:>{room}} images {number} classes {'#' * round((width - room - 30) * count / max(1, inside.max()))}".rstrip()


def _sizes(diagnosis: Diagnosis) -> Iterator[str]:
    heads = ("smallest", "5 %", "median", "95 %", "largest")
    tables = [(name, facts["sizes"]) for name, facts in diagnosis.facts["splits"].items() if facts["sizes"]]
    if not tables:
        return
    yield ""
    yield f"{'Sizes':20}" + "".join(f"{head:>11}" for head in heads)
    for name, sizes in tables:
        for key, what in (("width", "width"), ("height", "height"), ("bytes", "file")):
            values = sizes[key].values()
            yield f"  {name + ' ' + what:18}" + "".join(f"{_size(v) if key == 'bytes' else f'{v:,}':>11}" for v in values)


def _speed(diagnosis: Diagnosis, width: int) -> Iterator[str]:
    speed = diagnosis.facts["speed"]
    if not speed:
        return
    plan = speed["plan"]
    yield ""
    yield "Speed"
    yield from _wrapped(f"{diagnosis.survey.images:,} images read by {speed['processes']} processes in {_time(speed['seconds'])} "
                        f"({speed['images_per_second']:,.0f}/s); decoding {speed['decode_ms']:.2f} ms an image "
                        f"({speed['decoded_per_second_and_core']:,.0f}/s a core), reading {speed['read_ms']:.2f} ms", "  ", "  ", width)
    if plan["images"]:
        total = plan["epochs"] * plan["augmented_epoch_seconds"]
        yield from _wrapped(
            f"the planned run, {plan['workers']} loading processes on {plan['cores']} cores: an epoch of {plan['images']:,} images takes "
            f"{_time(plan['epoch_seconds'])} to read and decode, about {_time(plan['augmented_epoch_seconds'])} with the training "
            f"augmentation; {plan['epochs']} epochs {_time(total)}. A faster model waits for its data", "  ", "  ", width)


def _finding(finding: Finding, script: str | None, survey: Survey, width: int) -> Iterator[str]:
    first, *more = _wrapped(plain(finding.title), f"{finding.severity:9}", _INDENT, width)
    first = FindingLine(first)
    first.severity = finding.severity
    yield from (first, *more)
    room = width - len(_INDENT) - 2
    for i in range(min(finding.count, _SHOWN)):
        yield f"{_INDENT}  {_item(finding.item(i), survey, room)}"
    if finding.count > _SHOWN:
        yield f"{_INDENT}  and {finding.count - _SHOWN:,} more"
    if finding.advice:
        yield from _wrapped(finding.advice, f"{_INDENT}", _INDENT, width)
    if script:
        yield f"{_INDENT}mend: {script}"
    for command in finding.commands:
        words = "mend: " if not command.startswith("--") else "or run with " if script else "run with "
        yield f"{_INDENT}{words}{plain(command)}"


def _item(item: dict, survey: Survey, room: int) -> str:
    name = item.get("name", item.get("path", ""))
    if "path" in item and os.path.isdir(survey.root):
        name = name.removeprefix(os.path.join(survey.root, ""))
    name, detail = plain(name), plain(item.get("detail", ""))
    if not detail:
        return shortened(name, room, keep_end=True)
    least = min(len(name), max(12, room // 2))
    detail = shortened(detail, room - least - 2)
    return f"{shortened(name, room - len(detail) - 2, keep_end='path' in item)}  {detail}"


def _wrapped(text: str, first: str, rest: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False)


def _size(count: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return ""


def _time(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.0f} h"
