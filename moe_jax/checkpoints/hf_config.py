"""Hugging Face configs -> `MoEConfig`: what each model family's fields mean for an MoE layer."""

from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.config import MoEConfig, RoutingConfig
from moe_jax.routers import SparseMixer
from moe_jax.routing_methods import RoutingMethod


def config_from_hf(config: Mapping[str, Any] | Any, **overrides: Any) -> MoEConfig:
    """The `MoEConfig` of a Hugging Face config; `MoEConfig.from_hf` is the usual way to call it.

    Args:
        config: the parsed ``config.json`` or a transformers config object. A composite config (Llama 4 with vision) is
            read through its ``text_config``.
        **overrides: fields of `MoEConfig` that are set instead of read, e.g. ``dtype="float32"``.

    Raises:
        ValueError: a model type that is not known, a field that the family needs and the config lacks, or a value of a
            field (a scoring function, say) that the family's layer does not have.

    Source: the ``configuration_*.py`` and ``modeling_*.py`` of transformers 5, per family.

    Example:
        >>> config_from_hf({"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2,
        ...                 "hidden_size": 64, "intermediate_size": 128, "hidden_act": "silu"}).top_k
        2
    """
    fields = _Fields.of(config)
    values = {"dtype": fields.dtype(), **_FAMILIES[fields.model_type](fields)}
    return MoEConfig(**{**values, **overrides})


def sparse_layers(config: Mapping[str, Any] | Any) -> list[int]:
    """Which decoder layers of a Hugging Face config hold an MoE block; the others have a dense MLP.

    Args:
        config: as for `config_from_hf`; ``num_hidden_layers`` and the family's own rule are read
            (``decoder_sparse_step`` and ``mlp_only_layers``, ``first_k_dense_replace`` and ``moe_layer_freq``,
            ``moe_layers`` or ``interleave_moe_layer_step``).

    Returns:
        Layer indices in ascending order, from 0.

    Raises:
        ValueError: a model type that is not known, or a missing field.

    Example:
        >>> sparse_layers({"model_type": "deepseek_v3", "num_hidden_layers": 5, "first_k_dense_replace": 3})
        [3, 4]
    """
    fields = _Fields.of(config)
    layers = range(fields.need("num_hidden_layers"))
    if fields.model_type in ("qwen2_moe", "qwen3_moe"):
        dense, step = set(fields.get("mlp_only_layers", ())), fields.get("decoder_sparse_step", 1)
        return [layer for layer in layers if layer not in dense and (layer + 1) % step == 0]
    if fields.model_type in ("deepseek_v2", "deepseek_v3", "glm4_moe"):
        frequency, first = fields.get("moe_layer_freq", 1), fields.need("first_k_dense_replace")
        if not isinstance(frequency, int):  # one flag per layer
            return [layer for layer in layers if layer >= first and frequency[layer]]
        return [layer for layer in layers if layer >= first and layer % frequency == 0]
    if fields.model_type == "llama4_text":
        listed = fields.get("moe_layers", None)
        if listed is not None:
            return sorted(listed)
        step = fields.need("interleave_moe_layer_step")
        return list(layers[step - 1 :: step])
    return list(layers)


