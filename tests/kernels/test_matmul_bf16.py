"""The grouped matmul kernel of 16-bit floats, interpreted and lowered for CUDA; and the order in which it visits tiles."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax import _compat
from moe_jax.config import MoEConfig, RoutingConfig
from moe_jax.kernels.hopper import matmul_config, tiles
from moe_jax.ops.gather import plain_gather
from moe_jax.ops.group_tokens import default_tile_rows, group_tokens, max_tiles
from moe_jax.ops.grouped_matmul import grouped_matmul
from moe_jax.ops.quantize_rows import quantize_rows
from moe_jax.ops.route_groups import route_groups
from moe_jax.quantization import quantize
from tests.contracts import check_grouped_matmul, groups_by_token, groups_of, groups_with_sizes, rows_of
from tests.layers import normal, quick_jit
from tests.lowering import assert_lowers_to_kernels, like, mosaic_code
from tests.util import assert_discriminates, check_close


def problem(seed, groups, k, n, dtype="bfloat16", num_experts=3):
    rows = rows_of(seed, groups, k, dtype)
    return rows, normal([seed, 1], num_experts, n, k, dtype=dtype, scale=k**-0.5), groups


def run(rows, weights, groups, *, bias=None, activation=None, group_offset=0):
    config = None if activation is None else MoEConfig(1, 1, 8, 8, activation=activation)
    out = grouped_matmul(
        rows,
        weights,
        groups,
        bias=bias,
        activation=None if config is None else config.act,
        group_offset=group_offset,
        implementation="mosaic_interpret",
    )
    check_grouped_matmul(out, rows, weights, groups, bias, config, group_offset)
    return out


@pytest.mark.parametrize(
    ("tile_rows", "sizes"), [(64, (64, 64)), (128, (16, 16)), (64, (80, 144)), (160, (144, 80)), (64, (272, 528))]
)
def test_sizes(tile_rows, sizes):
    """Contracted and output sizes below, at and above those of a tile; more steps than stages."""
    run(*problem(0, groups_of(0, 9, 2, 3, tile_rows), *sizes))


@pytest.mark.parametrize(("tile_rows", "intermediate"), [(64, 16), (128, 80), (64, 144), (160, 144)])
def test_gated_activation(tile_rows, intermediate):
    run(*problem(1, groups_of(1, 9, 2, 3, tile_rows), 80, 2 * intermediate), activation="silu")


@pytest.mark.once
def test_float16():
    run(*problem(2, groups_of(2, 9, 2, 3, 64), 80, 96, "float16"), activation="silu")


@pytest.mark.parametrize("activation", ["swigluoai", "swiglustep", "gelu", "gelu_tanh_no_mul", "relu2_no_mul"])
def test_activations_with_bias(activation):
    bias = normal(3, 3, 96, dtype="bfloat16")
    run(*problem(3, groups_of(3, 9, 2, 3, 64), 80, 96), activation=activation, bias=bias)


@pytest.mark.once
@pytest.mark.parametrize(("tile_rows", "bias_dtype"), [(64, "bfloat16"), (128, "float16"), (160, "float32")])
def test_bias(tile_rows, bias_dtype):
    run(*problem(4, groups_of(4, 9, 2, 3, tile_rows), 80, 144), bias=normal(4, 3, 144, dtype=bias_dtype))


ALL_ROW_COUNTS = {64: matmul_config._FEW, 128: matmul_config._SOME, 160: matmul_config._MANY, 192: matmul_config._MOST}


@pytest.mark.once
@pytest.mark.parametrize("tile_rows", [64, 128, 160])
def test_group_sizes(tile_rows):
    """A tile is computed with as many rows as it has, rounded up: each of these numbers, and groups of several tiles."""
    counts = ALL_ROW_COUNTS[tile_rows]
    sizes = (1, *counts, *(count + 1 for count in counts[::2]), 0, 2 * tile_rows + 10)
    groups = groups_with_sizes(5, sizes, tile_rows)
    assert groups.group_sizes.tolist() == list(sizes)
    rows, weights, _ = problem(5, groups, 80, 96, num_experts=len(sizes))
    layer = MoEConfig(1, 1, 8, 8)
    config = dataclasses.replace(matmul_config.default_config(tile_rows, True, 48, 9), row_counts=counts)
    run = functools.partial(grouped_matmul, rows, weights, groups, activation=layer.act, config=config)
    check_grouped_matmul(run(implementation="mosaic_interpret"), rows, weights, groups, None, layer, 0)


@pytest.mark.once
def test_fewer_tiles_than_multiprocessors(monkeypatch):
    """Narrow tiles, so that there is work for more multiprocessors."""
    monkeypatch.setattr(_compat, "num_multiprocessors", lambda: 8)
    groups = groups_with_sizes(10, (3, 0, 20), 64)
    narrow, usual = (matmul_config.default_config(64, gated, 144, 3) for gated in (False, True))
    assert narrow != usual
    run(*problem(10, groups, 272, 144))


def pairs_of_blocks(tile_rows, gated):
    """A configuration whose neighbours fetch their rows together."""
    config = matmul_config.default_config(tile_rows, gated, 144, 3)
    return dataclasses.replace(config, cluster=2, row_counts=tuple(c for c in config.row_counts if c % 16 == 0))


@pytest.mark.parametrize(("tile_rows", "n"), [(64, 144), (160, 272), (64, 528)])
def test_neighbours_fetch_their_rows_together(tile_rows, n):
    """Odd and even numbers of blocks of columns: the neighbour of the last may have nothing to store."""
    groups = groups_with_sizes(11, (3, 0, 20, tile_rows + 1), tile_rows)
    rows, weights, _ = problem(11, groups, 80, n, num_experts=4)
    config = pairs_of_blocks(tile_rows, gated=False)
    out = grouped_matmul(rows, weights, groups, config=config, implementation="mosaic_interpret")
    check_grouped_matmul(out, rows, weights, groups, None, None, 0)


@pytest.mark.parametrize("num_tokens", [1, 16])
def test_tokens_as_rows(num_tokens):
    """Every expert visited multiplies all hidden states and keeps the rows of its own tokens."""
    logits, rule = normal(12, num_tokens, 4), RoutingConfig().rule
    _, groups = route_groups(logits, 2, rule, share_rows=True, implementation="mosaic_interpret")
    x, weights = normal(12, num_tokens, 80, dtype="bfloat16"), normal(13, 4, 96, 80, dtype="bfloat16", scale=80**-0.5)
    config = MoEConfig(1, 1, 8, 8)
    run = functools.partial(grouped_matmul, groups=groups, activation=config.act)
    for chosen in ("mosaic_interpret", "xla"):
        out = run(x, weights, tokens_as_rows=True, implementation=chosen)
        assert out.shape == (groups.num_rows, 48)
        check_grouped_matmul(out, plain_gather(x, groups.positions), weights, groups, None, config, 0)
    if num_tokens == 1:  # its gradients are those of several
        return

    def loss(x, weights, chosen):
        rows = x if chosen == "mosaic_interpret" else plain_gather(x, groups.positions)
        out = run(rows, weights, tokens_as_rows=rows is x, implementation=chosen)
        return jnp.sum(jnp.where(jnp.isin(jnp.arange(len(out)), groups.positions)[:, None], out, 0) ** 2)

    mine, right = (jax.grad(loss, argnums=(0, 1))(x, weights, chosen) for chosen in ("mosaic_interpret", "xla"))
    for one, other in zip(mine, right, strict=True):
        assert np.asarray(other, np.float32).any()
        check_close(one, other, 1e-2)


@pytest.mark.parametrize(
    ("tile_rows", "sizes", "activation", "dtype"),
    [
        (64, (192, 160), "silu", "bfloat16"),
        (160, (128, 160), "swigluoai", "float16"),
    ],
)
def test_rows_fetched_by_their_tokens(tile_rows, sizes, activation, dtype):
    """Groups of none, of a few and of several tiles; K ends within a stage; the same bits as after a gather."""
    groups = groups_by_token(15, tile_rows + 9, tile_rows)
    assert groups.group_sizes.tolist()[1] == 0 and max(groups.group_sizes.tolist()) > tile_rows
    x = normal(15, tile_rows + 9, sizes[0], dtype=dtype)
    weights = normal([15, 1], 4, sizes[1], sizes[0], dtype=dtype, scale=sizes[0] ** -0.5)
    layer, bias = MoEConfig(1, 1, 8, 8, activation=activation), normal(16, 4, sizes[1])
    config = dataclasses.replace(matmul_config.default_config(tile_rows, True, sizes[1] // 2, 9), gather=True)
    run = functools.partial(grouped_matmul, weights=weights, groups=groups, bias=bias, activation=layer.act)
    run = functools.partial(run, implementation="mosaic_interpret", config=config)
    rows = plain_gather(x, groups.positions)
    out = run(x, tokens_as_rows=True)
    check_grouped_matmul(out, rows, weights, groups, bias, layer, 0)
    if tile_rows > 64:
        return
    total = int(np.asarray(groups.group_sizes).sum())
    np.testing.assert_array_equal(out[:total], run(rows)[:total])
    with pytest.raises(AssertionError):  # rows of other tokens
        check_grouped_matmul(out, jnp.roll(rows, 1, axis=0), weights, groups, bias, layer, 0)


def test_rows_that_cannot_be_fetched_by_their_tokens():
    groups = groups_by_token(16, 9, 64)
    with pytest.raises(ValueError, match="contracted size=80 must be a multiple of 64"):
        grouped_matmul(
            jnp.ones((9, 80), jnp.bfloat16),
            jnp.ones((4, 16, 80), jnp.bfloat16),
            groups,
            tokens_as_rows=True,
            implementation="mosaic_interpret",
        )


@pytest.mark.parametrize("tile_rows", [64, 160])
def test_rows_fetched_by_their_tokens_lower_for_cuda(tile_rows):
    act, k = MoEConfig(1, 1, 8, 8).act, 2880  # K ends within a stage of 128
    config = dataclasses.replace(matmul_config.default_config(tile_rows, True, 144, 8), gather=True)

    def call(x, weights, ids):
        groups = group_tokens(ids, num_experts=8, tile_rows=tile_rows, row_tokens=True, implementation="mosaic")
        run = functools.partial(grouped_matmul, activation=act, config=config, implementation="mosaic")
        return run(x, weights, groups, tokens_as_rows=True)

    operands = like("bfloat16", 300, k), like("bfloat16", 8, 288, k), like("int32", 300, 2)
    assert_lowers_to_kernels(call, *operands)
    code = mosaic_code(call, *operands)
    assert "cp.async.cg.shared.global" in code and "fence.proxy.async" in code


def test_tokens_are_no_rows_of_other_groups():
    with pytest.raises(ValueError, match="tile_tokens"):
        grouped_matmul(jnp.ones((9, 16)), jnp.ones((3, 16, 16)), groups_of(6, 9, 2, 3, 64), tokens_as_rows=True)


@pytest.mark.parametrize(
    ("columns", "gated", "halves", "consumers"),
    [(16, True, 2, 1), (32, True, 2, 2), (16, False, 1, 1), (32, False, 2, 1)],
)
def test_narrow_tiles(columns, gated, halves, consumers):
    """Blocks of less than 64 columns, whose stages hold several pieces of K; the last past the end of K and of the columns."""
    groups = groups_with_sizes(14, (3, 0, 17, 1), 16)
    config = matmul_config.Config((8, 16), consumers, halves, tile_k=64 * 64 // columns, stages=2, columns=columns)
    config = dataclasses.replace(config, overlap=columns == 32)
    rows, weights, _ = problem(14, groups, 336, 2 * 80 if gated else 80, num_experts=4)
    layer = MoEConfig(1, 1, 8, 8) if gated else None
    act, bias = None if layer is None else layer.act, normal(15, 4, weights.shape[1])
    run = functools.partial(grouped_matmul, rows, weights, groups, bias=bias, activation=act)
    out = run(config=config, implementation="mosaic_interpret")
    check_grouped_matmul(out, rows, weights, groups, bias, layer, 0)


def test_a_single_token_takes_narrow_tiles(monkeypatch):
    """Where that keeps more multiprocessors at work: the shapes of qwen3-30b-a3b and DeepSeek-V3's ranks."""
    monkeypatch.setattr(_compat, "num_multiprocessors", lambda: 132)
    assert [matmul_config.default_config(8, True, *shape).columns for shape in ((768, 8), (2048, 1))] == [64, 16]
    assert matmul_config.default_config(64, True, 768, 128).columns == 64


