"""Specs and matrices that the tests of quantization share."""

import numpy as np

from moe_jax import quantization
from moe_jax.quantization import FORMATS, Spec
from tests.layers import quick_jit
from tests.quantization import oracle

# Compiled in half the time; the bits are the same, which test_quantize.py shows.
quantize = quick_jit(quantization.quantize, static_argnames=("spec", "halves"))
dequantize = quick_jit(quantization.dequantize, static_argnums=1)

# Small blocks, so that small matrices have several, cut short at the edges.
SPECS = {
    "fp8 tensor": Spec("float8_e4m3fn", "tensor"),
    "fp8 channel": Spec("float8_e4m3fn", "channel"),
    "fp8 token": Spec("float8_e4m3fn", "token"),
    "fp8 group": Spec("float8_e4m3fn", "group", 16),
    "fp8 group e5m2": Spec("float8_e5m2", "group", 16),
    "fp8 block": Spec("float8_e4m3fn", "block", (8, 16)),
    "fp8 block ue8m0": Spec("float8_e4m3fn", "block", (8, 16), "float8_e8m0fnu"),
    "fp8 group ue8m0": Spec("float8_e4m3fn", "group", 16, "float8_e8m0fnu"),
    "int8 channel": Spec("int8", "channel"),
    "int8 block": Spec("int8", "block", (8, 16)),
    "int8 group": Spec("int8", "group", 16),
    "int8 tensor": Spec("int8", "tensor"),
    "int4 group": Spec("int4", "group", 16),
    "int4 group zp": Spec("int4", "group", 16, asymmetric=True),
    "int4 channel": Spec("int4", "channel"),
    "int4 block zp": Spec("int4", "block", (8, 16), asymmetric=True),
    "mxfp4": Spec("float4_e2m1fn", "group", 16, "float8_e8m0fnu"),
    "nvfp4": Spec("float4_e2m1fn", "group", 16, "float8_e4m3fn"),
}
BLOCKED = [name for name, spec in SPECS.items() if spec.block is not None]

# Relative Frobenius error of standard normal weights [N, 2048] after quantizing, and how far from it any draw may be.
ERRORS = {
    "fp8_tensor": 2.65e-2,
    "fp8_tensor_static": 2.65e-2,
    "fp8_channel": 2.65e-2,
    "fp8_block": 2.65e-2,
    "fp8_block_ue8m0": 2.65e-2,
    "fp8_weight_tensor": 2.65e-2,
    "fp8_weight_channel": 2.65e-2,
    "fp8_weight_block": 2.65e-2,
    "int8_channel": 8e-3,
    "int8_channel_static": 8e-3,
    "int8_block": 9.5e-3,
    "int8_weight": 8e-3,
    "nvfp4": 0.095,
    "nvfp4_fp8": 0.095,
    "nvfp4_w4a4": 0.095,
    "nvfp4_w4a4_static": 0.095,
    "mxfp4": 0.112,
    "mxfp4_fp8": 0.112,
    "mxfp4_w4a4": 0.112,
    "mxfp8": 2.65e-2,
    "mxfp8_weight": 2.65e-2,
    "int4_group32": 0.09,
    "int4_group32_zp": 0.079,
    "int4_group64": 0.1,
    "int4_group64_zp": 0.09,
    "int4_group128": 0.112,
    "int4_group128_zp": 0.1,
}
assert set(ERRORS) == set(FORMATS)


def normal(seed, *shape) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def value(array: quantization.QuantizedArray) -> np.ndarray:
    """What the array stands for, from its stored parts by the NumPy oracle: nothing to compile."""
    spec, columns = array.spec, array.shape[-1]
    stored = oracle.bits(array.values)
    if spec.codes_per_value == 2:
        stored = np.stack([stored & 15, stored >> 4], axis=-1).reshape(*stored.shape[:-1], 2 * stored.shape[-1])
    scales = np.asarray(array.scales).astype(np.float32)
    out = np.zeros(array.shape, np.float32)
    for index in np.ndindex(array.shape[:-2]):
        zeros = None if array.zero_points is None else np.asarray(array.zero_points)[index]
        unit = None if array.global_scale is None else np.asarray(array.global_scale)[index]
        out[index] = oracle.dequantize(stored[index][:, :columns], scales[index], zeros, spec, array.halves, unit)
    return out
