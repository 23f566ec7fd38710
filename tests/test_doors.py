"""Every door takes whatever comes through it: what is no config, flag, label file, checkpoint or run is told in one sentence, with one of
the listed statuses, in bounded time, and no file but the output changes.

A few hundred inputs a door, the same each time. More, and others each time: ``DOOR_EXAMPLES=5000 pytest tests/test_doors.py -k config``.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import shutil
import signal
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY_MODEL, write_images
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

import main
from config import KEYS, ProgramError, get_config, input_channels
from data import build_loaders
from data.errors import UnreadableImage
from utils.cli.flags import OLD_FLAGS, PRINT_FLAGS, all_flags

MORE = int(os.environ.get("DOOR_EXAMPLES", "0"))
STATUSES = {0, 1, 2, 3, 4, 75}
SECONDS = 60  # in which every input is done with, on a machine that does much else


def inputs(count: int) -> Callable[[Any], Any]:
    """``count`` examples of a door, or as many as DOOR_EXAMPLES asks for; a failing one is made smaller only then, which takes time."""
    phases = [Phase.explicit, Phase.generate, *([Phase.shrink] if MORE else [])]
    return settings(max_examples=MORE or count, derandomize=not MORE, deadline=None, database=None, phases=phases,
                    suppress_health_check=list(HealthCheck))


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Inside, work that hangs is interrupted."""
    def late(*_: Any) -> None:
        raise TimeoutError(f"nothing after {SECONDS} s")
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def told(error: Exception) -> None:
    """One sentence, of one line once it is printed, with a status."""
    assert isinstance(error, ProgramError | OSError), repr(error)
    assert isinstance(error, OSError) or error.exit_status in STATUSES
    assert 0 < len(str(error)) < 20_000


def passes(door: Callable[[], Any]) -> Any:
    """What comes of an input that a door takes; None where it refuses it in a sentence."""
    with bounded():
        try:
            return door()
        except ProgramError as error:
            told(error)
    return None


def call(*arguments: object) -> int:
    """The program in this process: its status, a listed one, one sentence where it fails and no traceback."""
    out, err = io.StringIO(), io.StringIO()
    with bounded(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main.main([str(argument) for argument in arguments])
    said = out.getvalue() + err.getvalue()
    assert status in STATUSES, (status, said)
    assert "Traceback" not in said and "please report" not in said, said[-3000:]
    assert "TimeoutError" not in said, said
    assert status in (0, 3, 75) or sum(line.startswith("error") for line in err.getvalue().splitlines()) == 1, said
    return status


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file below ``folder`` with what it holds."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else "folder" for path in sorted(folder.rglob("*"))}


# ---- what comes through doors ----------------------------------------------------------------------------------------------------

STRANGE = [
    "", " ", "\0", "a\0b", "\x1b[31m", "a\nb", "\r", "\ud800", "\udcff", "\u2028", "..", "../..", "/", "~", "-", "--", "%s", "{}",
    "x" * 300, "x" * 5000, "nan", "inf", "-inf", "1e999", "-1", "0", "0.0", "1e300", "1e-300", "-0", "9" * 30, "9" * 5000,
    "0x" + "f" * 50, "1_0", "010", "1:30", "2024-13-45", "[]", "[[]]", "[0]", "[0, 1]", "[1, 0]", "[-1]", "[1e300, 2]", "[null]",
    "[" * 50, "{}", "{a: 1}", "(1, 2)", "(", "null", "~", "true", "off", "&a [*a]", "!!python/object:os.system x", "<<", "é", "😀",
    "auto", "none", "cpu", "/dev/null", "/dev/zero"]
TEXTS = st.one_of(st.sampled_from(STRANGE), st.text(max_size=20), st.integers().map(str), st.floats().map(str),
                  st.lists(st.integers(-3, 9), max_size=5).map(str), st.lists(st.floats(width=16), max_size=3).map(str))
NUMBERS = st.one_of(st.integers(), st.integers(-3, 100), st.floats(),
                    st.sampled_from([10**18, 10**400, 2**53 + 1, -1, 0, 1e300, float("nan")]))
PLAIN = st.recursive(st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
                     lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)), max_leaves=6)
