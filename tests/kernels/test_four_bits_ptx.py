"""The PTX that decodes four-bit weights, carried out in NumPy for the 128 threads of a warpgroup: every code and scale."""

from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import _compat_words
from moe_jax.kernels.hopper import four_bits
from moe_jax.quantization import prepare, quant_format, quantize
from moe_jax.quantization.prepared import decoded
from moe_jax.quantization.prepared_layout import CODE_LINES, LANES, Layout, adds_up
from tests import ptx
from tests.layers import normal

DTYPES = {"bfloat16": ptx.BFLOAT16, "float16": np.float16}
FORMATS = ["nvfp4", "mxfp4", "int4_group32", "int4_group32_zp", "int4_group128"]
THREADS = np.arange(128)


def natural(form):
    """Codes of all values beside scales of many sizes, with NaN among those that have one."""
    x = normal(1, 1, 128, 256) * np.exp(3 * normal(2, 1, 128, 1))
    weights = quantize(x, quant_format(form).weights)
    if form not in ("nvfp4", "mxfp4"):
        return weights
    scales = weights.scales.view(jnp.uint8)
    scales = scales.at[0, 5, 3].set(255 if form == "mxfp4" else 127)
    if form == "nvfp4":  # every scale once, negative ones and zeros included
        scales = scales.at[0, 64:80].set(jnp.arange(256, dtype=jnp.uint8).reshape(16, 16))
    return type(weights)(
        weights.values, scales.view(weights.scales.dtype), None, weights.global_scale, spec=weights.spec
    )


def words_of(block, layout):
    """What each thread loads: as `_compat_words.load_words` does."""

    def load(first, count, lanes):
        at = first + THREADS // lanes * count
        return [block[at + i] for i in range(count)]

    line, size = CODE_LINES * LANES, layout.scale_words
    kinds = 2 if layout.spec.asymmetric else 1
    return [load(0, 4, 1), *(load(line + LANES * size * i, size, 4) for i in range(kinds))]


def fragment(block, layout, dtype):
    """The block ``[64, 64]`` that the threads' registers make."""
    with mock.patch.object(_compat_words, "inline_ptx", ptx.run), np.errstate(invalid="ignore", over="ignore"):
        registers = four_bits._decode(words_of(block, layout), layout)
    out = np.zeros((64, 64), dtype)
    row, column = THREADS // 32 * 16 + THREADS % 32 // 4, THREADS % 4 * 2
    for i, register in enumerate(registers):
        for j, value in enumerate(ptx.halves(register, dtype).T):
            out[row + 8 * (i % 2), column + 8 * (i // 2) + j] = value
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS)
def test_every_block(form, dtype):
    weights = natural(form)
    prepared = prepare(weights, dtype)
    layout, blocks = prepared.layout, np.asarray(prepared.values)[0]
    right = decoded(prepared.values, layout)[0]
    right = np.asarray(right if layout.is_float else right.astype(dtype))  # of float4_e2m1fn no product is rounded
    codes = set()
    for row in range(blocks.shape[0]):
        for column in range(blocks.shape[1]):
            words = blocks[row, column].reshape(-1).view(np.uint32)
            found = fragment(words, layout, DTYPES[dtype]).astype(np.float32)
            wanted = right[row, column].astype(np.float32)
            nan = np.isnan(wanted)  # an exponent alone stands for it with MXFP4: times a code it is infinite, or NaN
            assert not np.isfinite(found[nan]).any()
            np.testing.assert_array_equal(found[~nan], wanted[~nan])
            codes |= set(np.unique(found[~nan]))
    assert len(codes) > 15
    plain = np.asarray(weights.dequantize("float32"))
    whole = np.asarray(prepared.dequantize("float32"))
    kept = ~np.isnan(plain)
    if form.startswith(("nvfp4", "mxfp4")):
        assert (~kept).any() and (np.isnan(whole) == np.isnan(plain)).all()
        if (form, dtype) != ("mxfp4", "float16"):  # what is far below the largest scale is 0 there
            np.testing.assert_array_equal(whole[kept], plain[kept])
    else:  # scales were rounded
        assert np.linalg.norm(whole - plain) < 4e-3 * np.linalg.norm(plain)


def test_one_product_moves_the_bits_of_a_pair():
    layout = Layout(quant_format("nvfp4").weights, "bfloat16")
    assert [adds_up(terms) for terms in layout.places] == [True, False, False, True]
    assert "mul.lo.u32" in four_bits._pairs(layout, [0, 1])
    of_float16 = Layout(quant_format("nvfp4").weights, "float16").places
    assert not any(adds_up(terms) for terms in of_float16)  # their bits would meet


def test_ptxas_takes_it(tmp_path):
    """Every instruction, with the operands that it may have."""
    lines = [".reg .b32 %w<16>;"]
    for form in FORMATS:
        for dtype in DTYPES:
            layout = Layout(quant_format(form).weights, dtype)
            emitted = []

            def keep(code, operands, results, emitted=emitted):
                emitted.append((code, len(operands), results))
                return [0] * results

            with mock.patch.object(_compat_words, "inline_ptx", keep):
                words = [[0] * 4] + [[0] * layout.scale_words] * (2 if layout.spec.asymmetric else 1)
                four_bits._decode(words, layout)
            for code, operands, results in emitted:
                for place in reversed(range(operands + results)):
                    code = code.replace(f"${place}", f"%w{place}")
                lines.append(code)
    ptx.compile_or_skip("\n".join(lines), tmp_path)
