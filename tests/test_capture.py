"""Captured routing: whose rows they are in every form of parallelism, and a buffer that an error leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from moe_jax.capture import RoutedExperts, RoutedExpertsCapturer, TokenShares
from moe_jax.config import MoEConfig
from moe_jax.parallel import ParallelConfig
from tests.util import without_type_checks

unchecked = without_type_checks("moe_jax.capture")

LAYERS, K = 3, 2


def capturer_of(num_experts=64, max_tokens=8, **options):
    config = MoEConfig(num_experts=num_experts, top_k=K, hidden_size=16, intermediate_size=16)
    return RoutedExpertsCapturer(max_tokens, config, LAYERS, **options)


def routed(n, first=1):
    """Ids that differ everywhere and are never zero."""
    return jnp.arange(first, first + n * K, dtype=jnp.int32).reshape(n, K)


def check_buffer(capturer, layer, rows):
    """The rows are those of the layer, and there is nothing else."""
    expected = np.zeros(capturer.get_device_buffer().ids.shape, np.int32)
    expected[: len(rows), layer] = rows
    np.testing.assert_array_equal(capturer.get_device_buffer().ids, expected)


def test_without_data_parallelism_all_rows():
    capturer = capturer_of()
    capturer.capture(1, routed(5))
    check_buffer(capturer, 1, routed(5))


@pytest.mark.parametrize(
    ("counts", "dp_rank", "n", "rows"),
    [
        ([2, 3], 0, 5, slice(0, 2)),
        ([2, 3], 1, 5, slice(2, 5)),
        ([2, 3], 1, 3, slice(0, 3)),
        ([2, 3], 0, 2, slice(0, 2)),
        ([0, 3], 1, 3, slice(0, 3)),
        ([0, 3], 0, 3, slice(0, 0)),
        ([0, 3], 0, 0, slice(0, 0)),
        ([3, 0, 1], 2, 4, slice(3, 4)),
    ],
)
def test_the_rows_of_a_data_parallel_rank(counts, dp_rank, n, rows):
    capturer = capturer_of(dp_rank=dp_rank)
    capturer.num_tokens_across_dp = counts
    capturer.capture(2, routed(n))
    check_buffer(capturer, 2, routed(n)[rows])


@pytest.mark.parametrize(
    ("counts", "sizes", "dp_rank", "rows"),
    [([4, 2], [2, 2, 1, 1], 1, slice(4, 6)), ([3, 2], [2, 2, 1, 1], 0, slice(0, 3)), ([3, 2], [2, 2, 1, 1], 1, slice(4, 6))],
)  # fmt: skip
def test_gathered_shards_of_sequence_parallelism(counts, sizes, dp_rank, rows):
    """The last shard of a rank may hold padding, which is not its tokens'."""
    capturer = capturer_of(dp_rank=dp_rank, parallel=ParallelConfig(2, 1, 2, True))
    capturer.num_tokens_across_dp, capturer.shard_sizes = counts, sizes
    capturer.capture(0, routed(6))
    check_buffer(capturer, 0, routed(6)[rows])


def test_one_shard_of_sequence_parallelism_is_gathered():
    capturer = capturer_of(
        parallel=ParallelConfig(2, 1, 2, True), all_gather=lambda ids: jnp.concatenate([ids, routed(2, 31)])
    )
    capturer.num_tokens_across_dp = [3, 5]
    capturer.capture(0, routed(2))
    check_buffer(capturer, 0, [[1, 2], [3, 4], [31, 32]])


def test_the_order_of_the_cases():
    """Where sizes coincide the first case that fits counts: all tokens, then the rank's own, then its share of them."""
    never = lambda ids: pytest.fail("gathered what is complete")  # noqa: E731
    for counts, n, rows in (([0, 2], 2, slice(0, 2)), ([1, 1], 1, slice(0, 1)), ([1, 1], 2, slice(1, 2))):
        capturer = capturer_of(dp_rank=1, parallel=ParallelConfig(2, 1, 2, True), all_gather=never)
        capturer.num_tokens_across_dp = counts
        capturer.capture(0, routed(n))
        check_buffer(capturer, 0, routed(n)[rows])


@pytest.mark.parametrize(
    ("counts", "ids", "message"),
    [
        ([2, 3], routed(1), r"shape \(1, 2\) .* all 5 tokens of num_tokens_across_dp=\[2, 3\], nor the 3 of dp_rank=1"),
        ([2, 3], routed(4), r"shape \(4, 2\)"),
        ([2, 9], routed(9), r"rows \[0, 9\) do not fit the buffer of 8 tokens"),
        (None, routed(9), r"shape \(9, 2\)"),
        (None, jnp.ones((3, 1), jnp.int32), r"shape \(3, 1\) .* k=2"),
    ],
    ids=str,
)
def test_another_shape_leaves_the_buffer_alone(counts, ids, message):
    capturer = capturer_of(dp_rank=1)
    capturer.capture(1, routed(4))
    capturer.num_tokens_across_dp = counts
    with pytest.raises(AssertionError, match=message):
        capturer.capture(1, ids)
    check_buffer(capturer, 1, routed(4))


@pytest.mark.parametrize("layer", [-1, LAYERS])
def test_no_such_layer(layer):
    capturer = capturer_of()
    with pytest.raises(IndexError, match=rf"layer_id={layer} must lie in \[0, 3\)"):
        capturer.capture(layer, routed(2))
    check_buffer(capturer, 0, routed(0))


