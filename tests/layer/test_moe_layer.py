"""The layer suite: every exchange over every kind of ranks, in every number format, against the float32 reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layer_test import MoETestConfig, run_one_config, sweep
from moe_jax.layer_test import run as layer_run
from moe_jax.layer_test.baseline import baseline
from moe_jax.layer_test.data import setup_moe_test_data
from moe_jax.layer_test.run import judge
from moe_jax.layer_test.support import BACKENDS, SHAPE_COMBOS
from moe_jax.layer_test.sweep import FEATURES, covering
from moe_jax.parallel.all_to_all import AllToAll
from moe_jax.parallel.gather_scatter import AllGatherReduceScatter

PLAIN = MoETestConfig(5, 128, 256, 9, 2, "bfloat16", None, False, False, False)
ONE = [(1, 1, False)]
EP = dataclasses.replace(PLAIN, backend="all_to_all", ep_size=4, dp_size=4)


@pytest.mark.parametrize("config", covering(), ids=MoETestConfig.id)
def test_layer(config):
    assert run_one_config(config, jax.devices("cpu")).failures == ()


def on_gpus():
    """Combinations for one GPU, then for two; few, since each compiles kernels of its own."""
    formats = None, "fp8_block", "fp8_channel", "fp8_tensor"
    yield from sweep(shapes=SHAPE_COMBOS[:1], num_experts=(9,), quantizations=formats, ranks=ONE)
    yield from sweep(
        shapes=SHAPE_COMBOS[1:2],
        num_experts=(64,),
        top_ks=(6,),
        quantizations=formats,
        features=FEATURES[3:4],
        ranks=ONE,
    )
    ranks = (1, 2, False), (2, 1, False), (1, 2, True), (2, 1, True)
    yield from sweep(shapes=SHAPE_COMBOS[1:2], num_experts=(9,), quantizations=formats[:2], ranks=ranks)


# Nine experts, so that two ranks have unlike shares, are none that the kernel of the routing takes.
@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:topk runs its plain-JAX form")
@pytest.mark.parametrize("config", list(on_gpus()), ids=MoETestConfig.id)
def test_layer_on_gpus(config):
    devices = jax.devices("cuda")
    if len(devices) < config.world_size:
        pytest.skip(f"needs {config.world_size} GPUs, there are {len(devices)}")
    assert run_one_config(config, devices).failures == ()


def test_balancing_of_experts_is_refused():
    config = dataclasses.replace(EP, num_experts=8, enable_eplb=True)
    with pytest.raises(NotImplementedError, match="balancing the load of experts"):
        run_one_config(config)


def test_configs_that_are_not_valid_and_devices_that_are_not_there():
    with pytest.raises(ValueError, match="several ranks need a backend"):
        run_one_config(dataclasses.replace(EP, backend=None))
    with pytest.raises(ValueError, match="needs 4 devices, but there are 1"):
        run_one_config(EP, jax.devices("cpu")[:1])


# --- what the comparison notices


@pytest.fixture(scope="module")
def right():
    """Data, and an output that passes."""
    data = setup_moe_test_data(EP)
    expected = baseline(EP, data)
    out = np.zeros(data.x.shape, np.float32)
    out[data.is_token] = expected
    assert judge(EP, data, out, expected).failures == ()
    return data, out, expected


def first_shards_exchanged(out, data):
    """The tokens that both shards have."""
    m = EP.m
    common = int(data.num_tokens[1])
    out[:common], out[m : m + common] = out[m : m + common].copy(), out[:common].copy()


def one_token_zero(out, data):
    out[EP.m] = 0.0


def one_token_scaled(out, data):
    out[0] *= 1.05


def one_padding_row_filled(out, data):
    out[np.flatnonzero(~data.is_token)[0], 3] = 1e-6


def one_padding_row_nan(out, data):
    out[-1, 0] = np.nan


def one_value_nan(out, data):
    out[0, 0] = np.nan


def scaled(out, data):
    out *= 1.02


def zero(out, data):
    out[:] = 0.0


BREAK = [
    zero,
    scaled,
    first_shards_exchanged,
    one_token_zero,
    one_token_scaled,
    one_padding_row_filled,
    one_padding_row_nan,
    one_value_nan,
]


@pytest.mark.parametrize("damage", BREAK, ids=lambda damage: damage.__name__)
def test_wrong_outputs_fail(right, damage):
    data, out, expected = right
    wrong = out.copy()
    damage(wrong, data)
    assert judge(EP, data, wrong, expected).failures


def test_outputs_that_a_comparison_says_little_about_fail(right):
    data, out, expected = right
    (failure,) = judge(EP, data, out / 8, expected / 8).failures
    assert "RMS" in failure
    constant = np.where(data.is_token[:, None], np.float32(1), 0)
    failures = judge(EP, data, constant, constant[data.is_token]).failures
    assert failures == tuple(
        f"the comparison would accept an output that is {name}"
        for name in ("shifted by a column", "shifted by a token")
    )


@pytest.mark.parametrize("name", ["fp8_tensor", "int8_channel"])
def test_the_layer_before_quantizing_is_another(name):
    config = dataclasses.replace(EP, quantization=name)
    data = setup_moe_test_data(config)
    plain = baseline(EP, setup_moe_test_data(EP))
    out = np.zeros(data.x.shape, np.float32)
    out[data.is_token] = plain
    assert any("of a shard" in failure for failure in judge(config, data, out, baseline(config, data)).failures)


def test_a_scale_of_other_rows_is_noticed():
    """One scale for the rows that a rank gets, or one for all tokens: close, but not the same."""
    config = dataclasses.replace(EP, quantization="fp8_tensor")
    data = setup_moe_test_data(config)
    out = np.zeros(data.x.shape, np.float32)
    out[data.is_token] = baseline(dataclasses.replace(config, quantize_before=True), data)
    assert judge(config, data, out, baseline(config, data)).failures


# --- broken exchanges are found


class AnotherOrder(AllGatherReduceScatter):
    """Results come home to the neighbour."""

    def finalize(self, y, prepared):
        shards = prepared.parallel.num_token_shards
        return super().finalize(jnp.roll(y, y.shape[0] // shards, axis=0), prepared)


class AnotherMap(AllToAll):
    """Ranks mistake their experts for those of the ranks after them."""

    def send(self, x, topk, parallel, expert_map):
        return super().send(x, topk, parallel, jnp.roll(expert_map, 1, axis=0))


class TwiceReduced(AllGatherReduceScatter):
    output_is_reduced = True


class CountsPadding(AllToAll):
    """Takes rows that are no tokens for tokens."""

    def prepare(self, x, topk, config, parallel, expert_map, num_tokens=None, **options):
        return super().prepare(jnp.nan_to_num(x, nan=1.0), topk, config, parallel, expert_map, **options)


@pytest.mark.parametrize("broken", [AnotherOrder, AnotherMap, TwiceReduced, CountsPadding])
def test_broken_exchanges_are_found(broken, monkeypatch):
    monkeypatch.setitem(BACKENDS, "all_to_all", broken())
    config = dataclasses.replace(EP, ep_size=4, dp_size=2, tp_size=2, sequence_parallel=broken is not TwiceReduced)
    assert run_one_config(config, jax.devices("cpu")).failures


def test_weights_on_other_ranks_are_found(monkeypatch):
    """Neighbouring experts are put where the placement has others."""
    place = layer_run.place_experts
    monkeypatch.setattr(
        layer_run, "place_experts", lambda experts, config, parallel, _: place(experts, config, parallel)
    )
    assert run_one_config(EP, jax.devices("cpu")).failures
