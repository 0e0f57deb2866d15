"""What differs between JAX versions, and every private JAX path that we use: nowhere else.

Each entry says why it is here, so that it can go when the reason does.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

# Lane lowering: the kernels are written for explicit barriers and register layouts; the warpgroup lowering that became the
# default in jax 0.11 infers layouts and refuses several of the stores that we use.
LANE = plgpu.LoweringSemantics.Lane

# Multiprocessors assumed when a kernel is lowered without a GPU at hand (an H100 SXM or H200).
_HOPPER_SXM_MULTIPROCESSORS = 132


def kernel(body: Any, *, interpret: Any = None, **kwargs: Any) -> Any:
    """`plgpu.kernel` with `interpret` left out when it is None (jax 0.11.2 treats an explicit None as a mode)."""
    if interpret is not None:
        kwargs["interpret"] = interpret
    return plgpu.kernel(body, **kwargs)


def store_scattered(ref: Any, value: Any) -> None:
    """Stores registers to places in GPU memory that do not fill whole sectors; jax 0.12 wants to be told that this is meant."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def ranks_start_together() -> bool:
    """Whether a kernel that writes into other GPUs' memory begins only when all of them have come so far.

    JAX 0.11 puts a barrier over all ranks before each such kernel, as a trace of kernels shows. Nothing promises it: with another
    version the kernels see to it themselves.
    """
    return jax.__version_info__[:2] == (0, 11)


RAGGED_FLAG = "--xla_gpu_allow_ragged_all_to_all_nccl_send_recv_fallback"


def ragged_all_to_all_between_processes() -> bool:
    """Whether XLA was told to run `jax.lax.ragged_all_to_all` between GPUs of several processes; by itself it refuses (0.11)."""
    return f"{RAGGED_FLAG}=true" in os.environ.get("XLA_FLAGS", "").lower()


@functools.cache
def num_multiprocessors() -> int:
    """Multiprocessors of the first local GPU, or those of an H200 when the process has none."""
    device = default_device()
    return int(getattr(device, "core_count", 0) or 0) or _HOPPER_SXM_MULTIPROCESSORS


def default_device() -> jax.Device:
    """The device that a jit call without committed arguments runs on."""
    chosen = jax.config.jax_default_device
    if chosen is None:
        return jax.devices()[0]
    return jax.devices(chosen)[0] if isinstance(chosen, str) else chosen


def device_memory_bytes() -> int | None:
    """Memory of the device that a jit call runs on; None where it does not say."""
    stats = default_device().memory_stats() or {}
    return stats.get("bytes_limit")


# The interpreter runs every warpgroup of every block as a thread of XLA's CPU client and blocks it at barriers.
_INTERPRETER_THREADS = 32


def interpret_params() -> Any:
    """How the kernels are interpreted on a CPU.

    Raises:
        RuntimeError: XLA's CPU client has so few threads that blocked ones would wait for each other for ever.
    """
    threads = os.environ.get("NPROC") or str(os.cpu_count() or 1)
    if not threads.isdigit() or int(threads) < _INTERPRETER_THREADS:
        raise RuntimeError(
            f"implementation='mosaic_interpret' needs at least {_INTERPRETER_THREADS} threads in XLA's CPU client, which takes "
            f"their number from the environment variable NPROC (here {threads}, the number of cores by default) when JAX "
            "starts; set NPROC=64 before importing jax, or use implementation='xla'"
        )
    return plgpu.InterpretGPUParams()