class _Fields:
    """The text config of a Hugging Face config, dict or object, with errors that name what is missing."""

    def __init__(self, config: Any, parent: Any = None):
        self._config = config
        self._parent = parent
        self.model_type = _read(config, "model_type")

    @classmethod
    def of(cls, config: Any) -> "_Fields":
        fields = cls(config)
        if fields.model_type not in _FAMILIES:
            text = _read(config, "text_config")
            if text is not None:
                fields = cls(text, parent=config)
        if fields.model_type not in _FAMILIES:
            raise ValueError(
                f"model_type={fields.model_type!r} is not a known MoE family; known: {', '.join(_FAMILIES)}. "
                "Make a MoEConfig by hand for another one"
            )
        return fields

    def get(self, name: str, default: Any) -> Any:
        """The field, or `default` where it is absent or None."""
        value = _read(self._config, name)
        return default if value is None else value

    def need(self, *names: str) -> Any:
        """The first of several spellings of a field that is there."""
        for name in names:
            value = _read(self._config, name)
            if value is not None:
                return value
        raise ValueError(
            f"the {self.model_type} config has no {' or '.join(names)}; add the field, as in the model's config.json"
        )

    def expect(self, name: str, *allowed: Any) -> None:
        """Raises if the field is there with a value that this family's layer does not implement."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"{name}={value!r} is not supported for {self.model_type} (only {', '.join(map(repr, allowed))}); "
                "make a MoEConfig by hand, with the routing that this model has"
            )

    def dtype(self) -> str:
        """The dtype of the weights as a name; bfloat16 where the config does not say."""
        for config in (self._config, self._parent):
            # transformers 5 renamed torch_dtype to dtype, and warns where the old name is read.
            value = _read(config, "dtype") or (None if hasattr(config, "dtype") else _read(config, "torch_dtype"))
            if value is not None and value != "auto":
                return str(value).removeprefix("torch.")  # torch.bfloat16 prints as its own name
        return "bfloat16"


def _read(config: Any, name: str) -> Any:
    if isinstance(config, Mapping):
        return config.get(name)
    return getattr(config, name, None)


def _common(fields: _Fields, experts: tuple[str, ...], intermediate: str) -> dict[str, Any]:
    """What every family has, under the names that this one uses."""
    return {
        "num_experts": fields.need(*experts),
        "top_k": fields.need("num_experts_per_tok"),
        "hidden_size": fields.need("hidden_size"),
        "intermediate_size": fields.need(intermediate),
        "activation": fields.get("hidden_act", "silu"),
    }


# transformers maps one of the two names to the other, and not in the same direction for every family and release.
_COUNT = ("num_local_experts", "num_experts")
_ROUTED = ("n_routed_experts", "num_local_experts", "num_experts")


def _softmax_routing(fields: _Fields) -> RoutingConfig:
    """Softmax over all experts, then top-k, renormalised or not. Renormalised it is the softmax of the k logits."""
    return RoutingConfig(RoutingMethod.RENORMALIZE if fields.need("norm_topk_prob") else RoutingMethod.DEFAULT)


def _mixtral(fields: _Fields) -> dict[str, Any]:
    return _common(fields, _COUNT, "intermediate_size") | {"routing": RoutingConfig(RoutingMethod.RENORMALIZE)}


def _olmoe(fields: _Fields) -> dict[str, Any]:
    return _common(fields, _COUNT, "intermediate_size") | {"routing": _softmax_routing(fields)}


def _qwen3(fields: _Fields) -> dict[str, Any]:
    return _common(fields, _COUNT, "moe_intermediate_size") | {"routing": _softmax_routing(fields)}


def _qwen2(fields: _Fields) -> dict[str, Any]:
    return _qwen3(fields) | {
        "num_shared_experts": 1,
        "shared_intermediate_size": fields.need("shared_expert_intermediate_size"),
        "shared_expert_gate": True,
    }


def _deepseek_shared(fields: _Fields) -> dict[str, Any]:
    """Several shared experts of one model are stored, and computed, as one wide expert."""
    count = fields.get("n_shared_experts", 0)
    return {
        "num_shared_experts": count,
        "shared_intermediate_size": count * fields.need("moe_intermediate_size"),
    }


def _deepseek_v2(fields: _Fields) -> dict[str, Any]:
    fields.expect("scoring_func", "softmax")
    fields.expect("topk_method", "greedy", "group_limited_greedy")
    grouped = fields.get("topk_method", "greedy") == "group_limited_greedy"  # greedy ignores n_group and topk_group
    routing = RoutingConfig(
        RoutingMethod.DEEPSEEK_V2,
        num_expert_group=fields.need("n_group") if grouped else 1,
        topk_group=fields.need("topk_group") if grouped else 1,
        routed_scaling_factor=fields.need("routed_scaling_factor"),
        renormalize=bool(fields.need("norm_topk_prob")),
    )
    return _common(fields, _ROUTED, "moe_intermediate_size") | {"routing": routing} | _deepseek_shared(fields)


def _deepseek_v3(fields: _Fields) -> dict[str, Any]:
    fields.expect("scoring_func", "sigmoid")
    fields.expect("topk_method", "noaux_tc")
    routing = RoutingConfig(
        RoutingMethod.DEEPSEEK_V3,
        num_expert_group=fields.need("n_group"),
        topk_group=fields.need("topk_group"),
        routed_scaling_factor=fields.need("routed_scaling_factor"),
        renormalize=bool(fields.need("norm_topk_prob")),
    )
    values = _common(fields, _ROUTED, "moe_intermediate_size") | _deepseek_shared(fields)
    return values | {"routing": routing, "has_correction_bias": True}


def _gpt_oss(fields: _Fields) -> dict[str, Any]:
    return _common(fields, _COUNT, "intermediate_size") | {
        "activation": "swigluoai",  # hidden_act says silu, but the layer does not read it
        "swiglu_alpha": fields.get("swiglu_alpha", 1.702),
        "swiglu_limit": fields.get("swiglu_limit", 7.0),
        "routing": RoutingConfig(RoutingMethod.RENORMALIZE),
        "has_bias": True,
        "has_router_bias": True,
    }


def _llama4(fields: _Fields) -> dict[str, Any]:
    return _common(fields, _COUNT, "intermediate_size") | {
        "routing": RoutingConfig(RoutingMethod.LLAMA4),
        "apply_router_weight_on_input": True,
        "num_shared_experts": 1,
        "shared_intermediate_size": fields.need("intermediate_size"),
    }


def _phimoe(fields: _Fields) -> dict[str, Any]:
    mixer = SparseMixer(fields.need("router_jitter_noise"))
    routing = RoutingConfig(RoutingMethod.CUSTOM, renormalize=False, custom_function=mixer)
    return _common(fields, _COUNT, "intermediate_size") | {"routing": routing}


def _minimax_m2(fields: _Fields) -> dict[str, Any]:
    fields.expect("scoring_func", "sigmoid")
    fields.expect("use_routing_bias", True)
    fields.expect("shared_intermediate_size", 0)
    routing = RoutingConfig(
        RoutingMethod.MINIMAX2, routed_scaling_factor=fields.get("routed_scaling_factor", 1.0), renormalize=True
    )
    return _common(fields, _COUNT, "intermediate_size") | {"routing": routing, "has_correction_bias": True}


_FAMILIES: dict[str, Callable[[_Fields], dict[str, Any]]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2,
    "qwen3_moe": _qwen3,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "olmoe": _olmoe,
    "glm4_moe": _deepseek_v3,  # the same block, with its own defaults
    "gpt_oss": _gpt_oss,
    "llama4_text": _llama4,
    "phimoe": _phimoe,
    "minimax_m2": _minimax_m2,
}
