"""Shapes, plans and entries to test with."""

import dataclasses

from moe_jax.kernels.hopper.matmul_config import most_rows
from moe_jax.tuning.fit import within_memory
from moe_jax.tuning.plan import LayerPlan, LayerShape, default_plan
from moe_jax.tuning.schema import TunedEntry

MANY = LayerShape(128, 32768, 2048, 768, gated=True, dtype="bfloat16")
FEW = dataclasses.replace(MANY, num_pairs=128)


def with_band(plan: LayerPlan, band: int) -> LayerPlan:
    """A plan that can be told from the rule's, and runs."""
    return dataclasses.replace(plan, up=dataclasses.replace(plan.up, band=band))


def entry_of(shape: LayerShape = MANY, band: int = 5, tile_rows: int | None = None) -> TunedEntry:
    return TunedEntry(shape, with_band(default_plan(shape, tile_rows), band), 20.0, 16.0)


def plan_of_blocks(shape: LayerShape, rows_first: bool, quantizes: bool) -> LayerPlan:
    """Of 8-bit operands with scales of blocks: rows or weights on the M side of wgmma, each with the most rows that it can have,
    and rows quantized as they leave the up-projection or by a kernel of its own."""
    plan = default_plan(shape, most_rows(True, rows_first))
    assert plan.up.rows_first == plan.down.rows_first == rows_first
    up = within_memory(dataclasses.replace(plan.up, quantizes=quantizes), shape.dtype, shape.codes)
    return dataclasses.replace(plan, up=up)


def pairs(shape: LayerShape, num_pairs: int) -> LayerShape:
    return dataclasses.replace(shape, num_pairs=num_pairs)
