"""Which implementation runs for a shape and format, and why the others do not."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import MoEConfig
from moe_jax.ops.implementation import platform_reason
from moe_jax.tuning.cache import device_kind, find_tuned
from moe_jax.tuning.plan import LayerPlan, LayerShape, default_plan, plan_for


class Explanation(NamedTuple):
    """One implementation of one operation of the layer.

    Attributes:
        op: the operation.
        implementation: ``mosaic`` or ``xla``.
        reason: why it cannot run; None if it can. The first implementation without a reason is what ``auto`` takes.
    """

    op: str
    implementation: str
    reason: str | None


def explain(
    config: MoEConfig, num_tokens: int, platform: str | None = None, *, num_local_experts: int | None = None
) -> list[Explanation]:
    """The implementations of each operation of a layer, in the order in which ``auto`` tries them.

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
    for op, reason in _kernel_reasons(config, num_tokens, num_local_experts or config.num_experts):
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
    shape = LayerShape.of(config, num_tokens, num_local_experts)
    tuned = find_tuned(shape)
    if tuned is not None:
        return f"{what} tuned with {tuned.shape.num_pairs} pairs, {_words(tuned.plan)} ({tuned.path})"
    if platform_reason() is None:
        why = (
            f"nothing is tuned for this shape near {shape.num_pairs} pairs on {device_kind()}; `moe-jax tune` does that"
        )
    else:
        why = "tuned plans are looked up by the kind of GPU, and there is none here"
    return f"{what} the default rule, {_words(default_plan(shape))} ({why})"


def _words(plan: LayerPlan) -> str:
    return f"tile_rows={plan.tile_rows}{', rows fetched by their tokens' if plan.up.gather else ''}"


def _kernel_reasons(config: MoEConfig, num_tokens: int, num_local: int) -> list[tuple[str, str | None]]:
    from moe_jax.kernels.hopper import combine, gather, group_tokens, matmul_bf16, topk

    def like(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    pairs = num_tokens * config.top_k
    tile_rows = plan_for(LayerShape.of(config, num_tokens, num_local)).tile_rows
    hidden, intermediate, dtype = config.hidden_size, config.intermediate_size, jnp.dtype(config.dtype)
    logits = like(jnp.dtype(config.routing.router_logits_dtype or "float32"), num_tokens, config.num_experts)
    rule = config.routing.rule
    w13 = like(dtype, num_local, config.w13_rows, hidden)
    w2 = like(dtype, num_local, hidden, intermediate)
    bias = like(dtype, num_local, config.w13_rows) if config.has_bias else None
    x, y = like(dtype, num_tokens, hidden), like(dtype, pairs, hidden)
    return [
        (
            "topk",
            topk.supports(logits, config.top_k, rule) if rule else f"{config.routing.method.value} is not a top-k rule",
        ),
        ("group_tokens", group_tokens.supports(config.num_experts, num_local, pairs)),
        ("gather", gather.supports(x)),
        ("grouped_matmul (up)", matmul_bf16.supports(y, w13, bias, config.act, tile_rows)),
        ("grouped_matmul (down)", matmul_bf16.supports(like(dtype, pairs, intermediate), w2, None, None, tile_rows)),
        ("combine", combine.supports(y)),
    ]
