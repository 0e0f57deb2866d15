"""Routing: router logits (or a table, a function, a random key) become the expert ids and weights of every token."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt32

from moe_jax.config import DTYPES, MoEConfig, RoutingMethod
from moe_jax.ops.group_tokens import Groups, group_tokens
from moe_jax.ops.route_groups import route_groups
from moe_jax.ops.topk import topk as topk_of_rule
from moe_jax.types import TopK


def route(
    router_logits: Float[Array, "T E"],
    config: MoEConfig,
    *,
    correction_bias: Float[Array, " E"] | None = None,
    hidden_states: Float[Array, "T H"] | None = None,
    input_ids: Int[Array, " T"] | None = None,
    hash_indices_table: Int[Array, "V k"] | None = None,
    key: PRNGKeyArray | UInt32[Array, "2"] | None = None,
    implementation: str = "auto",
) -> TopK:
    """Chooses the experts of every token, by `config.routing`.

    The arithmetic is float32, whatever the logits are. These rules hold for every method:

    - An expert whose logit is NaN or -inf, or whose biased score is, is never selected. +inf counts as the largest
      finite float32.
    - Slots for which no expert is left (fewer than k can be selected) have id -1 and weight 0: a token whose logits are
      all NaN visits no expert and its output is 0. Weights are always finite.
    - Equal scores go to the lowest expert id.
    - The slots of a token are sorted by descending weight, those without expert last. Equal weights are in the order of
      selection, or of ids if a correction bias (or no score at all) selected.
    - `routed_scaling_factor` multiplies the weights in the end. Renormalised weights sum to it; if all scores of a
      token underflow to 0, its weights are 0.

    Args:
        router_logits: ``[T, E]``, float32, bfloat16 or float16.
        config: the layer.
        correction_bias: ``[E]``, added to the scores for the selection (``deepseek_v3``, ``deepseek_v4``,
            ``minimax2``). Required if `config.has_correction_bias`, refused by the other methods.
        hidden_states: ``[T, H]``, handed to a custom function; the other methods do not look at it.
        input_ids: integers ``[T]``, the token ids for ``hash``; the other methods do not look at them. A token id
            outside the table has no experts.
        hash_indices_table: integers ``[V, k]``, the expert ids of each token id for ``hash``, -1 for none; refused by
            the other methods.
        key: random key for the simulated methods; the other methods do not look at it.
        implementation: of the top-k operation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``. Hash, custom and
            simulated routing are plain JAX everywhere.

    Returns:
        `TopK` with int32 ids and float32 weights, both ``[T, k]``. Only ``simulated_normal`` and a hash table or custom
        function that does so repeat an expert within a token.

    Raises:
        ValueError: an argument that is missing, that the method does not take, or of the wrong shape.
        TypeError: an argument of the wrong dtype.

    Sources:
        Shazeer et al. 2017 (softmax top-k); the DeepSeek-V2 and DeepSeek-V3 reports (groups, correction bias, scaling
        factor); Roller et al. 2021 (hash layers); vLLM and FlashInfer (names and exact variants).

    Example:
        >>> import jax.numpy as jnp
        >>> from moe_jax.config import MoEConfig, RoutingConfig
        >>> routing = RoutingConfig("hash")
        >>> config = MoEConfig(num_experts=4, top_k=2, hidden_size=8, intermediate_size=8, routing=routing)
        >>> table = jnp.array([[0, 1], [3, 2]])
        >>> topk = route(jnp.zeros((3, 4)), config, input_ids=jnp.array([1, 0, 7]), hash_indices_table=table)
        >>> topk.ids.tolist()
        [[2, 3], [0, 1], [-1, -1]]
        >>> topk.weights.tolist()
        [[0.5, 0.5], [0.5, 0.5], [0.0, 0.0]]
    """
    routing = config.routing
    method = routing.method
    router_logits, correction_bias = _prepare(router_logits, config, correction_bias, hash_indices_table)
    if method is RoutingMethod.HASH:
        return _route_hash(router_logits, config, input_ids, hash_indices_table)
    if method is RoutingMethod.CUSTOM:
        return _route_custom(router_logits, config, hidden_states)
    if method in (RoutingMethod.SIMULATED_UNIFORM, RoutingMethod.SIMULATED_NORMAL):
        return _route_simulated(router_logits.shape[0], config, key)

    return topk_of_rule(
        router_logits, config.top_k, routing.rule, correction_bias=correction_bias, implementation=implementation
    )


def route_and_group(
    router_logits: Float[Array, "T E"],
    config: MoEConfig,
    *,
    num_local_experts: int | None = None,
    expert_map: Int[Array, " E"] | None = None,
    tile_rows: int | None = None,
    row_tokens: bool = False,
    row_multiple: int = 1,
    correction_bias: Float[Array, " E"] | None = None,
    implementation: str = "auto",
    **more: Array | None,
) -> tuple[TopK, Groups]:
    """`route`, and the rows that the experts get: in fewer launches than one after the other.

    Args:
        router_logits: ``[T, E]``, as in `route`.
        config: the layer.
        num_local_experts: E_local; E by default.
        expert_map: int32 ``[E]``, global to local id, -1 for experts that live elsewhere.
        tile_rows: rows of a tile; by default what `group_tokens` takes. A few tokens may get smaller tiles.
        row_tokens: as in `group_tokens`.
        row_multiple: as in `group_tokens`; a few tokens have 1.
        correction_bias: ``[E]``, as in `route`.
        implementation: ``auto``, ``xla``, ``mosaic`` or ``mosaic_interpret``.
        **more: what else `route` takes, for the methods that are not a top-k rule.

    Example:
        >>> config = MoEConfig(num_experts=4, top_k=2, hidden_size=8, intermediate_size=8)
        >>> topk, groups = route_and_group(jnp.array([[0.0, 1.0, 3.0, 2.0]]), config)
        >>> topk.ids.tolist(), groups.group_sizes.tolist()
        ([[2, 3]], [0, 0, 1, 1])
    """
    if config.routing.rule is not None:
        hash_indices_table = more.get("hash_indices_table")
        router_logits, correction_bias = _prepare(router_logits, config, correction_bias, hash_indices_table)
        return route_groups(
            router_logits,
            config.top_k,
            config.routing.rule,
            correction_bias=correction_bias,
            num_local_experts=num_local_experts,
            expert_map=expert_map,
            tile_rows=tile_rows,
            share_rows=True,
            row_tokens=row_tokens,
            row_multiple=row_multiple,
            implementation=implementation,
        )
    topk = route(router_logits, config, correction_bias=correction_bias, implementation=implementation, **more)
    groups = group_tokens(
        topk.ids,
        num_experts=config.num_experts,
        num_local_experts=num_local_experts,
        expert_map=expert_map,
        tile_rows=tile_rows,
        row_tokens=row_tokens,
        row_multiple=row_multiple,
        implementation=implementation,
    )
    return topk, groups


def _prepare(
    router_logits: ArrayLike, config: MoEConfig, correction_bias: ArrayLike | None, hash_indices_table: ArrayLike | None
) -> tuple[Array, Array | None]:
    """Logits and bias as the method takes them; raises for what does not belong to it."""
    routing = config.routing
    method = routing.method
    router_logits = _check_logits(router_logits, config)
    correction_bias = _check_correction_bias(correction_bias, config)
    if hash_indices_table is not None and method is not RoutingMethod.HASH:
        raise ValueError(
            f"hash_indices_table is not used by routing method {method.value!r}; leave it None, or use 'hash'"
        )
    if routing.router_logits_dtype is not None:
        # The barrier keeps XLA from cancelling the rounding against the conversion to float32 that follows.
        router_logits = lax.optimization_barrier(router_logits.astype(routing.router_logits_dtype))
    return router_logits, correction_bias


def _check_logits(router_logits: ArrayLike, config: MoEConfig) -> Array:
    router_logits = jnp.asarray(router_logits)
    if router_logits.dtype.name not in DTYPES:
        raise TypeError(f"router_logits are {router_logits.dtype}, not one of {', '.join(DTYPES)}; cast them")
    if router_logits.ndim != 2 or router_logits.shape[1] != config.num_experts:
        raise ValueError(
            f"router_logits of shape {router_logits.shape} must be [T, num_experts={config.num_experts}]: a row per "
            "token, a column per global expert"
        )
    return router_logits


def _check_correction_bias(correction_bias: ArrayLike | None, config: MoEConfig) -> Array | None:
    method = config.routing.method.value
    if correction_bias is None:
        if config.has_correction_bias:
            raise ValueError(
                f"has_correction_bias=True but no correction_bias was given to routing method {method!r}; pass the "
                f"[{config.num_experts}] bias of the router"
            )
        return None
    if not config.routing.takes_correction_bias:
        raise ValueError(f"correction_bias is not used by routing method {method!r}; leave it None")
    return _check_array("correction_bias", correction_bias, (config.num_experts,), jnp.floating).astype(jnp.float32)


def _check_array(name: str, array: ArrayLike | None, shape: tuple[int | None, ...], kind: type) -> Array:
    """The argument as an array, or an error that says what it must be. None in ``shape`` is any size."""
    wanted = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
    article = "floating-point" if kind is jnp.floating else "integer"
    if array is None:
        raise ValueError(f"{name} is missing: this routing method needs it, as {article} {wanted}")
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, kind):
        raise TypeError(f"{name} is {array.dtype}; it must be {article} {wanted}")
    fits = all(size in (None, actual) for size, actual in zip(shape, array.shape, strict=False))
    if array.ndim != len(shape) or not fits:
        raise ValueError(f"{name} of shape {array.shape} must be {wanted}")
    return array


def _sorted_slots(ids: Array, weights: Array, valid: Array, scale: float) -> TopK:
    """Scales the weights, clears slots that are not valid or not finite, and sorts by weight (ties: by id)."""
    weights = weights.astype(jnp.float32) * scale
    valid = valid & jnp.isfinite(weights)
    ids = jnp.where(valid, ids, -1).astype(jnp.int32)
    weights = jnp.where(valid, weights, 0.0)
    order = jnp.lexsort((ids, -weights, ~valid), axis=-1)
    return TopK(jnp.take_along_axis(ids, order, axis=-1), jnp.take_along_axis(weights, order, axis=-1))


def _route_hash(logits: Array, config: MoEConfig, input_ids: ArrayLike | None, table: ArrayLike | None) -> TopK:
    """DeepSeek-V4's hash layers: which experts comes from a table of token ids, with what weight from the router."""
    num_tokens, num_experts = logits.shape
    table = _check_array("hash_indices_table", table, (None, config.top_k), jnp.integer)
    input_ids = _check_array("input_ids", input_ids, (num_tokens,), jnp.integer)
    vocabulary = table.shape[0]

    # jnp indexing wraps negative ids around and clamps large ones: neither is an expert of this token.
    known = (input_ids >= 0) & (input_ids < vocabulary)
    ids = jnp.take(table, input_ids, axis=0, mode="fill", fill_value=-1)
    valid = known[:, None] & (ids >= 0) & (ids < num_experts)
    chosen = jnp.take_along_axis(logits.astype(jnp.float32), jnp.where(valid, ids, 0), axis=-1)
    valid = valid & ~jnp.isnan(chosen) & (chosen > -jnp.inf)
    weights = _sqrt_softplus(jnp.where(valid, jnp.minimum(chosen, jnp.finfo(jnp.float32).max), 0.0))
    weights = jnp.where(valid, weights, 0.0)
    if config.routing.renormalizes:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + config.routing.renorm_epsilon)
    return _sorted_slots(ids, weights, valid, config.routing.routed_scaling_factor)


