"""The PTX that makes 16-bit floats of codes of a byte, carried out in NumPy: every code, in both places of a pair."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from moe_jax.kernels.hopper import codes
from tests import ptx

DTYPES = {"bfloat16": ptx.BFLOAT16, "float16": np.float16}
PAIRS = np.arange(1 << 16, dtype=np.uint32)  # every code beside every other


def run(code, *operands):
    """The word that the code makes of these."""
    return ptx.run(code, operands, 1, threads=PAIRS.size)[0]


@pytest.mark.parametrize("scale", [None, 0.0123])
@pytest.mark.parametrize("floats", DTYPES)
@pytest.mark.parametrize("of", ["int8", "float8_e4m3fn"])
def test_every_pair_of_codes(of, floats, scale):
    more = [] if scale is None else [np.full(PAIRS.shape, scale, np.float32)]
    with np.errstate(invalid="ignore"):
        found = ptx.halves(run(codes._pair(of, floats, scale is not None), PAIRS, *more), DTYPES[floats])
    bytes_of = np.stack([PAIRS & 255, PAIRS >> 8], axis=1).astype(np.uint8)
    right = bytes_of.view(np.int8 if of == "int8" else ml_dtypes.float8_e4m3fn).astype(np.float32)
    right = (right if scale is None else right * np.float32(scale)).astype(DTYPES[floats])
    if of == "int8" and scale is None:
        found = (found.astype(np.float32) * codes._GREATER[floats]).astype(DTYPES[floats])
    nan = np.isnan(right.astype(np.float32))
    assert nan.any() == (of != "int8") and np.isnan(found[nan].astype(np.float32)).all()
    np.testing.assert_array_equal(found[~nan].view(np.uint16), right[~nan].view(np.uint16))


def test_ptxas_takes_it(tmp_path):
    lines = [
        ".reg .b32 %word, %scale, %out; ld.global.b32 %word, [%to]; ld.global.b32 %scale, [%to + 4];",
    ]
    for i, of in enumerate(itertools.product(("int8", "float8_e4m3fn"), DTYPES, (False, True))):
        code = codes._pair(*of).replace("$0", "%out").replace("$1", "%word").replace("$2", "%scale")
        lines += [code, f"st.global.b32 [%to + {8 + 4 * i}], %out;"]
    ptx.compile_or_skip("\n".join(lines), tmp_path)
