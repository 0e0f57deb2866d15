"""A matrix quantized in blocks of 128 x 128 and transposed, in one pass over it, on Hopper; also in its own order.

A warpgroup takes a block at a time. TMA brings it into swizzled shared memory, and registers take it transposed (`block_codes`).
The block's largest magnitude gives its scale, and codes leave through shared memory in rows of 128 bytes. The next block is on
its way meanwhile. Several CTAs share a multiprocessor: one computes while the others wait for memory.

Rows may be those of tokens, fetched from wherever these lie (`rows_by_token`). Then all blocks of the first 128 columns are
visited before those of the next: 128 columns of all tokens stay in L2, from where the token's other rows take them.

Blocks may begin at any row and may have fewer rows than 128; what lies after them is zero, whatever it was. In its own order a
block has the same codes and scale (weights), or a scale for each row (`RowsOut`, cotangents): shared memory is read twice, memory
once. Codes and scales are those of `moe_jax.quantization.quantize`, bit for bit.

On an H100 (benchmarks/results, 2026-11-27-h100-training-passes.txt): w13 of qwen3-30b-a3b in both orders 590 us, 2.7 TB/s; 131072
rows of 1536, rows and columns, 312 us, 2.6 TB/s; of 768, columns alone, 112; of 2048 fetched by token, rows and columns, 438 us
with two CTAs a multiprocessor and 634 with one, columns alone 216.

Or a scale is given, one for all rows or one for each matrix, and read from GPU memory: both orders have it, and codes alone are
made. So it is with `Fp8Training(scaling="tensor")`; not yet run on a GPU. By ptxas no more registers than below, and no spills.

By ptxas 168 registers a thread and no spills. Magnitudes are compared as 16-bit integers: as float32 they stay in registers
until they are scaled, which takes 255.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Shaped

from moe_jax import _compat
from moe_jax.kernels.hopper import tiles
from moe_jax.kernels.hopper.block_codes import INFINITY, PIECE, PIECES, SIDE, Block, BlockOut, ColumnsOut, RowsOut
from moe_jax.kernels.hopper.gather_quantize import scales_shape
from moe_jax.kernels.hopper.rows_by_token import RowsByToken
from moe_jax.quantization.formats import Spec


@dataclasses.dataclass(frozen=True)
class Config:
    """How many CTAs share a multiprocessor."""

    ctas_per_sm: int = 3
    ctas_by_token: int = 2  # with two blocks each


def supports(x: Any) -> str | None:
    """Why this kernel cannot quantize `x` [..., columns]; None if it can."""
    if jnp.dtype(x.dtype).name not in INFINITY:
        return f"dtype {x.dtype} must be bfloat16 or float16"
    if x.shape[-1] % SIDE:
        return f"{x.shape[-1]} columns must be a multiple of {SIDE}, of whole blocks"
    return None if x.size else f"an empty operand {x.shape} needs no kernel"


def quantize_rows_of_blocks(
    x: Float[Array, "R_or_T M"],
    starts: Int[Array, "blocks"],
    sizes: Int[Array, "blocks"],
    count: Int[Array, "1"],
    spec: Spec,
    *,
    row_spec: Spec | None = None,
    row_tokens: Int[Array, "padded_rows"] | None = None,
    scale: Float[Array, "1"] | None = None,
    **options: Any,
) -> tuple[Shaped[Array, "..."], ...]:
    """Codes ``[M, 128 * blocks]`` of x transposed, and scales ``[M / 128, blocks]``: block b has rows `starts[b]` on, `sizes[b]`
    of them. With `row_spec` before these two the codes and scales of the same rows that `gather_quantize` gives. Of a given scale
    codes alone.

    Args:
        x: rows.
        starts: the first row of each block.
        sizes: its rows, at most 128; the rest of it is zero.
        count: blocks that are quantized, the first ones; others stay undefined.
        spec: FP8 in blocks of 128 x 128, or with one scale if that is given.
        row_spec: FP8 in groups of 128 columns, or likewise, of the rows as they are; None if these are not wanted.
        row_tokens: the row of x that each of R rows is, and 128 more numbers; None if they are the rows of x.
        scale: float32, of all rows, as `quantize` makes it; None if each block and each group has its own.
        **options: of the kernel: `config`, `interpret`, `multiprocessors`.
    """
    (rows, columns), blocks = x.shape, starts.shape[0]
    rows = rows if row_tokens is None else row_tokens.shape[0] - SIDE
    given = [] if scale is None else [scale]
    out_types = []
    if row_spec is not None:
        of_rows = jax.ShapeDtypeStruct(scales_shape(rows, columns, row_spec), jnp.float32)
        out_types = [jax.ShapeDtypeStruct((rows, columns), row_spec.storage_dtype)] + [of_rows] * (not given)
    out_types.append(jax.ShapeDtypeStruct((columns, blocks * SIDE), spec.storage_dtype))
    if not given:
        out_types.append(jax.ShapeDtypeStruct((columns // SIDE, blocks), jnp.float32))
    across = columns // SIDE

    def place(index, refs):
        count_g, starts_g, sizes_g, *own = refs
        scales_g = own.pop(0 if given else -1)  # the last operand, or the last result
        codes_g = own.pop()
        line = jnp.int32(across) if row_tokens is None else count_g[0]
        outer = lax.div(index, line)
        inner = index - outer * line
        number, column = (outer, inner) if row_tokens is None else (inner, outer)
        target = codes_g.at[pl.ds(column * SIDE, SIDE), pl.ds(number * SIDE, SIDE)]
        scales = [scales_g.at[0] if given else scales_g.at[column, number]]
        return (starts_g[number], column), sizes_g[number], target, own, scales

    own = None if row_spec is None else RowsOut(row_spec, options.get("interpret") is not None)
    options |= {"row_tokens": row_tokens, "given": bool(given)}
    operands = [count, starts, sizes, *given]
    return _call(x, operands, out_types, lambda refs: refs[0][0] * across, place, spec, own, **options)


def quantize_both(
    weights: Float[Array, "E N K"],
    spec: Spec,
    *,
    natural: bool,
    scales: Float[Array, "E"] | None = None,
    **options: Any,
) -> tuple[Shaped[Array, "..."], ...]:
    """Codes and scales of matrices transposed, ``[E, K, N]`` and ``[E, K / 128, N / 128]``, and with `natural` before these two
    those in their own order. Of given scales codes alone.

    Args:
        weights: N and K multiples of 128.
        spec: float8_e4m3fn in blocks of 128 x 128, or with one scale a matrix if these are given.
        natural: both are wanted.
        scales: float32, of each matrix, as `quantize` makes it; None if each block has its own.
        **options: of the kernel: `config`, `interpret`, `multiprocessors`.
    """
    experts, n, k = weights.shape
    down, across = n // SIDE, k // SIDE
    given = [] if scales is None else [scales]
    shapes = [(experts, n, k), (experts, down, across)] if natural else []
    shapes += [(experts, k, n), (experts, across, down)]
    out_types = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in zip(shapes, [spec.storage_dtype, jnp.float32] * 2, strict=False)
    ]
    out_types = out_types[::2] if given else out_types

    def place(index, refs):
        scales_g, *refs = refs if given else (refs[-1], *refs[:-1])  # the operand, or the last result
        codes_g = refs[-1]
        row = lax.div(index, jnp.int32(across))  # of blocks, of all experts
        column = index - row * across
        expert = lax.div(row, jnp.int32(down))
        row_of = row - expert * down
        here, there = pl.ds(row_of * SIDE, SIDE), pl.ds(column * SIDE, SIDE)
        scales = [scales_g.at[expert] if given else scales_g.at[expert, column, row_of]]
        own = refs[0].at[expert, here, there] if natural else None
        if natural and not given:
            scales.append(refs[1].at[expert, row_of, column])
        return (row * SIDE, column), SIDE, codes_g.at[expert, there, here], own, scales

    total = experts * down * across
    flat = weights.reshape(experts * n, k)
    own = BlockOut(spec, options.get("interpret") is not None) if natural else None
    options["given"] = bool(given)
    return _call(flat, given, out_types, lambda refs: jnp.int32(total), place, spec, own, **options)


def _call(
    x: Array,
    operands: list[Array],
    out_types: list[Any],
    total: Any,
    place: Any,
    spec: Spec,
    own_order: BlockOut | RowsOut | None,
    *,
    row_tokens: Int[Array, "padded_rows"] | None = None,
    given: bool = False,
    config: Config = Config(),
    interpret: Any = None,
    multiprocessors: int | None = None,
) -> tuple[Array, ...]:
    """Runs the kernel.

    Args:
        x: the rows of all blocks.
        operands: what else it reads.
        out_types: what it makes.
        total: of all references but those of x and `row_tokens`, how many blocks there are.
        place: of the number of a block and the references: its first row and column, how many of its rows count, where its codes
            go transposed and in their own order, and where its scale goes, or is.
        spec: of the codes.
        own_order: how codes go out in their own order too; None if they do not.
        row_tokens: the row of x that each row is, and a block more; None if they are the rows of x.
        given: scales are read, not made.
        config: how the work is shared.
        interpret: for the interpreter.
        multiprocessors: of the device, by default.
    """
    interpreted = interpret is not None
    by_token = row_tokens is not None
    stages = 2 if by_token else 1
    ctas = config.ctas_by_token if by_token else config.ctas_per_sm
    workers = ctas * (multiprocessors or _compat.num_multiprocessors())
    block, columns_out = Block(x.dtype, interpreted, stages), ColumnsOut(spec, interpreted)
    sources = [x, row_tokens] if by_token else [x]

    def body(x_g, *refs):
        tokens_g, refs = (refs[0], refs[1:]) if by_token else (None, refs)
        refs, scratch = refs[: len(operands) + len(out_types)], refs[len(operands) + len(out_types) :]
        in_s, out_s, full, *own_s = scratch
        worker = lax.axis_index("sm")
        blocks = tiles.share(total(refs), worker, workers)
        copier = RowsByToken(x_g, SIDE, interpreted) if by_token else None

        def tokens_of(i):
            (row, _), size, *_ = place(worker + i * workers, refs)
            return copier.tokens(tokens_g, row, size)

        def fetch(i, tokens=None):
            (row, column), *_ = place(worker + i * workers, refs)
            if by_token:
                pieces = [block.eights(in_s, piece, lax.rem(i, stages)) for piece in range(PIECES)]
                copier.start(tokens, pieces, column * SIDE, full)
                return
            for piece in range(PIECES):
                source = x_g.at[pl.ds(row, SIDE), pl.ds(column * SIDE + piece * PIECE, PIECE)]
                plgpu.copy_gmem_to_smem(source, block.single(in_s, piece), full)

        def wait(i):
            """For a block. Those of tokens have two places: the next one is asked for as soon as this one is there."""
            if not by_token:
                plgpu.barrier_wait(full)
                return
            tokens = tokens_of(jnp.minimum(i + 1, blocks - 1))
            copier.finish(0)
            plgpu.commit_smem()  # the copies of the other threads too
            pl.when(i + 1 < blocks)(lambda: fetch(i + 1, tokens))

        pl.when(blocks > 0)(lambda: fetch(0, tokens_of(0) if by_token else None))

        @pl.loop(0, blocks)
        def _block(i):
            at, size, target, own, scales = place(worker + i * workers, refs)
            stage = lax.rem(i, stages) if by_token else 0
            wait(i)
            if not isinstance(size, int):
                block.clear(in_s, stage, size)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the codes of the block before have left
            load = functools.partial(block.part, in_s, stage)
            inverse = columns_out.inverse(scales[0][...]) if given else None
            if isinstance(own_order, RowsOut):
                own_order.fill(own_s[0], load, own, at, size, inverse)
            halves = block.transposed(in_s, stage)
            if not given:
                scale, inverse = columns_out.scale(block.largest(halves))
            if isinstance(own_order, BlockOut):
                own_order.fill(own_s[0], load, inverse)
            plgpu.commit_smem()  # also: every thread has taken the block
            if not by_token:
                pl.when(i + 1 < blocks)(lambda: fetch(i + 1))
            columns_out.fill(out_s, map(block.values, halves), inverse)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_s, target, commit_group=False)
            if own_order is not None:
                own_order.send(own_s[0], own, at, size)
            plgpu.commit_smem_to_gmem_group()
            for ref in [] if given else scales:
                ref[...] = scale

        plgpu.wait_smem_to_gmem(0)

    body.__name__ = "quantize_blocks"
    scratch = [block.scratch, columns_out.scratch, plgpu.Barrier(num_arrivals=1 if by_token else PIECES)]
    if own_order is not None:
        scratch.append(own_order.scratch)
    found = _compat.kernel(
        body,
        out_type=out_types,
        grid=(workers,),
        grid_names=("sm",),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, lowering_semantics=_compat.LANE),
        interpret=interpret,
    )(*sources, *operands)
    return tuple(found)
