"""What a search tries: plans that fit, not too many, and the memory that they are said to take."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import _compat
from moe_jax.activations import get_activation
from moe_jax.kernels.hopper import matmul_bf16 as kernel
from moe_jax.kernels.hopper.matmul_config import Config
from moe_jax.tuning.candidates import candidates
from moe_jax.tuning.fit import SHARED_MEMORY, config_misfit, misfit, shared_memory_bytes
from moe_jax.tuning.plan import LayerShape, default_plan

SHAPES = [
    LayerShape(experts, pairs, hidden, inner, gated, dtype)
    for experts, hidden, inner, dtype in ((128, 2048, 768, "bfloat16"), (16, 1040, 528, "float16"))
    for pairs in (1, experts, 40 * experts, 90 * experts, 500 * experts)
    for gated in (True, False)
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_candidates(shape):
    found = candidates(shape)
    assert found[0] == default_plan(shape)
    assert 6 <= len(found) <= 18, "enough to find something, few enough to compile"
    assert len(set(found)) == len(found)
    for plan in found:
        assert misfit(shape, plan) is None
        for config, gated in ((plan.up, shape.gated), (plan.down, False)):
            assert config_misfit(config, gated, shape.dtype) is None
            assert shared_memory_bytes(config, shape.dtype) <= SHARED_MEMORY
    for name in ("up", "down"):
        assert len({getattr(plan, name) for plan in found}) >= 5


def scratch_bytes(config: Config, gated: bool, bias: bool, monkeypatch) -> int:
    """The shared memory that the kernel itself asks for."""
    asked = {}

    def no_kernel(body, *, out_type, **keywords):
        asked.update(keywords)
        return lambda *operands: jnp.zeros(out_type.shape, out_type.dtype)

    monkeypatch.setattr(_compat, "kernel", no_kernel)
    tile_rows, like = config.tile_rows, jnp.zeros
    jax.eval_shape(
        lambda: kernel.grouped_matmul(
            like((2 * tile_rows, 256), jnp.bfloat16),
            like((2, 512, 256), jnp.bfloat16),
            *(like(2, jnp.int32) for _ in range(3)),
            like(1, jnp.int32),
            like((2, 512), jnp.float32) if bias else None,
            get_activation("silu") if gated else None,
            config=config,
        )
    )
    total = 0
    for scratch in asked["scratch_types"]:
        if hasattr(scratch, "num_barriers"):
            total += 8 * int(np.prod(scratch.num_barriers))
        else:
            total += math.prod(scratch.shape) * jnp.dtype(scratch.dtype).itemsize
    return total


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("index", range(0, len(SHAPES), 4))
def test_the_memory_is_what_the_kernel_asks_for(index, gated, monkeypatch):
    for plan in candidates(dataclasses.replace(SHAPES[index], gated=gated, dtype="bfloat16")):
        config = plan.up if gated else plan.down
        estimate = shared_memory_bytes(config, "bfloat16")
        asked = scratch_bytes(config, gated, True, monkeypatch)
        assert asked <= estimate < asked + 3 * 1024  # buffers begin at whole KiB
        assert scratch_bytes(config, gated, False, monkeypatch) <= estimate


GOOD = Config(stages=2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stages": 8}, "shared memory"),
        ({"stages": 1}, "stages=1"),
        ({"consumers": 3}, "consumers=3"),
        ({"halves": 1}, "halves=1"),
        ({"tile_k": 96}, "tile_k=96"),
        ({"band": 0}, "band=0"),
        ({"row_counts": (16, 12)}, "row_counts=(16, 12)"),
        ({"row_counts": (32, 16)}, "row_counts=(32, 16)"),
        ({"cluster": 2, "row_counts": (16, 24)}, "cluster=2"),
        ({"cluster": 16, "row_counts": (128,)}, "cluster=16"),
    ],
    ids=str,
)
def test_what_does_not_fit_says_why(change, words):
    assert config_misfit(GOOD, True, "bfloat16") is None
    assert words in config_misfit(dataclasses.replace(GOOD, **change), True, "bfloat16")