@pytest.mark.once
@pytest.mark.parametrize("kwargs", [dict(only=[0]), dict(only=[2]), dict(missing=1)])
def test_experts_without_rows_are_not_read(kwargs):
    groups = groups_of(6, 9, 2, 3, 64, **kwargs)
    rows, weights, _ = problem(6, groups, 80, 80)
    unused = np.flatnonzero(np.asarray(groups.group_sizes) == 0)
    run(rows, weights.at[unused].set(jnp.nan), groups)


@pytest.mark.once
def test_group_offset():
    groups = groups_of(7, 9, 2, 2, 64)
    operands = problem(7, groups, 80, 80, num_experts=5)
    bias = normal(7, 5, 80)
    first, second = (run(*operands, bias=bias, group_offset=offset) for offset in (0, jnp.int32(3)))
    assert not np.array_equal(first, second)


@pytest.mark.once
def test_a_row_does_not_see_the_others():
    """The same bits alone in its tile and after rows of NaN."""
    weights = normal(8, 3, 96, 80, dtype="bfloat16", scale=80**-0.5)
    x, act, outputs = normal(8, 80, dtype="bfloat16"), MoEConfig(1, 1, 8, 8).act, []
    for num_tokens in (1, 9):
        ids = jnp.full((num_tokens, 1), 1, jnp.int32)
        groups = group_tokens(ids, num_experts=3, tile_rows=64, implementation="xla")
        rows = jnp.full((groups.num_rows, 80), jnp.nan, jnp.bfloat16).at[num_tokens - 1].set(x)
        out = grouped_matmul(rows, weights, groups, activation=act, implementation="mosaic_interpret")
        outputs.append(np.asarray(out[num_tokens - 1], np.float32))
    assert np.abs(outputs[0]).max() > 0.1
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize(("n_tiles", "band"), [(1, 16), (3, 16), (5, 1), (12, 7)])
def test_every_tile_is_visited_once(n_tiles, band):
    visit = quick_jit(lambda m_tiles: tiles.visit(jnp.arange(40 * n_tiles), m_tiles, n_tiles, band))
    for m_tiles in range(1, 41):
        m, n = (np.asarray(axis)[: m_tiles * n_tiles].tolist() for axis in visit(jnp.int32(m_tiles)))
        assert set(zip(m, n, strict=True)) == {(i, j) for i in range(m_tiles) for j in range(n_tiles)}


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(1, 5), st.integers(1, 9))
def test_tiles_of_a_group_are_walked_together(tiles_of, n_tiles, band):
    """Group after group, in bands of its own tiles alone, each column by column."""
    ends = np.cumsum(tiles_of)
    spans = np.zeros((12 * 20, 2), np.int32)  # of one shape, and as many numbers of tiles: nothing is compiled anew
    spans[: ends[-1]] = np.repeat(np.stack([ends - tiles_of, ends], axis=1), tiles_of, axis=0)
    index, m_tiles = jnp.arange(12 * 20 * 5, dtype=jnp.int32), jnp.int32(ends[-1])
    walk = tiles.visit(index, m_tiles, n_tiles, band, jnp.asarray(spans))
    m, n = (np.asarray(axis)[: ends[-1] * n_tiles].tolist() for axis in walk)
    right = [
        (tile, column)
        for first, end in zip(ends - tiles_of, ends, strict=True)
        for start in range(first, end, band)
        for column in range(n_tiles)
        for tile in range(start, min(start + band, end))
    ]
    assert list(zip(m, n, strict=True)) == right


