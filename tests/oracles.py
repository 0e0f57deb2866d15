"""What layers compute, in plain Python and NumPy and in float64, a token at a time: independent of all of moe_jax.

`RULES` are the routing configs that tests go through; `python_route`, `python_activation` and `python_experts` are the
steps of a layer.
"""

import math

import numpy as np

from moe_jax.config import MoEConfig, RoutingConfig

F32_MAX = float(np.finfo(np.float32).max)
BIASED = ("deepseek_v3", "deepseek_v4", "minimax2")

# name: routing, top_k. Every method, the grouped ones also with groups, and the other setting of renormalize.
RULES = {
    "default": (RoutingConfig("default"), 4),
    "renormalize": (RoutingConfig("renormalize"), 4),
    "renormalize_naive": (RoutingConfig("renormalize_naive"), 4),
    "topk": (RoutingConfig("topk"), 4),
    "llama4": (RoutingConfig("llama4"), 1),
    "sigmoid": (RoutingConfig("sigmoid"), 4),
    "sigmoid_renorm": (RoutingConfig("sigmoid_renorm"), 4),
    "minimax2": (RoutingConfig("minimax2"), 4),
    "deepseek_v2": (RoutingConfig("deepseek_v2"), 4),
    "deepseek_v2_grouped": (RoutingConfig("deepseek_v2", 4, 2, routed_scaling_factor=16.0), 5),
    "deepseek_v2_grouped_renormalised": (RoutingConfig("deepseek_v2", 4, 2, renormalize=True), 5),
    "deepseek_v3": (RoutingConfig("deepseek_v3"), 4),
    "deepseek_v3_grouped": (RoutingConfig("deepseek_v3", 4, 2, routed_scaling_factor=2.5), 5),
    "deepseek_v3_one_group_of_eight": (RoutingConfig("deepseek_v3", 8, 1), 2),
    "deepseek_v3_grouped_not_renormalised": (RoutingConfig("deepseek_v3", 4, 3, renormalize=False), 5),
    "deepseek_v4": (RoutingConfig("deepseek_v4", routed_scaling_factor=1.5), 4),
}
E = 16


def config_of(name, top_k=None, num_experts=E):
    routing, default_k = RULES[name]
    return MoEConfig(num_experts, default_k if top_k is None else top_k, 8, 8, routing=routing)


def logits_of(seed, num_tokens=33, num_experts=E, spread=2.0):
    return (spread * np.random.default_rng(seed).standard_normal((num_tokens, num_experts))).astype(np.float32)


def bias_of(seed, config):
    """A correction bias for the methods that take one, None for the others."""
    if config.routing.method.value not in BIASED:
        return None
    return np.random.default_rng(100 + seed).normal(0, 0.3, config.num_experts).astype(np.float32)


def special_logits():
    """Rows with NaN, -inf, +inf and the smallest float32; the first two have no expert at all."""
    logits = logits_of(8, spread=1.0)
    logits[0] = math.nan
    logits[1] = -math.inf
    logits[2, ::2] = math.nan
    logits[3, 1:] = -math.inf
    logits[4, :15] = math.nan
    logits[5, 3] = math.inf
    logits[6, [1, 6, 11]] = [math.nan, -math.inf, math.nan]
    logits[7, 0:4] = -math.inf  # a whole group, if there are four
    logits[8, 1:4] = logits[8, 5:8] = logits[8, 9:12] = math.nan  # groups of one
    logits[9, [2, 9]] = -F32_MAX
    return logits


def _sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _softmax(values):
    exp = [math.exp(value - max(values)) for value in values]
    return [e / sum(exp) for e in exp]


def _scores(method, logits):
    """Scores of the experts in ``logits`` (expert -> logit)."""
    if method in ("default", "renormalize_naive", "deepseek_v2"):
        return dict(zip(logits, _softmax(list(logits.values())), strict=True))
    score = {
        **dict.fromkeys(["sigmoid", "sigmoid_renorm", "minimax2", "deepseek_v3"], _sigmoid),
        "deepseek_v4": lambda x: math.sqrt(max(x, 0) + math.log1p(math.exp(-abs(x)))),
        **dict.fromkeys(["topk", "renormalize", "llama4"], lambda x: x),
    }[method]
    return {expert: score(x) for expert, x in logits.items()}


