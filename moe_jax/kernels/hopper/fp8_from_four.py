"""Four-bit weights multiplied with FP8 rows: float4_e2m1fn that a warpgroup of its own makes float8_e4m3fn in shared memory.

The kernels of FP8 operands with scales of blocks (`matmul_fp8`, `matmul_rows_first`) read weights from the stages of a ring, and
do so here: one warp fills a ring of codes, four others read that and fill the weights' part of the stages. Products, scales and
sums are those of FP8 weights, bit for bit, for any number of rows. Memory and L2 move 4.25 (MXFP4) or 4.5 bits (NVFP4) a weight.
wgmma takes 8-bit weights from registers as well, but a consumer has none left beside its sums and products.

A thread makes 32 columns of a row at a time (`moe_jax.quantization.prepared_fp8` says how they lie). The eight bytes that
magnitudes can become, with their scale, are two registers, of which one `prmt` takes four by their codes: an addition and a
multiplication make them from the scale's byte. Seven instructions make eight weights from a word:

    the nibbles' magnitudes; four bytes, their signs; a shift to the other nibbles, four bytes; a shift to their signs, these

and a table takes three (MXFP4: for 32 columns; NVFP4: for 16, and four for the fractions of four scales).

Counted in the machine code (benchmarks/results, 2026-11-27-machine-code-fp8-from-four-bits.txt): 256 weights of a thread, its
part of 256 rows x 128 columns, take 353 instructions of the vector units (NVFP4) or 318 (MXFP4), loads, stores and barriers among
them, 1.4 or 1.25 a weight. A thread that multiplies takes 161 a step in `matmul_rows_first` (with FP8 weights 157) and 181 in
`matmul_fp8` with 96 rows (the same), though it has 216 or 224 registers in the place of 240. No loop over K spills; what is
around it does, but for up-projections with rows first. How deep the rings are: `matmul_config.from_four_bits`.

On an H100, the kernels of a layer with such weights and with FP8 ones (2026-11-27-h100-variants.txt): qwen3-30b-a3b, NVFP4, 543
and 497 us with 4096 tokens, 1861 and 1731 with 16384; gpt-oss-120b, MXFP4, 4096 tokens, 1808 (three stages of codes) and 1720.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax import _compat_words
from moe_jax.kernels.hopper import tiles
from moe_jax.kernels.hopper.four_bits import Blocks
from moe_jax.kernels.hopper.matmul_config import WGMMA_ROWS, Config
from moe_jax.quantization.prepared_fp8 import CODE_LINES, COLUMNS, ROWS, Fp8Layout, PreparedFp8, fp8_of
from moe_jax.quantization.prepared_layout import LANES


def registers(config: Config) -> tuple[int, int]:
    """Of a thread that multiplies and of one that decodes, beside 24 of one that copies.

    Together they are at most what the launch gave the block: 128 for each of four warpgroups, 168 for each of three.

    Example:
        >>> registers(Config((64, 96))), registers(Config((64, 128), rows_first=True)), registers(Config(consumers=1))
        ((224, 40), (216, 56), (240, 168))
    """
    if config.consumers == 1:
        return 240, 168
    return (216, 56) if config.rows_first else (224, 40)


class Decoder:
    """What makes FP8 weights for a kernel's consumers.

    Args:
        weights: ``[E, N, K]``.
        config: how the work is tiled.
        gated: the activation takes gate and up.
        transforms: of shared memory, those of weights in a stage.
        interpret: the kernel is interpreted.
    """

    def __init__(
        self, weights: PreparedFp8, config: Config, gated: bool, transforms: tuple[Any, ...], *, interpret: bool
    ):
        if config.columns != WGMMA_ROWS or not config.codes_stages:
            raise ValueError(
                f"config.columns={config.columns} must be {WGMMA_ROWS} and codes_stages={config.codes_stages} at least 2 for "
                "weights of four bits; use from_four_bits()"
            )
        self._layout, self._config, self._interpret = weights.layout, config, interpret
        self._transforms = transforms
        self._blocks = Blocks(weights, config, gated, columns=COLUMNS, stages=config.codes_stages)
        self.scratch = [
            self._blocks.scratch,
            plgpu.Barrier(num_arrivals=self._blocks.copies, num_barriers=config.codes_stages),
            plgpu.Barrier(num_arrivals=1, num_barriers=config.codes_stages),
        ]

    def produce(
        self, source: Any, refs: Any, groups: Any, tile_at: Callable[[Any], Any], my_tiles: Any, steps: int
    ) -> None:
        """Fills the ring of codes: a warp's work.

        Args:
            source: the codes in GPU memory.
            refs: of `scratch`.
            groups: the expert of each tile of rows.
            tile_at: the tile of rows and the tile column of a tile of this multiprocessor.
            my_tiles: their number.
            steps: of each.
        """
        codes_s, full, empty = refs
        stages = self._config.codes_stages

        @pl.loop(0, my_tiles)
        def _tile(i):
            m, n = tile_at(i)
            expert = groups[m]

            @pl.loop(0, steps)
            def _step(step):
                turn = i * steps + step
                slot = lax.rem(turn, stages)
                pl.when(turn >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                self._blocks.fetch(source, codes_s, expert, n, step, slot, full)

        tiles.observe_all(empty, my_tiles * steps, stages)

    def decode(self, refs: Any, weights_s: Any, full: Any, empty: Any, turns: Any) -> None:
        """Fills the weights' part of the stages: a warpgroup's work.

        Args:
            refs: of `scratch`.
            weights_s: the weights of all stages.
            full: a barrier for each, at which this arrives once.
            empty: a barrier for each, at which consumers arrive.
            turns: of the rings.
        """
        if self._config.consumers == 2:
            plgpu.set_max_registers(registers(self._config)[1], action="decrease")
        codes_s, codes_full, codes_empty = refs
        stages, codes_stages = self._config.stages, self._config.codes_stages

        def turn(turn, at):
            slot, place = at
            plgpu.barrier_wait(codes_full.at[place])
            pl.when(turn >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
            self._decode(codes_s.at[place], weights_s.at[slot])
            plgpu.commit_smem()
            plgpu.barrier_arrive(full.at[slot])
            plgpu.barrier_arrive(codes_empty.at[place])
            return tiles.next_slot(slot, stages), tiles.next_slot(place, codes_stages)

        lax.fori_loop(0, turns, turn, (jnp.int32(0), jnp.int32(0)))
        tiles.observe_all(empty, turns, stages)

    def _decode(self, codes: Any, weights: Any) -> None:
        """A stage: codes ``[units, tile_k / 128, lines, 32]`` to weights ``[units * 64, tile_k]``."""
        units, deep = codes.shape[:2]
        if self._interpret:
            for unit in range(units):
                for piece in range(deep):
                    part = pl.ds(unit * ROWS, ROWS), pl.ds(piece * COLUMNS, COLUMNS)
                    weights[part] = fp8_of(codes[unit, piece], self._layout)
            return
        layout, swizzled = self._layout, self._transforms[0].tiling[1]

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(self._transforms)))
        def run(ctx, codes, weights):
            del ctx
            thread = _Thread(codes, weights, layout, deep, swizzled)
            parts = list(itertools.product(range(units), range(deep), range(2)))
            # What is stored may be what is loaded, as far as the compilers know: they leave loads and stores in this order.
            following = thread.load(*parts[0])
            for i, part in enumerate(parts):
                loaded, following = following, thread.load(*parts[i + 1]) if i + 1 < len(parts) else None
                thread.decode(*part, *loaded)

        run(codes, weights)


class _Thread:
    """Emits what a thread of a warpgroup does: row ``thread % 64`` of each block, columns from ``thread / 64 * 64`` on.

    Args:
        codes: of a stage, in shared memory.
        weights: of a stage, in swizzled tiles of eight rows.
        layout: of a block of codes.
        deep: blocks of a stage along K.
        swizzled: columns of a tile, 64 or 128.
    """

    def __init__(self, codes: Any, weights: Any, layout: Fp8Layout, deep: int, swizzled: int):
        self._layout, self._deep = layout, deep
        thread, begin_of = _compat_words.thread(), [_compat_words.address(ref) for ref in (codes, weights)]
        self._codes = _ptx("shl.b32 t, $1, 4; add.u32 $0, t, $2;", thread, begin_of[0])
        row = "mov.b32 t, $1;" if layout.has_fractions else "and.b32 t, $1, 63;"
        self._scales = _ptx(f"{row} shl.b32 t, t, 2; add.u32 $0, t, $2;", thread, begin_of[0])
        # Tiles of a row of tiles lie one behind the other. In a tile 16 bytes change places by the row; where it has 64 columns,
        # by each second row.
        eights, rows = deep * COLUMNS * 8, "and.b32 t, $1, 7; shl.b32 t, t, " + ("7;" if swizzled == 128 else "6;")
        begin = f"bfe.u32 u, $1, 3, 3; mad.lo.u32 t, u, {eights}, t;"
        if swizzled == 128:
            key = "and.b32 u, $1, 7; shr.u32 v, $1, 4; and.b32 v, v, 4; xor.b32 u, u, v;"
        else:
            begin += f"bfe.u32 u, $1, 6, 1; mad.lo.u32 t, u, {8 * swizzled}, t;"
            key = "bfe.u32 u, $1, 1, 2;"
        chunk = "xor.b32 u, u, {}; shl.b32 u, u, 4; add.u32 t, t, u; add.u32 $0, t, $2;"
        self._chunks = [_ptx(rows + begin + key + chunk.format(i), thread, begin_of[1]) for i in range(4)]
        self._selects = []
        if not layout.has_fractions:
            select = "shr.u32 t, $1, 6; mul.lo.u32 t, t, 0x2222; add.u32 $0, t, {};"
            self._selects = [_ptx(select.format(0x1111 * i), thread) for i in range(2)]

    def load(self, unit: int, piece: int, part: int) -> tuple[list[Any], list[Any]]:
        """Codes of 32 columns of a block, and with the first of them its scales."""
        block = (unit * self._deep + piece) * self._layout.shape[0] * LANES * 4
        scales = _compat_words.load_at(self._scales, block + CODE_LINES * LANES * 4, 1) if part == 0 else []
        return _compat_words.load_at(self._codes, block + part * ROWS * 2 * 16, 4), scales

    def decode(self, unit: int, piece: int, part: int, words: list[Any], scales: list[Any]) -> None:
        """Makes and stores what was loaded."""
        fractions = self._layout.has_fractions
        if scales:
            self._bytes = _compat_words.inline_ptx(_FURTHER, scales, 2) if fractions else scales
        target = unit * ROWS * self._deep * COLUMNS + piece * COLUMNS * 8
        for side in range(2):  # 16 columns
            if fractions:
                at = 2 * part + side
                select = at | (at + 4) << 4 | at << 8 | (at + 4) << 12
                table = _compat_words.inline_ptx(_table("$3", hex(select)), self._bytes[::-1], 2)
            elif side == 0:
                table = _compat_words.inline_ptx(_table("$2", "$3"), [*self._bytes, self._selects[part]], 2)
            eights = [_compat_words.inline_ptx(_EIGHT, [word, *table], 2) for word in words[2 * side : 2 * side + 2]]
            _compat_words.store_at(self._chunks[2 * part + side], target, [*eights[0], *eights[1]])


def _ptx(code: str, *operands: Any) -> Any:
    (found,) = _compat_words.inline_ptx(f"{{ .reg .b32 t, u, v; {code} }}", list(operands), 1)
    return found


# $0 and $1 of the bytes of four scales: with and without the bit by which their products with 1.5, 3 and 6 lie further.
_FURTHER = """{ .reg .b32 t; shr.u32 t, $2, 7; and.b32 t, t, 0x01010101; and.b32 $1, $2, 0x7F7F7F7F;
add.u32 $0, $1, t; }"""
# $0 and $1 of a word and of a table ($3, $4): eight weights.
_EIGHT = """{ .reg .b32 m, s;
and.b32 m, $2, 0x77777777; prmt.b32 $0, $3, $4, m; lop3.b32 $0, $0, $2, 0x80808080, 0xF8;
shr.u32 m, m, 16; prmt.b32 $1, $3, $4, m; shl.b32 s, $2, 4; lop3.b32 $1, $1, s, 0x80808080, 0xF8; }"""


def _table(other: str, select: str) -> str:
    """PTX: the bytes of a scale times 0, 0.5, 1.5, 1 ($0) and 2, 3, 4, 6 ($1), of which `select` takes those to begin with."""
    return f"""{{ .reg .b32 t; prmt.b32 t, $2, {other}, {select}; add.u32 $1, t, 0x1C181410;
mad.lo.u32 $0, $1, 256, {2**32 - 0x10081000}; }}"""
