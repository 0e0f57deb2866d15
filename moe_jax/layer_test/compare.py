"""How far an output is from the reference, and outputs that must be far from it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def worst_error(out: np.ndarray, expected: np.ndarray, counts: Sequence[int]) -> float:
    """The largest relative Frobenius error of a shard's tokens: one that is wrong does not hide among the others.

    Args:
        out: ``[tokens, k]``.
        expected: the same.
        counts: tokens of each shard, one shard after the other.

    Example:
        >>> expected = np.array([[3.0], [4.0], [1.0]])
        >>> worst_error(np.array([[3.0], [4.0], [1.5]]), expected, [2, 0, 1])
        0.5
    """
    assert out.shape == expected.shape and sum(counts) == len(expected), (out.shape, expected.shape, counts)
    stops = np.cumsum(counts)
    shards = [(out[stop - n : stop], expected[stop - n : stop]) for n, stop in zip(counts, stops, strict=True) if n]
    return max((_relative(*shard) for shard in shards), default=0.0)


def worst_token_error(out: np.ndarray, expected: np.ndarray) -> float:
    """The largest relative error of a token.

    Example:
        >>> worst_token_error(np.array([[3.0, 4.0], [0.0, 2.0]]), np.array([[3.0, 4.0], [0.0, 1.0]]))
        1.0
    """
    return max(map(_relative, out, expected), default=0.0)


def _relative(out: np.ndarray, expected: np.ndarray) -> float:
    if not np.isfinite(out).all():
        return float("inf")
    difference, size = (np.linalg.norm(a.astype(np.float64)) for a in (out - expected, expected))
    if size == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return float(difference / size)


def broken_outputs(expected: np.ndarray) -> dict[str, np.ndarray]:
    """What broken layers would give: each must fail the comparison that the layer passes.

    Example:
        >>> list(broken_outputs(np.ones((1, 2))))
        ['zero', 'scaled by 1.1', 'shifted by a column']
    """
    broken = {"zero": np.zeros_like(expected), "scaled by 1.1": 1.1 * expected}
    broken["shifted by a column"] = np.roll(expected, 1, axis=1)
    if len(expected) > 1:
        broken["shifted by a token"] = np.roll(expected, 1, axis=0)
        one = expected.copy()
        one[-1] = 0.0
        broken["without its last token"] = one
    return broken
