"""Which plans are tried: for each row tile that suits the mean group, the rule's configuration and single changes to it."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from moe_jax.kernels.hopper.matmul_config import Config
from moe_jax.tuning.fit import config_misfit, misfit, quantizes_misfit, rows_first_misfit
from moe_jax.tuning.plan import Codes, LayerPlan, LayerShape, default_plan, splits

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
# Weights that alone are codes are decoded by up to four consumers, gate and up by one, by two, or interleaved in each, all
# together or in two teams. What a projection cannot have is left out.
_WHOLE: dict[str, Any] = {"columns": 64, "interleaved": False}
_FEW_DECODED: tuple[dict[str, Any], ...] = (
    {},
    *({"tile_k": tile_k} for tile_k in (128, 192, 256, 320)),
    *({"consumers": consumers, "halves": 2, "paired": False, "teams": 1, **_WHOLE} for consumers in (1, 2)),
    *({"consumers": consumers, "halves": 1, "paired": False, "teams": 1, **_WHOLE} for consumers in (1, 2, 4)),
    *({"consumers": consumers, "halves": 1, "paired": True, "teams": 1, **_WHOLE} for consumers in (2, 4)),
    *(
        {"consumers": consumers, "halves": 1, "paired": False, "teams": 1, "columns": 32, "interleaved": True}
        for consumers in (1, 2, 3)
    ),
    *({"consumers": 2, "halves": 1, "paired": p, "teams": 2, "gather": False, **_WHOLE} for p in (False, True)),
    {"consumers": 2, "halves": 2, "paired": False, "teams": 2, "gather": False, **_WHOLE},
    {"overlap": True},
    {"overlap": False},
    {"gather": False},
)
# 8-bit rows have no clusters and are not fetched by their tokens; a stage takes 128 of K in the place of 64.
_FEW_EIGHT_BIT: tuple[dict[str, Any], ...] = (
    {},
    {"tile_k": 128},
    {"consumers": 2, "tile_k": 128},
    {"consumers": 2, "tile_k": 256},
    {"halves": 1},
    {"halves": 2},
    {"halves": 1, "consumers": 2},
    {"columns": 64, "tile_k": 256},
    {"columns": 32, "tile_k": 512},
)
_MANY_EIGHT_BIT: tuple[dict[str, Any], ...] = (
    {},
    {"band": 4},
    {"band": 16},
    {"tile_k": 256},
    {"consumers": 1},
    {"halves": 1},
    {"quantizes": True},
    {"quantizes": False},
)
# Codes of four bits that become FP8 have a ring of their own, whose stages are taken from the others.
_FROM_FOUR_BITS: tuple[dict[str, Any], ...] = tuple({"codes_stages": stages} for stages in (2, 3, 4, 8))


def row_tiles(shape: LayerShape) -> tuple[int, ...]:
    """Row tiles worth trying for a mean group; the rule's own is among them.

    Example:
        >>> row_tiles(LayerShape(128, 32768, 2048, 768, gated=True, dtype="bfloat16"))
        (128, 160, 192)
    """
    mean, most = shape.mean_rows, (128, 160, 192)
    some = 128
    if Codes.of(shape.codes).both:
        some, most = (96, (88, 96, 128)) if Codes.of(shape.codes).promoted else (128, (128, 144, 160))
    if Codes.of(shape.codes).weights_alone:
        most = (128, 144, 160)
    likely = (64,) if mean <= 24 else (64, some) if mean <= 96 else most
    of_rule = default_plan(shape).tile_rows
    if Codes.of(shape.codes).weights_alone and 8 < of_rule < 64:
        likely = (min(64, 2 * of_rule),)
    return tuple(sorted({*likely, of_rule}))


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
        ups = _variants(base.up, shape, shape.gated, up=True)
        downs = _variants(base.down, shape, False, up=False)
        for up, down in itertools.zip_longest(ups, downs):
            plans.append(LayerPlan(tile_rows, up or ups[0], down or downs[0]))
    return [plan for plan in dict.fromkeys(plans) if misfit(shape, plan) is None]


def _variants(base: Config, shape: LayerShape, gated: bool, up: bool) -> list[Config]:
    """`base`, then its changes, each with as many stages as shared memory holds."""
    found, of = [base], Codes.of(shape.codes)
    changes = (
        (_FEW_EIGHT_BIT, _MANY_EIGHT_BIT) if of.both else (_FEW_DECODED if of.weights_alone else _FEW_ROWS, _MANY_ROWS)
    )
    more = _FROM_FOUR_BITS if of.from_four_bits else ()
    for change in (*changes[base.tile_rows > 64], *more):
        config = dataclasses.replace(base, **change)
        if not splits(base.tile_rows, config) or (config.gather and not up):
            continue
        if config.quantizes and quantizes_misfit("up" if up else "down", config, shape):
            continue
        if config.rows_first and rows_first_misfit("up" if up else "down", config, shape):
            continue
        config = dataclasses.replace(config, row_counts=tuple(c for c in config.row_counts if splits(c, config)))
        deepest = (dataclasses.replace(config, stages=stages) for stages in range(MOST_STAGES, 1, -1))
        found += itertools.islice((c for c in deepest if config_misfit(c, gated, shape.dtype, shape.codes) is None), 1)
    return list(dict.fromkeys(found))
