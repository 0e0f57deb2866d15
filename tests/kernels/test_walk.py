"""The order in which multiprocessors visit tiles: each tile once, crowded groups apart where that is worth it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels.hopper import tiles, walk
from tests.layers import quick_jit

pytestmark = pytest.mark.once


@pytest.mark.parametrize(("n_tiles", "band"), [(1, 16), (3, 16), (5, 1), (12, 7)])
def test_every_tile_is_visited_once(n_tiles, band):
    visit = quick_jit(lambda m_tiles: tiles.visit(jnp.arange(40 * n_tiles), m_tiles, n_tiles, band))
    for m_tiles in range(1, 41):
        m, n = (np.asarray(axis)[: m_tiles * n_tiles].tolist() for axis in visit(jnp.int32(m_tiles)))
        assert set(zip(m, n, strict=True)) == {(i, j) for i in range(m_tiles) for j in range(n_tiles)}


@pytest.mark.parametrize("workers", [1, 3, 132])
def test_workers_share_all_items(workers):
    for total in (0, 1, 131, 132, 1000):
        shares = [int(tiles.share(jnp.int32(total), jnp.int32(worker), workers)) for worker in range(workers)]
        assert sum(shares) == total and max(shares) - min(shares) <= 1


def walks(workers, m_tiles, n_tiles, band, order=None, crowded=None):
    """For each worker its tiles, in order: [(m, n), ...]."""
    most = -(-m_tiles * n_tiles // max(1, workers - 1)) + m_tiles * n_tiles

    @jax.jit
    @jax.vmap
    def all_of(worker):
        mine = walk.Walk(worker, workers, jnp.int32(m_tiles), n_tiles, band, order, crowded)
        return mine.count, jax.vmap(mine.tile)(jnp.arange(most, dtype=jnp.int32))

    counts, (m, n) = (np.asarray(a) if not isinstance(a, tuple) else a for a in all_of(jnp.arange(workers)))
    m, n = np.asarray(m), np.asarray(n)
    return [list(zip(m[w, :c].tolist(), n[w, :c].tolist(), strict=True)) for w, c in enumerate(counts)]


def operands(sizes, tile_rows):
    """Order of the tiles, how crowded they are, and their number, for groups of these sizes."""
    number = [-(-size // tile_rows) for size in sizes]
    several = np.repeat([n > 1 for n in number], number)
    order = jnp.asarray(np.argsort(~several, kind="stable"), jnp.int32)
    rows = sum(size for size, n in zip(sizes, number, strict=True) if n > 1)
    return order, jnp.asarray([several.sum(), rows, sum(sizes) - rows], jnp.int32), len(several)


@pytest.mark.parametrize("band", [1, 8])
@pytest.mark.parametrize("workers", [2, 5, 132])
@pytest.mark.parametrize(
    "sizes", [[64] * 31 + [2048], [2048, 5], [0, 0, 700, 160, 3, 0, 1], [100] * 9, [300] * 4, [161] * 3 + [8] * 20]
)
def test_each_tile_once(sizes, workers, band):
    order, crowded, m_tiles = operands(sizes, 160)
    for apart in ((None, None), (order, crowded)):
        for n_tiles in (1, 7):
            found = walks(workers, m_tiles, n_tiles, band, *apart)
            assert sorted(sum(found, [])) == [(m, n) for m in range(m_tiles) for n in range(n_tiles)]
            counts = [len(tiles) for tiles in found]
            if apart[0] is None:
                assert max(counts) - min(counts) <= 1


def test_no_tiles():
    order, crowded, _ = operands([1], 8)
    assert sum(walks(3, 0, 4, 8, order, crowded * 0), []) == []


def test_crowded_groups_have_workers_of_their_own():
    """One expert with half of 4096 rows, 31 with the others: 13 tiles are bound by the tensor cores, 31 by memory."""
    order, crowded, m_tiles = operands([66] * 20 + [2048] + [66] * 11, 160)
    found = walks(132, m_tiles, 16, 8, order, crowded)
    of_several = [[m in range(20, 33) for m, _ in mine] for mine in found]
    apart = [several for several in of_several if several[0]]
    assert 40 <= len(apart) <= 70
    for several in apart:  # first those, then others
        assert several == sorted(several, reverse=True)
    assert all(not any(several) for several in of_several if not several[0])
    rows = np.array([sum(2048 / 13 if m in range(20, 33) else 66 + 16 for m, _ in mine) for mine in found])
    assert rows.max() <= 1.2 * rows.mean()


@pytest.mark.parametrize(
    "sizes",
    [[256] * 16, [128] * 30 + [161] * 2, [16384] * 8 + [64] * 24],
    ids=["even", "nearly even", "bound by compute"],
)
def test_where_it_is_not_worth_it_all_take_turns(sizes):
    order, crowded, m_tiles = operands(sizes, 160)
    found = walks(132, m_tiles, 16, 8, order, crowded)
    assert max(map(len, found)) - min(map(len, found)) <= 1
    nth = [mine[0] for mine in found if mine]
    expected = [tiles.visit(jnp.int32(i), jnp.int32(m_tiles), 16, 8) for i in range(len(nth))]
    assert nth == [(int(order[m]), int(n)) for m, n in expected]
