"""The PTX that makes 16-bit floats of codes of a byte, carried out in NumPy: every code, in both places of a pair."""

import importlib.util
import itertools
import re
import shutil
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from moe_jax.kernels.hopper import codes

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
PAIRS = np.arange(1 << 16, dtype=np.uint32)  # every code beside every other
LANES = PAIRS % np.uint32(32)


def halves(word, dtype):
    return word.view(np.uint16).view(dtype).reshape(-1, 2)


def joined(pairs):
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


def of_two(dtype, high, low):
    return joined(np.stack([low, high], axis=1).astype(dtype))


OPERATIONS = {
    "mov.u32": lambda a: a,
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": permuted,
    "sub.rn.bf16x2": lambda a, b: joined(halves(a, DTYPES["bfloat16"]) - halves(b, DTYPES["bfloat16"])),
    "sub.rn.f16x2": lambda a, b: joined(halves(a, np.float16) - halves(b, np.float16)),
    "cvt.rn.f16x2.e4m3x2": lambda a: joined(
        a.astype(np.uint16).view(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float16)
    ),
    "cvt.f32.f16": lambda a: a.astype(np.uint16).view(np.float16).astype(np.float32),
    "cvt.rn.f32.s32": lambda a: a.view(np.int32).astype(np.float32),
    "mul.rn.f32": lambda a, b: a * b,
    "cvt.rn.bf16x2.f32": lambda high, low: of_two(DTYPES["bfloat16"], high, low),
    "cvt.rn.f16x2.f32": lambda high, low: of_two(np.float16, high, low),
}


INTEGERS = {name for name in OPERATIONS if re.fullmatch(r"(mov|and|or|xor|shr|prmt)\.[bu]32", name)}


def run(code, *operands):
    """The word that the code makes of these."""
    registers = {f"${1 + i}": operand for i, operand in enumerate(operands)}
    registers["%lanemask_lt"] = (np.uint32(1) << LANES) - np.uint32(1)

    def value(name):
        return registers[name] if name in registers else np.full(PAIRS.shape, int(name, 0), np.uint32)

    code = re.sub(r"\.reg[^;]*;", "", code.strip()[1:-1])
    for line in filter(None, map(str.strip, code.split(";"))):
        operation, rest = line.split(" ", 1)
        if parts := re.match(r"\{(\w+), (\w+)\}, (\S+)", rest):
            assert operation == "mov.b32"
            whole = value(parts[3])
            registers[parts[1]], registers[parts[2]] = whole & np.uint32(0xFFFF), whole >> np.uint32(16)
        else:
            target, *sources = (name.strip() for name in rest.split(","))
            # ptxas takes numbers in the places of integers alone.
            assert operation in INTEGERS or all(source in registers for source in sources), line
            registers[target] = OPERATIONS[operation](*map(value, sources))
    return registers["$0"]


@pytest.mark.parametrize("scale", [None, 0.0123])
@pytest.mark.parametrize("floats", DTYPES)
@pytest.mark.parametrize("of", ["int8", "float8_e4m3fn"])
def test_every_pair_of_codes(of, floats, scale):
    select = run(codes._SELECT)
    np.testing.assert_array_equal(select, 0x4140)
    more = [] if scale is None else [np.full(PAIRS.shape, scale, np.float32)]
    with np.errstate(invalid="ignore"):
        found = halves(run(codes._pair(of, floats, scale is not None), PAIRS, select, *more), DTYPES[floats])
    bytes_of = np.stack([PAIRS & 255, PAIRS >> 8], axis=1).astype(np.uint8)
    right = bytes_of.view(np.int8 if of == "int8" else ml_dtypes.float8_e4m3fn).astype(np.float32)
    right = (right if scale is None else right * np.float32(scale)).astype(DTYPES[floats])
    nan = np.isnan(right.astype(np.float32))
    assert nan.any() == (of != "int8") and np.isnan(found[nan].astype(np.float32)).all()
    np.testing.assert_array_equal(found[~nan].view(np.uint16), right[~nan].view(np.uint16))


def ptxas():
    """Of a CUDA toolkit, or the one that triton brings; None without."""
    triton = importlib.util.find_spec("triton")
    beside = None if triton is None else Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "ptxas"
    return shutil.which("ptxas") or (str(beside) if beside is not None and beside.exists() else None)


def test_ptxas_takes_it(tmp_path):
    if (tool := ptxas()) is None:
        pytest.skip("there is no ptxas")
    lines = [
        ".version 8.0\n.target sm_90a\n.address_size 64\n.visible .entry codes(.param .u64 to) {",
        ".reg .b64 %to; .reg .b32 %word, %select, %scale, %out;",
        "ld.param.u64 %to, [to]; ld.global.b32 %word, [%to]; ld.global.b32 %scale, [%to + 4];",
        codes._SELECT.replace("$0", "%select"),
    ]
    for i, of in enumerate(itertools.product(("int8", "float8_e4m3fn"), DTYPES, (False, True))):
        names = iter(("%out", "%word", "%select", "%scale"))
        code = codes._pair(*of)
        for place in range(4):
            code = code.replace(f"${place}", next(names))
        lines += [code, f"st.global.b32 [%to + {8 + 4 * i}], %out;"]
    source = tmp_path / "codes.ptx"
    source.write_text("\n".join([*lines, "ret; }"]))
    done = subprocess.run(
        [tool, "-arch=sm_90a", "-o", tmp_path / "codes.cubin", source], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
