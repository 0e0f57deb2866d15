"""Rows of a matrix that pass through shared memory one after the other, for a warpgroup that looks at each as a whole.

A CTA takes every so many-th row. A bulk copy brings a row without a tensor map or its limit of 256 elements, if it is whole 128
bytes; others come in boxes of 256 columns. What lies behind its end in shared memory is zero. Registers take it in tiles of 16
bytes a thread, seen as ``[groups, columns of a group]``: a group is the matter of a few lanes of one warp, which find its maximum
with shuffles.
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

_BOX = 256  # columns, TMA's limit per dimension
BLOCKS = (32, 64, 128)  # columns of a group
_IN_FLIGHT = 12 * 1024  # bytes on their way into a CTA that are enough
_SHARED_BYTES = 228 * 1024  # of a multiprocessor
_BESIDE = 3200  # bytes of it that a CTA takes beside its rows: for the system, for reductions over warps, barriers


@functools.cache
def _layout(block: int, vector: int) -> Any:
    groups = 32 * vector // block  # of a warp
    if groups == 1:
        return _compat.tiled_layout(((4, block), (vector,)), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    tiling = ((4 * groups, block), (groups, block), (vector,))
    return _compat.tiled_layout(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a warpgroup holds as one.

    Attributes:
        block: columns of a group, one of `BLOCKS`.
        dtype: of the rows.
        interpret: the kernel is interpreted. The interpreter knows no reshaped references: there the values are reshaped.
    """

    block: int
    dtype: Any
    interpret: bool

    @property
    def columns(self) -> int:
        """Of a row."""
        return 128 * self._vector

    @property
    def groups(self) -> int:
        """Of these columns."""
        return self.columns // self.block

    @property
    def layout(self) -> Any:
        """How registers hold it."""
        return _layout(self.block, self._vector)

    @property
    def _vector(self) -> int:
        return 16 // jnp.dtype(self.dtype).itemsize

    def a_group(self, value: Any) -> Any:
        """One value for all groups, ``[groups]``."""
        return plgpu.layout_cast(jnp.full((self.groups,), value), self.layout.reduce(1))

    def spread(self, values: Any) -> Any:
        """A value a group, repeated over its columns."""
        return plgpu.layout_cast(lax.broadcast_in_dim(values, (self.groups, self.block), [0]), self.layout)

    def load(self, row: Any, index: int) -> Any:
        """Tile number `index` of a row in shared memory."""
        part, shape = row.at[pl.ds(index * self.columns, self.columns)], (self.groups, self.block)
        return part[...].reshape(shape) if self.interpret else plgpu.load(part.reshape(shape), layout=self.layout)

    def store(self, row: Any, index: int, values: Any) -> None:
        """Writes tile number `index` of a row in shared memory."""
        part = row.at[pl.ds(index * self.columns, self.columns)]
        if self.interpret:
            part[...] = values.reshape(self.columns)
        else:
            part.reshape(values.shape)[...] = values


@dataclasses.dataclass(frozen=True)
class Plan:
    """Who takes which rows of ``x`` [T, H], and how many are in shared memory.

    Attributes:
        tile: what is in registers.
        tokens: T.
        columns: H.
        ahead: rows on their way in while one is looked at.
        workers: CTAs.
    """

    tile: Tile
    tokens: int
    columns: int
    ahead: int
    workers: int

    @classmethod
    def of(
        cls, x: Any, tile: Tile, sms: int, ctas_per_sm: int | None, more_bytes: int = 0, ahead: int | None = None
    ) -> Plan:
        """As many CTAs as fit, if each needs `more_bytes` of shared memory a column beside the rows.

        A CTA more than a multiprocessor has room for would begin when others have ended. Up to 48 registers a thread leave room
        for 10 CTAs, up to 80 for 6: what ptxas makes of `gather_quantize` with at most two tiles in registers, and with four
        (up to 8 slots; benchmarks/machine_code.py shows how to see it).
        """
        tokens, columns = x.shape
        ahead = ahead or min(4, max(1, _IN_FLIGHT // (columns * x.dtype.itemsize)))
        in_registers = ctas_per_sm or (10 if columns <= 2 * tile.columns else 6)
        ctas = max(1, min(in_registers, _SHARED_BYTES // _bytes(x, (ahead + 1) * x.dtype.itemsize + more_bytes)))
        return cls(tile, tokens, columns, ahead, min(sms * ctas, tokens))

    @property
    def tiles(self) -> int:
        """Of a row, the last one filled up."""
        return pl.cdiv(self.columns, self.tile.columns)

    @property
    def padded_columns(self) -> int:
        """Of these tiles."""
        return self.tiles * self.tile.columns

    @property
    def is_bulk(self) -> bool:
        """Whether one bulk copy brings a row."""
        return self.columns * jnp.dtype(self.tile.dtype).itemsize % 128 == 0

    @property
    def copies(self) -> int:
        """That bring a row."""
        return 1 if self.is_bulk else pl.cdiv(self.columns, _BOX)

    @property
    def scratch(self) -> list[Any]:
        """What `Stream` needs of shared memory."""
        stages = self.ahead + 1
        return [
            plgpu.SMEM((stages, self.padded_columns), self.tile.dtype),
            plgpu.Barrier(num_arrivals=self.copies, num_barriers=stages),
        ]


def fits(x: Any, more_bytes: int = 0) -> bool:
    """Whether two rows of `x` and `more_bytes` a column fit in shared memory."""
    return _bytes(x, 2 * x.dtype.itemsize + more_bytes) <= _SHARED_BYTES


def _bytes(x: Any, a_column: int) -> int:
    return pl.cdiv(x.shape[1], 1024) * 1024 * a_column + _BESIDE


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
        tile = plan.tile
        if plan.columns % tile.columns:
            for slot in range(plan.ahead + 1):
                last = pl.ds((plan.tiles - 1) * tile.columns, tile.columns)
                rows[slot, last] = jnp.zeros((tile.columns,), tile.dtype)
            plgpu.commit_smem()
        pl.loop(0, jnp.minimum(plan.ahead, self.size))(self._fetch)

    def _fetch(self, i: Any) -> None:
        slot, plan = lax.rem(i, self._plan.ahead + 1), self._plan
        source, target, full = self._x.at[self.token(i)], self._rows.at[slot], self._full.at[slot]
        if plan.is_bulk:
            mode = plgpu.OOBFillMode.PROMISE_IN_BOUNDS  # what a plain bulk copy asks for
            plgpu.copy_gmem_to_smem(source, target.at[pl.ds(0, plan.columns)], full, oob_mode=mode)
            return

        @pl.loop(0, plan.copies)
        def _(box):
            columns = pl.ds(box * _BOX, _BOX)
            plgpu.copy_gmem_to_smem(source.at[columns], target.at[columns], full)

    def token(self, i: Any) -> Any:
        """Where row `i` of this CTA is in x."""
        return self.worker + i * self._plan.workers

    def wait(self, i: Any) -> Any:
        """Row `i` of this CTA in shared memory, after all before it."""
        pl.when(i + self._plan.ahead < self.size)(lambda: self._fetch(i + self._plan.ahead))
        slot = lax.rem(i, self._plan.ahead + 1)
        plgpu.barrier_wait(self._full.at[slot])
        return self._rows.at[slot]
