"""What the router logits of each routing do to the experts."""

import numpy as np
import pytest

from moe_jax import MoEConfig
from moe_jax.bench.inputs import ROUTINGS, expert_loads, make_inputs, make_logits, parse_routings


def loads(routing, tokens=512, experts=32, top_k=4):
    config = MoEConfig(experts, top_k, 16, 16)
    found = expert_loads(config, make_logits(config, tokens, routing))
    assert found.sum() == tokens * top_k
    return np.sort(found)[::-1]


def test_uniform_loads_are_near_the_mean():
    assert 30 < loads("uniform").min() <= loads("uniform").max() < 110  # 64 in the mean


@pytest.mark.parametrize(("top_k", "rows"), [(1, 256), (2, 512), (4, 512)])
def test_half_gives_one_expert_half_of_the_rows_or_every_token(top_k, rows):
    found = loads("half", top_k=top_k)
    assert found[0] == rows
    assert found[1] < rows / 4


@pytest.mark.parametrize(("top_k", "active"), [(4, 8), (8, 8), (12, 12)])
def test_eight_experts_are_active(top_k, active):
    found = loads("eight", top_k=top_k)
    assert (found > 0).sum() == active


def test_zipf_loads_fall_with_the_rank():
    found = loads("zipf", tokens=4096, top_k=1)
    share = found[:3] / 4096 * (1 / np.arange(1, 33)).sum()
    np.testing.assert_allclose(share, [1, 1 / 2, 1 / 3], rtol=0.1)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_weights_stay_of_one_size_and_few_tokens_work(routing):
    config = MoEConfig(8, 2, 16, 16)
    x, logits = make_inputs(config, 64, routing)
    assert (x.shape, x.dtype, logits.shape, logits.dtype) == ((64, 16), "bfloat16", (64, 8), "float32")
    chosen = np.sort(np.asarray(logits), axis=1)[:, -2:]
    assert np.median(chosen[:, 1] - chosen[:, 0]) < 2.5
    for tokens in (0, 1):
        assert expert_loads(config, make_logits(config, tokens, routing)).sum() == 2 * tokens


def test_the_same_every_time():
    config = MoEConfig(8, 2, 16, 16)
    np.testing.assert_array_equal(make_logits(config, 9, "zipf"), make_logits(config, 9, "zipf"))


def test_names_of_routings():
    assert parse_routings("half, uniform,half") == ("half", "uniform")
    with pytest.raises(ValueError, match="'even' is none of uniform, zipf, half, eight"):
        parse_routings("uniform,even")
