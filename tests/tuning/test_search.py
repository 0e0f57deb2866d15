"""The search with made-up times: it picks the fastest, refuses what is wrong, and goes on where it stopped."""

import dataclasses
import json

import pytest

from moe_jax import MoEConfig
from moe_jax.tuning import cache
from moe_jax.tuning.candidates import candidates
from moe_jax.tuning.plan import default_plan
from moe_jax.tuning.search import Problem, search, tune
from tests.tuning.fake_layer import FakeLayer
from tests.tuning.plans import FEW, MANY


def prefers(**fields):
    """20 microseconds less for every field that a configuration has as given."""
    return lambda config: 100.0 - 20.0 * sum(getattr(config, name) == value for name, value in fields.items())


def test_the_fastest_of_each_projection_makes_the_plan():
    assert default_plan(MANY).tile_rows == 160
    up, down = prefers(tile_rows=128, band=4), prefers(tile_rows=128, band=16, cluster=1)
    entry = search(MANY, FakeLayer(up, down))
    assert (entry.plan.tile_rows, entry.plan.up.band, entry.plan.down.band) == (128, 4, 16)
    assert entry.plan not in candidates(MANY), "the two come from different candidates"
    assert entry.shape == MANY
    assert entry.default_us == pytest.approx(100 + 80 + 10) and entry.tuned_us == pytest.approx(60 + 40 + 10)


def test_the_whole_layer_has_the_last_word():
    layer = FakeLayer(prefers(tile_rows=192), prefers(), overhead=lambda plan: 50.0 if plan.tile_rows == 192 else 10.0)
    assert search(MANY, layer).plan.tile_rows == 160
    assert {plan.tile_rows for plan in layer.timed} == {128, 160, 192}


@pytest.mark.parametrize(("gain", "chosen"), [(0.0, 8), (0.5, 8), (5.0, 4)])
def test_the_rule_stays_unless_something_is_clearly_faster(gain, chosen):
    entry = search(MANY, FakeLayer(lambda config: 50.0 - gain * (config.band == 4), lambda config: 50.0))
    assert entry.plan.up.band == chosen
    assert (entry.plan == default_plan(MANY)) == (chosen == 8)
    if chosen == 8:
        assert entry.tuned_us == entry.default_us


@pytest.mark.parametrize("flaw", ["refused", "wrong", "raises"])
def test_what_is_wrong_is_discarded_however_fast(flaw):
    def bad(plan):
        return plan.up.band == 4

    said = []
    fast = prefers(band=4)
    entry = search(MANY, FakeLayer(fast, prefers(), **{flaw: bad}), said.append)
    assert entry.plan.up.band != 4
    words = {"refused": "too wide", "wrong": "another output", "raises": "too many registers"}[flaw]
    assert said and all("discarded" in message and "band=4" in message and words in message for message in said)
    assert search(MANY, FakeLayer(fast, prefers())).plan.up.band == 4, "but for the flaw it would be chosen"


def test_a_combination_is_checked_too():
    """Each projection's best is right in its own candidate; together they are wrong."""

    def together(plan):
        return plan.up.band == 4 and plan.down.band == 16

    entry = search(MANY, FakeLayer(prefers(band=4), prefers(band=16), wrong=together))
    assert not together(entry.plan)


def test_the_rule_must_be_right():
    with pytest.raises(RuntimeError, match="default rule's plan: cannot be built: too wide"):
        search(FEW, FakeLayer(prefers(), prefers(), refused=lambda plan: plan == default_plan(FEW)))


def test_a_layer_without_kernels_is_refused():
    with pytest.raises(ValueError, match="nothing to tune.*1000"):
        search(dataclasses.replace(FEW, hidden_size=1000), FakeLayer(prefers(), prefers()))


CONFIG = MoEConfig(128, 8, 2048, 768)
PROBLEMS = [Problem("qwen3", CONFIG, tokens) for tokens in (16, 256, 4096)]


def tune_all(folder, problems=PROBLEMS, band=4, **keywords):
    """(outcomes, the problems for which a layer was made)."""
    made = []

    def make_layer(problem):
        made.append(problem)
        if problem.num_tokens == 13:
            raise MemoryError("no room for the weights")
        return FakeLayer(prefers(band=band, tile_k=128), prefers())

    return list(tune(problems, folder, make_layer, **keywords)), made


def test_a_second_run_skips_what_is_there(folders):
    first, made = tune_all(folders[0], PROBLEMS[:2])
    assert made == PROBLEMS[:2] and not any(outcome.skipped for outcome in first)
    second, made = tune_all(folders[0])
    assert made == PROBLEMS[2:]
    assert [outcome.skipped for outcome in second] == [True, True, False]
    assert [outcome.entry for outcome in second[:2]] == [outcome.entry for outcome in first]
    assert cache.find_tuned(PROBLEMS[2].shape).plan.up.band == 4


def test_again_measures_again(folders):
    tune_all(folders[0])
    outcomes, made = tune_all(folders[0], band=16, again=True)
    assert made == PROBLEMS
    assert outcomes[2].entry.plan.up.band == 16 == cache.find_tuned(PROBLEMS[2].shape).plan.up.band


def test_every_problem_is_written_before_the_next_begins(folders):
    def make_layer(problem):
        written = folders[0] / "cpu.json"
        there = json.loads(written.read_text())["entries"] if written.exists() else []
        assert len(there) == PROBLEMS.index(problem)
        if problem is PROBLEMS[2]:
            raise KeyboardInterrupt
        return FakeLayer(prefers(), prefers())

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache, "device_kind", lambda: "cpu")
        list(tune(PROBLEMS, folders[0], make_layer))
    assert [cache.find_tuned(problem.shape) is not None for problem in PROBLEMS[:2]] == [True, True]


def test_one_failure_does_not_take_the_others_with_it(folders):
    bad = Problem("qwen3", CONFIG, 13)
    outcomes, _ = tune_all(folders[0], [bad, PROBLEMS[0]])
    assert outcomes[0].entry is None and "no room" in outcomes[0].failed
    assert outcomes[1].failed is None
    assert cache.stored(folders[0], bad.shape) is None
