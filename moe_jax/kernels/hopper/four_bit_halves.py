"""Prepared weights of four bits as `interleaved` takes them: of a block of the gate, and of one of the up half, 32 rows.

A block of 64 rows lies in memory by threads (`quantization.prepared`): the codes of its first 32 rows are its first eight lines.
A thread of a block has 16 bytes of codes, eight for each of two rows, and scales in the same order. Here it takes a row from each
of two blocks instead, so that it loads half as much from twice as many places, and decodes the same.
"""

from __future__ import annotations

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
        gate, up = refs[:count], refs[count:]
        found = [_compat_words.load_two_halves(gate[0], up[0], 2, None)]
        shift = None if layout.scale_words == 2 else upper
        found += [_compat_words.load_two_halves(*two, 1, shift) for two in zip(gate[1:], up[1:], strict=True)]
        return tuple(found)

    return run(*refs, upper)


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
