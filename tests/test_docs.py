"""What the pages tell people to type is understood, and what they point to is there."""

from __future__ import annotations

import functools
import re
import shlex
from pathlib import Path

import pytest

from config import KEYS, get_config
from utils.cli.parser import build_parser, parse

ROOT = Path(__file__).parent.parent
NODES = {key.partition(".")[0] for key, *_ in KEYS if "." in key}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[str]:
    """Commands of the indented lines and of the inline code of a page, continuation lines joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    text = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    found = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    found += re.findall(r"`([^`\n]*\n?[^`\n]*)`", text)
    return [" ".join(command.split()) for command in found if re.search(r"\b(python|torchrun|bash|sbatch|srun)\s", command)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_understood(page: Path) -> None:
    for command in commands(page):
        words = shlex.split(command, comments=True)
        for word in words:
            if word.startswith(("scripts/", "configs/")):
                assert (ROOT / word).is_file(), f"{page.name}: {command}: there is no {word}"
            if word.startswith("scripts/") and word.endswith(".py"):
                flags = {w.partition("=")[0] for w in words[words.index(word):] if w.startswith("--")}
                assert flags <= _flags(word.removeprefix("scripts/")), f"{page.name}: {command}"
        if "main.py" in words and not {"...", "--help"} & set(words):
            cfg, opts, advice = parse(words[words.index("main.py") + 1:])
            get_config(ROOT / cfg if cfg else None, opts)
            assert not advice, f"{page.name}: {command}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_keys_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"
    keys = get_config()
    for key in re.findall(rf"\b((?:{'|'.join(NODES)})(?:\.[A-Z_]+)+)", text):
        node = keys
        for part in key.split("."):
            assert part in node, f"{page.name}: no key {key}"
            node = node[part]
    for flag in re.findall(r"`(--[a-z][a-z0-9_-]+)", text):
        assert flag in _flags() | {"--shutdown-timeout", "--max-restarts", "--nodes"}, f"{page.name}: no flag {flag}"


@functools.cache
def _flags(script: str = "") -> set[str]:
    """Flags of main.py, and of the scripts, or of one of these alone (what looks like one in it)."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "scripts").glob(script or "*.py")]
    own = {flag for text in texts for flag in re.findall(r"--[a-z]+(?:-[a-z]+)*", text)}
    return own if script else own | {option for action in build_parser()._actions for option in action.option_strings}