KEY_NAMES = st.one_of(st.sampled_from([key.name for key in KEYS]), st.sampled_from([key.name for key in KEYS]), TEXTS)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file cut, with bytes changed, put in, taken out, or behind its end."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        what, some = draw(st.integers(0, 4)), draw(st.binary(min_size=1, max_size=8))
        if what == 0:
            del content[at:]
        elif what == 1:
            content[at:at + len(some)] = some
        elif what == 2:
            content[at:at] = some
        elif what == 3:
            del content[at:at + draw(st.integers(1, 64))]
        else:
            content += some
    return bytes(content)


# ---- config files, keys and flags ------------------------------------------------------------------------------------------------

@st.composite
def yaml_files(draw: st.DrawFn) -> bytes:
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    lines = []
    for _ in range(draw(st.integers(1, 3))):
        key, raw = draw(KEY_NAMES), draw(st.booleans())
        value = draw(TEXTS) if raw else _as_yaml(draw(PLAIN))
        *sections, leaf = key.split(".")
        lines += [f"{'  ' * depth}{name}:\n" for depth, name in enumerate(sections)]
        lines.append(f"{'  ' * len(sections)}{leaf}: {value}\n")
    return "".join(lines).encode("utf-8", "surrogatepass" if draw(st.booleans()) else "backslashreplace")


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1_000_000).strip().removesuffix("...").strip()


