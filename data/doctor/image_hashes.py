"""Finds exact and near-duplicates among millions of images.

Exact ones have equal SHA-256. For near ones each image has a fingerprint of 128 bits (``image_record.py``): those of images that were
compressed again or resized differ in a few bits, those of unrelated ones in about half. Two fingerprints that differ in at most 11
bits differ in at most one bit of one of six bands; so looking each band up in a sorted list, as it is and with each bit flipped,
finds every such pair without comparing all with all.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_BANDS = ((0, 22), (22, 43), (43, 64), (64, 86), (86, 107), (107, 128))  # bits; none crosses from one word to the other
_QUERY_CHUNK = 2048
_MOST_HITS = 1024  # for one key of a band; so many equal ones are even areas, which tell no images apart


def equal_groups(sha256: np.ndarray) -> Iterator[np.ndarray]:
    """Groups of equal digests, each as two or more ascending positions.

    Args:
        sha256: (images, 32) uint8.
    """
    words = np.ascontiguousarray(sha256[:, :16]).view(np.uint64)  # 128 bits of it: never equal by chance
    order = np.lexsort((np.arange(len(words)), words[:, 1], words[:, 0]))
    if len(order) < 2:
        return
    differs = np.any(words[order[1:]] != words[order[:-1]], axis=1)
    starts = np.concatenate([[0], np.flatnonzero(differs) + 1, [len(order)]])
    for group in np.flatnonzero(np.diff(starts) > 1):
        yield order[starts[group]:starts[group + 1]]


def near_pairs(known: np.ndarray, queries: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(positions in ``queries``, positions in ``known``, bits) of every query with its nearest known fingerprint, where they differ in at
    most ``distance`` bits.

    Args:
        known, queries: (images, 2) uint64 fingerprints.
        distance: 0 to 11.
    """
    best = np.full(len(queries), 255, dtype=np.int64)
    match = np.full(len(queries), -1, dtype=np.int64)
    known, first_of = np.unique(known, axis=0, return_index=True)
    for low, high in _BANDS if len(known) and len(queries) else ():
        keys = _band(known, low, high)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        flips = np.concatenate([[0], 1 << np.arange(high - low)]).astype(np.uint32)
        for start in range(0, len(queries), _QUERY_CHUNK):
            chunk = queries[start:start + _QUERY_CHUNK]
            probes = (_band(chunk, low, high)[:, None] ^ flips).ravel()
            first = np.searchsorted(keys, probes, "left")
            counts = np.searchsorted(keys, probes, "right") - first
            counts[counts > _MOST_HITS] = 0
            for probe, position in _hits(first, counts):
                query, found = probe // len(flips), order[position]
                bits = _count_bits(chunk[query] ^ known[found])
                near = np.flatnonzero(bits <= distance)
                near = near[np.lexsort((first_of[found[near]], bits[near]))][::-1]  # the nearest is written last
                query, found, bits = query[near] + start, found[near], bits[near]
                better = (bits < best[query]) | ((bits == best[query]) & (first_of[found] < first_of[match[query]]))
                best[query[better]], match[query[better]] = bits[better], found[better]
    matched = np.flatnonzero(match >= 0)
    return matched, first_of[match[matched]], best[matched]


def _band(hashes: np.ndarray, low: int, high: int) -> np.ndarray:
    word = low // 64
    return ((hashes[:, word] >> np.uint64(low - 64 * word)) & np.uint64((1 << (high - low)) - 1)).astype(np.uint32)


def _hits(first: np.ndarray, counts: np.ndarray, most: int = 1 << 22) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(probes, positions) of all hits, some millions at a time; those of probe i are ``counts[i]`` from ``first[i]`` on."""
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


def _count_bits(words: np.ndarray) -> np.ndarray:
    """Bits that are set in each row; numpy counts them from 2.0 on."""
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(words).sum(axis=1, dtype=np.int64)
    return np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1).sum(axis=1, dtype=np.int64)
