"""Messages for the user, with a level, from code that runs before there is a logger."""

from __future__ import annotations

import logging

NOTICE = 25  # a level between logging's INFO and WARNING: nothing is wrong, but it is not what one might expect


class Message(str):
    """The text of a message, without the name of its level.

    Attributes:
        level: one of ``logging``'s levels, or ``NOTICE``.
        code: identifies messages that the doctor reports as findings of its own, so that they are not shown twice; "" for the rest.
    """

    level = logging.INFO
    code: str

    def __new__(cls, text: str, code: str = ""):
        line = super().__new__(cls, text)
        line.code = code
        return line


class Notice(Message):
    """Nothing is wrong, but it is not what one might expect."""

    level = NOTICE


class Caution(Message):
    """Something is probably wrong."""

    level = logging.WARNING
