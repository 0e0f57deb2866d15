"""The flax layers: the numbers of the library in both, gradients, transforms of flax, what they sow, and bad settings."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import moe_jax
from moe_jax import MoEConfig, RoutingConfig, losses, reference
from moe_jax.nn import CorrectionBias, MoE, balance, named_weights, sown, sown_sum
from moe_jax.nn import linen as moe_linen
from moe_jax.router_training import drop_over_capacity
from moe_jax.types import MoELayerWeights, SharedExpertWeights
from tests.layers import TOLERANCE, experts_of, normal, quick_jit
from tests.util import assert_discriminates, check_close

V3 = RoutingConfig("deepseek_v3", 2, 1, routed_scaling_factor=2.0)
CONFIGS = {
    "plain": MoEConfig(6, 2, 16, 24, dtype="float32"),
    "everything": MoEConfig(
        8, 3, 16, 24, has_bias=True, has_router_bias=True, has_correction_bias=True, routing=V3, dtype="float32",
        num_shared_experts=1, shared_intermediate_size=12, shared_expert_gate=True,
    ),
    "no gate": MoEConfig(
        4, 2, 16, 24, activation="relu2_no_mul", dtype="bfloat16", num_shared_experts=1, shared_intermediate_size=8
    ),
}  # fmt: skip


def weights_of(seed, config) -> MoELayerWeights:
    """In float32, as trained parameters are."""
    config = dataclasses.replace(config, dtype="float32")
    hidden, inner = config.hidden_size, config.shared_intermediate_size
    rows, num = inner * (2 if config.is_gated else 1), config.num_experts
    shared = None
    if config.num_shared_experts:
        gate = normal([seed, 13], 1, hidden, scale=hidden**-0.5) if config.shared_expert_gate else None
        w13, w2 = (
            normal([seed, 11], rows, hidden, scale=hidden**-0.5),
            normal([seed, 12], hidden, inner, scale=inner**-0.5),
        )
        shared = SharedExpertWeights(w13, w2, gate)
    return MoELayerWeights(
        experts_of(seed, config),
        normal([seed, 10], num, hidden, scale=2 * hidden**-0.5),
        normal([seed, 14], num) if config.has_router_bias else None,
        normal([seed, 15], num, scale=0.2) if config.has_correction_bias else None,
        shared,
    )


def nnx_layer(seed, config, **settings):
    layer = nnx.eval_shape(lambda: MoE(config, rngs=nnx.Rngs(0), **settings))
    layer.set_weights(weights_of(seed, config))
    return layer


def captured(layer, x, **options):
    """The output of an nnx model and what it sowed."""
    graph, state = nnx.split(layer)
    return quick_jit(lambda state, x: nnx.capture(nnx.merge(graph, state), nnx.Intermediate)(x, **options))(state, x)


def output(layer, x, **options):
    return captured(layer, x, **options)[0]


def linen_variables(seed, config):
    params = named_weights(weights_of(seed, config))
    bias = params.pop("correction_bias", None)
    return {"params": params} | ({} if bias is None else {"router_state": {"correction_bias": bias}})


def reference_block(x, weights, config):
    """`moe_jax.reference` on experts rounded as the layer rounds them; and the ids."""
    experts = jax.tree.map(lambda leaf: leaf.astype(config.dtype), weights.experts)
    shared = jax.tree.map(lambda leaf: leaf.astype(config.dtype), weights.shared)
    logits = jnp.matmul(x, weights.router.T, precision="highest")
    logits = logits if weights.router_bias is None else logits + weights.router_bias[None]
    bias = weights.correction_bias
    out = reference.moe(x.astype(config.dtype), experts, logits, config, correction_bias=bias, shared=shared)
    return out, logits, reference.route(logits, config, correction_bias=bias).ids


def expected_of(x, weights, config):
    expected, logits, ids = reference_block(x.reshape(-1, 16), weights, config)
    score = "sigmoid" if config.routing is V3 else "softmax"
    sequences = logits.reshape(*x.shape[:2], -1), ids.reshape(*x.shape[:2], -1)
    wanted = {
        "load_balancing_loss": losses.load_balancing_loss(logits, ids, score=score),
        "sequence_balance_loss": losses.sequence_balance_loss(*sequences, score=score),
        "router_z_loss": losses.router_z_loss(logits),
    }
    return expected, wanted, losses.expert_loads(ids, config.num_experts)


@pytest.mark.parametrize("name", CONFIGS)
def test_both_layers_are_the_reference_and_each_other(name):
    config = CONFIGS[name]
    x = normal(5, 3, 7, 16)
    variables, layer = linen_variables(0, config), nnx_layer(0, config)
    apply = quick_jit(lambda v, x: moe_linen.MoE(config).apply(v, x, mutable=["intermediates"]))
    theirs, state = apply(variables, x)
    ours, intermediates = captured(layer, x)
    expected, wanted, loads = quick_jit(expected_of, static_argnums=2)(x, weights_of(0, config), config)
    assert ours.dtype == jnp.dtype(config.dtype) and ours.shape == x.shape
    check_close(ours.reshape(-1, 16), expected, 2 * TOLERANCE[config.dtype])
    check_close(ours, theirs, 2e-7 if config.dtype == "float32" else 2e-3)

    for values in (state["intermediates"], intermediates):
        for loss, value in wanted.items():
            check_close(sown_sum(values, loss), value, 1e-5)
        np.testing.assert_array_equal(sown(values, "expert_loads")[()], loads)
        assert int(sown_sum(values, "num_dropped")) == 0


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_gradients_of_both_layers_are_those_of_the_reference(name):
    config, x = CONFIGS[name], normal(6, 9, 16)
    cotangent = normal(7, 9, 16)
    layer, variables = nnx_layer(1, config), linen_variables(1, config)
    ours = nnx.jit(nnx.grad(lambda layer: jnp.sum(layer(x) * cotangent)))(layer)
    ours = {path[0]: value.get_value() for path, value in nnx.to_flat_state(ours)}

    def loss(params):
        return jnp.sum(moe_linen.MoE(config).apply(variables | {"params": params}, x) * cotangent)

    theirs = quick_jit(jax.grad(loss))(variables["params"])
    weights = weights_of(1, config)
    right = quick_jit(jax.grad(lambda w: jnp.sum(reference_block(x, w, config)[0] * cotangent)))(weights)
    right = named_weights(right)
    right.pop("correction_bias", None)
    assert ours.keys() == theirs.keys() == right.keys()
    for key, value in right.items():
        check_close(ours[key], value, 1e-5)
        if len(value) > 1:  # the gate is one row
            assert_discriminates(lambda out: check_close(out, value, 1e-5), ours[key])
        check_close(theirs[key], ours[key], 1e-5)


def test_router_losses_reach_the_router_and_nothing_else():
    config, x = CONFIGS["plain"], normal(6, 2, 9, 16)

    def loss(layer):
        _, intermediates = nnx.capture(layer, nnx.Intermediate)(x)
        return sum(
            sown_sum(intermediates, f"{name}_loss") for name in ("load_balancing", "router_z", "sequence_balance")
        )

    gradient = nnx.jit(nnx.grad(loss))(nnx_layer(1, config))
    assert np.any(np.asarray(gradient["router"].get_value()))
    assert not np.any(np.asarray(gradient["w13"].get_value()))


# --- initialisation and dtypes


def test_initialisers_have_variance_one_over_fan_in_for_every_expert():
    config = MoEConfig(3, 1, 128, 64, num_shared_experts=1, shared_intermediate_size=64, has_bias=True)
    layer = nnx.jit(lambda: MoE(config, rngs=nnx.Rngs(0)))()
    variables = linen.unbox(quick_jit(moe_linen.MoE(config).init)(jax.random.key(0), jnp.ones((2, 128))))
    for find in (lambda name: getattr(layer, name)[...], lambda name: variables["params"][name]):
        for name, fan_in in {"w13": 128, "w2": 64, "router": 128, "shared_w13": 128, "shared_w2": 64}.items():
            array = np.asarray(find(name))
            assert array.dtype == np.float32
            for matrix in array if array.ndim == 3 else [array]:
                assert abs(matrix.std() * fan_in**0.5 - 1) < (0.15 if name == "router" else 0.05), name
        assert np.any(np.asarray(find("w13")[0]) != np.asarray(find("w13")[1]))
        assert not np.any(np.asarray(find("w2_bias")))
    ones = nnx.jit(lambda: MoE(config, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16, router_init=nnx.initializers.ones))()
    assert ones.w2.dtype == jnp.bfloat16 and np.all(np.asarray(ones.router[...]) == 1)


def test_no_optimizer_sees_the_correction_bias():
    layer = nnx_layer(0, CONFIGS["everything"])
    parameters, bias = nnx.state(layer, nnx.Param), nnx.state(layer, CorrectionBias)
    assert "correction_bias" not in parameters and list(bias) == ["correction_bias"]


# --- jitter, capacity, balancing


def test_jitter_needs_a_key_and_changes_the_router_alone():
    config, x = CONFIGS["plain"], normal(8, 64, 16)
    layer = nnx_layer(2, config, jitter_eps=0.5)
    quiet = output(layer, x)
    np.testing.assert_array_equal(quiet, output(nnx_layer(2, config), x))
    noisy = output(layer, x, key=jax.random.key(1))
    np.testing.assert_array_equal(noisy, output(layer, x, key=jax.random.key(1)))
    assert np.any(np.asarray(noisy) != np.asarray(quiet))
    module, variables = moe_linen.MoE(config, jitter_eps=0.5), linen_variables(2, config)
    check_close(quick_jit(module.apply)(variables, x, key=jax.random.key(1)), noisy, 2e-7)
    stream = quick_jit(module.apply)(variables, x, rngs={"jitter": jax.random.key(1)})
    assert np.any(np.asarray(stream) != np.asarray(quiet))


def test_capacity_drops_and_says_so():
    config, x = MoEConfig(4, 2, 16, 24, dtype="float32"), normal(8, 32, 16)
    layer = nnx_layer(2, config, capacity_factor=0.75, keep="weight")
    y, intermediates = captured(layer, x)

    def dropping(x, weights):
        _, logits, _ = reference_block(x, weights, config)
        topk, dropped = drop_over_capacity(moe_jax.route(logits, config), 4, 12, keep="weight")
        return reference.apply_experts(x, weights.experts, topk, config), dropped

    expected, dropped = quick_jit(dropping)(x, weights_of(2, config))
    check_close(y, expected, 2e-6)
    assert int(sown_sum(intermediates, "num_dropped")) == int(dropped) >= 16  # 48 places for 64 pairs
    assert int(sown(intermediates, "expert_loads")[()].sum()) == 64  # what the router chose


def test_balance_moves_every_bias_by_the_loads_of_its_layer():
    config = CONFIGS["everything"]

    class Model(nnx.Module):
        def __init__(self):
            self.first, self.second = nnx_layer(3, config), nnx_layer(4, config)
            self.other = nnx_layer(3, CONFIGS["plain"])

        def __call__(self, x):
            return self.other(self.second(self.first(x) + x) + x)

    model = Model()
    before = [model.first.correction_bias[...], model.second.correction_bias[...]]
    _, intermediates = captured(model, normal(9, 40, 16))
    balance(model, intermediates, 0.25)
    for layer, bias in zip((model.first, model.second), before, strict=True):
        name = "first" if layer is model.first else "second"
        wanted = losses.update_correction_bias(bias, sown(intermediates, "expert_loads")[(name,)], 0.25)
        np.testing.assert_array_equal(layer.correction_bias[...], wanted)
        assert np.any(np.asarray(wanted) != np.asarray(bias))

    state = {"second": {"correction_bias": before[1]}}
    moved = moe_linen.balance(state, nnx.to_pure_dict(intermediates), 0.25)
    np.testing.assert_array_equal(moved["second"]["correction_bias"], model.second.correction_bias[...])
    for broken in (lambda: balance(model, {}), lambda: moe_linen.balance(state, {})):
        with pytest.raises(ValueError, match="no expert_loads of the layer '(first|second)'"):
            broken()


# --- transforms of flax


def test_scan_and_remat_over_stacked_nnx_layers():
    config, x = CONFIGS["everything"], normal(10, 2, 5, 16)

    @nnx.split_rngs(splits=3)
    @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
    def make(rngs):
        return MoE(config, rngs=rngs)

    class Model(nnx.Module):
        def __init__(self):
            self.layers = nnx.jit(lambda: make(nnx.Rngs(0)))()

        def __call__(self, x):
            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry, transform_metadata={nnx.PARTITION_NAME: "layers"})
            @nnx.remat
            def step(layer, x):
                return x + layer(x)

            return step(self.layers, x)

    model = Model()
    assert model.layers.w13.shape == (3, 8, 48, 16)
    assert model.layers.w13.get_metadata()["out_sharding"] == ("layers", "expert", "mlp", "embed")

    def loss(model):
        y, intermediates = nnx.capture(model, nnx.Intermediate)(x)
        return jnp.sum(y**2), intermediates

    (value, intermediates), gradient = nnx.jit(nnx.value_and_grad(loss, has_aux=True))(model)
    loads = sown(intermediates, "expert_loads")[("layers",)]
    assert loads.shape == (3, 8) and np.all(np.asarray(loads.sum(-1)) == 30)

    def unrolled(stacked):
        y = x
        for i in range(3):
            weights = {name: array[i] for name, array in stacked.items()}
            y = y + run(y, weights)
        return jnp.sum(y**2)

    def run(x, named):
        weights = moe_jax.nn.weights_of_named(named)
        return moe_jax.moe_block(x.reshape(-1, 16), weights, config, implementation="xla").reshape(x.shape)

    stacked = {name: getattr(model.layers, name)[...] for name in model.layers.settings.shapes()}
    expected, right = quick_jit(jax.value_and_grad(unrolled))(stacked)
    check_close(value, expected, 1e-5)
    for name in ("router", "w13", "w2", "shared_gate"):
        check_close(gradient["layers"][name].get_value(), right[name], 3e-5)
    before = model.layers.correction_bias[...]
    balance(model, intermediates, 1e-2)
    np.testing.assert_array_equal(model.layers.correction_bias[...], losses.update_correction_bias(before, loads, 1e-2))


def test_scan_and_remat_over_stacked_linen_layers():
    config, x = CONFIGS["everything"], normal(10, 2, 5, 16)

    class Step(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            return x + linen.remat(moe_linen.MoE)(config, name="moe")(x), None

    scanned = linen.scan(
        Step,
        variable_axes={"params": 0, "router_state": 0, "intermediates": 0},
        split_rngs={"params": True},
        length=3,
        metadata_params={linen.PARTITION_NAME: "layers"},
    )()
    boxed = quick_jit(scanned.init)(jax.random.key(0), x, None)
    assert boxed["params"]["moe"]["w13"].names == ("layers", "expert", "mlp", "embed")
    variables = linen.unbox(boxed)
    (y, _), state = quick_jit(functools.partial(scanned.apply, mutable=["intermediates"]))(variables, x, None)
    assert sown(state["intermediates"], "expert_loads")[("moe",)].shape == (3, 8)
    expected = x
    for i in range(3):
        one = jax.tree.map(lambda leaf: leaf[i], {key: value["moe"] for key, value in variables.items()})
        expected = expected + quick_jit(moe_linen.MoE(config).apply)(one, expected)
    check_close(y, expected, 1e-6)


def test_vmap_over_a_batch():
    config, x = CONFIGS["plain"], normal(11, 3, 5, 16)
    layer = nnx_layer(5, config)
    batched = nnx.jit(nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0)))(layer, x)
    check_close(batched, output(layer, x), 1e-6)


# --- errors


def test_errors():
    config = CONFIGS["plain"]
    with pytest.raises(ValueError, match="floating-point parameters; leave it None"):
        MoE(MoEConfig(4, 2, 128, 128, quantization="fp8_block"), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"jitter_eps=2.0 must lie in \[0, 1\)"):
        MoE(config, rngs=nnx.Rngs(0), jitter_eps=2.0)
    with pytest.raises(ValueError, match="keep='last' must be one of order, weight"):
        MoE(config, rngs=nnx.Rngs(0), keep="last")
    with pytest.raises(ValueError, match="capacity_factor=-1.0 must be positive"):
        MoE(config, rngs=nnx.Rngs(0), capacity_factor=-1.0)
    mesh = jax.make_mesh((1,), ("dp",))
    with pytest.raises(ValueError, match="belong together"):
        MoE(config, rngs=nnx.Rngs(0), mesh=mesh)
    with pytest.raises(ValueError, match='Batched\\(max_tokens=..., overflow="drop"\\)'):
        MoE(config, rngs=nnx.Rngs(0), mesh=mesh, parallel=moe_jax.ParallelConfig(), capacity_factor=1.0)
    layer = nnx_layer(0, config)
    with pytest.raises(ValueError, match="the weights have shapes"):
        layer.set_weights(weights_of(0, CONFIGS["everything"]))
    with pytest.raises(ValueError, match=r"must be \[..., tokens, hidden_size=16\]"):
        layer(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="nothing was sown as 'router_z_loss'; call the model through nnx.capture"):
        sown_sum({}, "router_z_loss")
    quantized = moe_jax.quantize_experts(experts_of(0, MoEConfig(2, 1, 128, 128)), "fp8_block")
    with pytest.raises(TypeError, match="w13 is quantized"):
        named_weights(MoELayerWeights(quantized, jnp.ones((2, 128))))
