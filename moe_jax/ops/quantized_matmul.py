"""Grouped matmul with quantized weights, and with rows that are quantized or not: its plain form and its kernel."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_jax.activations import Activation
from moe_jax.kernels.hopper.codes import odd_blocks
from moe_jax.kernels.hopper.decoding_config import Projection, four_bit, one_byte
from moe_jax.kernels.hopper.matmul_config import (
    MOST_DECODED,
    Config,
    default_config,
    eight_bit,
    from_four_bits,
    most_rows,
    rows_first,
)
from moe_jax.ops import block_scaled_matmul as block_scaled
from moe_jax.ops import implementation as impl
from moe_jax.ops.gather import plain_gather
from moe_jax.ops.group_tokens import Groups
from moe_jax.quantization.array import QuantizedArray
from moe_jax.quantization.formats import Spec
from moe_jax.quantization.prepared import PreparedArray, prepare
from moe_jax.quantization.prepared_fp8 import PreparedFp8, fp8_blocks, prepare_fp8
from moe_jax.quantization.prepared_layout import unprepared
from moe_jax.quantization.rounding import scale_to_float32
from moe_jax.quantization.rows import QuantizedRows

_UNPREPARED = (
    "weights of four bits are in natural order, put into the kernel's in every call; use prepare_experts() once"
)


def reason_against(
    rows: QuantizedRows,
    weights: QuantizedArray,
    activation: Activation | None,
    tile_rows: int,
    dtype: DTypeLike,
    *,
    not_first: str | None = "rows_first=False",
) -> str | None:
    """Why the kernel cannot run the problem; None if it can. `not_first`: why it is not that of `Config.rows_first`."""
    from moe_jax.kernels.hopper import matmul_fp8 as kernel

    if _becomes_fp8(rows, weights):
        weights = jax.eval_shape(prepare_fp8, weights)
        if rows.spec.block != (1, kernel.GROUP):
            given = f"granularity={rows.spec.granularity!r} and block={rows.spec.block}"
            return f"rows with {given}: there must be a scale for each {kernel.GROUP} columns"
        reason = _too_many_rows(tile_rows, True, not_first)
        return reason or kernel.supports(rows.values, rows.scales, weights, weights.scales, activation, dtype)
    if weights.columns is not None:
        return f"weights with {weights.columns} of their stored columns in use; store them without filling"
    if weights.spec.granularity not in ("tensor", "channel", "block"):
        return f"weights with granularity={weights.spec.granularity!r}; it takes tensor, channel and block"
    blocks = weights.spec.granularity == "block"
    if blocks and (weights.spec.block[1] != kernel.GROUP or rows.spec.block != (1, kernel.GROUP)):
        return f"blocks {weights.spec.block} of weights and {rows.spec.block} of rows must both have {kernel.GROUP} columns"
    if not blocks and rows.spec.granularity == "group":
        return "rows with a scale for each group of columns need weights with a scale for each block"
    scales = jax.eval_shape(_scales, weights)
    reason = _too_many_rows(tile_rows, blocks, not_first) or _odd_blocks(weights, activation)
    return reason or kernel.supports(rows.values, rows.scales, weights.values, scales, activation, dtype)


def _odd_blocks(weights: QuantizedArray, activation: Activation | None) -> str | None:
    if weights.spec.granularity != "block":
        return None
    gated = activation is not None and activation.is_gated
    return odd_blocks(weights.spec.block, weights.shape, weights.scales.shape, gated)


def _too_many_rows(tile_rows: int, promoted: bool, not_first: str | None) -> str | None:
    most = most_rows(promoted, not_first is None)
    if tile_rows <= most:
        return None
    other = (
        f", or {most_rows(True, True)} with rows on the M side of wgmma ({not_first})" if promoted and not_first else ""
    )
    return f"tile_rows={tile_rows} must be at most {most}{other}, for the registers; group with fewer"


def quantized_matmul(
    rows: Float[Array, "rows K"] | QuantizedRows,
    weights: QuantizedArray,
    groups: Groups,
    *,
    bias: Float[Array, "E N"] | None,
    activation: Activation | None,
    group_offset: int | Array,
    tokens_as_rows: bool,
    config: Config | None,
    dtype: DTypeLike,
    implementation: str,
    quantize: Spec | None = None,
) -> Float[Array, "R N_out"] | tuple[Array, Array]:
    """`moe_jax.ops.grouped_matmul.grouped_matmul` with quantized weights; its arguments are checked there.

    Rows that are not quantized are multiplied with codes that the kernel decodes on their way into the tensor cores. It cannot
    decode odd sizes: there, where the kernels run, all weights are dequantized before, with a warning. Codes of four bits are
    decoded in an order of their own (`prepare_experts`); weights in the natural one are put into it first, with a warning.

    With scales of blocks tiles have up to 96 rows, or 128, which then stand on the M side of wgmma (`Config.rows_first`).

    Four-bit floats times FP8 rows become FP8, see `moe_jax.quantization.fp8_blocks`: in the kernel where it can run, or before.

    On a Blackwell GPU rows and weights that are both NVFP4, MXFP4 or MXFP8 have a kernel (`block_scaled_matmul`), which does not
    use `config`; not yet run on hardware.

    Args:
        rows: quantized, or not with a weight-only format.
        weights: ``[E, N, K]``.
        groups: of the rows.
        bias: ``[E, N]``.
        activation: gated or not.
        group_offset: index of the first group's weights.
        tokens_as_rows: rows are those of the tokens.
        config: how the kernel tiles its work.
        dtype: of the output.
        implementation: a name that was checked.
        quantize: the format of the result, where the kernel runs and can: then codes and scales come back.

    Raises:
        ValueError: a `config` that cannot run 8-bit rows, where the kernels run.
    """
    from moe_jax.kernels.hopper import matmul_fp8 as kernel

    gated = activation is not None and activation.is_gated
    n_out = weights.shape[1] // (2 if gated else 1)
    aligned = tokens_as_rows or groups.row_multiple % kernel.ROW_MULTIPLE == 0
    tile_group = groups.tile_group
    if not (isinstance(group_offset, int) and group_offset == 0):
        tile_group = tile_group + group_offset
    plain = (weights, groups, bias, activation, tile_group, tokens_as_rows, dtype)
    problem = dict(activation=activation, tile_rows=groups.tile_rows, dtype=dtype, tokens_as_rows=tokens_as_rows)
    if block_scaled.runs(rows, weights, implementation, **problem):
        how = {"bias": bias, "activation": activation, "dtype": dtype}
        return block_scaled.block_scaled_matmul(rows, weights, groups, tile_group, **how)
    runs = impl.choose("grouped_matmul", implementation, None) != "xla"
    codes, not_first = f"{weights.spec.dtype} {weights.spec.granularity}", None
    if isinstance(rows, QuantizedRows) and (weights.spec.granularity != "group" or _becomes_fp8(rows, weights)):
        from moe_jax.tuning.fit import check_config

        not_first = _against_rows_first(weights, groups.tile_rows, n_out, gated, config, quantize, tokens_as_rows)
        if config is not None and runs:
            check_config(config, gated, jnp.dtype(dtype).name, codes, not_first if config.rows_first else None)
    if isinstance(rows, QuantizedRows) and weights.spec.granularity == "group":
        reason = f"{rows.spec.dtype} rows times weights whose scales change every {weights.spec.block[1]} columns have no kernel"
        if _becomes_fp8(rows, weights):
            reason = reason_against(rows, weights, activation, groups.tile_rows, dtype, not_first=not_first)
            weights = _made_for_kernel(weights) if runs and reason is None else fp8_blocks(weights)
            plain = (weights, *plain[1:])
            config = config if reason is None else None  # made for another size of a weight
        if reason is not None:
            impl.choose(
                "grouped_matmul", "xla" if implementation == "xla" else "auto", f"{reason}; rows are dequantized before"
            )
            rows = rows.dequantize().astype(dtype if runs else jnp.float32)
    if not isinstance(rows, QuantizedRows):
        if not runs:
            return _plain(rows, *plain)
        return _weight_only(
            rows, weights, groups, bias, activation, group_offset, tile_group, tokens_as_rows, config, implementation
        )
    reason = reason_against(rows, weights, activation, groups.tile_rows, dtype, not_first=not_first)
    chosen = impl.choose("grouped_matmul", implementation, reason)
    if chosen == "xla":
        return _plain(rows.dequantize(), *plain)
    if config is None:
        from moe_jax.tuning.fit import within_memory

        likely_tiles = min(groups.num_rows, weights.shape[0])
        config = eight_bit(default_config(groups.tile_rows, gated, n_out, likely_tiles))
        config = from_four_bits(config) if isinstance(weights, PreparedFp8) else config
        config = within_memory(config if not_first else rows_first(config), jnp.dtype(dtype).name, codes)
    values = weights if isinstance(weights, PreparedFp8) else weights.values
    of_rows_and_weights = rows.values, rows.scales, values, _scales(weights)
    schedule = tile_group, groups.tile_starts, groups.tile_sizes, groups.num_tiles
    options = {
        "config": config,
        "out_dtype": jnp.dtype(dtype),
        "tile_spans": groups.tile_spans,
        "aligned": aligned,
        "quantize": quantize,
        "interpret": impl.interpret_params(chosen),
    }
    if not_first is None:
        from moe_jax.kernels.hopper import matmul_rows_first

        return matmul_rows_first.grouped_matmul(*of_rows_and_weights, *schedule, bias, activation, **options)
    return kernel.grouped_matmul(
        *of_rows_and_weights,
        *schedule,
        bias,
        activation,
        tile_tokens=groups.tile_tokens if tokens_as_rows else None,
        total_rows=groups.num_rows,
        **options,
    )


def _becomes_fp8(rows: QuantizedRows, weights: QuantizedArray) -> bool:
    """Whether weights are of four bits and are rounded to FP8, as the rows are."""
    return rows.spec.dtype == "float8_e4m3fn" and weights.spec.dtype == "float4_e2m1fn"


def _made_for_kernel(weights: QuantizedArray) -> PreparedFp8:
    if not isinstance(weights, PreparedFp8):
        impl.choose("prepare", "auto", _UNPREPARED)
    return prepare_fp8(weights)


def _against_rows_first(
    weights: QuantizedArray,
    tile_rows: int,
    n_out: int,
    gated: bool,
    config: Config | None,
    quantize: Spec | None,
    tokens_as_rows: bool,
) -> str | None:
    """Why rows do not stand on the M side; None if they do: a config wants it, or there is none and tiles have the rows."""
    from moe_jax.kernels.hopper.matmul_rows_first import supports

    config = config or Config((tile_rows,), rows_first=True)
    if not config.rows_first:
        return "rows_first=False"
    if tokens_as_rows:
        return "rows_first=True needs rows of their own for each group, not those of tokens"
    if weights.spec.dtype == "float4_e2m1fn":
        weights = jax.eval_shape(prepare_fp8, weights)
    elif weights.spec.granularity != "block":
        return f"rows_first=True needs weights with granularity='block', not {weights.spec.granularity!r}"
    return supports(n_out, weights.scales.shape[1], gated, config, quantize=quantize is not None)


def _weight_only(
    rows, weights, groups, bias, activation, group_offset, tile_group, tokens_as_rows, config, implementation
):
    from moe_jax.kernels.hopper import matmul_bf16 as kernel

    gathered = groups.row_tokens if tokens_as_rows else None
    reason = reason_against_codes(rows, weights, bias, activation, groups.tile_rows, gathered is not None)
    if reason is not None:
        from moe_jax.ops.grouped_matmul import grouped_matmul

        impl.choose("decode", "auto", reason)  # says so, on a GPU
        return grouped_matmul(
            rows,
            weights.dequantize(rows.dtype),
            groups,
            bias=bias,
            activation=activation,
            group_offset=group_offset,
            tokens_as_rows=tokens_as_rows,
            config=None,  # made for another size of a weight
            implementation=implementation,
        )
    four_bits = weights.spec.codes_per_value == 2
    if four_bits and not isinstance(weights, PreparedArray):
        impl.choose("prepare", "auto", _UNPREPARED)
        weights = prepare(weights, rows.dtype.name)
    gated = activation is not None and activation.is_gated
    n_out = weights.shape[1] // (2 if gated else 1)
    likely_tiles = min(groups.num_rows, weights.shape[0])
    if config is None:
        from moe_jax.tuning.fit import within_memory

        spec, mean_rows = weights.spec, groups.num_rows / max(1, weights.shape[0])
        of_rule = (
            default_config(groups.tile_rows, gated, n_out, likely_tiles),
            Projection(gated, n_out, likely_tiles, mean_rows),
        )
        config = four_bit(*of_rule) if four_bits else one_byte(*of_rule, in_blocks=spec.granularity == "block")
        config = within_memory(config, rows.dtype.name, f"weights {spec.dtype} {spec.granularity}")
    return kernel.grouped_matmul(
        rows,
        weights if four_bits else weights.values,
        tile_group,
        groups.tile_starts,
        groups.tile_sizes,
        groups.num_tiles,
        bias,
        activation,
        config=config,
        tile_spans=groups.tile_spans,
        tile_tokens=groups.tile_tokens if tokens_as_rows else None,
        row_tokens=gathered,
        weight_scales=None if four_bits else _scales(weights),
        total_rows=groups.num_rows,
        interpret=impl.interpret_params(impl.choose("grouped_matmul", implementation, None)),
    )


def reason_against_codes(rows, weights, bias, activation, tile_rows: int, gather: bool) -> str | None:
    """Why no kernel decodes the weights; None if one does."""
    from moe_jax.kernels.hopper import matmul_bf16 as kernel

    if weights.spec.codes_per_value == 2 and weights.columns is None:
        reason = None if isinstance(weights, PreparedArray) else unprepared(weights.spec, rows.dtype)
        if reason is None and tile_rows > MOST_DECODED:
            reason = f"tile_rows={tile_rows} must be at most {MOST_DECODED} for weights of four bits"
        if reason is not None:
            return reason
        if not isinstance(weights, PreparedArray):
            weights = jax.eval_shape(functools.partial(prepare, dtype=rows.dtype.name), weights)
        return kernel.supports(rows, weights, bias, activation, tile_rows, gather)
    if weights.columns is not None or weights.spec.granularity == "group":
        return f"{weights.spec} with columns={weights.columns} has no kernel that decodes it; it is dequantized before"
    scales = jax.eval_shape(_scales, weights)
    reason = _odd_blocks(weights, activation)
    return reason or kernel.supports(rows, weights.values, bias, activation, tile_rows, gather, scales)


def _scales(weights: QuantizedArray) -> Array:
    """Scales of weights as the kernels take them: powers of two become float32, which is a small kernel of XLA's."""
    scales = weights.scales
    if scales.dtype != jnp.float32:
        scales = scale_to_float32(scales)
    return scales[:, None] if scales.ndim == 1 else scales


def _plain(rows, weights, groups, bias, activation, tile_group, tokens_as_rows, dtype):
    """One small matmul per tile that holds rows, in float32 on what the codes stand for; an expert at a time is dequantized."""
    if tokens_as_rows:
        rows = plain_gather(rows, groups.positions, groups.num_rows)
    n_out = weights.shape[1] // (2 if activation is not None and activation.is_gated else 1)
    source = jnp.pad(rows.astype(jnp.float32), ((0, groups.tile_rows), (0, 0)))  # a whole tile from any row on

    def one(t, out):
        expert, start = tile_group[t], groups.tile_starts[t]
        x = lax.dynamic_slice_in_dim(source, start, groups.tile_rows)
        h = lax.dot_general(x, weights[expert].dequantize(), (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)
        h = h if bias is None else h + bias[expert].astype(jnp.float32)[None, :]
        y = h if activation is None else activation(h)
        return lax.dynamic_update_slice_in_dim(out, y.astype(dtype), start, 0)  # what runs over is written again

    out = jnp.zeros((source.shape[0], n_out), dtype)
    return lax.fori_loop(0, groups.num_tiles[0], one, out)[: rows.shape[0]]
