"""Back through an activation on Hopper, quantized on the way: no derivative of 16 bits reaches memory.

A warpgroup takes 128 rows of a group x 128 columns of the cotangents of the activations, and the same of the pre-activations (of
gate and up). What becomes of them, in float32 and rounded to 16 bits as in `moe_jax.ops.input_grad.through_activation`, takes
their places in shared memory. From there each leaves as `quantize_blocks` would have sent it. A place that has been read takes
what the next block needs while the others are quantized. All codes leave through one buffer; with a gate two CTAs still miss the
shared memory of a multiprocessor by about a kilobyte, so one runs. Not timed yet.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Shaped

from moe_jax import _compat
from moe_jax.activations import Activation
from moe_jax.kernels.hopper import row_scales, tiles
from moe_jax.kernels.hopper.block_codes import A_ROW, PIECE, PIECES, SIDE, Block, ColumnsOut, RowsOut
from moe_jax.kernels.hopper.gather_quantize import scales_shape
from moe_jax.quantization.formats import Spec

CTAS_PER_SM = 2


def activation_blocks(
    product: Float[Array, "R I"],
    pre_activation: Float[Array, "R N"],
    row_weights: Float[Array, " R"],
    starts: Int[Array, "blocks"],
    sizes: Int[Array, "blocks"],
    count: Int[Array, "1"],
    activation: Activation,
    *,
    row_spec: Spec,
    spec: Spec,
    activated_spec: Spec,
    interpret: Any = None,
    multiprocessors: int | None = None,
) -> tuple[Shaped[Array, "..."], ...]:
    """Of the cotangents of pre-activations the codes and scales of the rows, and those transposed; of the activations times the
    router weights those transposed; and float32 ``[I / 128, R and some to spare]``, parts of the cotangents of router weights.

    Args:
        product: the cotangents of the activations, before the router weights.
        pre_activation: gate first, of twice as many columns if the activation has a gate.
        row_weights: float32, the router weight of each row.
        starts: the first row of each block.
        sizes: its rows, at most 128.
        count: blocks that hold rows, the first ones; others stay undefined.
        activation: between the projections.
        row_spec: of the cotangents, FP8 in groups of 128 columns.
        spec: of the cotangents transposed, FP8 in blocks of 128 x 128.
        activated_spec: of the activations, likewise.
        interpret: for the interpreter.
        multiprocessors: of the device, by default.
    """
    (rows, columns), blocks, across = product.shape, starts.shape[0], product.shape[1] // SIDE
    wide, interpreted = pre_activation.shape[1], interpret is not None
    parts = wide // columns  # gate and up, or one
    workers = CTAS_PER_SM * (multiprocessors or _compat.num_multiprocessors())
    block, rows_out = Block(product.dtype, interpreted, parts + 1), RowsOut(row_spec, interpreted)
    columns_out, activated_out = ColumnsOut(spec, interpreted), ColumnsOut(activated_spec, interpreted)

    def body(
        d_g,
        h_g,
        s_g,
        starts_g,
        sizes_g,
        count_g,
        codes_g,
        scales_g,
        turned_g,
        turned_scales_g,
        a_g,
        a_scales_g,
        sums_g,
        *scratch,
    ):
        in_s, full, *out = scratch
        # One buffer of shared memory; the interpreter gives each its own.
        turned_s, activated_s, *rows_s = out if interpreted else out[0]
        rows_s = rows_s[0] if interpreted else rows_s
        worker = lax.axis_index("sm")
        turns = tiles.share(count_g[0] * across, worker, workers)

        def place(i):
            number, column = (
                lax.div(worker + i * workers, jnp.int32(across)),
                lax.rem(worker + i * workers, jnp.int32(across)),
            )
            return number, starts_g[number], column, sizes_g[number]

        def fetch(i, tile):
            _, row, column, _ = place(i)
            source, column = (d_g, column) if tile == parts else (h_g, column + tile * across)
            for piece in range(PIECES):
                wanted = source.at[pl.ds(row, SIDE), pl.ds(column * SIDE + piece * PIECE, PIECE)]
                plgpu.copy_gmem_to_smem(wanted, block.single(in_s, piece, tile), full.at[tile])

        def replace(piece, first, row, size):
            """Takes the cotangents and the activations to the places of what they are made of; returns the sums of rows."""
            *h, d = (block.part(in_s, tile, piece, first) for tile in range(parts + 1))
            weights = plgpu.load(s_g.at[pl.ds(row + first, PIECE)], layout=A_ROW, optimized=False)
            s = lax.broadcast_in_dim(weights, d.shape, [0])
            value, *slopes = activation.slopes_gated(*h) if parts == 2 else activation.slope(*h)
            place = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, d.shape, 0), plgpu.Layout.WGMMA)
            held, scaled = place + first < size, d * s
            for tile, found in enumerate([*(scaled * slope for slope in slopes), value * s]):
                kept = jnp.where(held, found, jnp.zeros_like(found)).astype(product.dtype)
                block.eights(in_s, piece, tile).at[pl.ds(first, PIECE)][...] = kept
            return jnp.sum(d * value, axis=1)

        @pl.when(turns > 0)
        def _():
            for tile in range(parts + 1):
                fetch(0, tile)

        @pl.loop(0, turns)
        def _block(i):
            number, row, column, size = place(i)
            for tile in range(parts + 1):
                plgpu.barrier_wait(full.at[tile])
            for first in range(0, SIDE, PIECE):
                sums = functools.reduce(jnp.add, [replace(piece, first, row, size) for piece in range(PIECES)])
                row_scales.store(sums_g, column, row + first, sums, size - first, A_ROW, interpreted)
            plgpu.commit_smem()
            for tile in range(parts + 1):
                at, own = (row, column + tile * across), (codes_g, scales_g)
                if tile == parts:
                    way_out, codes_s, target, target_scales, line = activated_out, activated_s, a_g, a_scales_g, column
                else:
                    way_out, codes_s, target, target_scales = columns_out, turned_s, turned_g, turned_scales_g
                    line = at[1]
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    plgpu.commit_smem()  # for all threads
                    rows_out.fill(rows_s, functools.partial(block.part, in_s, tile), own, at, size)
                    plgpu.commit_smem()
                    rows_out.send(rows_s, own, at, size)
                    plgpu.commit_smem_to_gmem_group()
                halves = block.transposed(in_s, tile)
                scale, inverse = way_out.scale(block.largest(halves))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.commit_smem()  # also: every thread has taken the tile
                pl.when(i + 1 < turns)(lambda tile=tile: fetch(i + 1, tile))
                way_out.fill(codes_s, map(block.values, halves), inverse)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(codes_s, target.at[pl.ds(line * SIDE, SIDE), pl.ds(number * SIDE, SIDE)])
                target_scales[line, number] = scale

        plgpu.wait_smem_to_gmem(0)

    body.__name__ = "activation_blocks"
    of_rows, f32 = scales_shape(rows, wide, row_spec), jnp.float32
    shapes = [((rows, wide), row_spec.storage_dtype), (of_rows, f32)]
    for width, of in ((wide, spec), (columns, activated_spec)):
        shapes += [((width, blocks * SIDE), of.storage_dtype), ((width // SIDE, blocks), f32)]
    shapes.append(((across, of_rows[1]), f32))
    out = [columns_out.scratch, activated_out.scratch, rows_out.scratch]
    if not interpreted:
        out = [plgpu.RefUnion(*out[:2], *rows_out.scratch.refs)]
    found = _compat.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(*shape) for shape in shapes],
        grid=(workers,),
        grid_names=("sm",),
        scratch_types=[block.scratch, plgpu.Barrier(num_arrivals=PIECES, num_barriers=parts + 1), *out],
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, lowering_semantics=_compat.LANE),
        interpret=interpret,
    )(product, pre_activation, jnp.pad(row_weights, (0, SIDE)), starts, sizes, count)
    return tuple(found)
