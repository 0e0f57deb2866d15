"""As `_compat`, for the words of 32 bits that a thread of a kernel holds: private JAX paths that decode weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def inline_ptx(code: str, operands: list[Any], results: int) -> list[Any]:
    """Emits PTX that does nothing but compute words of 32 bits: ``$0`` and so on the results, then the operands."""
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import llvm

    i32 = ir.IntegerType.get_signless(32)
    kind = i32 if results == 1 else llvm.StructType.get_literal([i32] * results)
    constraints = ",".join(["=r" if results == 1 else "=&r"] * results + ["r"] * len(operands))
    out = llvm.inline_asm(kind, operands, code, constraints)
    return [out] if results == 1 else [llvm.extractvalue(i32, out, [i]) for i in range(results)]


def load_words(block: Any, first: int, count: int, lanes: int) -> Any:
    """Emits one load of `count` words for each thread of a warpgroup, of which `lanes` neighbours load the same.

    The result is fragmented int32 ``[128 * count]``, thread after thread.

    Args:
        block: contiguous memref of 32-bit words in shared memory.
        first: that of the first threads; a multiple of `count`.
        count: 1, 2 or 4.
        lanes: a power of two.
    """
    import numpy as np
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, llvm
    from jax.experimental.mosaic.gpu import fragmented_array, utils

    i32 = ir.IntegerType.get_signless(32)

    def c(value: int) -> Any:
        return arith.constant(i32, value)

    of_thread = arith.divui(arith.andi(utils.thread_idx(), c(127)), c(lanes))
    at = arith.addi(arith.muli(of_thread, c(4 * count)), c(4 * first))
    pointer = utils.memref_ptr(block)
    place = llvm.getelementptr(pointer.type, pointer, [at], [-(2**31)], ir.IntegerType.get_signless(8), 0)
    words = np.empty(1, dtype=object)
    words[0] = llvm.load(ir.VectorType.get((count,), i32), place, alignment=4 * count)
    layout = fragmented_array.WGStridedFragLayout((128 * count,), count)
    return fragmented_array.FragmentedArray(_registers=words, _layout=layout, _is_signed=True)


def thread() -> Any:
    """Emits the number of a thread within its warpgroup, a word."""
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith
    from jax.experimental.mosaic.gpu import utils

    return arith.andi(utils.thread_idx(), arith.constant(ir.IntegerType.get_signless(32), 127))


def address(ref: Any) -> Any:
    """Emits where in shared memory a reference begins, a word."""
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import llvm
    from jax.experimental.mosaic.gpu import utils

    return llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(ref))


def load_at(place: Any, more: int, count: int) -> list[Any]:
    """Emits one load of 1, 2 or 4 words from `more` bytes after an `address`."""
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, llvm

    i32 = ir.IntegerType.get_signless(32)
    found = llvm.load(ir.VectorType.get((count,), i32), _pointer(place, more), alignment=4 * count)
    return [llvm.extractelement(found, arith.constant(i32, i)) for i in range(count)]


def store_at(place: Any, more: int, words: list[Any]) -> None:
    """Emits one store of 1, 2 or 4 words to where `load_at` loads from."""
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, llvm

    i32 = ir.IntegerType.get_signless(32)
    together = llvm.mlir_undef(ir.VectorType.get((len(words),), i32))
    for i, word in enumerate(words):
        together = llvm.insertelement(together, word, arith.constant(i32, i))
    llvm.store(together, _pointer(place, more), alignment=4 * len(words))


def _pointer(place: Any, more: int) -> Any:
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import llvm

    pointer = llvm.inttoptr(llvm.PointerType.get(3), place)
    return llvm.getelementptr(pointer.type, pointer, [], [more], ir.IntegerType.get_signless(8), 0)


def words_of(array: Any) -> list[Any]:
    """A thread's words of what `load_words` gives."""
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, llvm

    (words,) = array.registers.flat
    i32 = ir.IntegerType.get_signless(32)
    return [llvm.extractelement(words, arith.constant(i32, i)) for i in range(ir.VectorType(words.type).shape[0])]


def word_of_all(splat: Any) -> Any:
    """The word that all threads hold, of a float32 or an int32."""
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import llvm

    return llvm.bitcast(ir.IntegerType.get_signless(32), splat.registers.flat[0])


def fragment_of_bytes(array: Any, code: str, more: Sequence[Sequence[Any]], dtype: Any) -> Any:
    """The operand ``[64, 64]`` of wgmma that is made of bytes, which a thread holds two by two as it will hold the operand.

    Args:
        array: fragmented bytes.
        code: as in `inline_ptx`, of a word of two neighbouring floats; of a word with two neighbouring bytes, and zeros above.
        more: operands after that, words: for all, or for the two rows of a thread in turn.
        dtype: of the floats.
    """
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith
    from jax.experimental.mosaic.gpu import utils

    i16, i32 = (ir.IntegerType.get_signless(bits) for bits in (16, 32))
    pairs = [arith.extui(i32, utils.bitcast(pair, i16)) for pair in array.registers.flat]
    words = [inline_ptx(code, [pair, *more[i % len(more)]], 1)[0] for i, pair in enumerate(pairs)]
    return wgmma_fragment(words, dtype)