@pytest.mark.parametrize("name", ["rows first", "fp8", "bf16", "few rows, fp8", "few rows, bf16"])
def test_kernels_walk_the_tiles_of_a_group_together(name, monkeypatch):
    """They ask for it with the schedule; it changes the order of their tiles and nothing else. Few rows need no such order."""
    calls, visit = [], tiles.visit
    monkeypatch.setattr(tiles, "visit", lambda *args: calls.append(args[4]) or visit(*args))
    few, name = name.startswith("few"), name.removeprefix("few rows, ")
    quantization = None if name == "bf16" else "fp8_block" if name == "rows first" else "fp8_channel"
    config = MoEConfig(3, 1, 128, 128, quantization=quantization)
    ids = jnp.asarray(np.repeat([0, 2], [150, 20])[:, None], jnp.int32)
    groups = group_tokens(ids, num_experts=3, tile_rows=64 if few else 128, implementation="xla")
    weights = normal(1, 3, 128, 128, dtype="bfloat16", scale=128**-0.5)
    rows = normal(2, groups.num_rows, 128, dtype="bfloat16")
    if quantization:
        weights = quantize(weights, config.quantization.weights)
        rows = quantize_rows(rows, config.quantization.activations, groups=groups, implementation="xla")
    outputs = [
        np.asarray(grouped_matmul(rows, weights, schedule, implementation="mosaic_interpret"), np.float32)
        for schedule in (groups, dataclasses.replace(groups, tile_spans=None))
    ]
    assert {spans is None for spans in calls} == ({True} if few else {True, False})
    np.testing.assert_array_equal(*outputs)
    right = np.asarray(grouped_matmul(rows, weights, groups, implementation="xla"), np.float32)
    check_close(outputs[0], right, 4e-3)
    assert_discriminates(lambda out: check_close(out, right, 4e-3), outputs[0])


