"""Prepared weights of four bits as `interleaved` takes them: of a block of the gate, and of one of the up half, 32 rows.

A block of 64 rows lies in memory by threads (`quantization.prepared`): the codes of its first 32 rows are its first eight lines.
A thread of a block has 16 bytes of codes, eight for each of two rows, and scales in the same order. Here it takes a row from each
of two blocks instead, so that it loads half as much from twice as many places, and decodes the same. A loop of four blocks has
321 instructions (NVFP4), 300 with whole blocks (benchmarks/results/2026-11-28-machine-code-four-bits.txt).
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
from moe_jax.kernels.hopper.matmul_config import Config
from moe_jax.quantization.prepared import PreparedArray, decoded
from moe_jax.quantization.prepared_layout import CODE_LINES, LANES, SIDE, Layout

_LINES = CODE_LINES // 2  # of codes, of half a block


class Half(NamedTuple):
    """Where half a block lies in shared memory.

    Attributes:
        codes: ``[8, 32]`` words.
        more: a line ``[1, 32]`` with scales, and one with zero points, where a format has them.
    """

    codes: Any
    more: list[Any]


class HalfBlocks:
    """How a stage of the ring holds halves of blocks, of each consumer gate and up.

    Args:
        weights: ``[E, N, K]``, gate and up.
        config: how the work is tiled.
    """

    def __init__(self, weights: PreparedArray, config: Config):
        self._consumers, self._deep = config.consumers, config.tile_k // SIDE
        self._blocks = weights.values.shape[1] // 2
        layout = weights.layout
        self._scale_words = layout.scale_words
        self._kinds = 2 if layout.spec.asymmetric else 1
        units = (config.stages, 2 * config.consumers)
        self.copies = 2 * config.consumers * (1 + self._kinds)
        self.scratch = [
            plgpu.SMEM((*units, self._deep, _LINES, LANES), jnp.int32),
            plgpu.SMEM((*units, self._kinds, self._deep, 1, LANES), jnp.int32),
        ]

    def fetch(self, source: Any, target: Any, expert: Any, n: Any, step: Any, slot: Any, full: Any) -> None:
        """Asks for the halves of a step of tile column `n`."""
        codes, more = target
        deep = pl.ds(step * self._deep, self._deep)
        for wg in range(self._consumers):
            strip = n * self._consumers + wg
            block, upper = lax.div(strip, jnp.int32(2)), lax.rem(strip, jnp.int32(2))
            for half in range(2):
                row, unit = half * self._blocks + block, 2 * wg + half
                of_codes = source.at[expert, row, deep, pl.ds(upper * _LINES, _LINES)]
                plgpu.copy_gmem_to_smem(of_codes, codes.at[slot, unit], full.at[slot])
                for kind in range(self._kinds):
                    # Two words of scales a thread fill two lines, the second of which is that of the other half.
                    line = CODE_LINES + kind * self._scale_words + (upper if self._scale_words == 2 else 0)
                    part = source.at[expert, row, deep, pl.ds(line, 1)]
                    plgpu.copy_gmem_to_smem(part, more.at[slot, unit, kind], full.at[slot])

    def block(self, ref: Any, slot: Any, wg: Any, half: Any, column: int, columns: int) -> list[Half]:
        """Gate and up of a stage from `column` of its K on."""
        del half
        assert columns == SIDE, columns
        (codes, more), at = ref, column // SIDE
        units = [2 * wg + half for half in range(2)]
        return [Half(codes.at[slot, u, at], [more.at[slot, u, kind, at] for kind in range(self._kinds)]) for u in units]


def upper_of(col: Any) -> Any:
    """Whether 32 columns of the output, from `col` on, are the second half of their block."""
    return lax.rem(lax.div(col, jnp.int32(interleaved.COLUMNS)), jnp.int32(2))


def load(halves: list[Half], layout: Layout, upper: Any, types: list[Any]) -> tuple[Any, ...]:
    """What each thread loads of gate and up, arrays of `types`: as of a block whose rows they were, by eights."""
    refs = [ref for half in halves for ref in (half.codes, *half.more)]

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * len(refs), plgpu.Layout.WG_SPLAT), return_type=tuple(types))
    def run(ctx, *operands):
        del ctx
        *refs, upper = operands
        count = len(refs) // 2
        thread, upper = _compat_words.thread(), _compat_words.word_of_all(upper)
        found = words_of_thread(
            layout,
            thread,
            upper,
            lambda half, part, place, words: _compat_words.load_from(refs[half * count + part], place, words),
        )
        return tuple(_compat_words.array_of_words(words) for words in found)

    return run(*refs, upper)


def words_of_thread(layout: Layout, thread: Any, upper: Any, load: Callable[..., list[Any]]) -> list[list[Any]]:
    """The words of a thread's two rows, that of the gate first: codes, scales and, if there are any, zero points.

    Args:
        layout: of the blocks.
        thread: its number in the warpgroup, a word.
        upper: 1 for the second halves of the blocks, else 0, a word.
        load: `count` words of gate (0) or up (1): of codes (0) or scales and zero points, from a place in bytes on.
    """
    ptx = _compat_words.inline_ptx
    (place,) = ptx(_place("", 3), [thread], 1)
    found = [[word for half in range(2) for word in load(half, 0, place, 2)]]
    kinds = 2 if layout.spec.asymmetric else 1
    if layout.scale_words == 2:  # one for each row
        (place,) = ptx(_place("shr.u32 a, a, 2;", 2), [thread], 1)
        return found + [[load(half, 1 + kind, place, 1)[0] for half in range(2)] for kind in range(kinds)]
    (place,) = ptx(_PLACE_OF_BOTH, [thread, upper], 1)
    selectors = ptx(_SELECTORS, [thread], 2)
    for kind in range(kinds):
        both = [load(half, 1 + kind, place, 1)[0] for half in range(2)]
        found.append(ptx(_of_either(layout), [*both, *selectors], 1))
    return found


# A thread of a block, of 64 with rows in one half of it: each second warp has the second row of one.
_THREAD = "{ .reg .b32 a, b; shr.u32 a, $1, 6; shl.b32 a, a, 5; and.b32 b, $1, 31; or.b32 a, a, b;"


def _place(more: str, left: int) -> str:
    """PTX: where the words of a row are, in bytes ($0), for a thread ($1): those of two rows are neighbours."""
    return f"{_THREAD} {more} shl.b32 a, a, 1; bfe.u32 b, $1, 5, 1; or.b32 a, a, b; shl.b32 $0, a, {left}; }}"


# PTX: where a word for both rows is, of four threads each, the second halves of blocks ($2) behind the first.
_PLACE_OF_BOTH = f"{_THREAD} shr.u32 a, a, 2; shl.b32 b, $2, 4; or.b32 a, a, b; shl.b32 $0, a, 2; }}"
# PTX: how bytes of the gate's word ($0) and of the other ($1) are moved for a thread ($2): what it needs of the gate to the lower
# half, of the other to the upper half of a word.
_SELECTORS = (
    "{ .reg .b32 s; bfe.u32 s, $2, 5, 1; mad.lo.u32 $0, s, 0xffffde22, 0x3210; mad.lo.u32 $1, s, 0x21de, 0x1032; }"
)


def _of_either(layout: Layout) -> str:
    """PTX: the lower half of the gate's word ($1) and the upper of the other ($2), as `_SELECTORS` ($3, $4) move them."""
    left = layout.scale_left
    lower = (0xFFFF << left | 0xFFFF >> (32 - left)) & 0xFFFFFFFF if left else 0xFFFF
    return (
        "{ .reg .b32 a, b; prmt.b32 a, $1, 0, $3; prmt.b32 b, $2, 0, $4; "
        f"and.b32 a, a, {lower:#x}; and.b32 b, b, {lower ^ 0xFFFFFFFF:#x}; or.b32 $0, a, b; }}"
    )


def interpreted(halves: list[Half], layout: Layout, upper: Any) -> Any:
    """What `load` would give, decoded: float32 ``[64, 64]``."""
    rows = []
    for half in halves:
        codes = half.codes[...]
        lines = [codes, codes]  # as if both halves of the block had these codes
        for line in half.more:
            lines += [line[...]] * layout.scale_words
        both = decoded(jnp.concatenate(lines), layout)
        rows.append(jnp.where(upper == 1, both[SIDE // 2 :], both[: SIDE // 2]))
    return interleaved.joined(*rows)
