"""Shapes, plans and entries to test with."""

import dataclasses

from moe_jax.tuning.plan import LayerPlan, LayerShape, default_plan
from moe_jax.tuning.schema import TunedEntry

MANY = LayerShape(128, 32768, 2048, 768, gated=True, dtype="bfloat16")
FEW = dataclasses.replace(MANY, num_pairs=128)


def with_band(plan: LayerPlan, band: int) -> LayerPlan:
    """A plan that can be told from the rule's, and runs."""
    return dataclasses.replace(plan, up=dataclasses.replace(plan.up, band=band))


def entry_of(shape: LayerShape = MANY, band: int = 5, tile_rows: int | None = None) -> TunedEntry:
    return TunedEntry(shape, with_band(default_plan(shape, tile_rows), band), 20.0, 16.0)


def pairs(shape: LayerShape, num_pairs: int) -> LayerShape:
    return dataclasses.replace(shape, num_pairs=num_pairs)
