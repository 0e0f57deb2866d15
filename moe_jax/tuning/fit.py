"""Whether a configuration of the grouped matmul can run a problem: what it needs of a multiprocessor, what the kernel takes."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.activations import Activation, get_activation
from moe_jax.kernels.hopper.matmul_bf16 import supports
from moe_jax.kernels.hopper.matmul_config import (
    FEW_ROWS,
    MOST_CONSUMERS,
    MOST_DECODED,
    MOST_FETCHED_DECODED,
    WGMMA_ROWS,
    Config,
    most_rows,
)
from moe_jax.kernels.hopper.matmul_fp8 import GROUP
from moe_jax.kernels.hopper.pairs import handed_over
from moe_jax.kernels.hopper.row_scales import held
from moe_jax.kernels.hopper.views import ALIGNED, COLUMNS, STORED
from moe_jax.tuning.plan import Codes, LayerPlan, LayerShape, splits

_BYTES = ("float8_e4m3fn", "int8")
_OF_INT4 = 0.625  # bytes of a weight, with a scale and a zero point of 16 bits for each 32
_OF_FP4 = 0.5625  # with a scale of 8 bits for each 16
SHARED_MEMORY = 227 * 1024  # bytes that one block may have on a Hopper GPU


def shared_memory_bytes(config: Config, dtype: str, codes: str = "") -> int:
    """Bytes of shared memory that a block takes: a ring of tiles, the outputs on their way, a float32 bias, scales, barriers.

    The bias is counted whether there is one or not, so that a plan serves both. Codes of four bits are counted with the most
    scales that they can have.

    Args:
        config: of the projection.
        dtype: of the output, and of what is not quantized.
        codes: as in `LayerShape`.

    Example:
        >>> shared_memory_bytes(Config(row_counts=(160,), stages=4), "bfloat16") <= SHARED_MEMORY
        True
    """
    of = Codes.of(codes)
    item = jnp.dtype(dtype).itemsize
    of_rows = 1 if of.both else item
    of_weights = 1 if of.both or of.dtype in _BYTES else item
    if of.four_bits:
        of_weights = _OF_FP4 if of.dtype == "float4_e2m1fn" else _OF_INT4
    everyone = config.everyone
    weight_rows = everyone.consumers * config.halves * WGMMA_ROWS
    row_scales = 0
    if of.both:  # for each group of columns in a stage, or for a whole tile
        lines = config.stages * config.tile_k // GROUP if of.promoted else config.consumers
        row_scales = lines * held(config.tile_rows)
    buffers = (
        everyone.stages * config.tile_rows * config.tile_k * of_rows,
        everyone.stages * config.stage_rows * config.tile_k // config.depth * of_weights,
        config.codes_stages * weight_rows * config.tile_k * _OF_FP4,
        everyone.whole.consumers * _way_out(config, item),
        weight_rows
        * 4
        * (2 if config.rows_first or config.interleaved else 1),  # a bias: of each consumer's rows, or of all
        row_scales * 4,
        weight_rows * 4 * (2 if config.interleaved else 1) if of.granularity == "channel" else 0,
        (2 * everyone.stages + 2 * config.codes_stages + 3 * everyone.consumers) * 8,
        ALIGNED if config.gather else 0,  # set aside for reductions
        math.prod(handed_over(everyone)) * 4 if config.paired else 0,
        2 * STORED * GROUP if config.quantizes and not config.rows_first else 0,  # codes on their way out, beside rows
    )
    return sum(math.ceil(size / ALIGNED) * ALIGNED for size in buffers)


def _way_out(config: Config, item: int) -> int:
    """Bytes for the rows of a consumer on their way to memory."""
    if config.rows_first:
        return 64 * 128
    return 0 if config.tile_rows <= FEW_ROWS else 2 * STORED * COLUMNS * item


def within_memory(config: Config, dtype: str, codes: str) -> Config:
    """The configuration with as many stages as there is room for beside scales.

    Example:
        >>> tiles = [Config(row_counts=(rows,), tile_k=128, stages=4) for rows in (144, 160)]
        >>> [within_memory(tile, "bfloat16", "int8 channel").stages for tile in tiles]
        [4, 3]
    """
    while config.stages > 2 and shared_memory_bytes(config, dtype, codes) > SHARED_MEMORY:
        config = dataclasses.replace(config, stages=config.stages - 1)
    return config


def config_misfit(config: Config, gated: bool, dtype: str, codes: str = "") -> str | None:
    """Why the kernel cannot run a projection with this configuration; None if it can.

    Args:
        config: of the projection.
        gated: its activation takes gate and up.
        dtype: of rows and weights, or of the output where both are quantized.
        codes: as in `LayerShape`.

    Example:
        >>> config_misfit(Config(halves=1), gated=True, dtype="bfloat16")
        'halves=1 must be 2: a gated projection keeps gate and up in one tile'
    """
    counts = config.row_counts
    sizes = {name: size for name, size in dataclasses.asdict(config).items() if type(size) is int}
    for name, size in sizes.items():
        if size < 1 and name != "codes_stages":
            return f"{name}={size} must be at least 1"
    if not counts or any(c < 8 or c % 8 for c in counts) or list(counts) != sorted(set(counts)):
        return f"row_counts={counts} must be multiples of 8 in ascending order"
    if gated and config.whole.halves != 2 and not config.interleaved:
        return f"halves={config.halves} must be 2: a gated projection keeps gate and up in one tile"
    few = Codes.of(codes).weights_alone and config.tile_rows <= FEW_ROWS
    beyond = not few or config.consumers > MOST_CONSUMERS or config.halves > 1
    if beyond and (config.consumers > 2 or config.halves > 2):
        return (
            f"consumers={config.consumers} and halves={config.halves} must be at most 2, for the registers they need; "
            f"{MOST_CONSUMERS} and 1 where weights alone are codes, with at most {FEW_ROWS} rows"
        )
    if config.teams > 1 and not (few and config.everyone.consumers <= MOST_CONSUMERS):
        return (
            f"teams={config.teams} of consumers={config.consumers} are for weights that alone are codes, with "
            f"tile_rows={config.tile_rows} at most {FEW_ROWS} and {MOST_CONSUMERS} consumers in all"
        )
    if config.teams > 1 and (config.gather or config.cluster > 1):
        return f"teams={config.teams} cannot fetch rows by their tokens (gather={config.gather}) or with cluster={config.cluster}"
    if config.cluster > 8:
        return f"cluster={config.cluster} must be at most 8, the blocks of a portable cluster"
    if config.stages < 2:
        return f"stages={config.stages} must be at least 2: a stage is handed back one step late"
    if config.gather and (config.stages < 3 or config.cluster > 1):
        return (
            f"gather=True needs 3 stages (stages={config.stages}), for a stage is handed over one step late, and cluster="
            f"{config.cluster} must be 1: blocks do not share rows that they fetch by token"
        )
    if config.columns not in (64, 32, 16):
        return f"columns={config.columns} must be 64, 32 or 16"
    if config.tile_k % (64 * config.depth):
        return (
            f"tile_k={config.tile_k} must be a multiple of {64 * config.depth}: with columns={config.columns} a stage holds "
            f"{config.depth} pieces of K, each of whole swizzled rows of 64 elements"
        )
    even = gated and config.halves == 1 and config.consumers % 2 == 0
    if config.paired and not (even and Codes.of(codes).weights_alone and config.tile_rows <= FEW_ROWS):
        return (
            f"paired=True is for the gate and up of weights that alone are codes, with consumers={config.consumers} even, "
            f"halves={config.halves} 1 and tile_rows={config.tile_rows} at most {FEW_ROWS}"
        )
    if config.interleaved and not (gated and config.halves == 1 and config.columns == 32 and not config.paired and few):
        return (
            f"interleaved=True is for the gate and up of weights that alone are codes, with columns={config.columns} 32, "
            f"halves={config.halves} 1, paired={config.paired} False and tile_rows={config.tile_rows} at most {FEW_ROWS}"
        )
    odd = [rows for rows in counts if not splits(rows, config)]
    if odd:
        return f"row_counts {odd} cannot be shared by cluster={config.cluster}: they must be multiples of {8 * config.cluster}"
    reason = _eight_bit_misfit(config, codes) if Codes.of(codes).both else None
    reason = _four_bit_misfit(config) if Codes.of(codes).four_bits else reason
    if reason is not None:
        return reason
    taken = shared_memory_bytes(config, dtype, codes)
    if taken > SHARED_MEMORY:
        return f"{taken} bytes of shared memory are more than a block's {SHARED_MEMORY}; take fewer stages"
    return None


def check_config(config: Config, gated: bool, dtype: str, codes: str = "", known: str | None = None) -> None:
    """Raises ValueError for a configuration that the kernel cannot run, by `config_misfit` or for a reason that is `known`.

    Example:
        >>> check_config(Config(halves=1), gated=False, dtype="bfloat16")
    """
    reason = known or config_misfit(config, gated, dtype, codes)
    if reason:
        raise ValueError(f"config={config} cannot run: {reason}; leave config None for the default")


def _four_bit_misfit(config: Config) -> str | None:
    """What the kernel of weights of four bits cannot do beyond that."""
    if config.columns != WGMMA_ROWS and not config.interleaved:
        return f"columns={config.columns} must be {WGMMA_ROWS} for weights of four bits: a block has so many rows"
    most = MOST_FETCHED_DECODED if config.gather and config.consumers == 2 else MOST_DECODED
    if config.tile_rows > most:
        fetched = ", with rows fetched by their tokens," if config.gather else ""
        return (
            f"tile_rows={config.tile_rows} must be at most {most} for weights of four bits{fetched} for the registers"
        )
    return None


def _eight_bit_misfit(config: Config, codes: str) -> str | None:
    """What the kernel of 8-bit operands cannot do beyond that."""
    if Codes.of(codes).from_four_bits and (config.columns != WGMMA_ROWS or config.codes_stages < 2):
        return (
            f"columns={config.columns} must be {WGMMA_ROWS} and codes_stages={config.codes_stages} at least 2 for weights of "
            "four bits that become FP8, a block of codes has so many rows; use from_four_bits()"
        )
    if config.cluster > 1 or config.gather:
        return f"cluster={config.cluster} and gather={config.gather} must be 1 and False for 8-bit rows"
    if config.tile_k % (GROUP * config.depth):
        return (
            f"tile_k={config.tile_k} must be a multiple of {GROUP * config.depth} for 8-bit rows: with columns="
            f"{config.columns} a stage holds {config.depth} pieces of K, each of whole groups of {GROUP}"
        )
    most = most_rows(Codes.of(codes).promoted, config.rows_first)
    if config.tile_rows > most:
        return f"tile_rows={config.tile_rows} must be at most {most} for {codes}, for the registers"
    if Codes.of(codes).dtype == "int8" and config.tile_rows > 32 and config.tile_rows % 16:
        return f"tile_rows={config.tile_rows} must be a multiple of 16 for int8: wgmma has no other above 32"
    return None


def misfit(shape: LayerShape, plan: LayerPlan) -> str | None:
    """Why the kernels cannot run a layer of this shape with this plan; None if they can.

    Example:
        >>> from moe_jax.tuning.plan import default_plan
        >>> shape = LayerShape(8, 64, 256, 1000, gated=True, dtype="bfloat16")
        >>> misfit(shape, default_plan(shape)).split("(")[0]
        'up: the output size=1000 must be a multiple of 16 '
    """

    def like(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.dtype(shape.dtype))

    experts, hidden, inner = shape.num_local_experts, shape.hidden_size, shape.intermediate_size
    w13 = like(experts, inner * (2 if shape.gated else 1), hidden)
    w2 = like(experts, hidden, inner)
    activation = get_activation("silu") if shape.gated else None
    for name, config, weights, act in (("up", plan.up, w13, activation), ("down", plan.down, w2, None)):
        if name == "down" and config.gather:
            return "down: gather=True is for an up-projection: the rows of this one are not those of tokens"
        if config.quantizes:
            reason = quantizes_misfit(name, config, shape)
            if reason:
                return f"{name}: {reason}"
        if config.rows_first:
            reason = rows_first_misfit(name, config, shape)
            if reason:
                return f"{name}: {reason}"
        reason = _operands_misfit(shape, weights, act, config)
        reason = reason or config_misfit(config, act is not None, shape.dtype, shape.codes)
        if reason:
            return f"{name}: {reason}"
    return None


def quantizes_misfit(name: str, config: Config, shape: LayerShape) -> str | None:
    """Why a projection cannot quantize its rows as they leave it."""
    from moe_jax.kernels.hopper.quantized_store import supports as can_quantize
    from moe_jax.quantization import Spec

    if name == "down":
        return "quantizes=True is for an up-projection: the rows of this one are not multiplied again"
    of = Codes.of(shape.codes)
    if not of.promoted:
        return f"quantizes=True is for rows and weights with scales of blocks, not for {shape.codes or shape.dtype}"
    dtype = "float8_e4m3fn" if of.from_four_bits else of.dtype
    return can_quantize(Spec(dtype, "group", GROUP), config, shape.intermediate_size, shape.gated)


def rows_first_misfit(name: str, config: Config, shape: LayerShape) -> str | None:
    """Why a projection cannot have its rows on the M side of wgmma."""
    from moe_jax.kernels.hopper.matmul_rows_first import supports as can_run

    of, up = Codes.of(shape.codes), name == "up"
    if not of.promoted:
        return f"rows_first=True is for rows and weights with scales of blocks, not for {shape.codes or shape.dtype}"
    gated, n_out = up and shape.gated, shape.intermediate_size if up else shape.hidden_size
    blocks = -(-n_out // GROUP) * (2 if gated else 1)
    return can_run(n_out, blocks, gated, config, quantize=config.quantizes)


def _operands_misfit(shape: LayerShape, weights: Any, activation: Activation | None, config: Config) -> str | None:
    """Why no kernel multiplies rows with these weights, plain or quantized."""
    tile_rows, gather = config.tile_rows, config.gather
    from moe_jax.kernels.hopper.gather_quantize import scales_shape
    from moe_jax.ops.quantized_matmul import reason_against, reason_against_codes
    from moe_jax.quantization import Spec, quantize
    from moe_jax.quantization.rows import QuantizedRows

    rows = jax.ShapeDtypeStruct((tile_rows, weights.shape[2]), weights.dtype)
    plain = supports(rows, weights, None, activation, tile_rows, gather)
    of = Codes.of(shape.codes)
    if not of.dtype:
        return plain
    block = {"block": (GROUP, GROUP), "group": GROUP}.get(of.granularity)
    four_bits = of.dtype == "float4_e2m1fn"
    spec = Spec(of.dtype, of.granularity, 16, "float8_e4m3fn") if four_bits else Spec(of.dtype, of.granularity, block)
    halves = 2 if activation is not None else 1
    codes = jax.eval_shape(functools.partial(quantize, spec=spec, halves=halves), weights)
    if of.weights_alone:
        # What cannot be decoded is dequantized before, and multiplied as plain weights are.
        return plain if reason_against_codes(rows, codes, None, activation, tile_rows, gather) else None
    granularity, block = {"channel": ("token", None), "tensor": ("tensor", None)}.get(of.granularity, ("group", GROUP))
    rows_spec = Spec("float8_e4m3fn" if of.from_four_bits else of.dtype, granularity, block)
    scales = jax.ShapeDtypeStruct(scales_shape(*rows.shape, rows_spec), jnp.float32)
    values = jax.ShapeDtypeStruct(rows.shape, rows_spec.storage_dtype)
    quantized = QuantizedRows(values, scales, rows_spec)
    not_first = None if config.rows_first else "rows_first=False"
    return reason_against(quantized, codes, activation, tile_rows, shape.dtype, not_first=not_first)
