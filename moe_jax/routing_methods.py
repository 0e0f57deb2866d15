"""The routing methods: their names, and what each of them is in the terms of one generic top-k operation."""

import enum
from dataclasses import dataclass


class RoutingMethod(enum.StrEnum):
    """How router logits become expert ids and weights. The names follow the routing methods of vLLM and FlashInfer.

    ``s`` is the score of an expert, ``b`` the correction bias (selection only, never in the weights).

    Example:
        >>> RoutingMethod("deepseek_v3") is RoutingMethod.DEEPSEEK_V3
        True
    """

    DEFAULT = "default"  # softmax over all experts, top-k
    RENORMALIZE = "renormalize"  # top-k of the logits, softmax over the k
    DEEPSEEK_V3 = "deepseek_v3"  # s = sigmoid; s + b chooses groups by their best two, then top-k; s / sum(s)
    LLAMA4 = "llama4"  # the largest logit, weight = its sigmoid
    RENORMALIZE_NAIVE = "renormalize_naive"  # softmax over all experts, top-k, s / sum(s)
    TOPK = "topk"  # top-k of the logits, which are the weights
    SIGMOID_RENORM = "sigmoid_renorm"  # s = sigmoid, top-k, s / sum(s)
    MINIMAX2 = "minimax2"  # s = sigmoid; top-k of s + b; s / sum(s)
    SIGMOID = "sigmoid"  # s = sigmoid, top-k
    DEEPSEEK_V2 = "deepseek_v2"  # s = softmax over all experts; groups chosen by their best one, then top-k
    DEEPSEEK_V4 = "deepseek_v4"  # s = sqrt(softplus); top-k of s + b; s / sum(s)
    HASH = "hash"  # ids from a table of token ids; s = sqrt(softplus) at these ids; s / sum(s)  (DeepSeek-V4)
    CUSTOM = "custom"  # RoutingConfig.custom_function
    SIMULATED_UNIFORM = "simulated_uniform"  # k distinct random experts, weight 1
    SIMULATED_NORMAL = "simulated_normal"  # experts around the middle, random weights that sum to 1


@dataclass(frozen=True)
class RoutingRule:
    """A top-k routing method spelled out: everything that the one top-k operation needs. Hashable.

    Attributes:
        score: ``softmax``, ``sigmoid``, ``sqrtsoftplus`` or ``identity`` of all logits, in float32. Experts are
            selected by score, plus the correction bias if there is one.
        weight: ``score`` (the unbiased score at the chosen ids), or ``softmax`` or ``sigmoid`` of the chosen logits.
        renormalize: divide the weights of a token by their sum.
        renorm_epsilon: added to that sum.
        num_expert_group: experts are cut into this many groups of neighbours; 1 is no grouping.
        topk_group: only experts of this many groups, the best ones, can be selected.
        group_score: what makes a group good: ``max`` or ``top2_sum`` of the selection scores in it.
        scale: multiplies the weights in the end.

    Example:
        >>> from moe_jax.config import RoutingConfig
        >>> RoutingConfig("renormalize").rule.weight
        'softmax'
    """

    score: str
    weight: str
    renormalize: bool
    renorm_epsilon: float
    num_expert_group: int
    topk_group: int
    group_score: str
    scale: float


@dataclass(frozen=True)
class MethodSpec:
    """A routing method as a row of `METHOD_SPECS`; the fields it shares with `RoutingRule` mean the same.

    Attributes:
        score: None for a method that is not a top-k rule.
        renormalize: whether the weights of a token sum to one (before the scaling factor) by default.
        renormalize_is_free: whether a config may say otherwise.
        group_score: None for a method without groups.
        takes_correction_bias: whether experts can be selected by score plus a bias.

    Example:
        >>> METHOD_SPECS[RoutingMethod.DEEPSEEK_V3].takes_correction_bias
        True
    """

    score: str | None = None
    weight: str = "score"
    renormalize: bool = False
    renormalize_is_free: bool = False
    renorm_epsilon: float = 0.0
    group_score: str | None = None
    takes_correction_bias: bool = False


METHOD_SPECS: dict[RoutingMethod, MethodSpec] = {
    RoutingMethod.DEFAULT: MethodSpec("softmax"),
    RoutingMethod.RENORMALIZE: MethodSpec("identity", weight="softmax", renormalize=True),
    RoutingMethod.DEEPSEEK_V3: MethodSpec("sigmoid", "score", True, True, 1e-20, "top2_sum", True),
    RoutingMethod.LLAMA4: MethodSpec("identity", weight="sigmoid"),
    RoutingMethod.RENORMALIZE_NAIVE: MethodSpec("softmax", renormalize=True),
    RoutingMethod.TOPK: MethodSpec("identity"),
    RoutingMethod.SIGMOID_RENORM: MethodSpec("sigmoid", renormalize=True),
    RoutingMethod.MINIMAX2: MethodSpec("sigmoid", "score", True, True, 1e-20, None, True),
    RoutingMethod.SIGMOID: MethodSpec("sigmoid"),
    RoutingMethod.DEEPSEEK_V2: MethodSpec("softmax", "score", False, True, 1e-20, "max", False),
    RoutingMethod.DEEPSEEK_V4: MethodSpec("sqrtsoftplus", "score", True, True, 1e-20, None, True),
    RoutingMethod.HASH: MethodSpec(None, "score", True, True, 1e-20),
    RoutingMethod.CUSTOM: MethodSpec(None, renormalize=True, renormalize_is_free=True),
    RoutingMethod.SIMULATED_UNIFORM: MethodSpec(None),
    RoutingMethod.SIMULATED_NORMAL: MethodSpec(None, renormalize=True),
}
