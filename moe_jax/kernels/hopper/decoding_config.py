"""How the grouped matmul is tiled where it decodes its weights: `matmul_config`'s tiles with more consumers.

Decoding takes one consumer about as long as a tile of few rows is on its way. So several share such a tile: neighbouring
blocks of columns, or the gate and the up half of one (`Config.paired`). The bits of the result do not depend on it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from moe_jax.kernels.hopper import matmul_config
from moe_jax.kernels.hopper.matmul_config import (
    FEW_ROWS,
    WGMMA_ROWS,
    WIDE_DECODED,
    Config,
    few_counts,
    rounds,
    work_of,
)

_ROW_TILES = ((5, 16), (10, 24), (16, 32), (32, 48), (48, 64))  # by the mean rows of an expert
_ROWS_OF_LONG_STEPS = 48  # of a tile, for steps of 256 of K: with more there is no room for two stages
# Nanoseconds that 64 of K take with so many consumers, each for 32 columns of gate and up, on an H200: of the kernels that
# `_one_token` names, less 2.5 us.
_TIMES = {
    "four bits": {1: 103, 2: 165, 3: 252, 4: 287},
    "a byte": {1: 132, 2: 228, 3: 419, 4: 421},
    "a byte in blocks": {1: 207, 2: 279, 3: 462, 4: 471},
}
_ROWS_OF_PAIRS = 16  # of a tile, for gate and up of a tile in teams with a consumer each
_ROWS_OF_TEAMS = 24  # of a tile, for teams: with more they have two stages each


class Projection(NamedTuple):
    """What a tiling depends on beside the row tile.

    Attributes:
        gated: the activation takes gate and up.
        n_out: columns of the output.
        likely_tiles: as in `matmul_config.default_config`.
        mean_rows: of an expert.
    """

    gated: bool
    n_out: int
    likely_tiles: int
    mean_rows: float


def four_bit(config: Config, projection: Projection) -> Config:
    """The same tiles for weights of four bits: a stage of few rows takes more of K, and more consumers decode it; no clusters.

    Args:
        config: of `default_config`.
        projection: that is tiled.

    With few rows what consumers issue binds, and their epilogues come on top. So there are four of them, whose warps take turns.
    Up to 24 rows they are two teams of two, whose epilogues are at different times. A step has 256 of K, for what a step costs
    beside decoding, and row tiles are as narrow as leaves nearly every expert one, for more stages.
    Products end with their step (`Config.overlap`): with others under way four consumers have too few registers, and ptxas lets
    each wait for the one before. Layers on an H200, before that (pairs or four consumers, steps of 128, tiles of 64 rows) and
    with it: qwen3-30b-a3b, 16 tokens, 85 and 78 us (81 with one team), 128 tokens 124 and 117; gpt-oss-120b, MXFP4, 16 tokens,
    228 and 191 (199 with one team); 512 tokens of qwen3-30b-a3b 164 and 155 (2026-11-28-h200-four-bits-variants.txt). One token:
    `_one_token`.

    With 24 rows a consumer of a team has gate and up of its columns: it finds rows once for both, 276 instructions for four
    blocks instead of 300 (2026-11-28-machine-code-four-bits.txt), and hands nothing over. Layers of 128 tokens, NVFP4, a pair to
    a tile and that: qwen3-235b 380 and 369 us, kernel of the up-projection of qwen3-30b-a3b 63 and 63. With 16 rows it is no
    better: 128 tokens, dsv3-ep8 135 and 132 us, gpt-oss-120b, MXFP4, 254 and 259; 16 tokens, qwen3-30b-a3b, 42.3 and 42.8.
    Down-projections, two blocks a consumer: gpt-oss-120b, 128 tokens, 142 and 150 us, qwen3-30b-a3b 36 and 36
    (2026-11-28-h200-few-rows-variants.txt).

    What ptxas says (`benchmarks/machine_code.py`): from 176 rows on, and from 160 on where rows are fetched by their tokens, it
    lets every product wait for the one before, so that nothing is decoded meanwhile. From 144 rows on it does so too with three
    row counts or more; up to 128 rows with none. So wide tiles have two row counts. Narrower ones, with more counts, decode a
    matrix more often than they save products: qwen3-30b-a3b, NVFP4, 4096 tokens on an H100, both projections: 500 us with 128 and
    144 rows, 635 with six counts up to 160, 656 with five up to 128 (benchmarks/results/2026-11-27-h100-four-bits-many-rows.txt).

    Example:
        >>> few = four_bit(Config((24,), consumers=1), Projection(False, 2048, 128, mean_rows=8.0))
        >>> few.consumers, few.teams, few.row_counts
        (2, 2, (8, 16, 24))
        >>> four_bit(Config((64, 128, 136, 144)), Projection(True, 768, 128, mean_rows=256.0)).row_counts
        (128, 144)
    """
    gated = projection.gated
    config = dataclasses.replace(config, cluster=1, columns=WGMMA_ROWS)
    if config.consumers == 1 and config.tile_rows <= 8:
        return _one_token(config, projection)
    if config.consumers > 1 or config.tile_rows > FEW_ROWS:
        return _few_copies(config)
    teams = dict(consumers=2, teams=2) if config.tile_rows <= _ROWS_OF_TEAMS else dict(consumers=4)
    steps = dict(tile_k=256, stages=4) if config.tile_rows <= _ROWS_OF_LONG_STEPS else dict(tile_k=128, stages=5)
    few = dataclasses.replace(config, **teams, **steps, **_few(config, gated))
    if gated and _ROWS_OF_PAIRS < config.tile_rows <= _ROWS_OF_TEAMS:
        return dataclasses.replace(few, halves=2, paired=False, tile_k=128)
    return few


def few_tile_rows(mean_rows: float, num_pairs: int) -> int | None:
    """The row tile of few rows: as narrow as leaves nearly every expert one tile, for more stages; None for many rows.

    Example:
        >>> [few_tile_rows(mean, 1024) for mean in (4.0, 8.0, 32.0, 64.0)], few_tile_rows(1.0, 8)
        ([16, 24, 48, None], 8)
    """
    if num_pairs <= 8:
        return 8
    return next((rows for most, rows in _ROW_TILES if mean_rows <= most), None)


def one_byte(config: Config, projection: Projection, in_blocks: bool) -> Config:
    """The same tiles for weights that are codes of a byte: with few rows gate and up have a consumer each.

    Args:
        config: of `default_config`.
        projection: that is tiled.
        in_blocks: with a scale for each block, which takes more instructions to decode.

    Four consumers, where their columns divide the output, from one row an expert on, and for scales of blocks: with fewer rows
    tiles of half as many columns keep more multiprocessors busy. Steps have 256 of K: rows of weights are read in runs of as many
    bytes (`codes` says why). Layers on an H200, int8, tiles of 64 rows and steps of 128, then this: qwen3-30b-a3b, 16 tokens, 120
    and 113 us, kernels of 128 tokens 175 and 169, mixtral-8x7b, kernels of 128 tokens, 387 and 358. FP8 in blocks, qwen3-30b-a3b,
    16 tokens, 125 and 124 us (2026-11-28-h200-four-bits-variants.txt). With many rows tiles are those of `four_bit`:
    qwen3-30b-a3b, 4096 tokens, 700 us, with six row counts and a product at a time 766 (2026-11-28-h200-variants.txt). One token:
    `_one_token`.

    Example:
        >>> few = Config((32,), consumers=1)
        >>> up, down = Projection(True, 768, 128, mean_rows=8.0), Projection(False, 2880, 128, mean_rows=4.0)
        >>> [one_byte(few, of, in_blocks=False).consumers for of in (up, down)]
        [4, 2]
    """
    if config.consumers > 1 or config.tile_rows > FEW_ROWS:
        return _few_copies(dataclasses.replace(config, cluster=1))
    whole = dataclasses.replace(config, columns=WGMMA_ROWS)
    if config.tile_rows <= 8:
        return _one_token(whole, projection, "a byte in blocks" if in_blocks else "a byte")
    four = projection.n_out % (2 * WGMMA_ROWS) == 0 and (in_blocks or projection.mean_rows >= 1)
    long = config.tile_rows <= _ROWS_OF_LONG_STEPS
    steps = dict(tile_k=256, stages=2 if four else 5) if long else dict(tile_k=128, stages=3 if four else 4)
    return dataclasses.replace(whole, consumers=4 if four else 2, **steps, **_few(config, projection.gated))


def _few_copies(config: Config) -> Config:
    """With as few row counts as the loops that decode are fast with, up to the row tile that it has."""
    wide = config.tile_rows > WIDE_DECODED
    return dataclasses.replace(config, row_counts=(WIDE_DECODED, config.tile_rows)) if wide else few_counts(config)


def _few(config: Config, gated: bool) -> dict[str, Any]:
    """What tiles of few rows have in common where several consumers decode."""
    counts = (c for c in matmul_config.FEW_DECODED if c < config.tile_rows)
    return dict(halves=1, paired=gated, row_counts=(*counts, config.tile_rows), overlap=False)


def _one_token(config: Config, projection: Projection, kind: str = "four bits") -> Config:
    """As many columns a tile as keep the busiest multiprocessor busy for the shortest time; the widest of equal ones.

    What counts is how many multiprocessors have a tile, and that they have the same number of them. Gate and up of a tile of
    64 or 128 columns are those of a pair or two of consumers. One or three consumers have 32 columns each, gate and up
    interleaved (`Config.interleaved`): a consumer that is alone waits for itself, and takes longer for a block than a second one
    beside it does (`_TIMES`). One token on an H200, kernels of up-projections with tiles of 32, 96 and 64 or 128 columns
    (2026-11-28-h200-few-rows-variants.txt): NVFP4, dsv3-ep8 13.0, 26.3 and 18.3 us, qwen3-235b 22.3, 18.6 and 21.1,
    mixtral-8x7b 47.8, 46.2 and 38.3; MXFP4, gpt-oss-120b 16.1, 13.0 and 14.5; int8, dsv3-ep8 15.9 and 20.6, qwen3-235b 27.9, 29.3
    and 29.5; FP8 in blocks, dsv3-ep8 23.8 and 28.9, qwen3-235b 42.3, 32.1 and 32.6; qwen3-30b-a3b 11.4 with 64 columns.

    Down-projections of four bits on an H100: qwen3-235b 14.6 us with tiles of 256 columns, 15.7 of 128; mixtral-8x7b 26.8 us of
    64, 37 of 128 (2026-11-27-h100-variants.txt). With codes of a byte 256 columns are as good as 128 at best, int8: gpt-oss-120b
    18.3 us of 128, 25.8 of 256, 30.9 of 32; mixtral-8x7b 48.8 us of 64 and one consumer, 73.4 of 128 and two
    (2026-11-28-h100-variants.txt), and one consumer better takes 256 of K a stage than 128: mixtral-8x7b 31.4 us and 35.7 on an
    H200 (2026-11-28-h200-variants.txt).

    Stages beyond four cost the down-projection: qwen3-235b 11.7 us and 12.3 with five (2026-11-28-h200-few-rows-variants.txt).
    Four consumers take 256 of K a step, or 192 or 320 that divide it, in the place of 128: NVFP4, mixtral-8x7b up 39.2 us and
    40.2 on an H200, qwen3-235b 21.0 and 21.9; int8, mixtral-8x7b up 60.4 and 62.7, gpt-oss-120b 21.8 and 23.1
    (2026-11-28-h200-four-bits-variants.txt).

    Args:
        config: of few rows.
        projection: that is tiled.
        kind: of `_TIMES`.
    """
    gated, n_out, likely_tiles, _ = projection
    byte = kind != "four bits"
    if gated:
        times = _TIMES[kind]
        strips = min(times, key=lambda strips: (rounds(32 * strips, n_out, likely_tiles) * times[strips], -strips))
        return _strips(config, strips, byte)
    pieces = (64, 128) if byte else (64, 128, 256)
    columns = min(pieces, key=lambda columns: (work_of(columns, n_out, likely_tiles), -columns))
    consumers = columns // WGMMA_ROWS
    if byte:
        tiles = dict(tile_k=256, stages=5) if columns == WGMMA_ROWS else dict(tile_k=128, stages=6)
    else:
        tiles = dict(tile_k=256, stages=4 if consumers == 4 else 6)
    return dataclasses.replace(config, consumers=consumers, halves=1, **tiles)


def _strips(config: Config, strips: int, byte: bool) -> Config:
    """Tiles of so many times 32 columns of gate and up, each with a consumer."""
    stages = {1: 7, 2: 5, 3: 3, 4: 3} if byte else {1: 8, 2: 6, 3: 6, 4: 5}
    odd = strips % 2 == 1
    columns = dict(columns=32, interleaved=True) if odd else dict(paired=True)
    return dataclasses.replace(config, consumers=strips, halves=1, tile_k=256, stages=stages[strips], **columns)
