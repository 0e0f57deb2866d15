"""Which plans are tried: for each row tile that suits the mean group, the rule's configuration and single changes to it."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from moe_jax.kernels.hopper.matmul_config import Config
from moe_jax.tuning.fit import config_misfit, misfit
from moe_jax.tuning.plan import LayerPlan, LayerShape, default_plan, splits

MOST_STAGES = 8
# With few rows the stream of weights is all that counts: how wide and how deep it is read.
_FEW_ROWS: tuple[dict[str, Any], ...] = (
    {},
    {"tile_k": 64},
    {"consumers": 2, "tile_k": 64},
    {"consumers": 2, "tile_k": 128},
    {"halves": 1},
    {"halves": 2},
    {"halves": 1, "consumers": 2},
    {"cluster": 2, "gather": False},
    {"overlap": True},
    {"columns": 64, "tile_k": 128},
    {"columns": 32, "tile_k": 256},
    {"gather": True},
    {"gather": False},
)
# With many, what is fetched again from L2 counts too: the order of the tiles, and what neighbours fetch together.
_MANY_ROWS: tuple[dict[str, Any], ...] = (
    {},
    {"overlap": False},
    {"band": 4},
    {"band": 16},
    {"cluster": 2, "gather": False},
    {"cluster": 2, "gather": False, "band": 16},
    {"cluster": 1, "gather": True},
    {"gather": False},
)


def row_tiles(shape: LayerShape) -> tuple[int, ...]:
    """Row tiles worth trying for a mean group; the rule's own is among them.

    Example:
        >>> row_tiles(LayerShape(128, 32768, 2048, 768, gated=True, dtype="bfloat16"))
        (128, 160, 192)
    """
    mean = shape.mean_rows
    likely = (64,) if mean <= 24 else (64, 128) if mean <= 96 else (128, 160, 192)
    return tuple(sorted({*likely, default_plan(shape).tile_rows}))


def candidates(shape: LayerShape) -> list[LayerPlan]:
    """The plans to build and time, the default rule's first; all fit the problem.

    The projections do not depend on each other beyond the row tile: one plan tries a change to each of them.

    Example:
        >>> shape = LayerShape(128, 32768, 2048, 768, gated=True, dtype="bfloat16")
        >>> candidates(shape)[0] == default_plan(shape)
        True
    """
    plans = [default_plan(shape)]
    for tile_rows in row_tiles(shape):
        base = default_plan(shape, tile_rows)
        ups = _variants(base.up, shape.gated, shape.dtype, up=True)
        downs = _variants(base.down, False, shape.dtype, up=False)
        for up, down in itertools.zip_longest(ups, downs):
            plans.append(LayerPlan(tile_rows, up or ups[0], down or downs[0]))
    return [plan for plan in dict.fromkeys(plans) if misfit(shape, plan) is None]


def _variants(base: Config, gated: bool, dtype: str, up: bool) -> list[Config]:
    """`base`, then its changes, each with as many stages as shared memory holds."""
    found = [base]
    for change in _FEW_ROWS if base.tile_rows <= 64 else _MANY_ROWS:
        config = dataclasses.replace(base, **change)
        if not splits(base.tile_rows, config) or (config.gather and not up):
            continue
        config = dataclasses.replace(config, row_counts=tuple(c for c in config.row_counts if splits(c, config)))
        deepest = (dataclasses.replace(config, stages=stages) for stages in range(MOST_STAGES, 1, -1))
        found += itertools.islice((c for c in deepest if config_misfit(c, gated, dtype) is None), 1)
    return list(dict.fromkeys(found))
