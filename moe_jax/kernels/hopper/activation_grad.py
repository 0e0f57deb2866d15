"""Back through an activation on Hopper, in one pass over memory.

A warpgroup takes 128 rows x 64 columns of the cotangents of the activations, and the same of the pre-activations (gate and up).
What becomes of them takes their places in shared memory and leaves from there: nothing else is held, so several CTAs share a
multiprocessor, and some compute while others wait for memory. Rows of no group are computed too, from whatever they hold.

On an H100 (benchmarks/results, 2026-11-27-h100-training-passes.txt and -training-fp8.json): 131072 rows, I 768, 448 us, 2.7 TB/s;
XLA's two fusions 595. Three or four CTAs a multiprocessor, of 32 columns at a time: 473 and 476. With FP8 codes of rows and of
columns as its outputs, in the place of 16 bits, one CTA alone found room, and the pass took 2105 us; this one and those that
quantize take 872.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from moe_jax import _compat
from moe_jax.activations import Activation
from moe_jax.kernels.hopper import row_scales, tiles, views
from moe_jax.kernels.hopper.block_codes import A_ROW, INFINITY

ROWS, COLUMNS = 128, 64  # of a tile
TAKEN = 64  # rows that registers take at a time
CTAS_PER_SM = 2  # by ptxas 186 registers a thread (silu), 255 at most


def supports(product: Any, pre_activation: Any) -> str | None:
    """Why this kernel cannot run the problem; None if it can. Shapes as in `activation_grad`."""
    rows, columns = product.shape
    if jnp.dtype(product.dtype).name not in INFINITY or pre_activation.dtype != product.dtype:
        return f"dtypes {product.dtype} and {pre_activation.dtype} must both be bfloat16, or float16"
    if columns % COLUMNS:
        return f"{columns} columns must be a multiple of the {COLUMNS} of a tile"
    return None if rows >= ROWS else f"{rows} rows must be at least the {ROWS} of a tile"


def activation_grad(
    product: Float[Array, "R I"],
    pre_activation: Float[Array, "R N"],
    row_weights: Float[Array, " R"],
    activation: Activation,
    *,
    interpret: Any = None,
    multiprocessors: int | None = None,
) -> tuple[Float[Array, "R N"], Float[Array, "R I"], Float[Array, " R"]]:
    """The three of `moe_jax.ops.input_grad.through_activation`.

    Args:
        product: the cotangents of the activations, before the router weights.
        pre_activation: gate first, of twice as many columns if the activation has a gate.
        row_weights: float32, the router weight of each row.
        activation: between the projections.
        interpret: for the interpreter.
        multiprocessors: of the device, by default.
    """
    (rows, columns), interpreted = product.shape, interpret is not None
    parts = pre_activation.shape[1] // columns  # gate and up, or one
    across = columns // COLUMNS
    blocks = pl.cdiv(rows, ROWS)
    again = blocks * ROWS - rows  # the last block begins early, with rows that the one before it sends
    workers = CTAS_PER_SM * (multiprocessors or _compat.num_multiprocessors())
    tile = views.Operand(parts + 1, ROWS, COLUMNS, COLUMNS, product.dtype, interpreted)

    def body(d_g, h_g, s_g, back_g, a_g, sums_g, tiles_s, full):
        worker = lax.axis_index("sm")

        def tile_of(matrices, i, row, column):
            """Of gate and up, or whatever the pre-activation has, and last of the activations."""
            matrix, of_part = (matrices[1], 0) if i == parts else (matrices[0], i * across)
            return matrix.at[pl.ds(row, ROWS), pl.ds((column + of_part) * COLUMNS, COLUMNS)]

        def replace(first, row):
            """Takes what is made of some rows to its places; returns the sums of rows."""
            places = [tile.eights(tiles_s).at[i, 0, pl.ds(first, TAKEN)] for i in range(parts + 1)]
            *h, d = (plgpu.load(place, layout=plgpu.Layout.WGMMA).astype(jnp.float32) for place in places)
            weights = plgpu.load(s_g.at[pl.ds(row + first, TAKEN)], layout=A_ROW, optimized=False)
            s = lax.broadcast_in_dim(weights, d.shape, [0])
            value, *slopes = activation.slopes_gated(*h) if parts == 2 else activation.slope(*h)
            scaled = d * s
            for place, found in zip(places, [*(scaled * slope for slope in slopes), value * s], strict=True):
                place[...] = found.astype(product.dtype)
            return jnp.sum(d * value, axis=1)

        @pl.loop(0, tiles.share(blocks * across, worker, workers))
        def _tile(turn):
            index = worker + turn * workers
            block = lax.div(index, jnp.int32(across))
            column = index - block * across
            row = jnp.minimum(block * ROWS, rows - ROWS)
            skip = block * ROWS - row
            singles = tile.singles(tiles_s)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for i in range(parts + 1):
                plgpu.copy_gmem_to_smem(tile_of((h_g, d_g), i, row, column), singles.at[i, 0], full)
            plgpu.barrier_wait(full)
            for first in range(0, ROWS, TAKEN):
                row_scales.store(sums_g, column, block * ROWS + first, replace(first, row), TAKEN, A_ROW, interpreted)
            plgpu.commit_smem()
            for i in range(parts + 1):
                target = tile_of((back_g, a_g), i, row, column)

                def send(first, count, i=i, target=target):
                    sent = pl.ds(skip + first, count)
                    plgpu.copy_smem_to_gmem(singles.at[i, 0, sent], target.at[sent], commit_group=False)

                views.send_first(send, ROWS - skip, ROWS)
            plgpu.commit_smem_to_gmem_group()

        plgpu.wait_smem_to_gmem(0)

    body.__name__ = "activation_grad"
    shapes = [
        (pre_activation.shape, product.dtype),
        (product.shape, product.dtype),
        ((across, blocks * ROWS), jnp.float32),
    ]
    back, activated, sums = _compat.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(*shape) for shape in shapes],
        grid=(workers,),
        grid_names=("sm",),
        scratch_types=[tile.scratch, plgpu.Barrier(num_arrivals=parts + 1)],
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, lowering_semantics=_compat.LANE),
        interpret=interpret,
    )(product, pre_activation, row_weights)
    summed, last = jnp.sum(sums, axis=0), (blocks - 1) * ROWS
    return back, activated, jnp.concatenate([summed[:last], summed[last + again :]]) if again else summed