def reset_interpreter() -> None:
    """Clears the interpreter's global state, which an exception inside a kernel can leave behind for the next one."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # public only as a name in the interpreter's docs

    gpu_callbacks.reset_gpu_interpret_mode_state()


@functools.cache
def _cuda_library() -> ctypes.CDLL:
    """The library of JAX's CUDA plugin; private, as is what it exports, but what `plgpu.as_torch_kernel` uses too.

    That one launches a single kernel and on torch's default stream, which no CUDA graph records.
    """
    import jax.experimental.mosaic.gpu  # noqa: F401  (tells the compiler where its runtime library is)

    for name in ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"):
        try:
            library = ctypes.CDLL(importlib.import_module(name)._get_library_path())
        except ImportError:
            continue
        library.MosaicGpuCompile.argtypes = [ctypes.c_char_p, ctypes.c_int]
        library.MosaicGpuCompile.restype = ctypes.POINTER(ctypes.c_void_p)
        return library
    raise RuntimeError("JAX has no CUDA plugin here, which has the compiler of Mosaic kernels; install moe_jax[cuda13]")


_Launch = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)


def load_mosaic(module: bytes) -> Callable[[int, int], None]:
    """Compiles the module of a Mosaic custom call and loads it into the current CUDA context, for good: graphs may replay it.

    Args:
        module: as the custom call has it.

    Returns:
        ``launch(stream, buffers)``: the handle of a stream, and the address of an array of the addresses of operands and
        results. Only this call reads the array. A launch that CUDA refuses ends the process, as it does under JAX.

    Raises:
        RuntimeError: the compiler refuses the module, or there is none.
    """
    compiled = _cuda_library().MosaicGpuCompile(module, len(module))
    if not compiled:
        raise RuntimeError(f"the compiler of Mosaic kernels refused a module of {len(module)} bytes, without a reason")
    return functools.partial(_Launch(compiled[1]), compiled[0])


def measure_kernels(
    function: Callable[..., Any], *operands: Any, iterations: int = 11
) -> list[list[tuple[str, float]]]:
    """Runs `function` on the GPU under CUPTI: for each iteration its kernels in order, each a name and milliseconds."""
    from jax.experimental.mosaic.gpu import profiler

    _, runs = profiler.measure(function, iterations=iterations, aggregate=False)(*operands)
    return runs or []  # None when no kernel was launched


def tiled_layout(tiles: tuple[tuple[int, ...], ...], **dims: Any) -> Any:
    """How registers of a warpgroup hold a matrix: a layout of our own, whose parts only the lower level has names for."""
    from jax.experimental.mosaic.gpu import fragmented_array

    return plgpu.Layout.TILED(fragmented_array.Tiling(tiles), **dims)


def ptx(code: str) -> None:
    """Emits a PTX instruction without operands; within `plgpu.inline_mgpu`."""
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import llvm

    llvm.inline_asm(ir.Type.parse("!llvm.void"), [], code, "~{memory}", has_side_effects=True)


def copy_rows(source: Any, tile: Any, rows: Any, column: Any, count: Any) -> None:
    """Emits `cp.async` of 128 bytes a row, 16 a thread, into a tile of rows with a 128-byte swizzle; within `plgpu.inline_mgpu`.

    Args:
        source: memref ``[N, K]`` in GPU memory.
        tile: memref in shared memory, of 8 rows x 128 bytes a tile.
        rows: fragmented int32 ``[tile rows]``, of `source`, negative for none; eight neighbouring lanes have the same.
        column: the first, a splat.
        count: bytes to copy of each 16, a splat: 16, or 0 for zeros.
    """
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, llvm
    from jax.experimental.mosaic.gpu import utils

    i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    row_bytes = ir.MemRefType(source.type).shape[1] * 2

    def c(value: int) -> Any:
        return arith.constant(i32, value)

    chunk = arith.andi(utils.thread_idx(), c(7))
    first = arith.addi(arith.muli(column.registers.flat[0], c(2)), arith.muli(chunk, c(16)))
    base = arith.addi(llvm.ptrtoint(i64, utils.memref_ptr(source)), arith.extui(i64, first))
    target = llvm.ptrtoint(i32, utils.memref_ptr(tile))
    for (row,), wanted in zip(rows.layout.thread_idxs(rows.shape), rows.registers.flat, strict=True):
        row = arith.index_cast(i32, row) if isinstance(row.type, ir.IndexType) else row
        wanted = llvm.extractelement(wanted, c(0)) if isinstance(wanted.type, ir.VectorType) else wanted
        swizzled = arith.muli(arith.xori(chunk, arith.andi(row, c(7))), c(16))
        to = arith.addi(target, arith.addi(arith.muli(row, c(128)), swizzled))
        start = arith.muli(arith.extsi(i64, wanted), arith.constant(i64, row_bytes))
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [to, arith.addi(base, start), wanted, count.registers.flat[0]],
            "{ .reg .pred p; setp.ge.s32 p, $2, 0; @p cp.async.cg.shared.global [$0], [$1], 16, $3; }",
            "r,l,r,r,~{memory}",
            has_side_effects=True,
        )


def rounded_reciprocal(x: Any) -> Any:
    """Emits `rcp.rn.f32`, since `1 / x` becomes `rcp.approx.f32`; within `plgpu.inline_mgpu`."""
    return x._pointwise(x._lift_fast_instr("rcp.rn.f32"))


def rounded_sum(x: Any, y: Any) -> Any:
    """Emits `add.rn.f32`, which no compiler merges with the product before it; within `plgpu.inline_mgpu`."""
    return x._pointwise(x._lift_fast_instr("add.rn.f32"), y)


def store_columns(target: Any, values: Any, first: int, columns: tuple[Any, ...]) -> None:
    """Emits ``target[first + i, column] = values[i]`` for several columns; within `plgpu.inline_mgpu`.

    Lanes that hold the same values share the columns among them. What is past the last row of `target` is not stored. L2 is to
    keep the words: memory is written in sectors of 32 bytes, and their neighbours come later, from other warps.

    Args:
        target: memref ``[N, R]`` of 32-bit elements in GPU memory.
        values: fragmented ``[n]``, which neighbouring lanes have in common.
        first: the row of the first value.
        columns: int32 splats, negative for none.
    """
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, llvm
    from jax.experimental.mosaic.gpu import utils

    i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    num_rows, row_stride = ir.MemRefType(target.type).shape
    lanes = _lanes_in_common(values)

    def c(value: int) -> Any:
        return arith.constant(i32, value)

    lane = arith.andi(utils.thread_idx(), c(lanes - 1))
    base = llvm.ptrtoint(i64, utils.memref_ptr(target))
    for start in range(0, len(columns), lanes):
        column = c(-1)
        for j, splat in enumerate(columns[start : start + lanes]):
            mine = arith.cmpi(arith.CmpIPredicate.eq, lane, c(j))
            column = arith.select(mine, splat.registers.flat[0], column)
        for row, value in _rows_and_values(values):
            row = arith.addi(row, c(first))
            element = arith.addi(
                arith.muli(arith.extsi(i64, row), arith.constant(i64, row_stride)), arith.extsi(i64, column)
            )
            address = arith.addi(base, arith.muli(element, arith.constant(i64, 4)))
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [address, value, row, column],
                f"{{ .reg .pred p, q; .reg .b64 keep; setp.ge.s32 p, $3, 0; setp.lt.and.s32 q, $2, {num_rows}, p; "
                "createpolicy.fractional.L2::evict_last.b64 keep, 1.0; "
                "@q st.global.L2::cache_hint.f32 [$0], $1, keep; }",
                "l,f,r,r,~{memory}",
                has_side_effects=True,
            )


def _lanes_in_common(values: Any) -> int:
    """Neighbouring lanes that hold the same values."""
    from jax.experimental.mosaic.gpu import fragmented_array

    shared = values.layout.lane_dims[-1]
    return shared.times if isinstance(shared, fragmented_array.Replicated) else 1


def _rows_and_values(values: Any) -> Any:
    """The index, int32, and the value of each register of a fragmented ``[n]``."""
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, llvm

    i32 = ir.IntegerType.get_signless(32)
    for (row,), value in zip(values.layout.thread_idxs(values.shape), values.registers.flat, strict=True):
        row = arith.index_cast(i32, row) if isinstance(row.type, ir.IndexType) else row
        if isinstance(value.type, ir.VectorType):
            value = llvm.extractelement(value, arith.constant(i32, 0))
        yield row, value


def store_run(target: Any, values: Any, line: Any, first: Any, count: Any) -> None:
    """Emits ``target[line, first + i] = values[i]`` for ``i < count``; within `plgpu.inline_mgpu`.

    Args:
        target: memref ``[N, R]`` of 32-bit floats in GPU memory.
        values: fragmented ``[n]``, which neighbouring lanes have in common.
        line: int32 splat.
        first: int32 splat.
        count: int32 splat; may be negative, or more than n.
    """
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, llvm
    from jax.experimental.mosaic.gpu import utils

    i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    stride = ir.MemRefType(target.type).shape[1]
    lanes = _lanes_in_common(values)
    line, first, count = (splat.registers.flat[0] for splat in (line, first, count))
    start = arith.addi(arith.muli(arith.extsi(i64, line), arith.constant(i64, stride)), arith.extsi(i64, first))
    base = llvm.ptrtoint(i64, utils.memref_ptr(target))
    lane = arith.andi(utils.thread_idx(), arith.constant(i32, lanes - 1))
    for row, value in _rows_and_values(values):
        element = arith.addi(start, arith.extsi(i64, row))
        address = arith.addi(base, arith.muli(element, arith.constant(i64, 4)))
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [address, value, row, count, lane],
            "{ .reg .pred p, q; setp.eq.s32 p, $4, 0; setp.lt.and.s32 q, $2, $3, p; @q st.global.f32 [$0], $1; }",
            "l,f,r,r,r,~{memory}",
            has_side_effects=True,
        )


def load_singly(ref: Any, first: Any, layout: Any, count: int) -> Any:
    """Emits loads of ``ref[first : first + count]``, one element each, into a layout; within `plgpu.inline_mgpu`.

    Args:
        ref: memref of 32-bit floats.
        first: a splat.
        layout: of the result, with a vector dimension.
        count: elements.
    """
    import numpy as np
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, llvm, memref
    from jax.experimental.mosaic.gpu import fragmented_array

    layout = layout.to_mgpu()
    index, f32 = ir.IndexType.get(), ir.F32Type.get()
    i32 = ir.IntegerType.get_signless(32)
    length = layout.vector_length
    offset = arith.index_cast(index, first.registers.flat[0])
    registers = []
    for (start,) in layout.thread_idxs((count,)):
        start = arith.addi(start, offset)
        vector = llvm.mlir_undef(ir.VectorType.get((length,), f32))
        for j in range(length):
            element = memref.load(ref, [arith.addi(start, arith.constant(index, j))])
            vector = llvm.insertelement(vector, element, arith.constant(i32, j))
        registers.append(vector)
    held = np.empty(len(registers), dtype=object)
    held[:] = registers
    return fragmented_array.FragmentedArray(
        _registers=held.reshape(layout.registers_shape((count,))), _layout=layout, _is_signed=None
    )