@pytest.mark.parametrize("workers", [1, 3, 132])
def test_workers_share_all_items(workers):
    for total in (0, 1, 131, 132, 1000):
        shares = [int(tiles.share(jnp.int32(total), jnp.int32(worker), workers)) for worker in range(workers)]
        assert sum(shares) == total and max(shares) - min(shares) <= 1


LOWERED = {
    "qwen3 down": (4096, 8, 128, 768, 2048, None, False, "bfloat16"),
    "gpt-oss down": (1000, 4, 32, 2880, 2880, None, True, "float16"),
    "no multiple of 64": (128, 4, 16, 1040, 1056, "gelu_tanh", False, "bfloat16"),
    "one token": (1, 1, 8, 528, 1040, "relu2_no_mul", True, "bfloat16"),
}


@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_cuda(name):
    num_tokens, top_k, num_experts, k, n, activation, with_bias, dtype = LOWERED[name]
    act = None if activation is None else MoEConfig(1, 1, 8, 8, activation=activation).act

    def call(rows, weights, ids, bias):
        groups = group_tokens(ids, num_experts=num_experts, implementation="mosaic")
        return grouped_matmul(rows, weights, groups, bias=bias, activation=act, implementation="mosaic")

    pairs, bias = like("int32", num_tokens, top_k), like(dtype, num_experts, n) if with_bias else None
    tile_rows = default_tile_rows(num_tokens * top_k, num_experts, "mosaic")
    rows = like(dtype, max_tiles(num_tokens * top_k, num_experts, tile_rows) * tile_rows, k)
    assert_lowers_to_kernels(call, rows, like(dtype, num_experts, n, k), pairs, bias)


@pytest.mark.parametrize(("tile_rows", "activation"), [(64, "silu"), (64, None), (192, "silu"), (192, None)])
def test_pairs_of_blocks_lower_for_cuda(tile_rows, activation):
    act = None if activation is None else MoEConfig(1, 1, 8, 8, activation=activation).act
    config = pairs_of_blocks(tile_rows, act is not None)

    def call(rows, weights, ids):
        groups = group_tokens(ids, num_experts=8, tile_rows=tile_rows, implementation="mosaic")
        return grouped_matmul(rows, weights, groups, activation=act, config=config, implementation="mosaic")

    rows = like("bfloat16", max_tiles(2000, 8, tile_rows) * tile_rows, 2048)
    assert_lowers_to_kernels(call, rows, like("bfloat16", 8, 1536, 2048), like("int32", 1000, 2))
