"""The layer: route, group, experts, combine. Everything that varies is a value passed into this path."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moe_jax import checks
from moe_jax.config import MoEConfig
from moe_jax.expert_gradient import with_gradient
from moe_jax.experts import expert_mlp, gather_rows, row_multiple
from moe_jax.ops.combine import combine
from moe_jax.ops.group_tokens import Groups, group_tokens
from moe_jax.ops.implementation import check_name, choose
from moe_jax.quantization.array import QuantizedArray
from moe_jax.routing import route_and_group
from moe_jax.tuning.plan import LayerPlan, LayerShape, has_whole_blocks, plan_for, training_plan
from moe_jax.types import ExpertWeights, MoELayerWeights, SharedExpertWeights, TopK


def moe(
    x: Float[Array, "T H"],
    experts: ExpertWeights,
    router_logits: Float[Array, "T E"],
    config: MoEConfig,
    *,
    expert_map: Int[Array, " E"] | None = None,
    correction_bias: Float[Array, " E"] | None = None,
    input_ids: Int[Array, " T"] | None = None,
    hash_indices_table: Int[Array, "V k"] | None = None,
    key: Array | None = None,
    plan: LayerPlan | None = None,
    implementation: str = "auto",
) -> Float[Array, "T H"]:
    """A Mixture-of-Experts layer: every token through its top-k experts, summed with the router's weights.

    Args:
        x: ``[T, H]`` hidden states, of `config.dtype`; T may be 0.
        experts: the weights of the experts that live here, of `config.dtype`.
        router_logits: ``[T, E]`` over all experts.
        config: the layer.
        expert_map: int32 ``[E]``, global expert id to local id, -1 for experts that live elsewhere. The result is then this
            rank's partial sum: over any partition of the experts the partial sums add up to the whole layer.
        correction_bias: ``[E]``, added to the scores for the selection only (DeepSeek-V3).
        input_ids: ``[T]`` token ids, for hash routing.
        hash_indices_table: ``[V, k]``, for hash routing.
        key: random key, for simulated routing.
        plan: how the kernels tile the grouped matmuls; that of `moe_jax.tuning.plan_for` by default.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``; see `explain`.

    Returns:
        ``[T, H]``, of `config.dtype`.

    Raises:
        ValueError: shapes that do not fit the config, or a kernel asked for by name that does not support them.
        TypeError: dtypes that do not fit the config.

    Example:
        >>> config = MoEConfig(num_experts=4, top_k=2, hidden_size=16, intermediate_size=32, dtype="float32")
        >>> k1, k2, k3, k4 = jax.random.split(jax.random.key(0), 4)
        >>> experts = ExpertWeights(w13=jax.random.normal(k1, (4, 64, 16)), w2=jax.random.normal(k2, (4, 16, 32)))
        >>> moe(jax.random.normal(k3, (5, 16)), experts, jax.random.normal(k4, (5, 4)), config).shape
        (5, 16)
    """
    checks.check_layer(x, experts, config, expert_map)
    plan = plan or layer_plan(x.shape[0], experts, config, implementation)
    topk, groups = route_and_group(
        router_logits,
        config,
        num_local_experts=experts.num_local_experts,
        expert_map=expert_map,
        tile_rows=None if plan is None else plan.tile_rows,
        row_tokens=plan is not None and plan.up.gather,
        row_multiple=1 if plan is None else row_multiple(config),
        correction_bias=correction_bias,
        hidden_states=x,
        input_ids=input_ids,
        hash_indices_table=hash_indices_table,
        key=key,
        implementation=implementation,
    )
    checks.check_topk(x, topk, config)
    return _run_experts(x, experts, topk.weights, groups, config, plan, implementation)


def apply_experts(
    x: Float[Array, "T H"],
    experts: ExpertWeights,
    topk: TopK,
    config: MoEConfig,
    *,
    expert_map: Int[Array, " E"] | None = None,
    plan: LayerPlan | None = None,
    implementation: str = "auto",
) -> Float[Array, "T H"]:
    """The layer after routing: groups the tokens by expert, runs the experts and sums with the weights of `topk`.

    Slots with id -1, or whose expert lives elsewhere, contribute exactly zero. An id outside ``[-1, E)`` raises where
    that can be seen without waiting for a device (ids at hand on a CPU); in a compiled function it is dropped like -1.

    Args:
        x: ``[T, H]`` hidden states.
        experts: the weights of the experts that live here.
        topk: global expert ids ``[T, k]`` and float32 weights ``[T, k]``, from `route` or of your own making.
        config: the layer.
        expert_map: int32 ``[E]``, global expert id to local id or -1.
        plan: as in `moe`.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.

    Example:
        >>> config = MoEConfig(num_experts=2, top_k=1, hidden_size=16, intermediate_size=16, dtype="float32")
        >>> experts = ExpertWeights(w13=jnp.ones((2, 32, 16)), w2=jnp.ones((2, 16, 16)))
        >>> topk = TopK(ids=jnp.array([[1], [-1]]), weights=jnp.array([[1.0], [1.0]]))
        >>> y = apply_experts(jnp.ones((2, 16)), experts, topk, config)
        >>> bool((y[0] != 0).all()), bool((y[1] == 0).all())
        (True, True)
    """
    check_name(implementation)
    checks.check_layer(x, experts, config, expert_map)
    checks.check_topk(x, topk, config)
    plan = plan or layer_plan(x.shape[0], experts, config, implementation)
    groups = group_tokens(
        topk.ids,
        num_experts=config.num_experts,
        num_local_experts=experts.num_local_experts,
        expert_map=expert_map,
        tile_rows=None if plan is None else plan.tile_rows,
        row_tokens=plan is not None and plan.up.gather,
        row_multiple=1 if plan is None else row_multiple(config),
        implementation=implementation,
    )
    return _run_experts(x, experts, topk.weights, groups, config, plan, implementation)


def layer_plan(num_tokens: int, experts: ExpertWeights, config: MoEConfig, implementation: str) -> LayerPlan | None:
    """How the kernels tile a layer with these experts for so many tokens; None if they do not run."""
    if choose("moe", implementation, None) == "xla":
        return None
    shape = LayerShape.of(config, num_tokens, experts.num_local_experts)
    training = config.fp8_training
    if training is not None and training.contracts_columns:
        return training_plan(shape, training.scaling)
    quantized = [w.spec for w in (experts.w13, experts.w2) if isinstance(w, QuantizedArray)]
    return plan_for(shape, whole_blocks=has_whole_blocks(*quantized))


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _run_experts(
    x: Array,
    experts: ExpertWeights,
    weights: Array,
    groups: Groups,
    config: MoEConfig,
    plan: LayerPlan | None,
    implementation: str,
) -> Array:
    """All after grouping. Traced and lowered once for all layers of one shape in a program: lowering four layers of 32768 tokens
    with their gradients takes a CPU 13 s, and 48 without that.
    """
    if config.apply_router_weight_on_input:  # k = 1: each token is its own one-row sum
        x = combine(x, jnp.arange(x.shape[0], dtype=jnp.int32)[:, None], weights, implementation=implementation)
        weights = None
    plan = plan if plan is None else plan.for_tile_rows(groups.tile_rows)

    def layer(x: Array, experts: ExpertWeights, groups: Groups, weights: Array | None) -> Array:
        rows = gather_rows(x, experts, groups, config, implementation=implementation)
        return expert_mlp(rows, experts, groups, weights, config, plan=plan, implementation=implementation)

    if config.quantization is None:
        layer = with_gradient(layer, config, implementation=implementation)
    return layer(x, experts, groups, weights)


def shared_expert(x: Float[Array, "T H"], shared: SharedExpertWeights, config: MoEConfig) -> Float[Array, "T H"]:
    """The expert that every token visits: a dense MLP, with a sigmoid gate if it has one.

    Example:
        >>> config = MoEConfig(
        ...     num_experts=2, top_k=1, hidden_size=8, intermediate_size=8, num_shared_experts=1, shared_intermediate_size=4
        ... )
        >>> shared_expert(jnp.ones((3, 8)), SharedExpertWeights(jnp.ones((8, 8)), jnp.ones((8, 4))), config).shape
        (3, 8)
    """

    def project(a: Array, weight: Array) -> Array:
        return jnp.matmul(a, weight.T, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)

    y = project(config.act(project(x, shared.w13)).astype(x.dtype), shared.w2)
    if shared.gate is not None:
        y = y * jax.nn.sigmoid(project(x, shared.gate))
    return y.astype(x.dtype)


def moe_block(
    x: Float[Array, "T H"],
    layer: MoELayerWeights,
    config: MoEConfig,
    *,
    expert_map: Int[Array, " E"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "T H"]:
    """A whole block of a checkpoint: router projection in float32, routed experts, shared expert.

    Under expert parallelism one rank keeps `layer.shared`; the others pass a layer without it, so that it is added once.

    Args:
        x: ``[T, H]`` hidden states that enter the block.
        layer: from `moe_jax.checkpoints.load_layer`.
        config: the layer.
        expert_map: int32 ``[E]``, global expert id to local id or -1; the result is then this rank's partial sum.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``, for the routed experts.

    Example:
        >>> config = MoEConfig(num_experts=2, top_k=1, hidden_size=16, intermediate_size=16, dtype="float32")
        >>> experts = ExpertWeights(w13=jnp.ones((2, 32, 16)), w2=jnp.ones((2, 16, 16)))
        >>> moe_block(jnp.ones((3, 16)), MoELayerWeights(experts, router=jnp.ones((2, 16))), config).shape
        (3, 16)
    """
    router = layer.router.astype(jnp.float32)
    router_logits = jnp.matmul(x.astype(jnp.float32), router.T, precision=lax.Precision.HIGHEST)
    if layer.router_bias is not None:
        router_logits = router_logits + layer.router_bias.astype(jnp.float32)[None, :]
    y = moe(
        x,
        layer.experts,
        router_logits,
        config,
        expert_map=expert_map,
        correction_bias=layer.correction_bias,
        implementation=implementation,
    )
    return y if layer.shared is None else y + shared_expert(x, layer.shared, config)
