"""A layer trained in FP8 on a GPU: its kernels beside the plain-JAX form, which quantizes alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import Fp8Training, MoEConfig, moe
from tests.layers import experts_of, logits_of, normal, x_of
from tests.util import check_close

pytestmark = pytest.mark.gpu

SWITCHES = {
    "all": Fp8Training(),
    "forward": Fp8Training(True, False, False),
    "input_grad": Fp8Training(False, True, False),
    "weight_grad": Fp8Training(False, False, True),
}


@functools.partial(jax.jit, static_argnames=("config", "implementation"))
def both(x, experts, logits, g, config, implementation):
    y, pull = jax.vjp(functools.partial(moe, config=config, implementation=implementation), x, experts, logits)
    return y, *pull(g)


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("num_tokens", [1, 500, 3001])
def test_kernels_and_plain_form(num_tokens, name):
    config = MoEConfig(16, 4, 512, 256, fp8_training=SWITCHES[name])
    operands = x_of(0, config, num_tokens), experts_of(0, config), logits_of(0, config, num_tokens)
    g = normal([0, 1], num_tokens, config.hidden_size, dtype="bfloat16")
    found, again = (jax.tree.leaves(both(*operands, g, config, "mosaic")) for _ in range(2))
    # Sums in another order flip codes of what was rounded to 16 bits before it is quantized.
    for mine, same, plain in zip(found, again, jax.tree.leaves(both(*operands, g, config, "xla")), strict=True):
        check_close(mine, plain.astype(jnp.float32), 1e-2)
        np.testing.assert_array_equal(np.asarray(mine, np.float32), np.asarray(same, np.float32))