def _experts_of_the_best_groups(choice, config):
    groups, taken = config.routing.num_expert_group, 2 if config.routing.method.value == "deepseek_v3" else 1
    size = config.num_experts // groups
    quality = []
    for group in range(groups):
        best = sorted((c for expert, c in choice.items() if expert // size == group), reverse=True)[:taken]
        quality.append(sum(best) if len(best) == taken else -math.inf)
    kept = sorted(range(groups), key=lambda group: (-quality[group], group))[: config.routing.topk_group]
    return {expert: c for expert, c in choice.items() if expert // size in kept}


def _normalised(weights):
    return [w / sum(weights) for w in weights]


def python_route(logits, config, bias=None):
    """Ids and weights of the top-k rules."""
    routing, k, method = config.routing, config.top_k, config.routing.method.value
    renormalise = method in ("renormalize_naive", "sigmoid_renorm", "minimax2", "deepseek_v3", "deepseek_v4")
    if routing.renormalize is not None:
        renormalise = routing.renormalize

    all_ids = np.full((len(logits), k), -1, np.int32)
    all_weights = np.zeros((len(logits), k))
    for token, row in enumerate(np.asarray(logits, np.float64).tolist()):
        numbers = {e: min(x, F32_MAX) for e, x in enumerate(row) if not math.isnan(x) and x > -math.inf}
        score = _scores(method, numbers)
        choice = {e: s + (0.0 if bias is None else float(bias[e])) for e, s in score.items()}
        choice = {e: c for e, c in choice.items() if not math.isnan(c) and c > -math.inf}
        if routing.num_expert_group > 1:
            choice = _experts_of_the_best_groups(choice, config)
        chosen = sorted(choice, key=lambda e: (-choice[e], e))[:k]

        if method == "renormalize":
            weights = _softmax([numbers[e] for e in chosen])
        elif method == "llama4":
            weights = [_sigmoid(numbers[e]) for e in chosen]
        else:
            weights = [score[e] for e in chosen]
        if renormalise:
            weights = _normalised(weights)
        tie = chosen if bias is not None else range(k)
        slots = sorted(zip(weights, tie, chosen, strict=False), key=lambda slot: (-slot[0], slot[1]))
        for slot, (weight, _, expert) in enumerate(slots):
            all_ids[token, slot] = expert
            all_weights[token, slot] = weight * routing.routed_scaling_factor
    return all_ids, all_weights


def sigmoid(x):
    return np.where(x >= 0, 1.0, np.exp(np.minimum(x, 0))) / (1.0 + np.exp(-np.abs(x)))


def pointwise(name, x):
    return {
        "silu": lambda: x * sigmoid(x),
        "gelu": lambda: 0.5 * x * np.vectorize(math.erfc, otypes=[np.float64])(-x / math.sqrt(2)),
        "gelu_tanh": lambda: x * sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
        "relu2": lambda: np.square(x) * (x > 0),
    }[name]()


def gated(name, gate, up, alpha=None, beta=None, limit=None):
    if name == "swigluoai":
        alpha, beta, limit = alpha or 1.702, 1.0 if beta is None else beta, limit or 7.0
    if name == "swiglustep":
        limit = limit or 7.0
        return np.minimum(gate * sigmoid(gate), limit) * np.clip(up, -limit, limit)
    if name in ("silu", "swigluoai"):
        if limit is not None:
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        return gate * sigmoid((1.0 if alpha is None else alpha) * gate) * (up + (beta or 0.0))
    return pointwise(name, gate) * up


def python_experts(x, experts, ids, weights, config, expert_map=None):
    """The weighted sum over the slots of each token; a slot whose expert is -1, or mapped to -1, adds nothing."""
    as64 = lambda array: None if array is None else np.asarray(array).astype(np.float64)  # noqa: E731
    x, w13, w2 = as64(x), as64(experts.w13), as64(experts.w2)
    w13_bias, w2_bias = as64(experts.w13_bias), as64(experts.w2_bias)
    out = np.zeros(x.shape)
    for token in range(len(x)):
        for expert, weight in zip(np.asarray(ids)[token].tolist(), as64(weights)[token].tolist(), strict=True):
            local = expert if expert_map is None or expert < 0 else int(expert_map[expert])
            if expert < 0 or local < 0:
                continue
            h = w13[local] @ (x[token] * weight if config.apply_router_weight_on_input else x[token])
            h = python_activation(h if w13_bias is None else h + w13_bias[local], config)
            y = w2[local] @ h
            y = y if w2_bias is None else y + w2_bias[local]
            out[token] += y if config.apply_router_weight_on_input else y * weight
    return out


def python_activation(h, config):
    """The activation of rows of the up-projection, gate first."""
    if config.activation.endswith("_no_mul"):
        return pointwise(config.activation.removesuffix("_no_mul"), h)
    gate, up = np.split(h, 2, axis=-1)
    return gated(config.activation, gate, up, config.swiglu_alpha, config.swiglu_beta, config.swiglu_limit)
