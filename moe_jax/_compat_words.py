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
    """The word that all threads hold, of a float32."""
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import llvm

    return llvm.bitcast(ir.IntegerType.get_signless(32), splat.registers.flat[0])


def fragment_of_bytes(array: Any, code: str, more: Sequence[Any], dtype: Any) -> Any:
    """The operand ``[64, 64]`` of wgmma that is made of bytes, which a thread holds two by two as it will hold the operand.

    Args:
        array: fragmented bytes.
        code: as in `inline_ptx`, of a word of two neighbouring floats; of a word with two neighbouring bytes, and zeros above.
        more: operands after that, words.
        dtype: of the floats.
    """
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith
    from jax.experimental.mosaic.gpu import utils

    i16, i32 = (ir.IntegerType.get_signless(bits) for bits in (16, 32))
    pairs = [arith.extui(i32, utils.bitcast(pair, i16)) for pair in array.registers.flat]
    return wgmma_fragment([inline_ptx(code, [pair, *more], 1)[0] for pair in pairs], dtype)


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
