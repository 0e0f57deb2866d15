"""Configs of the layer suite: their names, which of them there are, and that the small set leaves nothing out."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from moe_jax.layer_test import MoETestConfig, is_valid_config, sweep
from moe_jax.layer_test.data import random_placement, setup_moe_test_data, token_counts
from moe_jax.layer_test.support import (
    BACKEND_SUPPORTED_QUANTS,
    BACKENDS,
    PARALLEL_COMBOS,
    PLAIN_BACKENDS,
    QUANT_METHODS,
)
from moe_jax.layer_test.sweep import FEATURES, covering

PLAIN = MoETestConfig(5, 128, 256, 9, 2, "bfloat16", None, False, False, False)
EP = dataclasses.replace(PLAIN, backend="all_to_all", ep_size=4, dp_size=2, tp_size=2)

sizes, flags = st.integers(1, 4096), st.booleans()
CONFIGS = st.builds(
    MoETestConfig,
    *[sizes] * 5,
    st.sampled_from(["bfloat16", "float32"]),
    st.sampled_from(QUANT_METHODS),
    *[flags] * 4,
    st.sampled_from([None, *BACKENDS]),
    *[sizes] * 3,
    st.sampled_from([None, True, False]),
    flags,
)


@hypothesis.given(CONFIGS)
def test_names(config):
    assert MoETestConfig.from_id(config.id()) == config


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("-256-", "-", "has 16 parts"),
        ("[5", "[five", "m='five' is no"),
        ("-False]", "-None]", "quantize_before='None'"),
    ],
)
def test_names_of_nothing(old, new, message):
    with pytest.raises(ValueError, match=message):
        MoETestConfig.from_id(PLAIN.id().replace(old, new))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 255, "use_routed_input_transform": True}, "k=255 is odd"),
        ({"enable_eplb": True, "use_routed_input_transform": True}, "does not go with use_routed_input_transform"),
        ({"top_k": 10}, "top_k=10 exceeds num_experts=9"),
        ({"quantization": "fp3"}, "'fp3' is not one of None, fp8_tensor"),
        ({"ep_size": 2}, "ep_size=2 must be 1 or dp_size \\* tp_size=4"),
        ({"ep_size": 1, "n": 130}, "n=130 has no 4 equal parts"),
        ({"tp_size": 1, "ep_size": 2, "sequence_parallel": True}, "sequence_parallel needs"),
        ({"enable_eplb": True, "ep_size": 1}, "enable_eplb needs ep_size > 1"),
        ({"enable_eplb": True}, "ep_size=4 to divide num_experts=9"),
        ({"backend": None}, "several ranks need a backend"),
        ({"backend": None, "ep_size": 1, "dp_size": 1, "tp_size": 1, "quantize_before": True}, "quantize_before is an"),
        ({"backend": "post"}, "'post' is not one of no_exchange"),
        ({"ep_size": 1, "dp_size": 1, "tp_size": 1}, "one rank has nothing to exchange"),
        ({"quantize_before": True}, "needs a format that quantizes activations, not None"),
        ({"quantize_before": True, "quantization": "int8_weight"}, "needs a format that quantizes activations"),
        ({"backend": "no_exchange"}, "tokens are split over the axes"),
        ({"ep_size": 1}, "use AllGatherReduceScatter"),
    ],
    ids=str,
)
def test_reasons(changes, message):
    assert is_valid_config(EP) == (True, None)
    valid, reason = is_valid_config(dataclasses.replace(EP, **changes))
    assert not valid
    with pytest.raises(ValueError, match=message):
        raise ValueError(reason)


@pytest.mark.parametrize(
    ("backend", "combos"),
    [
        ("no_exchange", {(1, 2, False), (1, 4, False), (1, 2, True)}),
        ("allgather_reducescatter", set(PARALLEL_COMBOS) - {(1, 1, False)}),
        ("all_to_all", {(1, 2, True), (2, 1, True), (4, 1, True), (2, 2, True), (4, 2, True)}),
    ],
)
@pytest.mark.parametrize("prefix", ["", "batched_"])
def test_which_ranks_an_exchange_serves(prefix, backend, combos):
    backend = prefix + backend
    found = sweep(shapes=[(1, 128, 256)], backends=[backend])
    ranks = {(c.dp_size, c.tp_size, c.ep_size > 1) for c in found if c.backend == backend}
    assert ranks == combos


def test_every_exchange_has_its_formats():
    assert set(BACKEND_SUPPORTED_QUANTS) == set(BACKENDS)
    valid, reason = is_valid_config(dataclasses.replace(EP, backend="batched_all_to_all", quantization="fp8_tensor"))
    assert not valid and reason == "backend='batched_all_to_all' does not take quantization='fp8_tensor'"


def test_the_small_set_leaves_no_pair_and_no_value_out():
    configs = covering()
    assert all(is_valid_config(config)[0] for config in configs)
    assert len(set(configs)) == len(configs) < 24
    kind = lambda c: (c.backend, c.dp_size > 1, c.tp_size > 1, c.ep_size > 1)  # noqa: E731
    assert {kind(c) for c in configs} >= {
        kind(c) for c in sweep(shapes=[(1, 128, 256)], backends=tuple(PLAIN_BACKENDS))
    }
    assert max(c.ep_size for c in configs) == 8 > min(c.num_experts for c in configs)  # ranks without experts
    assert {c.backend for c in configs} == {None, *BACKENDS}
    assert {c.quantization for c in configs} == set(QUANT_METHODS)
    features = {(c.use_shared_experts, c.use_gate, c.use_routed_input_transform) for c in configs}
    assert features == set(FEATURES)
    assert {c.is_sequence_parallel for c in configs if c.ep_size == 4 and c.tp_size == 2} == {True, False}
    for backend in PLAIN_BACKENDS:
        assert {c.quantize_before for c in configs if c.backend == backend} == {True, False}


@hypothesis.given(st.integers(1, 300), st.sampled_from([1, 2, 4, 8]))
def test_shards_have_different_numbers_of_tokens(m, shards):
    counts = token_counts(m, shards)
    assert len(counts) == shards and counts[0] == m
    assert all(0 <= count <= m for count in counts)
    if shards > 2:
        assert counts[-1] == 0
    if shards > 1 and m >= 3 * shards:
        assert len(set(counts)) == shards


def test_shards_have_different_tokens():
    data = setup_moe_test_data(EP)
    shards = np.asarray(data.x.astype("float32")).reshape(4, EP.m, -1)
    assert len({shard[:1].tobytes() for shard in shards[:3]}) == 3
    assert np.isnan(shards[3]).all() and np.isfinite(data.logits).all()


def test_placement_is_not_that_of_neighbours():
    assert random_placement(9, 4).slots[0].tolist() != [0, 1, 2]
    assert [len(random_placement(9, 4).get_local_expert_ids(rank)) for rank in range(4)] == [3, 2, 2, 2]
