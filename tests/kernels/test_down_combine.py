"""The down-projection of one token with its sum, interpreted: the bits of the two kernels that it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import _compat
from moe_jax.kernels.hopper import combine, matmul_bf16
from moe_jax.kernels.hopper import down_combine as kernel
from moe_jax.kernels.hopper.matmul_config import default_config
from moe_jax.ops.down_combine import down_combine
from moe_jax.ops.route_groups import route_groups
from tests.layers import normal
from tests.lowering import like
from tests.oracles import config_of, logits_of
from tests.util import assert_discriminates, check_close


def problem(seed, slots, inner, hidden, experts=8, dtype="bfloat16", bias=None, expert_map=None, num_local=None):
    """Operands of `down_combine` for a token that `route_groups` has routed; rows that no expert has are NaN."""
    local = experts if num_local is None else num_local
    topk, groups = route_groups(
        jnp.asarray(logits_of(seed, 1, experts)),
        slots,
        config_of("renormalize", slots, experts).routing.rule,
        expert_map=None if expert_map is None else jnp.asarray(expert_map, jnp.int32),
        num_local_experts=num_local,
        share_rows=True,
        implementation="mosaic_interpret",
    )
    weights = normal([seed, 1], local, hidden, inner, dtype=dtype, scale=inner**-0.5)
    rows = jnp.where(
        (jnp.arange(slots) < groups.num_tiles)[:, None], normal([seed, 2], slots, inner, dtype=dtype), jnp.nan
    )
    bias = None if bias is None else normal([seed, 3], local, hidden, dtype=bias)
    return rows, weights, groups, topk.weights, bias


def apart(rows, weights, groups, scales, bias):
    """The two kernels."""
    schedule = groups.tile_group, groups.tile_starts, groups.tile_sizes, groups.num_tiles
    interpret = _compat.interpret_params()
    config = default_config(groups.tile_rows, False, weights.shape[1], len(rows))
    made = matmul_bf16.grouped_matmul(rows, weights, *schedule, bias, None, config=config, interpret=interpret)
    return combine.combine(made, groups.positions, scales, interpret=interpret)


def together(rows, weights, groups, scales, bias):
    schedule = groups.tile_group, groups.num_tiles, groups.positions
    return kernel.down_combine(rows, weights, *schedule, scales, bias, interpret=_compat.interpret_params())


def plain(rows, weights, groups, scales, bias):
    """In float32, slot by slot."""
    total = np.zeros(weights.shape[1], np.float32)
    rows, weights = np.asarray(rows, np.float32), np.asarray(weights, np.float32)
    for slot, row in enumerate(np.asarray(groups.positions)[0]):
        if row >= 0:
            expert = int(groups.tile_group[row])
            made = weights[expert] @ rows[row] + (0 if bias is None else np.asarray(bias[expert], np.float32))
            total += made * (1 if scales is None else float(scales[0, slot]))
    return total[None]


def check(operands):
    out, expected = together(*operands), plain(*operands)
    np.testing.assert_array_equal(np.asarray(out).view(np.int16), np.asarray(apart(*operands)).view(np.int16))
    check_close(out, expected, 6e-3)
    return out, expected


@pytest.mark.parametrize(
    ("columns", "hidden", "inner"), [(64, 256, 192), (32, 144, 320), (16, 80, 640)], ids=["64", "32", "16"]
)
def test_bits_are_those_of_two_kernels(monkeypatch, columns, hidden, inner):
    """Outputs of whole tiles and not, K of whole stages and not, more turns than stages."""
    monkeypatch.setattr(kernel, "columns_for", lambda *args: columns)
    operands = problem(columns, 3, inner, hidden, bias="float32" if columns == 32 else None)
    out, expected = check(operands)
    assert_discriminates(lambda y: check_close(y, expected.T, 6e-3), out.T)
    without = (*operands[:3], jnp.zeros_like(operands[3]), operands[4])
    assert not np.asarray(together(*without)).any()


@pytest.mark.once
def test_float16_a_plain_sum_and_many_slots():
    rows, weights, groups, _, bias = problem(1, 10, 64, 128, 16, dtype="float16", bias="bfloat16")
    check((rows, weights, groups, None, bias))


@pytest.mark.once
@pytest.mark.parametrize("expert_map", [[1, -1, 0, 1, 2, -1, 2, 1], [-1] * 8], ids=["some", "none"])
def test_experts_that_live_elsewhere_or_share_a_place(expert_map):
    operands = problem(2, 5, 64, 128, expert_map=expert_map, num_local=3, bias="bfloat16")
    check(operands)
    if max(expert_map) < 0:
        assert not np.asarray(together(*operands)).any()


@pytest.mark.once
def test_the_operation_takes_it_where_it_spreads_as_well():
    rows, weights, groups, scales, _ = problem(3, 4, 64, 256)
    out = down_combine(rows, weights, groups, scales, implementation="mosaic_interpret")
    check_close(out, plain(rows, weights, groups, scales, None), 6e-3)

    def loss(implementation):
        def of(rows, weights, scales):
            out = down_combine(rows, weights, groups, scales, implementation=implementation)
            return jnp.sum(out.astype(jnp.float32) ** 2)

        return jax.grad(of, argnums=(0, 1, 2))(rows, weights, scales)

    for mine, right in zip(loss("mosaic_interpret"), loss("xla"), strict=True):
        assert np.any(np.asarray(right))
        check_close(mine, right, 1.5e-2)


def test_when_it_spreads_as_well():
    #         H     k   columns
    for hidden, slots, expected in (
        (2048, 8, 16),
        (4096, 8, 32),
        (4096, 2, 32),
        (7168, 1, 64),
        (2880, 4, None),
        (512, 8, None),
    ):
        assert kernel.columns_for(hidden, slots, 132) == expected


def test_what_it_does_not_run():
    weights, rows = like("bfloat16", 8, 2048, 768), like("bfloat16", 8, 768)
    assert kernel.supports(rows, weights, 1, 8) is None
    assert "2 with 8" in kernel.supports(rows, weights, 2, 8)
    assert "17" in kernel.supports(rows, weights, 1, 17)
    assert "size=48" in kernel.supports(like("bfloat16", 8, 48), like("bfloat16", 8, 2048, 48), 1, 8)
