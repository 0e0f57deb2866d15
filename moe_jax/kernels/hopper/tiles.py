"""What the Hopper kernels share: how a matrix lies in shared memory, and in which order tiles are visited."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.kernels.hopper.matmul_config import FEW_ROWS


def swizzle_bytes(minor: int, dtype) -> int | None:
    """The widest swizzle (128, 64 or 32 bytes) whose rows tile an axis of `minor` elements; None if not even 32 do.

    A matrix that TMA brings into a swizzled tile must split evenly into tiles of one swizzle row. Rows of 2880 bf16
    elements allow 128 bytes, rows of 1000 none: wgmma has no narrower layout.
    """
    row_bytes = minor * jnp.dtype(dtype).itemsize
    return next((s for s in (128, 64, 32) if row_bytes % s == 0), None)


def transforms(minor: int, dtype) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """Shared-memory transforms of a wgmma operand, or of a staged output, whose matrix has `minor` columns in memory."""
    swizzle = swizzle_bytes(minor, dtype)
    assert swizzle is not None, f"{minor=} is not tileable; supports() must have said so"
    columns = swizzle // jnp.dtype(dtype).itemsize
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle)


def visit(
    index: jax.Array, m_tiles: jax.Array, n_tiles: int, group_m: int, spans: Any | None = None
) -> tuple[jax.Array, jax.Array]:
    """The (m, n) tile with number `index`: bands of `group_m` row tiles, walked column by column.

    The multiprocessors at work at one time then share few row tiles and few weight tiles, and both stay in L2. `m_tiles` lives
    on the GPU: only tiles that hold rows are visited.

    With `spans`, of each row tile the first of its expert and the one after the last, a band is of one expert: tiles that share
    its weights are walked together, and no others. A band of several experts takes weights from pages of memory far apart, and
    an expert whose tiles are in two bands is read twice. Layers on an H100, before and with that (2026-11-28-h100-variants.txt):
    bfloat16, gpt-oss-120b, 4096 tokens, 2904 and 2734 us; qwen3-235b, 1024 tokens, 1824 and 1774, with Zipf-distributed loads
    2050 and 1949; 4096 tokens 2507 and 2467, `fp8_block` 1805 and 1749; qwen3-30b-a3b, `fp8_channel`, 4096 tokens, 507 and 481;
    2 % less or the same elsewhere.

    Bands of single tiles, without looking at experts, do as well where each has one, and take up to 36 % longer where each has
    two (mixtral-8x7b, 1024 tokens: 1319 and 1800). They need neither a quotient of two variables nor a load: `spans_for`.

    Args:
        index: of the tile.
        m_tiles: row tiles.
        n_tiles: column tiles.
        group_m: the most row tiles of a band; the last one may be lower.
        spans: int32 ``[tiles, 2]`` in GPU memory.
    """
    if spans is not None:
        tile = lax.div(index, n_tiles)  # one of the band
        begin, end = spans[tile, 0], spans[tile, 1]
        first = tile - lax.rem(tile - begin, group_m)
        within = index - first * n_tiles
        height = jnp.minimum(group_m, end - first)
        return first + lax.rem(within, height), lax.div(within, height)
    if group_m == 1:
        return lax.div(index, n_tiles), lax.rem(index, n_tiles)
    band_tiles = group_m * n_tiles
    band = lax.div(index, band_tiles)
    first = band * group_m
    height = jnp.minimum(group_m, m_tiles - first)
    within = index - band * band_tiles
    return first + lax.rem(within, height), lax.div(within, height)


def spans_for(spans: Any | None, tile_rows: int, n_tiles: int, workers: int) -> Any | None:
    """The spans that `visit` is to walk by, or None for bands of single tiles.

    With few rows nearly every expert has one tile. Where it has more, they are at work together if the multiprocessors have more
    tiles than two experts'. Layers on an H200, in bands and in single tiles: NVFP4, 16 tokens, qwen3-30b-a3b 73.9 and 72.6 us,
    qwen3-235b 239 and 235; 128 tokens, qwen3-30b-a3b 109.9 and 107.3, with Zipf-distributed loads 114.8 and 112.6, with half of
    all tokens on one expert 108.4 and 106.6; `fp8_channel` 163.7 and 161.8, bfloat16 291.9 and 289.8
    (2026-11-28-h200-few-rows-variants.txt).

    Args:
        spans: as of `visit`; None where no expert has two tiles.
        tile_rows: of a row tile.
        n_tiles: column tiles.
        workers: that are at work at a time.

    Example:
        >>> spans_for("spans", 24, 12, workers=264), spans_for("spans", 24, 224, workers=264), spans_for("spans", 96, 12, 132)
        (None, 'spans', 'spans')
    """
    return None if tile_rows <= FEW_ROWS and 2 * n_tiles <= workers else spans


def share(total: jax.Array | int, worker: jax.Array | int, workers: int) -> jax.Array:
    """How many of `total` items worker number `worker` takes when it takes every `workers`-th."""
    return lax.div(total - worker + (workers - 1), workers)


def next_slot(slot: Any, stages: int) -> Any:
    """The stage of a ring after this one; a remainder by three is a dozen instructions."""
    return jnp.where(slot < stages - 1, slot + 1, 0)


def observe_all(empty: Any, turns: Any, stages: int, ring: Any = 0) -> None:
    """A producer's end, after so many turns of a ring: every phase of every barrier is observed before the kernel ends.

    `ring` is the number of its first stage.
    """

    @pl.loop(jnp.maximum(turns - stages, 0), turns)
    def _drain(turn):
        plgpu.barrier_wait(empty.at[ring + lax.rem(turn, stages)])


def for_row_count(row_counts: tuple[int, ...], size: Any, run: Callable[[int, int], None]) -> None:
    """Calls `run(count, below)` for the smallest row count that covers `size`, and the one before it, which does not."""
    below = 0
    for count in row_counts:
        pl.when((size > below) & (size <= count))(lambda count=count, below=below: run(count, below))
        below = count


def hand_back(empty: Any, step: Any, slot: Any, stages: int, products: int | None, ring: Any = 0) -> None:
    """Hands a stage of a ring back in each step: its own, or with `products` under way that of the step before.

    Args:
        empty: the barriers of the stages.
        step: of the loop.
        slot: the stage of this step.
        stages: of the ring.
        products: of a step, which may still be under way (`Config.overlap`); None waits for all.
        ring: its first stage.
    """
    plgpu.wgmma_wait(products or 0)
    if products is None:
        plgpu.barrier_arrive(empty.at[ring + slot])
    else:
        pl.when(step > 0)(lambda: plgpu.barrier_arrive(empty.at[ring + jnp.where(slot > 0, slot, stages) - 1]))


def divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a / b` for b >= 1 by the reciprocal square root unit: two roundings instead of a division's dozen instructions."""
    r = lax.rsqrt(b)
    return a * r * r


def even_columns(size: int, dtype, most: int) -> int | None:
    """The widest even cut of an axis into pieces of at most `most` elements and whole multiples of 128 bytes, if there is one."""
    unit = 128 // jnp.dtype(dtype).itemsize
    return max((c for c in range(unit, most + 1, unit) if size % c == 0), default=None)
