"""Reading the arrays of a large JSON file element by element: COCO's training annotations are 450 MB, as Python objects two GB."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from data.errors import DataError
from data.sources.regular_files import kind_of

_CHUNK = 4 << 20  # characters read at a time
_LARGEST = 256 << 20  # characters of one element
_BLANKS = " \t\r\n"


def read_arrays(path: str, takers: Mapping[str, Callable[[Any], None]]) -> set[str]:
    """Call ``takers[name]`` with each element of the array ``name`` of the object that a JSON file holds; other members are skipped.

    Returns:
        The names of all members.

    Raises:
        DataError: the file cannot be read, is no JSON, no object, or one of ``takers`` is no array.
    """
    reader, names = _Reader(path), set()
    with reader.file:
        if reader.next_character() != "{":
            raise DataError(f"{path}: is not a JSON object; COCO's has images, annotations and categories")
        reader.at += 1
        if reader.next_character() == "}":
            reader.at += 1
            return names
        while True:
            name = reader.value()
            if not isinstance(name, str):
                reader.fail("a name of a member was expected")
            reader.expect(":")
            names.add(name)
            if name not in takers:
                reader.value()
            elif reader.next_character() != "[":
                raise DataError(f"{path}: {name} is not an array, as it is in COCO's format")
            else:
                reader.elements(takers[name])
            if reader.expect(",}") == "}":
                return names


class _Reader:
    """A window that moves over the text of a file.

    Attributes:
        text: the characters read and not yet done with.
        at: the next of them.
    """

    def __init__(self, path: str):
        self.path, self.text, self.at, self.passed, self.ended = path, "", 0, 0, False
        self.decode = json.JSONDecoder().raw_decode
        try:
            if what := kind_of(os.stat(path).st_mode):
                raise DataError(f"{path}: is {what}; a JSON file was expected")
            self.file = open(path, encoding="utf-8-sig")  # noqa: SIM115 - closed by read_arrays
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None

    def fail(self, reason: str) -> None:
        raise DataError(f"{self.path}: is not valid JSON at character {self.passed + self.at:,} ({reason}); export or download it again")

    def more(self) -> bool:
        """Read on; False at the end of the file."""
        if self.ended:
            return False
        if len(self.text) - self.at > _LARGEST:
            self.fail(f"an element of more than {_LARGEST >> 20} million characters")
        try:
            part = self.file.read(max(_CHUNK, len(self.text) - self.at))  # an element that is long is not tried too often
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise DataError(f"{self.path}: is not UTF-8 text; save it as UTF-8") from None
        self.text, self.passed, self.at, self.ended = self.text[self.at:] + part, self.passed + self.at, 0, not part
        return bool(part)

    def next_character(self) -> str:
        """The next one that is no blank; "" at the end."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in _BLANKS:
                    return self.text[self.at]
                self.at += 1
            if not self.more():
                return ""

    def expect(self, characters: str) -> str:
        """The next one, which must be one of these, and is passed."""
        found = self.next_character()
        if not found or found not in characters:
            self.fail(f"{' or '.join(characters)} was expected")
        self.at += 1
        return found

    def value(self) -> Any:
        """The next value, which is passed."""
        self.next_character()
        while True:
            try:
                value, end = self.decode(self.text, self.at)
                if end < len(self.text) or not self.more():  # a number might go on
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                if not self.more():
                    self.fail(error.msg)
            except (ValueError, RecursionError):  # a number of thousands of digits, nested too deeply
                self.fail("a number or a nesting that is too long")

    def elements(self, take: Callable[[Any], None]) -> None:
        """The elements of the array that begins here."""
        self.expect("[")
        if self.next_character() == "]":
            self.at += 1
            return
        while True:
            take(self.value())
            if self.expect(",]") == "]":
                return
