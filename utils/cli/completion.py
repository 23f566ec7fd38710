"""``--completion SHELL``: a script that completes this program's command line, made from its parser.

Not by shtab, which completes a program called by its own name: this one is started by python and torchrun, and --opts takes keys and
values in turn.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

from config import KEY, MODEL_TYPES
from utils.cli.flags import FILE_ARGUMENTS, all_flags
from utils.cli.suggestions import primary

SHELLS = ("bash", "zsh", "fish")

def completion_text(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for one of ``SHELLS``."""
    return dict(bash=_bash, zsh=_zsh, fish=_fish)[shell](_flags(parser))


def _flags(parser: argparse.ArgumentParser) -> list[tuple[str, str, str]]:
    """(flag, what it takes: nothing, words, yaml, keys, files or text, meaning) of every flag, in the spelling with dashes."""
    found, words = [], _words()
    for action in parser._actions:
        name = primary(action)
        if action.nargs == 0:
            kind = "nothing"
        elif name in words:
            kind = "words"
        elif name in ("--cfg", "--opts"):
            kind = "yaml" if name == "--cfg" else "keys"
        else:
            kind = "files" if action.metavar in FILE_ARGUMENTS else "text"
        found.append((name, kind, " ".join((action.help or "").split())))
    return found


def _words() -> dict[str, Sequence[str]]:
    """What may stand behind a flag, where its key knows."""
    found = {flag.name: KEY[flag.key].choices or KEY[flag.key].words for flag in all_flags() if flag.fixed is None}
    return {name: words for name, words in found.items() if words} | {"--completion": SHELLS}


def _keys() -> str:
    return " ".join(key for key in KEY if key != "BASE")


def _bash(flags: list[tuple[str, str, str]]) -> str:
    words = _words()
    by_kind = {kind: "|".join(name for name, k, _ in flags if k == kind) for kind in ("yaml", "keys", "files")}
    cases = "\n".join(f"        {name}) COMPREPLY=($(compgen -W {shlex.quote(' '.join(words[name]))} -- \"$cur\"));;"
                      for name, kind, _ in flags if kind == "words")
    return f"""\
# Completion of main.py for bash; put it where bash reads it:
#   python main.py --completion bash >> ~/.bashrc
# It also stands in for python's own completion; where main.py is not on the line, files are completed as ever.
_trainer_main_py() {{
    local IFS=$' \\t\\n' cur=${{COMP_WORDS[COMP_CWORD]}} flag= at found= word
    for word in "${{COMP_WORDS[@]:0:COMP_CWORD}}"; do
        case $word in main.py|*/main.py) found=1;; esac
    done
    [ -n "$found" ] || return 0
    [ "$cur" = "=" ] && cur=
    for ((at = COMP_CWORD - 1; at > 0; at--)); do
        case ${{COMP_WORDS[at]}} in --*) flag=${{COMP_WORDS[at]}}; break;; esac
    done
    case $cur in
        -*) COMPREPLY=($(compgen -W {shlex.quote(' '.join(name for name, *_ in flags))} -- "$cur")); return 0;;
    esac
    case ${{flag//_/-}} in
{cases}
        {by_kind['yaml']})
            IFS=$'\\n'
            COMPREPLY=($(compgen -d -- "$cur"; compgen -f -X '!*.yaml' -- "$cur"; compgen -f -X '!*.yml' -- "$cur"))
            compopt -o filenames 2>/dev/null;;
        {by_kind['keys']})
            if (( (COMP_CWORD - at) % 2 )); then
                COMPREPLY=($(compgen -W {shlex.quote(_keys())} -- "$cur"))
            elif [ "${{COMP_WORDS[COMP_CWORD-1]}}" = MODEL.TYPE ]; then
                COMPREPLY=($(compgen -W {shlex.quote(' '.join(MODEL_TYPES))} -- "$cur"))
            fi;;
        {by_kind['files']})
            IFS=$'\\n'
            COMPREPLY=($(compgen -f -- "$cur"))
            compopt -o filenames 2>/dev/null;;
    esac
    return 0
}}
complete -o bashdefault -o default -F _trainer_main_py python python3 torchrun main.py"""


def _zsh(flags: list[tuple[str, str, str]]) -> str:
    words = _words()
    def spec(name: str, kind: str, meaning: str) -> str:
        shown = meaning.replace("\\", "").replace("[", "(").replace("]", ")").replace(":", "\\:").replace("%", "%%")
        value = {"nothing": "", "words": f":word:({' '.join(words.get(name, ()))})", "yaml": ':file:_files -g "*.(yaml|yml)"',
                 "keys": f":key:({_keys()})", "files": ":file:_files", "text": ":value:"}[kind]
        return "        " + shlex.quote(f"*{name}[{shown}]{value}")

    specs = " \\\n".join(spec(*flag) for flag in flags)
    return f"""\
# Completion of main.py for zsh; after compinit:
#   python main.py --completion zsh >> ~/.zshrc
_trainer_main_py() {{
    local at=${{words[(I)(*/|)main.py]}}
    if (( at == 0 || at >= CURRENT )); then
        _default
        return
    fi
    shift $(( at - 1 )) words
    (( CURRENT -= at - 1 ))
    _arguments -s \\
{specs}
}}
compdef _trainer_main_py python python3 torchrun main.py"""


def _fish(flags: list[tuple[str, str, str]]) -> str:
    words = _words()
    lines = ["# Completion of main.py for fish:",
             "#   python main.py --completion fish > ~/.config/fish/conf.d/trainer.fish",
             "function __trainer_main_py; string match -qr '(^|/)main\\.py$' -- (commandline -opc); end"]
    for command in ("python", "python3", "torchrun", "main.py"):
        for name, kind, meaning in flags:
            value = {"nothing": "", "words": f" -x -a {shlex.quote(' '.join(words.get(name, ())))}",
                     "yaml": " -r -k -a '(__fish_complete_suffix .yaml)'", "keys": f" -x -a {shlex.quote(_keys())}", "files": " -r -F",
                     "text": " -x"}[kind]
            shown = meaning if len(meaning) <= 80 else meaning[:77] + "..."
            lines.append(f"complete -c {command} -n __trainer_main_py -l {name[2:]}{value} -d {_fish_quoted(shown)}")
    return "\n".join(lines)


def _fish_quoted(text: str) -> str:
    """fish knows no ``'\"'\"'``: inside single quotes a backslash stands before a quote."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
