"""The gradient of the whole layer by interpreted kernels, against that of the float32 reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import MoEConfig, moe, reference
from tests.layers import experts_of, logits_of, normal, quick_jit, x_of
from tests.util import check_close


# So few tokens that tiles take all of them, with sizes that are no multiples of 64; a few tiles.
@pytest.mark.once
@pytest.mark.parametrize(("num_tokens", "sizes", "has_bias"), [(5, (48, 32), False), (24, (64, 64), True)])
def test_gradient(num_tokens, sizes, has_bias):
    """What the kernels leave undefined (NaN in the interpreter) reaches no gradient."""
    config = MoEConfig(4, 2, *sizes, has_bias=has_bias)
    operands = x_of(0, config, num_tokens), experts_of(0, config), logits_of(0, config, num_tokens)
    cotangent = normal([0, 1], num_tokens, sizes[0])

    def gradient(layer, **options):
        def loss(*operands):
            return jnp.sum(layer(*operands, config, **options).astype(jnp.float32) * cotangent)

        return jax.grad(loss, argnums=(0, 1, 2))

    found = gradient(moe, implementation="mosaic_interpret")(*operands)
    expected = quick_jit(gradient(reference.moe))(*operands)
    for mine, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.any(np.asarray(right))
        check_close(mine, right, 1.5e-2)