def wgmma_fragment(words: list[Any], dtype: Any) -> Any:
    """The operand ``[64, 64]`` of wgmma that is made of a thread's words, each two neighbouring 16-bit floats of a row.

    Args:
        words: of each 8 columns first those of row ``g``, then those of row ``g + 8``.
        dtype: of the floats.
    """
    import numpy as np
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import llvm
    from jax.experimental.mosaic.gpu import fragmented_array, utils

    layout, shape = fragmented_array.WGMMA_LAYOUT, (64, 64)
    pair = ir.VectorType.get((2,), utils.dtype_to_ir_type(dtype))
    registers = np.empty(len(words), dtype=object)
    registers[:] = [llvm.bitcast(pair, word) for word in words]
    return fragmented_array.FragmentedArray(
        _registers=registers.reshape(layout.registers_shape(shape)), _layout=layout, _is_signed=None
    )


def store_transposed(
    target: Any, tile: Any, first_row: Any, size: Any, column: Any, columns: int, marked: bool
) -> None:
    """Emits ``target[row, column + i] = tile[i, j]`` for the rows of a tile that are to be stored: see `direct_store.store`.

    Args:
        target: memref ``[R, N]`` of 16-bit floats in GPU memory, N even.
        tile: fragmented ``[64, n]``, as wgmma sums them, or ``[32, n]``: registers of 8 x 8, two neighbouring columns a thread.
        first_row: int32 splat.
        size: rows, or a bit for each; int32 splat.
        column: int32 splat, even.
        columns: of `target` that are stored, even.
        marked: whether `size` has a bit for each row.
    """
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, llvm
    from jax.experimental.mosaic.gpu import utils

    i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    width = ir.MemRefType(target.type).shape[1]
    first_row, size, column = (splat.registers.flat[0] for splat in (first_row, size, column))

    def c(value: int) -> Any:
        return arith.constant(i32, value)

    lane, warp = arith.andi(thread(), c(31)), arith.shrui(thread(), c(5))
    row_of_lane = arith.shrui(lane, c(2))
    eights = tile.shape[0] // 32  # of a warp
    within = arith.addi(arith.muli(warp, c(8 * eights)), arith.muli(arith.andi(lane, c(3)), c(2)))
    base = llvm.ptrtoint(i64, utils.memref_ptr(target))
    last = arith.minsi(c(columns), arith.subi(c(width), column))
    for at, register in enumerate(tile.registers.flat):
        eight, half = divmod(at, eights)
        row = arith.addi(row_of_lane, c(8 * eight))
        if marked:
            kept = arith.andi(arith.shrui(size, row), c(1))
            before = arith.subi(arith.shli(c(1), row), c(1))
            to = llvm.intr_ctpop(arith.andi(size, before))
        else:
            kept, to = arith.extui(i32, arith.cmpi(arith.CmpIPredicate.slt, row, size)), row
        place = arith.addi(within, c(8 * half))
        kept = arith.andi(kept, arith.extui(i32, arith.cmpi(arith.CmpIPredicate.slt, place, last)))
        element = arith.muli(arith.extsi(i64, arith.addi(first_row, to)), arith.constant(i64, width))
        element = arith.addi(element, arith.extsi(i64, arith.addi(column, place)))
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [arith.addi(base, arith.shli(element, arith.constant(i64, 1))), llvm.bitcast(i32, register), kept],
            "{ .reg .b32 t; .reg .pred p; movmatrix.sync.aligned.m8n8.trans.b16 t, $1; setp.ne.u32 p, $2, 0; "
            "@p st.global.b32 [$0], t; }",
            "l,r,r,~{memory}",
            has_side_effects=True,
        )


def every_other(array: Any, layout: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """A thread's registers taken in turn: two arrays of that layout and shape."""
    from jax.experimental.mosaic.gpu import fragmented_array

    layout = layout.to_mgpu()
    registers = [array.registers.reshape(-1)[first::2].reshape(layout.registers_shape(shape)) for first in range(2)]
    return tuple(
        fragmented_array.FragmentedArray(_registers=part, _layout=layout, _is_signed=array.is_signed)
        for part in registers
    )


def load_from(ref: Any, place: Any, count: int) -> list[Any]:
    """Emits one load of 1, 2 or 4 words from a thread's place in shared memory, a word of bytes from where a reference begins."""
    from jax._src.lib.mlir.dialects import arith

    return load_at(arith.addi(address(ref), place), 0, count)


def array_of_words(words: list[Any]) -> Any:
    """Fragmented int32 ``[128 * count]`` of so many words for each thread, of which `words_of` gives them."""
    import numpy as np
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, llvm
    from jax.experimental.mosaic.gpu import fragmented_array

    i32, count = ir.IntegerType.get_signless(32), len(words)
    together = llvm.mlir_undef(ir.VectorType.get((count,), i32))
    for i, word in enumerate(words):
        together = llvm.insertelement(together, word, arith.constant(i32, i))
    held = np.empty(1, dtype=object)
    held[0] = together
    layout = fragmented_array.WGStridedFragLayout((128 * count,), count)
    return fragmented_array.FragmentedArray(_registers=held, _layout=layout, _is_signed=True)