@inputs(300)
@given(yaml_files())
def test_config_files(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = _fresh(tmp_path_factory, "config")
    (folder / "a.yaml").write_bytes(content)
    config = passes(lambda: get_config(str(folder / "a.yaml")))
    if config is not None:
        (folder / "b.yaml").write_text(config.dump())
        assert get_config(str(folder / "b.yaml")).dump() == config.dump()  # what is taken can be written and read
    assert (folder / "a.yaml").read_bytes() == content


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    words = []
    for _ in range(draw(st.integers(1, 3))):
        flag = draw(st.sampled_from([*all_flags(), *OLD_FLAGS]))
        if draw(st.booleans()):
            words += ["--opts", draw(KEY_NAMES), draw(TEXTS)]
        elif draw(st.booleans()):
            words += [draw(st.one_of(st.just(flag.name), TEXTS)), *([draw(TEXTS)] if flag.fixed is None else [])]
        else:
            words.append(f"{flag.name}={draw(TEXTS)}")
    return words


@inputs(200)
@given(command_lines())
def test_flags_and_keys(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> None:
    """Read, checked and shown: the last flag makes of every line that is sound a print of its config, unless it asks for two commands."""
    folder = _fresh(tmp_path_factory, "flags")
    (folder / "file").write_text("x")
    before = contents(folder)
    with inside(folder):
        if {word.partition("=")[0] for word in words}.isdisjoint(flag.name for flag in PRINT_FLAGS):
            call(*words, "--print-config")
    assert contents(folder) == before


@st.composite
def model_numbers(draw: st.DrawFn) -> list[str]:
    """A family with two stages and small numbers, of which some are exchanged."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    numbers = dict(FAMILIES[family])
    leaves = [key.name.rpartition(".")[2] for key in KEYS if key.name.startswith(f"MODEL.{family.upper()}.")]
    small = st.integers(-1, 9)
    value = st.one_of(small, st.lists(small, max_size=3), st.lists(st.lists(small, max_size=3), max_size=2), st.booleans()).map(str)
    for leaf in draw(st.lists(st.sampled_from([leaf for leaf in leaves if leaf != "DEPTHS"]), min_size=1, max_size=2)):
        numbers[leaf] = draw(value)
    return ["MODEL.TYPE", family, "MODEL.NAME", "own", "DATA.IMG_SIZE", str(draw(st.sampled_from([1, 7, 32]))),
            *(word for leaf, number in numbers.items() for word in (f"MODEL.{family.upper()}.{leaf}", number))]


_TWO = dict(DEPTHS="[1, 1]", NUM_HEADS="[2, 4]")
_DOUBLING, _PER_STAGE = dict(_TWO, EMBED_DIM="16"), dict(_TWO, EMBED_DIMS="[16, 32]", MLP_RATIOS="[2, 2]")
FAMILIES = dict(
    crossformer=dict(_DOUBLING, GROUP_SIZE="[4, 4]", INTERVAL="[2, 1]"), galerkin=_DOUBLING, swin=dict(_DOUBLING, WINDOW_SIZE="4"),
    swinv2=dict(_DOUBLING, WINDOW_SIZE="4"), swin_mlp=dict(_DOUBLING, WINDOW_SIZE="4"),
    shunted=dict(_PER_STAGE, SR_RATIOS="[2, 1]"), pvt=dict(_PER_STAGE, SR_RATIOS="[2, 1]"), pvt_v2=dict(_PER_STAGE, SR_RATIOS="[2, 1]"),
    mpvit=dict(_PER_STAGE, NUM_HEADS="[4, 4]", NUM_PATHS="[2, 2]", CRPE_WINDOWS="[[3, 4]]"),
    cvt=dict(_PER_STAGE, PATCH_SIZES="[7, 3]", PATCH_STRIDES="[4, 2]", PATCH_PADDINGS="[2, 1]", KV_STRIDES="[2, 2]"))


@inputs(60)
@given(model_numbers())
def test_numbers_of_models(opts: list[str]) -> None:
    from models.build import build_model, check_input_size

    def build() -> None:
        config = get_config(opts=opts)
        model = build_model(config, 3).eval()
        check_input_size(model, config)
        with torch.inference_mode():
            assert model(torch.zeros(2, input_channels(config), config.DATA.IMG_SIZE, config.DATA.IMG_SIZE)).shape == (2, 3)
    passes(build)


# ---- class maps and label sets ---------------------------------------------------------------------------------------------------

NAMES = st.one_of(st.sampled_from(["0", "1", "2", "a", "b", "n01440764"]), TEXTS)
LABEL_FILES = st.one_of(
    st.binary(max_size=100),
    st.lists(st.one_of(NAMES, st.tuples(NAMES, NAMES).map("\t".join)), max_size=8).map(
        lambda rows: "\n".join(rows).encode("utf-8", "replace")),
    PLAIN.map(lambda value: json.dumps(value).encode()), st.sampled_from([b"[" * 5000, b"9" * 5000, b"[[" + b"9" * 5000 + b"]]"]))


@inputs(200)
@given(LABEL_FILES, st.sampled_from(["MODEL.CLASS_MAP", "DATA.CLASS_NAMES", "TEST.LABELS", "TEST.REAL_LABELS"]))
def test_class_maps_and_label_sets(tmp_path_factory: pytest.TempPathFactory, content: bytes, key: str) -> None:
    from data.layouts.splits import read_class_names
    from models.weights import read_class_map
    from utils.evaluation.label_sets import Labels, _positions

    path = str(_fresh(tmp_path_factory, "labels") / "labels.txt")
    Path(path).write_bytes(content)

    def read() -> Any:
        if key == "MODEL.CLASS_MAP":
            return read_class_map(path)
        if key == "DATA.CLASS_NAMES":
            return read_class_names(path)
        labels = Labels(get_config(opts=["TEST.LABELS", path] if key == "TEST.LABELS" else ["TEST.LABELS", "real", key, path]))
        return _positions(labels.names, ["0", "a", "b"], path) if key == "TEST.LABELS" else labels.real
    passes(read)
    assert Path(path).read_bytes() == content


# ---- checkpoints -----------------------------------------------------------------------------------------------------------------

def _fresh(factory: pytest.TempPathFactory, name: str) -> Path:
    """An empty folder, the same one for all inputs of a door."""
    folder = factory.getbasetemp() / f"door-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of a tiny model over one epoch."""
    folder = tmp_path_factory.mktemp("run")
    write_images(folder / "images", "train", dict(a=6, b=6))
    write_images(folder / "images", "val", dict(a=3, b=3), seed=1)
    (folder / "tiny.yaml").write_text(
        f"DATA: {{DATA_PATH: '{folder}/images', IMG_SIZE: 32, BATCH_SIZE: 4, NUM_WORKERS: 0}}\n" + TINY_MODEL
        + "TRAIN: {EPOCHS: 1, WARMUP_EPOCHS: 0, EMA_DECAY: 0.5, REPORT: none}\nPRINT_FREQ: 1\n")
    assert call("--cfg", folder / "tiny.yaml", "--output", folder / "output") == 0
    return folder / "output/tiny/default"


PARTS = st.one_of(PLAIN, st.sampled_from([torch.zeros(2), torch.zeros(2, dtype=torch.int64), torch.tensor(float("nan")), {}, [], "", -1,
                                          2**62]))


@inputs(10)
@given(st.data())
def test_checkpoints_of_this_program(tmp_path_factory: pytest.TempPathFactory, run: Path, data: st.DataObject) -> None:
    """With a right checksum and wrong parts: evaluated, or continued."""
    from utils.checkpoints.file_format import write_checkpoint

    content = torch.load(run / "last.pth", weights_only=True)
    for _ in range(data.draw(st.integers(1, 2))):
        part = content
        while True:
            name = data.draw(st.sampled_from(sorted(part, key=str)))
            if not isinstance(part[name], dict) or not part[name] or data.draw(st.booleans()):
                break
            part = part[name]
        if data.draw(st.integers(0, 3)) == 0:
            del part[name]
        elif name != "config":
            part[name] = data.draw(PARTS)
        else:
            part[name] = data.draw(st.one_of(PLAIN, st.just(part[name]).map(lambda text: text[:len(text) // 2])))
    folder = _fresh(tmp_path_factory, "checkpoint")
    try:
        write_checkpoint(str(folder / "ckpt_00000003.pth"), content)
    except (ValueError, OverflowError, RuntimeError):  # what no file can hold
        return
    before = contents(folder)
    if data.draw(st.integers(0, 3)):
        call("--eval", "--resume", folder / "ckpt_00000003.pth", "--data-path", run.parent.parent.parent / "images", "--batch-size", 8)
    else:
        call("--diff", folder / "ckpt_00000003.pth", run)
        call("--plan", "--cfg", run.parent.parent.parent / "tiny.yaml", "--resume", folder / "ckpt_00000003.pth", "--epochs", 2, "--output",
             folder.parent / "door-output", "--opts", "PLAN.SECONDS", 0)
    assert contents(folder) == before


@inputs(150)
@given(st.data(), st.sampled_from(["x.pth", "x.bin", "x.safetensors", "x.yaml"]))
def test_bytes_of_checkpoints(tmp_path_factory: pytest.TempPathFactory, run: Path, data: st.DataObject, name: str) -> None:
    """With anything changed in the bytes, the checksum too."""
    from models.weights import unwrap_state_dict
    from utils.checkpoints.exported import read_trained

    path = _fresh(tmp_path_factory, "bytes") / name
    whole = (run / "last.pth").read_bytes() if name != "x.safetensors" else _as_safetensors(run)
    content = data.draw(damaged(whole)) if data.draw(st.integers(0, 4)) else data.draw(st.binary(max_size=100))
    path.write_bytes(content)
    passes(lambda: unwrap_state_dict(read_trained(str(path)), str(path)))
    assert path.read_bytes() == content


def _as_safetensors(run: Path) -> bytes:
    from safetensors.torch import save
    return save(torch.load(run / "last.pth", weights_only=True)["model"])


# ---- a run's own files -----------------------------------------------------------------------------------------------------------

RUN_FILES = ["config.yaml", "sources.json", "metrics.jsonl", "steps.jsonl", "history.jsonl", "nonfinite.jsonl", "predictions.npz"]


@st.composite
def records(draw: st.DrawFn, whole: bytes) -> bytes:
    """Lines of JSON with values exchanged, as Python writes them: NaN and Infinity too."""
    rows = [json.loads(line) for line in whole.splitlines()] or [dict(step=1, event="start")]
    for _ in range(draw(st.integers(1, 3))):
        row = draw(st.sampled_from(rows))
        name = draw(st.one_of(st.sampled_from(sorted(row)), st.sampled_from(["time", "before", "again", "to", "reason", "seconds", "x"])))
        row[name] = draw(PLAIN)
    lines = [json.dumps(row).encode() for row in rows]
    return b"\n".join([*lines, draw(st.sampled_from([b"", b"{", b"[" * 5000, b'{"step": ' + b"9" * 5000 + b"}", b'{"step": 1e999}']))])


@st.composite
def arrays(draw: st.DrawFn, whole: bytes) -> bytes:
    """An npz file with an array exchanged or left out."""
    with np.load(io.BytesIO(whole)) as file:
        found = dict(file)
    name = draw(st.sampled_from(sorted(found)))
    kind = draw(st.sampled_from(["gone", "cut", "nan", "negative", "huge", "text", "complex", "json"]))
    if kind == "gone":
        del found[name]
    elif kind == "json":
        found[name] = np.frombuffer(draw(st.sampled_from([b"[1, 2]", b"{}", b"[" * 5000, b"9" * 5000, b"\xff", b"null"])), dtype=np.uint8)
    else:
        found[name] = dict(cut=found[name][:1], nan=found[name] * np.nan, negative=-found[name].astype(np.int64) - 1,
                           huge=found[name].astype(np.float64) * 1e300, text=found[name].astype(str), complex=found[name] * 1j)[kind]
    written = io.BytesIO()
    np.savez(written, **found)
    return written.getvalue()


@functools.cache
def whole_run(run: Path) -> Any:
    from utils.reporting.run_reader import read_run
    return read_run(str(run))


@inputs(80)
@given(st.data())
def test_files_of_a_run(tmp_path_factory: pytest.TempPathFactory, run: Path, data: st.DataObject) -> None:
    """Reported on, compared and continued, whatever became of them."""
    from utils.commands.show_config import differences
    from utils.loggers.metrics_files import JsonLines, MetricsLog
    from utils.reporting import plots
    from utils.reporting.charts import charts
    from utils.reporting.html_page import render
    from utils.reporting.run_reader import read_run

    folder = _fresh(tmp_path_factory, "records")
    for name in RUN_FILES:
        if (run / name).exists():
            (folder / name).write_bytes((run / name).read_bytes())
    for name in data.draw(st.lists(st.sampled_from(RUN_FILES), min_size=1, max_size=2, unique=True)):
        whole, path = (run / name).read_bytes() if (run / name).exists() else b"", folder / name
        path.unlink(missing_ok=True)
        what = data.draw(st.integers(0, 9))
        if what == 0:
            os.mkfifo(path)
        elif what == 1:
            path.mkdir()
        elif what == 2:
            path.symlink_to(data.draw(st.sampled_from(["/dev/zero", name, "absent", "/proc/self/mem"])))
        elif what < 5:
            path.write_bytes(data.draw(damaged(whole)))
        elif name.endswith(".jsonl"):
            path.write_bytes(data.draw(records(whole)))
        elif name.endswith(".npz"):
            path.write_bytes(data.draw(arrays(whole)))
        elif name.endswith(".json"):
            path.write_bytes(data.draw(LABEL_FILES))
        else:
            path.write_bytes(data.draw(yaml_files()))
    draws = bool(MORE) and data.draw(st.integers(0, 19)) == 0

    def report() -> None:
        runs = [read_run(str(folder)), whole_run(run)]
        assert all(isinstance(line, str) for line in differences(runs, ["a", "b"]))
        shown = runs[:data.draw(st.integers(1, 2))]
        charts(shown)
        with pytest.MonkeyPatch.context() as patch:
            if not draws:  # which takes a second
                patch.setattr(plots, "curves", lambda runs: [])
                patch.setattr(plots, "of_predictions", lambda predictions: [])
            render(shown)
    passes(report)

    def go_on() -> None:
        for name in ("steps.jsonl", "history.jsonl"):
            lines = JsonLines(str(folder / name), 2)
            lines.write(dict(step=3, before=(lines.last or {}).get("time"), again=(lines.last or {}).get("step", 0) - 2))
            assert all(json.loads(line) for line in (folder / name).read_text(errors="replace").splitlines())
        MetricsLog(str(folder), 2).write(dict(step=3, top1=1.0))
    with contextlib.suppress(OSError), pytest.MonkeyPatch.context() as patch:  # told before, where names of files are no files
        patch.setattr(os, "fsync", lambda _: None)
        go_on()


def test_what_has_the_name_of_a_runs_file_is_told_before_work(run: Path, tmp_path: Path) -> None:
    home = run.parent.parent.parent
    for name, make in (("steps.jsonl", os.mkfifo), ("best.pth", os.mkdir), (".job", os.mkfifo), ("tensorboard", Path.touch),
                       ("ckpt_00000001.pth", os.mkfifo)):
        folder = tmp_path / name / "tiny/default"
        folder.mkdir(parents=True)
        make(folder / name)
        assert call("--cfg", home / "tiny.yaml", "--output", tmp_path / name) == 2
        assert os.listdir(folder) == [name]


# ---- lists, shards and archives --------------------------------------------------------------------------------------------------

def opened(root: Path, *opts: object) -> None:
    """The loaders of the data in ``root``, and every image of them once, as training has them."""
    config = get_config(opts=[str(word) for word in (
        "DATA.DATA_PATH", root, "DATA.IMG_SIZE", 8, "DATA.BATCH_SIZE", 4, "DATA.NUM_WORKERS", 0, "DATA.INDEX_CACHE", "none",
        "DATA.READ_PATIENCE", 0, "DATA.VAL_FRACTION", 0.3, "TRAIN.EPOCHS", 21, *opts)])
    loaders = build_loaders(config)
    for source in (loaders.train.dataset.source, loaders.val.dataset.source):
        for index in range(len(source)):
            assert 0 <= source.targets[index] < len(loaders.classes)
            with contextlib.suppress(UnreadableImage):
                source.read(index)


@functools.cache
def picture() -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (4, 4)).save(written, "PNG")
    return written.getvalue()


CELLS = st.one_of(st.sampled_from(["0.png", "1.png", "2.png", "0", "1", "a", "b", "01", "1.0", "train", "val", "../0.png", "/dev/zero",
                                   "pipe.png", "folder.png", "loop.png", "path", "label", "split", "fold"]), TEXTS)
TABLES = st.one_of(
    st.binary(max_size=60),
    st.tuples(st.lists(st.lists(CELLS, min_size=1, max_size=4), min_size=1, max_size=6), st.sampled_from([",", "\t", ";", " ", "|"]),
              st.sampled_from(["\n", "\r\n", "\r", "\0"])).map(
                  lambda parts: parts[2].join(parts[1].join(row) for row in parts[0]).encode("utf-8", "replace")),
    PLAIN.map(lambda value: json.dumps(value).encode()))


@inputs(120)
@given(TABLES, st.sampled_from(["train.csv", "labels.csv", "train.tsv", "train.txt", "train.lst", "train.json", "metadata.jsonl",
                                "ILSVRC2012_validation_ground_truth.txt"]), st.sampled_from([(), ("DATA.FOLD", "1/2")]))
def test_lists(tmp_path_factory: pytest.TempPathFactory, table: bytes, name: str, opts: tuple[str, ...]) -> None:
    root = _fresh(tmp_path_factory, "lists")
    for number in range(3):
        (root / f"{number}.png").write_bytes(picture())
    os.mkfifo(root / "pipe.png")
    (root / "folder.png").mkdir()
    (root / "loop.png").symlink_to("loop.png")
    (root / name).write_bytes(table)
    passes(lambda: opened(root, *opts))
    assert (root / name).read_bytes() == table and len(os.listdir(root)) == 7


MEMBERS = st.lists(st.tuples(
    st.one_of(st.sampled_from(["0", "1", "a/0", "b/1", "train/a/0", "../0", "/0"]), TEXTS.map(lambda text: text.replace("\0", ""))),
    st.sampled_from([".png", ".cls", ".json", ".txt", "", ".tar", "/"]),
    st.one_of(st.just(None), LABEL_FILES, st.sampled_from([b"0", b"1", b"x", b"x\n", b'{"label": 1}', b"01", b"-1", b"1.5", b"\xff"]))),
    min_size=1, max_size=6)


def _archive(members: list[tuple[str, str, bytes | None]], kind: str) -> bytes:
    written = io.BytesIO()
    if kind == "zip":
        with warnings.catch_warnings(), zipfile.ZipFile(written, "w") as archive:
            warnings.simplefilter("ignore")  # of two members of a name
            for stem, suffix, data in members:
                archive.writestr((stem + suffix).encode("utf-8", "replace").decode() or "x", picture() if data is None else data)
        return written.getvalue()
    with tarfile.open(fileobj=written, mode="w") as archive:
        for stem, suffix, data in members:
            found = tarfile.TarInfo((stem + suffix).encode("utf-8", "replace").decode())
            data = picture() if data is None else data
            found.size = len(data)
            archive.addfile(found, io.BytesIO(data))
    return written.getvalue()


@inputs(120)
@given(st.data(), st.sampled_from(["tar", "zip"]))
def test_shards_and_archives(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str) -> None:
    """Members of any name with labels of any kind, and archives damaged anywhere."""
    root = _fresh(tmp_path_factory, "archives")
    sound = [(f"{name}/{number}", ".png", None) for name in "ab" for number in range(3)]
    content = _archive(data.draw(MEMBERS) if data.draw(st.booleans()) else sound, kind)
    if data.draw(st.booleans()):
        content = data.draw(damaged(content))
    name = data.draw(st.sampled_from([f"train.{kind}", f"train-000000.{kind}", f"data.{kind}"]))
    (root / name).write_bytes(content)
    if data.draw(st.booleans()):
        (root / f"val.{kind}").write_bytes(_archive(sound, kind))
    before = contents(root)
    passes(lambda: opened(root, *data.draw(st.sampled_from([(), ("DATA.ZIP_MODE", True)]))))
    assert contents(root) == before


# ---- outputs ---------------------------------------------------------------------------------------------------------------------

PLACES = st.one_of(
    st.sampled_from(["out.csv", "out.npy", "out.png", "new/out.csv", "folder", "folder/", ".", "image.png", "link.csv", "broken.csv",
                     "loop.csv", "pipe.csv", "closed/out.csv", "last.pth", "images.txt", "-", "/dev/full", "/dev/null",
                     "s3://bucket/x.csv", "image.png/x.csv", "./out.csv", "folder/../out.csv"]), TEXTS)


LED = {"pipe.csv", "link.csv", "target.csv", "broken.csv", "nowhere.csv"}  # links are written through


@inputs(30)
@given(st.data())
def test_places_of_outputs(tmp_path_factory: pytest.TempPathFactory, run: Path, data: st.DataObject) -> None:
    """What a command reads is never written, and what it was not given as an output neither."""
    folder = _fresh(tmp_path_factory, "outputs")
    (folder / "image.png").write_bytes(picture())
    (folder / "images.txt").write_text("image.png\n")
    (folder / "last.pth").write_bytes((run / "last.pth").read_bytes())
    (folder / "folder").mkdir()
    (folder / "target.csv").write_text("old\n")
    (folder / "link.csv").symlink_to("target.csv")
    (folder / "broken.csv").symlink_to("nowhere.csv")
    (folder / "loop.csv").symlink_to("loop.csv")
    os.mkfifo(folder / "pipe.csv")
    wanted = {flag: data.draw(PLACES) for flag in data.draw(st.lists(st.sampled_from(["--csv", "--json", "--features", "--sheet"]),
                                                                     min_size=1, max_size=2, unique=True))}
    before = {name: content for name, content in contents(folder).items() if name not in LED}
    with inside(folder):
        call("--predict", "images.txt", "--resume", "last.pth", *(f"{flag}={place}" for flag, place in wanted.items()))
    after = contents(folder)
    assert {name: after.get(name) for name in before} == before
    given_names = {os.path.normpath(place) for place in wanted.values() if "\0" not in place}
    made = after.keys() - before.keys() - LED
    assert all(any(name.startswith(place.rsplit(".", 1)[0]) for place in given_names) for name in made), (made, wanted)


# ---- what the values of keys lead to ---------------------------------------------------------------------------------------------

# Not: commands, numbers of models, and what goes out to the network or takes long where it is meant.
_TRAINED = {key.name: key for key in KEYS if key.scope != "command" and key.name.count(".") < 2 + key.name.startswith("TRAIN.")
            and key.name not in ("BASE", "TRACKER", "DEVICE", "COMPILE", "TRAIN.EPOCHS", "TRAIN.ITERATIONS", "DATA.DATA_PATH",
                                 "DATA.IMG_SIZE", "MODEL.TYPE", "MODEL.PRETRAINED", "DATA.NUM_WORKERS", "OUTPUT", "TASK",
                                 "DATA.REPEATED_AUG", "AUG.RECOUNT")}
_WORDS = ["rand-m9-mstd0.5-inc1", "rand-m999-n99", "rand-n1000000000", "rand", "augmix-m5-w9", "original", "autoaugment", "rand-x",
          "rand-m-1", "rand-mnan", "rand-m9-mstd1e300", "balanced", "effective", "sqrt", "1/2", "2/99", "adam", "lars", "*"]
_NUMBERS = ["0", "1", "2", "0.5", "1e-300", "1e-9", "0.999999", "1e6", "1000", "999999999999999999", "3.7"]
_LISTS = ["[0.001, 1000]", "[1e-9, 1]", "[1, 1]", "[0.5, 0.5, 0.5]", "[1e-300, 1]", "[0, 0, 0]", "[1e30, 1e30, 1e30]", "[0, 1e6]",
          "[0.9, 0.999]", "[0, 0]", "[0.1]", "['*']"]


@functools.cache
def _values(name: str) -> st.SearchStrategy[tuple[str, str]]:
    """Values that a key takes, at the edges of what it does, and sometimes others."""
    key = _TRAINED[name]
    good = []
    for value in [*key.choices, "True", "False", *_WORDS, *_NUMBERS, *_LISTS]:
        with contextlib.suppress(ValueError):
            made = key.kind(value)
            if (not key.choices or made in key.choices) and (key.rule is None or key.rule.holds(made)):
                good.append(value)
    fitting = st.sampled_from(good) if good else TEXTS
    return st.tuples(st.just(name), st.integers(0, 9).flatmap(lambda number: fitting if number else TEXTS))


@inputs(6)
@given(st.lists(st.sampled_from(sorted(_TRAINED)).flatmap(_values), min_size=1, max_size=2))
def test_values_of_keys_in_training(tmp_path_factory: pytest.TempPathFactory, run: Path, pairs: list[tuple[str, str]]) -> None:
    folder = _fresh(tmp_path_factory, "values")
    if any("\0" in value for _, value in pairs):
        return
    with inside(folder):
        call("--cfg", run.parent.parent.parent / "tiny.yaml", "--opts", *(word for pair in pairs for word in pair))
    assert set(os.listdir(folder)) <= {"output"}
