"""Which tiles a multiprocessor takes: every n-th of all, but where some experts are crowded and others nearly empty.

A group of several tiles reads its weights once for all of them and is bound by the tensor cores; a group of a few rows is bound
by memory. One after the other, each of the two would idle while the other works. So groups of several tiles get as many workers
as their share of the rows asks for, until they are done: side by side, for the tiles of a group have to read the same weights
at the same time, while they are in L2. The other workers begin with the rest, and who is done first goes on with what is left.

Everything here is scalar arithmetic in a kernel, from what grouping has counted on the GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.kernels.hopper.tiles import share, visit

_ROWS_WHILE_READ = (
    192  # that a multiprocessor multiplies while it reads a tile's weights at its share of memory's speed
)
_MORE = 16  # rows that a tile multiplies beyond those that it has


class Apart(NamedTuple):
    """How workers are divided; zeros where they are not.

    Attributes:
        tiles: row tiles that have workers of their own.
        workers: how many.
        rounds: of the other workers, each a tile for every one of them, before all take what is left.
    """

    tiles: Any
    workers: Any
    rounds: Any


def divide_workers(crowded: Any, m_tiles: jax.Array, n_tiles: int, workers: int) -> Apart:
    """The division that lets both sides end at about the same time.

    Args:
        crowded: tiles of groups that need several, their rows, and the rows of the others: `Groups.crowded`.
        m_tiles: row tiles.
        n_tiles: columns of tiles.
        workers: their number.
    """
    several, single = crowded[0], m_tiles - crowded[0]
    rows, others = crowded[1].astype(jnp.float32), crowded[2].astype(jnp.float32)
    several_f, single_f = several.astype(jnp.float32), single.astype(jnp.float32)
    # Tiles of the one kind have twice as many rows as those of the other, and reading all weights takes as long as multiplying.
    uneven = (several > 0) & (single > 0) & (rows * single_f >= 2 * others * several_f)
    uneven = uneven & (_ROWS_WHILE_READ * single_f >= rows + others)
    others = others + _MORE * single_f
    tiles = several * n_tiles
    wanted = rows * workers / (rows + others + 1)  # workers
    rounds = jnp.maximum((tiles.astype(jnp.float32) / (wanted + 1e-3) + 0.5).astype(jnp.int32), 1)
    own = jnp.clip(lax.div(tiles + rounds - 1, rounds), 1, workers - 1)
    rounds = lax.div(tiles + own - 1, own)
    meantime = (rounds.astype(jnp.float32) * rows * single_f / (others * several_f + 1)).astype(jnp.int32)
    meantime = jnp.minimum(meantime, lax.div(single * n_tiles, workers - own))
    return Apart(*(jnp.where(uneven, value, 0) for value in (several, own, meantime)))


class Walk:
    """The (m, n) tiles of a worker, one after the other.

    Args:
        worker: number of this worker.
        workers: their number; at least 2 with `crowded`.
        m_tiles: row tiles.
        n_tiles: columns of tiles.
        band: as in `visit`.
        order: the row tiles, those of groups of several first; None for the order that they have.
        crowded: as in `divide_workers`; with `order`.
    """

    def __init__(self, worker, workers: int, m_tiles, n_tiles: int, band: int, order=None, crowded=None):
        self._worker, self._workers, self._m_tiles, self._n_tiles, self._band = worker, workers, m_tiles, n_tiles, band
        self._order, self._apart = order, None
        self.count = share(m_tiles * n_tiles, worker, workers)
        if crowded is None:
            return
        self._apart = apart = divide_workers(crowded, m_tiles, n_tiles, workers)
        self._is_own = worker < apart.workers
        own = share(apart.tiles * n_tiles, worker, jnp.maximum(apart.workers, 1))
        self._first = jnp.where(self._is_own, own, apart.rounds)  # tiles before those that all take
        self._taken = apart.rounds * (workers - apart.workers)
        self._turn = (
            worker - apart.workers + jnp.where(self._is_own, workers, 0)
        )  # who has workers of its own comes last
        self.count = self._first + share((m_tiles - apart.tiles) * n_tiles - self._taken, self._turn, workers)

    def tile(self, i) -> tuple[jax.Array, jax.Array]:
        """Row tile and column of the `i`-th."""
        apart, worker, workers = self._apart, self._worker, self._workers
        if apart is None:
            return visit(worker + i * workers, self._m_tiles, self._n_tiles, self._band)
        alone = jnp.where(
            self._is_own, i * apart.workers + worker, i * (workers - apart.workers) + worker - apart.workers
        )
        index = jnp.where(i < self._first, alone, self._taken + (i - self._first) * workers + self._turn)
        of_several = self._is_own & (i < self._first)
        number = jnp.where(of_several, apart.tiles, self._m_tiles - apart.tiles)
        m, n = visit(index, number, self._n_tiles, self._band)
        return self._order[m + jnp.where(of_several, 0, apart.tiles)], n
