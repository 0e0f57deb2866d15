"""A search whose plans are spread over processes, with made-up layers in them."""

import dataclasses
import os
import time

import pytest

from moe_jax import MoEConfig
from moe_jax.tuning import processes
from moe_jax.tuning.candidates import candidates
from moe_jax.tuning.plan import LayerShape
from moe_jax.tuning.search import Layer, search
from moe_jax.tuning.timed_layer import TimedLayer
from tests.tuning.fake_layer import FakeLayer

CONFIG = MoEConfig(128, 8, 2048, 768)


class Made(FakeLayer):
    """Faster with bands of 4; tells in which process it is. 13 tokens are too many, 14 end the process."""

    def __init__(self, config, num_tokens):
        super().__init__(lambda c: 40.0 - (c.band == 4), lambda c: 45.0, refused=lambda plan: plan.down.band == 16)
        if num_tokens == 13:
            raise MemoryError("no room for the weights")
        self.num_tokens = num_tokens

    def build(self, plans, stacks=False):
        time.sleep(0.2)
        return super().build(plans, stacks)

    def fingerprint(self, plan):
        if self.num_tokens == 14:
            os._exit(7)
        return super().fingerprint(plan)

    def kernel_us(self, plan):
        if self.num_tokens == 15:
            return float(os.getpid()), 0.0
        return super().kernel_us(plan)


@pytest.fixture(scope="module")
def pool():
    with processes.Pool(3, Made) as pool:
        yield pool


def test_a_search_finds_what_it_finds_alone(pool):
    said = []
    shape = LayerShape.of(CONFIG, 4096)
    layer = processes.SharedLayer(pool, CONFIG, 4096)
    assert isinstance(layer, Layer)
    entry = search(shape, layer, said.append)
    assert entry == search(shape, Made(CONFIG, 4096))
    assert entry.plan.up.band == 4 and any("too wide" in message for message in said)


def test_plans_are_spread_over_the_processes(pool):
    plans = candidates(LayerShape.of(CONFIG, 4096))
    layer = processes.SharedLayer(pool, CONFIG, 15)
    layer.build(plans)
    seen = [layer.kernel_us(plan)[0] for plan in plans]
    assert len(set(seen)) == 3 and os.getpid() not in seen
    assert max(seen.count(one) for one in seen) <= -(-len(plans) // 3)


def test_what_fails_in_a_process_is_an_error_here(pool):
    with pytest.raises(processes.ProcessError, match="MemoryError: no room for the weights"):
        processes.SharedLayer(pool, CONFIG, 13)


def test_a_process_that_ends_is_an_error():
    with processes.Pool(1, Made) as pool:
        layer = processes.SharedLayer(pool, CONFIG, 14)
        plan = candidates(LayerShape.of(CONFIG, 14))[0]
        layer.build([plan])
        with pytest.raises(processes.ProcessError, match="exit code 7"):
            layer.fingerprint(plan)


@pytest.mark.parametrize("form", [None, "fp8_channel"])
def test_the_real_layer_on_this_device(form):
    """Without kernels a plan changes nothing; the bits are those of the layer, and it takes some time."""
    config = MoEConfig(8, 2, 256, 128, quantization=form)
    layer = TimedLayer(config, 33)
    plans = candidates(LayerShape.of(config, 33))[: 1 if form else 2]
    assert layer.build(plans) == {}
    prints = {layer.fingerprint(plan) for plan in plans}
    assert len(prints) == 1
    if form is None:
        assert fingerprint_of(config, 34, plans[0]) not in prints
        assert layer.layer_us(plans[0]) > 0


def test_processes_hold_plain_and_quantized_weights():
    plain = MoEConfig(num_experts=128, top_k=8, hidden_size=4096, intermediate_size=1536)
    quantized = dataclasses.replace(plain, quantization="fp8_channel")
    assert [processes.processes_for(config, 12, 80 * 2**30) for config in (plain, quantized)] == [10, 7]


def fingerprint_of(config, num_tokens, plan):
    layer = TimedLayer(config, num_tokens)
    layer.build([plan])
    return layer.fingerprint(plan)
