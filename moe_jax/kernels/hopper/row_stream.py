"""Rows of a matrix that pass through shared memory one after the other, for a warpgroup that looks at each as a whole.

A CTA takes every so many-th row. A bulk copy brings a row, whatever its length: no tensor map, no limit of 256 elements. What
lies behind its end in shared memory is zero. Registers take it in tiles of 1024 columns, eight neighbours a thread; seen as
``[groups, columns of a group]``, a group is the matter of a few lanes of one warp, which find its maximum with shuffles.

The interpreter knows no reshaped references: there the values are reshaped.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax import _compat
from moe_jax.kernels.hopper import tiles

TILE = 1024  # columns that a warpgroup holds as one
BLOCKS = (32, 64, 128)  # columns of a group
_IN_FLIGHT = 12 * 1024  # bytes on their way into a CTA that are enough
_BUFFER_BYTES = 200 * 1024  # shared memory of all CTAs of a multiprocessor


@functools.cache
def layout(block: int) -> Any:
    """How registers hold a tile ``[TILE / block, block]``."""
    a_warp = 256 // block  # groups
    return _compat.tiled_layout(
        ((4 * a_warp, block), (a_warp, block), (8,)), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
    )


def a_group(value: Any, block: int) -> Any:
    """One value for all groups of a tile, ``[TILE / block]``."""
    return plgpu.layout_cast(jnp.full((TILE // block,), value), layout(block).reduce(1))


def spread(values: Any, block: int) -> Any:
    """A value a group, repeated over its columns: a tile."""
    return plgpu.layout_cast(lax.broadcast_in_dim(values, (TILE // block, block), [0]), layout(block))


@dataclasses.dataclass(frozen=True)
class View:
    """A row in shared memory as tiles.

    Attributes:
        ref: ``[columns rounded up to tiles]``.
        block: columns of a group.
        interpret: the kernel is interpreted.
    """

    ref: Any
    block: int
    interpret: bool

    def load(self, tile: int) -> Any:
        """A tile in registers."""
        part, shape = self.ref.at[pl.ds(tile * TILE, TILE)], (TILE // self.block, self.block)
        if self.interpret:
            return part[...].reshape(shape)
        return plgpu.load(part.reshape(shape), layout=layout(self.block))

    def store(self, tile: int, values: Any) -> None:
        """A tile from registers."""
        part = self.ref.at[pl.ds(tile * TILE, TILE)]
        if self.interpret:
            part[...] = values.reshape(TILE)
        else:
            part.reshape(values.shape)[...] = values


@dataclasses.dataclass(frozen=True)
class Plan:
    """Who takes which rows of ``x`` [T, H], and how many are in shared memory.

    Attributes:
        tokens: T.
        columns: H.
        dtype: of x.
        ahead: rows on their way in while one is looked at.
        workers: CTAs.
    """

    tokens: int
    columns: int
    dtype: Any
    ahead: int
    workers: int

    @classmethod
    def of(cls, x: Any, multiprocessors: int, ctas_per_sm: int, more_bytes: int = 0, ahead: int | None = None) -> Plan:
        """As many CTAs as fit, if each needs `more_bytes` of shared memory a column beside the rows."""
        tokens, columns = x.shape
        ahead = ahead or min(4, max(1, _IN_FLIGHT // (columns * x.dtype.itemsize)))
        buffers = pl.cdiv(columns, TILE) * TILE * ((ahead + 1) * x.dtype.itemsize + more_bytes)
        ctas = max(1, min(ctas_per_sm, _BUFFER_BYTES // buffers))
        return cls(tokens, columns, x.dtype, ahead, min(multiprocessors * ctas, tokens))

    @property
    def tiles(self) -> int:
        """Of a row, the last one filled up."""
        return pl.cdiv(self.columns, TILE)

    @property
    def scratch(self) -> list[Any]:
        """What `Stream` needs of shared memory."""
        stages = self.ahead + 1
        return [
            plgpu.SMEM((stages, self.tiles * TILE), self.dtype),
            plgpu.Barrier(num_arrivals=1, num_barriers=stages),
        ]

    @staticmethod
    def fits(x: Any, more_bytes: int = 0) -> bool:
        """Whether two rows fit in shared memory."""
        return pl.cdiv(x.shape[1], TILE) * TILE * (2 * x.dtype.itemsize + more_bytes) <= _BUFFER_BYTES


class Stream:
    """The rows of one CTA. Between two of them there must be a `plgpu.commit_smem`, by which all threads are done with the first.

    Args:
        plan: the plan.
        x: reference ``[T, H]``.
        rows: shared memory, and
        full: its barriers, of `Plan.scratch`.
        counted: of the T rows the first so many count; None for all.
    """

    def __init__(self, plan: Plan, x: Any, rows: Any, full: Any, counted: Any = None):
        self._plan, self._x, self._rows, self._full = plan, x, rows, full
        self.worker = lax.axis_index("sm")
        total = plan.tokens if counted is None else jnp.clip(counted, 0, plan.tokens)
        self.size = tiles.share(total, self.worker, plan.workers)
        self._start()

    def _start(self) -> None:
        plan = self._plan
        if plan.columns % TILE:
            for slot in range(plan.ahead + 1):
                self._rows[slot, pl.ds((plan.tiles - 1) * TILE, TILE)] = jnp.zeros((TILE,), plan.dtype)
            plgpu.commit_smem()
        pl.loop(0, jnp.minimum(plan.ahead, self.size))(self._fetch)

    def _fetch(self, i: Any) -> None:
        slot = lax.rem(i, self._plan.ahead + 1)
        target = self._rows.at[slot, pl.ds(0, self._plan.columns)]
        mode = plgpu.OOBFillMode.PROMISE_IN_BOUNDS  # what a plain bulk copy asks for
        plgpu.copy_gmem_to_smem(self._x.at[self.token(i)], target, self._full.at[slot], oob_mode=mode)

    def token(self, i: Any) -> Any:
        """Where row `i` of this CTA is in x."""
        return self.worker + i * self._plan.workers

    def wait(self, i: Any) -> Any:
        """Row `i` of this CTA in shared memory, after all before it."""
        pl.when(i + self._plan.ahead < self.size)(lambda: self._fetch(i + self._plan.ahead))
        slot = lax.rem(i, self._plan.ahead + 1)
        plgpu.barrier_wait(self._full.at[slot])
        return self._rows.at[slot]
