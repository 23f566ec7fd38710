"""The command line, made from the tables of commands and flags; its mistakes are one sentence."""

from __future__ import annotations

import argparse
import importlib
import os
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from config import COMMANDS, KEY, KEYS, ConfigError, Flag, converted, describe_keys
from data.messages import Notice
from utils.cli.completion import SHELLS
from utils.cli.flags import FILE_ARGUMENTS, GROUPS, OLD_FLAGS, PRINT_FLAGS, all_flags
from utils.cli.suggestions import primary, require_pairs, unknown


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """The parser; every flag sets a key of the config, or prints something and stops."""
    parser = Parser(
        prog="main.py", description=description, formatter_class=Formatter, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        epilog=f"{len(KEYS)} keys for --opts and YAML files: --help-keys lists them, --help-keys MIXUP those with that word.\n"
               "Flags may be written with underscores too.\n\n"
               "exit status: 0 done, 1 failure, 2 usage or configuration, 3 data or checkpoint unusable,\n"
               "4 loss, gradients or weights are no longer finite, 75 stopped by a signal with a checkpoint written\n"
               "(the same command continues); torchrun reports 1 for any of them")
    parser.add_argument("--cfg", metavar="FILE", help="YAML file of the config tree; its BASE files are merged first")
    parser.add_argument("--opts", metavar="KEY VALUE", nargs="*", action="extend", help="any keys of the tree (--help-keys)")
    for flag in PRINT_FLAGS:
        parser.add_argument(flag.name, action=_Print, nargs=flag.values if flag.values != 1 else None, function=flag.function,
                            metavar=flag.metavar, help=flag.help, choices=SHELLS if flag.name == "--completion" else None)
    titled = {"instead of training": [command.flag for command in COMMANDS]}
    titled |= {f"of {command.flag.name}": list(command.flags) for command in COMMANDS if command.flags}
    titled |= GROUPS
    titled |= {"understood from other trainers": list(OLD_FLAGS)}
    for title, flags in titled.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            _add(group, flag)
    return parser


def _add(group: Any, flag: Flag) -> None:
    spellings = [flag.name] if flag.name.count("-") == 2 else [flag.name, "--" + flag.name[2:].replace("-", "_")]
    shared = dict(dest=_destination(flag), help=(flag.help or KEY[flag.key].explanation).replace("%", "%%"))
    if flag.fixed is not None:
        group.add_argument(*spellings, action="store_const", const=flag.fixed, **shared)
    else:
        several = dict(nargs="+", action="extend") if flag.several else {}  # repeated flags add up
        group.add_argument(*spellings, metavar=metavar(flag), **several, **shared)


def _destination(flag: Flag) -> str:
    return flag.name[2:].replace("-", "_")


def metavar(flag: Flag) -> str:
    """The word that stands for a flag's argument in the help."""
    return flag.metavar or flag.name.rpartition("-")[2].upper()


def parse(argv: Sequence[str] | None = None, description: str | None = None) -> tuple[str | None, list[str], list[Notice]]:
    """(YAML file, ``[KEY, VALUE, ...]``, lines of advice) of a command line.

    Raises:
        ConfigError: an unknown flag, with the nearest known ones, or a value of the wrong kind.
    """
    parser = build_parser(description)
    args, left_over = parser.parse_known_args(argv)
    if left_over:
        raise unknown(left_over[0], parser)
    given = vars(args)
    opts, advice = list(given.get("opts", [])), []
    require_pairs(opts)
    for flag in all_flags():
        if (value := given.get(_destination(flag))) is not None:
            # An unset shell variable: something else would be done without a word, such as training from scratch.
            if metavar(flag) in FILE_ARGUMENTS and "" in (value if flag.several else [value]):
                raise ConfigError(f"{flag.name} was given an empty value; give {metavar(flag)}, or leave {flag.name} out")
            converted(flag.key, value, flag.name)  # a mistake is told under the name that was typed
            opts += [flag.key, value]
    for flag in OLD_FLAGS:
        if (value := given.get(_destination(flag))) is not None:
            opts += [flag.key, value]
            advice.append(Notice(f"{flag.name} {flag.help}"))
    return given.get("cfg"), opts, advice


def asks_for_light_command(opts: Sequence[str]) -> bool:
    """Whether ``[KEY, VALUE, ...]`` ask for a command that may need neither torch nor the config in a checkpoint."""
    return "MODEL.RESUME" not in opts and any(command.light and command.flag.key in opts[::2] for command in COMMANDS)


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help with one spelling of each flag, and a short word for its argument."""

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


class _Print(argparse.Action):
    """Prints what ``function`` (module:function) returns and ends the program."""

    def __init__(self, *args: Any, function: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.function = function

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None) -> None:
        module, _, name = self.function.partition(":")
        print(getattr(importlib.import_module(module), name)(parser, values))
        parser.exit()


def keys_text(_: argparse.ArgumentParser, word: str | None) -> str:
    """Every key with its default and meaning, or those that hold ``word``."""
    if not word:
        return "keys for --opts and YAML files, with their defaults:\n" + describe_keys()
    found = [line.strip() for line in describe_keys().splitlines() if line.startswith("    ") and word.lower() in line.lower()]
    if not found:
        raise ConfigError(f"no key and no meaning of one holds {word!r}; --help-keys alone lists all")
    return "\n".join(found)
