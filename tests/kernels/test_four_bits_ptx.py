"""The PTX that decodes four-bit weights, carried out in NumPy for the 128 threads of a warpgroup: every code and scale."""

from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import _compat_words
from moe_jax.kernels.hopper import four_bit_halves, four_bits, interleaved
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


def words_of_halves(gate, up, layout, upper):
    """What each thread loads of the halves of two blocks that `HalfBlocks.fetch` brings."""
    size, kinds = layout.scale_words, 2 if layout.spec.asymmetric else 1
    lines = [CODE_LINES + size * kind + (upper if size == 2 else 0) for kind in range(kinds)]
    halves = []
    for block in (gate.reshape(-1, LANES), up.reshape(-1, LANES)):
        halves.append([block[8 * upper : 8 * upper + 8].reshape(-1), *(block[line] for line in lines)])

    def load(half, part, place, count):
        assert (place % (4 * count) == 0).all()
        return [halves[half][part][place // 4 + i] for i in range(count)]

    threads = THREADS.astype(np.uint32)
    return four_bit_halves.words_of_thread(layout, threads, np.full_like(threads, upper), load)


def fragment(words, layout, dtype):
    """The block ``[64, 64]`` that the threads' registers make, of the words that each has loaded."""
    with mock.patch.object(_compat_words, "inline_ptx", ptx.run), np.errstate(invalid="ignore", over="ignore"):
        registers = four_bits._decode(words() if callable(words) else words, layout)
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
            found = fragment(words_of(words, layout), layout, DTYPES[dtype]).astype(np.float32)
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


@pytest.mark.parametrize("upper", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS)
def test_halves_of_two_blocks(form, dtype, upper):
    """Gate and up interleaved: the rows of both, by eights, with their own scales."""
    weights = natural(form)
    prepared = prepare(weights, dtype)
    layout, blocks = prepared.layout, np.asarray(prepared.values)[0].view(np.uint32)
    right = np.asarray(decoded(prepared.values, layout)[0].astype(dtype)).astype(np.float32)
    for column in range(blocks.shape[1]):
        gate, up = (blocks[row, column].reshape(-1) for row in range(2))
        found = fragment(lambda g=gate, u=up: words_of_halves(g, u, layout, upper), layout, DTYPES[dtype])
        rows = (right[row, column, 32 * upper : 32 * upper + 32] for row in range(2))
        wanted = np.asarray(interleaved.joined(*rows))
        known = ~np.isnan(wanted)
        assert np.isfinite(wanted[known]).mean() > 0.5
        np.testing.assert_array_equal(found.astype(np.float32)[known], wanted[known])


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
                four_bit_halves.words_of_thread(layout, 0, 0, lambda half, part, place, count: [0] * count)
            for code, operands, results in emitted:
                for place in reversed(range(operands + results)):
                    code = code.replace(f"${place}", f"%w{place}")
                lines.append(code)
    ptx.compile_or_skip("\n".join(lines), tmp_path)
