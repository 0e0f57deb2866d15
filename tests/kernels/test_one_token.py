"""One token routed by counting, interpreted: what it gets is what it gets among others, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import RoutingConfig
from moe_jax.kernels.hopper import one_token
from moe_jax.ops.route_groups import route_groups
from tests.contracts import check_topk
from tests.grouping import check_shared_groups
from tests.lowering import like, lower, num_kernels
from tests.oracles import bias_of, config_of, logits_of, special_logits

# One of each way to score, weigh and select: the rest is `selection`'s.
RULES = (
    "default",
    "renormalize",
    "topk",
    "sigmoid_renorm",
    "deepseek_v2_grouped",
    "deepseek_v3_grouped",
    "deepseek_v4",
)
MAP = [1, -1, 0, 7, 2, -1, 2, 1]  # two experts share a local one, another's is out of range


def runner(config, bias=None, expert_map=None, num_local=None):
    def run(logits):
        return route_groups(
            logits,
            config.top_k,
            config.routing.rule,
            correction_bias=None if bias is None else jnp.asarray(bias),
            expert_map=None if expert_map is None else jnp.asarray(expert_map, jnp.int32),
            num_local_experts=num_local,
            share_rows=True,
            implementation="mosaic_interpret",
        )

    return jax.jit(run)


def check_alone(logits, config, bias=None, expert_map=None, num_local=None):
    """Each token alone, against plain Python, and against all of them together."""
    experts = logits.shape[1]
    run = runner(config, bias, expert_map, num_local)
    together, _ = run(logits)
    for token in range(logits.shape[0]):
        assert one_token.applies(1, experts, config.top_k)
        mine = logits[token : token + 1]
        found, groups = run(mine)
        check_topk(found, mine, config, bias)
        ids = np.asarray(found.ids)
        check_shared_groups(groups, ids, experts, num_local, expert_map)
        with pytest.raises(AssertionError):
            check_shared_groups(groups, np.where(ids < 0, 0, -1), experts, num_local, expert_map)
        np.testing.assert_array_equal(ids[0], together.ids[token])
        np.testing.assert_array_equal(
            np.asarray(found.weights)[0].view(np.int32), together.weights[token].view(np.int32)
        )


@pytest.mark.once
@pytest.mark.parametrize("name", RULES)
def test_rules(name):
    config = config_of(name)
    check_alone(logits_of(11, 2, config.num_experts), config, bias_of(11, config))


@pytest.mark.once
@pytest.mark.parametrize("name", ["renormalize", "deepseek_v3"])
def test_special_logits(name):
    """NaN, infinities, equal ones, fewer finite ones than slots."""
    config = config_of(name)
    check_alone(special_logits()[::2] if name == "deepseek_v3" else special_logits()[1::2], config, bias_of(12, config))


def test_equal_logits_go_to_the_lowest_expert():
    logits = np.random.default_rng(7).choice([-1.0, -0.0, 0.0, 1.0], (3, 8)).astype(np.float32)
    check_alone(logits, config_of("renormalize", 5, 8))


@pytest.mark.parametrize("top_k", [4, 8])
def test_expert_map(top_k):
    logits = logits_of(13, 2, 8)
    logits[1, 2:] = -np.inf
    check_alone(logits, config_of("renormalize", top_k, 8), None, MAP, 3)


@pytest.mark.parametrize(("num_experts", "top_k"), [(20, 16), (160, 6), (256, 8)])
def test_numbers_of_experts(num_experts, top_k):
    check_alone(logits_of(14, 1, num_experts), config_of("renormalize", top_k, num_experts))


def test_logits_of_16_bits():
    config = config_of("renormalize", 4, 8)
    logits = jnp.asarray(logits_of(15, 1, 8), jnp.bfloat16)
    found, _ = runner(config)(logits)
    check_topk(found, np.asarray(logits, np.float32), config, None)


def test_what_it_is_for():
    assert one_token.applies(1, 128, 8) and one_token.applies(1, 256, 16)
    for others in ((2, 128, 8), (1, 264, 8), (1, 128, 3), (1, 128, 17)):
        assert not one_token.applies(*others)


@pytest.mark.parametrize(
    ("routing", "num_experts", "top_k", "dtype"),
    [
        (RoutingConfig(), 128, 8, "float32"),
        (RoutingConfig("deepseek_v3", 8, 4, routed_scaling_factor=2.5), 256, 8, "float32"),
        (RoutingConfig(), 64, 4, "bfloat16"),
    ],
    ids=["qwen3", "deepseek", "bfloat16"],
)
def test_lowers_for_cuda(routing, num_experts, top_k, dtype):
    def schedule(logits, bias):
        found, groups = route_groups(
            logits,
            top_k,
            routing.rule,
            correction_bias=bias if routing.takes_correction_bias else None,
            share_rows=True,
            implementation="mosaic",
        )
        return found, groups.positions, groups.tile_group, groups.num_tiles

    text = lower(schedule, like(dtype, 1, num_experts), like("float32", num_experts))
    assert num_kernels(text) == 1