def _sqrt_softplus(x: Array) -> Array:
    softplus = jnp.maximum(x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x)))
    positive = softplus > 0  # softplus underflows below -104, where sqrt has no finite slope
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, softplus, 1.0)), 0.0)


def _route_custom(logits: Array, config: MoEConfig, hidden_states: ArrayLike | None) -> TopK:
    """The user's function, with its result checked and brought into the order that every method has."""
    if hidden_states is not None:
        hidden_states = _check_array("hidden_states", hidden_states, (logits.shape[0], None), jnp.floating)
    routing = config.routing
    result = routing.custom_function(hidden_states, logits, config.top_k, routing.renormalizes)
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise TypeError(f"custom_function must return (weights, ids), got {type(result).__name__}")
    shape = (logits.shape[0], config.top_k)
    weights = _check_array("result 0 of custom_function (the weights)", result[0], shape, jnp.floating)
    ids = _check_array("result 1 of custom_function (the ids)", result[1], shape, jnp.integer)
    valid = (ids >= 0) & (ids < config.num_experts)
    return _sorted_slots(ids, weights, valid, routing.routed_scaling_factor)


def _route_simulated(num_tokens: int, config: MoEConfig, key: Array | None) -> TopK:
    """Random experts, to measure a layer under a known load; the logits are not looked at."""
    method = config.routing.method
    if key is None:
        raise ValueError(
            f"key is missing: routing method {method.value!r} draws experts at random; pass jax.random.key(0)"
        )
    shape = (num_tokens, config.top_k)
    if method is RoutingMethod.SIMULATED_UNIFORM:
        lots = jax.random.uniform(key, (num_tokens, config.num_experts))
        _, ids = lax.top_k(lots, config.top_k)  # the experts with the k highest lots: distinct, all sets equally likely
        weights = jnp.ones(shape)
    else:
        ids_key, weights_key = jax.random.split(key)
        position = jax.nn.sigmoid(jax.random.normal(ids_key, shape))
        ids = jnp.clip(jnp.floor(position * config.num_experts).astype(jnp.int32), 0, config.num_experts - 1)
        weights = jnp.abs(jax.random.normal(weights_key, shape))
        weights = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return _sorted_slots(ids, weights, jnp.ones(shape, bool), config.routing.routed_scaling_factor)
