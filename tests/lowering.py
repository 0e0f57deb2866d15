"""What a function becomes on a GPU, seen on a machine without one: it is lowered for CUDA, not compiled."""

import contextlib
import re
from collections import Counter
from unittest import mock

import jax
import pytest

from moe_jax import _compat
from moe_jax.kernels.hopper import matmul_config
from moe_jax.moe import _run_experts

# Reshapes cost nothing on a GPU; constants, and what is made of constants alone, are computed when the program is compiled.
FREE = {"reshape", "constant", "iota", "broadcast_in_dim"}
H200_MULTIPROCESSORS = 132
MOSAIC = re.compile(r"mosaic_gpu\w*")


# Of the row counts that tiles may have. Each is a copy of a kernel's loop, and lowering them takes most of a test's time: a few.
FEW_ROW_COUNTS = {
    "_FEW": (8, 24, 64),
    "FEW_DECODED": (8, 24),
    "_ABOUT_64": (48, 80),
    "_SOME": (48, 128),
    "_MANY": (112, 160),
    "_MOST": (112, 192),
}


@contextlib.contextmanager
def an_h200():
    """Kernels are lowered as for an H200, with a few of their row counts."""
    with (
        mock.patch.object(_compat, "num_multiprocessors", lambda: H200_MULTIPROCESSORS),
        mock.patch.multiple(matmul_config, **FEW_ROW_COUNTS),
        traced_anew(),
    ):
        yield


@contextlib.contextmanager
def traced_anew():
    """Layers are traced although one of their shape was before, and again afterwards: for what changes how they are traced."""
    _run_experts.clear_cache()
    try:
        yield
    finally:
        _run_experts.clear_cache()


def lower(function, *operands) -> str:
    """The StableHLO of ``function`` on an H200. Operands are arrays or `like`."""
    with an_h200():
        lowered = jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",))
    return without_strings(lowered.as_text())


def mosaic_code(function, *operands) -> str:
    """The MLIR of the Mosaic kernels of ``function``, which is in none of the texts that JAX gives out."""
    from jax.experimental.mosaic.gpu import core

    if not hasattr(core, "_lower_as_gpu_kernel"):
        pytest.skip("this JAX hides the code of its kernels elsewhere")
    modules, lower_kernel = [], core._lower_as_gpu_kernel

    def spy(*args, **kwargs):
        result = lower_kernel(*args, **kwargs)
        modules.append(str(result[0]))
        return result

    with mock.patch.object(core, "_lower_as_gpu_kernel", spy):
        jax.clear_caches()  # a kernel that was lowered before is not lowered again
        lower(function, *operands)
    assert modules
    return "\n".join(modules)


def without_strings(text: str) -> str:
    """The program without the kernels themselves, which are strings: not ours to read."""
    return re.sub(r'"(?:[^"\\]|\\.)*"', '""', text)


def like(dtype, *shape) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def operations(text: str) -> Counter:
    """How often each operation occurs; custom calls by their target."""
    found = Counter(re.findall(r"\b(?:stablehlo|chlo)\.(\w+)", text))
    del found["custom_call"]
    return found + Counter(re.findall(r"stablehlo\.custom_call @(\w+)", text))


def num_kernels(text: str) -> int:
    """Mosaic kernels in ``text``, which must consist of nothing else.

    A broadcast is free only of what is made of constants, not of an argument or the result of a kernel.
    """
    found = operations(text)
    other = {name: count for name, count in found.items() if name not in FREE and not MOSAIC.fullmatch(name)}
    assert not other, f"beside Mosaic kernels the function does {other}"
    constants = set(re.findall(r"(%\w+) = stablehlo\.(?:constant|iota)\b", text))
    while True:  # free operations on constants are constants
        grown = constants | {
            result
            for result, operand in re.findall(r"(%\w+) = stablehlo\.(?:reshape|broadcast_in_dim) (%\w+)", text)
            if operand in constants
        }
        if grown == constants:
            break
        constants = grown
    for result, operand in re.findall(r"(%\w+) = stablehlo\.broadcast_in_dim (%\w+)", text):
        assert operand in constants, f"{result} broadcasts {operand}, which is no constant: XLA makes a kernel of it"
    return sum(count for name, count in found.items() if MOSAIC.fullmatch(name))


def assert_lowers_to_kernels(function, *operands) -> None:
    """``function`` becomes Mosaic kernels and nothing else."""
    assert num_kernels(lower(function, *operands)) > 0


def assert_is_not_mosaic_alone(function, *operands) -> None:
    """The check above can fail: it does for this function."""
    with pytest.raises(AssertionError):
        num_kernels(lower(function, *operands))
