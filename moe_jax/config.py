"""What a layer is: `MoEConfig` and its `RoutingConfig`, frozen, hashable and checked when they are made."""

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from moe_jax.activations import Activation, canonical_name, get_activation
from moe_jax.fields import check_bool, check_int, set_field
from moe_jax.quantization.formats import QuantFormat, quant_format
from moe_jax.quantization.fp8_training import Fp8Training
from moe_jax.routing_methods import METHOD_SPECS, RoutingMethod, RoutingRule

DTYPES = ("bfloat16", "float16", "float32")


def _check_dtype(instance: Any, name: str) -> None:
    """Stores the field as a dtype name, or raises. Takes names and dtypes (`jnp.bfloat16`)."""
    value = getattr(instance, name)
    dtype = value
    if not isinstance(value, str):
        with contextlib.suppress(TypeError):
            dtype = np.dtype(value).name
    if dtype not in DTYPES:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(DTYPES)}")
    set_field(instance, name, dtype)


@dataclass(frozen=True)
class RoutingConfig:
    """How tokens choose their experts.

    Attributes:
        method: a `RoutingMethod` or its value; a `RoutingMethod` once the config is made.
        num_expert_group: groups of neighbouring experts (``deepseek_v2`` and ``deepseek_v3``); 1 is no grouping.
        topk_group: how many groups a token may visit.
        routed_scaling_factor: multiplies the weights of every method, after they are renormalised.
        renormalize: None is the method's own default. ``deepseek_v2``, ``deepseek_v3``, ``deepseek_v4``, ``minimax2``,
            ``hash`` and ``custom`` (which hands it to its function) can be told otherwise.
        router_logits_dtype: ``bfloat16``, ``float16`` or ``float32``: router logits are rounded to it first. None:
            taken as they come. All arithmetic is float32 either way.
        custom_function: for ``custom``: ``(hidden_states, router_logits, top_k, renormalize) -> (weights, ids)``.

    Raises:
        ValueError, TypeError: a value that breaks a rule; the message names the rule, the values and the way out.

    Example:
        >>> RoutingConfig("deepseek_v3", num_expert_group=8, topk_group=4, routed_scaling_factor=2.5).rule.group_score
        'top2_sum'
    """

    method: RoutingMethod | str = RoutingMethod.RENORMALIZE
    num_expert_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float | int = 1.0
    renormalize: bool | None = None
    router_logits_dtype: DTypeLike | None = None
    custom_function: Callable | None = None

    def __post_init__(self) -> None:
        try:
            set_field(self, "method", RoutingMethod(self.method))
        except ValueError:
            names = ", ".join(method.value for method in RoutingMethod)
            raise ValueError(f"routing method={self.method!r} is not one of {names}") from None
        self._check_groups()
        try:
            scale = float(self.routed_scaling_factor)
        except (TypeError, ValueError):
            raise TypeError(f"routed_scaling_factor={self.routed_scaling_factor!r} must be a number") from None
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"routed_scaling_factor={scale} must be positive and finite; 1.0 leaves the weights alone")
        set_field(self, "routed_scaling_factor", scale)
        if self.router_logits_dtype is not None:
            _check_dtype(self, "router_logits_dtype")
        self._check_renormalize()
        if self.method is RoutingMethod.CUSTOM and not callable(self.custom_function):
            raise ValueError(
                "routing method 'custom' needs custom_function: "
                "(hidden_states, router_logits, top_k, renormalize) -> (weights, ids)"
            )
        if self.method is not RoutingMethod.CUSTOM and self.custom_function is not None:
            raise ValueError(
                f"custom_function is not used by routing method {self.method.value!r}; use method='custom'"
            )

    def _check_groups(self) -> None:
        check_int(self, "num_expert_group", 1)
        check_int(self, "topk_group", 1)
        if self.topk_group > self.num_expert_group:
            raise ValueError(
                f"topk_group={self.topk_group} must not exceed num_expert_group={self.num_expert_group}, "
                "the number of groups there are to choose from"
            )
        if self.num_expert_group > 1 and METHOD_SPECS[self.method].group_score is None:
            grouped = ", ".join(method.value for method, spec in METHOD_SPECS.items() if spec.group_score)
            raise ValueError(
                f"num_expert_group={self.num_expert_group} has no meaning for routing method {self.method.value!r}; "
                f"leave it 1, or use one of {grouped}"
            )

    def _check_renormalize(self) -> None:
        if self.renormalize is None:
            return
        check_bool(self, "renormalize")
        spec = METHOD_SPECS[self.method]
        if spec.renormalize_is_free or self.renormalize == spec.renormalize:
            return
        other = {
            RoutingMethod.DEFAULT: "renormalize",
            RoutingMethod.RENORMALIZE: "default",
            RoutingMethod.RENORMALIZE_NAIVE: "default",
            RoutingMethod.SIGMOID: "sigmoid_renorm",
            RoutingMethod.SIGMOID_RENORM: "sigmoid",
        }.get(self.method)
        way_out = f"; use method={other!r}" if other else "; leave it None"
        raise ValueError(f"renormalize={self.renormalize} contradicts routing method {self.method.value!r}{way_out}")

    @property
    def renormalizes(self) -> bool:
        """Whether the weights of a token sum to one before they are scaled: `renormalize`, or the method's default."""
        return METHOD_SPECS[self.method].renormalize if self.renormalize is None else self.renormalize

    @property
    def renorm_epsilon(self) -> float:
        """Added to the sum by which weights are divided."""
        return METHOD_SPECS[self.method].renorm_epsilon

    @property
    def takes_correction_bias(self) -> bool:
        """Whether the method can select by score plus a correction bias."""
        return METHOD_SPECS[self.method].takes_correction_bias

    @property
    def rule(self) -> RoutingRule | None:
        """The method as the top-k operation sees it; None for ``hash``, ``custom`` and the simulated ones.

        Example:
            >>> RoutingConfig("sigmoid").rule.score
            'sigmoid'
            >>> RoutingConfig("hash").rule is None
            True
        """
        spec = METHOD_SPECS[self.method]
        if spec.score is None:
            return None
        # A token that may visit every group is not restricted at all: one rule, hence one kernel, for both spellings.
        grouped = spec.group_score is not None and self.topk_group < self.num_expert_group
        return RoutingRule(
            score=spec.score,
            weight=spec.weight,
            renormalize=self.renormalizes and spec.weight == "score",  # a softmax over the k sums to one already
            renorm_epsilon=spec.renorm_epsilon,
            num_expert_group=self.num_expert_group if grouped else 1,
            topk_group=self.topk_group if grouped else 1,
            group_score=spec.group_score if grouped else "max",
            scale=self.routed_scaling_factor,
        )


