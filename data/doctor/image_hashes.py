"""Images that are the same, byte for byte or to the eye, among millions.

Bytes are compared by SHA-256. For the eye each image has a fingerprint of 128 bits (``data/examine.py``): pictures that were
compressed anew or resized differ in a few of them, unrelated ones in about half. Two fingerprints that differ in at most 11 bits differ
in at most one bit of one of six bands, so that looking each band up, as it is and with each bit turned, in a sorted list finds
every such pair without comparing all with all.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_BANDS = ((0, 22), (22, 43), (43, 64), (64, 86), (86, 107), (107, 128))  # bits; none crosses from one word to the other
FARTHEST = 2 * len(_BANDS) - 1
_VAL_CHUNK = 2048
_CROWD = 1024  # images in one place of a band's list; so many alike are plain in that band and cannot be told apart by it


def same_bytes(sha256: np.ndarray) -> Iterator[np.ndarray]:
    """Groups (two or more positions, rising) of equal digests.

    Args:
        sha256: (images, 32) uint8.
    """
    words = np.ascontiguousarray(sha256[:, :16]).view(np.uint64)  # 128 bits of it: equal by chance never
    order = np.lexsort((np.arange(len(words)), words[:, 1], words[:, 0]))
    if len(order) < 2:
        return
    fresh = np.any(words[order[1:]] != words[order[:-1]], axis=1)
    starts = np.concatenate([[0], np.flatnonzero(fresh) + 1, [len(order)]])
    for at in np.flatnonzero(np.diff(starts) > 1):
        yield order[starts[at]:starts[at + 1]]


def near_pairs(known: np.ndarray, asked: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every asked fingerprint that has a known one within ``distance`` bits: (asked position, nearest known position, bits).

    Args:
        known, asked: (images, 2) uint64.
        distance: 0 to ``FARTHEST``.
    """
    best = np.full(len(asked), 255, dtype=np.int64)
    match = np.full(len(asked), -1, dtype=np.int64)
    known, first_of = np.unique(known, axis=0, return_index=True)
    for low, high in _BANDS if len(known) and len(asked) else ():
        keys = _band(known, low, high)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        turned = np.concatenate([[0], 1 << np.arange(high - low)]).astype(np.uint32)
        for start in range(0, len(asked), _VAL_CHUNK):
            part = asked[start:start + _VAL_CHUNK]
            probes = (_band(part, low, high)[:, None] ^ turned).ravel()
            first = np.searchsorted(keys, probes, "left")
            counts = np.searchsorted(keys, probes, "right") - first
            counts[counts > _CROWD] = 0
            for whose, where in _expanded(first, counts):
                who, found = whose // len(turned), order[where]
                bits = np.bitwise_count(part[who] ^ known[found]).sum(axis=1, dtype=np.int64) if hasattr(np, "bitwise_count") \
                    else _count(part[who] ^ known[found])
                near = np.flatnonzero(bits <= distance)
                near = near[np.lexsort((first_of[found[near]], bits[near]))][::-1]  # the nearest is written last
                who, found, bits = who[near] + start, found[near], bits[near]
                better = (bits < best[who]) | ((bits == best[who]) & (first_of[found] < first_of[match[who]]))
                best[who[better]], match[who[better]] = bits[better], found[better]
    at = np.flatnonzero(match >= 0)
    return at, first_of[match[at]], best[at]


def _band(hashes: np.ndarray, low: int, high: int) -> np.ndarray:
    word = low // 64
    return ((hashes[:, word] >> np.uint64(low - 64 * word)) & np.uint64((1 << (high - low)) - 1)).astype(np.uint32)


def _expanded(first: np.ndarray, counts: np.ndarray, most: int = 1 << 22) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(probe, position) of every hit, some millions at a time."""
    probes = np.flatnonzero(counts)
    ends = np.cumsum(counts[probes])
    begin = 0
    while begin < len(probes):
        before = ends[begin - 1] if begin else 0
        stop = max(begin + 1, int(np.searchsorted(ends, before + most, "right")))
        chosen = probes[begin:stop]
        size = counts[chosen]
        within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
        yield np.repeat(chosen, size), np.repeat(first[chosen], size) + within
        begin = stop


def _count(words: np.ndarray) -> np.ndarray:
    """Bits that are set in each row (numpy before 2.0 cannot count them)."""
    return np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1).sum(axis=1, dtype=np.int64)
