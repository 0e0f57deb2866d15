"""What a plan is, and the default rule."""

import dataclasses
import itertools

import pytest

from moe_jax import MoEConfig
from moe_jax.kernels.hopper import matmul_config
from moe_jax.tuning.fit import misfit
from moe_jax.tuning.plan import LayerPlan, LayerShape, default_plan, plan_for
from tests.tuning.plans import FEW, MANY, entry_of, pairs, plan_of_blocks


@pytest.mark.parametrize(
    ("num_pairs", "tile_rows"),
    [(1, 8), (8, 8), (9, 64), (48 * 128, 64), (96 * 128, 128), (97 * 128, 160), (511 * 128, 160), (512 * 128, 192)],
)
def test_the_rule_is_that_of_the_kernel(num_pairs, tile_rows):
    shape = pairs(MANY, num_pairs)
    tiles = min(num_pairs, 128)
    up = matmul_config.default_config(tile_rows, True, 768, tiles)
    assert default_plan(shape) == LayerPlan(
        tile_rows,
        up=dataclasses.replace(up, gather=tile_rows > 8 and matmul_config.fetches_by_token(num_pairs / 128, 2048, 768)),
        down=matmul_config.default_config(tile_rows, False, 2048, tiles),
    )
    assert plan_for(shape) == default_plan(shape)
    assert hash(plan_for(shape)) == hash(default_plan(shape))


@pytest.mark.parametrize(
    ("mean", "inner", "tile_rows", "first", "quantizes"),
    [
        (96, 768, 96, False, False),
        (192, 768, 96, False, True),
        (256, 768, 128, True, True),
        (2048, 768, 128, True, True),
        (2048, 704, 128, True, False),  # codes leave in whole groups of 128
    ],
)
def test_blocks_of_many_rows_stand_first(mean, inner, tile_rows, first, quantizes):
    shape = LayerShape(128, mean * 128, 2048, inner, True, "bfloat16", "float8_e4m3fn block")
    plan = default_plan(shape)
    assert (plan.tile_rows, plan.up.rows_first, plan.down.rows_first) == (tile_rows, first, first)
    assert (plan.up.quantizes, plan.down.quantizes) == (quantizes, False)
    assert misfit(shape, plan) is None


@pytest.mark.parametrize("codes", ["float8_e4m3fn block", "int8 block"])
@pytest.mark.parametrize(("rows_first", "quantizes"), list(itertools.product([False, True], repeat=2)))
def test_all_plans_of_blocks_run(rows_first, quantizes, codes):
    shape = LayerShape(32, 4 * 500, 2048, 768, True, "bfloat16", codes)
    plan = plan_of_blocks(shape, rows_first, quantizes)
    assert misfit(shape, plan) is None
    assert (plan.tile_rows, plan.up.rows_first, plan.up.quantizes) == (128 if rows_first else 96, rows_first, quantizes)


@pytest.mark.parametrize("codes", ["", "weights float4_e2m1fn group", "weights int4 group"])
@pytest.mark.parametrize("mean", [8.0, 32.0, 128.0, 256.0, 1024.0])
def test_rows_are_fetched_by_token_where_that_pays(mean, codes):
    """With weights of four bits many rows alone."""
    shape = LayerShape(128, round(mean * 128), 2048, 768, True, "bfloat16", codes)
    plan = default_plan(shape)
    assert plan.up.gather == (matmul_config.fetches_by_token(mean, 2048, 768) and (not codes or mean >= 192))
    assert not plan.down.gather and misfit(shape, plan) is None


@pytest.mark.parametrize(("mean", "counts"), [(64.0, (32, 64, 96, 128)), (128.0, (128, 160)), (256.0, (128, 144))])
def test_wide_tiles_of_decoded_weights_have_two_row_counts(mean, counts):
    shape = LayerShape(128, round(mean * 128), 2048, 768, True, "bfloat16", "weights float4_e2m1fn group")
    assert (
        default_plan(shape).up.row_counts[-len(counts) :]
        == default_plan(shape).down.row_counts[-len(counts) :]
        == counts
    )


def test_a_rank_expects_its_share_of_the_pairs():
    config = MoEConfig(256, 8, 7168, 2048)
    assert LayerShape.of(config, 100) == LayerShape(256, 800, 7168, 2048, gated=True, dtype="bfloat16")
    assert LayerShape.of(config, 100, 32).num_pairs == 100
    assert LayerShape.of(config, 1, 16).num_pairs == 1  # rounded up
    assert LayerShape.of(config, 0, 16).num_pairs == 0
    assert not LayerShape.of(dataclasses.replace(config, activation="relu2_no_mul"), 1).gated


def test_both_projections_have_the_row_tile_of_the_plan():
    plan = default_plan(MANY)
    with pytest.raises(ValueError, match="down.tile_rows=64 must be the plan's tile_rows=160"):
        dataclasses.replace(plan, down=default_plan(FEW).down)


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("tile_rows", [8, 16])
def test_a_plan_for_smaller_tiles_still_runs(tile_rows, cluster):
    base = default_plan(FEW)
    clustered = dataclasses.replace(base.up, cluster=cluster, gather=False, tile_k=64, row_counts=(16, 32, 64))
    plan = dataclasses.replace(base, up=clustered).for_tile_rows(tile_rows)
    assert plan.up.row_counts == (tile_rows,)
    assert plan.up.cluster == (cluster if tile_rows == 16 else 1)
    assert misfit(FEW, plan) is None
    assert base.for_tile_rows(64) is base


def test_small_blocks_have_no_plan_with_rows_first():
    shape = LayerShape(128, 64000, 2048, 768, True, "bfloat16", "float8_e4m3fn block")
    assert plan_for(shape).up.rows_first
    plan = plan_for(shape, whole_blocks=False)
    assert plan.tile_rows == 96 and not plan.up.rows_first and misfit(shape, plan) is None
    few = pairs(shape, 128)
    assert plan_for(few, whole_blocks=False) == plan_for(few)


def test_the_plan_is_that_of_the_nearest_size(folders):
    from moe_jax.tuning import cache

    cache.save(folders[0], entry_of(MANY, band=7))
    assert plan_for(pairs(MANY, 20000)).up.band == 7
    assert plan_for(pairs(MANY, 10000)) == default_plan(pairs(MANY, 10000))
