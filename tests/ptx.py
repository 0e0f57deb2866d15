"""PTX that computes words of 32 bits, carried out in NumPy, a word of each thread in the place of a register."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

BFLOAT16 = ml_dtypes.bfloat16


def halves(word, dtype):
    """The two 16-bit floats of each word, the lower first."""
    return word.view(np.uint16).view(dtype).reshape(-1, 2)


def joined(pairs):
    """Words of two 16-bit numbers each."""
    return np.ascontiguousarray(pairs).view(np.uint16).reshape(-1, 2).view(np.uint32).reshape(-1)


def permuted(a, b, selector):
    """``prmt.b32``; a nibble with its highest bit set repeats the sign of its byte."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> (8 * (nibble & np.uint32(7))).astype(np.uint64)) & np.uint64(255)
        byte = np.where(nibble >= 8, np.where(byte >= 128, 255, 0), byte)
        out |= byte.astype(np.uint32) << np.uint32(8 * i)
    return out


def _of_halves(operation, dtype):
    return lambda a, b: joined(operation(halves(a, dtype), halves(b, dtype)))


def _fused(a, b, c):
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(a.dtype)


def _rounded(dtype):
    return lambda high, low: joined(np.stack([low, high], axis=1).astype(dtype))


# These take numbers in the place of a register.
INTEGERS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "add.u32": lambda a, b: a + b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "mul.lo.u32": lambda a, b: a * b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "bfe.u32": lambda a, first, size: (a >> first) & ((np.uint32(1) << size) - np.uint32(1)),
    "prmt.b32": permuted,
    "shf.l.wrap.b32": lambda low, high, left: high << left | low >> (np.uint32(32) - left),
    "lop3.b32": lambda a, b, c, table: {0xEA: a & b | c, 0xF8: a | b & c}[int(table[0])],
}
FLOATS = {
    **{
        f"{name}.rn.{kind}": _of_halves(operation, dtype)
        for name, operation in (("add", np.add), ("mul", np.multiply))
        for kind, dtype in (("bf16x2", BFLOAT16), ("f16x2", np.float16))
    },
    "fma.rn.bf16x2": lambda a, b, c: joined(_fused(halves(a, BFLOAT16), halves(b, BFLOAT16), halves(c, BFLOAT16))),
    "fma.rn.f16x2": lambda a, b, c: joined(_fused(halves(a, np.float16), halves(b, np.float16), halves(c, np.float16))),
    "cvt.rn.f16x2.e4m3x2": lambda a: joined(
        a.astype(np.uint16).view(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float16)
    ),
    "cvt.f32.f16": lambda a: a.astype(np.uint16).view(np.float16).astype(np.float32),
    "cvt.rn.f32.s32": lambda a: a.view(np.int32).astype(np.float32),
    "mul.rn.f32": lambda a, b: a * b,
    "cvt.rn.bf16x2.f32": _rounded(BFLOAT16),
    "cvt.rn.f16x2.f32": _rounded(np.float16),
}


def run(code, operands, results, threads=128):
    """`_compat_words.inline_ptx`: what the code makes of a word of each thread."""
    registers = {f"${results + i}": operand for i, operand in enumerate(operands)}

    def value(name):
        return registers[name] if name in registers else np.full(threads, int(name, 0), np.uint32)

    code = re.sub(r"\.reg[^;]*;", "", re.sub(r"^\s*\{|\}\s*$", "", code))
    for line in filter(None, map(str.strip, code.split(";"))):
        operation, rest = line.split(" ", 1)
        if parts := re.match(r"\{(\w+), (\w+)\}, (\S+)", rest):
            assert operation == "mov.b32", line
            whole = value(parts[3])
            registers[parts[1]], registers[parts[2]] = whole & np.uint32(0xFFFF), whole >> np.uint32(16)
            continue
        if parts := re.match(r"(\w+), \{(\w+), (\w+)\}", rest):
            assert operation == "mov.b32", line
            registers[parts[1]] = value(parts[2]) | value(parts[3]) << np.uint32(16)
            continue
        target, *sources = (name.strip() for name in rest.split(","))
        if operation in INTEGERS:
            registers[target] = INTEGERS[operation](*map(value, sources)).astype(np.uint32)
        else:
            registers[target] = FLOATS[operation](*(registers[source] for source in sources))
    return [registers[f"${i}"] for i in range(results)]


def ptxas():
    """Of a CUDA toolkit, or the one that triton brings; None without."""
    triton = importlib.util.find_spec("triton")
    beside = None if triton is None else Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "ptxas"
    return shutil.which("ptxas") or (str(beside) if beside is not None and beside.exists() else None)


def compile_or_skip(body, folder):
    """Has ptxas compile a kernel with that body; `%to` is the address of its output."""
    if (tool := ptxas()) is None:
        pytest.skip("there is no ptxas")
    head = ".version 8.0\n.target sm_90a\n.address_size 64\n.visible .entry codes(.param .u64 to) {\n"
    source = folder / "kernel.ptx"
    source.write_text(f"{head}.reg .b64 %to; ld.param.u64 %to, [to];\n{body}\nret; }}")
    done = subprocess.run([tool, "-arch=sm_90a", "-o", folder / "kernel.cubin", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
