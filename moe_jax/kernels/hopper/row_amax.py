"""The largest magnitude of the rows that count, for one scale for all of them: on Hopper, at the speed of memory.

Each CTA writes the largest of its rows. Whoever needs the one of all takes the maximum of these few numbers: `gather_quantize`
does so in every CTA, which costs less than another kernel, and no order of additions is at stake.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from moe_jax import _compat
from moe_jax.kernels.hopper import row_stream, tiles
from moe_jax.kernels.hopper.scaling import Scaling
from moe_jax.quantization.formats import Spec

_CTAS_PER_SM = 8  # at most
_THREADS = 128  # the numbers are a multiple of those of a warpgroup


def row_amax(
    x: Float[Array, "T H"],
    positions: Int[Array, "T k"] | None,
    spec: Spec,
    *,
    weights: Float[Array, "T 1"] | None = None,
    num_rows: Int[Array, "1"] | None = None,
    interpret: Any = None,
    multiprocessors: int | None = None,
) -> Float[Array, " W"]:
    """Magnitudes whose maximum is that of the rows that count: of tokens with a place, or of the first `num_rows`.

    An infinity counts as the largest finite float32. FP8 passes NaN over, for integers the maximum is NaN then. What is not
    finite in a row that does not count does not show.

    Args:
        x: hidden states; `moe_jax.kernels.hopper.gather_quantize.supports` says which.
        positions: rows of each token, -1 for none.
        spec: the format of the codes.
        weights: float32, a factor of each token.
        num_rows: without positions, the rows that count; all by default.
        interpret: how the kernel is interpreted, None on a GPU.
        multiprocessors: to be used; those of the GPU by default.
    """
    tile = row_stream.Tile(row_stream.BLOCKS[-1], x.dtype, interpret is not None)
    plan = row_stream.Plan.of(x, tile, multiprocessors or _compat.num_multiprocessors(), _CTAS_PER_SM)
    total = pl.cdiv(plan.workers, _THREADS) * _THREADS
    scaling = Scaling(spec, given=False, interpret=interpret is not None)
    operands = {"positions": positions, "weights": weights, "num_rows": num_rows}
    operands = {name: operand for name, operand in operands.items() if operand is not None}

    def largest_of_rows(x_g, *refs):
        given = dict(zip(operands, refs, strict=False))
        out_g, rows_s, full = refs[len(operands) :]
        stream = row_stream.Stream(plan, x_g, rows_s, full, given["num_rows"][0] if "num_rows" in given else None)

        def one(i, order):
            token = stream.token(i)
            weight = given["weights"][token, 0] if weights is not None else None
            last = None
            for j in range(positions.shape[1] if positions is not None else 0):
                place = given["positions"][token, j]
                last = place if last is None else jnp.maximum(last, place)
            row = stream.wait(i)
            for part in range(plan.tiles):
                held = tile.load(row, part)
                held = held.astype(jnp.float32) if weight is None else scaling.weigh(held, weight)
                mine = scaling.order(held)
                if last is not None:
                    mine = mine & ((last >> 31) ^ -1)  # nothing if the token has no place
                order = jnp.maximum(order, mine)
            plgpu.commit_smem()  # every thread is done with the row
            return order

        zero = plgpu.layout_cast(jnp.zeros((tile.groups, tile.block), jnp.int32), tile.layout)
        order = lax.fori_loop(0, stream.size, one, zero)
        found = scaling.amax(jnp.max(jnp.max(order, axis=1), axis=0))

        @pl.loop(0, tiles.share(total, stream.worker, plan.workers))
        def _(i):
            out_g[stream.token(i)] = jnp.where(i == 0, found, jnp.float32(0))

    return _compat.kernel(
        largest_of_rows,
        out_type=jax.ShapeDtypeStruct((total,), jnp.float32),
        grid=(plan.workers,),
        grid_names=("sm",),
        scratch_types=plan.scratch,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, lowering_semantics=_compat.LANE),
        interpret=interpret,
    )(x, *operands.values())
