"""What formats there are, what they refuse, and that they are values."""

import pickle

import jax
import jax.numpy as jnp
import pytest

from moe_jax.quantization import FORMATS, QuantFormat, Spec, quant_format
from tests.quantization.cases import SPECS
from tests.util import without_type_checks

formats = without_type_checks("moe_jax.quantization.formats")

BAD_SPECS = {
    "dtype": (
        dict(dtype="float8_e3m4", granularity="tensor"),
        ["float8_e3m4", "float8_e4m3fn, float8_e5m2, int8, int4, float4_e2m1fn"],
    ),
    "granularity": (dict(dtype="int8", granularity="row"), ["'row'", "tensor", "channel", "token", "group", "block"]),
    "scale dtype": (dict(dtype="int8", granularity="channel", scale_dtype="float64"), ["float64", "float32"]),
    "block of a tensor": (dict(dtype="int8", granularity="tensor", block=(8, 8)), ["no block", "(8, 8)", "None"]),
    "rows of a group": (dict(dtype="int8", granularity="group", block=(8, 8)), ["(1, g)", "(8, 8)"]),
    "no positive block": (dict(dtype="int8", granularity="block", block=(0, 8)), ["positive", "(0, 8)"]),
    "three axes": (dict(dtype="int8", granularity="block", block=(8, 8, 8)), ["(rows, columns)", "(8, 8, 8)"]),
    "zero points of int8": (dict(dtype="int8", granularity="channel", asymmetric=True), ["asymmetric", "int4"]),
    "static zero points": (dict(dtype="int4", granularity="channel", asymmetric=True, static=True), ["exclude"]),
    "powers for integers": (
        dict(dtype="int8", granularity="channel", scale_dtype="float8_e8m0fnu"),
        ["float8_e4m3fn", "int8", "no zero", "use float32"],
    ),
    "four bits without scales of eight": (
        dict(dtype="float4_e2m1fn", granularity="group", block=16),
        ["'group'", "'float32'", "NVFP4", "MXFP4"],
    ),
    "four bits without groups": (
        dict(dtype="float4_e2m1fn", granularity="block", block=(16, 16), scale_dtype="float8_e4m3fn"),
        ["'block'", "NVFP4"],
    ),
    "scaled scales of others": (
        dict(dtype="int8", granularity="group", block=16, scale_dtype="float8_e4m3fn"),
        ["float4_e2m1fn", "int8", "use float32"],
    ),
}
BAD_TYPES = {
    "no block": (dict(dtype="int8", granularity="block"), ["block=None", "(128, 128)"]),
    "half a block": (dict(dtype="int8", granularity="group", block=1.5), ["1.5", "integers"]),
    "a number for a flag": (dict(dtype="int8", granularity="token", static=1), ["static=1", "True or False"]),
}


@pytest.mark.parametrize(("error", "name"), [(ValueError, n) for n in BAD_SPECS] + [(TypeError, n) for n in BAD_TYPES])
def test_specs_that_mean_nothing_are_refused(error, name):
    fields, words = (BAD_SPECS | BAD_TYPES)[name]
    with pytest.raises(error) as caught:
        formats.Spec(**fields)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


BAD_FORMATS = {
    "tokens of weights": ((Spec("int8", "token"), None), ["weights", "'token'", "channel"]),
    "channels of activations": (
        (Spec("int8", "channel"), Spec("int8", "channel")),
        ["activations", "'channel'", "token"],
    ),
    "static weights": ((Spec("int8", "tensor", static=True), None), ["static=True", "activations"]),
    "mixed": ((Spec("int8", "tensor"), Spec("float8_e4m3fn", "tensor")), ["cannot be multiplied", "None"]),
    "four bits with eight": (
        (Spec("float8_e4m3fn", "group", 16), Spec("float4_e2m1fn", "group", 16, "float8_e4m3fn")),
        ["cannot be multiplied", "float4_e2m1fn"],
    ),
    "weights of the dtype of gradients": (
        (Spec("float8_e5m2", "channel"), None),
        ["gradient_dtype", "float8_e4m3fn"],
    ),
    "int4 activations": ((Spec("int4", "channel"), Spec("int4", "token")), ["cannot be multiplied", "None"]),
}


@pytest.mark.parametrize("name", BAD_FORMATS)
def test_formats_that_cannot_be_multiplied_are_refused(name):
    specs, words = BAD_FORMATS[name]
    with pytest.raises(ValueError) as caught:
        QuantFormat("mine", *specs)
    assert [word for word in ["'mine'", *words] if word not in str(caught.value)] == [], str(caught.value)


def test_names_and_values():
    assert len(FORMATS) == 27
    for name, fmt in FORMATS.items():
        assert fmt.name == name and quant_format(name) is fmt and quant_format(fmt) is fmt
        assert pickle.loads(pickle.dumps(fmt)) == fmt and hash(pickle.loads(pickle.dumps(fmt))) == hash(fmt)
    assert len(set(FORMATS.values())) == 27
    with pytest.raises(ValueError, match=r"'fp8' is not one of fp8_tensor, .*int4_group128_zp; make your own"):
        quant_format("fp8")


def test_dtypes_and_blocks_may_be_spelled_in_several_ways():
    assert Spec(jnp.float8_e4m3fn, "block", [128, 128]) == Spec("float8_e4m3fn", "block", (128, 128))
    assert Spec(jnp.int4, "group", 32) == Spec("int4", "group", (1, 32))
    assert Spec("float8_e4m3fn", "group", 32, jnp.float8_e8m0fnu).scale_dtype == "float8_e8m0fnu"


def test_a_spec_is_a_static_argument():
    compiled = jax.jit(lambda x, spec: x * spec.largest, static_argnums=1)
    assert [float(compiled(1.0, spec)) for spec in SPECS.values()] == [spec.largest for spec in SPECS.values()]
