"""Randomness is derived, never stored: a seed for each purpose from (run seed, what it is for, where it is used)."""

from __future__ import annotations

# What a seed is for: the second part of every derivation, so that no two purposes share a random stream.
ORDER, AUGMENT, MIXUP, DROPOUT, INIT = range(1, 6)
REPLACE, MASK = 101, 102

_MASK = (1 << 64) - 1


def derive(*parts: int) -> int:
    """A 63-bit seed that depends on each of ``parts`` (chained splitmix64); takes about a microsecond."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state + (part & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def derive32(*parts: int) -> int:
    """As ``derive``, in 32 bits: for numpy's legacy generator, whose streams are the same in every version of numpy."""
    return derive(*parts) & 0xFFFFFFFF