@dataclass(frozen=True)
class MoEConfig:
    """What a Mixture-of-Experts layer computes. Everything in it is static: it can be a static argument of a jit.

    Attributes:
        num_experts: routed experts of the whole layer, over all ranks (``E``).
        top_k: experts per token (``k``).
        hidden_size: ``H``.
        intermediate_size: of one routed expert (``I``).
        activation: a name of `moe_jax.activations.ACTIVATIONS`.
        swiglu_alpha, swiglu_beta, swiglu_limit: parameters of the activation, None for its defaults
            (see `moe_jax.activations.get_activation`).
        routing: how tokens choose their experts.
        has_bias: the experts have ``w13_bias`` and ``w2_bias``.
        has_router_bias: the router projection has a bias.
        has_correction_bias: the router has a bias for the selection only.
        apply_router_weight_on_input: multiply the expert's input, not its output, by the router weight (Llama 4); needs
            ``top_k=1``.
        quantization: number format of the experts' weights, and of the rows that meet them: a `QuantFormat` or its name, see
            `moe_jax.quantization.quant_format`; a `QuantFormat` once the config is made. None: not quantized.
        fp8_training: which products of the layer and of its gradient are FP8, of weights that are not quantized:
            `moe_jax.Fp8Training`. None: none.
        dtype: compute dtype, ``bfloat16``, ``float16`` or ``float32`` (a name or a dtype; a name once the config is
            made); matmuls accumulate in float32 in any case.
        num_shared_experts: experts that every token visits.
        shared_intermediate_size: intermediate size of all shared experts together.
        shared_expert_gate: the shared output is multiplied by a sigmoid gate (Qwen2-MoE).

    Raises:
        ValueError, TypeError: a value that breaks a rule; the message names the rule, the values and the way out.

    Example:
        >>> config = MoEConfig(num_experts=128, top_k=8, hidden_size=2048, intermediate_size=768)
        >>> config.w13_rows
        1536
        >>> MoEConfig(num_experts=4, top_k=5, hidden_size=64, intermediate_size=32)
        Traceback (most recent call last):
        ...
        ValueError: top_k=5 must not exceed num_experts=4
    """

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    activation: str = "silu"
    swiglu_alpha: float | int | None = None
    swiglu_beta: float | int | None = None
    swiglu_limit: float | int | None = None
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    has_bias: bool = False
    has_router_bias: bool = False
    has_correction_bias: bool = False
    apply_router_weight_on_input: bool = False
    dtype: DTypeLike = "bfloat16"
    num_shared_experts: int = 0
    shared_intermediate_size: int = 0
    shared_expert_gate: bool = False
    quantization: QuantFormat | str | None = None
    fp8_training: Fp8Training | None = None

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "hidden_size", "intermediate_size"):
            check_int(self, name, 1)
        for name in ("num_shared_experts", "shared_intermediate_size"):
            check_int(self, name, 0)
        for name in (
            "has_bias",
            "has_router_bias",
            "has_correction_bias",
            "apply_router_weight_on_input",
            "shared_expert_gate",
        ):
            check_bool(self, name)
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} must not exceed num_experts={self.num_experts}")
        _check_dtype(self, "dtype")
        set_field(self, "activation", canonical_name(self.activation))
        _ = self.act  # raises for parameters that the activation does not have
        if self.quantization is not None:
            set_field(self, "quantization", quant_format(self.quantization))
        if self.fp8_training is not None:
            self._check_fp8_training()
        self._check_routing()
        self._check_shared()

    def _check_fp8_training(self) -> None:
        if not isinstance(self.fp8_training, Fp8Training):
            raise TypeError(f"fp8_training={self.fp8_training!r} must be a moe_jax.Fp8Training, or None")
        if self.quantization is not None:
            raise ValueError(
                f"fp8_training and quantization={self.quantization.name!r} exclude each other: what is trained are weights that "
                "are not quantized; leave quantization None, or use dequantize_experts and train those"
            )
        self.fp8_training.check(self.hidden_size, self.intermediate_size, self.dtype)

    def _check_routing(self) -> None:
        routing = self.routing
        if not isinstance(routing, RoutingConfig):
            raise TypeError(f"routing={routing!r} must be a RoutingConfig, e.g. RoutingConfig(method='renormalize')")
        if self.apply_router_weight_on_input and self.top_k != 1:
            raise ValueError(
                f"apply_router_weight_on_input needs top_k=1, got top_k={self.top_k}: with more experts a token "
                "has no single weight; set apply_router_weight_on_input=False to weigh the outputs"
            )
        if routing.method is RoutingMethod.LLAMA4 and self.top_k != 1:
            raise ValueError(
                f"routing method 'llama4' takes the single best expert, got top_k={self.top_k}; use top_k=1, or "
                "method='sigmoid', which gives each of the k experts the sigmoid of its logit"
            )
        if self.has_correction_bias and not routing.takes_correction_bias:
            takers = ", ".join(method.value for method, spec in METHOD_SPECS.items() if spec.takes_correction_bias)
            raise ValueError(
                f"has_correction_bias=True but routing method {routing.method.value!r} takes no correction bias; use "
                f"one of {takers}, or has_correction_bias=False"
            )
        groups = routing.num_expert_group
        if groups == 1:
            return
        if self.num_experts % groups:
            raise ValueError(
                f"num_experts={self.num_experts} must be a multiple of num_expert_group={groups}: groups are equal"
            )
        per_group = self.num_experts // groups
        if METHOD_SPECS[routing.method].group_score == "top2_sum" and per_group < 2:
            raise ValueError(
                f"routing method {routing.method.value!r} scores a group by its best two experts, but num_experts="
                f"{self.num_experts} in num_expert_group={groups} leaves {per_group} per group; use fewer groups"
            )
        if self.top_k > routing.topk_group * per_group:
            raise ValueError(
                f"top_k={self.top_k} must not exceed the {routing.topk_group * per_group} experts in topk_group="
                f"{routing.topk_group} groups of {per_group}; raise topk_group or lower top_k"
            )

    def _check_shared(self) -> None:
        if (self.num_shared_experts > 0) != (self.shared_intermediate_size > 0):
            raise ValueError(
                f"num_shared_experts={self.num_shared_experts} and shared_intermediate_size="
                f"{self.shared_intermediate_size} must both be positive or both be 0; the size is that of all shared "
                "experts together"
            )
        if self.shared_expert_gate and self.num_shared_experts == 0:
            raise ValueError("shared_expert_gate=True needs num_shared_experts >= 1; there is nothing to gate")

    @property
    def act(self) -> Activation:
        """The activation with its parameters."""
        return get_activation(self.activation, self.swiglu_alpha, self.swiglu_beta, self.swiglu_limit)

    @property
    def is_gated(self) -> bool:
        """Whether ``w13`` holds gate and up rows, or up rows alone."""
        return self.act.is_gated

    @property
    def w13_rows(self) -> int:
        """Rows of ``w13`` per expert: ``2I`` when gated, ``I`` when not."""
        return self.intermediate_size * (2 if self.is_gated else 1)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any] | Any, **overrides: Any) -> "MoEConfig":
        """Reads a Hugging Face config, an object or a dict, composite ones (``text_config``) included.

        Args:
            config: of Mixtral, Qwen2-MoE, Qwen3-MoE, DeepSeek-V2, DeepSeek-V3, OLMoE, GLM-4-MoE, gpt-oss, Llama 4,
                Phi-MoE or MiniMax-M2.
            **overrides: fields of `MoEConfig` that are set instead of read.

        Raises:
            ValueError: a model type that is not known, or a config that lacks a field.

        Example:
            >>> hf = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "hidden_size": 64,
            ...       "intermediate_size": 128, "hidden_act": "silu"}
            >>> MoEConfig.from_hf(hf, dtype="float32").num_experts
            8
        """
        from moe_jax.checkpoints.hf_config import config_from_hf  # checkpoints know configs, not the other way round

        return config_from_hf(config, **overrides)
