"""Bad input: each is refused with an error that names the rule, the values and the way out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import ExpertWeights, MoEConfig, MoELayerWeights, TopK
from tests.layers import experts_of, logits_of, rank_of, topk_of, x_of
from tests.util import without_type_checks

# The errors that users see, not those of the tests' shape checker.
moe_module, routing = without_type_checks("moe_jax.moe"), without_type_checks("moe_jax.routing")
moe_module.route = routing.route

CONFIG = MoEConfig(6, 2, 16, 8, dtype="float32")
BIASED = dataclasses.replace(CONFIG, has_bias=True)
TOKENS = 5


def call(config=CONFIG, *, x=None, experts=None, topk=None, **kwargs):
    """`apply_experts` of a good layer in which something was replaced."""
    x = x_of(0, config, TOKENS) if x is None else x
    experts = experts_of(0, config) if experts is None else experts
    topk = topk_of(0, config, TOKENS) if topk is None else topk
    return moe_module.apply_experts(x, experts, topk, config, **kwargs)


def experts_with(config=CONFIG, **fields):
    return dataclasses.replace(experts_of(0, config), **fields)


def zeros(*shape, dtype="float32"):
    return jnp.zeros(shape, dtype)


GOOD_IDS, GOOD_WEIGHTS = topk_of(0, CONFIG, TOKENS)
WRONG_SHAPES = {
    "x of three axes": (dict(x=zeros(1, TOKENS, 16)), ["x", "(1, 5, 16)", "[T, H]", "reshape", "(-1, 16)"]),
    "x of one axis": (dict(x=zeros(16)), ["x", "(16,)", "[T, H]"]),
    "x too wide": (dict(x=zeros(TOKENS, 17)), ["x", "(5, 17)", "(5, 16)", "hidden_size=16"]),
    "w13 of two axes": (dict(experts=experts_with(w13=zeros(16, 16))), ["w13", "(16, 16)", "[E_local, N, H]"]),
    "w13 without up rows": (
        dict(experts=experts_with(w13=zeros(6, 8, 16))),
        ["w13", "(6, 8, 16)", "(6, 16, 16)", "2I", "'silu'"],
    ),
    "w13 not K-major": (
        dict(experts=experts_with(w13=zeros(6, 16, 17))),
        ["w13", "(6, 16, 17)", "(6, 16, 16)", "contracted axis comes last"],
    ),
    "w2 not K-major": (
        dict(experts=experts_with(w2=zeros(6, 8, 16))),
        ["w2", "(6, 8, 16)", "(6, 16, 8)", "contracted axis comes last"],
    ),
    "w2 of fewer experts": (dict(experts=experts_with(w2=zeros(5, 16, 8))), ["w2", "(5, 16, 8)", "(6, 16, 8)"]),
    "experts missing, no map": (
        dict(experts=ExpertWeights(zeros(4, 16, 16), zeros(4, 16, 8))),
        ["4", "num_experts=6", "expert_map"],
    ),
    "ids of too many slots": (
        dict(topk=TopK(zeros(TOKENS, 3, dtype="int32"), GOOD_WEIGHTS)),
        ["topk.ids", "(5, 3)", "(5, 2)", "[T, k]"],
    ),
    "ids of other tokens": (dict(topk=TopK(GOOD_IDS[:4], GOOD_WEIGHTS)), ["topk.ids", "(4, 2)", "(5, 2)"]),
    "weights of one axis": (
        dict(topk=TopK(GOOD_IDS, zeros(TOKENS))),
        ["topk.weights", "(5,)", "(5, 2)", "[T, k]"],
    ),
    "ids too large": (dict(topk=TopK(GOOD_IDS.at[2, 1].set(6), GOOD_WEIGHTS)), ["topk.ids", "6", "[-1, 6)"]),
    "ids too small": (dict(topk=TopK(GOOD_IDS.at[0, 0].set(-2), GOOD_WEIGHTS)), ["topk.ids", "-2", "[-1, 6)"]),
    "map too short": (dict(expert_map=jnp.arange(5)), ["expert_map", "(5,)", "num_experts=6", "-1"]),
    "map too long": (dict(expert_map=jnp.arange(7)), ["expert_map", "(7,)", "num_experts=6"]),
    "map of two axes": (dict(expert_map=jnp.arange(6)[None]), ["expert_map", "(1, 6)", "num_experts=6"]),
    "map past the local experts": (
        dict(expert_map=jnp.asarray([0, 1, 2, 3, 4, 6])),
        ["expert_map", "6", "[-1, 6)", "local"],
    ),
    "map below -1": (dict(expert_map=jnp.asarray([0, 1, 2, 3, 4, -7])), ["expert_map", "-7", "[-1, 6)"]),
    "unknown implementation": (
        dict(implementation="cuda"),
        ["implementation='cuda'", "auto", "xla", "mosaic", "mosaic_interpret"],
    ),
}
WRONG_DTYPES = {
    "x": (dict(x=zeros(TOKENS, 16, dtype="bfloat16")), ["x is bfloat16", "float32", "cast"]),
    "w13": (dict(experts=experts_with(w13=zeros(6, 16, 16, dtype="float16"))), ["w13 is float16", "float32"]),
    "w2": (dict(experts=experts_with(w2=zeros(6, 16, 8, dtype="bfloat16"))), ["w2 is bfloat16", "float32"]),
    "ids": (
        dict(topk=TopK(zeros(TOKENS, 2), GOOD_WEIGHTS)),
        ["topk.ids is float32", "integer", "int32"],
    ),
    "weights": (
        dict(topk=TopK(GOOD_IDS, GOOD_WEIGHTS.astype("bfloat16"))),
        ["topk.weights is bfloat16", "float32", "cast"],
    ),
    "map": (dict(expert_map=jnp.arange(6.0)), ["expert_map is float32", "integer", "int32"]),
}


def check_refused(error, words, **changes):
    with pytest.raises(error) as caught:
        call(**changes)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def test_good_input_passes():
    assert call(implementation="xla").shape == (TOKENS, 16)
    assert call(BIASED, implementation="xla").shape == (TOKENS, 16)


@pytest.mark.parametrize("name", WRONG_SHAPES)
def test_wrong_values_and_shapes(name):
    changes, words = WRONG_SHAPES[name]
    check_refused(ValueError, words, **changes)


@pytest.mark.parametrize("name", WRONG_DTYPES)
def test_wrong_dtypes(name):
    changes, words = WRONG_DTYPES[name]
    check_refused(TypeError, words, **changes)


@pytest.mark.parametrize("missing", ["w13_bias", "w2_bias"])
def test_biases_that_are_missing_superfluous_or_misshapen(missing):
    bias = getattr(experts_of(0, BIASED), missing)
    width = bias.shape[1]
    no_bias = experts_with(BIASED, **{missing: None})
    check_refused(ValueError, [f"has no {missing}", "has_bias=True"], config=BIASED, experts=no_bias)
    superfluous = experts_with(CONFIG, **{missing: bias})
    check_refused(ValueError, [f"has a {missing}", "has_bias=False"], experts=superfluous)
    integers = experts_with(BIASED, **{missing: bias.astype("int32")})
    check_refused(TypeError, [missing, "int32", "floating"], config=BIASED, experts=integers)
    misshapen = experts_with(BIASED, **{missing: bias[:, :-1]})
    words = [missing, f"(6, {width - 1})", f"(6, {width})"]
    check_refused(ValueError, words, config=BIASED, experts=misshapen)


@pytest.mark.parametrize("name", ["w13_input_scale", "w2_input_scale"])
def test_input_scales(name):
    check_refused(ValueError, [name, "(1,)", "(6,)", "[E_local]"], experts=experts_with(**{name: zeros(1)}))
    halves = experts_with(**{name: zeros(6, dtype="bfloat16")})
    check_refused(TypeError, [f"{name} is bfloat16", "float32"], experts=halves)
    assert call(experts=experts_with(**{name: zeros(6)}), implementation="xla").shape == (TOKENS, 16)


def test_ungated_weights_have_one_half_of_the_rows():
    config = dataclasses.replace(CONFIG, activation="relu2_no_mul")
    check_refused(
        ValueError, ["w13", "(6, 16, 16)", "(6, 8, 16)", "un-gated"], config=config, experts=experts_of(0, CONFIG)
    )


def test_more_slots_than_experts():
    with pytest.raises(ValueError, match="top_k=7 must not exceed num_experts=6"):
        MoEConfig(6, 7, 16, 8)


def test_a_map_of_this_rank_must_fit_its_weights():
    expert_map, local = rank_of(experts_of(0, CONFIG), CONFIG, [1, 4])
    assert call(experts=local, expert_map=expert_map, implementation="xla").shape == (TOKENS, 16)
    check_refused(ValueError, ["expert_map", "3", "[-1, 2)"], experts=local, expert_map=expert_map.at[0].set(3))


@pytest.mark.parametrize("bad", ["ids", "map"])
def test_ranges_are_checked_only_where_that_costs_no_wait(bad):
    """In a function being traced the values are not known yet; constants of that function are."""
    x, experts = x_of(0, CONFIG, TOKENS), experts_of(0, CONFIG)
    ids, expert_map = GOOD_IDS, jnp.arange(6)
    if bad == "ids":
        ids = ids.at[0, 0].set(9)
    else:
        expert_map = expert_map.at[3].set(9)

    def layer(ids, expert_map):
        topk = TopK(ids, GOOD_WEIGHTS)
        return moe_module.apply_experts(x, experts, topk, CONFIG, expert_map=expert_map, implementation="xla")

    assert np.isfinite(jax.jit(layer)(ids, expert_map)).all()
    with pytest.raises(ValueError, match="9"):
        jax.jit(lambda: layer(ids, expert_map))()


def test_shapes_are_checked_in_a_compiled_function():
    with pytest.raises(ValueError, match="expert_map"):
        jax.jit(lambda m: call(expert_map=m, implementation="xla"))(jnp.arange(5))


def test_moe_checks_before_it_routes():
    good = x_of(0, CONFIG, TOKENS), experts_of(0, CONFIG), logits_of(0, CONFIG, TOKENS)
    assert moe_module.moe(*good, CONFIG, implementation="xla").shape == (TOKENS, 16)
    x, experts, logits = good
    with pytest.raises(TypeError, match="x is bfloat16"):
        moe_module.moe(x.astype("bfloat16"), experts, logits, CONFIG)
    with pytest.raises(ValueError, match="4 experts of num_experts=6"):
        moe_module.moe(x, rank_of(experts, CONFIG, range(4))[1], logits, CONFIG)
    with pytest.raises(ValueError, match="implementation='fast'"):
        moe_module.moe(x, experts, logits, CONFIG, implementation="fast")


@pytest.mark.parametrize("num_tokens", [0, TOKENS])
def test_unknown_implementation_with_and_without_tokens(num_tokens):
    arguments = x_of(0, CONFIG, num_tokens), experts_of(0, CONFIG), logits_of(0, CONFIG, num_tokens), CONFIG
    with pytest.raises(ValueError, match="implementation='fast'"):
        moe_module.moe(*arguments, implementation="fast")


def test_logits_of_the_wrong_shape():
    x, experts = x_of(0, CONFIG, TOKENS), experts_of(0, CONFIG)
    for wrong in (zeros(TOKENS, 5), zeros(6)):
        with pytest.raises(ValueError, match="router_logits.*num_experts=6"):
            routing.route(wrong, CONFIG)
    with pytest.raises(ValueError, match=r"topk.ids has shape \(4, 2\)"):
        moe_module.moe(x, experts, logits_of(0, CONFIG, 4), CONFIG)


def test_blocks_are_checked_like_layers():
    layer = MoELayerWeights(experts_of(0, CONFIG), router=zeros(6, 16))
    with pytest.raises(TypeError, match="x is bfloat16"):
        moe_module.moe_block(zeros(TOKENS, 16, dtype="bfloat16"), layer, CONFIG)


UNSUPPORTED = {
    "float32": (dict(dtype="float32"), ["float32", "bfloat16", "float16"]),
    "hidden size": (dict(hidden_size=72), ["=72", "multiple of 16", "pad", "implementation='xla'"]),
    "intermediate size": (dict(intermediate_size=1000), ["=1000", "multiple of 16", "pad", "implementation='xla'"]),
}


@pytest.mark.parametrize("implementation", ["mosaic", "mosaic_interpret"])
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_kernel_asked_for_by_name_says_why_it_cannot(name, implementation):
    fields, words = UNSUPPORTED[name]
    config = MoEConfig(**{"num_experts": 4, "top_k": 2, "hidden_size": 64, "intermediate_size": 32, **fields})
    operands = jax.eval_shape(lambda: (x_of(0, config, TOKENS), experts_of(0, config), logits_of(0, config, TOKENS)))
    with pytest.raises(ValueError, match=f"implementation='{implementation}' cannot run") as caught:
        jax.eval_shape(lambda *o: moe_module.moe(*o, config, implementation=implementation), *operands)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
