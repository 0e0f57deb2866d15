"""Four-bit weights multiplied with 16-bit rows: float4_e2m1fn and int4 in groups, decoded on their way into the tensor cores.

As in `codes`, a consumer decodes a block of 64 x 64 into registers, which wgmma takes as its weights. Blocks come as
`moe_jax.quantization.prepared` lays them out: one load of 16 bytes and one of a word or two of scales for each thread.

float4_e2m1fn. Sign, exponent and fraction of a code, at the place of a 16-bit float's sign, lowest exponent bits and highest
fraction bit, are that float times a power of two, subnormal ones included. So a rotation and a mask decode a pair, and one
product with the scale, which takes the power of two back, finishes it. Where three rotations would leave the bits of the fourth
pair in pieces, one multiplication moves them all (`prepared_layout.adds_up`). A mask makes two scales at a time, in the halves of
a word, of which a product takes either one for both of its own. A code has two significant bits and a scale at most four:
nothing is rounded, and the result is that of the kernel for 16-bit weights, bit for bit, on what the codes stand for. What all
scales of a matrix share, and the power of two, scale the sum.

int4. A code in the fraction of 128 (float16: 1024) is a float, from which 136 or 128 and the zero point is subtracted exactly;
the product with the scale, which was rounded to 16 bits when the weights were prepared, is rounded to 16 bits.

Two blocks are decoded in turn: wgmma reads one while the next is made. What a thread needs of all blocks of a stage is loaded
first, so that it waits once.

Counted in the machine code (`benchmarks/machine_code.py`; instructions of the vector units a weight, in the loop over K, few
rows): NVFP4 1.9, MXFP4 1.8, int4 2.6, and 0.4 of the uniform ones (2026-11-28-machine-code-four-bits.txt). With nine instructions
for four pairs and two for each scale NVFP4 took 2.4. No loop spills up to 160 rows, but ptxas lets products wait for each other
where registers run short, and nothing is decoded meanwhile: `decoding_config.four_bit` says when, and what that costs.

What binds, by the counters of an H200 (2026-11-28-h200-counters.txt): with few rows instructions are issued in 56 to 74 % of the
cycles, and integer units are busy for half of them. mixtral-8x7b, 16 tokens, kernels of a layer: 234 us before, 221 with fewer
instructions, 200 with longer steps; the up-projection then reads memory at 4.0 TB/s. qwen3-30b-a3b, 128 tokens: 129, 122, 115.
mixtral-8x7b, 128 tokens, up to 48 rows a tile: 329, 298, 250; tensor cores are busy for 49 % there, and the clock falls to 1.6
GHz (2026-11-28-h200-four-bits-variants.txt). What is left is mostly what comes before and after the loop: a layer of 16 tokens of
qwen3-30b-a3b takes 79 us, its weights 51 at the rate of sums (2026-11-28-h200-nvfp4-teams-layer.json).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax import _compat_words
from moe_jax.kernels.hopper import four_bit_halves
from moe_jax.kernels.hopper.matmul_config import Config
from moe_jax.quantization.prepared import PreparedArray, decoded
from moe_jax.quantization.prepared_layout import CODE_LINES, LANES, SIDE, Layout, Term, adds_up


def supports(weights: PreparedArray, rows: Any) -> str | None:
    """Why four-bit weights cannot be decoded by the kernel; None if they can."""
    if weights.row_dtype != jnp.dtype(rows.dtype).name:
        return f"weights are prepared for rows of {weights.row_dtype}, not {rows.dtype}; prepare the original ones"
    if weights.shape[2] % SIDE:
        return f"the contracted size={weights.shape[2]} must be a multiple of {SIDE}, for codes; pad the weights"
    return None


class Blocks:
    """How a stage of the ring holds prepared weights: as `weight_tiles.KMajor` does others, in whole blocks.

    Args:
        weights: ``[E, N, K]``.
        config: how the work is tiled.
        gated: the activation takes gate and up.
        columns: of a block.
        stages: of the ring; the configuration's by default.
    """

    def __init__(
        self, weights: PreparedArray, config: Config, gated: bool, columns: int = SIDE, stages: int | None = None
    ):
        self._gated, self._halves, self._consumers = gated, config.halves, config.consumers
        self._rows_first = config.rows_first  # a stage holds all blocks of the gate first
        self._blocks = weights.values.shape[1] // weights.halves
        self._deep = config.tile_k // columns
        self.copies = config.consumers * config.halves
        shape = (config.stages if stages is None else stages, self.copies, self._deep, *weights.layout.shape)
        self.scratch = plgpu.SMEM(shape, jnp.int32)

    def fetch(self, source: Any, target: Any, expert: Any, n: Any, step: Any, slot: Any, full: Any) -> None:
        """Asks for the blocks of a step of tile column `n`: of each consumer gate and up, or neighbours."""
        for unit in range(self.copies):
            if self._gated:
                wg, half = divmod(unit, self._halves) if not self._rows_first else divmod(unit, self._consumers)[::-1]
                row = half * self._blocks + n * self._consumers + wg
            else:
                row = n * self.copies + unit
            part = source.at[expert, row, pl.ds(step * self._deep, self._deep)]
            plgpu.copy_gmem_to_smem(part, target.at[slot, unit], full.at[slot])

    def block(self, ref: Any, slot: Any, wg: Any, half: Any, column: int, columns: int) -> Any:
        """The one of a stage from `column` of its K on."""
        assert columns == SIDE, columns
        return ref.at[slot, wg * self._halves + half, column // SIDE]


class FourBits:
    """Prepared weights of a grouped matmul.

    Args:
        weights: ``[E, N, K]``.
        config: how the work is tiled.
        gated: the activation takes gate and up.
        interpret: the kernel is interpreted: there wgmma takes its operands from shared memory alone.
    """

    fetches = False  # `fetch` asks for nothing
    under_way = 1  # products that read registers while the next block is decoded
    ahead = 8  # blocks of a stage that are loaded before the first of them is decoded

    def __init__(self, weights: PreparedArray, config: Config, gated: bool, *, interpret: bool):
        self._interleaved = config.interleaved
        if config.columns != SIDE and not config.interleaved:
            raise ValueError(
                f"config.columns={config.columns} must be {SIDE}: a block of codes has so many rows; use four_bit()"
            )
        self._layout, self._gated, self._interpret = weights.layout, gated, interpret
        self._halves = 2 if config.interleaved else config.halves
        self._dtype, self._factors = jnp.dtype(weights.row_dtype), weights.halves
        decoded_blocks = (config.consumers, 2, SIDE, SIDE)
        self.scratch = [plgpu.SMEM(decoded_blocks, self._dtype)] if interpret else []

    def references(self, factors: Any, refs: list[Any]) -> tuple[Any, ...]:
        """Of the factors in GPU memory, and those of `scratch`, which are taken from the beginning of `refs`."""
        return (factors, *(refs.pop(0) for _ in self.scratch))

    def fetch(self, refs: Any, wg: Any, expert: Any, col: Any) -> None:
        """Nothing: scales come with codes."""

    def load(self, block_at: Callable[..., Any], places: list[tuple[Any, int]], col: Any) -> list[tuple[Any, ...]]:
        """What each thread loads of blocks, for `decode`: asked for ahead, it has come when it is decoded.

        Args:
            block_at: gives the reference of a half, from a column on, so many columns wide.
            places: half and column of the blocks.
            col: the first column of the output that the consumer makes.
        """
        if self._interleaved:
            upper = four_bit_halves.upper_of(col)
            if self._interpret:
                return [(four_bit_halves.interpreted(block_at(*place, SIDE), self._layout, upper),) for place in places]
            return [four_bit_halves.load(block_at(*place, SIDE), self._layout, upper, self._words) for place in places]
        return [self._of_block(block_at(*place, SIDE)) for place in places]

    def _of_block(self, block: Any) -> tuple[Any, ...]:
        if self._interpret:
            return (decoded(block[...], self._layout),)
        layout, types = self._layout, self._words

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=tuple(types))
        def run(ctx, block):
            del ctx
            scale_words = layout.scale_words
            places = [(0, 4, 1)]
            places += [(CODE_LINES * LANES + LANES * scale_words * i, scale_words, 4) for i in range(len(types) - 1)]
            return tuple(_compat_words.load_words(block, *place) for place in places)

        return run(block)

    def decode(self, words: tuple[Any, ...], refs: Any, wg: Any, turn: int, place: Any) -> Any:
        """A block as an operand of wgmma, wherever its place; `turn` counts them."""
        del place
        if self._interpret:
            refs[-1][wg, turn % 2] = words[0].astype(self._dtype)
            plgpu.commit_smem()  # it does not know that each thread hands a stage back after its own loads
            return refs[-1].at[wg, turn % 2]
        layout, dtype = self._layout, self._dtype
        result = plgpu.ShapeDtypeStruct((SIDE, SIDE), dtype, layout=plgpu.Layout.WGMMA)

        @plgpu.inline_mgpu(arg_types=tuple(type_.layout for type_ in self._words), return_type=result)
        def run(ctx, *words):
            del ctx
            return _compat_words.wgmma_fragment(
                _decode([_compat_words.words_of(array) for array in words], layout), dtype
            )

        return run(*words)

    @property
    def _words(self) -> list[Any]:
        """Codes, scales and, if there are any, zero points, as many words for each of 128 threads."""
        counts = [4, *[self._layout.scale_words] * (2 if self._layout.spec.asymmetric else 1)]
        return [_words_of_threads(count) for count in counts]

    def factors(self, refs: Any, expert: Any, own: Any = 0) -> list[Any]:
        """Those of the halves of a matrix, from its half `own` on."""
        two = self._gated and self._factors > 1
        return [refs[0][expert, own + half if two else 0] for half in range(self._halves)]

    def scale(self, accs: Any, refs: Any, wg: Any, factors: list[Any]) -> list[Any]:
        """The sums of a tile, times the factor of the matrix."""
        del refs, wg
        return [acc * factor for acc, factor in zip(accs, factors, strict=True)]


def _words_of_threads(count: int) -> Any:
    shape = (128 * count,)
    return plgpu.ShapeDtypeStruct(shape, jnp.int32, layout=plgpu.Layout.WG_STRIDED(shape, count))


def _decode(arrays: list[list[Any]], layout: Layout) -> list[Any]:
    """Emits what makes 16 registers of two floats each, in the order of wgmma's operand, for each thread."""
    words, scales, zeros = (*arrays, None)[:3]
    per_row = SIDE // layout.scale_columns
    scale_of = _scales(scales, layout) if layout.is_float else _halves(scales)
    zero_of = [None] * len(scale_of) if zeros is None else _halves(zeros)
    found = {}
    for row in range(2):
        for part in range(2):  # 32 columns
            groups = [(32 * part + 16 * sixteen) // layout.scale_columns for sixteen in range(2)]
            places = [scale_of[row * per_row + group] for group in groups]
            places += [zero_of[row * per_row + groups[0]]] if zeros is not None else []
            operands = [words[2 * row + part], *(word for word, _ in places)]
            code = _pairs(layout, [half for _, half in places])
            pairs = _compat_words.inline_ptx(code, operands, 4)
            found |= {(4 * part + pair, row): value for pair, value in enumerate(pairs)}
    return [found[eight, row] for eight in range(8) for row in range(2)]


def _scales(words: list[Any], layout: Layout) -> list[tuple[Any, int]]:
    """The word and the half of it in which each scale is a float of the rows' dtype.

    A product takes either half of a word for both of its own, so two scales are made at a time.
    """
    mask, more = layout.scale_mask * 0x10001, layout.scale_more * 0x10001
    kept = f"lop3.b32 $0, t, {mask:#x}, {more:#x}, 0xEA;"
    found = []
    for word in words:
        even, odd = (
            _compat_words.inline_ptx(f"{{ .reg .b32 t; {moved} {kept} }}", [word], 1)[0]
            for moved in ("mov.b32 t, $1;", "prmt.b32 t, $1, 0, 0x0321;")
        )
        found += [(even, 0), (odd, 0), (even, 1), (odd, 1)]
    return found


def _halves(words: list[Any]) -> list[tuple[Any, int]]:
    return [(word, half) for word in words for half in range(2)]


def _pairs(layout: Layout, halves: list[int]) -> str:
    """PTX: the four pairs of a word of codes ($4), times the scales of two ($5) and two ($6); int4 less its zero point ($7).

    Args:
        layout: of the codes.
        halves: of the words with scales and zero points, in which they are.
    """
    kind = {"bfloat16": "bf16x2", "float16": "f16x2"}[layout.dtype]
    code = ["{ .reg .b32 t, u, z, s0, s1; .reg .b16 l, h;"]
    names = ("s0", "s1", "z")
    for i, half in enumerate(halves):  # the compiler makes these a part of the product
        code += [f"mov.b32 {{l, h}}, ${5 + i};", f"mov.b32 {names[i]}, {{{'lh'[half]}, {'lh'[half]}}};"]
    if not layout.is_float:
        magic, zero = (0x4300, 0xC308) if layout.dtype == "bfloat16" else (0x6400, 0xE408)
        code += [] if layout.spec.asymmetric else [f"mov.b32 z, {zero * 0x10001};"]
    for pair, terms in enumerate(layout.places):
        code += _gathered(terms)
        if not layout.is_float:
            code += [f"or.b32 t, t, {magic * 0x10001};", f"add.rn.{kind} t, t, z;"]
        code += [f"mul.rn.{kind} ${pair}, t, s{pair // 2};"]
    return " ".join([*code, "}"])


def _gathered(terms: tuple[Term, ...]) -> list[str]:
    """PTX: what the terms leave of a word of codes, in t."""
    mask = sum(term.mask for term in terms) * 0x10001
    if len(terms) > 1 and adds_up(terms):
        stored, factor = sum(term.mask >> term.left for term in terms) * 0x10001, sum(1 << term.left for term in terms)
        return [f"and.b32 t, $4, {stored};", f"mul.lo.u32 t, t, {factor};", f"and.b32 t, t, {mask};"]
    code = []
    for i, term in enumerate(terms):
        name = "tu"[i]
        code += [_rotate(name, term.left, term.mask), f"and.b32 {name}, {name}, {term.mask * 0x10001};"]
        code += ["or.b32 t, t, u;"] if i else []
    return code


def _rotate(target: str, left: int, mask: int) -> str:
    """PTX: the word of codes rotated; a shift does where the mask sees nothing of what comes round."""
    if left == 0:
        return f"mov.b32 {target}, $4;"
    if mask & -mask >= 1 << left % 16 and left < 16:
        return f"shl.b32 {target}, $4, {left};"
    if left > 16 and mask < 1 << (left - 16):
        return f"shr.u32 {target}, $4, {32 - left};"
    return f"shf.l.wrap.b32 {target}, $4, $4, {left};"
