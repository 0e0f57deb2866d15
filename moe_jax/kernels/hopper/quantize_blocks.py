"""A matrix quantized in blocks of 128 x 128 and transposed, in one pass over it, on Hopper; also in its own order.

A warpgroup takes a block at a time. TMA brings it into swizzled shared memory, as two pieces of 64 columns. Registers take each
piece transposed, as the layout of wgmma has it: lanes exchange pairs of 16-bit numbers, for which there are instructions, while
codes of 8 bits would have to be taken apart. The block's largest magnitude gives its scale, and codes leave through shared memory
in rows of 128 bytes. The next block is on its way meanwhile. Several CTAs share a multiprocessor: one computes while the others
wait for memory.

Blocks may begin at any row and may have fewer rows than 128; what lies after them is zero, whatever it was. In its own order a
block has the same codes and scale (weights), or a scale for each row (`RowsOut`, cotangents): shared memory is read twice, memory
once. Codes and scales are those of `moe_jax.quantization.quantize`, bit for bit. Not timed yet.

By ptxas 168 registers a thread and no spills. Magnitudes are compared as 16-bit integers: as float32 they stay in registers
until they are scaled, which takes 255.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Shaped

from moe_jax import _compat
from moe_jax.kernels.hopper import row_scales, tiles, views
from moe_jax.kernels.hopper.gather_quantize import scales_shape
from moe_jax.kernels.hopper.scaling import Scaling
from moe_jax.quantization.formats import Spec
from moe_jax.quantization.rounding import F32_MAX

SIDE = 128  # of a block
_PIECE = 64  # columns that a swizzle of 128 bytes spans
_PIECES = SIDE // _PIECE
_MAGNITUDE = np.int16(0x7FFF)  # all bits but the sign
_INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00}


@dataclasses.dataclass(frozen=True)
class Config:
    """How many CTAs share a multiprocessor."""

    ctas_per_sm: int = 3


def supports(x: Any) -> str | None:
    """Why this kernel cannot quantize `x` [..., columns]; None if it can."""
    if jnp.dtype(x.dtype).name not in _INFINITY:
        return f"dtype {x.dtype} must be bfloat16 or float16"
    if x.shape[-1] % SIDE:
        return f"{x.shape[-1]} columns must be a multiple of {SIDE}, of whole blocks"
    return None if x.size else f"an empty operand {x.shape} needs no kernel"


def quantize_rows_of_blocks(
    x: Float[Array, "R M"],
    starts: Int[Array, "blocks"],
    sizes: Int[Array, "blocks"],
    count: Int[Array, "1"],
    spec: Spec,
    *,
    row_spec: Spec | None = None,
    **options: Any,
) -> tuple[Shaped[Array, "..."], ...]:
    """Codes ``[M, 128 * blocks]`` of x transposed, and scales ``[M / 128, blocks]``: block b has rows `starts[b]` on, `sizes[b]`
    of them. With `row_spec` before these two the codes and scales of the same rows that `gather_quantize` gives.

    Args:
        x: rows.
        starts: the first row of each block.
        sizes: its rows, at most 128; the rest of it is zero.
        count: blocks that are quantized, the first ones; others stay undefined.
        spec: float8_e4m3fn in blocks of 128 x 128.
        row_spec: float8_e4m3fn in groups of 128 columns, of the rows as they are; None if these are not wanted.
        **options: of the kernel: `config`, `interpret`, `multiprocessors`.
    """
    (rows, columns), blocks = x.shape, starts.shape[0]
    out_types = []
    if row_spec is not None:
        out_types = [
            jax.ShapeDtypeStruct((rows, columns), row_spec.storage_dtype),
            jax.ShapeDtypeStruct(scales_shape(rows, columns, row_spec), jnp.float32),
        ]
    out_types += [
        jax.ShapeDtypeStruct((columns, blocks * SIDE), spec.storage_dtype),
        jax.ShapeDtypeStruct((columns // SIDE, blocks), jnp.float32),
    ]
    across = columns // SIDE

    def place(index, refs):
        starts_g, sizes_g, *own, codes_g, scales_g = refs
        block = lax.div(index, jnp.int32(across))
        column = index - block * across
        target = codes_g.at[pl.ds(column * SIDE, SIDE), pl.ds(block * SIDE, SIDE)]
        return (starts_g[block], column), sizes_g[block], target, own, [scales_g.at[column, block]]

    def total(refs):
        return refs[0][0] * across

    own = None if row_spec is None else RowsOut(row_spec, x.dtype, options.get("interpret") is not None)
    operands = [count, starts, sizes]
    return _call(x, operands, out_types, total, lambda i, refs: place(i, refs[1:]), spec, own, **options)


def quantize_both(
    weights: Float[Array, "E N K"], spec: Spec, *, natural: bool, **options: Any
) -> tuple[Shaped[Array, "..."], ...]:
    """Codes and scales of matrices transposed, ``[E, K, N]`` and ``[E, K / 128, N / 128]``, and with `natural` before these two
    those in their own order.

    Args:
        weights: N and K multiples of 128.
        spec: float8_e4m3fn in blocks of 128 x 128.
        natural: both are wanted.
        **options: of the kernel: `config`, `interpret`, `multiprocessors`.
    """
    experts, n, k = weights.shape
    down, across = n // SIDE, k // SIDE
    shapes = [(experts, n, k), (experts, down, across)] if natural else []
    shapes += [(experts, k, n), (experts, across, down)]
    out_types = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in zip(shapes, [spec.storage_dtype, jnp.float32] * 2, strict=False)
    ]

    def place(index, refs):
        codes_g, scales_g = refs[-2:]
        row = lax.div(index, jnp.int32(across))  # of blocks, of all experts
        column = index - row * across
        expert = lax.div(row, jnp.int32(down))
        row_of = row - expert * down
        here, there = pl.ds(row_of * SIDE, SIDE), pl.ds(column * SIDE, SIDE)
        scales, own = [scales_g.at[expert, column, row_of]], None
        if natural:
            own = refs[0].at[expert, here, there]
            scales.append(refs[1].at[expert, row_of, column])
        return (row * SIDE, column), SIDE, codes_g.at[expert, there, here], own, scales

    total = experts * down * across
    flat = weights.reshape(experts * n, k)
    own = BlockOut(spec, options.get("interpret") is not None) if natural else None
    return _call(flat, [], out_types, lambda refs: jnp.int32(total), place, spec, own, **options)


class BlockOut:
    """The codes of a block in its own order, with its scale.

    Args:
        spec: of the codes.
        interpret: the kernel is interpreted.
    """

    def __init__(self, spec: Spec, interpret: bool):
        self._scaling = Scaling(spec, given=False, interpret=interpret)
        self.scratch = plgpu.SMEM(
            (_PIECES, SIDE, _PIECE), spec.storage_dtype, transforms=tiles.transforms(_PIECE, spec.storage_dtype)
        )

    def fill(self, ref: Any, load: Any, inverse: Any) -> None:
        """Takes the codes of what `load(piece, first)` gives, float32 ``[64, 64]``, into shared memory."""
        for piece in range(_PIECES):
            for first in range(0, SIDE, _PIECE):
                values = load(piece, first)
                codes = self._scaling.encode(values, lax.broadcast_in_dim(inverse, values.shape, [0]))
                ref.at[piece, pl.ds(first, _PIECE)][...] = codes

    def send(self, ref: Any, target: Any, place: tuple[Any, Any], size: Any) -> None:
        """Sends them on their way."""
        for piece in range(_PIECES):
            columns = target.at[:, pl.ds(piece * _PIECE, _PIECE)]
            plgpu.copy_smem_to_gmem(ref.at[piece], columns, commit_group=False)


class RowsOut:
    """The codes of a block's rows as they are, with a scale for each row: rows that are not the block's are not stored.

    Args:
        spec: of the codes.
        dtype: of what is quantized.
        interpret: the kernel is interpreted.
    """

    def __init__(self, spec: Spec, dtype: Any, interpret: bool):
        self._interpret = interpret
        self._scaling = Scaling(spec, given=False, interpret=interpret)
        self._codes = views.Operand(1, SIDE, SIDE, _PIECE, spec.storage_dtype, interpret)
        self.scratch = self._codes.scratch

    def fill(self, ref: Any, load: Any, target: Any, place: tuple[Any, Any], size: Any) -> None:
        """As `BlockOut.fill`, before the block's scale is known: fewer registers. The scales go to GPU memory at once."""
        scaling, a_row = self._scaling, plgpu.Layout.WGMMA.reduce(1)
        row, column = place
        for first in range(0, SIDE, _PIECE):
            pieces = [load(piece, first) for piece in range(_PIECES)]
            order = jnp.maximum(*(jnp.max(scaling.order(values), axis=1) for values in pieces))
            scale = scaling.scale(scaling.amax(order))
            inverse = lax.broadcast_in_dim(scaling.reciprocal(scale, a_row), (_PIECE, _PIECE), [0])
            for piece, values in enumerate(pieces):
                self._codes.eights(ref).at[0, piece, pl.ds(first, _PIECE)][...] = scaling.encode(values, inverse)
            row_scales.store(target[1], column, row + first, scale, size - first, a_row, self._interpret)

    def send(self, ref: Any, target: Any, place: tuple[Any, Any], size: Any) -> None:
        """Sends the codes of the rows that count on their way."""
        row, column = place
        for piece in range(_PIECES):

            def send(first, count, piece=piece):
                part = self._codes.singles(ref).at[0, piece, pl.ds(first, count)]
                columns = pl.ds(column * SIDE + piece * _PIECE, _PIECE)
                plgpu.copy_smem_to_gmem(part, target[0].at[pl.ds(row + first, count), columns], commit_group=False)

            views.send_first(send, size, SIDE)


