"""As `_compat`, for what routing does in registers: private JAX paths that pick experts, and that look numbers up."""

from __future__ import annotations

from typing import Any


def best_in_turn(matrices: list[Any], starts: list[int], weighed: list[Any] | None, top_k: int) -> list[Any]:
    """Emits `top_k` rounds of "the largest element of a row, the lowest column that has it, strike it out".

    A thread keeps its columns of a row as integers that are in the order of the floats, finds the best of them by halves, and
    compares it with those of the other threads of the row, three exchanges of a pair of words.

    Args:
        matrices: fragmented float32 ``[rows, columns]``, side by side, no NaN; eight neighbouring lanes have a row of four
            registers' columns each (`selection.LAYOUT`).
        starts: the first column of each.
        weighed: matrices of the same kind, whose elements are returned; those of `matrices` by default.
        top_k: rounds.

    Returns:
        For each round the columns, -1 where all that was left is -inf; then for each the elements; then matrices of int32, 1
        where an element above -inf was struck out.
    """
    import numpy as np
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, llvm
    from jax.experimental.mosaic.gpu import fragmented_array, utils

    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    layout = matrices[0].layout
    rows = matrices[0].shape[0]
    of_rows = layout.reduce((1,))
    equal, less, greater, at_least = (getattr(arith.CmpIPredicate, name) for name in ("eq", "slt", "sgt", "sge"))

    def c(value: int) -> Any:
        return arith.constant(i32, value)

    sign = c(0x7FFFFFFF)
    never = c(-(1 << 31) + 0x007FFFFF)  # the word of -inf

    def turned(bits: Any) -> Any:
        """The order of floats as that of integers, and back."""
        return arith.xori(bits, arith.andi(arith.shrsi(bits, c(31)), sign))

    def key_of(x: Any) -> Any:
        return turned(arith.bitcast(i32, arith.addf(x, arith.constant(f32, 0.0))))  # -0 becomes 0

    def elements(arrays: list[Any]) -> list[list[tuple[int, Any]]]:
        """For each row of a thread its elements and their columns, without those of the lane."""
        found = []
        for start, array in zip(starts, arrays, strict=True):
            registers = array.registers.reshape(rows // 16, -1)
            for row, line in enumerate(registers):
                found += [[]] * (row + 1 - len(found))
                vectors = [(start + 32 * i, vector) for i, vector in enumerate(line)]
                parts = [(first + j, llvm.extractelement(v, c(j))) for first, v in vectors for j in range(4)]
                found[row] = found[row] + parts
        return found

    def better(left: Any, right: Any) -> Any:
        """The larger of two, that of the left where they are equal: its column is lower."""
        first = arith.cmpi(at_least, left[0], right[0])
        return tuple(arith.select(first, a, b) for a, b in zip(left, right, strict=True))

    def halved(parts: list[Any]) -> Any:
        while len(parts) > 1:
            pairs = [better(*parts[i : i + 2]) for i in range(0, len(parts) - 1, 2)]
            parts = pairs + parts[len(pairs) * 2 :]
        return parts[0]

    of_lane = arith.muli(arith.andi(utils.thread_idx(), c(7)), c(4))
    ids: list[list[Any]] = [[] for _ in range(top_k)]
    values: list[list[Any]] = [[] for _ in range(top_k)]
    struck_rows = []
    others = elements(weighed) if weighed is not None else None
    for row, parts in enumerate(elements(matrices)):
        before = [key_of(x) for _, x in parts]
        keys, columns = list(before), [column for column, _ in parts]
        for turn in range(top_k):
            own = [
                (key, c(column), *([others[row][i][1]] if others else []))
                for i, (key, column) in enumerate(zip(keys, columns, strict=True))
            ]
            best = list(halved(own))
            best[1] = arith.addi(best[1], of_lane)
            for distance in (1, 2, 4):
                other = [utils.shfl_bfly(x, distance) for x in best]
                tie = arith.andi(arith.cmpi(equal, other[0], best[0]), arith.cmpi(less, other[1], best[1]))
                taken = arith.ori(arith.cmpi(greater, other[0], best[0]), tie)
                best = [arith.select(taken, theirs, mine) for theirs, mine in zip(other, best, strict=True)]
            there = arith.cmpi(greater, best[0], never)
            ids[turn].append(arith.select(there, best[1], c(-1)))
            values[turn].append(best[2] if others else arith.bitcast(f32, turned(best[0])))
            here = arith.subi(best[1], of_lane)
            keys = [
                arith.select(arith.cmpi(equal, here, c(column)), never, key)
                for key, column in zip(keys, columns, strict=True)
            ]
        struck = [arith.cmpi(arith.CmpIPredicate.ne, a, b) for a, b in zip(keys, before, strict=True)]
        struck_rows.append([arith.extui(i32, bit) for bit in struck])

    def of_row(found: list[Any], kind: Any, signed: bool | None) -> Any:
        held = np.empty(len(found), dtype=object)
        for i, value in enumerate(found):
            held[i] = llvm.insertelement(llvm.mlir_undef(ir.VectorType.get((1,), kind)), value, c(0))
        return fragmented_array.FragmentedArray(
            _registers=held.reshape(of_rows.registers_shape((rows,))), _layout=of_rows, _is_signed=signed
        )

    chosen, at = [], 0
    for array in matrices:
        width = array.shape[1] // 32
        held = np.empty((rows // 16, width), dtype=object)
        for row in range(rows // 16):
            for i in range(width):
                vector = llvm.mlir_undef(ir.VectorType.get((4,), i32))
                for j in range(4):
                    vector = llvm.insertelement(vector, struck_rows[row][at + 4 * i + j], c(j))
                held[row, i] = vector
        at += 4 * width
        chosen.append(_like(array, held.flat))
    return [of_row(x, i32, True) for x in ids] + [of_row(x, f32, None) for x in values] + chosen


def look_up(table: Any, places: list[Any]) -> list[Any]:
    """Emits ``table[place]`` or ``table[row, place]``, a load for each thread; 0 where a place is negative.

    Args:
        table: memref of int32 in shared memory, ``[columns]`` or ``[rows, columns]``.
        places: fragmented int32 ``[rows]``, below the number of columns.
    """
    import numpy as np
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, llvm, memref

    i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
    zero = arith.constant(i32, 0)
    two = len(ir.MemRefType(table.type).shape) == 2
    found = []
    for array in places:
        layout, held = array.layout, np.empty(array.registers.size, dtype=object)
        for i, ((row,), register) in enumerate(zip(layout.thread_idxs(array.shape), array.registers.flat, strict=True)):
            is_vector = isinstance(register.type, ir.VectorType)
            place = llvm.extractelement(register, zero) if is_vector else register
            row = row if isinstance(row.type, ir.IndexType) else arith.index_cast(index, row)
            at = arith.index_cast(index, arith.maxsi(place, zero))
            loaded = memref.load(table, [row, at] if two else [at])
            value = arith.select(arith.cmpi(arith.CmpIPredicate.sge, place, zero), loaded, zero)
            held[i] = llvm.insertelement(llvm.mlir_undef(register.type), value, zero) if is_vector else value
        found.append(_like(array, held))
    return found


def scan_within_warps(values: Any, totals: Any) -> Any:
    """Emits inclusive sums of 32 neighbouring elements each, and stores the last of them.

    Args:
        values: fragmented int32 ``[width]``, an element a thread, 128 neighbours at a time.
        totals: memref of int32 in shared memory, ``width / 32`` or more.
    """
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, llvm, memref, scf
    from jax.experimental.mosaic.gpu import utils

    i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()

    def c(value: int) -> Any:
        return arith.constant(i32, value)

    number = arith.andi(utils.thread_idx(), c(127))
    last = arith.cmpi(arith.CmpIPredicate.eq, arith.andi(number, c(31)), c(31))
    code = "{ .reg .b32 t; .reg .pred p; mov.b32 $0, $1; "
    for distance in (1, 2, 4, 8, 16):
        code += f"shfl.sync.up.b32 t|p, $0, {distance}, 0, 0xffffffff; @p add.s32 $0, $0, t; "
    found = []
    for i, register in enumerate(values.registers.flat):
        value = llvm.extractelement(register, c(0))
        total = llvm.inline_asm(i32, [value], code + "}", "=&r,r", has_side_effects=True)
        with ir.InsertionPoint(scf.IfOp(last).then_block):
            warp = arith.addi(arith.shrui(number, c(5)), c(4 * i))
            memref.store(total, totals, [arith.index_cast(index, warp)])
            scf.yield_([])
        found.append(llvm.insertelement(llvm.mlir_undef(register.type), total, c(0)))
    return _like(values, found)


def add_warps_before(values: Any, totals: Any) -> Any:
    """Emits the sums of `scan_within_warps` with those of the warps before: inclusive sums of all."""
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, llvm, memref
    from jax.experimental.mosaic.gpu import utils

    i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()

    def c(value: int) -> Any:
        return arith.constant(i32, value)

    warp = arith.shrui(arith.andi(utils.thread_idx(), c(127)), c(5))
    registers = list(values.registers.flat)
    of_warps = [memref.load(totals, [arith.constant(index, i)]) for i in range(4 * len(registers))]
    found = []
    for i, register in enumerate(registers):
        value = llvm.extractelement(register, c(0))
        for other, total in enumerate(of_warps[: 4 * i + 3]):
            before = arith.cmpi(arith.CmpIPredicate.sgt, arith.addi(warp, c(4 * i)), c(other))
            value = arith.addi(value, arith.select(before, total, c(0)))
        found.append(llvm.insertelement(llvm.mlir_undef(register.type), value, c(0)))
    return _like(values, found)


def scatter(targets: list[Any], places: Any, values: list[Any], kept: Any) -> None:
    """Emits ``target[place] = value`` for several targets and their values, a store a thread, where `kept` is not 0.

    Args:
        targets: memrefs ``[N]`` of int32 in GPU memory.
        places: fragmented int32 ``[n]``.
        values: of each target, as `places`.
        kept: as `places`.
    """
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, llvm
    from jax.experimental.mosaic.gpu import utils

    i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    zero = arith.constant(i32, 0)
    bases = [llvm.ptrtoint(i64, utils.memref_ptr(target)) for target in targets]
    for i, register in enumerate(places.registers.flat):
        offset = arith.muli(arith.extsi(i64, llvm.extractelement(register, zero)), arith.constant(i64, 4))
        wanted = llvm.extractelement(kept.registers.flat[i], zero)
        for base, array in zip(bases, values, strict=True):
            value = llvm.extractelement(array.registers.flat[i], zero)
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [arith.addi(base, offset), value, wanted],
                "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p st.global.b32 [$0], $1; }",
                "l,r,r,~{memory}",
                has_side_effects=True,
            )


def _like(array: Any, registers: Any) -> Any:
    """An array of int32 of the same layout."""
    import numpy as np
    from jax.experimental.mosaic.gpu import fragmented_array

    held = np.empty(array.registers.size, dtype=object)
    held[:] = list(registers)
    return fragmented_array.FragmentedArray(
        _registers=held.reshape(array.registers.shape), _layout=array.layout, _is_signed=True
    )
