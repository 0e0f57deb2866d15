"""What the gradient of the experts keeps, that it repeats, and where it ends; its values are in `test_moe_transforms`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import ExpertWeights, MoEConfig, TopK, apply_experts, moe, reference
from moe_jax.training import SAVED_NAMES, save_moe_residuals
from tests.layers import experts_of, logits_of, normal, quick_jit, topk_of, x_of
from tests.lowering import like, lower, operations
from tests.util import check_close

f32 = functools.partial(MoEConfig, dtype="float32")
CONFIG = f32(6, 2, 20, 12, has_bias=True)


def operands_of(seed, config, num_tokens):
    return x_of(seed, config, num_tokens), experts_of(seed, config), logits_of(seed, config, num_tokens)


def loss_of(config, layer=functools.partial(moe, implementation="xla")):
    def loss(*operands):
        y = layer(*operands, config).astype(jnp.float32)
        return jnp.sum(y * normal([0, 9], *y.shape))

    return loss


EDGES = {
    "k is 1": (f32(5, 1, 20, 12), 9),
    "k is E": (f32(3, 3, 20, 12), 9),
    "one token": (CONFIG, 1),
    "one expert": (f32(1, 1, 7, 5, activation="relu2_no_mul"), 9),
    "many experts, few tokens": (f32(40, 2, 20, 12), 3),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges(name):
    config, num_tokens = EDGES[name]
    operands = operands_of(0, config, num_tokens)
    found, expected = (
        quick_jit(jax.grad(loss, argnums=(0, 1, 2)))(*operands)
        for loss in (loss_of(config), loss_of(config, reference.moe))
    )
    for mine, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.isfinite(np.asarray(mine)).all()
        if np.linalg.norm(right) > 1e-6:  # the weights of all of k = E experts, of one, do not change: 0 and a rounding
            check_close(mine, right, 1e-5)


def test_finite_differences():
    operands = operands_of(1, CONFIG, 5)
    loss, gradient = quick_jit(loss_of(CONFIG)), quick_jit(jax.grad(loss_of(CONFIG), argnums=(0, 1, 2)))(*operands)
    for seed in range(3):
        step = jax.tree.map(lambda leaf: normal([seed, leaf.size], *leaf.shape), operands)
        plus, minus = (loss(*jax.tree.map(lambda a, d: a + e * d, operands, step)) for e in (1e-3, -1e-3))
        slope = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(step), strict=True))
        assert abs(slope) > 0.1
        np.testing.assert_allclose((plus - minus) / 2e-3, slope, rtol=2e-2)


def test_the_same_bits_again():
    operands, gradient = operands_of(2, CONFIG, 33), quick_jit(jax.grad(loss_of(CONFIG), argnums=(0, 1, 2)))
    first, second = gradient(*operands), gradient(*operands)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_nothing_of_the_size_of_all_rows_is_kept_but_pre_activations():
    config = MoEConfig(6, 3, 64, 16)
    x, experts, topk = x_of(3, config, 40), experts_of(3, config), topk_of(3, config, 40)

    def layer(x, experts, weights):
        return apply_experts(x, experts, TopK(topk.ids, weights), config, implementation="xla")

    pull = jax.vjp(layer, x, experts, topk.weights)[1]
    given = {leaf.shape for leaf in jax.tree.leaves(experts)}
    kept = [leaf for leaf in jax.tree.leaves(pull) if hasattr(leaf, "shape") and leaf.shape not in given]
    pairs, dtype = topk.ids.size, jnp.bfloat16
    large = sorted((leaf.shape for leaf in kept if leaf.dtype == dtype), key=len)
    assert large.count(x.shape) == 1 and large.count((pairs, 2 * config.intermediate_size)) == 1 and len(large) == 2, (
        large
    )
    assert all(leaf.size <= pairs for leaf in kept if leaf.dtype != dtype), "of the routing a few numbers a pair"


def num_kernels(policy):
    config = MoEConfig(8, 2, 128, 64)

    def loss(x, w13, w2, logits):
        experts = ExpertWeights(w13=w13, w2=w2)
        layer = functools.partial(moe, config=config, implementation="mosaic")
        return jnp.sum(jax.checkpoint(layer, policy=policy)(x, experts, logits).astype(jnp.float32))

    shapes = (
        like("bfloat16", 17, 128),
        like("bfloat16", 8, 128, 128),
        like("bfloat16", 8, 128, 64),
        like("float32", 17, 8),
    )
    return operations(lower(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)), *shapes))["mosaic_gpu_v2"]


def test_a_checkpointed_layer_keeps_what_its_gradient_needs():
    """Nothing saved, the backward pass routes and multiplies with w13 again; with the policy it does not."""
    everything = num_kernels(jax.checkpoint_policies.everything_saveable)
    named = num_kernels(save_moe_residuals)
    nothing = num_kernels(jax.checkpoint_policies.nothing_saveable)
    assert everything == named < nothing, (everything, named, nothing)
    assert set(SAVED_NAMES) == {"moe_x", "moe_pre_activation", "moe_routing"}


def test_the_policy_changes_no_bit():
    operands, loss = operands_of(4, CONFIG, 17), loss_of(CONFIG)
    kept, plain = (
        quick_jit(jax.grad(fn, argnums=(0, 1, 2)))(*operands)
        for fn in (jax.checkpoint(loss, policy=save_moe_residuals), loss)
    )
    jax.tree.map(lambda a, b: check_close(a, b, 1e-6), kept, plain)


def test_second_derivatives_say_that_there_are_none():
    x, experts, logits = operands_of(5, CONFIG, 4)

    def slope(x):
        return jnp.sum(jax.grad(loss_of(CONFIG))(x, experts, logits) ** 2)

    with pytest.raises(NotImplementedError, match="no derivative of its own.*moe_jax.reference"):
        jax.grad(slope)(x)
    right = jax.grad(lambda x: jnp.sum(jax.grad(loss_of(CONFIG, reference.moe))(x, experts, logits) ** 2))(x)
    assert np.isfinite(np.asarray(right)).all() and np.any(np.asarray(right))


def test_without_a_derivative_the_layer_is_the_same():
    """The path of inference, bit for bit, whose activations are not rounded before they are applied."""
    config = MoEConfig(6, 2, 64, 32)
    operands = operands_of(6, config, 21)
    layer = functools.partial(moe, config=config, implementation="xla")
    alone = quick_jit(layer)(*operands)
    differentiated = quick_jit(lambda *operands: jax.vjp(layer, *operands)[0])(*operands)
    assert np.any(np.asarray(alone) != np.asarray(differentiated))
    check_close(differentiated, alone.astype(jnp.float32), 6e-3)
