"""How far the work is: a live line on a terminal, plain lines in a pipe and in log.txt."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, environment

from data.sources.listing_progress import tick
from utils.loggers import console as log
from utils.loggers import progress
from utils.training import step_log


class Terminal(io.StringIO):
    """A terminal that only writes."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def make_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Terminal]:
    """Called in the test itself: pytest puts its own streams in place between a fixture and the test."""
    def make() -> Terminal:
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(warnings, "showwarning", lambda message, *_: print(f"warning {message}", file=sys.stderr))
        return stream

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("RANK", raising=False)
    return make


def on_screen(written: str) -> list[str]:
    """What a terminal shows in the end: carriage returns go back to the left, ``ESC [ K`` clears to the right."""
    lines = []
    for raw in written.replace("\r\n", "\n").split("\n"):
        cells: list[str] = []
        at = 0
        for piece in re.findall(r"\x1b\[K|\r|[^\r\x1b]+|\x1b", raw):
            if piece == "\r":
                at = 0
            elif piece == "\x1b[K":
                del cells[at:]
            else:
                cells[at:at + len(piece)] = piece
                at += len(piece)
        lines.append("".join(cells).rstrip())
    return [line for line in lines if line]


def run_on_a_terminal(*arguments: object, cwd: Path, **env: str) -> tuple[int, str]:
    """(exit status, everything written) of ``main.py`` on a pseudo-terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, str(ROOT / "main.py"), *map(str, arguments)], cwd=cwd, env=environment(**env),
                               stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL)
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    return process.wait(), written.decode()


def test_a_run_on_a_terminal_redraws_one_line_and_keeps_the_others_whole(tiny_cfg: Path, tmp_path: Path) -> None:
    status, written = run_on_a_terminal("--cfg", tiny_cfg, cwd=tmp_path, TERM="xterm", COLUMNS="100", NO_COLOR="1")
    assert status == 0, written
    assert "\repoch 1/2 step " in written and "\revaluating " in written and "█" in written
    logged = (tmp_path / "output/tiny/default/log.txt").read_text()
    assert "\r" not in logged and "\x1b" not in logged
    periodic = [line for line in logged.splitlines() if re.match(r"epoch \d/2 step [24]/5 ", line)]
    assert len(periodic) == 4  # PRINT_FREQ is 2, and the last of an epoch stays on the terminal
    kept = [line for line in logged.splitlines() if line not in periodic]
    assert sum(line.startswith("epoch ") for line in kept) == 2
    assert on_screen(written) == kept  # nothing lost, nothing left over, nothing torn


def test_a_pipe_has_plain_lines_and_slow_steps_are_heard_of(tiny_cfg: Path, program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_log, "SLOW", -1.0)
    done = program("--cfg", tiny_cfg, "--epochs", 1, "--opts", "PRINT_FREQ", 1000)
    assert done.returncode == 0 and not {"\r", "\x1b"} & set(done.stdout + done.stderr)
    assert done.stderr == ""
    logged = (program.folder / "output/tiny/default/log.txt").read_text()
    assert re.findall(r"^epoch 1/1 step (\d)/5 lr \S+ loss [\d.]+ ", logged, re.M) == list("12345")


def test_many_lines_in_a_moment_are_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    logger = log.create_logger(True)
    log.log_to_file(logger, str(tmp_path / "log.txt"))
    for number in range(50):
        progress.log_periodic(logger, f"step {number}")
    logger.info("the end")
    log.close_files(logger)
    assert capsys.readouterr().out.splitlines() == ["step 0", "the end"]
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 51


@pytest.mark.parametrize("columns", [120, 40, 9])
def test_the_line_is_as_wide_as_the_terminal(make_terminal, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    terminal = make_terminal()
    monkeypatch.setenv("COLUMNS", str(columns))
    line = progress.LiveLine(300, lambda done, pace: (f"epoch 1/300 step {done}/1251", ["loss 1.2345", "99:12:03 left", "812 images/s"]))
    monkeypatch.setattr(line._drawn, "mininterval", 0)
    for done in range(1, 301):
        line.update(done)
    drawn = [part for part in terminal.getvalue().split("\r") if part.strip()]
    assert len(drawn) > 300 and max(map(len, drawn)) < columns
    assert ("█" in drawn[-1], "812 images/s" in drawn[-1], "loss" in drawn[-1]) == (columns == 120, columns == 120, columns >= 40)
    line.close()
    assert on_screen(terminal.getvalue()) == []


def test_a_terminal_without_utf8_has_a_bar_too(make_terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal()
    monkeypatch.setattr(Terminal, "encoding", "ascii")
    list(progress.track(range(9), 9, "predicting", None))
    assert "|#" in terminal.getvalue() or "|  " in terminal.getvalue()
    terminal.getvalue().encode("ascii")


def test_lines_and_warnings_go_above_the_live_line(make_terminal) -> None:
    terminal = make_terminal()
    logger = log.create_logger(True)
    for item in progress.track(range(4), 4, "predicting", logger, unit="images"):
        if item == 1:
            logger.info("a line")
            progress.log_periodic(logger, "what the live line says")
            warnings.showwarning(UserWarning("odd"), UserWarning, "x.py", 1)
            assert on_screen(terminal.getvalue())[-1].startswith("predicting 1/4")
    progress.clear_live_line()
    shown = on_screen(terminal.getvalue())
    assert shown[0] == "a line" and shown[1] == "warning odd"
    assert not any("predicting" in line or "live line says" in line for line in shown)


@pytest.mark.parametrize("env", [{"TERM": "dumb"}, {"RANK": "1"}])
def test_no_live_line(make_terminal, monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> None:
    terminal = make_terminal()
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    said: list[str] = []
    logger = logging.Logger("plain")
    logger.addHandler(handler := logging.Handler())
    handler.emit = lambda record: said.append(record.getMessage())
    monkeypatch.setattr(progress, "FIRST", 0.0)
    monkeypatch.setattr(progress, "SLOW", 1e9)
    assert list(progress.track(iter("abc"), 3, "predicting", logger, unit="images")) == list("abc")
    assert terminal.getvalue() == "" and not progress.is_live()
    assert len(said) == 1 and said[0].startswith("predicting: 1 of 3 images, 0:00 left, ")


def test_a_terminal_that_goes_away_ends_the_live_line_alone(make_terminal) -> None:
    terminal = make_terminal()
    seen = []
    for item in progress.track(range(5), 5, "evaluating", None):
        seen.append(item)
        if item == 2:
            terminal.close()
    assert seen == list(range(5))


def test_long_listings_are_shown(make_terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal()
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    monkeypatch.setattr(progress, "FIRST", 0.0)
    said: list[str] = []
    with progress.listing_shown(said.append):
        tick("a.tar", 0)
        tick("a.tar", 256)
        tick("b.tar", 256)
    tick("b.tar", 512)  # nobody listens any more
    assert "listing a.tar: 0 files" in terminal.getvalue() and "\rlisting b.tar: 256 files" in terminal.getvalue()
    assert said[0].startswith("listing a.tar: ") and on_screen(terminal.getvalue()) == []


def test_many_short_listings_are_told_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """As thousands of shards, of which none takes long."""
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    monkeypatch.setattr(progress, "FIRST", 0.03)
    said: list[str] = []
    with progress.listing_shown(said.append):
        for number in range(5):
            tick(f"{number}.tar", 0)
            time.sleep(0.02)
    assert len(said) == 1 and said[0].endswith(".tar: 0 files")
