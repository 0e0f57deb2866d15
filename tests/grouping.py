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


def python_groups(ids, num_experts, num_local, expert_map, tile_rows, row_multiple=1):
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
    tile_group = np.full(tiles, -1, np.int32)
    tile_starts, tile_sizes = np.zeros(tiles, np.int32), np.zeros(tiles, np.int32)
    tile_spans = np.zeros((tiles, 2), np.int32)
    tile = row = 0
    for local, pairs in enumerate(members):
        share = share_of_tile(len(pairs), tile_rows)
        row += -row % row_multiple
        first = tile
        for start in range(0, len(pairs), share):
            here = pairs[start : start + share]
            tile_group[tile], tile_starts[tile], tile_sizes[tile] = local, row, len(here)
            for token, slot in here:
                positions[token, slot] = row
                row += 1
            tile += 1
        tile_spans[first:tile] = first, tile
    return {
        "positions": positions,
        "tile_group": tile_group,
        "tile_starts": tile_starts,
        "tile_sizes": tile_sizes,
        "group_sizes": np.array([len(pairs) for pairs in members], np.int32),
        "num_tiles": np.array([tile], np.int32),
        "tile_spans": tile_spans,
    }


def check_groups(groups: Groups, ids, num_experts, num_local=None, expert_map=None) -> None:
    """`groups` are those of the counting sort."""
    num_local = num_experts if num_local is None else num_local
    sort = python_groups(ids, num_experts, num_local, expert_map, groups.tile_rows, groups.row_multiple)
    assert groups.num_rows >= sort["positions"].max(initial=-1) + 1
    for name, array in sort.items():
        actual = np.asarray(getattr(groups, name))
        assert actual.dtype == np.int32 and actual.shape == array.shape, (name, actual.dtype, actual.shape, array.shape)
        np.testing.assert_array_equal(actual, array, err_msg=name)
    if groups.row_tokens is not None:
        expected, total = token_of_rows(groups), int(np.asarray(groups.group_sizes).sum())
        np.testing.assert_array_equal(np.asarray(groups.row_tokens)[:total], expected[:total], err_msg="row_tokens")
        assert groups.row_tokens.shape[0] >= groups.num_rows + groups.tile_rows


def check_shared_groups(groups: Groups, ids, num_experts, num_local=None, expert_map=None) -> None:
    """`groups` give every local expert visited a tile with a row for each token that chose it, in their order."""
    num_local = num_experts if num_local is None else num_local
    ids = np.asarray(ids)
    local = np.where((ids >= 0) & (ids < num_experts), ids, -1)
    if expert_map is not None:
        local = np.where(local >= 0, np.asarray(expert_map)[local], -1)
    tile_group = np.asarray(groups.tile_group)
    positions = np.full(ids.shape, -1)
    sizes, row, tile = np.zeros(num_local, int), 0, 0
    for expert in range(num_local):
        tokens = np.flatnonzero((local == expert).any(axis=1))
        sizes[expert] = len(tokens)
        if not len(tokens):
            continue
        assert tile_group[tile] == expert
        assert (groups.tile_starts[tile], groups.tile_sizes[tile]) == (row, len(tokens))
        assert int(groups.tile_tokens[tile]) == sum(1 << int(token) for token in tokens)
        for nth, token in enumerate(tokens):
            positions[token, local[token] == expert] = row + nth
        row, tile = row + len(tokens), tile + 1
    np.testing.assert_array_equal(groups.positions, positions)
    np.testing.assert_array_equal(groups.group_sizes, sizes)
    assert groups.num_tiles.tolist() == [tile] and (tile_group[tile:] == -1).all()
    assert not any(np.asarray(a)[tile:].any() for a in (groups.tile_starts, groups.tile_sizes, groups.tile_tokens))


def check_invariants(groups: Groups, ids) -> None:
    """What holds for any grouping: a row a pair, groups from tile to tile, tokens in order. Independent of the sort above."""
    positions = np.asarray(groups.positions)
    rows = positions.reshape(-1)
    sizes = np.asarray(groups.group_sizes)
    wide = -(-sizes // groups.row_multiple) * groups.row_multiple
    firsts = np.cumsum(wide) - wide
    packed = [first + i for first, size in zip(firsts, sizes, strict=True) for i in range(size)]
    assert sorted(rows[rows >= 0].tolist()) == packed, "rows are not packed"
    row_token = token_of_rows(groups)

    num_tiles = int(groups.num_tiles[0])
    tile_group, tile_sizes = np.asarray(groups.tile_group), np.asarray(groups.tile_sizes)
    tile_starts = np.asarray(groups.tile_starts)
    assert (tile_group[:num_tiles] >= 0).all() and (tile_group[num_tiles:] == -1).all()
    assert (np.diff(tile_group[:num_tiles]) >= 0).all()
    assert (tile_sizes[:num_tiles] > 0).all() and (tile_sizes[num_tiles:] == 0).all()
    assert tile_sizes.max(initial=0) <= groups.tile_rows
    before = np.cumsum(tile_sizes[:num_tiles]) - tile_sizes[:num_tiles]
    gaps = (firsts - (np.cumsum(sizes) - sizes))[tile_group[:num_tiles]]
    np.testing.assert_array_equal(tile_starts[:num_tiles], before + gaps)
    spans = np.asarray(groups.tile_spans)
    assert not spans[num_tiles:].any()
    for group, size in enumerate(np.asarray(groups.group_sizes).tolist()):
        mine = np.flatnonzero(tile_group == group)
        assert all(np.array_equal(np.arange(*spans[tile]), mine) for tile in mine), (
            "a tile knows others than its group's"
        )
        assert len(mine) == -(-size // groups.tile_rows)
        members = [row for tile in mine for row in range(tile_starts[tile], tile_starts[tile] + tile_sizes[tile])]
        assert len(members) == size
        assert (np.diff(row_token[members]) >= 0).all(), "tokens of a group are out of order"
        experts = {int(e) for e in np.asarray(ids).reshape(-1)[np.isin(rows, members)]}
        assert len(experts) <= 1, f"group {group} mixes experts {experts}"


def token_of_rows(groups: Groups):
    """The token of every row, -1 for rows without one."""
    positions = np.asarray(groups.positions)
    tokens = np.full(groups.num_rows, -1)
    for token, rows in enumerate(positions.tolist()):
        for row in rows:
            if row >= 0:
                tokens[row] = token
    return tokens


def occupied_rows(groups: Groups):
    """Indices of the rows that hold a token."""
    positions = np.asarray(groups.positions).reshape(-1)
    return np.unique(positions[positions >= 0])


def group_of_rows(groups: Groups):
    """The group of every row, -1 for rows of no group."""
    found = np.full(groups.num_rows, -1)
    for tile in range(int(groups.num_tiles[0])):
        start, size = int(groups.tile_starts[tile]), int(groups.tile_sizes[tile])
        found[start : start + size] = groups.tile_group[tile]
    return found
