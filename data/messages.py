"""Lines for the user, with a level, for code that finds something before there is a logger."""

from __future__ import annotations

import logging

NOTICE = 25  # a level between logging's INFO and WARNING: nothing is wrong, but it is not what one might expect


class Message(str):
    """A line as it is told, without the name of its level.

    Attributes:
        level: of ``logging``.
        code: a word for what finds the same in its own way (the doctor), so that it is not told twice.
    """

    level = logging.INFO
    code: str

    def __new__(cls, text: str, code: str = ""):
        line = super().__new__(cls, text)
        line.code = code
        return line


class Notice(Message):
    """Not what one might expect, and nothing wrong."""

    level = NOTICE


class Caution(Message):
    """Something is probably wrong."""

    level = logging.WARNING
