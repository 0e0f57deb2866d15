"""What grouping promises: a counting sort in plain Python, and the invariants that follow from the contract."""

import numpy as np

from moe_jax.ops.group_tokens import Groups, max_tiles


def share_of_tile(size: int, tile_rows: int) -> int:
    """Rows that each tile of a group of ``size`` takes, the last one less: the same for all, rounded up to a multiple of 8.

    >>> [share_of_tile(size, 64) for size in (0, 5, 64, 65, 200)]
    [64, 8, 64, 40, 56]
    """
    tiles = -(-size // tile_rows)
    return tile_rows if tiles == 0 else min(-(-size // tiles // 8) * 8, tile_rows)


def python_groups(ids, num_experts, num_local, expert_map, tile_rows):
    """The fields of `Groups`, pair by pair. Rows without a token are -1 here."""
    ids = np.asarray(ids)
    members = [[] for _ in range(num_local)]
    for token, row in enumerate(ids.tolist()):
        for slot, expert in enumerate(row):
            if not 0 <= expert < num_experts:
                continue
            local = expert if expert_map is None else int(expert_map[expert])
            if 0 <= local < num_local:
                members[local].append((token, slot))
    tiles = max_tiles(ids.size, num_local, tile_rows)
    positions = np.full(ids.shape, -1, np.int32)
    row_token = np.full(tiles * tile_rows, -1, np.int32)
    tile_group = np.full(tiles, -1, np.int32)
    tile_sizes = np.zeros(tiles, np.int32)
    tile = 0
    for local, pairs in enumerate(members):
        share = share_of_tile(len(pairs), tile_rows)
        for start in range(0, len(pairs), share):
            here = pairs[start : start + share]
            tile_group[tile], tile_sizes[tile] = local, len(here)
            for i, (token, slot) in enumerate(here):
                positions[token, slot] = tile * tile_rows + i
                row_token[tile * tile_rows + i] = token
            tile += 1
    return {
        "positions": positions,
        "row_token": row_token,
        "tile_group": tile_group,
        "tile_sizes": tile_sizes,
        "group_sizes": np.array([len(pairs) for pairs in members], np.int32),
        "num_tiles": np.array([tile], np.int32),
    }


def check_groups(groups: Groups, ids, num_experts, num_local=None, expert_map=None) -> None:
    """`groups` are those of the counting sort; what the contract leaves undefined (tokens of padding rows) may be anything."""
    num_local = num_experts if num_local is None else num_local
    expected = python_groups(ids, num_experts, num_local, expert_map, groups.tile_rows)
    occupied = expected["row_token"] >= 0
    for name, array in expected.items():
        actual = np.asarray(getattr(groups, name))
        assert actual.dtype == np.int32 and actual.shape == array.shape, (name, actual.dtype, actual.shape, array.shape)
        if name == "row_token":
            actual, array = actual[occupied], array[occupied]
        np.testing.assert_array_equal(actual, array, err_msg=name)


def check_shared_groups(groups: Groups, ids, num_experts, num_local=None, expert_map=None) -> None:
    """`groups` give every local expert visited a tile that holds all tokens, in the order of the experts."""
    num_local = num_experts if num_local is None else num_local
    ids, tile_rows = np.asarray(ids), groups.tile_rows
    expected = python_groups(ids, num_experts, num_local, expert_map, tile_rows)
    visited = np.flatnonzero(expected["group_sizes"])
    num_tiles, tile_group = int(groups.num_tiles[0]), np.asarray(groups.tile_group)
    np.testing.assert_array_equal(groups.group_sizes, expected["group_sizes"])
    np.testing.assert_array_equal(tile_group[:num_tiles], visited)
    assert (tile_group[num_tiles:] == -1).all()
    np.testing.assert_array_equal(groups.tile_sizes, np.where(tile_group < 0, 0, ids.shape[0]))
    positions, placed = np.asarray(groups.positions), expected["positions"] >= 0
    np.testing.assert_array_equal(positions >= 0, placed)
    tokens = np.broadcast_to(np.arange(ids.shape[0])[:, None], ids.shape)
    np.testing.assert_array_equal(positions[placed] % tile_rows, tokens[placed])
    groups_of_pairs = expected["tile_group"][expected["positions"][placed] // tile_rows]
    np.testing.assert_array_equal(tile_group[positions[placed] // tile_rows], groups_of_pairs)
    np.testing.assert_array_equal(np.asarray(groups.row_token)[positions[placed]], tokens[placed])


def check_invariants(groups: Groups, ids) -> None:
    """What holds for any grouping: a row a pair, groups from tile to tile, tokens in order. Independent of the sort above."""
    positions, row_token = np.asarray(groups.positions), np.asarray(groups.row_token)
    tokens = np.repeat(np.arange(positions.shape[0]), positions.shape[1])
    rows = positions.reshape(-1)
    placed = rows >= 0
    assert len(set(rows[placed].tolist())) == placed.sum() == np.asarray(groups.group_sizes).sum()
    np.testing.assert_array_equal(row_token[rows[placed]], tokens[placed])

    num_tiles = int(groups.num_tiles[0])
    tile_group, tile_sizes = np.asarray(groups.tile_group), np.asarray(groups.tile_sizes)
    assert (tile_group[:num_tiles] >= 0).all() and (tile_group[num_tiles:] == -1).all()
    assert (np.diff(tile_group[:num_tiles]) >= 0).all()
    assert (tile_sizes[:num_tiles] > 0).all() and (tile_sizes[num_tiles:] == 0).all()
    assert len(row_token) == len(tile_group) * groups.tile_rows
    for group, size in enumerate(np.asarray(groups.group_sizes).tolist()):
        mine = np.flatnonzero(tile_group == group)
        assert len(mine) == -(-size // groups.tile_rows)
        members = [tile * groups.tile_rows + row for tile in mine for row in range(tile_sizes[tile])]
        assert len(members) == size and tile_sizes.max(initial=0) <= groups.tile_rows
        assert set(members) <= set(rows[placed].tolist())
        assert (np.diff(row_token[members]) >= 0).all(), "tokens of a group are out of order"
        experts = {int(e) for e in np.asarray(ids).reshape(-1)[np.isin(rows, members)]}
        assert len(experts) <= 1, f"group {group} mixes experts {experts}"


def occupied_rows(groups: Groups):
    """Indices of the rows that hold a token."""
    positions = np.asarray(groups.positions).reshape(-1)
    return np.sort(positions[positions >= 0])


def group_of_rows(groups: Groups):
    """The group of every row, -1 for rows of tiles past the last."""
    return np.repeat(np.asarray(groups.tile_group), groups.tile_rows)
