"""A block of 128 x 128 numbers of 16 bits in shared memory: taken into registers, as it is or transposed, and sent on as codes.

The block is two pieces of 64 columns, swizzled. Registers take a piece transposed as the layout of wgmma has it: lanes exchange
pairs of 16-bit numbers, for which there are instructions, while codes of 8 bits would have to be taken apart.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.kernels.hopper import row_scales, tiles, views
from moe_jax.kernels.hopper.scaling import Scaling
from moe_jax.quantization.formats import Spec
from moe_jax.quantization.rounding import F32_MAX

SIDE = 128  # of a block
PIECE = 64  # columns that a swizzle of 128 bytes spans
PIECES = SIDE // PIECE
A_ROW = plgpu.Layout.WGMMA.reduce(1)
INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00}
_MAGNITUDE = np.int16(0x7FFF)  # all bits but the sign


class Block:
    """Blocks of one dtype in shared memory, in a ring of stages.

    Args:
        dtype: bfloat16 or float16.
        interpret: the kernel is interpreted.
        stages: of the ring.
    """

    def __init__(self, dtype: Any, interpret: bool, stages: int = 1):
        self._dtype, self._interpret = jnp.dtype(dtype), interpret
        self._operand = views.Operand(stages, SIDE, SIDE, PIECE, dtype, interpret)
        self._above = np.int16(_MAGNITUDE - INFINITY[self._dtype.name])  # takes infinity to the largest integer
        self.scratch = self._operand.scratch

    def single(self, ref: Any, piece: int, stage: Any = 0) -> Any:
        """A piece as copies from any row on fill it."""
        return self._operand.singles(ref).at[stage, piece]

    def eights(self, ref: Any, piece: int, stage: Any = 0) -> Any:
        """A piece as registers take it."""
        return self._operand.eights(ref).at[stage, piece]

    def part(self, ref: Any, stage: Any, piece: int, first: int) -> Any:
        """float32 ``[64, 64]``, rows of a piece from `first` on."""
        part = self.eights(ref, piece, stage).at[pl.ds(first, PIECE)]
        return plgpu.load(part, layout=plgpu.Layout.WGMMA).astype(jnp.float32)

    def clear(self, ref: Any, stage: Any, size: Any) -> None:
        """Zeros in the rows of a block from `size` on, if there are any."""

        def clear_part(piece, first):
            part = self.eights(ref, piece, stage).at[pl.ds(first, PIECE)]
            held = plgpu.load(part, layout=plgpu.Layout.WGMMA)
            row = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, held.shape, 0), plgpu.Layout.WGMMA)
            part[...] = jnp.where(row + first < size, held, jnp.zeros_like(held))

        @pl.when(size < SIDE)
        def _():
            for piece in range(PIECES):
                for first in range(0, SIDE, PIECE):
                    pl.when(size < first + PIECE)(functools.partial(clear_part, piece, first))
            plgpu.commit_smem()

    def transposed(self, ref: Any, stage: Any) -> list[Any]:
        """int16 ``[64 columns, 128 rows]``, the bits of each piece."""
        return [self._transposed(self.eights(ref, piece, stage)) for piece in range(PIECES)]

    def _transposed(self, tile: Any) -> Any:
        if self._interpret:
            found = tile[...].T
        else:
            found = plgpu.load(tile.T, layout=plgpu.Layout.WGMMA_TRANSPOSED)
            found = plgpu.layout_cast(found, plgpu.Layout.WGMMA)
        return lax.bitcast_convert_type(found, jnp.int16)

    def largest(self, halves: list[Any]) -> Any:
        """The largest magnitude of pieces, NaN passed over: numbers of 16 bits are compared in pairs, as integers."""
        order = jnp.maximum(*((half & _MAGNITUDE) + self._above for half in halves))
        while order.shape[1] > 8:
            middle = order.shape[1] // 2
            order = jnp.maximum(order[:, :middle], order[:, middle:])
        order = jnp.max(jnp.max(order.astype(jnp.int32), axis=1), axis=0)
        bits = (jnp.maximum(order, self._above) - self._above).astype(jnp.int16)  # NaN alone is negative
        return jnp.minimum(lax.bitcast_convert_type(bits, self._dtype).astype(jnp.float32), F32_MAX)

    def values(self, half: Any) -> Any:
        """float32, of bits."""
        return lax.bitcast_convert_type(half, self._dtype).astype(jnp.float32)


class ColumnsOut:
    """The codes of a block transposed, with its scale.

    Args:
        spec: of the codes.
        interpret: the kernel is interpreted.
    """

    def __init__(self, spec: Spec, interpret: bool):
        self._scaling = Scaling(spec, given=False, interpret=interpret)
        self.scratch = plgpu.SMEM(
            (SIDE, SIDE), spec.storage_dtype, transforms=tiles.transforms(SIDE, spec.storage_dtype)
        )

    def scale(self, largest: Any) -> tuple[Any, Any]:
        """The scale of a block, and its reciprocal for each row of a piece."""
        scale = self._scaling.scale(largest)
        return scale, self.inverse(scale)

    def inverse(self, scale: Any) -> Any:
        """The reciprocal of a scale that the rule of `quantize` made, for each row of a piece."""
        return self._scaling.reciprocal(plgpu.layout_cast(jnp.full((PIECE,), scale), A_ROW), A_ROW)

    def fill(self, ref: Any, pieces: Any, inverse: Any) -> None:
        """Takes the codes of the pieces, float32 ``[64 columns, 128 rows]``, into shared memory."""
        for piece, values in enumerate(pieces):
            codes = self._scaling.encode(values, lax.broadcast_in_dim(inverse, values.shape, [0]))
            ref.at[pl.ds(piece * PIECE, PIECE)][...] = codes


class BlockOut:
    """The codes of a block in its own order, with its scale.

    Args:
        spec: of the codes.
        interpret: the kernel is interpreted.
    """

    def __init__(self, spec: Spec, interpret: bool):
        self._scaling = Scaling(spec, given=False, interpret=interpret)
        self.scratch = plgpu.SMEM(
            (PIECES, SIDE, PIECE), spec.storage_dtype, transforms=tiles.transforms(PIECE, spec.storage_dtype)
        )

    def fill(self, ref: Any, load: Any, inverse: Any) -> None:
        """Takes the codes of what `load(piece, first)` gives, float32 ``[64, 64]``, into shared memory."""
        for piece in range(PIECES):
            for first in range(0, SIDE, PIECE):
                values = load(piece, first)
                codes = self._scaling.encode(values, lax.broadcast_in_dim(inverse, values.shape, [0]))
                ref.at[piece, pl.ds(first, PIECE)][...] = codes

    def send(self, ref: Any, target: Any, place: tuple[Any, Any], size: Any) -> None:
        """Sends them on their way."""
        for piece in range(PIECES):
            columns = target.at[:, pl.ds(piece * PIECE, PIECE)]
            plgpu.copy_smem_to_gmem(ref.at[piece], columns, commit_group=False)


class RowsOut:
    """The codes of a block's rows as they are, with a scale for each row or a given one: rows not the block's are not stored.

    Args:
        spec: of the codes.
        interpret: the kernel is interpreted.
    """

    def __init__(self, spec: Spec, interpret: bool):
        self._interpret = interpret
        self._scaling = Scaling(spec, given=False, interpret=interpret)
        self._codes = views.Operand(1, SIDE, SIDE, PIECE, spec.storage_dtype, interpret)
        self.scratch = self._codes.scratch

    def fill(self, ref: Any, load: Any, target: Any, place: tuple[Any, Any], size: Any, given: Any = None) -> None:
        """As `BlockOut.fill`, before the block's scale is known: fewer registers. The scales go to GPU memory at once.

        With the reciprocal of a scale given for each row of a piece there are none to store.
        """
        scaling, (row, column) = self._scaling, place
        for first in range(0, SIDE, PIECE):
            pieces = [load(piece, first) for piece in range(PIECES)]
            inverse = given
            if given is None:
                order = jnp.maximum(*(jnp.max(scaling.order(values), axis=1) for values in pieces))
                scale = scaling.scale(scaling.amax(order))
                inverse = scaling.reciprocal(scale, A_ROW)
            inverse = lax.broadcast_in_dim(inverse, (PIECE, PIECE), [0])
            for piece, values in enumerate(pieces):
                self._codes.eights(ref).at[0, piece, pl.ds(first, PIECE)][...] = scaling.encode(values, inverse)
            if given is None:
                row_scales.store(target[1], column, row + first, scale, size - first, A_ROW, self._interpret)

    def send(self, ref: Any, target: Any, place: tuple[Any, Any], size: Any) -> None:
        """Sends the codes of the rows that count on their way."""
        row, column = place
        for piece in range(PIECES):

            def send(first, count, piece=piece):
                part = self._codes.singles(ref).at[0, piece, pl.ds(first, count)]
                columns = pl.ds(column * SIDE + piece * PIECE, PIECE)
                plgpu.copy_smem_to_gmem(part, target[0].at[pl.ds(row + first, count), columns], commit_group=False)

            views.send_first(send, size, SIDE, row_bytes=PIECE)  # codes of a byte
