"""Gate and up rows of weights in one block of a consumer, for weights that are decoded and few rows.

wgmma takes 64 rows of weights, 16 from each warp, and a thread gets sums of rows `g` and `g + 8` of those of its warp. With eight
rows of the gate before the same eight of the up half, and so on, a thread has both sums of a column of the output: a consumer
makes 32 columns, whole. Nothing is handed over between consumers, and there are twice as many tiles of half the work, for one
token, whose experts' weights are few tiles for all multiprocessors.

Weights that are read from shared memory or decoded by rows lie there in that order: TMA brings them by eights. Prepared weights
of four bits come as halves of their blocks (`four_bit_halves`), from each of which a thread takes the row it needs.

One token of dsv3-ep8 on an H200, up-projection: 18.3 us with pairs and 13.0 this way, NVFP4; 20.6 and 15.9, int8
(benchmarks/results/2026-11-28-h200-few-rows-variants.txt). Which tiles are best: `decoding_config`.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax import _compat, _compat_words

COLUMNS = 32  # of the output that 64 rows of weights make
EIGHT = 8  # rows of one half that stand together
# Eight columns of the output a warp, otherwise as wgmma holds its sums.
LAYOUT = _compat.tiled_layout(
    ((COLUMNS, EIGHT), (EIGHT, EIGHT), (2,)), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)


def split(acc: Any, interpret: bool) -> list[Any]:
    """The sums of gate and up, ``[32, rows]`` each, of ``[64, rows]``."""
    rows = acc.shape[1]
    if interpret:
        eights = acc.reshape(COLUMNS // EIGHT, 2, EIGHT, rows)
        return [eights[:, half].reshape(COLUMNS, rows) for half in range(2)]
    part = plgpu.ShapeDtypeStruct((COLUMNS, rows), acc.dtype, layout=LAYOUT)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=(part, part))
    def run(ctx, acc):
        del ctx
        return _compat_words.every_other(acc, LAYOUT, (COLUMNS, rows))

    return list(run(acc))


def joined(gate: Any, up: Any) -> Any:
    """``[64, K]`` of two times ``[32, K]``, by eights: what the interpreter multiplies.

    Example:
        >>> joined(jnp.zeros((32, 1)), jnp.ones((32, 1)))[:24:8, 0].tolist()
        [0.0, 1.0, 0.0]
    """
    parts = [half.reshape(COLUMNS // EIGHT, EIGHT, -1) for half in (gate, up)]
    return jnp.stack(parts, axis=1).reshape(2 * COLUMNS, -1)
