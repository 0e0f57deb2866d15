"""The layer on a GPU at real sizes: error against the float32 reference, bits that repeat, nothing read by the host.

Tests that share weights or compiled layers are in one group: with ``-n 8 --dist loadgroup`` they stay in one process.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import ExpertWeights, MoEConfig, RoutingConfig, TopK, apply_experts, moe, reference
from moe_jax.ops import implementation as impl
from tests.layers import TOLERANCE, rank_of, reference_moe
from tests.lowering import num_kernels, without_strings
from tests.util import assert_discriminates, check_close

pytestmark = pytest.mark.gpu

CASES = {
    "mixtral-8x7b": MoEConfig(8, 2, 4096, 14336),
    "qwen3-30b-a3b": MoEConfig(128, 8, 2048, 768),
    "qwen3-235b": MoEConfig(128, 8, 4096, 1536),
    "dsv3-ep8": MoEConfig(32, 1, 7168, 2048),
    "gpt-oss-120b": MoEConfig(128, 4, 2880, 2880),
}
TOKENS = (0, 1, 16, 128, 1000, 4096)
SAMPLE = 48  # tokens compared with the reference, which is slow


@functools.partial(jax.jit, static_argnums=0)
def make_weights(config: MoEConfig, key: jax.Array) -> ExpertWeights:
    """Outputs have RMS near 1."""
    k13, k2, b13, b2 = jax.random.split(key, 4)
    num, hidden, inner, rows = config.num_experts, config.hidden_size, config.intermediate_size, config.w13_rows

    def normal(key, scale, *shape):
        return (jax.random.normal(key, shape, config.dtype) * scale).astype(config.dtype)

    return ExpertWeights(
        w13=normal(k13, hidden**-0.5, num, rows, hidden),
        w2=normal(k2, 2 * inner**-0.5, num, hidden, inner),
        w13_bias=normal(b13, 0.5, num, rows) if config.has_bias else None,
        w2_bias=normal(b2, 0.5, num, hidden) if config.has_bias else None,
    )


def inputs(config: MoEConfig, num_tokens: int):
    """Hidden states and logits, drawn on the host: there a slice of any length costs no compilation."""
    rng = np.random.default_rng(num_tokens)
    x = rng.standard_normal((num_tokens, config.hidden_size), np.float32)
    logits = 2 * rng.standard_normal((num_tokens, config.num_experts), np.float32)
    return jnp.asarray(x.astype(jnp.dtype(config.dtype))), jnp.asarray(logits)


def rows(array: jax.Array, index) -> jax.Array:
    """Rows of an array, taken by the host."""
    return jnp.asarray(np.asarray(array)[index])


def sample_of(num_tokens: int) -> np.ndarray:
    return np.unique(np.linspace(0, num_tokens - 1, min(SAMPLE, num_tokens)).astype(int))


def check_sample(out, expected, config) -> None:
    """A sample of the tokens against the reference."""
    expected = np.asarray(expected)
    rms = float(np.sqrt(np.mean(np.square(expected, dtype=np.float64))))
    assert 0.2 < rms < 5, f"{rms=}"
    check = functools.partial(check_close, expected=expected, tolerance=TOLERANCE[config.dtype])
    if len(expected) > 1:
        assert_discriminates(check, out)
    check(out)


def same_bits(one, other) -> bool:
    one, other = np.asarray(one), np.asarray(other)
    return one.dtype == other.dtype and np.array_equal(one.view(np.int16), other.view(np.int16))


def poison_memory() -> None:
    """Leaves NaN in the memory that the next call gets for what its kernels do not write."""
    jax.block_until_ready(jnp.full((3, 1 << 28), jnp.nan, jnp.float32)).delete()


class Layer:
    """A layer with its weights on the GPU."""

    def __init__(self, config: MoEConfig):
        self.config = config
        self.weights = jax.block_until_ready(make_weights(config, jax.random.key(0)))
        self.jitted = jax.jit(functools.partial(moe, config=config))
        self.compiled = {}

    def at(self, x, logits):
        """Compiled for so many tokens."""
        if len(x) not in self.compiled:
            self.compiled[len(x)] = self.jitted.lower(x, self.weights, logits).compile()
        return self.compiled[len(x)]

    def __call__(self, x, logits, **kwargs):
        run = self.jitted if kwargs else self.at(x, logits)
        return run(x, self.weights, logits, **kwargs)

    def reference(self, x, logits, **kwargs):
        return reference_moe(x, self.weights, logits, self.config, **kwargs)


@functools.cache
def small_layer() -> Layer:
    return Layer(SMALL)


def together(name: str):
    return pytest.mark.xdist_group(name)


@pytest.fixture(scope="module", params=[pytest.param(name, marks=together(name)) for name in CASES])
def layer(request):
    impl._warn_once.cache_clear()
    layer = Layer(CASES[request.param])
    yield layer
    jax.tree.map(lambda leaf: leaf.delete(), layer.weights)  # up to 20 GB a case


@pytest.mark.parametrize("num_tokens", TOKENS)
def test_case(layer, num_tokens):
    config = layer.config
    x, logits = inputs(config, num_tokens)
    poison_memory()
    out = jax.block_until_ready(layer(x, logits))
    assert impl._warn_once.cache_info().currsize == 0, "an operation went without its kernel"
    assert out.shape == (num_tokens, config.hidden_size) and out.dtype == config.dtype
    if num_tokens == 0:
        return
    sample = sample_of(num_tokens)
    check_sample(rows(out, sample), layer.reference(rows(x, sample), rows(logits, sample)), config)

    # Beside the rows there is room for where they are and what they weigh, and for a schedule.
    taken = layer.at(x, logits).memory_analysis().temp_size_in_bytes
    assert taken <= num_tokens * config.top_k * 2 * (config.hidden_size + config.intermediate_size) + 2**20
    with jax.transfer_guard("disallow"):  # nothing goes to the host or comes from it
        again = jax.block_until_ready(layer(x, logits))
    assert same_bits(again, out), "two runs differ"
    for token in sorted({0, num_tokens // 3, num_tokens - 1}):
        alone = layer(rows(x, [token]), rows(logits, [token]))
        assert same_bits(alone, rows(out, [token])), f"token {token} depends on the others of its batch"


# --- other kinds of layers, at sizes that compile and compare quickly

SMALL = MoEConfig(32, 4, 1024, 512)
GROUPED = RoutingConfig("deepseek_v3", 8, 4, routed_scaling_factor=2.5)
KINDS = {
    "float16": dataclasses.replace(SMALL, dtype="float16"),
    "odd sizes": MoEConfig(16, 4, 1040, 528),
    "gpt-oss, odd sizes": MoEConfig(12, 3, 1040, 592, activation="swigluoai", has_bias=True),
    "no gate": dataclasses.replace(SMALL, activation="relu2_no_mul", routing=RoutingConfig("sigmoid_renorm")),
    "llama4": MoEConfig(16, 1, 1024, 512, routing=RoutingConfig("llama4"), apply_router_weight_on_input=True),
    "every expert": MoEConfig(8, 8, 256, 128, activation="gelu_tanh", routing=RoutingConfig("default")),
}


@pytest.mark.parametrize("name", KINDS)
def test_kind(name):
    layer = Layer(KINDS[name])
    x, logits = inputs(layer.config, 333)
    logits = np.array(logits)
    logits[5], logits[6, 1:], logits[7, 2] = np.nan, -np.inf, np.inf
    logits = jnp.asarray(logits)
    poison_memory()
    out, expected = layer(x, logits), layer.reference(x, logits)
    check_sample(out, expected, layer.config)
    assert not np.asarray(out)[5].any(), "a token without an expert"
    assert same_bits(layer(x, logits), out)
    assert same_bits(layer(rows(x, [300]), rows(logits, [300])), rows(out, [300]))


def test_it_lowers_to_kernels_alone():
    layer, (x, logits) = small_layer(), inputs(SMALL, 64)
    assert num_kernels(without_strings(layer.jitted.lower(x, layer.weights, logits).as_text())) == 5


def test_ranks_of_a_split_add_up():
    config = dataclasses.replace(SMALL, routing=GROUPED, has_correction_bias=True)
    layer = Layer(config)
    x, logits = inputs(config, 257)
    bias = 0.3 * jax.random.normal(jax.random.key(3), (32,))
    total = jnp.zeros(x.shape, jnp.float32)
    order = np.random.default_rng(0).permutation(32)
    rank = jax.jit(functools.partial(moe, config=config))
    for chosen in np.split(order, 4):
        expert_map, local = rank_of(layer.weights, config, chosen)
        part = rank(x, local, logits, expert_map=expert_map, correction_bias=bias)
        expected = reference_moe(x, local, logits, config, expert_map=expert_map, correction_bias=bias)
        check_close(part, expected, 6e-3)
        total = total + part
    check_sample(total, layer.reference(x, logits, correction_bias=bias), config)


experts_of_small = jax.jit(functools.partial(apply_experts, config=SMALL))


@together("experts of small")
@pytest.mark.parametrize("experts", [[0], [31], [3, 17]], ids=str)
def test_tokens_on_few_experts(experts):
    """Many tiles of one group, and experts that nobody chose: their weights are not read."""
    weights = small_layer().weights
    x, _ = inputs(SMALL, 1000)
    ids = jnp.asarray(np.random.default_rng(1).choice(experts, (1000, 4)), jnp.int32)
    topk = TopK(ids, jnp.full((1000, 4), 0.25, jnp.float32))
    chosen = np.isin(np.arange(32), experts)[:, None, None]
    poisoned = ExpertWeights(jnp.where(chosen, weights.w13, jnp.nan), jnp.where(chosen, weights.w2, jnp.nan))
    out = experts_of_small(x, poisoned, topk)
    check_sample(out, reference.apply_experts(x, weights, topk, SMALL), SMALL)


@together("experts of small")
def test_slots_without_an_expert_and_tokens_that_are_not_finite():
    layer = small_layer()
    x, _ = inputs(SMALL, 1000)
    rng = np.random.default_rng(2)
    ids = jnp.asarray(np.argsort(rng.random((1000, 32)), axis=1)[:, :4], jnp.int32)
    weights = jnp.asarray(rng.uniform(0.1, 0.5, (1000, 4)), jnp.float32)
    empty = rng.random((1000, 4)) < 0.3
    empty[10] = True
    ids = jnp.where(empty, rng.choice([-1, -7, 32, 2**31 - 1], empty.shape), ids).astype(jnp.int32)
    bad = np.arange(1000) % 3 == 1
    poison_memory()
    nan_there = TopK(ids, jnp.where(empty, jnp.nan, weights))
    out = experts_of_small(jnp.where(bad[:, None], jnp.nan, x), layer.weights, nan_there)
    clean = experts_of_small(x, layer.weights, TopK(ids, jnp.where(empty, 0.0, weights)))
    assert same_bits(rows(out, ~bad), rows(clean, ~bad))
    assert not np.asarray(clean)[10].any()
    kept = TopK(jnp.where(empty, -1, ids), weights)
    check_sample(clean, reference.apply_experts(x, layer.weights, kept, SMALL), SMALL)


@together("few tokens")
@pytest.mark.parametrize("num_tokens", [3, 8, 9, 15, 17])
def test_few_tokens(num_tokens):
    """Up to 16 tokens every tile holds all of them: the bits are those of a batch whose rows are gathered."""
    layer, (x, logits) = small_layer(), inputs(SMALL, 333)
    poison_memory()
    few = layer(x[:num_tokens], logits[:num_tokens])
    check_sample(few, layer.reference(x[:num_tokens], logits[:num_tokens]), SMALL)
    assert same_bits(few, rows(layer(x, logits), slice(num_tokens)))


def test_many_runs_give_the_same_bits():
    layer = small_layer()
    x, logits = inputs(SMALL, 1000)
    first = layer(x, logits)
    outputs = [layer(x, logits) for _ in range(50)]
    assert all(same_bits(out, first) for out in outputs)


def test_a_scan_over_layers():
    config = MoEConfig(16, 2, 512, 256)
    stacked = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *[make_weights(config, jax.random.key(i)) for i in range(3)]
    )
    x, logits = inputs(config, 100)

    def step(x, weights):
        return x + moe(x, weights, logits, config), None

    out = jax.jit(lambda x, stacked: jax.lax.scan(step, x, stacked)[0])(x, stacked)
    expected = x.astype(jnp.float32)
    for i in range(3):
        weights = jax.tree.map(lambda leaf: leaf[i], stacked)
        expected = expected + reference_moe(expected.astype(x.dtype), weights, logits, config)
    check_close(out, expected, 1.2e-2)


def test_gradients():
    config = MoEConfig(4, 2, 256, 128, has_bias=True)
    layer = Layer(config)
    x, logits = inputs(config, 200)
    cotangent = jax.random.normal(jax.random.key(9), x.shape)
    poison_memory()

    def gradients(run):
        def loss(x, weights, logits):
            return jnp.sum(run(x, weights, logits, config).astype(jnp.float32) * cotangent)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, layer.weights, logits)

    actual, expected = gradients(moe), gradients(reference.moe)
    for mine, right in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.any(np.asarray(right))
        check_close(mine, right, 1.5e-2)
