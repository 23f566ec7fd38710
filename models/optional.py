"""Packages that only some heads of dense tasks need."""

from __future__ import annotations

import importlib
from types import ModuleType

from config import ConfigError


def optional_module(name: str, key: str) -> ModuleType:
    """The module ``name`` of a package of requirements-extras.txt.

    Args:
        key: what asked for it, for the message: ``MODEL.DENSE.HEAD upernet``.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(f"{key} needs the package {name.partition('.')[0]}, which is not installed here; "
                          "pip install -r requirements-extras.txt") from None
