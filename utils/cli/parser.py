"""What helps at the command line: flags as they are shown, words of other trainers, sentences for mistakes. Imports no torch."""

from __future__ import annotations

import argparse
import importlib
import os
import re
from typing import Any, NoReturn

from config import ConfigError, describe_keys
from utils.cli.suggestions import primary


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help with one spelling of each flag, and a short word for its value."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=min(120, max(80, _columns())))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        value = "" if action.nargs == 0 else " " + self._format_args(action, action.metavar or action.dest.upper())
        return ", ".join([*(o for o in action.option_strings if not o.startswith("--")), primary(action)]) + value

    def _format_usage(self, *_: Any) -> str:
        return "usage: main.py [--cfg FILE] [flags] [--opts KEY VALUE ...]\n\n"


def _columns() -> int:
    try:
        return os.get_terminal_size().columns - 2
    except OSError:
        return 120


_VALUES = {"--resume": "FILE", "--pretrained": "FILE", "--compare": "FILE", "--per-class": "FILE", "--real-labels": "FILE",
           "--show-batch": "FILE", "--show-attention": "IMAGE", "--show-token": "Y,X", "--doctor-json": "FILE", "--labels": "SET",
           "--predict": "PATH", "--topk": "NUMBER", "--csv": "FILE", "--json": "FILE", "--features": "FILE", "--sheet": "FILE",
           "--export": "FILE", "--report": "RUN", "--diff": "RUN", "--compile": "HOW",
           "--output": "FOLDER", "--data-path": "PATH", "--optim": "NAME", "--amp-opt-level": "LEVEL"}


def metavar(flag: str) -> str:
    """The word that stands for a flag's value in the help: its last one, unless another says more."""
    return _VALUES.get(flag, flag.rpartition("-")[2].upper())


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one sentence."""

    def error(self, message: str) -> NoReturn:
        named = re.match(r"argument ([^:]+): (.*)", message, re.S)
        if named is None:
            raise ConfigError(message)
        flag, what = named[1].partition("/")[0], named[2]
        told = {"expected one argument": "needs a value", "expected at least one argument": "needs at least one value"}.get(what)
        ignored = re.match(r"ignored explicit argument (.*)", what, re.S)
        if ignored:
            told = f"takes no value ({ignored[1]} was given)"
        raise ConfigError(f"{flag} {told or what}" + ("" if told is None else "; see --help"))


class Tell(argparse.Action):
    """A flag that prints something and ends the program: ``function`` of ``module`` is called with (parser, value)."""

    def __init__(self, *args: Any, module: str, function: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.module, self.function = module, function

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None) -> None:
        print(getattr(importlib.import_module(self.module), self.function)(parser, values))
        parser.exit()


def keys_text(_: argparse.ArgumentParser, word: str | None) -> str:
    """Every key with its default and meaning, or those that hold ``word``."""
    if not word:
        return "keys for --opts and YAML files, with their defaults:\n" + describe_keys()
    found = [line.strip() for line in describe_keys().splitlines() if line.startswith("    ") and word.lower() in line.lower()]
    if not found:
        raise ConfigError(f"no key and no meaning of one holds {word!r}; --help-keys alone lists all")
    return "\n".join(found)
