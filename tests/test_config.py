"""Configs: what they accept, what they refuse and how they say so, and that a jit can hold them."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.activations import ACTIVATIONS
from moe_jax.config import MoEConfig, RoutingConfig, RoutingMethod
from moe_jax.routing_methods import METHOD_SPECS
from tests.util import without_type_checks

SIZES = {"num_experts": 16, "top_k": 2, "hidden_size": 32, "intermediate_size": 24}
NOT_TOP_K = ("hash", "custom", "simulated_uniform", "simulated_normal")
TOP_K = tuple(method.value for method in RoutingMethod if method.value not in NOT_TOP_K)

# Wrong types are refused by the shape checker of the tests before the config sees them; this copy is without it.
unchecked = without_type_checks("moe_jax.config")


def a_function(hidden_states, router_logits, top_k, renormalize):
    raise NotImplementedError


def rule_of(method, **routing):
    return RoutingConfig(method, **routing).rule


# --- what a valid config is


def test_defaults():
    config = MoEConfig(**SIZES)
    assert config.routing.method is RoutingMethod.RENORMALIZE
    assert (config.activation, config.dtype, config.is_gated, config.w13_rows) == ("silu", "bfloat16", True, 48)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_w13_rows_follow_the_activation(name):
    config = MoEConfig(**SIZES, activation=name)
    assert config.is_gated == (not name.endswith("_no_mul"))
    assert config.w13_rows == (48 if config.is_gated else 24)
    assert config.act.name == name


def test_activation_parameters_reach_the_activation():
    config = MoEConfig(**SIZES, activation="swigluoai", swiglu_alpha=2, swiglu_limit=5)
    assert (config.act.alpha, config.act.beta, config.act.limit) == (2.0, 1.0, 5.0)


def test_names_are_normalised():
    config = MoEConfig(**SIZES, activation="gelu_pytorch_tanh", dtype=jnp.float16)
    assert (config.activation, config.dtype) == ("gelu_tanh", "float16")
    assert RoutingConfig("default", router_logits_dtype=jnp.bfloat16).router_logits_dtype == "bfloat16"
    assert RoutingConfig("default", routed_scaling_factor=2).routed_scaling_factor == 2.0


def test_numpy_integers_become_integers():
    config = unchecked.MoEConfig(**{name: np.int64(value) for name, value in SIZES.items()})
    assert type(config.num_experts) is int and config.num_experts == 16


def test_configs_are_frozen_hashable_picklable_values():
    make = lambda: MoEConfig(**SIZES, routing=RoutingConfig("deepseek_v3", 4, 2))  # noqa: E731
    config = make()
    assert config == make() and hash(config) == hash(make())
    assert config != dataclasses.replace(config, top_k=3)
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 3


def test_a_jit_takes_it_as_a_static_argument():
    traces = []

    def scaled(x, config):
        traces.append(config)
        return x * config.routing.routed_scaling_factor

    jitted = jax.jit(scaled, static_argnums=1)
    configs = [MoEConfig(**SIZES, routing=RoutingConfig("default", routed_scaling_factor=f)) for f in (2.5, 2.5, 3.0)]
    assert [float(jitted(jnp.ones(()), config)) for config in configs] == [2.5, 2.5, 3.0]
    assert len(traces) == 2


# --- the rule of each method


@pytest.mark.parametrize("method", TOP_K)
def test_every_top_k_method_has_a_hashable_rule(method):
    rule = rule_of(method, routed_scaling_factor=1.5)
    assert hash(rule) == hash(rule_of(method, routed_scaling_factor=1.5))
    assert rule.scale == 1.5
    assert rule.score in ("softmax", "sigmoid", "sqrtsoftplus", "identity")
    assert rule.weight in ("score", "softmax", "sigmoid")
    assert (rule.num_expert_group, rule.topk_group) == (1, 1)


def test_other_methods_have_no_rule():
    for method in NOT_TOP_K:
        function = a_function if method == "custom" else None
        assert RoutingConfig(method, custom_function=function).rule is None


def test_every_method_is_specified():
    assert set(METHOD_SPECS) == set(RoutingMethod)


@pytest.mark.parametrize(
    ("method", "score", "weight", "renormalize", "epsilon"),
    [
        ("default", "softmax", "score", False, 0.0),
        ("renormalize", "identity", "softmax", False, 0.0),
        ("renormalize_naive", "softmax", "score", True, 0.0),
        ("topk", "identity", "score", False, 0.0),
        ("llama4", "identity", "sigmoid", False, 0.0),
        ("sigmoid", "sigmoid", "score", False, 0.0),
        ("sigmoid_renorm", "sigmoid", "score", True, 0.0),
        ("minimax2", "sigmoid", "score", True, 1e-20),
        ("deepseek_v2", "softmax", "score", False, 1e-20),
        ("deepseek_v3", "sigmoid", "score", True, 1e-20),
        ("deepseek_v4", "sqrtsoftplus", "score", True, 1e-20),
    ],
)
def test_rules(method, score, weight, renormalize, epsilon):
    rule = rule_of(method)
    assert (rule.score, rule.weight, rule.renormalize, rule.renorm_epsilon) == (score, weight, renormalize, epsilon)


def test_grouped_rules():
    assert rule_of("deepseek_v3", num_expert_group=4, topk_group=2).group_score == "top2_sum"
    assert rule_of("deepseek_v2", num_expert_group=4, topk_group=2).group_score == "max"


def test_choosing_all_groups_is_choosing_without_groups():
    assert rule_of("deepseek_v3", num_expert_group=4, topk_group=4) == rule_of("deepseek_v3")


@pytest.mark.parametrize("method", ["deepseek_v2", "deepseek_v3", "deepseek_v4", "minimax2"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_renormalize_overrides_where_the_method_permits(method, renormalize):
    assert rule_of(method, renormalize=renormalize).renormalize is renormalize


@pytest.mark.parametrize("method", ["hash", "custom"])
def test_renormalize_overrides_without_a_rule(method):
    function = a_function if method == "custom" else None
    assert RoutingConfig(method, custom_function=function).renormalizes is True
    assert RoutingConfig(method, custom_function=function, renormalize=False).renormalizes is False


@pytest.mark.parametrize(
    ("method", "own"), [("default", False), ("renormalize", True), ("renormalize_naive", True), ("sigmoid", False)]
)
def test_renormalize_may_repeat_what_the_method_does(method, own):
    assert RoutingConfig(method, renormalize=own).rule == rule_of(method)


# --- errors: each names the rule, the values and the way out


def refuse(error, *parts, config=unchecked.MoEConfig, **fields):
    with pytest.raises(error) as raised:
        config(**fields)
    for part in parts:
        assert part in str(raised.value), f"{part!r} is not in: {raised.value}"


def refuse_routing(*parts, error=ValueError, **fields):
    refuse(error, *parts, config=unchecked.RoutingConfig, **fields)


def refuse_moe(*parts, error=ValueError, routing=None, **fields):
    if routing is not None:
        fields["routing"] = unchecked.RoutingConfig(**routing)
    refuse(error, *parts, **{**SIZES, **fields})


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -3])
def test_sizes_must_be_positive(name, value):
    refuse_moe(f"{name}={value}", "at least 1", **{name: value})


@pytest.mark.parametrize("name", [*SIZES, "num_shared_experts", "shared_intermediate_size"])
@pytest.mark.parametrize("value", [2.0, "2", None, True])
def test_sizes_must_be_integers(name, value):
    refuse_moe(f"{name}={value!r}", "integer", error=TypeError, **{name: value})


@pytest.mark.parametrize(
    "name", ["has_bias", "has_router_bias", "has_correction_bias", "apply_router_weight_on_input", "shared_expert_gate"]
)
def test_flags_must_be_booleans(name):
    refuse_moe(f"{name}='yes'", "True or False", error=TypeError, **{name: "yes"})


def test_top_k_must_not_exceed_the_experts():
    refuse_moe("top_k=17", "num_experts=16", top_k=17)


def test_activation_must_be_known():
    refuse_moe("activation='swish2'", "silu_no_mul", "swigluoai", activation="swish2")


def test_activation_parameters_must_belong_to_it():
    refuse_moe("swiglu_limit=7.0", "activation='gelu'", "swigluoai", activation="gelu", swiglu_limit=7.0)
    refuse_moe("swiglu_alpha=1.7", "swiglustep", activation="swiglustep", swiglu_alpha=1.7)
    refuse_moe("swiglu_limit=-1.0", "positive", swiglu_limit=-1.0)
    refuse_moe("swiglu_alpha=inf", "finite", swiglu_alpha=float("inf"))


@pytest.mark.parametrize("dtype", ["float64", "fp8", "int32", jnp.int8, None])
def test_dtype_must_be_one_of_three(dtype):
    refuse_moe("dtype=", "bfloat16, float16, float32", dtype=dtype)


def test_router_logits_dtype_must_be_one_of_three():
    refuse_routing("router_logits_dtype='float64'", "bfloat16, float16, float32", router_logits_dtype="float64")


def test_routing_must_be_a_routing_config():
    refuse(TypeError, "RoutingConfig", **SIZES, routing="renormalize")


def test_method_must_be_known():
    refuse_routing("method='soft'", "renormalize_naive", "deepseek_v3", method="soft")


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_scaling_factor_must_be_positive_and_finite(scale):
    refuse_routing(f"routed_scaling_factor={scale}", "positive and finite", routed_scaling_factor=scale)


def test_scaling_factor_must_be_a_number():
    refuse_routing("routed_scaling_factor=None", "number", error=TypeError, routed_scaling_factor=None)


def test_groups_must_make_sense():
    refuse_routing("topk_group=3", "num_expert_group=2", method="deepseek_v3", num_expert_group=2, topk_group=3)
    refuse_routing("num_expert_group=0", "at least 1", method="deepseek_v3", num_expert_group=0)
    refuse_routing("num_expert_group=2", "'sigmoid'", "deepseek_v3, deepseek_v2", method="sigmoid", num_expert_group=2)


def test_groups_must_divide_the_experts():
    refuse_moe("num_experts=16", "num_expert_group=3", routing={"method": "deepseek_v3", "num_expert_group": 3})


def test_groups_must_hold_two_experts_to_add_up():
    groups = {"num_expert_group": 16, "topk_group": 8}
    refuse_moe("num_expert_group=16", "best two", routing={"method": "deepseek_v3", **groups})
    assert MoEConfig(**SIZES, routing=RoutingConfig("deepseek_v2", **groups)).routing.num_expert_group == 16


def test_top_k_must_fit_into_the_chosen_groups():
    groups = {"method": "deepseek_v3", "num_expert_group": 8, "topk_group": 2}
    refuse_moe("top_k=5", "4 experts", "topk_group=2", top_k=5, routing=groups)
    assert MoEConfig(**{**SIZES, "top_k": 4}, routing=RoutingConfig(**groups)).top_k == 4


@pytest.mark.parametrize(
    ("method", "value", "way_out"),
    [
        ("default", True, "renormalize"),
        ("renormalize", False, "default"),
        ("renormalize_naive", False, "default"),
        ("sigmoid", True, "sigmoid_renorm"),
        ("sigmoid_renorm", False, "sigmoid"),
        ("topk", True, "leave it None"),
        ("llama4", True, "leave it None"),
        ("simulated_uniform", True, "leave it None"),
        ("simulated_normal", False, "leave it None"),
    ],
)
def test_renormalize_must_not_contradict_the_method(method, value, way_out):
    refuse_routing(f"renormalize={value}", f"'{method}'", way_out, method=method, renormalize=value)


def test_renormalize_must_be_a_boolean():
    refuse_routing("renormalize=1", "True or False", error=TypeError, method="deepseek_v3", renormalize=1)


def test_custom_needs_its_function_and_nobody_else_does():
    refuse_routing("custom_function", "(weights, ids)", method="custom")
    refuse_routing("custom_function", "'default'", method="default", custom_function=a_function)


def test_weight_on_input_needs_one_expert_per_token():
    refuse_moe("apply_router_weight_on_input", "top_k=2", "top_k=1", apply_router_weight_on_input=True)
    assert MoEConfig(**{**SIZES, "top_k": 1}, apply_router_weight_on_input=True).apply_router_weight_on_input


def test_llama4_needs_one_expert_per_token():
    refuse_moe("llama4", "top_k=2", "method='sigmoid'", routing={"method": "llama4"})
    assert MoEConfig(**{**SIZES, "top_k": 1}, routing=RoutingConfig("llama4")).top_k == 1


@pytest.mark.parametrize("method", [method.value for method in RoutingMethod])
def test_correction_bias_needs_a_method_that_takes_one(method):
    function = a_function if method == "custom" else None
    routing = {"method": method, "custom_function": function}
    fields = {**SIZES, "top_k": 1, "has_correction_bias": True}
    if method in ("deepseek_v3", "deepseek_v4", "minimax2"):
        assert MoEConfig(**fields, routing=RoutingConfig(**routing)).has_correction_bias
    else:
        refuse_moe(
            "has_correction_bias", f"'{method}'", "deepseek_v3", top_k=1, has_correction_bias=True, routing=routing
        )


def test_shared_experts_need_a_size_and_a_gate_needs_them():
    refuse_moe("num_shared_experts=1", "shared_intermediate_size=0", num_shared_experts=1)
    refuse_moe("num_shared_experts=0", "shared_intermediate_size=64", shared_intermediate_size=64)
    refuse_moe("shared_expert_gate", "num_shared_experts", shared_expert_gate=True)
    refuse_moe("num_shared_experts=-1", "at least 0", num_shared_experts=-1)
    assert MoEConfig(
        **SIZES, num_shared_experts=2, shared_intermediate_size=64, shared_expert_gate=True
    ).shared_expert_gate
