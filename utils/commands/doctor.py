"""``--doctor``: look the data over, report, and leave behind what mends it. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

import numpy as np
from yacs.config import CfgNode

from config import DENSE_TASKS, ConfigError, require_regular
from data.dense.doctor import dense_findings, open_dense_survey
from data.doctor.diagnose import Diagnosis, diagnose, manifests
from data.doctor.finding import ERROR, NOTE, WARNING, Finding, Move
from data.doctor.survey import Survey, base_of
from data.sources.folder import ImageFolder
from data.sources.index_cache import NPZ_ERRORS, Index
from utils.commands.outputs import check_outputs
from utils.loggers.console import plain
from utils.loggers.progress import ProgressLines, is_live, listing_shown
from utils.reporting.doctor_text import render
from utils.runtime.files import is_stream, replace_file, write_atomically

EXIT_GRAVE = 3
_COLOURS = {ERROR: "red", WARNING: "yellow", NOTE: "cyan"}
_HEAD = """#!/bin/sh
# {title}
# Written by main.py --doctor. What is taken out goes to the folder below; nothing is deleted, nothing is overwritten.
set -eu
out={out}
take_out() {{
    [ -e "$1" ] || return 0
    place=$out/$2/${{1##*/}}
    while [ -e "$place" ]; do place=$place~; done
    mkdir -p -- "$out/$2"
    mv -- "$1" "$place"
}}
rename() {{ [ -e "$1" ] || return 0; mkdir -p -- "$(dirname -- "$2")"; mv -n -- "$1" "$2"; }}
"""


def examine_run(config: CfgNode, logger: logging.Logger) -> int:
    """Diagnose the config's data, write the report; the exit status: 0, or 3 with errors among the findings.

    Raises:
        ConfigError: no data path, or the report cannot be written.
    """
    folder = report_folder(config)
    earlier = {name: found for name in ("train", "val") if (found := _read_manifest(os.path.join(folder, f"manifest-{name}.npz")))}
    progress = Progress()

    def begun(survey: Survey) -> None:
        _prepare(config, folder, survey)
        progress.begin(survey.images)

    try:
        with listing_shown(progress.say):
            ways = dict(open_data=open_dense_survey, check=dense_findings) if config.TASK in DENSE_TASKS else {}
            diagnosis = diagnose(config, begun, progress, earlier, **ways)
    finally:
        progress.end()
    scripts = _write_scripts(diagnosis, folder)
    for name, content in manifests(diagnosis.survey).items():
        write_atomically(os.path.join(folder, f"manifest-{name}.npz"), lambda file, content=content: np.savez(file, **content))
    lines = list(render(diagnosis, scripts, folder, shutil.get_terminal_size((100, 24)).columns))
    replace_file(os.path.join(folder, "report.txt"), "".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace"))
    write_atomically(os.path.join(folder, "report.json"), lambda file: _write_json(file, diagnosis, scripts))
    if config.DOCTOR.JSON not in ("", "-"):
        write_atomically(os.path.expanduser(config.DOCTOR.JSON), lambda file: _write_json(file, diagnosis, scripts))
    if config.DOCTOR.JSON == "-":
        _to_standard_output(diagnosis, scripts)
    else:
        for line in lines:
            logger.info(line, extra={"colour": _COLOURS.get(getattr(line, "severity", ""), "")})
    return EXIT_GRAVE if diagnosis.grave else 0


def report_folder(config: CfgNode) -> str:
    """DOCTOR.FOLDER, or OUTPUT/doctor/<name of the data>."""
    name = os.path.basename(os.path.abspath(os.path.expanduser(config.DATA.DATA_PATH))) or "data"
    return os.path.expanduser(config.DOCTOR.FOLDER) or os.path.join(os.path.expanduser(config.OUTPUT or "output"), "doctor", name)


def _prepare(config: CfgNode, folder: str, survey: Survey) -> None:
    """Make the report's folder before anything is read; it must not lie among the images."""
    json_file = config.DOCTOR.JSON
    for split in survey.splits.values() if config.TASK not in DENSE_TASKS else ():  # whose root is above the images
        base = base_of(split.source)[0]
        if isinstance(base, ImageFolder) and os.path.realpath(folder).startswith(os.path.join(os.path.realpath(base.root), "")):
            raise ConfigError(f"{folder}: the report would lie among the images of {base.root}; choose another place with "
                              "--opts DOCTOR.FOLDER")
    _tried(lambda: os.makedirs(folder, exist_ok=True), folder)
    own = ["report.txt", "report.json", *(f"manifest-{name}.npz" for name in survey.splits)]
    check_outputs(config, [*(("DOCTOR.FOLDER", os.path.join(folder, name)) for name in own), ("DOCTOR.JSON", json_file)])
    _tried(lambda: replace_file(os.path.join(folder, "report.txt"), b"the doctor has not finished\n"), folder)
    if json_file not in ("", "-") and not is_stream(json_file):
        _tried(lambda: replace_file(os.path.expanduser(json_file), b"{}\n"), json_file)
    shutil.rmtree(os.path.join(folder, "mend"), ignore_errors=True)  # scripts of an earlier report


def _tried(write: Callable[[], None], path: str) -> None:
    try:
        write()
    except OSError as error:
        raise ConfigError(f"{path}: the report cannot be written there ({error.strerror}); choose another place with --opts DOCTOR.FOLDER "
                          "or --doctor-json") from None


def _read_manifest(path: str) -> Index | None:
    try:
        require_regular(path)
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in ("names.blob", "names.ends", "sha256")}
    except NPZ_ERRORS:
        return None


# --------------------------------------------------------------------------------------------------
# Scripts that mend
# --------------------------------------------------------------------------------------------------

def _write_scripts(diagnosis: Diagnosis, folder: str) -> dict[str, str]:
    """A script for every finding that files can be taken out for; the command that runs it, by the finding's code."""
    commands = {}
    for finding in diagnosis.found:
        if finding.moves is None:
            continue
        path = os.path.join(folder, "mend", f"{finding.code}.sh")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            count = _write_script(file, finding, finding.moves(), os.path.abspath(folder), os.path.abspath(diagnosis.survey.root))
        if count:
            commands[finding.code] = f"sh {shlex.quote(path)}"
        else:
            os.unlink(path)
    return commands


def _write_script(file: BinaryIO, finding: Finding, moves: Iterable[Move], folder: str, root: str) -> int:
    """Names are quoted for the shell as they are, whatever characters they hold; how many files it moves."""
    file.write(os.fsencode(_HEAD.format(title=plain(finding.title), out=shlex.quote(os.path.join(folder, "removed")))))
    count = 0
    for move in moves:
        path = os.path.abspath(move.path)
        if move.to:
            line = f"rename {shlex.quote(path)} {shlex.quote(os.path.abspath(move.to))}\n"
        else:
            line = f"take_out {shlex.quote(path)} {shlex.quote(os.path.relpath(os.path.dirname(path), root))}\n"
        file.write(os.fsencode(line))
        count += 1
    return count


# --------------------------------------------------------------------------------------------------
# JSON
# --------------------------------------------------------------------------------------------------

def _json(value: object) -> str:
    """ASCII, and without an angle bracket that a page could take for markup."""
    return json.dumps(value).replace("<", "\\u003c").replace(">", "\\u003e")


def _json_lines(diagnosis: Diagnosis, scripts: dict[str, str]) -> Iterator[str]:
    """The report piece by piece: all items of all findings, however many there are."""
    survey = diagnosis.survey
    yield '{"version": 1,\n'
    for key, value in diagnosis.facts.items():
        yield f'{_json(key)}: {_json(value)},\n'
    train, val = survey.counts("train"), survey.counts("val")
    yield '"classes": [\n'
    for number, name in enumerate(survey.classes):
        yield (",\n" if number else "") + _json(dict(name=name, train=int(train[number]), val=int(val[number])))
    yield '\n],\n"findings": ['
    for number, finding in enumerate(diagnosis.found):
        mend = [*([scripts[finding.code]] if finding.code in scripts else []), *finding.commands]
        head = _json(dict(code=finding.code, severity=finding.severity, title=finding.title, advice=finding.advice, mend=mend,
                          count=finding.count))
        yield (",\n" if number else "\n") + head[:-1] + ', "items": ['
        for i in range(finding.count):
            yield (",\n " if i else "\n ") + _json(finding.item(i))
        yield "]}"
    yield "\n]}\n"


def _write_json(file: BinaryIO, diagnosis: Diagnosis, scripts: dict[str, str]) -> None:
    for piece in _json_lines(diagnosis, scripts):
        file.write(piece.encode("ascii"))


def _to_standard_output(diagnosis: Diagnosis, scripts: dict[str, str]) -> None:
    try:
        for piece in _json_lines(diagnosis, scripts):
            sys.stdout.write(piece)
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):  # closed: whoever closed it has what he wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


# --------------------------------------------------------------------------------------------------
# Progress
# --------------------------------------------------------------------------------------------------

class Progress:
    """How far reading is; plain lines go to standard error too, standard output may be the report."""

    def __init__(self) -> None:
        self.shown: ProgressLines | None = None

    def begin(self, total: int) -> None:
        self.shown = ProgressLines(total, "reading", "images", self.say)

    def __call__(self, done: int) -> None:
        if self.shown is not None:
            self.shown.update(done)

    def end(self) -> None:
        if self.shown is not None:
            self.shown.close()

    @staticmethod
    def say(text: str) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed: nobody wants to know
            if not is_live():
                print(plain(text), file=sys.stderr, flush=True)
