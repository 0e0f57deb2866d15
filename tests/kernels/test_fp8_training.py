"""A layer that is trained in FP8, of interpreted kernels alone, against their plain-JAX forms."""

import functools

import jax
import pytest

from moe_jax import Fp8Training, MoEConfig, TopK, apply_experts
from tests.layers import experts_of, normal, quick_jit, topk_of, x_of
from tests.util import assert_discriminates, check_close

pytestmark = pytest.mark.once


@pytest.mark.parametrize("scaling", ["block", "tensor"])
def test_both_directions(scaling):
    config = MoEConfig(2, 1, 128, 128, fp8_training=Fp8Training(gradient_dtype="float8_e5m2", scaling=scaling))
    x, experts, topk = x_of(0, config, 12), experts_of(0, config), topk_of(0, config, 12)
    g = normal(1, 12, 128, dtype="bfloat16")

    def both(implementation, x, experts, weights):
        layer = functools.partial(apply_experts, config=config, implementation=implementation)
        y, pull = jax.vjp(lambda x, experts, weights: layer(x, experts, TopK(topk.ids, weights)), x, experts, weights)
        return jax.tree.leaves((y, pull(g)))

    mine, plain = (
        quick_jit(functools.partial(both, name))(x, experts, topk.weights) for name in ("mosaic_interpret", "xla")
    )
    for actual, expected in zip(mine, plain, strict=True):
        check_close(actual, expected, 1e-3)
        flat = expected.reshape(-1, expected.shape[-1])
        if flat.shape[0] > 1 and flat.shape[1] > 1:
            assert_discriminates(lambda a, flat=flat: check_close(a, flat, 1e-3), actual.reshape(flat.shape))
