"""Errors that libraries raise, as errors of ours: each is recognised beside what raises it."""

from __future__ import annotations

from config import ConfigError, ProgramError
from utils.runtime.compile import compile_error
from utils.runtime.distributed import peer_lost
from utils.runtime.memory import out_of_memory


def translated(error: Exception) -> ProgramError | None:
    """``error`` as one of ours; None where it is nothing that a user can cause."""
    known = (peer_lost, _single_value, out_of_memory, compile_error)
    return next((found for of in known if (found := of(error)) is not None), None)


def _single_value(error: Exception) -> ConfigError | None:
    """torch's batch norm on a map of one value a channel, for which it has no type."""
    if not isinstance(error, ValueError) or "Expected more than 1 value per channel" not in str(error):
        return None
    return ConfigError("batch norm needs more than one value a channel; raise --batch-size or --img-size")
