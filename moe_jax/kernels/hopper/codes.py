"""Weights that are codes of a byte, FP8 or int8, multiplied with 16-bit rows: decoded on their way into the tensor cores.

wgmma takes its weights from registers as well as from shared memory. A consumer loads a block of codes, turns it into 16-bit
floats and multiplies it: memory carries one byte a weight, and no kernel dequantizes. All FP8 and int8 codes are 16-bit
floats, so with a scale for each channel or one for all nothing is rounded, and the sum is scaled once. With a scale for each
block a code is multiplied in float32 and rounded.

On an H100, qwen3-30b-a3b (benchmarks/results, 2026-11-28-h100-int8_weight-layer.json, -fp8_weight-layer.json), layers of 1, 16
and 128 tokens: int8 25, 165 and 248 us, which are 1.02, 1.07 and 1.08 times `bound_us`; vLLM's 28, 170 and 319. qwen3-235b, 16
and 128 tokens: 594 and 910 us, 1.02 and 1.04 times; vLLM's 575 and 1216. FP8 in blocks: 28, 174 and 252 us. A consumer takes 4.0
instructions of the vector units a weight (int8; FP8 3.4 with scales of channels, 4.7 of blocks) and lets each product end before
it decodes the next block. So several decode a tile, see `decoding_config`: with one these were 29, 180 and 263 us, and 33, 218
and 318 (2026-11-28-h100-variants.txt).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.kernels.hopper.epilogue import Columns
from moe_jax.kernels.hopper.matmul_config import WGMMA_ROWS, Config

_DTYPES = (jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.int8))
_COLUMNS = 64  # of a block that is decoded


def block_scale(scales: Any, expert: Any, row: Any, group: Any) -> Any:
    """The scale of a block of weights, of ``[E, N blocks, K / 128]`` in GPU memory; past the last one there are only zeros."""
    _, rows, groups = scales.shape
    return scales[expert, jnp.minimum(row, rows - 1), jnp.minimum(group, groups - 1)]


def block_rows(n_out: int, blocks: int, gated: bool) -> int | None:
    """Weight rows of a block, of so many in a matrix (in both halves, if gated); None if 64 rows may have two scales.

    Example:
        >>> block_rows(768, 12, True), block_rows(2048, 16, False), block_rows(192, 12, True)
        (128, 128, None)
    """
    blocks = blocks // 2 if gated else blocks
    if blocks == 1:
        return pl.cdiv(n_out, WGMMA_ROWS) * WGMMA_ROWS
    # The last block may have fewer rows: of the sizes that make so many, the usual one.
    return next((size for size in (128, 64, 256, 512) if pl.cdiv(n_out, size) == blocks), None)


def odd_blocks(block: tuple[int, int], shape: tuple[int, ...], scales: tuple[int, ...], gated: bool) -> str | None:
    """Why the kernels, which know blocks by their number, would take them for others; None if they do not.

    Args:
        block: rows and columns of weights that share a scale.
        shape: ``[E, N, K]`` of the weights.
        scales: the shape of their scales, ``[E, N blocks, K blocks]``.
        gated: the blocks of gate and up follow each other.

    Example:
        >>> odd_blocks((128, 128), (2, 768, 256), (2, 6, 2), gated=False)
        >>> odd_blocks((384, 128), (2, 768, 256), (2, 2, 2), gated=False)
        'blocks of 384 x 128 weights: several of them must have 64, 128, 256 or 512 rows and columns'
    """
    halves = 2 if gated else 1
    taken = block_rows(shape[1] // halves, scales[1], gated), block_columns(shape[2], scales[2])
    many = scales[1] > halves, scales[2] > 1
    if any(m and t not in (None, size) for m, t, size in zip(many, taken, block, strict=True)):
        return (
            f"blocks of {block[0]} x {block[1]} weights: several of them must have 64, 128, 256 or 512 rows and columns"
        )
    return None


def supports(weights: Any, scales: Any, n_out: int) -> str | None:
    """Why codes cannot be decoded by the kernel; None if they can. Shapes as in `Codes`."""
    _, n, k = weights.shape
    if weights.dtype not in _DTYPES:
        return f"codes {weights.dtype} must be float8_e4m3fn or int8"
    if k % _COLUMNS:
        return f"the contracted size={k} must be a multiple of {_COLUMNS}, for codes; pad the weights"
    if scales.ndim == 3:
        if block_rows(n_out, scales.shape[1], n > n_out) is None:
            return f"{scales.shape[1]} blocks of {n} weight rows: blocks must have a multiple of {WGMMA_ROWS} rows"
        if scales.shape[2] != pl.cdiv(k, block_columns(k, scales.shape[2])):
            return (
                f"{scales.shape[2]} blocks of the contracted size={k}: they must have a multiple of {_COLUMNS} columns"
            )
    return None


def block_columns(k: int, blocks: int) -> int:
    """Columns of a block, of so many in a row; at least 64.

    Example:
        >>> block_columns(2880, 23), block_columns(128, 1)
        (128, 128)
    """
    return next((size for size in (128, 64, 256, 512) if pl.cdiv(k, size) == blocks), max(_COLUMNS, k))


class Codes:
    """Codes of a grouped matmul, and their scales.

    Args:
        weights: ``[E, N, K]``, float8_e4m3fn or int8.
        scales: float32; of each row ``[E, N]``; of a matrix, or of its two halves, ``[E, 1]`` or ``[E, 2]``; of blocks
            ``[E, N blocks, K blocks]``, with a gate those of the halves one after the other.
        config: how the work is tiled.
        n_out: columns of the output.
        gated: the activation takes gate and up.
        dtype: of the rows.
        interpret: the kernel is interpreted: there wgmma takes its operands from shared memory alone.
    """

    def __init__(
        self, weights: Any, scales: Any, config: Config, n_out: int, gated: bool, dtype: Any, *, interpret: bool
    ):
        self._dtype, self._gated, self._halves, self._columns = dtype, gated, config.halves, config.columns
        self._shape = scales.shape
        self._by_block = scales.ndim == 3
        self._by_channel = not self._by_block and scales.shape[1] == weights.shape[1] and weights.shape[1] > 2
        if self._by_block:
            self._block = block_rows(n_out, scales.shape[1], gated), block_columns(weights.shape[2], scales.shape[2])
        self._channels = Columns(config, n_out, gated, jnp.float32)
        self.scratch = self._channels.scratch if self._by_channel else []
        # Products that read registers while the next block is decoded.
        self.under_way = 1 if config.paired else 0
        self._interpret = interpret
        if interpret:
            self.scratch = [*self.scratch, plgpu.SMEM((config.consumers, 2, WGMMA_ROWS, _COLUMNS), dtype)]
        self.transforms = plgpu.TilingTransform((8, _COLUMNS)), plgpu.SwizzleTransform(_COLUMNS)

    def references(self, scales: Any, refs: list[Any]) -> tuple[Any, ...]:
        """Of the scales in GPU memory, and those of `scratch`, which are taken from the beginning of `refs`."""
        return (scales, *(refs.pop(0) for _ in self.scratch))

    def fetch(self, refs: Any, wg: Any, expert: Any, col: Any) -> None:
        """Asks for the scales of a consumer's rows of weights from `col` on."""
        if self._by_channel:
            self._channels.fetch(refs[:3], wg, expert, col)

    def decode(self, block: Any, refs: Any, wg: Any, expert: Any, col: Any, half: Any, k: Any, turn: int) -> Any:
        """A block of 64 weight rows and 64 columns from `k` on, as an operand of wgmma; `turn` counts them."""
        values = plgpu.load(block, layout=plgpu.Layout.WGMMA_UPCAST_2X)
        if self._by_block:
            rows, columns = self._block
            row = lax.div(col if self._gated else col + half * self._columns, rows)
            row = row + half * (self._shape[1] // 2) if self._gated else row
            # Past the last there are zeros to be scaled.
            at = jnp.minimum(row, self._shape[1] - 1), jnp.minimum(lax.div(k, columns), self._shape[2] - 1)
            values = values.astype(jnp.float32) * refs[0][expert, *at]
        if values.dtype == jnp.float8_e4m3fn and self._dtype == jnp.bfloat16:
            values = values.astype(jnp.float32)  # there is no instruction for it
        values = values.astype(self._dtype)
        if self._interpret:
            refs[-1][wg, turn % 2] = values
            plgpu.commit_smem()  # it does not know that each thread hands a stage back after its own loads
            return refs[-1].at[wg, turn % 2]
        return plgpu.layout_cast(values, plgpu.Layout.WGMMA)

    def scale(self, accs: Any, refs: Any, wg: Any, expert: Any, own: Any = 0) -> list[Any]:
        """The sums of a tile, from its half `own` on, scaled by what all products of a row of weights share."""
        if self._by_block:
            return list(accs)
        if self._by_channel:
            scales = self._channels.spread(refs[:3], wg, accs[0].shape)
        else:
            two = self._gated and self._shape[1] > 1
            scales = [refs[0][expert, own + half if two else 0] for half in range(self._halves)]
        return [acc * scale for acc, scale in zip(accs, scales, strict=True)]