def _call(
    x: Array,
    operands: list[Array],
    out_types: list[Any],
    total: Any,
    place: Any,
    spec: Spec,
    own_order: BlockOut | RowsOut | None,
    *,
    config: Config = Config(),
    interpret: Any = None,
    multiprocessors: int | None = None,
) -> tuple[Array, ...]:
    """Runs the kernel.

    Args:
        x: the rows of all blocks.
        operands: what else it reads.
        out_types: what it makes.
        total: of all references but that of x, how many blocks there are.
        place: of the number of a block and the references: its first row and column, how many of its rows count, where its codes
            go transposed and in their own order, and where its scale goes.
        spec: of the codes.
        own_order: how codes go out in their own order too; None if they do not.
        config: how the work is shared.
        interpret: for the interpreter.
        multiprocessors: of the device, by default.
    """
    interpreted = interpret is not None
    workers = config.ctas_per_sm * (multiprocessors or _compat.num_multiprocessors())
    scaling = Scaling(spec, given=False, interpret=interpreted)
    incoming = views.Operand(1, SIDE, SIDE, _PIECE, x.dtype, interpreted)
    above = np.int16(_MAGNITUDE - _INFINITY[x.dtype.name])  # takes infinity to the largest integer
    a_row = plgpu.Layout.WGMMA.reduce(1)

    def body(x_g, *refs):
        refs, (in_s, out_s, full, *own_s) = (
            refs[: len(operands) + len(out_types)],
            refs[len(operands) + len(out_types) :],
        )
        worker = lax.axis_index("sm")
        blocks = tiles.share(total(refs), worker, workers)

        def fetch(i):
            (row, column), *_ = place(worker + i * workers, refs)
            for piece in range(_PIECES):
                source = x_g.at[pl.ds(row, SIDE), pl.ds(column * SIDE + piece * _PIECE, _PIECE)]
                plgpu.copy_gmem_to_smem(source, incoming.singles(in_s).at[0, piece], full)

        def clear(size):
            """Zeros in the rows of a block that do not count."""

            def clear_part(piece, first):
                part = incoming.eights(in_s).at[0, piece, pl.ds(first, _PIECE)]
                held = plgpu.load(part, layout=plgpu.Layout.WGMMA)
                row = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, held.shape, 0), plgpu.Layout.WGMMA)
                part[...] = jnp.where(row + first < size, held, jnp.zeros_like(held))

            for piece in range(_PIECES):
                for first in range(0, SIDE, _PIECE):
                    pl.when(size < first + _PIECE)(functools.partial(clear_part, piece, first))
            plgpu.commit_smem()

        def transposed(piece):
            """int16 ``[64 columns, 128 rows]``, the bits of a piece."""
            tile = incoming.eights(in_s).at[0, piece]
            if interpreted:
                found = tile[...].T
            else:
                found = plgpu.load(tile.T, layout=plgpu.Layout.WGMMA_TRANSPOSED)
                found = plgpu.layout_cast(found, plgpu.Layout.WGMMA)
            return lax.bitcast_convert_type(found, jnp.int16)

        def part_of(piece, first):
            """float32 ``[64, 64]``, rows of a piece from `first` on."""
            part = incoming.eights(in_s).at[0, piece, pl.ds(first, _PIECE)]
            return plgpu.load(part, layout=plgpu.Layout.WGMMA).astype(jnp.float32)

        def largest(halves):
            """The largest magnitude of pieces, NaN passed over: numbers of 16 bits are compared in pairs, as integers."""
            order = jnp.maximum(*((half & _MAGNITUDE) + above for half in halves))
            while order.shape[1] > 8:
                middle = order.shape[1] // 2
                order = jnp.maximum(order[:, :middle], order[:, middle:])
            order = jnp.max(jnp.max(order.astype(jnp.int32), axis=1), axis=0)
            bits = (jnp.maximum(order, above) - above).astype(jnp.int16)  # NaN alone is negative
            return jnp.minimum(lax.bitcast_convert_type(bits, x.dtype).astype(jnp.float32), F32_MAX)

        def values_of(half):
            return lax.bitcast_convert_type(half, x.dtype).astype(jnp.float32)

        pl.when(blocks > 0)(lambda: fetch(0))

        @pl.loop(0, blocks)
        def _block(i):
            at, size, target, own, scales = place(worker + i * workers, refs)
            plgpu.barrier_wait(full)
            if not isinstance(size, int):
                pl.when(size < SIDE)(lambda: clear(size))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the codes of the block before have left
            if isinstance(own_order, RowsOut):
                own_order.fill(own_s[0], part_of, own, at, size)
            halves = [transposed(piece) for piece in range(_PIECES)]
            scale = scaling.scale(largest(halves))
            inverse = scaling.reciprocal(plgpu.layout_cast(jnp.full((_PIECE,), scale), a_row), a_row)
            if isinstance(own_order, BlockOut):
                own_order.fill(own_s[0], part_of, inverse)
            plgpu.commit_smem()  # also: every thread has taken the block
            pl.when(i + 1 < blocks)(lambda: fetch(i + 1))
            for piece, half in enumerate(halves):
                values = values_of(half)
                out_s.at[pl.ds(piece * _PIECE, _PIECE)][...] = scaling.encode(
                    values, lax.broadcast_in_dim(inverse, values.shape, [0])
                )
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_s, target, commit_group=False)
            if own_order is not None:
                own_order.send(own_s[0], own, at, size)
            plgpu.commit_smem_to_gmem_group()
            for ref in scales:
                ref[...] = scale

        plgpu.wait_smem_to_gmem(0)

    body.__name__ = "quantize_blocks"
    scratch = [
        incoming.scratch,
        plgpu.SMEM((SIDE, SIDE), spec.storage_dtype, transforms=tiles.transforms(SIDE, spec.storage_dtype)),
        plgpu.Barrier(num_arrivals=_PIECES),
    ]
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
    )(x, *operands)
    return tuple(found)