def test_refusals():
    capturer = capturer_of(parallel=ParallelConfig(2, 1, 2, True))
    capturer.num_tokens_across_dp = [4, 1]
    with pytest.raises(ValueError, match="nothing says how to gather"):
        capturer.capture(0, routed(2))
    capturer.shard_sizes = [2, 2, 2]
    with pytest.raises(ValueError, match="as many for each of the 2 data-parallel ranks"):
        capturer.capture(0, routed(6))
    with pytest.raises(ValueError, match=r"dp_rank=5 must lie in \[0, 2\)"):
        TokenShares((1, 2), dp_rank=5).select(routed(3))
    with pytest.raises(ValueError, match="topk_weights is None"):
        capturer_of(keep_weights=True).capture(0, routed(2))
    with pytest.raises(AssertionError, match=r"topk_weights has shape \(3, 2\)"):
        unchecked.RoutedExperts.empty(4, LAYERS, K, keep_weights=True).capture(0, routed(2), jnp.ones((3, 2)))


def test_weights_go_with_their_ids():
    capturer = capturer_of(keep_weights=True, dp_rank=1)
    capturer.num_tokens_across_dp = [2, 3]
    weights = routed(5).astype(jnp.float32) / 8
    capturer.capture(1, routed(5), weights)
    check_buffer(capturer, 1, routed(5)[2:])
    np.testing.assert_array_equal(capturer.get_device_buffer().weights[:3, 1], weights[2:])
    assert float(jnp.sum(capturer.get_device_buffer().weights)) == float(jnp.sum(weights[2:]))
    assert capturer_of().get_device_buffer().weights is None


def test_steps():
    """A buffer that was handed out is not changed by the next step."""
    capturer = capturer_of()
    capturer.capture(0, routed(3))
    before = capturer.get_device_buffer()
    capturer.clear_buffer()
    check_buffer(capturer, 0, routed(0))
    capturer.capture(0, routed(2, first=21))
    np.testing.assert_array_equal(before.ids[:3, 0], routed(3))
    check_buffer(capturer, 0, routed(2, first=21))


@pytest.mark.parametrize(("num_experts", "dtype"), [(64, np.uint8), (256, np.uint8), (257, np.uint16)])
def test_snapshots_are_small(num_experts, dtype):
    capturer = capturer_of(num_experts)
    ids = jnp.array([[0, num_experts - 1], [3, 2]])
    capturer.capture(1, ids)
    taken = capturer.snapshot(1)
    assert (taken.shape, taken.dtype) == ((1, LAYERS, K), dtype)
    assert taken[0, 1].tolist() == [0, num_experts - 1]
    with pytest.raises(ValueError, match=r"num_tokens=9 must lie in \[0, 8\]"):
        capturer.snapshot(9)


def test_snapshots_of_no_expert():
    capturer = capturer_of(255)
    capturer.capture(0, jnp.array([[254, -1]]))
    assert capturer.snapshot(1)[0, 0].tolist() == [254, 255]
    capturer = capturer_of(256)
    capturer.capture(0, jnp.array([[254, -1]]))
    with pytest.raises(ValueError, match="uint8 cannot tell an id of -1 from expert 255"):
        capturer.snapshot(1)


# --- carried through a jit


def test_layers_of_a_scan():
    """Layer numbers are traced; those that do not exist capture nothing, negative ones too."""
    ids = jnp.stack([routed(4, first) for first in (1, 20, 40)])

    def layer(buffer, step):
        number, ids = step
        return buffer.capture(number, ids, offset=1), None

    run = jax.jit(lambda buffer, numbers: lax.scan(layer, buffer, (numbers, ids))[0])
    buffer = run(RoutedExperts.empty(6, LAYERS, K), jnp.array([2, -1, LAYERS]))
    expected = np.zeros((6, LAYERS, K), np.int32)
    expected[1:5, 2] = ids[0]
    np.testing.assert_array_equal(buffer.ids, expected)


@pytest.mark.parametrize("case", ["all", "own", "share"])
def test_under_shard_map(case):
    """Each device keeps the rows of its data rank, whether it routed all tokens, its own, or a share of them."""
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), axis_types=(AxisType.Auto,) * 2)
    ids = routed(8)  # 4 tokens a data rank

    def step(part):
        shares = TokenShares((4, 4), lax.axis_index("dp"), tp_size=2, tp_axis="tp")
        buffer = RoutedExperts.empty(5, LAYERS, K).capture(1, part, shares=shares)
        return buffer.ids[None, None]

    spec = {"all": P(), "own": P("dp"), "share": P(("dp", "tp"))}[case]
    run = jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=P("dp", "tp"), check_vma=False)
    buffers = np.asarray(jax.jit(run)(ids))
    for dp, tp in np.ndindex(2, 2):
        np.testing.assert_array_equal(buffers[dp, tp, :4, 1], ids[4 * dp : 4 * dp + 4])
        assert buffers[dp, tp].sum() == np.sum(ids[4 * dp : 4 * dp + 4])


def test_ranks_of_a_mesh_have_equal_shards():
    with pytest.raises(ValueError, match=r"dp_rank is traced, but num_tokens_across_dp=\[2, 3\] differ"):
        jax.jit(lambda rank: TokenShares((2, 3), rank).select(routed(5)))(1)
