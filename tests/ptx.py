"""PTX that computes words of 32 bits, carried out in NumPy, a word of each thread in the place of a register."""

import re

import ml_dtypes
import numpy as np

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


def _difference(dtype):
    return lambda a, b: joined(halves(a, dtype) - halves(b, dtype))


def _rounded(dtype):
    return lambda high, low: joined(np.stack([low, high], axis=1).astype(dtype))


# These take numbers in the place of a register.
INTEGERS = {
    "mov.b32": lambda a: a,
    "mov.u32": lambda a: a,
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
    "lop3.b32": lambda a, b, c, table: {0xF8: a | b & c}[int(table[0])],
}
FLOATS = {
    "sub.rn.bf16x2": _difference(BFLOAT16),
    "sub.rn.f16x2": _difference(np.float16),
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
    registers["%lanemask_lt"] = (np.uint32(1) << np.arange(threads, dtype=np.uint32) % 32) - np.uint32(1)

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
        target, *sources = (name.strip() for name in rest.split(","))
        if operation in INTEGERS:
            registers[target] = INTEGERS[operation](*map(value, sources)).astype(np.uint32)
        else:
            registers[target] = FLOATS[operation](*(registers[source] for source in sources))
    return [registers[f"${i}"] for i in range(results)]
