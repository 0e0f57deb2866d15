"""Which implementation runs for a shape and format, and why the others do not."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import MoEConfig
from moe_jax.ops.implementation import blackwell_reason, platform_reason
from moe_jax.quantization.rows import QuantizedRows
from moe_jax.tuning.cache import device_kind, find_tuned
from moe_jax.tuning.plan import LayerPlan, LayerShape, has_whole_blocks, plan_for, training_plan


class Explanation(NamedTuple):
    """One implementation of one operation of the layer.

    Attributes:
        op: the operation.
        implementation: ``mosaic``, ``mosaic_blackwell`` (kernels for Blackwell GPUs, not yet run on hardware; of block-scaled
            products alone) or ``xla``.
        reason: why it cannot run; None if it can. The first implementation without a reason is what ``auto`` takes.
    """

    op: str
    implementation: str
    reason: str | None


def explain(
    config: MoEConfig, num_tokens: int, platform: str | None = None, *, num_local_experts: int | None = None
) -> list[Explanation]:
    """The implementations of each operation of a layer, forward, in the order in which ``auto`` tries them.

    Args:
        config: the layer.
        num_tokens: T.
        platform: ``cpu`` or ``gpu`` (taken for a Hopper GPU); by default the device that a jit call runs on.
        num_local_experts: E_local of a rank; all experts by default.

    Example:
        >>> config = MoEConfig(num_experts=8, top_k=2, hidden_size=64, intermediate_size=128)
        >>> [e.implementation for e in explain(config, 16, "cpu") if e.reason is None][:2]
        ['xla', 'xla']
    """
    on_platform = platform_reason(platform)
    found = []
    num_local = num_local_experts or config.num_experts
    on_blackwell = _blackwell_reasons(config, num_tokens, num_local)
    for op, reason in _kernel_reasons(config, num_tokens, num_local):
        if op in on_blackwell:
            found.append(Explanation(op, "mosaic_blackwell", blackwell_reason(platform) or on_blackwell[op]))
        found.append(Explanation(op, "mosaic", on_platform or reason))
        found.append(Explanation(op, "xla", None))
    return found


def explain_plan(
    config: MoEConfig, num_tokens: int, platform: str | None = None, *, num_local_experts: int | None = None
) -> str:
    """Whether the grouped matmuls of a layer run under a tuned plan or the default rule's, in a line.

    Args:
        config: the layer.
        num_tokens: T.
        platform: as in `explain`.
        num_local_experts: as in `explain`.

    Example:
        >>> explain_plan(MoEConfig(num_experts=8, top_k=2, hidden_size=64, intermediate_size=128), 16, "cpu")
        'plan of the grouped matmuls: none, the kernels do not run (platform cpu has no Mosaic GPU kernels)'
    """
    what = "plan of the grouped matmuls:"
    reason = platform_reason(platform)
    if reason is not None:
        return f"{what} none, the kernels do not run ({reason})"
    shape, training = LayerShape.of(config, num_tokens, num_local_experts), config.fp8_training
    if training is not None and training.contracts_columns:
        return (
            f"{what} that of FP8 training, {_words(training_plan(shape, training.scaling))} (nothing is tuned for it)"
        )
    tuned = find_tuned(shape)
    if tuned is not None:
        return f"{what} tuned with {tuned.shape.num_pairs} pairs, {_words(tuned.plan)} ({tuned.path})"
    if platform_reason() is None:
        why = (
            f"nothing is tuned for this shape near {shape.num_pairs} pairs on {device_kind()}; `moe-jax tune` does that"
        )
    else:
        why = "tuned plans are looked up by the kind of GPU, and there is none here"
    return f"{what} the default rule, {_words(plan_for(shape, whole_blocks=_whole_blocks(config)))} ({why})"


def _whole_blocks(config: MoEConfig) -> bool:
    return config.quantization is None or has_whole_blocks(config.quantization.weights)


def _words(plan: LayerPlan) -> str:
    return f"tile_rows={plan.tile_rows}{', rows fetched by their tokens' if plan.up.gather else ''}"


def _kernel_reasons(config: MoEConfig, num_tokens: int, num_local: int) -> list[tuple[str, str | None]]:
    from moe_jax.kernels.hopper import combine, gather, group_tokens, matmul_bf16, topk

    def like(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    if config.fp8_training is not None and config.fp8_training.forward:  # rows and weights are those of this format
        config = dataclasses.replace(config, quantization=f"fp8_{config.fp8_training.scaling}", fp8_training=None)
    pairs = num_tokens * config.top_k
    plan = plan_for(LayerShape.of(config, num_tokens, num_local), whole_blocks=_whole_blocks(config))
    tile_rows = plan.tile_rows
    hidden, intermediate, dtype = config.hidden_size, config.intermediate_size, jnp.dtype(config.dtype)
    logits = like(jnp.dtype(config.routing.router_logits_dtype or "float32"), num_tokens, config.num_experts)
    rule = config.routing.rule
    w13 = like(dtype, num_local, config.w13_rows, hidden)
    w2 = like(dtype, num_local, hidden, intermediate)
    bias = like(dtype, num_local, config.w13_rows) if config.has_bias else None
    x, y = like(dtype, num_tokens, hidden), like(dtype, pairs, hidden)
    before = [
        (
            "topk",
            topk.supports(logits, config.top_k, rule) if rule else f"{config.routing.method.value} is not a top-k rule",
        ),
        ("group_tokens", group_tokens.supports(config.num_experts, num_local, pairs)),
    ]
    if config.quantization is not None:
        matmuls = _quantized_reasons(config, x, w13, w2, bias, pairs, plan)
        return [*before, *matmuls, ("combine", combine.supports(y))]
    return [
        *before,
        ("gather", gather.supports(x)),
        ("grouped_matmul (up)", matmul_bf16.supports(y, w13, bias, config.act, tile_rows)),
        ("grouped_matmul (down)", matmul_bf16.supports(like(dtype, pairs, intermediate), w2, None, None, tile_rows)),
        ("combine", combine.supports(y)),
    ]


def _blackwell_reasons(config: MoEConfig, num_tokens: int, num_local: int) -> dict[str, str | None]:
    """Of block-scaled products, where rows are quantized and weights are NVFP4, MXFP4 or MXFP8."""
    from moe_jax.ops import block_scaled_matmul
    from moe_jax.ops.group_tokens import default_tile_rows
    from moe_jax.quantization import quantize

    form = config.quantization
    if form is None or form.activations is None or block_scaled_matmul.format_of(form.weights) is None:
        return {}
    pairs = num_tokens * config.top_k
    tile_rows = default_tile_rows(pairs, num_local, "xla")
    hidden, intermediate, dtype = config.hidden_size, config.intermediate_size, jnp.dtype(config.dtype)
    shapes = {"up": (num_local, config.w13_rows, hidden), "down": (num_local, hidden, intermediate)}
    found = {}
    for name, shape in shapes.items():
        halves, act = (2 if config.is_gated else 1, config.act) if name == "up" else (1, None)
        codes = functools.partial(quantize, spec=form.weights, halves=halves)
        weights = jax.eval_shape(codes, jax.ShapeDtypeStruct(shape, dtype))
        rows = QuantizedRows(
            jax.ShapeDtypeStruct((pairs, shape[2]), form.activations.storage_dtype), None, form.activations
        )
        reason = block_scaled_matmul.reason_against(rows, weights, act, tile_rows, dtype)
        if form.emulates and reason is None:
            reason = (
                "a layer emulates rows of four bits; ops.grouped_matmul takes those that "
                "ops.quantize_rows.quantize_block_scaled makes"
            )
        found[f"grouped_matmul ({name})"] = reason
    return found


def _quantized_reasons(
    config: MoEConfig, x: Any, w13: Any, w2: Any, bias: Any, pairs: int, plan: LayerPlan
) -> list[tuple[str, str | None]]:
    from moe_jax.kernels.hopper import gather, matmul_bf16
    from moe_jax.kernels.hopper.gather_quantize import scales_shape
    from moe_jax.ops import gather_quantize, quantized_matmul
    from moe_jax.quantization import quantize

    form, tile_rows = config.quantization, plan.tile_rows
    spec, rows_spec = form.weights, form.row_spec if form.multiplies_codes else None
    halves = {"up": 2 if config.is_gated else 1, "down": 1}
    found: list[tuple[str, str | None]] = []
    for name, weights, tiling in (("up", w13, plan.up), ("down", w2, plan.down)):
        columns, act = weights.shape[2], config.act if name == "up" else None
        codes = jax.eval_shape(functools.partial(quantize, spec=spec, halves=halves[name]), weights)
        rows = jax.ShapeDtypeStruct((pairs, columns), x.dtype)
        op = f"grouped_matmul ({name})"
        if rows_spec is None:
            if name == "up":
                found.append(("gather", gather.supports(x)))
            reason = quantized_matmul.reason_against_codes(rows, codes, bias if act else None, act, tile_rows, False)
            if reason is not None:  # the kernel of 16-bit floats runs, on a copy
                found.append((f"decode ({name})", reason))
                reason = matmul_bf16.supports(rows, weights, bias if act else None, act, tile_rows)
            found.append((op, reason))
            continue
        source, slots = (x, config.top_k) if name == "up" else (rows, 1)
        found.append((f"gather_quantize ({name})", gather_quantize.supports(source, rows_spec, slots)))
        scales = jax.ShapeDtypeStruct(scales_shape(pairs, columns, rows_spec), jnp.float32)
        values = jax.ShapeDtypeStruct(rows.shape, rows_spec.storage_dtype)
        quantized = QuantizedRows(values, scales, rows_spec)
        not_first = None if tiling.rows_first else "rows_first=False"
        reason = quantized_matmul.reason_against(quantized, codes, act, tile_rows, config.dtype, not_first=not_first)
        found.append((op, reason))
    return found
