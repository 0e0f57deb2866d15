"""Weights that are codes of a byte, FP8 or int8, multiplied with 16-bit rows: decoded on their way into the tensor cores.

wgmma takes its weights from registers as well as from shared memory. A consumer loads a block of codes, turns it into 16-bit
floats and multiplies it: memory carries one byte a weight, and no kernel dequantizes. All FP8 and int8 codes are 16-bit
floats, so with a scale for each channel or one for all nothing is rounded, and the sum is scaled once. With a scale for each
block a code is multiplied in float32 and rounded.

A thread loads codes two by two, as it holds them in wgmma's operand (`LDS.U16`), those of two blocks before the first is
decoded, and PTX of our own makes two floats of a word. That is 2.2 instructions of the vector units a weight for int8 (`_pair`),
2.7 for FP8 with scales of channels and 3.7 of blocks (benchmarks/results/2026-11-28-machine-code-four-bits.txt). Four bytes a
load, exchanged between neighbouring threads and decoded by Mosaic, took 4.0, 3.5 and 4.7 (2026-11-28-machine-code-bytes.txt).
Products of a block run while the next is decoded.

Few rows wait for memory. Lines of 64 bytes in shared memory, as wide as a block, have L2 asked for half a line at a time: its
tags were busy for 61 % of the time with int8, 35 % with blocks of four-bit weights (2026-11-28-h200-counters.txt). With lines of
128 bytes, and 256 of K a step, a layer of 16 tokens of qwen3-30b-a3b takes 113 us instead of 122, of qwen3-235b 390 instead of
411, of 128 tokens 595 instead of 653 (int8; 2026-11-28-h200-int8_weight-lines-layer.json, -int8_weight-layer.json).

Exchanges of bytes were worth this, layers on an H200 (-int8_weight-before-layer.json, -int8_weight-layer.json, -variants.txt):
int8, qwen3-30b-a3b, 1, 16, 128, 1024 and 4096 tokens 24, 137, 207, 301 and 766 us, and 20, 122, 188, 280 and 701 without them
(vLLM 26, 130, 268, 607 and 1462); FP8 in blocks, gpt-oss-120b, 16 and 128 tokens 428 and 970, and 374 and 841. Several consumers
decode a tile: `decoding_config`. Tiles of more than 128 rows have two row counts, see there, and codes of a block are loaded when
it is decoded: registers are short.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax import _compat_words
from moe_jax.kernels.hopper import interleaved
from moe_jax.kernels.hopper.epilogue import Columns
from moe_jax.kernels.hopper.matmul_config import FEW_ROWS, WGMMA_ROWS, WIDE_DECODED, Config

_DTYPES = (jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.int8))
_COLUMNS = 64  # of a block that is decoded
_GREATER = {"bfloat16": 2.0**6, "float16": 2.0**9}  # than what `_pair` makes of int8, which sums are multiplied by


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


class Place(NamedTuple):
    """Of a block among the weights.

    Attributes:
        expert: whose they are.
        col: the first column of the output that the consumer makes.
        half: gate or up, or one of two neighbours.
        k: the first column of the weights.
    """

    expert: Any
    col: Any
    half: Any
    k: Any


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

    under_way = 1  # products that read registers while the next block is decoded

    def __init__(
        self, weights: Any, scales: Any, config: Config, n_out: int, gated: bool, dtype: Any, *, interpret: bool
    ):
        self._dtype, self._gated, self._columns, self._interleaved = dtype, gated, config.columns, config.interleaved
        self._halves = 2 if config.interleaved else config.halves
        self._shape = scales.shape
        self._by_block = scales.ndim == 3
        self._by_channel = not self._by_block and scales.shape[1] == weights.shape[1] and weights.shape[1] > 2
        if self._by_block:
            self._block = block_rows(n_out, scales.shape[1], gated), block_columns(weights.shape[2], scales.shape[2])
        self._channels = Columns(config, n_out, gated, jnp.float32)
        self.scratch = self._channels.scratch if self._by_channel else []
        self.fetches = self._by_channel  # numbers into shared memory, for each tile
        # Blocks that are loaded together; in wide tiles registers are short.
        self.ahead = 2 if config.tile_rows <= WIDE_DECODED else 1
        self._interpret = interpret
        small = weights.dtype == jnp.int8 and not self._by_block and not interpret
        self._greater = _GREATER[jnp.dtype(dtype).name] if small else 1.0
        if interpret:
            self.scratch = [*self.scratch, plgpu.SMEM((config.consumers, 2, WGMMA_ROWS, _COLUMNS), dtype)]
        # Lines of 128 bytes, where there are: TMA asks for them line by line.
        even = all(size % 128 == 0 for size in (weights.shape[2], config.tile_k // config.depth))
        self._wide = even and config.halves == 1 and config.tile_rows <= FEW_ROWS
        line = 128 if self._wide else _COLUMNS
        self.transforms = plgpu.TilingTransform((8, line)), plgpu.SwizzleTransform(line)

    def references(self, scales: Any, refs: list[Any]) -> tuple[Any, ...]:
        """Of the scales in GPU memory, and those of `scratch`, which are taken from the beginning of `refs`."""
        return (scales, *(refs.pop(0) for _ in self.scratch))

    def fetch(self, refs: Any, wg: Any, expert: Any, col: Any) -> None:
        """Asks for the scales of a consumer's rows of weights from `col` on."""
        if self._by_channel:
            self._channels.fetch(refs[:3], wg, expert, col)

    def load(self, block_at: Callable[..., Any], places: list[tuple[Any, int]], col: Any) -> list[Any]:
        """Blocks of 64 weight rows and 64 columns, as each thread loads them for `decode`.

        Args:
            block_at: gives the reference of a half, from a column on, so many columns wide.
            places: half and column of the blocks.
            col: of the output, which these blocks do not depend on.
        """
        del col
        if not self._wide:
            return [plgpu.load(block_at(*place, _COLUMNS), layout=plgpu.Layout.WGMMA) for place in places]
        both = plgpu.load(block_at(*places[0], 2 * _COLUMNS), layout=plgpu.Layout.WGMMA)
        return [both[:, :_COLUMNS], both[:, _COLUMNS:]]

    def decode(self, values: Any, refs: Any, wg: Any, turn: int, place: Place) -> Any:
        """The block as an operand of wgmma; `turn` counts them."""
        halves = [place._replace(half=half) for half in range(2)] if self._interleaved else [place]
        scales = [self._scale_at(refs[0], one) for one in halves] if self._by_block else []
        if self._interpret:
            decoded = values.astype(jnp.float32)
            if scales:
                of_rows = jnp.repeat(jnp.stack(scales), interleaved.EIGHT)
                decoded = decoded * jnp.tile(of_rows, WGMMA_ROWS // of_rows.size)[:, None]
            refs[-1][wg, turn % 2] = decoded.astype(self._dtype)
            plgpu.commit_smem()  # it does not know that each thread hands a stage back after its own loads
            return refs[-1].at[wg, turn % 2]
        ptx = _pair(values.dtype.name, self._dtype.name, bool(scales))
        layouts = plgpu.Layout.WGMMA, *[plgpu.Layout.WG_SPLAT] * len(scales)
        result = plgpu.ShapeDtypeStruct((WGMMA_ROWS, _COLUMNS), self._dtype, layout=layouts[0])

        @plgpu.inline_mgpu(arg_types=layouts, return_type=result)
        def run(ctx, values, *scales):
            del ctx
            more = [[_compat_words.word_of_all(scale)] for scale in scales] or [[]]
            return _compat_words.fragment_of_bytes(values, ptx, more, self._dtype)

        return run(values, *scales)

    def _scale_at(self, scales: Any, place: Place) -> Any:
        """The scale of a block; past the last there are zeros to be scaled."""
        rows, columns = self._block
        row = lax.div(place.col if self._gated else place.col + place.half * self._columns, rows)
        row = row + place.half * (self._shape[1] // 2) if self._gated else row
        at = jnp.minimum(row, self._shape[1] - 1), jnp.minimum(lax.div(place.k, columns), self._shape[2] - 1)
        return scales[place.expert, *at]

    def factors(self, refs: Any, expert: Any, own: Any = 0) -> list[Any]:
        """The scales of whole matrices, of a tile's from its half `own` on; none where there are others."""
        if self._by_block or self._by_channel:
            return []
        two = self._gated and self._shape[1] > 1
        return [refs[0][expert, own + half if two else 0] for half in range(self._halves)]

    def scale(self, accs: Any, refs: Any, wg: Any, factors: list[Any]) -> list[Any]:
        """The sums of a tile, scaled by what all products of a row of weights share."""
        if self._by_block:
            return list(accs)
        if self._greater != 1.0:
            accs = [acc * self._greater for acc in accs]
        scales = self._channels.spread(refs[:3], wg, accs[0].shape) if self._by_channel else factors
        return [acc * scale for acc, scale in zip(accs, scales, strict=True)]


def _pair(codes: str, floats: str, scaled: bool) -> str:
    """PTX: two 16-bit floats ($0) of the two codes in the lower half of a word ($1); if `scaled` times a float32 ($2).

    int8: a byte whose sign is turned round is 128 more. As the lowest bits of a float it is that number times 2**-133 (float16:
    2**-24), subnormal or not, so one multiplication and addition gives the code, `_GREATER` times smaller, exactly.
    """
    kind = {"bfloat16": "bf16x2", "float16": "f16x2"}[floats]
    if codes == "int8" and not scaled:
        times, less = (0x7F00, 0xC000) if floats == "bfloat16" else (0x7800, 0xB400)
        return (
            f"{{ .reg .b32 p, m, a; prmt.b32 p, $1, 0, 0x4140; xor.b32 p, p, 0x00800080; mov.b32 m, {times * 0x10001:#x}; "
            f"mov.b32 a, {less * 0x10001:#x}; fma.rn.{kind} $0, p, m, a; }}"
        )
    head = "{ .reg .b16 h, l, u; .reg .f32 a, b; "
    if codes == "int8":
        head += ".reg .b32 s; prmt.b32 s, $1, 0, 0x8880; cvt.rn.f32.s32 a, s; prmt.b32 s, $1, 0, 0x9991; cvt.rn.f32.s32 b, s; "
    else:
        half = ".reg .b32 f; mov.b32 {h, u}, $1; cvt.rn.f16x2.e4m3x2 "
        if floats == "float16" and not scaled:
            return head + half + "$0, h; }"
        head += half + "f, h; mov.b32 {l, u}, f; cvt.f32.f16 a, l; cvt.f32.f16 b, u; "
    if scaled:
        head += "mul.rn.f32 a, a, $2; mul.rn.f32 b, b, $2; "
    return head + f"cvt.rn.{kind}.f32 $0, b, a; }}"
