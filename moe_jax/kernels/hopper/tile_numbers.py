"""What a consumer has to know of its tiles: loaded when it is needed, or a tile ahead.

The numbers of a tile are two loads from memory behind its place in the order. A tile of few rows is multiplied in 2 to 5 us; then
these half a microsecond are on their way while the tile before is multiplied. In a tile of many rows they would take registers
that the loop over K has a better use for: `matmul_bf16` says what that costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl


class Numbers:
    """Numbers of one tile, by the array in which they are.

    Args:
        tile: of which.
        known: numbers that were loaded, with their arrays.
    """

    def __init__(self, tile: Any, known: Sequence[tuple[Any, Any]] = ()):
        self._tile, self._known = tile, known

    def of(self, array: Any) -> Any:
        """Its number in an array ``[tiles]``."""
        for known, number in self._known:
            if known is array:
                return number
        return array[self._tile]


def for_tiles(
    count: Any, place: Callable[[Any], tuple[Any, Any]], arrays: Sequence[Any], ahead: bool, run: Callable[..., None]
) -> None:
    """Calls `run(i, n, numbers)` for each of a consumer's tiles, in their order.

    Args:
        count: of its tiles.
        place: the row tile and the column tile of number `i`.
        arrays: of int32 ``[tiles]``, whose numbers `run` may ask for.
        ahead: they are loaded while the tile before is multiplied.
        run: what is to be done.
    """
    if not ahead:

        @pl.loop(0, count)
        def _(i):
            m, n = place(i)
            run(i, n, Numbers(m))

        return

    def load(i):
        m, n = place(i)
        return m, n, *(array[m] for array in arrays)

    def step(i, tile):
        following = load(jnp.minimum(i + 1, count - 1))
        m, n, *numbers = tile
        run(i, n, Numbers(m, list(zip(arrays, numbers, strict=True))))
        return following

    # Without a tile there is no place to load from.
    pl.when(count > 0)(lambda: lax.fori_loop(0, count, step, load(0)) and None)
